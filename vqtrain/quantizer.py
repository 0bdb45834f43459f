"""The quantizer and its moving averages in PyTorch: the twin of ``vqref.quantizer``, without
one-hot matrices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vqref.dialects import POST, Dialect
from vqref.network import LEAST_LENGTH
from vqref.quantizer import SMALLEST_VARIANCE
from vqref.spec import CODEBOOK, EMA_COUNT, EMA_MEANS, ModelSpec
from vqtrain.nearest import nearest, squared_distances

SETTLED = 1_000_000
"""Steps after which nothing of a debiased average is its start any more."""


def update_ema(
    codebook: Tensor,
    ema_count: Tensor,
    ema_means: Tensor,
    latents: Tensor,
    indices: Tensor,
    decay: float,
    epsilon: float,
    dialect: Dialect = POST,
    steps: Tensor | int = 0,
    normalized: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """codebook (K, D), ema_count (K,) and ema_means (K, D) after latents (N, S, D) hit indices (N,
    S): the rule of ``vqref.update_ema``, ``steps`` updates having gone before.

    The sums are segment sums: an index_add over N*S rows, not a product with N*S*K.
    """
    index = indices.reshape(-1)
    ones = torch.ones_like(index, dtype=ema_count.dtype)
    hits = torch.zeros_like(ema_count).index_add_(0, index, ones)
    rows = latents.reshape(-1, latents.shape[-1])
    sums = torch.zeros_like(ema_means).index_add_(0, index, rows)
    count = decay * ema_count + (1 - decay) * hits
    means = decay * ema_means + (1 - decay) * sums
    share = _share(ema_count, decay, dialect, steps + 1)
    size = _smoothed(count / share, epsilon, dialect)
    codebook = placed(means / share / size[:, None], codebook, normalized)
    return codebook, size if dialect.stores_smoothed else count, means


def placed(rows: Tensor, codes: Tensor, normalized: bool) -> Tensor:
    """Where codes (n, D) move if they are drawn to rows (n, D): the rule of
    ``vqref.EMAState.placed``."""
    if not normalized:
        return rows
    length = rows.norm(dim=1, keepdim=True)
    return torch.where(length < LEAST_LENGTH, codes, rows / length.clamp(min=LEAST_LENGTH))


def _share(like: Tensor, decay: float, dialect: Dialect, steps: Tensor | int) -> Tensor | float:
    """How much of the averages is data and not their start, in double precision: it cancels."""
    if not dialect.debiased:
        return 1.0
    exponent = torch.as_tensor(steps, device=like.device).double()
    return (1 - decay**exponent).to(like.dtype)


def _smoothed(count: Tensor, epsilon: float, dialect: Dialect) -> Tensor:
    """What the means are divided by, (K,)."""
    if dialect.smoothing == "epsilon":
        return count + epsilon
    total = count.sum()
    return (count + epsilon) / (total + len(count) * epsilon) * total


@torch.no_grad()
def draw(
    latents: Tensor, codebook: Tensor, gumbel: Tensor | int, temperature: Tensor | float
) -> Tensor:
    """Indices (N, S) drawn by the rule of ``vqref.draw_indices``, a few latents at a time.

    gumbel: the random choice, (N, S, K), or a seed from which each part of it is made when it is
    needed, so that no array of N*S*K elements is.
    """
    flat = latents.reshape(-1, latents.shape[-1])
    best = codebook[nearest(latents, codebook).reshape(-1)]
    variance = (flat - best).square().sum(dim=-1).mean() / latents.shape[-1]
    scale = 2 * temperature * variance.clamp(min=SMALLEST_VARIANCE)
    indices = torch.empty(len(flat), dtype=torch.int64, device=flat.device)
    start = 0  # of a part; parts kept apart would scatter the heap, hundreds of MiB
    for distances in squared_distances(flat, codebook):
        scores = distances.div_(-scale).add_(_noise(gumbel, start, distances))
        torch.argmax(scores, dim=-1, out=indices[start : start + len(scores)])
        start += len(scores)
    return indices.reshape(latents.shape[:-1])


def _noise(gumbel: Tensor | int, start: int, like: Tensor) -> Tensor:
    """The Gumbel noise of latents from ``start`` on, shaped like their distances (m, K)."""
    if isinstance(gumbel, Tensor):
        return gumbel.reshape(-1, like.shape[1])[start : start + len(like)]
    generator = torch.Generator(like.device).manual_seed(gumbel + start)
    return torch.empty_like(like).exponential_(generator=generator).log_().neg_()


def reset_codes(
    codebook: Tensor,
    ema_count: Tensor,
    ema_means: Tensor,
    codes: Tensor,
    rows: Tensor,
    counts: Tensor,
    decay: float,
    epsilon: float,
    dialect: Dialect = POST,
    steps: Tensor | int = 0,
    normalized: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """codebook, ema_count and ema_means with codes (n,) at rows (n, D) and counts (n,): the rule of
    ``vqref.reset_codes``."""
    dead = torch.zeros_like(ema_count, dtype=torch.bool).index_fill(0, codes, True)
    wide_counts = ema_count.index_copy(0, codes, counts)
    wide_rows = codebook.index_copy(0, codes, rows)
    state = codebook, ema_count, ema_means
    return _replaced(
        *state, dead, wide_rows, wide_counts, decay, epsilon, dialect, steps, normalized
    )


def revive_codes(
    codebook: Tensor,
    ema_count: Tensor,
    ema_means: Tensor,
    latents: Tensor,
    order: Tensor,
    below: float,
    decay: float,
    epsilon: float,
    dialect: Dialect = POST,
    steps: Tensor | int = 0,
    normalized: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """codebook, ema_count and ema_means with every dead code set to a latent of latents (M, D).

    A code is dead if its count is below that share of the mean count; at most M are replaced, and
    get the mean count. order (M,): which latent the first dead code takes, the second, … This is
    ``reset_codes`` of the dead codes, in arrays whose shapes do not depend on how many there are.
    """
    mean = len(latents) / len(codebook)
    share = _share(ema_count, decay, dialect, steps)
    dead = ema_count < below * mean * share
    place = dead.cumsum(0) - 1  # (K,): the first dead code has 0
    dead = dead & (place < len(latents))
    rows = latents[order[place.clamp(0, len(latents) - 1)]]  # (K, D), wanted for dead codes alone
    counts = torch.full_like(ema_count, mean)
    state = codebook, ema_count, ema_means
    return _replaced(*state, dead, rows, counts, decay, epsilon, dialect, steps, normalized)


def _replaced(
    codebook: Tensor,
    ema_count: Tensor,
    ema_means: Tensor,
    dead: Tensor,
    rows: Tensor,
    counts: Tensor,
    decay: float,
    epsilon: float,
    dialect: Dialect,
    steps: Tensor | int,
    normalized: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The state with rows (K, D) and counts (K,) in the places of dead codes (K,)."""
    rows = placed(rows, codebook, normalized)
    share = _share(ema_count, decay, dialect, steps)
    count = torch.where(dead, share * counts, ema_count)
    size = _smoothed(count / _positive(share), epsilon, dialect)
    means = torch.where(dead[:, None], share * rows * size[:, None], ema_means)
    return torch.where(dead[:, None], rows, codebook), count, means


