"""The quantizer and its moving averages, in float64.

quantize: index = argmin over k of ||latent - codebook[k]||^2, the lowest index on a tie
(van den Oord et al. 2017, equation 1).
update_ema: the codebook as an exponential moving average of the latents that it is nearest to
(the same, appendix A.1; the post's form, without zero-debias, unless another dialect is named).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vqref.dialects import POST, Dialect
from vqref.spec import CODEBOOK, EMA_COUNT, EMA_MEANS
from vqref.validation import Float64, Int64, Params, as_float64, as_indices

DISTANCE_BYTES = 8 * 2**20
"""Bytes of squared distances held at once. Small enough for a processor's cache; memory stays flat in N."""


SMALLEST_VARIANCE = 1e-12
"""Below this the latents are the codes, and a temperature has no unit."""


@dataclass(frozen=True)
class Quantized:
    """indices (N, S) int64; quantized (N, S, D), rows of the codebook; gap (N, S), the second-best squared distance
    minus the best, infinite where there is one code."""

    indices: Int64
    quantized: Float64
    gap: Float64


def quantize(latents: npt.ArrayLike, codebook: npt.ArrayLike) -> Quantized:
    """Nearest codebook row (K, D) of every latent (N, S, D). Raises ValueError for shapes, dtypes or values that do not fit."""
    codebook = as_float64("codebook", codebook, ("K", "D"))
    if not codebook.size:
        raise ValueError(f"codebook: shape is {codebook.shape}, expected at least one row and one element")
    latents = as_float64("latents", latents, ("N", "S", codebook.shape[1]))
    n, s, d = latents.shape
    indices = np.empty(n * s, np.int64)
    gap = np.full(n * s, np.inf)
    for rows, distances in squared_distances(latents.reshape(-1, d), codebook):
        indices[rows] = distances.argmin(axis=1)  # argmin takes the first of equals
        if len(codebook) > 1:
            best_two = np.partition(distances, 1, axis=1)[:, :2]
            gap[rows] = best_two[:, 1] - best_two[:, 0]
    return Quantized(indices.reshape(n, s), codebook[indices].reshape(n, s, d), gap.reshape(n, s))


