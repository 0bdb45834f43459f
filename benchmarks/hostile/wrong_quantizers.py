"""Wrong quantizers, each with the check that must catch it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.hostile.mutants import (
    Mutation,
    Plain,
    bfloat16,
    contiguous,
    exact,
    expanded,
    mutation,
)
from vqref.validation import Array


def wrong(caught_by: str, where: Callable[[Plain, Array, Array, Array], Any]) -> Mutation:
    """Takes the next code instead of the nearest for some latents.

    ``where(self, number of each latent, latents, codebook)`` says for which.
    """

    def nearest(self: Plain, latents: Array, codebook: Array) -> Array:
        found = Plain.nearest(self, latents, codebook)
        number = np.arange(found.size).reshape(found.shape)
        bad = np.broadcast_to(where(self, number, latents, codebook), found.shape)
        return np.where(bad, (found + 1) % len(codebook), found)

    return Mutation(caught_by, {"nearest": nearest})


def feeds(caught_by: str, change: Callable[[Array, Array], tuple[Array, Array]]) -> Mutation:
    """Takes the nearest code of changed latents or of a changed codebook."""
    return mutation(
        caught_by, nearest=lambda self, x, c: Plain.nearest(self, *change(x, c)).astype(np.int64)
    )


def computes(caught_by: str, distances: Callable[[Array, Array], Array]) -> Mutation:
    return mutation(caught_by, distances=lambda self, x, c: distances(x, c))


def picks(caught_by: str, pick: Callable[[Array], Array]) -> Mutation:
    """Makes another choice from the right distances (N, S, K)."""
    return mutation(caught_by, nearest=lambda self, x, c: pick(self.distances(x, c)))


def pruned(share: float, part: slice) -> Mutation:
    """Skips a code if a part of its distance is more than a share of the best so far."""

    def nearest(self: Plain, latents: Array, codebook: Array) -> Array:
        partial = np.square(latents[:, :, None, part] - codebook[:, part]).sum(-1)
        best = np.full(latents.shape[:2], np.inf)
        found = np.zeros(latents.shape[:2], np.int64)
        for k, whole in enumerate(np.moveaxis(self.distances(latents, codebook), -1, 0)):
            better = (partial[..., k] <= share * best) & (whole < best)
            best, found = np.where(better, whole, best), np.where(better, k, found)
        return found

    return mutation("close_seconds", nearest=nearest)


def by_norms(self: Plain, latents: Array, codebook: Array) -> Array:
    """Skips a code if its norm differs by nearly the best distance."""
    distances = exact(latents, codebook)
    apart = np.linalg.norm(latents, axis=-1)[..., None] - np.linalg.norm(codebook, axis=-1)
    far = np.square(apart) > 0.98 * distances.min(-1, keepdims=True)
    return np.where(far, np.inf, distances)


def reluctant(distances: Array) -> Array:
    """Takes a later code only if it is better by a hundredth."""
    best, found = distances[..., 0], np.zeros(distances.shape[:2], np.int64)
    for k, each in enumerate(np.moveaxis(distances, -1, 0)):
        better = each < 0.99 * best
        best, found = np.where(better, each, best), np.where(better, k, found)
    return found


def later_block(distances: Array) -> Array:
    """Takes blocks of 16 codes; the later block wins a tie."""
    found = distances[..., :16].argmin(-1)
    for start in range(16, distances.shape[-1], 16):
        block = distances[..., start : start + 16]
        best = np.take_along_axis(distances, found[..., None], -1)[..., 0]
        found = np.where(block.min(-1) <= best, start + block.argmin(-1), found)
    return found


def cached(key: Callable[[Array, Array], Any], caught_by: str, *, codes: bool = True) -> Mutation:
    """Uses codebook or latents of an earlier call if the key is the same."""

    def nearest(self: Plain, latents: Array, codebook: Array) -> Array:
        self.kept = self.kept or {}
        given = codebook if codes else latents
        held = self.kept.setdefault(key(latents, codebook), (given.copy(), given))[0]
        pair = (latents, held) if codes else (held, codebook)
        return Plain.nearest(self, *pair)

    return mutation(caught_by, nearest=nearest)


def old_norms(self: Plain, latents: Array, codebook: Array) -> Array:
    x, c = latents.astype(float), codebook.astype(float)
    self.kept = self.kept or {}
    norms = self.kept.setdefault(id(codebook), (np.square(c).sum(-1), codebook))[0]
    return np.asarray(norms - 2 * x @ c.T)


def remembered(self: Plain, latents: Array, codebook: Array) -> Any:
    """Returns the last call's answer if the inputs are the same to the last bit."""
    key = latents.tobytes(), codebook.tobytes()
    if self.kept is None or self.kept[0] != key:
        self.kept = key, Plain.quantize(self, latents, codebook)
    return self.kept[1]


