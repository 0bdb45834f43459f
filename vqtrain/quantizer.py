"""The quantizer and its moving averages in PyTorch: the twin of ``vqref.quantizer``, without
one-hot matrices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vqref.dialects import POST, Dialect
from vqref.quantizer import SMALLEST_VARIANCE
from vqref.spec import CODEBOOK, EMA_COUNT, EMA_MEANS, ModelSpec
from vqtrain.nearest import at_once, nearest, squared_distances

SETTLED = 1_000_000
"""Steps after which nothing of a debiased average is its start any more."""


def update_ema(
    ema_count: Tensor,
    ema_means: Tensor,
    latents: Tensor,
    indices: Tensor,
    decay: float,
    epsilon: float,
    dialect: Dialect = POST,
    steps: Tensor | int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """codebook (K, D), ema_count (K,) and ema_means (K, D) after latents (N, S, D) hit indices (N,
    S): the rule of ``vqref.update_ema``, ``steps`` updates having gone before.

    """
    hits, sums = assigned(latents, indices, len(ema_count))
    return move_averages(ema_count, ema_means, hits, sums, decay, epsilon, dialect, steps)


def assigned(latents: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """hits (K,), how many of indices (N, S) are each code, and sums (K, D) of its latents (N, S,
    D). Those of several parts of a batch add up to the whole batch's.

    The sums are segment sums: an index_add over N*S rows, not a product with N*S*K.
    """
    index = indices.reshape(-1)
    ones = torch.ones_like(index, dtype=latents.dtype)
    hits = latents.new_zeros(num_codes).index_add_(0, index, ones)
    rows = latents.reshape(-1, latents.shape[-1])
    return hits, latents.new_zeros(num_codes, rows.shape[1]).index_add_(0, index, rows)


def move_averages(
    ema_count: Tensor,
    ema_means: Tensor,
    hits: Tensor,
    sums: Tensor,
    decay: float,
    epsilon: float,
    dialect: Dialect = POST,
    steps: Tensor | int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``update_ema`` gives, from hits (K,) and sums (K, D)."""
    count = decay * ema_count + (1 - decay) * hits
    means = decay * ema_means + (1 - decay) * sums
    share = _share(ema_count, decay, dialect, steps + 1)
    size = _smoothed(count / share, epsilon, dialect)
    codebook = means / share / size[:, None]
    return codebook, size if dialect.stores_smoothed else count, means


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
    latents: Tensor,
    codebook: Tensor,
    gumbel: Tensor | int,
    temperature: Tensor | float,
    variance: Tensor | None = None,
    place: tuple[int, int] | None = None,
) -> Tensor:
    """Indices (N, S) drawn by the rule of ``vqref.draw_indices``, a few latents at a time.

    gumbel: the random choice, (N, S, K), or a seed from which each part of it is made when it is
    needed, so that no array of N*S*K elements is.
    Of a part of a batch, variance (): ``mean_error`` of the whole batch; place: which of how many
    latents of the batch is the first here.
    """
    flat = latents.reshape(-1, latents.shape[-1])
    first, count = place or (0, len(flat))
    if variance is None:
        variance = mean_error(latents, codebook)
    scale = 2 * temperature * variance.clamp(min=SMALLEST_VARIANCE)
    indices = torch.empty(len(flat), dtype=torch.int64, device=flat.device)
    start = 0  # of a part; parts kept apart would scatter the heap, hundreds of MiB
    for distances in squared_distances(flat, codebook, first):
        if isinstance(gumbel, Tensor):
            noise = gumbel.reshape(-1, len(codebook))[start : start + len(distances)]
        else:
            noise = _noise(gumbel, first + start, count, distances, at_once(flat, codebook))
        scores = distances.div_(-scale).add_(noise)
        torch.argmax(scores, dim=-1, out=indices[start : start + len(scores)])
        start += len(scores)
    return indices.reshape(latents.shape[:-1])


def mean_error(latents: Tensor, codebook: Tensor) -> Tensor:
    """The mean squared difference (), per element, of latents (N, S, D) to their nearest codes."""
    flat = latents.reshape(-1, latents.shape[-1])
    best = codebook[nearest(latents, codebook).reshape(-1)]
    found: Tensor = (flat - best).square().sum(dim=-1).mean() / latents.shape[-1]
    return found


