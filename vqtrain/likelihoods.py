"""The likelihoods in PyTorch, by the formulas of their twin, ``vqref.likelihoods``."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vqref.likelihoods import LEVELS, SMALLEST_LOG_SCALE
from vqref.spec import ModelSpec


def nats(spec: ModelSpec, images: Tensor, outputs: Tensor) -> Tensor:
    """Returns -log p(image; outputs) in nats per image, (N,).

    Images are (N, C, H, W) in [0, 1], outputs (N, P, H, W).
    """
    return NATS[spec.likelihood](spec, images, outputs).sum(dim=(1, 2, 3))


def mean(spec: ModelSpec, outputs: Tensor) -> Tensor:
    """Returns the likelihood's mean (N, C, H, W), mapped back and clipped to [0, 1]."""
    return MEANS[spec.likelihood](spec, outputs).clamp(0.0, 1.0)


def bernoulli_nats(spec: ModelSpec, x: Tensor, outputs: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs, x, reduction="none")


def bernoulli_mean(spec: ModelSpec, outputs: Tensor) -> Tensor:
    return outputs.sigmoid()


def gaussian_nats(spec: ModelSpec, x: Tensor, outputs: Tensor) -> Tensor:
    squares = (x - gaussian_mean(spec, outputs)).square()
    return squares / (2 * spec.variance) + 0.5 * math.log(2 * math.pi * spec.variance)


def gaussian_mean(spec: ModelSpec, outputs: Tensor) -> Tensor:
    low, high = spec.value_range
    return (outputs - low) / (high - low)


def logistic_nats(spec: ModelSpec, x: Tensor, outputs: Tensor) -> Tensor:
    """Takes -logsigmoid for the oracle's softplus: PyTorch's softplus drops terms below 2e-9."""
    y, log_scale = logistic_mean(spec, outputs), outputs[:, x.shape[1] :]
    low, high = spec.value_range
    scale = log_scale.clamp(min=SMALLEST_LOG_SCALE).exp() / (high - low)
    level = (x * (LEVELS - 1)).round()
    width = 1 / ((LEVELS - 1) * scale)
    a = ((level + 0.5) / (LEVELS - 1) - y) / scale
    below_a = torch.where(level < LEVELS - 1, -F.logsigmoid(a), 0.0)
    above_b = torch.where(level > 0, -F.logsigmoid(width - a), 0.0)
    inner = (level > 0) & (level < LEVELS - 1)
    return below_a + above_b - torch.where(inner, (-torch.expm1(-width)).log(), 0.0)


def logistic_mean(spec: ModelSpec, outputs: Tensor) -> Tensor:
    return gaussian_mean(spec, outputs[:, : outputs.shape[1] // 2])


NATS: dict[str, Callable[[ModelSpec, Tensor, Tensor], Tensor]] = {
    "bernoulli": bernoulli_nats,
    "gaussian": gaussian_nats,
    "logistic": logistic_nats,
}
MEANS: dict[str, Callable[[ModelSpec, Tensor], Tensor]] = {
    "bernoulli": bernoulli_mean,
    "gaussian": gaussian_mean,
    "logistic": logistic_mean,
}
