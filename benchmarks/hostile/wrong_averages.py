"""Wrong moving averages and training steps, each with the check that must catch it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import vqref
from benchmarks.hostile.mutants import (
    Mutation,
    Plain,
    Single,
    bfloat16,
    contiguous,
    first,
    mutation,
    once,
)
from vqref.dialects import DIALECTS, POST, Dialect
from vqref.quantizer import EMAState
from vqref.validation import Array


def hits_in(caught_by: str, dtype: Any) -> Mutation:
    """Counts hits in a small type."""
    return mutation(
        caught_by, hits=lambda self, i, k: Plain.hits(self, i, k).astype(dtype).astype(Single)
    )


def updates(
    caught_by: str, change: Callable[..., tuple[Any, ...]], dialect: Dialect = POST
) -> Mutation:
    """Updates with other arguments: ``change(state, latents, indices, decay, epsilon)``."""
    return mutation(
        caught_by, update=lambda self, *given: Plain.update(self, *change(*given)), dialect=dialect
    )


def from_call(number: int, **changed: float) -> Any:
    """Uses other options from a certain call on."""

    def update(
        self: Plain, state: EMAState, x: Array, i: Array, decay: float, epsilon: float
    ) -> Any:
        options = {"decay": decay, "epsilon": epsilon}
        options |= changed if self.calls >= number else {}
        return Plain.update(self, state, x, i, **options)

    return update


def returns(
    caught_by: str, change: Callable[..., tuple[Any, ...]], dialect: Dialect = POST
) -> Mutation:
    """Returns another state.

    It is ``change((codebook, count, means), state, latents, indices, decay, epsilon)``.
    """

    def update(self: Plain, *given: Any) -> Any:
        after = Plain.update(self, *given)
        return tuple(np.asarray(array, Single) for array in change(after, *given))

    return mutation(caught_by, update=update, dialect=dialect)


def only_hit_codes(after: Any, state: EMAState, latents: Array, indices: Array, *_: Any) -> Any:
    hit = np.isin(np.arange(len(state.ema_count)), indices)
    before = state.codebook, state.ema_count, state.ema_means
    return tuple(
        np.where(hit.reshape(-1, *[1] * (a.ndim - 1)), a, b)
        for a, b in zip(after, before, strict=True)
    )


def mean_of_hits(self: Plain, latents: Array, indices: Array, k: int) -> Array:
    return Plain.sums(self, latents, indices, k) / np.maximum(self.hits(indices, k), 1)[:, None]


def set_not_summed(self: Plain, latents: Array, indices: Array, k: int) -> Array:
    sums = np.zeros((k, latents.shape[-1]), Single)
    sums[indices.ravel()] = latents.reshape(-1, latents.shape[-1])
    return sums


def renearest(self: Plain, state: EMAState, latents: Array, indices: Array, *options: Any) -> Any:
    indices = Plain.nearest(self, latents, state.codebook.astype(Single))
    return Plain.update(self, state, latents, indices, *options)


def changes(name: str) -> Callable[..., Any]:
    """Changes an array of the caller's in place."""

    def update(self: Plain, state: EMAState, latents: Array, indices: Array, *options: Any) -> Any:
        after = Plain.update(self, state, latents, indices, *options)
        given = {"latents": latents, "indices": indices}
        array = given[name] if name in given else getattr(state, name)
        array[...] = 0
        return after

    return update


def one_array(self: Plain, *given: Any) -> Any:
    codebook, count, means = Plain.update(self, *given)
    self.kept = self.kept or {}
    held = self.kept.setdefault(codebook.shape, codebook)
    held[...] = codebook
    return held, count, means


def shared(self: Plain, state: EMAState, *given: Any) -> Any:
    """Returns the caller's own array as means."""
    codebook, count, means = Plain.update(self, state, *given)
    state.ema_means[...] = means
    return EMAState(codebook, count, means).codebook, count, state.ema_means


def in_dialect(name: str) -> Callable[..., Any]:
    def update(self: Plain, state: EMAState, *given: Any) -> Any:
        latents, indices, decay, epsilon = given
        after = vqref.update_ema(state, latents, indices, decay, epsilon, DIALECTS[name])
        return tuple(a.astype(Single) for a in (after.codebook, after.ema_count, after.ema_means))

    return update


def miscounted(self: Plain, *given: Any) -> EMAState:
    codebook, count, means = Plain.update(self, *given)
    return EMAState(codebook, count, means, steps=1)


