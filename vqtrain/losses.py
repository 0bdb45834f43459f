"""The training objective in PyTorch: the twin of ``vqref.losses``."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from vqref.spec import ModelSpec
from vqtrain.likelihoods import nats


class Losses(NamedTuple):
    """Scalars: reconstruction, prior and total in nats per image; commitment, a mean of squares."""

    reconstruction: Tensor
    commitment: Tensor
    prior: Tensor
    total: Tensor


def compute_losses(
    spec: ModelSpec,
    images: Tensor,
    outputs: Tensor,
    latents: Tensor,
    quantized: Tensor,
    beta: float,
) -> Losses:
    """Returns the losses of ``vqref.compute_losses``.

    Images are (N, C, H, W), outputs (N, P, H, W), latents and quantized (N, S, D).
    Gradients flow through outputs and latents; quantized is a constant.
    """
    reconstruction = nats(spec, images, outputs).sum() / len(images)
    commitment = (latents - quantized.detach()).square().mean()
    prior = outputs.new_full((), spec.latent_size * math.log(spec.num_codes))
    return Losses(reconstruction, commitment, prior, reconstruction + beta * commitment + prior)