def _noise(seed: int, start: int, count: int, like: Tensor, step: int) -> Tensor:
    """The Gumbel noise of latents from ``start`` on, of ``count`` in the batch, shaped like their
    distances (m, K): rows of that of ``step`` latents, which all of the batch are cut into."""
    whole = start - start % step
    rows = min(step, count - whole)
    generator = torch.Generator(like.device).manual_seed(seed + whole)
    noise = like.new_empty(rows, like.shape[1]).exponential_(generator=generator).log_().neg_()
    return noise[start - whole : start - whole + len(like)]


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
) -> tuple[Tensor, Tensor, Tensor]:
    """codebook, ema_count and ema_means with codes (n,) at rows (n, D) and counts (n,): the rule of
    ``vqref.reset_codes``."""
    dead = torch.zeros_like(ema_count, dtype=torch.bool).index_fill(0, codes, True)
    wide_counts = ema_count.index_copy(0, codes, counts)
    wide_rows = codebook.index_copy(0, codes, rows)
    state = codebook, ema_count, ema_means
    return _replaced(*state, dead, wide_rows, wide_counts, decay, epsilon, dialect, steps)


def revive_codes(
    codebook: Tensor,
    ema_count: Tensor,
    ema_means: Tensor,
    rows: Tensor,
    mean: float,
    below: float,
    decay: float,
    epsilon: float,
    dialect: Dialect = POST,
    steps: Tensor | int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """codebook, ema_count and ema_means with every dead code set to one of rows (M, D), the first
    dead code to the first, the second to the second, …, as far as there are some.

    mean: how many latents of a batch there are for each code, the count that they get. A code is
    dead if its own is below that share of it. This is ``reset_codes`` of the dead codes, in arrays
    whose shapes do not depend on how many there are.
    """
    share = _share(ema_count, decay, dialect, steps)
    dead = ema_count < below * mean * share
    place = dead.cumsum(0) - 1  # (K,): the first dead code has 0
    dead = dead & (place < len(rows))
    taken = rows[place.clamp(0, len(rows) - 1)]  # (K, D), wanted for dead codes alone
    counts = torch.full_like(ema_count, mean)
    state = codebook, ema_count, ema_means
    return _replaced(*state, dead, taken, counts, decay, epsilon, dialect, steps)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """The state with rows (K, D) and counts (K,) in the places of dead codes (K,)."""
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
        self.dialect = dialect
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
    def update(self, hits: Tensor, sums: Tensor, decay: float, epsilon: float) -> None:
        """One step of the averages in place, on hits (K,) and sums (K, D) of the latents of the
        training step that was just taken: what ``assigned`` gives."""
        how = decay, epsilon, self.dialect, self.steps
        self._set(move_averages(self.ema_count, self.ema_means, hits, sums, *how))
        self.steps += 1

    @torch.no_grad()
    def start(self, rows: Tensor, counts: Tensor, decay: float, epsilon: float) -> None:
        """Every code set to rows (K, D) and counts (K,) in place, as if training had long gone
        on."""
        self.steps.fill_(SETTLED)
        codes = torch.arange(len(rows), device=rows.device)
        how = decay, epsilon, self.dialect, self.steps
        codebook, count, means = self._state
        self._set(reset_codes(codebook, count, means, codes, rows, counts, *how))

    @torch.no_grad()
    def revive(self, rows: Tensor, mean: float, below: float, decay: float, epsilon: float) -> None:
        """Dead codes set to rows (M, D) in place, as ``revive_codes`` does it."""
        how = decay, epsilon, self.dialect, self.steps
        codebook, count, means = self._state
        self._set(revive_codes(codebook, count, means, rows, mean, below, *how))

    @property
    def _state(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.codebook, self.ema_count, self.ema_means

    def _set(self, state: tuple[Tensor, Tensor, Tensor]) -> None:
        for buffer, value in zip(self._state, state, strict=True):
            buffer.copy_(value)
