"""The quantizer and its averages: ``vqref.quantizer`` in PyTorch, without one-hot matrices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vqref.dialects import POST, Dialect
from vqref.network import LEAST_LENGTH
from vqref.quantizer import SMALLEST_VARIANCE
from vqref.spec import CODEBOOK, EMA_COUNT, EMA_MEANS, ModelSpec
from vqtrain.nearest import at_once, nearest, squared_distances

SETTLED = 1_000_000
"""After this many steps, a debiased average no longer depends on its start."""


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
    """Returns codebook (K, D), ema_count (K,) and ema_means (K, D) after one update.

    Latents (N, S, D) have indices (N, S). The rule is that of ``vqref.update_ema``; ``steps`` is
    the number of earlier updates.
    """
    hits, sums = assigned(latents, indices, len(ema_count))
    how = decay, epsilon, dialect, steps, normalized
    return move_averages(codebook, ema_count, ema_means, hits, sums, *how)


def assigned(latents: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Returns each code's hits (K,) among indices (N, S), and the sums (K, D) of its latents.

    Latents are (N, S, D). Results for parts of a batch add up to those of the whole batch. Uses
    ``index_add`` over N*S rows, not a product with N*S*K elements.
    """
    index = indices.reshape(-1)
    ones = torch.ones_like(index, dtype=latents.dtype)
    hits = latents.new_zeros(num_codes).index_add_(0, index, ones)
    rows = latents.reshape(-1, latents.shape[-1])
    return hits, latents.new_zeros(num_codes, rows.shape[1]).index_add_(0, index, rows)


