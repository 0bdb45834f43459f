"""Checks of ``update`` and ``step``, which ``updating_checks`` and ``stepping_checks`` name.

Checks of moved averages are functions of a ``Move``, which is one of the two.
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from vqref.agreement.report import Check
from vqref.agreement.stages import STATE
from vqref.checks.kit import (
    EDGES,
    HUGE,
    MANY,
    Given,
    Kit,
    Move,
    Named,
    Stepping,
    Updating,
    equal,
    layouts,
)
from vqref.quantizer import EMAState
from vqref.validation import Array

STEPS = 100
"""How many updates in a row ``hundred_steps`` judges."""

HITS = (127, 255, 2048, 32767, 65535)
"""The largest counts that int8, uint8, float16 (all whole numbers), int16 and uint16 hold."""

LATE = (1, 100, 200, 255, 256, 999, 1000, 32767, 65535, 10**6)
"""How many steps a state says it has had before an update."""

VALUES = {"large": (6, 8), "small": (-8, -6), "mixed": (-8, 8)}
"""Ranges of exponents of ten."""

DECAYS = (0.5, 0.9, 0.0, 0.75, 0.96875, 0.5, 0.9921875)
EPSILONS = (1e-5, 1e-3, 0.5, 1e-7)
"""Decays and epsilons that are used in turn.

Float32 holds most of the decays exactly, so 1 - decay is not rounded."""


def updating_checks(kit: Kit) -> Named:
    """Returns every check of ``update`` by name."""
    named: Named = {
        "first_step": first_step,
        "one_step": one_step,
        "never_hit": never_hit,
        "one_takes_all": one_takes_all,
        "foreign_indices": foreign_indices,
        "large_epsilon": large_epsilon,
        "decay_zero": partial(_with_decay, decay=0.0),
        "no_latents": no_latents,
        "hundred_steps": hundred_steps,
        "state_kept": partial(_with_move, check=state_kept, move=Updating),
    }
    if not kit.dialect.debiased:  # a debiased dialect divides by 1 - decay
        named["decay_one"] = partial(_with_decay, decay=1.0)
    return named | _moves(kit, Updating)


def stepping_checks(kit: Kit) -> Named:
    """Returns every check of ``step`` by name."""
    return {
        "order": order,
        "step_state_kept": partial(_with_move, check=state_kept, move=Stepping),
        **_moves(kit, Stepping),
    }


def _moves(kit: Kit, move: type[Move]) -> Named:
    """The checks for both, with ``ema_`` or ``step_`` before their names.

    Leaves out batches that are too large for a step with this codebook.
    """
    checks: dict[str, Callable[[Move], Iterable[Check]]] = {
        "positions": positions,
        **{name: partial(_shaped, shape=shape) for name, shape in kit.shapes.items()},
        "rare_fault": rare_fault,
        "batches": batch_sizes,
        **{
            f"hits_{most}": partial(many_hits, most=most)
            for most in HITS
            if move is Updating or most <= kit.affordable
        },
        "every_code": every_code,
        "decays": decays,
        **{name: partial(_values, low=low, high=high) for name, (low, high) in VALUES.items()},
        "late_steps": late_steps,
        "edited": edited,
        "answers": answers_kept,
        "layouts": other_layouts,
        **(ANY_SIZE if kit.any_size else {}),
        "long_run": long_run,
    }
    return {
        f"{move.name}_{name}": partial(_with_move, check=check, move=move)
        for name, check in checks.items()
    }


def _with_move(
    kit: Kit, check: Callable[[Move], Iterable[Check]], move: type[Move]
) -> Iterable[Check]:
    return check(move(kit))


def _given(
    kit: Kit,
    state: EMAState,
    latents: Array,
    indices: Array,
    decay: float | None = None,
    epsilon: float | None = None,
) -> Given:
    """The inputs of one move. decay and epsilon default to the dialect's."""
    return Given(
        state,
        latents,
        indices,
        kit.dialect.decay if decay is None else decay,
        kit.dialect.epsilon if epsilon is None else epsilon,
    )


