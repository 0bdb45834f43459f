"""Likelihoods: how probable the decoder's outputs make an image, and the image that they expect.

Each likelihood is one entry of a table. The networks see the grey levels 0 and 1 as
``spec.value_range`` (low, high). y below is an output mapped back to [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vqref.validation import Float64, as_float64, as_images

if TYPE_CHECKING:
    from vqref.spec import ModelSpec

LEVELS = 256
"""The number of grey levels of a discretised likelihood."""

WIDEST = 700.0
"""The largest width of a grey level, in scales. exp of a larger number would overflow."""

SMALLEST_LOG_SCALE = -7.0
"""The smallest log-scale of the logistic. At this scale, a grey level is already wider."""


@dataclass(frozen=True)
class Likelihood:
    """A distribution of pixels given outputs.

    parameters  the number of outputs per value of an image: P = parameters * C
    nats        (spec, x (N, C, H, W), outputs (N, P, H, W)) -> -log p of each value, (N, C, H, W)
    backward    (spec, x, outputs) -> the derivative of the nats by the outputs, (N, P, H, W)
    mean        (spec, outputs) -> the expected values (N, C, H, W), not yet clipped to [0, 1]
    slope       (spec) -> the largest change of a mean per change of an output
    """

    parameters: int
    nats: Callable[[ModelSpec, Float64, Float64], Float64]
    backward: Callable[[ModelSpec, Float64, Float64], Float64]
    mean: Callable[[ModelSpec, Float64], Float64]
    slope: Callable[[ModelSpec], float]


def nats(spec: ModelSpec, images: npt.ArrayLike, outputs: npt.ArrayLike) -> Float64:
    """Returns -log p(image; outputs) in nats per image, (N,).

    images are (N, C, H, W) in [0, 1], outputs are (N, P, H, W). Raises ValueError for arrays that
    do not fit the spec.
    """
    x = as_images(images, spec)
    y = as_float64("outputs", outputs, (len(x), *spec.output_shape))
    total: Float64 = LIKELIHOODS[spec.likelihood].nats(spec, x, y).sum(axis=(1, 2, 3))
    return total


def mean(spec: ModelSpec, outputs: npt.ArrayLike) -> Float64:
    """Returns reconstructions (N, C, H, W) in [0, 1].

    They are the mean of the likelihood, mapped back and clipped. Raises ValueError for outputs that
    are not (N, P, H, W).
    """
    y = as_float64("outputs", outputs, ("N", *spec.output_shape))
    return np.clip(LIKELIHOODS[spec.likelihood].mean(spec, y), 0.0, 1.0)


def output_channels(likelihood: str, channels: int) -> int:
    """Returns P for images of ``channels``. Raises ValueError for an unknown likelihood."""
    if likelihood not in LIKELIHOODS:
        raise ValueError(f"likelihood is {likelihood[:40]!a}, expected {', '.join(LIKELIHOODS)}")
    return LIKELIHOODS[likelihood].parameters * channels


def sigmoid(x: npt.ArrayLike) -> Float64:
    """1 / (1 + exp(-x)), in the form that never overflows."""
    x = np.asarray(x, np.float64)
    small = np.exp(-np.abs(x))
    y: Float64 = np.where(x >= 0, 1.0, small) / (1.0 + small)
    return y


def softplus(x: Float64) -> Float64:
    """log(1 + exp(x)), in the form that never overflows."""
    return np.logaddexp(0.0, x)


def bernoulli_nats(spec: ModelSpec, x: Float64, outputs: Float64) -> Float64:
    """Returns softplus(l) - x*l for the logit l and the grey level x."""
    return softplus(outputs) - x * outputs


def bernoulli_backward(spec: ModelSpec, x: Float64, outputs: Float64) -> Float64:
    return sigmoid(outputs) - x


def bernoulli_mean(spec: ModelSpec, outputs: Float64) -> Float64:
    """Returns the probability of white."""
    return sigmoid(outputs)


def gaussian_nats(spec: ModelSpec, x: Float64, outputs: Float64) -> Float64:
    """Returns (x - y)^2 / (2 σ²) + ln(2πσ²) / 2, where σ² is the spec's ``variance``."""
    squares = np.square(x - gaussian_mean(spec, outputs))
    terms: Float64 = squares / (2 * spec.variance) + 0.5 * np.log(2 * np.pi * spec.variance)
    return terms