def move_averages(
    codebook: Tensor,
    ema_count: Tensor,
    ema_means: Tensor,
    hits: Tensor,
    sums: Tensor,
    decay: float,
    epsilon: float,
    dialect: Dialect = POST,
    steps: Tensor | int = 0,
    normalized: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what ``update_ema`` returns, from hits (K,) and sums (K, D)."""
    count = decay * ema_count + (1 - decay) * hits
    means = decay * ema_means + (1 - decay) * sums
    share = _share(ema_count, decay, dialect, steps + 1)
    size = _smoothed(count / share, epsilon, dialect)
    rows = placed(means / share / size[:, None], codebook, normalized)
    return rows, size if dialect.stores_smoothed else count, means


def placed(rows: Tensor, codes: Tensor, normalized: bool) -> Tensor:
    """Returns the new places of codes (n, D) that move to rows (n, D), as ``EMAState.placed``."""
    if not normalized:
        return rows
    length = rows.norm(dim=1, keepdim=True)
    return torch.where(length < LEAST_LENGTH, codes, rows / length.clamp(min=LEAST_LENGTH))


def _share(like: Tensor, decay: float, dialect: Dialect, steps: Tensor | int) -> Tensor | float:
    """Returns the share of the averages that is data, not start; float64, since terms cancel."""
    if not dialect.debiased:
        return 1.0
    exponent = torch.as_tensor(steps, device=like.device).double()
    return (1 - decay**exponent).to(like.dtype)


def _smoothed(count: Tensor, epsilon: float, dialect: Dialect) -> Tensor:
    """Returns the divisors of the means, (K,)."""
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
    """Draws indices (N, S) by the rule of ``vqref.draw_indices``, a few latents at a time.

    gumbel: the noise (N, S, K), or a seed. From a seed, each part of the noise is made when needed,
    so no array of N*S*K elements exists.
    variance, place: for a part of a batch. variance () is ``mean_error`` of the whole batch; place
    is the position of the part's first latent, and the number of latents in the batch.
    """
    flat = latents.reshape(-1, latents.shape[-1])
    first, count = place or (0, len(flat))
    if variance is None:
        variance = mean_error(latents, codebook)
    scale = 2 * temperature * variance.clamp(min=SMALLEST_VARIANCE)
    indices = torch.empty(len(flat), dtype=torch.int64, device=flat.device)
    start = 0  # of a part; separate results would fragment the heap by hundreds of MiB
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
    """Returns the mean squared difference () per element of latents (N, S, D) and nearest codes."""
    flat = latents.reshape(-1, latents.shape[-1])
    best = codebook[nearest(latents, codebook).reshape(-1)]
    found: Tensor = (flat - best).square().sum(dim=-1).mean() / latents.shape[-1]
    return found


def _noise(seed: int, start: int, count: int, like: Tensor, step: int) -> Tensor:
    """Returns Gumbel noise for latents from ``start`` on, shaped like their distances (m, K).

    The batch has ``count`` latents, cut into pieces of ``step``. Each piece of noise has a seed of
    its own.
    """
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
    normalized: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns codebook, ema_count and ema_means with codes (n,) reset to rows (n, D).

    Their counts become counts (n,). The rule is that of ``vqref.reset_codes``.
    """
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
    rows: Tensor,
    mean: float,
    below: float,
    decay: float,
    epsilon: float,
    dialect: Dialect = POST,
    steps: Tensor | int = 0,
    normalized: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns codebook, ema_count and ema_means with dead codes set to rows (M, D), in order.

    The first dead code takes the first row, and so on, while there are rows. Does what
    ``reset_codes`` does, in arrays whose shapes do not depend on the number of dead codes.

    mean: latents of a batch per code; a reset code gets this count. below: a code is dead if its
    count is below this share of ``mean``.
    """
    share = _share(ema_count, decay, dialect, steps)
    dead = ema_count < below * mean * share
    place = dead.cumsum(0) - 1  # (K,): the first dead code has 0
    dead = dead & (place < len(rows))
    taken = rows[place.clamp(0, len(rows) - 1)]  # (K, D), used for dead codes only
    counts = torch.full_like(ema_count, mean)
    state = codebook, ema_count, ema_means
    return _replaced(*state, dead, taken, counts, decay, epsilon, dialect, steps, normalized)


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
    """Returns the state with rows (K, D) and counts (K,) in place of dead codes (K,)."""
    rows = placed(rows, codebook, normalized)
    share = _share(ema_count, decay, dialect, steps)
    count = torch.where(dead, share * counts, ema_count)
    size = _smoothed(count / _positive(share), epsilon, dialect)
    means = torch.where(dead[:, None], share * rows * size[:, None], ema_means)
    return torch.where(dead[:, None], rows, codebook), count, means


def _positive(share: Tensor | float) -> Tensor | float:
    """Returns the share, or 1 before the first update, when the averages are empty."""
    return torch.where(share > 0, share, 1.0) if isinstance(share, Tensor) else share


class Quantizer(nn.Module):
    """Holds codebook, ema_count and ema_means as buffers, which only its own methods change.

    The optimizer never sees them. steps (): how often they were updated; not a parameter of the
    model.
    """

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
        """Returns the indices (N, S) that ``choose`` gives, and quantized (N, S, D).

        Both have no gradient.
        """
        with torch.no_grad():
            indices = choose(latents, self.codebook)
            return indices, self.codebook[indices]

    @torch.no_grad()
    def update(self, hits: Tensor, sums: Tensor, decay: float, epsilon: float) -> None:
        """Moves the averages one step in place.

        hits (K,) and sums (K, D): what ``assigned`` returns for the latents of this training step.
        """
        _, count, means = self._state
        self._set(move_averages(self.codebook, count, means, hits, sums, *self.how(decay, epsilon)))
        self.steps += 1

    @torch.no_grad()
    def start(self, rows: Tensor, counts: Tensor, decay: float, epsilon: float) -> None:
        """Sets all codes to rows (K, D) and counts (K,) in place, as if after long training."""
        self.steps.fill_(SETTLED)
        codes = torch.arange(len(rows), device=rows.device)
        codebook, count, means = self._state
        how = self.how(decay, epsilon)
        self._set(reset_codes(codebook, count, means, codes, rows, counts, *how))

    @torch.no_grad()
    def revive(self, rows: Tensor, mean: float, below: float, decay: float, epsilon: float) -> None:
        """Sets dead codes to rows (M, D) in place, as ``revive_codes`` does."""
        codebook, count, means = self._state
        how = self.how(decay, epsilon)
        self._set(revive_codes(codebook, count, means, rows, mean, below, *how))

    def how(self, decay: float, epsilon: float) -> tuple[float, float, Dialect, Tensor, bool]:
        """Returns the last arguments of this module's functions, for this codebook."""
        return decay, epsilon, self.dialect, self.steps, self.normalized

    @property
    def _state(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.codebook, self.ema_count, self.ema_means

    def _set(self, state: tuple[Tensor, Tensor, Tensor]) -> None:
        for buffer, value in zip(self._state, state, strict=True):
            buffer.copy_(value)
