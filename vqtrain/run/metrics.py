"""Measures a model, over an epoch of training and over a whole set of images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqref.spec import ModelSpec
from vqref.validation import Array, Int64
from vqtrain.data.batches import Batches
from vqtrain.device import arithmetic
from vqtrain.likelihoods import mean
from vqtrain.losses import Losses, compute_losses
from vqtrain.model import VQVAE
from vqtrain.options import TrainingOptions
from vqtrain.run.ranks import ALONE, Ranks

MEASURED = {"held_out": "held out", "training_sample": "sample of training"}
"""The sets that are measured after an epoch, and their names in the report."""

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2
"""The constants of Wang et al. (2004): the Gaussian window in pixels, and (K1 L)² and (K2 L)² for
values of range L = 1."""

AT_ONCE = 2**20
"""Values processed at once. SSIM needs about a dozen float64 arrays of this size."""

LEAST_ERROR = 1e-10
"""Smaller mean squared errors count as this one, 100 dB. Otherwise a single exact reconstruction,
perhaps of a white image, would make the mean PSNR infinite."""


@dataclass(frozen=True)
class Fidelity:
    """How close reconstructions are to the images, whose values are in [0, 1].

    nmse: the mean squared error divided by the variance of the data.
    psnr: PSNR of the mean squared error of the whole set, in dB. mean_psnr: the mean of the PSNRs
    of single images.
    ssim: structural similarity (Wang et al. 2004), per channel, averaged over images.
    """

    nmse: float
    psnr: float
    mean_psnr: float
    ssim: float


@dataclass(frozen=True)
class Metrics:
    """Means over images, in nats per image (commitment: a mean of squares), and the use of codes.

    hits: how often each code was chosen, (K,) int64.
    fidelity: None for an epoch, which is measured by its training steps only.
    pixel_entropy: the reconstruction loss of a perfect copy of the set, for a Bernoulli model. None
    for an epoch and for other likelihoods.
    """

    reconstruction: float
    commitment: float
    prior: float
    total: float
    hits: Int64 = field(repr=False, compare=False)
    fidelity: Fidelity | None = None
    pixel_entropy: float | None = None

    @property
    def bound(self) -> float:
        """Nats per image for everything: reconstruction + prior."""
        return self.reconstruction + self.prior

    @property
    def perplexity(self) -> float:
        """The exponential of the entropy of the indices' frequencies, from 1 to num_codes."""
        shares = self.hits[self.hits > 0] / self.hits.sum()
        return float(np.exp(-(shares * np.log(shares)).sum()))

    @property
    def codes_used(self) -> int:
        """How many codes were chosen at least once."""
        return int((self.hits > 0).sum())

    def to_dict(self, spec: ModelSpec) -> dict[str, float]:
        """Returns measures by name; ``bits_per_dimension`` is the bound per pixel and channel."""
        names = ("reconstruction", "commitment", "prior", "total", "bound")
        least = {} if self.pixel_entropy is None else {"pixel_entropy": self.pixel_entropy}
        return {
            **{name: getattr(self, name) for name in names},
            **least,
            "bits_per_dimension": self.bound / (math.log(2) * math.prod(spec.image_shape)),
            "perplexity": self.perplexity,
            "codes_used": self.codes_used,
            **(asdict(self.fidelity) if self.fidelity else {}),
        }


