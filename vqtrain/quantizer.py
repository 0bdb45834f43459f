"""The quantizer and its moving averages in PyTorch: the twin of ``vqref.quantizer``, without one-hot matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vqref.spec import CODEBOOK, EMA_COUNT, EMA_MEANS, ModelSpec

DIFFERENCE_BYTES = 64 * 2**20
"""Bytes of latent-minus-codebook differences held at once, so that memory stays flat in the number of latents."""


def nearest(latents: Tensor, codebook: Tensor) -> Tensor:
    """Indices (N, S) int64 of the codebook rows (K, D) nearest to latents (N, S, D): direct form, the lowest on a tie."""
    rows = latents.reshape(-1, latents.shape[-1])
    step = max(1, DIFFERENCE_BYTES // (codebook.numel() * codebook.element_size()))
    found = [(x[:, None] - codebook).square().sum(dim=-1).argmin(dim=-1) for x in rows.split(step)]
    return torch.cat(found).reshape(latents.shape[:-1])


def update_ema(
    ema_count: Tensor, ema_means: Tensor, latents: Tensor, indices: Tensor, decay: float, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """codebook (K, D), ema_count (K,) and ema_means (K, D) after latents (N, S, D) hit indices (N, S).

    The rule of ``vqref.update_ema``; the sums are segment sums: an index_add over N*S rows, not a product with N*S*K.
    """
    index = indices.reshape(-1)
    hits = torch.bincount(index, minlength=len(ema_count)).to(ema_count.dtype)
    sums = torch.zeros_like(ema_means).index_add_(0, index, latents.reshape(-1, latents.shape[-1]))
    count = decay * ema_count + (1 - decay) * hits
    means = decay * ema_means + (1 - decay) * sums
    return means / (count + epsilon)[:, None], count, means


class Quantizer(nn.Module):
    """codebook, ema_count and ema_means as buffers: the optimizer never sees them, only ``update`` moves them."""

    codebook: Tensor
    ema_count: Tensor
    ema_means: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        shapes = {parameter.name: parameter.shape for parameter in spec.parameters}
        for name in (CODEBOOK, EMA_COUNT, EMA_MEANS):
            self.register_buffer(name.rsplit(".", 1)[1], torch.empty(shapes[name]))

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Indices (N, S) and quantized (N, S, D), without gradient."""
        with torch.no_grad():
            indices = nearest(latents, self.codebook)
            return indices, self.codebook[indices]

    @torch.no_grad()
    def update(self, latents: Tensor, indices: Tensor, decay: float, epsilon: float) -> None:
        """One EMA step in place, on the latents (N, S, D) and indices (N, S) of the training step that was just taken."""
        state = update_ema(self.ema_count, self.ema_means, latents, indices, decay, epsilon)
        for buffer, value in zip((self.codebook, self.ema_count, self.ema_means), state, strict=True):
            buffer.copy_(value)