def dropped(where: Callable[[Array, int], Any]) -> dict[str, Any]:
    """Leaves latents out of hits and sums: ``where(number of each latent, how many)``."""

    def kept(indices: Array) -> Array:
        number = np.arange(indices.size)
        return ~np.broadcast_to(where(number, indices.size), number.shape)

    def hits(self: Plain, indices: Array, k: int) -> Array:
        return Plain.hits(self, indices.ravel()[kept(indices)], k)

    def sums(self: Plain, latents: Array, indices: Array, k: int) -> Array:
        rows = latents.reshape(-1, latents.shape[-1])[kept(indices)]
        return Plain.sums(self, rows, indices.ravel()[kept(indices)], k)

    return {"hits": hits, "sums": sums}


def unlike(shape: Callable[[tuple[int, ...]], bool]) -> Callable[..., Array]:
    """Takes each latent for the next one, in batches of some shapes (N, S, D)."""

    def sums(self: Plain, latents: Array, indices: Array, k: int) -> Array:
        if shape(latents.shape):
            rows = latents.reshape(-1, latents.shape[-1])
            latents = np.concatenate([rows[1:], 2 * rows[:1] + 1])
        return Plain.sums(self, latents, indices, k)

    return sums


def reset_at(call: int) -> Callable[..., Any]:
    """In one call, returns the state at the start."""
    return lambda self, state, *given: Plain.update(
        self, EMAState.start(state.codebook) if self.calls == call else state, *given
    )


def by_identity(self: Plain, state: EMAState, *given: Any) -> Any:
    """Uses an earlier content of the same state."""
    self.kept = self.kept or {}
    held = self.kept.setdefault(id(state), (copy.deepcopy(state), state))[0]
    return Plain.update(self, held, *given)


def by_beginning(self: Plain, indices: Array, k: int) -> Array:
    """Uses the hits of indices that began in the same way."""
    self.kept = self.kept or {}
    key = indices.shape, indices.ravel()[:10].tobytes()
    return Plain.hits(self, self.kept.setdefault(key, indices.copy()), k)


def old_count(after: Any, state: EMAState, x: Array, i: Array, decay: float, eps: float) -> Any:
    return after[2] / (state.ema_count + eps)[:, None].astype(Single), after[1], after[2]


def clamped(low: float, high: float) -> Callable[..., Any]:
    return lambda after, *given: tuple(np.copysign(np.clip(np.abs(a), low, high), a) for a in after)


LAPLACE, SONNET = DIALECTS["rosinality"], DIALECTS["sonnet"]