class Meter:
    """Sums batches on the device. Adding does not wait for the device; reading does."""

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        self.count = 0
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)
        self.hits = torch.zeros(spec.num_codes, dtype=torch.int64, device=device)

    def add(self, losses: Losses, indices: Tensor) -> None:
        """Adds the losses of one batch and its indices (N, S)."""
        self.count += len(indices)
        self.sums += torch.stack(losses).detach().double() * len(indices)
        index = indices.reshape(-1)
        self.hits.index_add_(0, index, torch.ones_like(index))

    def join(self, ranks: Ranks) -> None:
        """Adds up the counts of all ranks; each rank then has the sums."""
        count = torch.tensor([self.count], device=self.hits.device)
        ranks.add_up([self.sums])
        ranks.add_up([self.hits, count])
        self.count = int(count)

    def clear(self) -> None:
        """Starts again from zero."""
        self.count = 0
        self.sums.zero_()
        self.hits.zero_()

    def state(self) -> dict[str, Any]:
        """Returns what ``load`` needs to continue counting."""
        return {"count": self.count, "sums": self.sums, "hits": self.hits}

    def load(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        self.sums.copy_(state["sums"])
        self.hits.copy_(state["hits"])

    def read(self, fidelity: Fidelity | None = None, pixel_entropy: float | None = None) -> Metrics:
        """Returns the means over the images added so far, at least one."""
        reconstruction, commitment, prior, total = (self.sums / self.count).tolist()
        hits = self.hits.cpu().numpy().copy()
        return Metrics(reconstruction, commitment, prior, total, hits, fidelity, pixel_entropy)


def _ignore(count: int) -> None:
    """Ignores the progress of a measurement."""


@torch.no_grad()
def evaluate(
    model: VQVAE,
    batches: Batches,
    options: TrainingOptions,
    variance: float,
    measured: Callable[[int], None] = _ignore,
    ranks: Ranks = ALONE,
) -> Metrics:
    """Measures a model on every image of ``batches``, without training it; sums are float64.

    variance: the variance of the data, by which ``nmse`` divides. measured: gets the number of
    images done after each batch. ranks: each measures its own images, and all get the same result.
    Memory does not grow with the number of images.
    """
    spec, codebook = model.spec, model.quantizer.codebook
    meter = Meter(spec, codebook.device)
    sums = torch.zeros(3, dtype=torch.float64, device=codebook.device)
    with arithmetic("float32"):
        few = spec.latent_size == 1 and spec.num_codes < len(batches.images)
        codes = codebook[:, None].split(batches.at_once) if few else ()
        table = torch.cat([model.decoder(part) for part in codes]) if few else None
        for images in batches.in_order():
            found = model.encoder(images).to(codebook.dtype)
            indices, rows = model.quantizer(found)
            shown = model.decoder(rows) if table is None else table[indices[:, 0]]
            x, outputs, latents, quantized = (
                each.double() for each in (images, shown, found, rows)
            )
            losses = compute_losses(spec, x, outputs, latents, quantized, options.beta)
            meter.add(losses, indices)
            y = mean(spec, outputs)
            errors = (x - y).square().mean(dim=(1, 2, 3))  # (N,)
            sums += torch.stack([errors.sum(), decibels(errors).sum(), ssim(x, y).sum()])
            measured(meter.count)
    with ranks.together():
        meter.join(ranks)
        ranks.add_up([sums])
    error, mean_psnr, similarity = sums / meter.count
    nmse, psnr = picture_errors(error.item(), variance)
    fidelity = Fidelity(nmse, psnr, mean_psnr.item(), similarity.item())
    return meter.read(fidelity, least_reconstruction(spec, batches, ranks))


def least_reconstruction(spec: ModelSpec, batches: Batches, ranks: Ranks = ALONE) -> float | None:
    """Returns the least possible reconstruction loss of ``batches``; None if there is no least.

    Bernoulli has one, the entropy of the pixels. All ranks together have at least one image.
    """
    if spec.likelihood != "bernoulli":
        return None
    total = batches.images.new_zeros((), dtype=torch.float64)
    for images in batches.in_order():
        total += pixel_entropy(images.double()).sum()
    count = torch.full_like(total, len(batches.images))
    with ranks.together():
        ranks.add_up([total, count])
    return float(total / count)


def pixel_entropy(images: Tensor) -> Tensor:
    """Returns the Bernoulli loss (N,) in nats of perfect copies of images (N, C, H, W) in [0, 1].

    Each pixel's probability is its grey level x. The loss is the sum over pixels of
    -x ln x - (1-x) ln (1-x).
    """
    entropies: Tensor = torch.special.entr(images) + torch.special.entr(1 - images)
    return entropies.sum(dim=(1, 2, 3))


def picture_errors(error: float, variance: float) -> tuple[float, float]:
    """Returns NMSE and PSNR for a mean squared error of values in [0, 1] with this variance."""
    return error / max(variance, LEAST_ERROR), -10 * math.log10(max(error, LEAST_ERROR))


def decibels(errors: Tensor) -> Tensor:
    """Returns the PSNR of mean squared errors of values whose peak is 1."""
    return -10 * errors.clamp(min=LEAST_ERROR).log10()


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Returns SSIM (N,) of pairs of float64 images (N, C, H, W) in [0, 1].

    This is the mean over channels and over all places where the whole window fits (Wang et al.
    2004, equation 13). The window is never wider or higher than the image.
    """
    step = max(1, AT_ONCE // images[0].numel())
    pairs = zip(images.split(step), others.split(step), strict=True)
    return torch.cat([_ssim(x, y) for x, y in pairs])


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    rows, columns = _windows(x.shape[2]).to(x), _windows(x.shape[3]).to(x)

    def local(values: Tensor) -> Tensor:
        return rows @ values @ columns.T

    mean_x, mean_y = local(x), local(y)
    variances = local(x * x) - mean_x**2 + local(y * y) - mean_y**2
    covariance = local(x * y) - mean_x * mean_y
    light = (2 * mean_x * mean_y + SSIM_C1) / (mean_x**2 + mean_y**2 + SSIM_C1)
    shape = (2 * covariance + SSIM_C2) / (variances + SSIM_C2)
    return (light * shape).mean(dim=(1, 2, 3))


def _windows(size: int) -> Tensor:
    """Returns the Gaussian window at each place in ``size`` pixels where it fits, (places, size).

    A matrix product with it gives the local means of a column of pixels.
    """
    width = min(SSIM_WINDOW, size)
    offsets = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
    window = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    return torch.eye(size, dtype=torch.float64).unfold(0, width, 1) @ (window / window.sum())


def variance_of(images: Array) -> float:
    """Returns the variance of uint8 images (as grey levels in [0, 1]) or floating images."""
    values = images.reshape(-1)
    unit = 255 if images.dtype == np.uint8 else 1
    sums = np.zeros(2)
    for start in range(0, len(values), AT_ONCE):
        part = values[start : start + AT_ONCE].astype(np.float64) / unit
        sums += part.sum(), part @ part
    average, squares = sums / len(values)
    return float(max(0.0, squares - average**2))