def squared_distances(latents: Float64, codebook: Float64) -> Iterator[tuple[slice, Float64]]:
    """||latent - codebook[k]||^2 in the direct form, as (rows, distances (rows, K)) for a few rows of latents (M, D) at a time.

    The array of distances is reused: it holds until the next step. Raises ValueError where a distance overflows.
    """
    step = max(1, DISTANCE_BYTES // (8 * len(codebook)))
    columns = np.ascontiguousarray(codebook.T)  # (D, K)
    total = np.empty((min(step, len(latents)), len(codebook)))
    term = np.empty_like(total)
    for start in range(0, len(latents), step):
        x = latents[start : start + step]
        distances, square = total[: len(x)], term[: len(x)]
        distances[:] = 0.0
        for element, column in zip(x.T, columns, strict=True):
            np.subtract(element[:, None], column, out=square)
            with np.errstate(over="ignore"):  # said below
                np.square(square, out=square)
                distances += square
        if not np.isfinite(distances).all():
            raise ValueError("latents and codebook lie so far apart that their squared distances overflow float64")
        yield slice(start, start + len(x)), distances


@dataclass(frozen=True)
class EMAState:
    """codebook (K, D), ema_count (K,) and ema_means (K, D), validated and held as float64; steps, how many updates they have
    had, for a dialect that is debiased. Raises ValueError."""

    codebook: Float64
    ema_count: Float64
    ema_means: Float64
    steps: int = 0

    def __post_init__(self) -> None:
        codebook = as_float64("codebook", self.codebook, ("K", "D"))
        object.__setattr__(self, "codebook", codebook)
        object.__setattr__(self, "ema_count", as_float64("ema_count", self.ema_count, codebook.shape[:1]))
        object.__setattr__(self, "ema_means", as_float64("ema_means", self.ema_means, codebook.shape))
        if self.ema_count.size and self.ema_count.min() < 0:
            raise ValueError(f"ema_count: the smallest is {self.ema_count.min():g}, expected counts of at least 0")

    @classmethod
    def from_params(cls, params: Params) -> EMAState:
        """The state held by a model's parameters."""
        return cls(params[CODEBOOK], params[EMA_COUNT], params[EMA_MEANS])

    @classmethod
    def start(cls, codebook: npt.ArrayLike, dialect: Dialect = POST, means: npt.ArrayLike | None = None) -> EMAState:
        """The state that a dialect starts from. means (K, D): where its means start from values of their own, those.
        Raises ValueError where they are missing, or given and not wanted."""
        codebook = as_float64("codebook", codebook, ("K", "D"))
        if (means is not None) != (dialect.means == "own"):
            wanted = "needs means of its own" if dialect.means == "own" else f"starts its means from {dialect.means}"
            raise ValueError(f"means: {dialect.name} {wanted}")
        if means is None:
            means = codebook if dialect.means == "codebook" else np.zeros_like(codebook)
        return cls(codebook, np.full(len(codebook), dialect.count), np.asarray(means, np.float64))


def update_ema(
    state: EMAState,
    latents: npt.ArrayLike,
    indices: npt.ArrayLike,
    decay: float = 0.99,
    epsilon: float = 1e-5,
    dialect: Dialect = POST,
) -> EMAState:
    """The state after one step that assigned latents (N, S, D) to indices (N, S). A new state; nothing mutates.

    count    <- decay * count + (1 - decay) * hits
    means    <- decay * means + (1 - decay) * sum of the latents that hit
    codebook <- means / (count + epsilon)

    The last line is the post's; another dialect's is in ``vqref.dialects``.
    Raises ValueError for arrays that do not fit, a decay outside [0, 1], an epsilon that is not positive, or counts from
    which a dialect can make no codebook.
    """
    k, d = state.codebook.shape
    latents = as_float64("latents", latents, ("N", "S", d))
    indices = as_indices(indices, latents.shape[:2], k)
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay is {decay!r}, expected a number from 0 to 1")
    if not 0.0 < epsilon < np.inf:
        raise ValueError(f"epsilon is {epsilon!r}, expected a positive number")
    hits = np.bincount(indices.ravel(), minlength=k)  # (K,)
    sums = np.zeros((k, d))
    np.add.at(sums, indices.ravel(), latents.reshape(-1, d))
    count = decay * state.ema_count + (1 - decay) * hits
    means = decay * state.ema_means + (1 - decay) * sums
    steps = state.steps + 1
    share = 1 - decay**steps if dialect.debiased else 1.0  # of the averages that is data and not their start
    if share == 0.0:
        raise ValueError(f"decay is {decay!r}: {dialect.name} divides by 1 - decay**steps")
    size = _smoothed(count / share, epsilon, dialect)
    codebook = means / share / size[:, None]
    return EMAState(codebook, size if dialect.stores_smoothed else count, means, steps)


def _smoothed(count: Float64, epsilon: float, dialect: Dialect) -> Float64:
    """What the means are divided by, (K,)."""
    if dialect.smoothing == "epsilon":
        return count + epsilon
    total = count.sum()
    if not total > 0:
        raise ValueError(f"ema_count: no code was ever hit, and {dialect.name} divides by shares of the hits")
    return np.asarray((count + epsilon) / (total + len(count) * epsilon) * total)


def draw_indices(latents: npt.ArrayLike, codebook: npt.ArrayLike, gumbel: npt.ArrayLike, temperature: float) -> Int64:
    """Indices (N, S) drawn from softmax over k of -d_k / (2 * temperature * variance), by the Gumbel-max rule.

    d_k is the squared distance of a latent (N, S, D) to codebook row k, variance the mean over all latents of the smallest
    d_k, divided by D. gumbel (N, S, K) is the random choice: -log(-log(u)), u uniform. As the temperature falls to 0 this
    becomes ``quantize`` (after Takida et al. 2022, SQ-VAE, whose variance is learned).
    Raises ValueError for arrays that do not fit or a temperature that is not positive.
    """
    return np.asarray(draw_scores(latents, codebook, gumbel, temperature).argmax(axis=2), np.int64)


def draw_scores(latents: npt.ArrayLike, codebook: npt.ArrayLike, gumbel: npt.ArrayLike, temperature: float) -> Float64:
    """What ``draw_indices`` takes the largest of: gumbel - d / (2 * temperature * variance), (N, S, K)."""
    codebook = as_float64("codebook", codebook, ("K", "D"))
    latents = as_float64("latents", latents, ("N", "S", codebook.shape[1]))
    gumbel = as_float64("gumbel", gumbel, (*latents.shape[:2], len(codebook)))
    if not 0.0 < temperature < np.inf:
        raise ValueError(f"temperature is {temperature!r}, expected a positive number")
    distances = np.empty((latents.shape[0] * latents.shape[1], len(codebook)))
    for rows, part in squared_distances(latents.reshape(-1, latents.shape[2]), codebook):
        distances[rows] = part
    variance = distances.min(axis=1).mean() / latents.shape[2]
    scores: Float64 = gumbel - distances.reshape(gumbel.shape) / (2 * temperature * max(variance, SMALLEST_VARIANCE))
    return scores


def reset_codes(
    state: EMAState, codes: npt.ArrayLike, rows: npt.ArrayLike, counts: npt.ArrayLike, epsilon: float = 1e-5
) -> EMAState:
    """The state in which codes (n,) stand at rows (n, D) as if each had long been hit counts (n,) times a step: codebook,
    count and means together, so that the next update moves nothing by itself. A new state.

    Raises ValueError for arrays that do not fit, a code that is named twice, or counts below 0.
    """
    k, d = state.codebook.shape
    codes = as_indices(codes, ("n",), k)
    rows = as_float64("rows", rows, (len(codes), d))
    counts = as_float64("counts", counts, (len(codes),))
    if len(np.unique(codes)) != len(codes):
        raise ValueError("codes: a code is named twice")
    codebook, count, means = state.codebook.copy(), state.ema_count.copy(), state.ema_means.copy()
    codebook[codes], count[codes] = rows, counts
    means[codes] = rows * (counts + epsilon)[:, None]
    return EMAState(codebook, count, means)