UPDATES: Mapping[str, Mutation] = {
    # the recurrence
    "decay and 1 - decay exchanged": updates(
        "one_step", lambda s, x, i, decay, eps: (s, x, i, 1 - decay, eps)
    ),
    "decay twice": mutation(
        "one_step", moved=lambda self, a, b, decay: Plain.moved(self, decay * a, b, decay)
    ),
    "no epsilon": mutation("large_epsilon", size=lambda self, n, eps: np.maximum(n, Single(1e-30))),
    "epsilon twice": mutation("large_epsilon", size=lambda self, n, eps: n + Single(2 * eps)),
    "epsilon instead of at least epsilon": mutation(
        "large_epsilon", size=lambda self, n, eps: np.maximum(n, Single(eps))
    ),
    "hits set, not summed": mutation(
        "one_takes_all",
        hits=lambda self, i, k: np.isin(np.arange(k), i).astype(Single),
        sums=set_not_summed,
    ),
    "sums set, not summed": mutation("one_takes_all", sums=set_not_summed),
    "only codes that were hit": returns("never_hit", only_hit_codes),
    "the first code never": returns("ema_every_code", lambda after, state, *_: tuple(
        np.concatenate([b[:1], a[1:]]) for a, b in zip(
            after, (state.codebook, state.ema_count, state.ema_means), strict=True))),
    "the last code never hit": mutation(
        "ema_every_code", hits=lambda self, i, k: Plain.hits(self, i[i < k - 1], k)
    ),
    "codebook from the count before": returns("one_step", old_count),
    "codebook from the means before": returns("one_step", lambda after, state, *_: (
        state.ema_means / (after[1] + 1e-5)[:, None], *after[1:])),
    "the mean of the latents instead of their sum": mutation("one_step", sums=mean_of_hits),
    "the mean of the batch instead of its sum": mutation(
        "one_step", sums=lambda self, x, i, k: Plain.sums(self, x, i, k) / max(1, i.size)
    ),
    "the nearest codes instead of the indices given": mutation("foreign_indices", update=renearest),
    "hits as a share of the batch": mutation(
        "one_step", hits=lambda self, i, k: Plain.hits(self, i, k) / max(1, i.size)
    ),
    "float16 averages": returns("one_step", lambda after, *_: tuple(a.astype("e") for a in after)),
    "an empty batch leaves all as it is": returns("no_latents", lambda after, state, x, i, *_: (
        after if i.size else (state.codebook, state.ema_count, state.ema_means))),
    "a decay of at least .5": updates(
        "decay_zero", lambda s, x, i, decay, eps: (s, x, i, max(decay, 0.5), eps)
    ),
    "a decay of at most .999": updates(
        "decay_one", lambda s, x, i, decay, eps: (s, x, i, min(decay, 0.999), eps)
    ),
    # hits
    "hits in int8": hits_in("ema_hits_127", np.int8),
    "hits in uint8": hits_in("ema_hits_255", np.uint8),
    "hits in float16": hits_in("ema_hits_2048", np.float16),
    "hits in int16": hits_in("ema_hits_32767", np.int16),
    "hits in uint16": hits_in("ema_hits_65535", np.uint16),
    "hits in bfloat16": mutation(
        "ema_hits_2048", hits=lambda self, i, k: bfloat16(Plain.hits(self, i, k))
    ),
    "99 hits at most": mutation(
        "ema_hits_127", hits=lambda self, i, k: np.minimum(Plain.hits(self, i, k), 99)
    ),
    "sums in float16": mutation(
        "ema_hits_32767",
        sums=lambda self, x, i, k: Plain.sums(self, x, i, k).astype("e").astype("f"),
    ),
    # batches
    "the last latent dropped if 128 divides their number": mutation(
        "ema_batches", **dropped(lambda n, size: (n == size - 1) & (size % 128 == 0))
    ),
    "the last latent dropped": mutation("ema_batches", **dropped(lambda n, size: n == size - 1)),
    "latents beyond 4,096 dropped": mutation("ema_batches", **dropped(lambda n, size: n >= 4096)),
    "latents beyond 99 dropped": mutation("ema_batches", **dropped(lambda n, size: n >= 99)),
    "a last block of 32 that is not full": mutation(
        "ema_batches", **dropped(lambda n, size: (n >= size // 32 * 32) & (size > 32))
    ),
    "latents beyond 500,000 dropped": mutation(
        "ema_million", **dropped(lambda n, size: n >= 500_000)
    ),
    "a single latent dropped": mutation("ema_one_latent", **dropped(lambda n, size: size == 1)),
    "the first position only": updates("one_step", lambda s, x, i, *options: (
        s, x[:, :1], i[:, :1], *options)),
    "one latent in 50,000 dropped": mutation(
        "ema_rare_fault",
        **dropped(lambda n, size: np.random.default_rng(size).random(size) < 1 / 50_000),
    ),
    "the 49,999th latent dropped": mutation("ema_rare_fault", **dropped(lambda n, _: n == 49_999)),
    "100,000 hits at most": mutation(
        "ema_million", hits=lambda self, i, k: np.minimum(Plain.hits(self, i, k), 100_000)
    ),
    "S = 5": mutation("ema_positions", sums=unlike(lambda shape: shape[1] == 5)),
    "S = 1": mutation("ema_S_equals_1", sums=unlike(lambda shape: shape[1] == 1)),
    "S = 2": mutation("ema_S_equals_2", sums=unlike(lambda shape: shape[1] == 2)),
    "latents in another order if S = D": mutation(
        "ema_S_equals_D", sums=unlike(lambda shape: shape[1] == shape[2])
    ),
    "indices transposed if N = S": updates("ema_N_equals_S", lambda s, x, i, *options: (
        s, x, i.T if i.shape[0] == i.shape[1] else i, *options)),
    "indices in 8 bits": updates(
        "ema_num_codes", lambda s, x, i, *options: (s, x, i.astype(np.uint8), *options)
    ),
    "indices in 16 bits": updates(
        "ema_num_codes", lambda s, x, i, *options: (s, x, i.astype(np.uint16), *options)
    ),
    "elements in pairs": mutation("ema_code_size", sums=lambda self, x, i, k: np.where(
        np.arange(x.shape[-1]) < max(2, x.shape[-1] // 2 * 2), Plain.sums(self, x, i, k), 0
    ).astype(Single)),
    "more than 64 codes": mutation(
        "ema_num_codes", hits=lambda self, i, k: Plain.hits(self, i, k) * (np.arange(k) < 64)
    ),
    # values
    "clamped at 1e6": returns("ema_large", clamped(0, 1e6)),
    "latents cut off at 100": updates("ema_large", lambda s, x, i, *options: (
        s, np.clip(x, -100, 100), i, *options)),
    "counts of at most 1e6": returns("ema_large", lambda after, *_: (
        after[0], np.minimum(after[1], 1e6), after[2])),
    "a codebook clamped at 1e5": returns("ema_mixed", lambda after, *_: (
        np.clip(after[0], -1e5, 1e5), *after[1:])),
    "counts of at least 1e-6": returns("ema_small", lambda after, *_: (
        after[0], np.maximum(after[1], 1e-6), after[2])),
    "means below 1e-6 taken for 0": returns("ema_small", lambda after, *_: (
        *after[:2], after[2] * (np.abs(after[2]) > 1e-6))),
    # memory
    "the state changed in place": mutation("state_kept", update=changes("ema_count")),
    "the means changed in place": mutation("state_kept", update=changes("ema_means")),
    "the latents changed in place": mutation("state_kept", update=changes("latents")),
    "the indices changed in place": mutation("state_kept", update=changes("indices")),
    "one array for every answer": mutation("ema_answers", update=one_array),
    "the caller's array as the answer": mutation("ema_answers", update=shared),
    "a state remembered by its identity": mutation("ema_edited", update=by_identity),
    "indices remembered by their beginning": mutation("ema_edited", hits=by_beginning),
    "latents remembered by their identity": mutation("ema_edited", sums=lambda self, x, i, k: (
        Plain.sums(self, first(self, x), i, k))),
    "the first decay for every call": mutation(
        "ema_decays", moved=lambda self, a, b, decay: Plain.moved(self, a, b, once(self, decay))
    ),
    "the default epsilon": updates(
        "ema_decays", lambda s, x, i, decay, eps: (s, x, i, decay, 1e-5)
    ),
    "an epsilon of at least 1e-6": updates(
        "ema_decays", lambda s, x, i, decay, eps: (s, x, i, decay, max(eps, 1e-6))
    ),
    "a decay of .9 from the second call": mutation("ema_long_run", update=from_call(1, decay=0.9)),
    "an epsilon of .001 from the 20th call": mutation(
        "ema_long_run", update=from_call(20, epsilon=1e-3)
    ),
    "a decay of .999 after 200 calls": mutation("ema_long_run", update=from_call(200, decay=0.999)),
    "a reset after 200 calls": mutation("ema_long_run", update=reset_at(200)),
    "a reset after 256 calls": mutation("ema_long_run", update=reset_at(256)),
    "a reset at step 200": updates("ema_late_steps", lambda s, *given: (
        EMAState.start(s.codebook) if s.steps >= 200 else s, *given)),
    "a decay of .999 from step 1,000": updates("ema_late_steps", lambda s, x, i, decay, eps: (
        s, x, i, 0.999 if s.steps >= 1000 else decay, eps)),
    "latents read without their strides": updates("ema_layouts", lambda s, x, i, *options: (
        s, contiguous(x), i, *options)),
    "indices read without their strides": updates("ema_layouts", lambda s, x, i, *options: (
        s, x, np.asarray(i).ravel(order="K").reshape(i.shape), *options)),
    "means read without their strides": updates("ema_layouts", lambda s, *given: (
        EMAState(s.codebook, s.ema_count, s.ema_means.ravel("K").reshape(s.ema_means.shape)),
        *given)),
    # dialects
    "zero-debias": mutation("first_step", update=in_dialect("sonnet")),
    "Laplace smoothing": mutation("never_hit", update=in_dialect("rosinality")),
    "the smoothed count stored back": mutation(
        "hundred_steps", update=in_dialect("zalandoresearch")
    ),
    "smoothed by one code too few": mutation("large_epsilon", dialect=LAPLACE, size=(
        lambda self, n, eps: (n + eps) / (n.sum() + (len(n) - 1) * eps) * n.sum())),
    "smoothed by the codes in use": mutation("large_epsilon", dialect=LAPLACE, size=(
        lambda self, n, eps: (n + eps) / (n.sum() + (n > 1).sum() * eps) * n.sum())),
    "smoothed, and not scaled back": mutation("one_step", dialect=LAPLACE, size=(
        lambda self, n, eps: (n + eps) / (n.sum() + len(n) * eps))),
    "debiased by one step too few": mutation("large_epsilon", dialect=SONNET, share=(
        lambda self, decay, steps: Plain.share(self, decay, max(1, steps - 1)))),
    "debiased only in the first hundred steps": mutation("ema_late_steps", dialect=SONNET, share=(
        lambda self, decay, steps: (
            Single(1) if steps > 100 else Plain.share(self, decay, steps)))),
    "debiased by steps in 8 bits": mutation("ema_late_steps", dialect=SONNET, share=(
        lambda self, decay, steps: Plain.share(self, decay, steps % 256 or 1))),
    "debiased means only": returns("one_step", dialect=SONNET, change=(
        lambda after, s, x, i, decay, eps: (after[0] / (1 - decay ** (s.steps + 1)), *after[1:]))),
    "the debiased count stored back": returns("one_step", dialect=SONNET, change=(
        lambda after, s, x, i, decay, eps: (
            after[0], after[1] / (1 - decay ** (s.steps + 1)), after[2]))),
    "steps not counted": mutation("one_step", dialect=SONNET, update=miscounted),
}  # fmt: skip
"""By what is wrong."""


def steps(caught_by: str, step: Callable[..., Any]) -> Mutation:
    return mutation(caught_by, step=step)


def stepped(caught_by: str, change: Callable[..., Any]) -> Mutation:
    """Returns another answer.

    It is ``change(self, indices, quantized, after, state, latents, decay, epsilon)``.
    """
    return steps(
        caught_by,
        lambda self, *given: change(self, *Plain.step(self, *given), *given),
    )


def update_first(self: Plain, state: EMAState, latents: Array, *options: Any) -> Any:
    indices = Plain.nearest(self, latents, state.codebook.astype(Single))
    after = self.update(state, latents, indices, *options)
    return (*Plain.quantize(self, latents, after[0]), after)


def later(after: tuple[Array, Array, Array], state: EMAState) -> EMAState:
    """Returns the state after one more update."""
    codebook, count, means = after
    return EMAState(codebook, count, means, state.steps + 1)


def copied(source: Array, target: Array) -> Array:
    target[...] = source
    return target


def overwrites(name: str) -> Callable[..., Any]:
    """Writes its result into the caller's state."""

    def step(self: Plain, state: EMAState, *given: Any) -> Any:
        indices, quantized, after = Plain.step(self, state, *given)
        getattr(state, name)[...] = dict(
            zip(("codebook", "ema_count", "ema_means"), after, strict=True)
        )[name]
        return indices, quantized, after

    return step


def with_options(change: Callable[[Plain, float, float], tuple[float, float]]) -> Any:
    return lambda self, state, latents, decay, epsilon: Plain.step(
        self, state, latents, *change(self, decay, epsilon)
    )


def misread(where: Callable[[Array], bool]) -> Any:
    """In some batches, takes the first latent for the last, in the averages."""

    def step(self: Plain, state: EMAState, latents: Array, *options: Any) -> Any:
        indices, quantized, after = Plain.step(self, state, latents, *options)
        if where(latents):
            changed = latents.copy()
            changed[-1, -1] = 2 * latents[0, 0] + 1
            after = self.update(state, changed, indices, *options)
        return indices, quantized, after

    return step


def from_codebook(self: Plain, codebook: Array, state: EMAState, *given: Any) -> Any:
    """Takes a step with the indices of another codebook."""
    latents, *options = given
    indices = Plain.nearest(self, latents, codebook.astype(Single))
    quantized = state.codebook.astype(Single)[indices]
    return indices, quantized, self.update(state, latents, indices, *options)


def past_unused(self: Plain, state: EMAState, *given: Any) -> Any:
    far = np.where(state.ema_count[:, None] == 0, 1e9, state.codebook)
    return from_codebook(self, far, state, *given)


def of_before(self: Plain, state: EMAState, *given: Any) -> Any:
    """Uses the codebook of an earlier call, if the state is the same object."""
    self.kept = self.kept or {}
    held = self.kept.setdefault(id(state), (state.codebook.copy(), state))[0]
    return from_codebook(self, held, state, *given)


STEPPING: Mapping[str, Mutation] = {
    "the update before the indices": steps("order", update_first),
    "quantized from the new codebook": stepped(
        "order", lambda self, i, q, after, *given: (i, after[0][i], after)
    ),
    "the update with quantized": stepped(
        "order",
        lambda self, i, q, after, s, x, *options: (i, q, self.update(s, q, i, *options)),
    ),
    "codes of count 0 passed over": steps("order", past_unused),
    "no update": stepped(
        "order",
        lambda self, i, q, after, s, *given: (i, q, (s.codebook, s.ema_count, s.ema_means)),
    ),
    "updated twice": stepped("order", lambda self, i, q, after, s, x, *options: (
        i, q, self.update(later(after, s), x, i, *options))),
    "the caller's codebook overwritten": steps("step_state_kept", overwrites("codebook")),
    "the caller's count overwritten": steps("step_state_kept", overwrites("ema_count")),
    "the caller's means overwritten": steps("step_state_kept", overwrites("ema_means")),
    "the caller's latents overwritten": stepped(
        "step_state_kept",
        lambda self, i, q, after, s, x, *options: (copied(q, x), (i, q, after))[1],
    ),
    "a decay of .9 from the second call": steps("step_long_run", with_options(
        lambda self, decay, eps: (decay if self.calls < 2 else 0.9, eps))),
    "the first decay for every call": steps("step_decays", with_options(
        lambda self, decay, eps: (once(self, decay), eps))),
    "the default epsilon": steps("step_decays", with_options(
        lambda self, decay, eps: (decay, 1e-5))),
    "a decay of .5 from the 60th call": steps("step_long_run", with_options(
        lambda self, decay, eps: (decay if self.calls < 120 else 0.5, eps))),
    "an epsilon of at least 1e-6": steps("step_decays", with_options(
        lambda self, decay, eps: (decay, max(eps, 1e-6)))),
    "S = 3": steps("step_positions", misread(lambda x: x.shape[1] == 3)),
    "S = 1": steps("step_S_equals_1", misread(lambda x: x.shape[1] == 1)),
    "S = 2": steps("step_S_equals_2", misread(lambda x: x.shape[1] == 2)),
    "S = D": steps("step_S_equals_D", misread(lambda x: x.shape[1] == x.shape[2])),
    "N = S": steps("step_N_equals_S", misread(lambda x: x.shape[0] == x.shape[1])),
    "a single latent": steps("step_one_latent", misread(lambda x: x.shape[0] * x.shape[1] == 1)),
    "the last latent if 128 divides their number": steps(
        "step_batches", misread(lambda x: x.shape[0] * x.shape[1] % 128 == 0)
    ),
    "batches above 99": steps("step_batches", misread(lambda x: x.shape[0] * x.shape[1] > 99)),
    "batches above 4,096": steps("step_batches", misread(lambda x: x.shape[0] * x.shape[1] > 4096)),
    "batches above 65,000": steps(
        "step_rare_fault", misread(lambda x: x.shape[0] * x.shape[1] > 65_000)
    ),
    "batches above a million": steps("step_million", misread(lambda x: len(x) > 10**6)),
    "hits in uint8": mutation("step_hits_255", **hits_in("", np.uint8).methods),
    "hits in uint16": mutation("step_hits_65535", **hits_in("", np.uint16).methods),
    "clamped at 1e6": stepped("step_large", lambda self, i, q, after, *given: (
        i, q, tuple(np.clip(a, -1e6, 1e6).astype(Single) for a in after))),
    "one array for every answer": mutation("step_answers", update=one_array),
    "latents remembered by their identity": steps("step_edited", lambda self, s, x, *options: (
        Plain.step(self, s, first(self, x), *options))),
    "a state remembered by its identity": mutation("step_edited", update=by_identity),
    "a codebook remembered by its state": steps("step_edited", of_before),
    "latents read without their strides": steps("step_layouts", lambda self, s, x, *options: (
        Plain.step(self, s, contiguous(x), *options))),
    "a reset at step 200": steps("step_late_steps", lambda self, s, *given: Plain.step(
        self, EMAState.start(s.codebook) if s.steps >= 200 else s, *given)),
    "more than 64 codes": mutation(
        "step_num_codes", hits=lambda self, i, k: Plain.hits(self, i, k) * (np.arange(k) < 64)
    ),
    "steps not counted": mutation("order", dialect=SONNET, update=miscounted),
    "elements in pairs": mutation("step_code_size", **UPDATES["elements in pairs"].methods),
}  # fmt: skip
"""By what is wrong."""