def _positive(share: Tensor | float) -> Tensor | float:
    """The share, or 1 before the first update, when the averages are empty anyway."""
    return torch.where(share > 0, share, 1.0) if isinstance(share, Tensor) else share


class Quantizer(nn.Module):
    """codebook, ema_count and ema_means as buffers: the optimizer never sees them, ``update`` alone
    moves them. steps (): how many updates they have had; not a parameter of the model."""

    codebook: Tensor
    ema_count: Tensor
    ema_means: Tensor
    steps: Tensor

    def __init__(self, spec: ModelSpec, dialect: Dialect = POST) -> None:
        super().__init__()
        self.dialect, self.normalized = dialect, spec.normalized
        shapes = {parameter.name: parameter.shape for parameter in spec.parameters}
        for name in (CODEBOOK, EMA_COUNT, EMA_MEANS):
            self.register_buffer(name.rsplit(".", 1)[1], torch.empty(shapes[name]))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(
        self, latents: Tensor, choose: Callable[[Tensor, Tensor], Tensor] = nearest
    ) -> tuple[Tensor, Tensor]:
        """Indices (N, S), chosen from latents and codebook, and quantized (N, S, D), without
        gradient."""
        with torch.no_grad():
            indices = choose(latents, self.codebook)
            return indices, self.codebook[indices]

    @torch.no_grad()
    def update(self, latents: Tensor, indices: Tensor, decay: float, epsilon: float) -> None:
        """One step of the averages in place, on the latents (N, S, D) and indices (N, S) of the
        training step that was just taken."""
        codebook, count, means = self._state
        how = self.how(decay, epsilon)
        self._set(update_ema(codebook, count, means, latents, indices, *how))
        self.steps += 1

    @torch.no_grad()
    def start(self, rows: Tensor, counts: Tensor, decay: float, epsilon: float) -> None:
        """Every code set to rows (K, D) and counts (K,) in place, as if training had long gone
        on."""
        self.steps.fill_(SETTLED)
        codes = torch.arange(len(rows), device=rows.device)
        codebook, count, means = self._state
        how = self.how(decay, epsilon)
        self._set(reset_codes(codebook, count, means, codes, rows, counts, *how))

    @torch.no_grad()
    def revive(
        self, latents: Tensor, order: Tensor, below: float, decay: float, epsilon: float
    ) -> None:
        """Dead codes set to latents (N, S, D) in place, as ``revive_codes`` does it."""
        rows = latents.reshape(-1, latents.shape[-1])
        codebook, count, means = self._state
        how = self.how(decay, epsilon)
        self._set(revive_codes(codebook, count, means, rows, order, below, *how))

    def how(self, decay: float, epsilon: float) -> tuple[float, float, Dialect, Tensor, bool]:
        """The last arguments of the functions of this module, for this codebook."""
        return decay, epsilon, self.dialect, self.steps, self.normalized

    @property
    def _state(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.codebook, self.ema_count, self.ema_means

    def _set(self, state: tuple[Tensor, Tensor, Tensor]) -> None:
        for buffer, value in zip(self._state, state, strict=True):
            buffer.copy_(value)