def rotating(buffers: int) -> Callable[[Plain, Array, Array], Any]:
    """Returns answers in a few arrays that take turns."""

    def quantize(self: Plain, latents: Array, codebook: Array) -> Any:
        self.kept = self.kept or {}
        indices, quantized = Plain.quantize(self, latents, codebook)
        turn = self.calls % buffers
        held = self.kept.setdefault((turn, indices.shape), indices)
        held[...] = indices
        return held, quantized

    return quantize


def view_of_one(self: Plain, latents: Array, codebook: Array) -> Any:
    indices, quantized = Plain.quantize(self, latents, codebook)
    if indices.size == 1:
        return indices, codebook[indices.item() :][:1][None]
    return indices, quantized


def in_place(self: Plain, latents: Array, codebook: Array) -> Array:
    latents -= latents.mean()
    return Plain.nearest(self, latents, codebook)


def channels_first(latents: Array, codebook: Array) -> tuple[Array, Array]:
    """Guesses the axis of the elements by its size."""
    return (latents.swapaxes(1, 2) if latents.shape[1] == codebook.shape[1] else latents), codebook


def by_transposed(latents: Array, codebook: Array) -> tuple[Array, Array]:
    """Guesses the axis of the codes."""
    return latents, codebook.T if codebook.shape[0] == codebook.shape[1] else codebook


def without(latents: Array, codebook: Array, kept: int) -> tuple[Array, Array]:
    return latents[..., :kept], codebook[:, :kept]


def modulo(bits: int) -> Mutation:
    return mutation(
        "many_codes" if bits == 8 else "huge_codebook",
        nearest=lambda self, x, c: Plain.nearest(self, x, c) % 2**bits,
    )


def _normalised(codebook: Array) -> Array:
    codebook /= abs(codebook).max()
    return codebook


def _turned(indices: Array) -> Array:
    return indices.T if indices.shape[0] == indices.shape[1] else indices


def _and(indices: Array, quantized: Callable[[Array], Array]) -> tuple[Array, Array]:
    return indices, quantized(indices)


def _now_and_then(self: Plain, codebook: Array) -> Array:
    if self.kept is None or self.kept.shape != codebook.shape or self.calls % 50 == 0:
        self.kept = codebook.copy()
    held: Array = self.kept
    return held


