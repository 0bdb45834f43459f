"""Samples of a learned prior.

They depend only on the seed. The graph gives the log-probabilities of each position, and
``vqref.prior`` makes the noise and chooses the tokens.
"""

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
"""Images that are drawn at a time; more at a time were no faster."""

Step = Callable[..., list[Array]]
"""Runs ``prior_step.onnx``: takes previous, position, keys and values; returns log_probabilities,
keys and values."""


class Drawn(NamedTuple):
    """Indices (N, S) int64, and which of these tokens are certified, (N, S).

    A certified token stays the same under any error of the log-probabilities within the tolerance,
    given the tokens before it.
    """

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
    """Draws images 0 to ``count`` - 1 of a seed.

    Raises ValueError for an invalid seed, temperature or top_k.
    """
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
    """Draws N images, one from each row of noise (N, S, K)."""
    indices = np.zeros(noise.shape[:2], np.int64)
    sure = np.zeros(noise.shape[:2], np.bool_)
    walk = steps(step, spec, indices)
    for s, log_p in enumerate(walk):
        error = allowed_error("log_probabilities", log_p, precision="float32")[:, :1]
        indices[:, s] = choose(log_p, noise[:, s], temperature, top_k)
        sure[:, s] = certified(log_p, noise[:, s], error, temperature, top_k)
    return Drawn(indices, sure)


def steps(step: Step, spec: PriorSpec, indices: Int64) -> Iterator[Array]:
    """Yields log p (N, K) of each position in turn.

    Before a position it reads only the earlier columns of ``indices`` (N, S), so the caller may
    fill them in between.
    """
    kept = prior_ports(spec)["prior_step"]["keys"].shape[1:]
    keys = values = np.zeros((len(indices), *map(int, kept)), np.float32)
    for s in range(spec.latent_size):
        before = indices[:, s - 1] if s else np.zeros(len(indices), np.int64)
        log_p, keys, values = step(before, np.array([s]), keys, values)
        yield log_p
