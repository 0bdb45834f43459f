"""The training objective, in nats per image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vqref.likelihoods import LIKELIHOODS, nats
from vqref.spec import ModelSpec
from vqref.validation import Float64, as_float64, as_images


@dataclass(frozen=True)
class Losses:
    """The losses: reconstruction, prior and total in nats per image; commitment a mean square."""

    reconstruction: float
    commitment: float
    prior: float
    total: float

    @property
    def bound(self) -> float:
        """The negative evidence lower bound in nats per image: reconstruction + prior.

        It is the cost of sending an image, indices included.
        """
        return self.reconstruction + self.prior


def compute_losses(
    spec: ModelSpec,
    images: npt.ArrayLike,
    outputs: npt.ArrayLike,
    latents: npt.ArrayLike,
    quantized: npt.ArrayLike,
    beta: float = 0.25,
) -> Losses:
    """Returns the losses, averaged over N >= 1 images.

    Shapes: images (N, C, H, W), outputs (N, P, H, W), latents and quantized (N, S, D).

    reconstruction  -log p(image; outputs) under the spec's likelihood
    commitment      mean over every element of (latents - quantized)^2
    prior           S * ln K, the length of the indices under the uniform prior
    total           reconstruction + beta * commitment + prior

    Raises ValueError for arrays that do not fit the spec or each other.
    """
    each = nats(spec, images, outputs)
    if not len(each):
        raise ValueError("images: shape is (0, ...), expected at least one image to average over")
    latents = as_float64("latents", latents, (len(each), spec.latent_size, spec.code_size))
    quantized = as_float64("quantized", quantized, latents.shape)
    reconstruction = float(each.sum() / len(each))
    commitment = float(np.square(latents - quantized).mean())
    prior = spec.latent_size * float(np.log(spec.num_codes))
    return Losses(reconstruction, commitment, prior, reconstruction + beta * commitment + prior)


def losses_backward(
    spec: ModelSpec,
    images: npt.ArrayLike,
    outputs: npt.ArrayLike,
    latents: npt.ArrayLike,
    quantized: npt.ArrayLike,
    beta: float = 0.25,
) -> tuple[Float64, Float64]:
    """Returns the gradients of ``compute_losses(...).total`` by outputs and by latents.

    Their shapes are (N, P, H, W) and (N, S, D). quantized counts as a constant. Raises ValueError
    as ``compute_losses`` does.
    """
    x = as_images(images, spec)
    y = as_float64("outputs", outputs, (len(x), *spec.output_shape))
    latents = as_float64("latents", latents, (len(x), spec.latent_size, spec.code_size))
    quantized = as_float64("quantized", quantized, latents.shape)
    of_outputs = LIKELIHOODS[spec.likelihood].backward(spec, x, y) / len(x)
    return of_outputs, beta * 2 * (latents - quantized) / latents.size