QUANTIZERS: Mapping[str, Mutation] = {
    # the choice
    "argmin over the latents instead of the codes": picks("ordinary", lambda d: d.argmin(0)),
    "argmax": picks("ordinary", lambda d: d.argmax(-1)),
    "the last index on a tie": picks(
        "exact_ties", lambda d: d.shape[-1] - 1 - d[..., ::-1].argmin(-1)
    ),
    "the later block of codes on a tie": picks("exact_ties", later_block),
    "one more than the index": picks("ordinary", lambda d: (d.argmin(-1) + 1) % d.shape[-1]),
    "a later code only if better by a hundredth": picks("close_seconds", reluctant),
    "pruned at .98 by the leading half": pruned(0.98, slice(None, 8)),
    "pruned at .98 by the trailing half": pruned(0.98, slice(8, None)),
    "pruned at .98 by the last element": pruned(0.98, slice(-1, None)),
    "pruned at .999 by all but the last element": pruned(0.999, slice(None, -1)),
    "pruned at .98 by the first element": pruned(0.98, slice(None, 1)),
    "pruned by norms that are too far apart": mutation("close_seconds", distances=by_norms),
    "int32": picks("ordinary", lambda d: d.argmin(-1).astype(np.int32)),
    "indices in 8 bits": modulo(8),
    "indices in 15 bits": modulo(15),
    "indices in 16 bits": modulo(16),
    "the last code never": picks(
        "every_code", lambda d: d[..., : max(1, d.shape[-1] - 1)].argmin(-1)
    ),
    "the first code never": picks("every_code", lambda d: 1 + d[..., 1:].argmin(-1)),
    "never fewer than four codes": picks(
        "few_codes", lambda d: d.argmin(-1) if d.shape[-1] > 3 else d.argmin(-1) * 0
    ),
    "codes in whole blocks of 8": picks(
        "odd_codes", lambda d: d[..., : max(8, d.shape[-1] // 8 * 8)].argmin(-1)
    ),
    "codes in whole blocks of 3": picks(
        "every_code", lambda d: d[..., : max(3, d.shape[-1] // 3 * 3)].argmin(-1)
    ),
    "64 codes at most": picks("many_codes", lambda d: d[..., :64].argmin(-1)),
    "1,024 codes at most": picks("many_codes", lambda d: d[..., :1024].argmin(-1)),
    "10,000 codes at most": picks("huge_codebook", lambda d: d[..., :10_000].argmin(-1)),
    # the distance
    "bfloat16 distances called float32": computes("ordinary", lambda x, c: bfloat16(exact(x, c))),
    "float16 distances called float32": computes(
        "ordinary", lambda x, c: exact(x, c).astype(np.float16)
    ),
    "bfloat16 latents called float32": computes("ordinary", lambda x, c: exact(bfloat16(x), c)),
    "the expanded form called direct": computes("far_from_origin", expanded),
    "sum of magnitudes": computes("ordinary", lambda x, c: np.abs(x[:, :, None] - c).sum(-1)),
    "largest product": computes("ordinary", lambda x, c: -(x @ c.T)),
    "a product without the latents' share": computes(
        "ordinary", lambda x, c: np.square(c).sum(-1) - x @ c.T
    ),
    "distances of at least 1e-8": computes("scales", lambda x, c: np.maximum(exact(x, c), 1e-8)),
    "distances of at most 1e8": computes("scales", lambda x, c: np.minimum(exact(x, c), 1e8)),
    "1e-12 added under a root": computes("scales", lambda x, c: np.sqrt(exact(x, c) + 1e-12)),
    "codes that are zero passed over": computes(
        "every_code", lambda x, c: np.where((c == 0).all(1), np.inf, exact(x, c))
    ),
    "all but the last element": feeds("every_element", lambda x, c: without(x, c, -1)),
    "the last element twice": computes(
        "ordinary", lambda x, c: exact(x, c) + exact(x[..., -1:], c[:, -1:])
    ),
    "elements in whole vectors of 4": feeds(
        "odd_code_sizes", lambda x, c: without(x, c, max(4, c.shape[1] // 4 * 4))
    ),
    "elements in pairs": feeds(
        "odd_code_sizes", lambda x, c: without(x, c, max(2, c.shape[1] // 2 * 2))
    ),
    "64 elements at most": feeds("code_sizes", lambda x, c: without(x, c, 64)),
    "the sign of one element": feeds(
        "one_element", lambda x, c: (np.sign(x), np.sign(c)) if c.shape[1] == 1 else (x, c)
    ),
    # the latents
    "latents cut off at 1000": feeds("mixed_scales", lambda x, c: (np.clip(x, -1e3, 1e3), c)),
    "latents cut off at 1e6": feeds("mixed_scales", lambda x, c: (np.clip(x, -1e6, 1e6), c)),
    "codes cut off at 1e6": feeds("mixed_scales", lambda x, c: (x, np.clip(c, -1e6, 1e6))),
    "latents rounded to 5 digits": feeds("close_seconds", lambda x, c: (x.round(5), c)),
    "latents below 1e-6 taken for 0": feeds("scales", lambda x, c: (x * (np.abs(x) > 1e-6), c)),
    "normalised latents": feeds(
        "ordinary", lambda x, c: (x / np.linalg.norm(x, axis=-1, keepdims=True), c)
    ),
    "latents changed in place": mutation("inputs_kept", nearest=in_place),
    "a codebook divided by its largest element in place": mutation(
        "inputs_kept",
        nearest=lambda self, x, c: Plain.nearest(self, x / abs(c).max(), _normalised(c)),
    ),
    # the batch
    "positions and images exchanged": mutation(
        "positions", nearest=lambda self, x, c: Plain.nearest(self, x, c).T.reshape(x.shape[:2])
    ),
    "positions lost": picks("positions", lambda d: d.argmin(-1).ravel()),
    "positions of a square batch exchanged": mutation(
        "N_equals_S",
        nearest=lambda self, x, c: _turned(Plain.nearest(self, x, c)),
    ),
    "elements and positions exchanged if S = D": feeds("S_equals_D", channels_first),
    "latents reshaped to (N, D, S) if S = 2": feeds(
        "S_equals_2",
        lambda x, c: (x.reshape(len(x), -1, 2).swapaxes(1, 2) if x.shape[1] == 2 else x, c),
    ),
    "images and positions exchanged if S = K": wrong(
        "S_equals_K", lambda self, n, x, c: x.shape[1] == len(c)
    ),
    "positions exchanged if N = D": wrong("N_equals_D", lambda self, n, x, c: len(x) == c.shape[1]),
    "positions exchanged if N = K": wrong("N_equals_K", lambda self, n, x, c: len(x) == len(c)),
    "the codebook transposed if K = D": feeds("square_codebook", by_transposed),
    "a single latent": wrong("one_latent", lambda self, n, x, c: n.size == 1),
    "S = 1": wrong("S_equals_1", lambda self, n, x, c: x.shape[1] == 1),
    "the third position": wrong("positions", lambda self, n, x, c: x.shape[1] == 3),
    "no batch of none": mutation(
        "empty_batch", nearest=lambda self, x, c: Plain.nearest(self, x, c) + 0 * int(1 / len(x))
    ),
    "the last latent if 128 divides their number": wrong(
        "batch_sizes", lambda self, n, x, c: (n == n.size - 1) & (n.size % 128 == 0)
    ),
    "latents beyond 4,096": wrong("batch_sizes", lambda self, n, x, c: n >= 4096),
    "the first latent of a second block of 4,096": wrong(
        "batch_sizes", lambda self, n, x, c: n == 4096
    ),
    "a last block of 64 that is not full": wrong(
        "batch_sizes", lambda self, n, x, c: n >= n.size // 64 * 64
    ),
    "the latent after 1,024 positions": wrong(
        "batch_sizes", lambda self, n, x, c: (np.arange(x.shape[1]) == 1024)
    ),
    "the last latent if 1,000 divides their number": wrong(
        "batch_sizes", lambda self, n, x, c: (n == n.size - 1) & (n.size % 1000 == 0)
    ),
    "a last block of 10,000 that is not full": wrong(
        "rare_fault", lambda self, n, x, c: (n >= n.size // 10_000 * 10_000) & (n.size > 10_000)
    ),
    "latents beyond 50,000": wrong("rare_fault", lambda self, n, x, c: n >= 50_000),
    "the 49,999th latent": wrong("rare_fault", lambda self, n, x, c: n == 49_999),
    "one latent in 50,000": wrong(
        "rare_fault",
        lambda self, n, x, c: np.random.default_rng(self.calls).random(n.shape) < 1 / 50_000,
    ),
    "latents beyond 500,000": wrong("million_latents", lambda self, n, x, c: n >= 500_000),
    # memory of earlier calls
    "the first codebook remembered": cached(lambda x, c: 0, "fresh_codebook"),
    "a codebook remembered by its shape": cached(lambda x, c: c.shape, "fresh_codebook"),
    "a codebook remembered by its identity": cached(lambda x, c: id(c), "codebook_edited"),
    "a codebook remembered by its address": cached(lambda x, c: c.ctypes.data, "codebook_edited"),
    "a codebook remembered by its first rows": cached(
        lambda x, c: c[:4].tobytes(), "codebook_edited"
    ),
    "a codebook remembered by its sum": cached(
        lambda x, c: float(c.astype(float).sum().round(3)), "codebook_edited"
    ),
    "a codebook remembered by its first column": cached(
        lambda x, c: (c.shape, c[:, 0].tobytes()), "codebook_edited"
    ),
    "codebook norms remembered by its identity": mutation("codebook_edited", distances=old_norms),
    "latents remembered by their identity": cached(
        lambda x, c: id(x), "latents_edited", codes=False
    ),
    "latents remembered by their first row": cached(
        lambda x, c: (x.shape, x[:1].tobytes()), "latents_edited", codes=False
    ),
    "latents remembered by address and shape": cached(
        lambda x, c: (x.ctypes.data, x.shape), "latents_edited", codes=False
    ),
    "one array for every answer": mutation("answers_kept", quantize=rotating(1)),
    "three arrays in turn for the answers": mutation("answers_kept", quantize=rotating(3)),
    "one array for every large answer": mutation(
        "answers_kept",
        quantize=lambda self, x, c: (rotating(1) if len(x) > 100 else Plain.quantize)(self, x, c),
    ),
    "the last answer given again": mutation("answers_kept", quantize=remembered),
    "a view of the codebook": mutation("answers_kept", quantize=view_of_one),
    "wrong from the 20th call": wrong("many_calls", lambda self, n, x, c: self.calls >= 20),
    "wrong from the 256th call": wrong("many_calls", lambda self, n, x, c: self.calls >= 256),
    "every tenth call": wrong("many_calls", lambda self, n, x, c: self.calls % 10 == 0),
    "the codebook read anew every 50th call": mutation(
        "many_calls", nearest=lambda self, x, c: Plain.nearest(self, x, _now_and_then(self, c))
    ),
    # memory layout
    "latents read without their strides": feeds("layouts", lambda x, c: (contiguous(x), c)),
    "the codebook read without its strides": feeds("layouts", lambda x, c: (x, contiguous(c))),
    "latents reversed if their strides are negative": feeds(
        "layouts", lambda x, c: (x[::-1] if min(x.strides, default=0) < 0 else x, c)
    ),
    "read-only latents": wrong("layouts", lambda self, n, x, c: not x.flags.writeable),
    "a codebook in Fortran order": wrong(
        "layouts", lambda self, n, x, c: not c.flags.c_contiguous
    ),
    # quantized
    "quantized by the straight-through sum": mutation(
        "ordinary",
        quantize=lambda self, x, c: _and(Plain.nearest(self, x, c), lambda i: x + (c[i] - x)),
    ),
    "quantized rounded": mutation(
        "ordinary",
        quantize=lambda self, x, c: _and(Plain.nearest(self, x, c), lambda i: bfloat16(c[i])),
    ),
    "quantized in float64": mutation(
        "ordinary",
        quantize=lambda self, x, c: _and(Plain.nearest(self, x, c), lambda i: c[i].astype(float)),
    ),
    "quantized of the position before": mutation(
        "positions",
        quantize=lambda self, x, c: _and(
            Plain.nearest(self, x, c), lambda i: c[np.roll(i, 1, axis=1)]
        ),
    ),
}  # fmt: skip
"""By what is wrong."""
