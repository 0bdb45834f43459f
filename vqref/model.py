"""The whole model: initial parameters, and one pass from images to losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vqref.likelihoods import mean
from vqref.losses import Losses, compute_losses, losses_backward
from vqref.network import backward, decode, encode, encode_unscaled, scaled
from vqref.quantizer import grid, quantize
from vqref.spec import CODEBOOK, ModelSpec, Parameter
from vqref.validation import Float64, Int64, Params, as_images, as_indices, check_params

if TYPE_CHECKING:
    from vqref.prior import PriorSpec


@dataclass(frozen=True)
class Forward:
    """Every stage of one pass. Arrays are float64, except indices.

    unscaled: (N, S, D), the input from which ``vqref.network.scaled`` made latents.
    latents, quantized: (N, S, D). indices: (N, S) int64. gap: (N, S).
    outputs: (N, P, H, W). reconstructions: (N, C, H, W). losses: in nats per image.
    """

    unscaled: Float64
    latents: Float64
    indices: Int64
    gap: Float64
    quantized: Float64
    outputs: Float64
    reconstructions: Float64
    losses: Losses


def init_params(
    spec: ModelSpec | PriorSpec, rng: np.random.Generator
) -> dict[str, npt.NDArray[np.float32]]:
    """Returns new parameters {name: float32 array}, each drawn as ``Parameter.initial`` says."""
    params: dict[str, npt.NDArray[np.float32]] = {}
    for parameter in spec.parameters:
        if parameter.initial == "codebook":
            params[parameter.name] = params[CODEBOOK].copy()
        elif isinstance(spec, ModelSpec) and parameter.initial == "grid":
            params[parameter.name] = grid(spec.levels).astype(np.float32)
        else:
            params[parameter.name] = INITIALS[parameter.initial](parameter, rng).astype(np.float32)
    return params


def _uniform(parameter: Parameter, rng: np.random.Generator) -> Float64:
    return rng.uniform(-parameter.scale, parameter.scale, parameter.shape)


def _truncated_normal(parameter: Parameter, rng: np.random.Generator) -> Float64:
    """Draws normal values. Draws values beyond two standard deviations again."""
    values = rng.standard_normal(parameter.shape)
    while (far := np.abs(values) > 2).any():
        values[far] = rng.standard_normal(int(far.sum()))
    return parameter.scale * values


def _unit_rows(parameter: Parameter, rng: np.random.Generator) -> Float64:
    rows = rng.standard_normal(parameter.shape)
    length: Float64 = np.sqrt(np.square(rows).sum(axis=1, keepdims=True))
    return rows / length


INITIALS: dict[str, Callable[[Parameter, np.random.Generator], Float64]] = {
    "uniform": _uniform,
    "truncated_normal": _truncated_normal,
    "zeros": lambda parameter, rng: np.zeros(parameter.shape),
    "ones": lambda parameter, rng: np.ones(parameter.shape),
    "unit_rows": _unit_rows,
}


def forward(spec: ModelSpec, params: Params, images: npt.ArrayLike, beta: float = 0.25) -> Forward:
    """Passes images (N, C, H, W) in [0, 1] through encoder, quantizer, decoder and losses.

    N must be at least 1. In this direction, the straight-through estimator
    latents + stop_gradient(quantized - latents) equals quantized. Raises ValueError for parameters
    or images that do not fit the spec.
    """
    check_params(spec, params)
    unscaled = encode_unscaled(spec, params, images)
    latents = scaled(spec, unscaled)
    q = quantize(latents, params[CODEBOOK])
    outputs = decode(spec, params, q.quantized)
    losses = compute_losses(spec, images, outputs, latents, q.quantized, beta)
    reconstructions = mean(spec, outputs)
    found = q.indices, q.gap, q.quantized, outputs, reconstructions
    return Forward(unscaled, latents, *found, losses)


def gradients(
    spec: ModelSpec,
    params: Params,
    images: npt.ArrayLike,
    beta: float = 0.25,
    indices: npt.ArrayLike | None = None,
) -> dict[str, Float64]:
    """Returns the gradients of ``forward(...).losses.total``: {name: float64 array}.

    There is one for every parameter of encoder and decoder; the codebook has none. The
    straight-through estimator passes the gradient of the decoder's input to the latents unchanged.
    The gradient of the commitment is added to it there.

    indices: (N, S), codes to take instead of the nearest.
    Raises ValueError for parameters, images or indices that do not fit the spec.
    """
    check_params(spec, params)
    x = as_images(images, spec)
    latents = encode(spec, params, x)
    quantized = _quantized(spec, params, latents, indices)
    outputs = decode(spec, params, quantized)
    pulled = losses_backward(spec, x, outputs, latents, quantized, beta)
    return _pulled_back(spec, params, x, quantized, *pulled)


def gradient_terms(
    spec: ModelSpec,
    params: Params,
    images: npt.ArrayLike,
    beta: float = 0.25,
    indices: npt.ArrayLike | None = None,
) -> dict[str, Float64]:
    """Returns the part of ``gradients`` that is left if the targets, images and codes, are 0.

    A gradient is a difference of two terms; this shows their size. If they are nearly equal,
    as for images that are all alike, judge rounding by these terms and not by the gradient.
    """
    x = as_images(images, spec)
    latents = encode(spec, params, x)
    quantized = _quantized(spec, params, latents, indices)
    outputs = decode(spec, params, quantized)
    nothing = np.zeros_like(x), np.zeros_like(quantized)
    pulled = losses_backward(spec, nothing[0], outputs, latents, nothing[1], beta)
    return _pulled_back(spec, params, x, quantized, *pulled)


def _quantized(
    spec: ModelSpec, params: Params, latents: Float64, indices: npt.ArrayLike | None
) -> Float64:
    """Returns the nearest codes, or those of ``indices``."""
    if indices is None:
        return quantize(latents, params[CODEBOOK]).quantized
    codes = as_indices(indices, (len(latents), spec.latent_size), spec.num_codes)
    return np.asarray(np.asarray(params[CODEBOOK], np.float64)[codes])


def _pulled_back(
    spec: ModelSpec,
    params: Params,
    x: Float64,
    quantized: Float64,
    of_outputs: Float64,
    of_latents: Float64,
) -> dict[str, Float64]:
    of_quantized, found = backward(spec.decoder, params, quantized, of_outputs)
    _, of_encoder = backward(spec.encoder, params, x, of_latents + of_quantized)
    return found | of_encoder
