"""The training objective of the post, in nats an image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vqref.spec import ModelSpec
from vqref.validation import as_float64, as_images


@dataclass(frozen=True)
class Losses:
    """reconstruction, prior and total in nats an image; commitment a mean of squares; ``bound`` = reconstruction + prior."""

    reconstruction: float
    commitment: float
    prior: float
    total: float

    @property
    def bound(self) -> float:
        """Negative evidence lower bound in nats an image: what the model needs to send an image, indices included."""
        return self.reconstruction + self.prior


def compute_losses(
    spec: ModelSpec,
    images: npt.ArrayLike,
    logits: npt.ArrayLike,
    latents: npt.ArrayLike,
    quantized: npt.ArrayLike,
    beta: float = 0.25,
) -> Losses:
    """The four losses of images and logits (N, C, H, W), latents and quantized (N, S, D), averaged over N >= 1 images.

    reconstruction  -sum over pixels of log Bernoulli(x; sigmoid(l)) = sum of softplus(l) - x*l, x the grey level
    commitment      mean over every element of (latents - quantized)^2
    prior           S * ln K, the code length under the uniform prior
    total           reconstruction + beta * commitment + prior

    Raises ValueError for arrays that do not fit the spec or each other.
    """
    x = as_images(images, spec)
    if not len(x):
        raise ValueError("images: shape is (0, ...), expected at least one image to average over")
    logits = as_float64("logits", logits, x.shape)
    latents = as_float64("latents", latents, (len(x), spec.latent_size, spec.code_size))
    quantized = as_float64("quantized", quantized, latents.shape)
    reconstruction = float((np.logaddexp(0.0, logits) - x * logits).sum() / len(x))
    commitment = float(np.square(latents - quantized).mean())
    prior = spec.latent_size * float(np.log(spec.num_codes))
    return Losses(reconstruction, commitment, prior, reconstruction + beta * commitment + prior)
