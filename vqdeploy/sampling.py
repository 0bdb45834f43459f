"""Samples of a learned prior, a pure function of their seed: the graph of one step, noise, and the
choice of ``vqref.prior``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vqdeploy.stages import prior_ports
from vqref.agreement.parity import allowed_error
from vqref.prior import PriorSpec, certified, choose, gumbel
from vqref.validation import Array, Float64, Int64

AT_ONCE = 64
"""Images that are drawn side by side: more were no faster."""

Step = Callable[..., list[Array]]
"""``prior_step.onnx``: previous, position, keys, values to log_probabilities, keys, values."""


class Drawn(NamedTuple):
    """Indices (N, S) int64, and which tokens (N, S) no error within the tolerance of
    log-probabilities changes, given the tokens before them."""

    indices: Int64
    certified: npt.NDArray[np.bool_]


def draw(
    step: Step,
    spec: PriorSpec,
    seed: int,
    count: int,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Drawn:
    """Draws images 0 to ``count`` - 1 of a seed. Raises ValueError for a seed, a temperature or a
    top_k that cannot be."""
    parts = []
    for first in range(0, count, AT_ONCE):
        noise = gumbel(seed, spec, min(AT_ONCE, count - first), first)
        parts.append(draw_with(step, spec, noise, temperature, top_k))
    if not parts:
        nothing = np.empty((0, spec.latent_size), np.int64)
        return Drawn(nothing, nothing > 0)
    return Drawn(*map(np.concatenate, zip(*parts, strict=True)))


def draw_with(
    step: Step,
    spec: PriorSpec,
    noise: Float64,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Drawn:
    """Draws an image of each noise (N, S, K)."""
    indices = np.zeros(noise.shape[:2], np.int64)
    sure = np.zeros(noise.shape[:2], np.bool_)
    walk = steps(step, spec, indices)
    for s, log_p in enumerate(walk):
        error = allowed_error("log_probabilities", log_p, precision="float32")[:, :1]
        indices[:, s] = choose(log_p, noise[:, s], temperature, top_k)
        sure[:, s] = certified(log_p, noise[:, s], error, temperature, top_k)
    return Drawn(indices, sure)


def steps(step: Step, spec: PriorSpec, indices: Int64) -> Iterator[Array]:
    """log p (N, K) at each position in turn. Of ``indices`` (N, S) it reads those before the
    position, which may be written in the meantime."""
    kept = prior_ports(spec)["prior_step"]["keys"].shape[1:]
    keys = values = np.zeros((len(indices), *map(int, kept)), np.float32)
    for s in range(spec.latent_size):
        before = indices[:, s - 1] if s else np.zeros(len(indices), np.int64)
        log_p, keys, values = step(before, np.array([s]), keys, values)
        yield log_p
