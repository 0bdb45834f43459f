"""Starts a model: its parameters, its codebook's averages, its place on a device."""

from __future__ import annotations

import numpy as np
import torch

import vqref
from vqref.dialects import DIALECTS
from vqref.quantizer import EMAState
from vqref.spec import CODEBOOK, EMA_COUNT, EMA_MEANS, ModelSpec
from vqref.validation import Array, Float64
from vqtrain.model import VQVAE
from vqtrain.options import TrainingOptions

WIDEST_OUTPUT = 32.0
"""Outputs for mean pixels need not be beyond ± this: in float32, a logit of 32 is white."""

DARKEST = 1e-3
"""Mean pixels stay this far from black and white."""


def start_model(
    spec: ModelSpec, options: TrainingOptions, images: Array, device: torch.device
) -> VQVAE:
    """Returns the model before its first step on images (N, C, H, W), uint8 or in [0, 1]."""
    rng = np.random.default_rng(options.seed)
    params = vqref.init_params(spec, rng)
    if options.center:
        bias, _ = spec.decoder[-1].parameters[1]
        params[bias] = mean_outputs(spec, images).astype(np.float32)
    dialect, codebook = DIALECTS[options.dialect], params[CODEBOOK]
    means = rng.standard_normal(codebook.shape) if dialect.means == "own" else None
    start = EMAState.start(codebook, dialect, means)
    params[EMA_COUNT] = start.ema_count.astype(np.float32)
    params[EMA_MEANS] = start.ema_means.astype(np.float32)
    return prepare(VQVAE(spec, params, dialect), device)


def prepare(model: VQVAE, device: torch.device) -> VQVAE:
    """Moves the model to its device, with channels-last kernels for fast convolutions."""
    return model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def mean_outputs(spec: ModelSpec, images: Array) -> Float64:
    """Returns outputs (P,) whose likelihood's mean is the mean pixel of each channel of ``images``.

    Bisection finds them for any likelihood, since means rise with outputs. Outputs that are not
    means (scales) stay at 0.
    """
    unit = 255 if images.dtype == np.uint8 else 1
    pixel = images.mean(axis=(0, 2, 3), dtype=np.float64) / unit  # (C,)
    wanted = np.clip(pixel, DARKEST, 1 - DARKEST)
    channels, (parameters, height, width) = len(wanted), spec.output_shape
    low, high = np.full(channels, -WIDEST_OUTPUT), np.full(channels, WIDEST_OUTPUT)
    outputs = np.zeros(parameters)
    for _ in range(64):
        outputs[:channels] = (low + high) / 2
        image = np.broadcast_to(outputs[:, None, None], (1, parameters, height, width))
        below = vqref.reconstruct(spec, image)[0, :, 0, 0] < wanted
        low = np.where(below, outputs[:channels], low)
        high = np.where(below, high, outputs[:channels])
    return outputs
