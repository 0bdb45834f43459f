"""The quantizer and its moving averages in PyTorch: the twin of ``vqref.quantizer``, without one-hot matrices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vqref.quantizer import SMALLEST_VARIANCE
from vqref.spec import CODEBOOK, EMA_COUNT, EMA_MEANS, ModelSpec
from vqtrain.nearest import nearest, squared_distances


def update_ema(
    ema_count: Tensor, ema_means: Tensor, latents: Tensor, indices: Tensor, decay: float, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """codebook (K, D), ema_count (K,) and ema_means (K, D) after latents (N, S, D) hit indices (N, S).

    The rule of ``vqref.update_ema``; the sums are segment sums: an index_add over N*S rows, not a product with N*S*K.
    """
    index = indices.reshape(-1)
    hits = torch.zeros_like(ema_count).index_add_(0, index, torch.ones_like(index, dtype=ema_count.dtype))
    sums = torch.zeros_like(ema_means).index_add_(0, index, latents.reshape(-1, latents.shape[-1]))
    count = decay * ema_count + (1 - decay) * hits
    means = decay * ema_means + (1 - decay) * sums
    return means / (count + epsilon)[:, None], count, means


def draw(latents: Tensor, codebook: Tensor, gumbel: Tensor, temperature: Tensor | float) -> Tensor:
    """Indices (N, S) drawn by the rule of ``vqref.draw_indices``; gumbel (N, S, K) is the random choice."""
    distances = torch.cat(list(squared_distances(latents.reshape(-1, latents.shape[-1]), codebook)))
    distances = distances.reshape(gumbel.shape)  # (N, S, K)
    variance = (distances.amin(dim=-1).mean() / latents.shape[-1]).clamp(min=SMALLEST_VARIANCE)
    return (gumbel - distances / (2 * temperature * variance)).argmax(dim=-1)


def reset_codes(
    codebook: Tensor, ema_count: Tensor, ema_means: Tensor, codes: Tensor, rows: Tensor, counts: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """codebook, ema_count and ema_means with codes (n,) at rows (n, D) and counts (n,): the rule of ``vqref.reset_codes``."""
    means = rows * (counts + epsilon)[:, None]
    return codebook.index_copy(0, codes, rows), ema_count.index_copy(0, codes, counts), ema_means.index_copy(0, codes, means)


def revive_codes(
    codebook: Tensor,
    ema_count: Tensor,
    ema_means: Tensor,
    latents: Tensor,
    order: Tensor,
    below: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """codebook, ema_count and ema_means with every code whose count is below that share of the mean, at most M of them, set to
    a latent of latents (M, D) with the mean count: ``reset_codes`` of the dead codes, in arrays whose shapes do not depend on
    how many there are. order (M,): which latent the first dead code takes, the second, …"""
    mean = len(latents) / len(codebook)
    dead = ema_count < below * mean
    place = dead.cumsum(0) - 1  # (K,): the first dead code has 0
    dead = dead & (place < len(latents))
    rows = latents[order[place.clamp(0, len(latents) - 1)]]  # (K, D), of which only the dead codes' are wanted
    return (
        torch.where(dead[:, None], rows, codebook),
        torch.where(dead, torch.full_like(ema_count, mean), ema_count),
        torch.where(dead[:, None], rows * (mean + epsilon), ema_means),
    )


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

    def forward(self, latents: Tensor, choose: Callable[[Tensor, Tensor], Tensor] = nearest) -> tuple[Tensor, Tensor]:
        """Indices (N, S), chosen from latents and codebook, and quantized (N, S, D), without gradient."""
        with torch.no_grad():
            indices = choose(latents, self.codebook)
            return indices, self.codebook[indices]

    @torch.no_grad()
    def update(self, latents: Tensor, indices: Tensor, decay: float, epsilon: float) -> None:
        """One EMA step in place, on the latents (N, S, D) and indices (N, S) of the training step that was just taken."""
        self._set(update_ema(self.ema_count, self.ema_means, latents, indices, decay, epsilon))

    @torch.no_grad()
    def reset(self, codes: Tensor, rows: Tensor, counts: Tensor, epsilon: float) -> None:
        """Codes (n,) set to rows (n, D) and counts (n,) in place."""
        self._set(reset_codes(self.codebook, self.ema_count, self.ema_means, codes, rows, counts, epsilon))

    @torch.no_grad()
    def revive(self, latents: Tensor, order: Tensor, below: float, epsilon: float) -> None:
        """Dead codes set to latents (N, S, D) in place, as ``revive_codes`` has it."""
        rows = latents.reshape(-1, latents.shape[-1])
        self._set(revive_codes(self.codebook, self.ema_count, self.ema_means, rows, order, below, epsilon))

    def _set(self, state: tuple[Tensor, Tensor, Tensor]) -> None:
        for buffer, value in zip((self.codebook, self.ema_count, self.ema_means), state, strict=True):
            buffer.copy_(value)
