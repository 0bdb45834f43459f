"""A right quantizer, update and step in NumPy, in small methods; mutations replace one or two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from vqref.checks import QuantizerCheck, quantizer_checks
from vqref.dialects import POST
from vqref.quantizer import EMAState
from vqref.validation import Array

Single = np.float32


class Plain:
    """A right implementation in float32: the direct form, and the moving averages of a dialect."""

    dialect = POST

    def __init__(self) -> None:
        self.calls = 0
        self.kept: Any = None

    def distances(self, latents: Array, codebook: Array) -> Array:
        return np.square(latents[:, :, None] - codebook).sum(-1)  # (N, S, K)

    def nearest(self, latents: Array, codebook: Array) -> Array:
        return np.asarray(self.distances(latents, codebook).argmin(-1))

    def quantize(self, latents: Array, codebook: Array) -> Any:
        self.calls += 1
        indices = self.nearest(latents, codebook)
        return indices, codebook[indices]

    def hits(self, indices: Array, k: int) -> Array:
        return np.bincount(indices.ravel(), minlength=k).astype(Single)

    def sums(self, latents: Array, indices: Array, k: int) -> Array:
        sums = np.zeros((k, latents.shape[-1]), Single)
        np.add.at(sums, indices.ravel(), latents.reshape(-1, latents.shape[-1]))
        return sums

    def moved(self, before: Array, new: Array, decay: float) -> Array:
        return Single(decay) * before.astype(Single) + (1 - Single(decay)) * new

    def share(self, decay: float, steps: int) -> Array:
        """Returns the share of the averages that is data."""
        return np.asarray(1 - decay**steps if self.dialect.debiased else 1, Single)

    def size(self, count: Array, epsilon: float) -> Array:
        """Returns the divisors of the means."""
        if self.dialect.smoothing == "epsilon":
            return count + Single(epsilon)
        total = count.sum()
        return (count + Single(epsilon)) / (total + Single(len(count) * epsilon)) * total

    def update(
        self, state: EMAState, latents: Array, indices: Array, decay: float, epsilon: float
    ) -> Any:
        self.calls += 1
        k = len(state.ema_count)
        count = self.moved(state.ema_count, self.hits(indices, k), decay)
        means = self.moved(state.ema_means, self.sums(latents, indices, k), decay)
        share = self.share(decay, state.steps + 1)
        size = self.size(count / share, epsilon)
        codebook = means / share / size[:, None]
        return codebook, size if self.dialect.stores_smoothed else count, means

    def step(self, state: EMAState, latents: Array, decay: float, epsilon: float) -> Any:
        codebook = state.codebook.astype(Single)
        indices, quantized = Plain.quantize(self, latents, codebook)
        return indices, quantized, self.update(state, latents, indices, decay, epsilon)


@dataclass(frozen=True)
class Mutation:
    """A mutation. caught_by: its named check. methods: those of ``Plain`` that it replaces."""

    caught_by: str
    methods: Mapping[str, Any]

    def make(self) -> Plain:
        made: Plain = type("Mutant", (Plain,), dict(self.methods))()
        return made

    def checks(self, **options: Any) -> list[QuantizerCheck]:
        """Returns the kit's checks of a new mutant, for whichever is wrong.

        That is ``quantize``, ``update`` or ``step``.
        """
        mutant = self.make()
        of_quantize = quantizer_checks(mutant.quantize, **options)
        if self.caught_by in map(str, of_quantize):
            return of_quantize
        of_step = self.caught_by == "order" or self.caught_by.startswith("step_")
        given = (None, mutant.step) if of_step else (mutant.update, None)
        checks = quantizer_checks(mutant.quantize, *given, dialect=mutant.dialect, **options)
        return checks[len(of_quantize) :]


def mutation(caught_by: str, **methods: Any) -> Mutation:
    return Mutation(caught_by, methods)


def exact(latents: Array, codebook: Array) -> Array:
    return np.square(latents[:, :, None] - codebook).sum(-1)


def expanded(latents: Array, codebook: Array) -> Array:
    norms = np.square(latents).sum(-1)[..., None]
    return norms - 2 * latents @ codebook.T + np.square(codebook).sum(-1)


def bfloat16(array: Array) -> Array:
    bits = np.ascontiguousarray(array, Single).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(Single)


def contiguous(array: Array) -> Array:
    """Returns what a kernel reads that gets only the address."""
    base = array.base if isinstance(array.base, np.ndarray) else array
    strides = np.cumprod([array.itemsize, *array.shape[:0:-1]])[::-1]
    if array.nbytes > base.nbytes or min(array.strides, default=0) < 0:
        return array[..., ::-1]
    return as_strided(array, array.shape, tuple(int(s) for s in strides))


def once(self: Plain, value: float) -> float:
    self.kept = value if self.kept is None else self.kept
    return float(self.kept)


def first(self: Plain, array: Array) -> Array:
    self.kept = self.kept or {}
    copy: Array = self.kept.setdefault(id(array), (array.copy(), array))[0]
    return copy
