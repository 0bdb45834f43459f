"""The training objective in PyTorch: the twin of ``vqref.losses``."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from vqref.spec import ModelSpec


class Losses(NamedTuple):
    """Scalars: reconstruction, prior and total in nats an image, commitment a mean of squares."""

    reconstruction: Tensor
    commitment: Tensor
    prior: Tensor
    total: Tensor


def compute_losses(spec: ModelSpec, images: Tensor, logits: Tensor, latents: Tensor, quantized: Tensor, beta: float) -> Losses:
    """The losses of images and logits (N, C, H, W), latents and quantized (N, S, D), as ``vqref.compute_losses`` has them.

    Gradients flow through logits and latents; quantized is a constant.
    """
    reconstruction = F.binary_cross_entropy_with_logits(logits, images, reduction="sum") / len(images)
    commitment = (latents - quantized.detach()).square().mean()
    prior = logits.new_full((), spec.latent_size * math.log(spec.num_codes))
    return Losses(reconstruction, commitment, prior, reconstruction + beta * commitment + prior)