def _batch(
    kit: Kit, rng: np.random.Generator, codes: Sequence[int] | Array, n: int = 33, s: int = 3
) -> tuple[Array, Array]:
    """Latents (n, s, D), and indices (n, s) drawn from ``codes``, so they are not the nearest."""
    latents = kit.normal(rng, n, s, kit.code_size)
    return latents, rng.choice(np.asarray(codes), (n, s))


def _anywhere(kit: Kit, n: int = 33, s: int = 3) -> Given:
    """A state in the middle of a run, and a batch whose indices can be any code."""
    return _given(kit, kit.midway(), *_batch(kit, kit.rng(), range(kit.num_codes), n, s))


def _updated(kit: Kit, given: Given) -> list[Check]:
    return Updating(kit).moved(given)[0]


def first_step(kit: Kit) -> Iterable[Check]:
    """One update of the state from which the dialect starts."""
    return _updated(kit, dataclasses.replace(_anywhere(kit), state=kit.start()))


def one_step(kit: Kit) -> Iterable[Check]:
    """One update of a state in the middle of a run."""
    return _updated(kit, _anywhere(kit))


def never_hit(kit: Kit) -> Iterable[Check]:
    """Half of the codes get no hit in the first three steps."""
    return _several(kit, 3, np.arange(kit.num_codes // 2))


def one_takes_all(kit: Kit) -> Iterable[Check]:
    """Every latent hits the same code. Hits must be summed, not set."""
    batch = _batch(kit, kit.rng(), [kit.num_codes - 1])
    return _updated(kit, _given(kit, kit.midway(), *batch))


def foreign_indices(kit: Kit) -> Iterable[Check]:
    """Indices that are not those of the nearest codes. The given indices decide."""
    state = kit.midway()
    latents = np.resize(state.codebook, (kit.num_codes, 1, kit.code_size))
    indices = np.roll(np.arange(kit.num_codes), 1)[:, None]
    return _updated(kit, _given(kit, state, kit.held(latents), indices))


def large_epsilon(kit: Kit) -> Iterable[Check]:
    """An epsilon so large that its effect shows."""
    return _updated(kit, dataclasses.replace(_anywhere(kit), epsilon=0.5))


def _with_decay(kit: Kit, decay: float) -> Iterable[Check]:
    """At a decay of 0, only this step counts. At 1, it does not count."""
    return _updated(kit, dataclasses.replace(_anywhere(kit), decay=decay))


def no_latents(kit: Kit) -> Iterable[Check]:
    """An empty batch only decays the averages."""
    return _updated(kit, _anywhere(kit, n=0))


def hundred_steps(kit: Kit) -> Iterable[Check]:
    """A hundred updates, each judged from the implementation's own last state.

    So only one step's rounding is allowed, however long the run is.
    """
    return _several(kit, STEPS, np.arange(kit.num_codes))


def _several(kit: Kit, steps: int, codes: Array) -> Iterator[Check]:
    rng, state = kit.rng(), kit.start()
    for _ in range(steps):
        checks, state = Updating(kit).moved(_given(kit, state, *_batch(kit, rng, codes)))
        yield from checks


def order(kit: Kit) -> Iterable[Check]:
    """A step must quantize with the codebook before the update, and update with the latents."""
    return Stepping(kit).moved(dataclasses.replace(_anywhere(kit), decay=0.5))[0]


def state_kept(move: Move) -> Iterator[Check]:
    """State, latents and indices must not change."""
    given = _anywhere(move.kit)
    copied = given.copied()
    move.call(copied)
    for name in STATE:
        yield equal(name, getattr(copied.state, name), getattr(given.state, name))
    yield equal("steps", np.asarray(copied.state.steps), np.asarray(given.state.steps))
    yield equal("latents", copied.latents, given.latents)
    yield equal("indices", copied.indices, given.indices)


def positions(move: Move) -> Iterator[Check]:
    """Every N up to 4 and every S up to 17."""
    for n, s in itertools.product(range(1, 5), range(1, 18)):
        yield from move.moved(_anywhere(move.kit, n, s))[0]


def _shaped(move: Move, shape: tuple[int, int]) -> Iterable[Check]:
    """A batch in which axes can be confused."""
    return move.moved(_anywhere(move.kit, *shape))[0]


def rare_fault(move: Move) -> Iterator[Check]:
    """Many latents for every code. If one in 50,000 is left out, the check must notice."""
    small = move.kit.small()
    state, rng = small.midway(), small.rng()
    for _ in range(small.amounts.batches):
        size = MANY if move.name == "ema" else min(MANY, small.affordable)
        batch = _batch(small, rng, range(small.num_codes), size, 1)
        yield from type(move)(small).moved(_given(small, state, *batch))[0]


def batch_sizes(move: Move) -> Iterator[Check]:
    """Sizes near every power of two, one latent per image and eight. None may be left out."""
    small = type(move)(move.kit.small())
    for size in EDGES:
        if move.name == "ema" or size <= move.kit.affordable:
            yield from move.moved(_anywhere(move.kit, size, 1))[0]
            yield from small.moved(_anywhere(small.kit, -(-size // 8), 8))[0]


def many_hits(move: Move, most: int) -> Iterable[Check]:
    """More hits of one code than a small integer type holds, and an odd number of them.

    The first and the last latent are alone with their codes. Sums are exact: codes are whole
    numbers, the code that takes all others is 0, and its latents have elements 0 and 1/4.
    """
    kit, rng = move.kit, move.kit.rng()
    k, d = kit.codes
    target = k - 2
    codebook = rng.integers(-2, 3, (k, d)).astype(np.float64)
    codebook[:, 0] = np.arange(k) - target
    codebook[target] = 0.0
    indices = np.full((most // 2 * 2 + 5, 1), target)
    indices[0], indices[-1] = k - 1, 0
    latents = codebook[indices] + rng.integers(0, 2, (*indices.shape, d)) / 4
    state = kit.midway()
    state = EMAState(codebook, state.ema_count, state.ema_means, state.steps)
    return move.moved(_given(kit, state, kit.held(latents), indices))[0]


def every_code(move: Move) -> Iterable[Check]:
    """Each code is hit, by its own number of latents. The first and the last must move too."""
    return _every_code(move, most=move.kit.affordable // 8)


def _every_code(move: Move, most: int) -> Iterable[Check]:
    kit, rng = move.kit, move.kit.rng()
    state = kit.midway()
    codes = kit.spread(most)
    indices = rng.permutation(np.repeat(codes, codes % 7 + 1))[:, None]
    beside = 0.05 * rng.normal(size=(*indices.shape, kit.code_size))
    latents = kit.held(state.codebook[indices] + beside)
    return move.moved(_given(kit, state, latents, indices))[0]


def decays(move: Move) -> Iterator[Check]:
    """Calls with changing decay and epsilon. Those of the current call count."""
    given = _anywhere(move.kit)
    for state in (given.state, move.kit.start()):
        for decay, epsilon in zip(DECAYS, itertools.cycle(EPSILONS), strict=False):
            changed = dataclasses.replace(given, state=state, decay=decay, epsilon=epsilon)
            yield from move.moved(changed)[0]


def _values(move: Move, low: int, high: int) -> Iterable[Check]:
    """Counts, means, codes and latents from 10^low to 10^high. Nothing may be clamped."""
    kit, rng = move.kit, move.kit.rng()
    count = kit.held(10 ** rng.uniform(low, high, kit.num_codes))
    codebook, means, latents = (
        kit.held(rng.normal(size=shape) * 10 ** rng.uniform(low, high, (*shape[:-1], 1)))
        for shape in (kit.codes, kit.codes, (33, 3, kit.code_size))
    )
    indices = rng.integers(0, kit.num_codes, (33, 3))
    return move.moved(_given(kit, EMAState(codebook, count, means, 7), latents, indices))[0]


def late_steps(move: Move) -> Iterator[Check]:
    """States that had many updates. The rule stays the same."""
    given = _anywhere(move.kit)
    for steps in LATE:
        state = dataclasses.replace(given.state, steps=steps)
        yield from move.moved(dataclasses.replace(given, state=state))[0]


def edited(move: Move) -> Iterator[Check]:
    """The same arrays, changed in place between calls. None may be remembered."""
    given = _anywhere(move.kit).copied()
    state, latents, indices = given.state, given.latents, given.indices
    changes: tuple[tuple[Array, Array], ...] = (
        (latents[-1:], latents[-1:] + 2),
        (state.codebook[-1:], state.codebook[-1:] + 2),
        (state.ema_means[-1:], state.ema_means[-1:] + 2),
        (state.ema_count[-1:], state.ema_count[-1:] + 3),
        (latents, latents[::-1].copy()),
        (indices[-1:], (indices[-1:] + 1) % move.kit.num_codes),
        (indices, indices[::-1].copy()),
    )
    yield from move.judge(move.call(given), given)[0]
    for array, changed in changes:
        array[...] = changed
        yield from move.judge(move.call(given), given)[0]


def answers_kept(move: Move) -> Iterator[Check]:
    """An answer belongs to the caller.

    Later calls and changes of the inputs must not change it. Changes of the answer must not change
    anything else.
    """
    kit = move.kit
    given = [_anywhere(kit, n) for n in 2 * (5, 5, 9, 1, 1000, 1000)]
    copied = [each.copied() for each in given]
    answers = [move.call(each) for each in copied]
    held = [[array.copy() for array in move.arrays(answer)] for answer in answers]
    for answer, each in zip(answers, given, strict=True):
        yield from move.judge(answer, each)[0]
    for each in copied:
        for array in (*(getattr(each.state, name) for name in STATE), each.latents):
            array[...] += 1.0
    for answer, expected in zip(answers, held, strict=True):
        for found, wanted in zip(move.arrays(answer), expected, strict=True):
            yield equal("an earlier answer", found, wanted)
            if found.flags.writeable:
                found[...] = 0
    for each in reversed(given):
        yield from move.moved(each)[0]


def other_layouts(move: Move) -> Iterator[Check]:
    """The same values in other memory layouts: strided, reversed, read-only.

    An implementation may refuse a layout with an error. It must not misread it.
    """
    given = _anywhere(move.kit, 9, 9)
    changed = [dataclasses.replace(given, latents=view) for _, view in layouts(given.latents)]
    changed += [dataclasses.replace(given, indices=view) for _, view in layouts(given.indices)]
    rows: Any = {name: np.asfortranarray(getattr(given.state, name)) for name in STATE}
    state = dataclasses.replace(given.state, **rows)
    changed.append(dataclasses.replace(given, state=state))
    for each in changed:
        try:
            with warnings.catch_warnings(action="ignore"):  # of read-only arrays
                found = move.call(each)
        except Exception:  # somebody's implementation can raise anything
            continue
        yield from move.judge(found, each)[0]


def num_codes(move: Move) -> Iterator[Check]:
    """Other numbers of codes, one of them more than 16 bits can number."""
    kit = move.kit
    for k, d in (*((k, kit.code_size) for k in kit.amounts.codes), (HUGE, 2)):
        yield from _every_code(type(move)(kit.sized(k, d)), most=32)


def code_size(move: Move) -> Iterator[Check]:
    """Other code sizes."""
    kit = move.kit
    for d in kit.code_sizes:
        sized = kit.sized(kit.num_codes, d)
        yield from type(move)(sized).moved(_anywhere(sized))[0]


def million_latents(move: Move) -> Iterable[Check]:
    """A million latents in one batch."""
    return many_hits(type(move)(move.kit.sized(5, 2)), most=move.kit.amounts.million)


ANY_SIZE: dict[str, Callable[[Move], Iterable[Check]]] = {
    "num_codes": num_codes,
    "code_size": code_size,
    "million": million_latents,
}
"""The checks that try codebooks of other sizes."""


def long_run(move: Move) -> Iterator[Check]:
    """Hundreds of moves in a row, each judged from the implementation's own last state."""
    kit, rng, state = move.kit, move.kit.rng(), move.kit.start()
    for _ in range(kit.amounts.steps if move.name == "ema" else kit.amounts.training):
        batch = _batch(kit, rng, range(kit.num_codes), 4, 2)
        checks, state = move.moved(_given(kit, state, *batch))
        yield from checks
        if not all(check.passed for check in checks):
            return
