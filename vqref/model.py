"""The whole model: initial parameters, and one pass from images to losses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vqref.losses import Losses, compute_losses
from vqref.network import decode, encode, sigmoid
from vqref.quantizer import quantize
from vqref.spec import CODEBOOK, ModelSpec
from vqref.validation import Float64, Int64, Params, check_params


@dataclass(frozen=True)
class Forward:
    """Every stage of one pass, float64: latents and quantized (N, S, D), indices (N, S) int64, gap (N, S), logits and
    probabilities (N, C, H, W), losses in nats an image."""

    latents: Float64
    indices: Int64
    gap: Float64
    quantized: Float64
    logits: Float64
    probabilities: Float64
    losses: Losses


def init_params(spec: ModelSpec, rng: np.random.Generator) -> dict[str, npt.NDArray[np.float32]]:
    """Fresh parameters {name: float32 array} as the spec's table says: Glorot uniform weights and codebook, zero biases."""
    params: dict[str, npt.NDArray[np.float32]] = {}
    values: npt.NDArray[np.floating]
    for parameter in spec.parameters:
        if parameter.initial == "glorot_uniform":
            values = rng.uniform(-parameter.limit, parameter.limit, parameter.shape)
        elif parameter.initial == "zeros":
            values = np.zeros(parameter.shape)
        else:
            values = params[CODEBOOK]
        params[parameter.name] = values.astype(np.float32)
    return params


def forward(spec: ModelSpec, params: Params, images: npt.ArrayLike, beta: float = 0.25) -> Forward:
    """Images (N, C, H, W) in [0, 1], N >= 1, through encoder, quantizer, decoder and losses.

    Forward, the straight-through estimator latents + stop_gradient(quantized - latents) is quantized itself.
    Raises ValueError for parameters or images that do not fit the spec.
    """
    check_params(spec, params)
    latents = encode(spec, params, images)
    q = quantize(latents, params[CODEBOOK])
    logits = decode(spec, params, q.quantized)
    losses = compute_losses(spec, images, logits, latents, q.quantized, beta)
    return Forward(latents, q.indices, q.gap, q.quantized, logits, sigmoid(logits), losses)