def gaussian_backward(spec: ModelSpec, x: Float64, outputs: Float64) -> Float64:
    slope: Float64 = (gaussian_mean(spec, outputs) - x) / spec.variance * _range_slope(spec)
    return slope


def gaussian_mean(spec: ModelSpec, outputs: Float64) -> Float64:
    """Returns y: the outputs mapped back to [0, 1]."""
    low, high = spec.value_range
    y: Float64 = (outputs - low) / (high - low)
    return y


def logistic_nats(spec: ModelSpec, x: Float64, outputs: Float64) -> Float64:
    """Returns -log p of grey level k = round(255 x) under a logistic distribution cut into levels.

    This is Salimans et al. 2017, PixelCNN++, equation 2, with k from 0 to 255. The edges of level k
    are (k + 1/2)/255 and (k - 1/2)/255. Let a and b be their distances from the mean in units of
    the scale. Then p = σ(a) - σ(b) = σ(a) σ(-b) (1 - exp(b - a)). The last form never cancels. The
    first level takes all below its a, the last level all above its b.
    """
    level, a, b, width = _logistic_edges(spec, x, outputs)
    below_a = np.where(level < LEVELS - 1, softplus(-a), 0.0)
    above_b = np.where(level > 0, softplus(b), 0.0)
    inner = (level > 0) & (level < LEVELS - 1)
    return below_a + above_b - np.where(inner, np.log(-np.expm1(-width)), 0.0)


def logistic_backward(spec: ModelSpec, x: Float64, outputs: Float64) -> Float64:
    """Returns the derivative by the mean and by the log-scale, with a and b in units of the scale.

    A step of the mean moves a and b by -1/scale. A step of the log-scale moves a by -a, b by -b and
    their distance by minus itself.
    """
    level, a, b, width = _logistic_edges(spec, x, outputs)
    of_a = np.where(level < LEVELS - 1, -sigmoid(-a), 0.0)
    of_b = np.where(level > 0, sigmoid(b), 0.0)
    inner = (level > 0) & (level < LEVELS - 1)
    of_width = np.where(inner, -1 / np.expm1(np.minimum(width, WIDEST)), 0.0)
    of_mean = -(of_a + of_b) * width * (LEVELS - 1) * _range_slope(spec)
    free = outputs[:, x.shape[1] :] >= SMALLEST_LOG_SCALE
    of_log_scale = np.where(free, -(of_a * a + of_b * b + of_width * width), 0.0)
    return np.concatenate([of_mean, of_log_scale], axis=1)


def _logistic_edges(spec: ModelSpec, x: Float64, outputs: Float64) -> tuple[Float64, ...]:
    """Returns grey levels from 0 to 255, their upper and lower edges, and their width.

    Edges count from the mean; edges and width are in units of the scale. Each is (N, C, H, W).
    """
    y, log_scale = logistic_mean(spec, outputs), outputs[:, x.shape[1] :]
    scale = np.exp(np.maximum(log_scale, SMALLEST_LOG_SCALE)) * _range_slope(spec)
    level = np.rint(x * (LEVELS - 1))
    width = 1 / ((LEVELS - 1) * scale)
    a = ((level + 0.5) / (LEVELS - 1) - y) / scale
    return level, a, a - width, width


def logistic_mean(spec: ModelSpec, outputs: Float64) -> Float64:
    """Returns the distribution's centre: the first half of the channels, mapped back."""
    return gaussian_mean(spec, outputs[:, : outputs.shape[1] // 2])


def _range_slope(spec: ModelSpec) -> float:
    low, high = spec.value_range
    return 1 / (high - low)


LIKELIHOODS: Mapping[str, Likelihood] = MappingProxyType(
    {
        "bernoulli": Likelihood(
            1, bernoulli_nats, bernoulli_backward, bernoulli_mean, lambda spec: 0.25
        ),
        "gaussian": Likelihood(1, gaussian_nats, gaussian_backward, gaussian_mean, _range_slope),
        "logistic": Likelihood(2, logistic_nats, logistic_backward, logistic_mean, _range_slope),
    }
)
"""The likelihoods by name. bernoulli takes grey levels as probabilities of white."""
