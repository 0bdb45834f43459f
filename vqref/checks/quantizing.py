"""Checks of ``quantize``, as functions of the kit. ``quantizing_checks`` gives them names."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np

from vqref.agreement.report import Check
from vqref.checks.adversary import CASES, decades
from vqref.checks.kit import EDGES, HUGE, LATENTS, MANY, Kit, Named, equal, layouts
from vqref.quantizer import quantize as quantize_exactly
from vqref.validation import Array

EDITS = 2
"""The stream of random numbers for changes."""

FEW = 256
"""How many latents are aimed at codes, besides those near powers of two."""


def quantizing_checks(kit: Kit) -> Named:
    """Returns every check of ``quantize`` by name."""
    shaped = {name: partial(_batches, shapes=[shape]) for name, shape in kit.shapes.items()}
    return {
        **{name: partial(_case, name=name) for name in CASES},
        "scales": scales,
        "exact_ties": exact_ties,
        "positions": positions,
        **shaped,
        "empty_batch": empty_batch,
        "batch_sizes": batch_sizes,
        "rare_fault": rare_fault,
        "every_code": every_code,
        "every_element": every_element,
        "fresh_codebook": fresh_codebook,
        "codebook_edited": codebook_edited,
        "latents_edited": latents_edited,
        "inputs_kept": inputs_kept,
        "answers_kept": answers_kept,
        "layouts": other_layouts,
        **(ANY_SIZE if kit.any_size else {}),
        "many_calls": many_calls,
    }


def _case(kit: Kit, name: str) -> Iterable[Check]:
    """A case of ``vqref.checks.adversary``."""
    return kit.judge(*CASES[name](kit.rng(), kit.amounts.latents, *kit.codes, kit.precision))


def scales(kit: Kit) -> Iterator[Check]:
    """Latents and codes that are both small or both large.

    Nothing may be added to a distance, and no distance may be clamped.
    """
    rng, span = kit.rng(), decades(kit.precision)
    latents, codebook = rng.normal(size=(512, 1, kit.code_size)), rng.normal(size=kit.codes)
    for exponent in np.linspace(-span, span, 9):
        scale = 10**exponent
        yield from kit.judge(kit.held(latents * scale), kit.held(codebook * scale))


def exact_ties(kit: Kit) -> Iterator[Check]:
    """Ties between numbers for which every operation is exact in any precision and form.

    The lowest index must win, however far away in the codebook the other one is.
    """
    rng, (k, d) = kit.rng(), kit.codes
    whole = rng.integers(-1, 2, (k + kit.amounts.latents, d))
    whole[:, 16:] = 0  # 8 bits then hold every sum
    rows, latents = kit.held(whole[:k]), kit.held(whole[k:])[:, None]
    for copies in (np.arange(k) % (k // 2), rng.integers(0, max(1, k // 3), k)):
        expected = quantize_exactly(latents, rows[copies]).indices
        yield equal("indices", kit.indices(latents.copy(), rows[copies]), expected)


def positions(kit: Kit) -> Iterator[Check]:
    """Several latents per image: (N, S, D) in, (N, S) out, for every N up to 7 and S up to 20."""
    yield from _batches(kit, itertools.product(range(1, 8), range(1, 21)))


def empty_batch(kit: Kit) -> Iterator[Check]:
    """No latents in, no indices out."""
    yield from _batches(kit, [(0, 3)])


def batch_sizes(kit: Kit) -> Iterator[Check]:
    """Sizes near every power of two, as images and as positions.

    Blocks begin and end there, and the last block is not full.
    """
    yield from _batches(kit, [(size, 1) for size in EDGES if size <= kit.affordable])
    yield from _batches(kit.small(), [(1, size) for size in EDGES if size <= kit.affordable])


def rare_fault(kit: Kit) -> Iterator[Check]:
    """Many latents. If one index in 50,000 is wrong, the check must notice."""
    small = kit.small()
    yield from _batches(kit, [(min(MANY, kit.affordable), 1)])
    yield from _batches(small, [(min(MANY, small.affordable), 1)] * kit.amounts.batches)


def every_code(kit: Kit) -> Iterator[Check]:
    """Latents on codes and near them. Each code must be found, also the first and the last."""
    rng = kit.rng()
    yield from _aimed(kit, rng, kit.spread(kit.affordable // 2))


def every_element(kit: Kit) -> Iterator[Check]:
    """Codes that differ in a single element, for every element. None may be left out."""
    rng, (k, d) = kit.rng(), kit.codes
    for start in range(0, d, k // 2):
        elements = np.arange(start, min(d, start + k // 2))
        rows = np.repeat(np.arange(len(elements)), 2)
        codebook = np.full((k, d), 2.0)  # the rest is far away
        codebook[: len(rows)] = 0.0
        codebook[np.arange(len(rows)), elements[rows]] = np.tile([1.0, -1.0], len(elements))
        latents = codebook[: len(rows)] * rng.uniform(0.75, 1.25, (len(rows), 1))
        yield from kit.judge(kit.held(latents)[:, None], kit.held(codebook))


def fresh_codebook(kit: Kit) -> Iterator[Check]:
    """Two codebooks in turn. The implementation must not remember the first."""
    rng = kit.rng()
    latents = kit.normal(rng, 99, 1, kit.code_size)
    for _ in range(2):
        yield from kit.judge(latents, kit.normal(rng, *kit.codes))


def codebook_edited(kit: Kit) -> Iterator[Check]:
    """One codebook, changed in place between calls. Nothing made from old values may be reused.

    Changes the last row, single elements, the order of rows, and all rows.
    """
    codebook = kit.normal(kit.rng(), *kit.codes)
    latents = codebook[kit.spread(FEW)][:, None]
    for _ in _edited(kit, codebook):
        yield from kit.judge_answer(kit.quantize(latents.copy(), codebook), latents, codebook)


def latents_edited(kit: Kit) -> Iterator[Check]:
    """One array of latents, changed in place between calls in the same ways."""
    rng = kit.rng()
    codebook = kit.normal(rng, *kit.codes)
    latents = codebook[kit.spread(FEW)][:, None]
    for _ in _edited(kit, latents[:, 0]):
        yield from kit.judge_answer(kit.quantize(latents, codebook.copy()), latents, codebook)


def _edited(kit: Kit, rows: Array) -> Iterator[None]:
    """Changes rows (n, D) in place in several ways. The first yield comes before any change."""
    rng, middle = kit.rng(EDITS), len(rows) // 2
    yield
    rows[-1] += kit.held(3.0)
    yield
    rows[middle, kit.code_size // 2] -= kit.held(5.0)
    yield
    for row, element in rng.integers(0, rows.shape, (16, 2)):
        rows[row, element] -= kit.held(5.0)
        yield
    rows[[0, middle]] = rows[[middle, 0]]
    yield
    rows[:] = rows[::-1].copy()
    yield
    rows[:] = kit.normal(rng, *rows.shape)
    yield


def inputs_kept(kit: Kit) -> Iterator[Check]:
    """Latents and codebook must not change, and equal calls must give equal answers."""
    rng = kit.rng()
    codebook = kit.normal(rng, *kit.codes)
    for n in (1, 99, 4097):
        latents = kit.normal(rng, n, 1, kit.code_size)
        given = latents.copy(), codebook.copy()
        first = kit.indices(*given).copy()
        yield equal("latents", given[0], latents)
        yield equal("codebook", given[1], codebook)
        yield equal("indices", kit.indices(latents.copy(), codebook.copy()), first)


def answers_kept(kit: Kit) -> Iterator[Check]:
    """An answer belongs to the caller.

    Later calls and changes of the inputs must not change it. Changes of the answer must not change
    anything else.
    """
    rng = kit.rng()
    codebook = kit.normal(rng, *kit.codes)
    rows, before = codebook.copy(), codebook.copy()
    shapes = 4 * ((6, 2), (6, 2), (3, 4), (1, 1), (LATENTS + 1, 1))
    inputs = [kit.normal(rng, n, s, kit.code_size) for n, s in shapes]
    given = [latents.copy() for latents in inputs]
    answers = [kit.arrays(kit.quantize(latents, rows)) for latents in given]
    for latents, answer in zip(inputs, answers, strict=True):
        found = answer if len(answer) > 1 else answer[0]
        yield from kit.judge_answer(found, latents, codebook)
    held = [tuple(array.copy() for array in answer) for answer in answers]
    for array in (rows, *given):
        array[...] += 1
    for answer, expected in zip(answers, held, strict=True):
        for found, wanted in zip(answer, expected, strict=True):
            yield equal("an earlier answer", found, wanted)
    rows[:] = before
    for array in (array for answer in answers for array in answer if array.flags.writeable):
        array[...] = 0
    yield equal("codebook", rows, before)
    for latents in reversed(inputs):
        yield from kit.judge_answer(kit.quantize(latents.copy(), rows), latents, before)


def other_layouts(kit: Kit) -> Iterator[Check]:
    """The same values in other memory layouts: strided, reversed, read-only.

    An implementation may refuse a layout with an error. It must not misread it.
    """
    rng = kit.rng()
    latents, codebook = kit.normal(rng, 9, 9, kit.code_size), kit.normal(rng, *kit.codes)
    exchanged = latents.swapaxes(0, 1)  # the same shape and address
    for given in (latents, exchanged, *(view for _, view in layouts(latents))):
        yield from _unless_refused(kit, given, codebook.copy())
    for _, view in layouts(codebook):
        yield from _unless_refused(kit, latents.copy(), view)


def _unless_refused(kit: Kit, latents: Array, codebook: Array) -> Iterator[Check]:
    try:
        with warnings.catch_warnings(action="ignore"):  # of read-only arrays
            found = kit.quantize(latents, codebook)
    except Exception:  # somebody's implementation can raise anything
        return
    yield from kit.judge_answer(found, latents, codebook)


def few_codes(kit: Kit) -> Iterator[Check]:
    """Two to eight codes."""
    yield from _codebooks(kit, [k for k in kit.amounts.codes if k <= 8])


def odd_codes(kit: Kit) -> Iterator[Check]:
    """Numbers of codes that 8 does not divide, so that a last block of codes is not full."""
    yield from _codebooks(kit, [k for k in kit.amounts.codes if k > 8 and k % 8])


def many_codes(kit: Kit) -> Iterator[Check]:
    """More than 64 codes."""
    yield from _codebooks(kit, [k for k in kit.amounts.codes if k > 64])


def huge_codebook(kit: Kit) -> Iterator[Check]:
    """More codes than 16 bits can number."""
    sized = kit.sized(HUGE, 2)
    yield from _aimed(sized, kit.rng(), sized.spread(32))


def one_element(kit: Kit) -> Iterator[Check]:
    """Codes of one element."""
    yield from _elements(kit, [1])


def odd_code_sizes(kit: Kit) -> Iterator[Check]:
    """Odd code sizes, so that a last vector of elements is not full."""
    yield from _elements(kit, [d for d in kit.code_sizes if d % 2])


def code_sizes(kit: Kit) -> Iterator[Check]:
    """Every even code size up to 34, and large ones."""
    yield from _elements(kit, [d for d in kit.code_sizes if d % 2 == 0])


def square_codebook(kit: Kit) -> Iterator[Check]:
    """As many codes as elements; then also as many images and positions."""
    for size in (8, 16, 33):
        square = kit.sized(size, size)
        yield from _aimed(square, kit.rng(), np.arange(size))
        yield from _batches(square, [(size, size)])


def million_latents(kit: Kit) -> Iterator[Check]:
    """A million latents in one batch."""
    yield from _batches(kit.sized(5, 2), [(kit.amounts.million, 1)])


ANY_SIZE: Named = {
    "few_codes": few_codes,
    "odd_codes": odd_codes,
    "many_codes": many_codes,
    "huge_codebook": huge_codebook,
    "one_element": one_element,
    "odd_code_sizes": odd_code_sizes,
    "code_sizes": code_sizes,
    "square_codebook": square_codebook,
    "million_latents": million_latents,
}
"""The checks that try codebooks of other sizes."""


def many_calls(kit: Kit) -> Iterator[Check]:
    """Many calls of one kind, each judged: the twentieth must be as right as the first.

    Every third call has a new codebook.
    """
    rng = kit.rng()
    codebook = kit.normal(rng, *kit.codes)
    for call in range(kit.amounts.calls):
        codebook = kit.normal(rng, *kit.codes) if call % 3 == 0 else codebook
        yield from kit.judge(kit.normal(rng, 8, 1, kit.code_size), codebook)


def _batches(kit: Kit, shapes: Iterable[tuple[int, int]]) -> Iterator[Check]:
    """Normal latents of each shape (N, S), and one normal codebook."""
    rng = kit.rng()
    codebook = kit.normal(rng, *kit.codes)
    for n, s in shapes:
        yield from kit.judge(kit.normal(rng, n, s, kit.code_size), codebook)


def _aimed(kit: Kit, rng: np.random.Generator, codes: Array) -> list[Check]:
    """Latents on these codes and near them, in random order. One code is zero."""
    codebook = kit.normal(rng, *kit.codes)
    codebook[len(codebook) // 2] = 0.0
    rows = codebook[rng.permutation(codes)]
    beside = rows + kit.held(0.05 * rng.normal(size=rows.shape))
    return kit.judge(np.concatenate([rows, beside])[:, None], codebook)


def _codebooks(kit: Kit, numbers: Iterable[int]) -> Iterator[Check]:
    rng = kit.rng()
    for k in numbers:
        sized = kit.sized(k, kit.code_size)
        yield from _aimed(sized, rng, sized.spread(FEW))


def _elements(kit: Kit, sizes: Iterable[int]) -> Iterator[Check]:
    for d in sizes:
        sized = kit.sized(kit.num_codes, d)
        yield from _batches(sized, [(128, 1)])
        yield from every_element(sized)
