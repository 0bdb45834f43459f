"""The quantizer and its moving averages, in float64.

quantize: index = argmin over k of ||latent - codebook[k]||^2, the lowest index on a tie
(van den Oord et al. 2017, equation 1).
update_ema: makes each code an exponential moving average of the latents nearest to it (the same
paper, appendix A.1). The default dialect is the post's, without zero-debias.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vqref.dialects import POST, Dialect
from vqref.network import LEAST_LENGTH
from vqref.spec import CODEBOOK, EMA_COUNT, EMA_MEANS
from vqref.validation import Array, Float64, Int64, Params, as_float64, as_indices

DISTANCE_BYTES = 8 * 2**20
"""The most bytes of squared distances held at once.

They fit a processor's cache, and memory use does not grow with N."""

SMALLEST_VARIANCE = 1e-12
"""The smallest mean squared distance that ``draw_indices`` uses as the unit of temperature.

Below it, the latents are the codes."""


@dataclass(frozen=True)
class Quantized:
    """The result of ``quantize``.

    indices: (N, S) int64. quantized: (N, S, D) float64, rows of the codebook.
    gap: (N, S) float64, the second-smallest squared distance minus the smallest. It is infinite if
        there is only one code.
    """

    indices: Int64
    quantized: Float64
    gap: Float64


def quantize(latents: npt.ArrayLike, codebook: npt.ArrayLike) -> Quantized:
    """Finds the codebook row (K, D) nearest to each latent (N, S, D).

    Raises ValueError for shapes, dtypes or values that do not fit.
    """
    codebook = as_float64("codebook", codebook, ("K", "D"))
    if not codebook.size:
        raise ValueError(
            f"codebook: shape is {codebook.shape}, expected at least one row and one element"
        )
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
    """Yields ||latent - codebook[k]||^2 in the direct form, for a few latents (M, D) at a time.

    Each item is (rows, distances (rows, K)). The next step overwrites the array of distances.
    Raises ValueError if a distance overflows.
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
            with np.errstate(over="ignore"):  # refused below
                np.square(square, out=square)
                distances += square
        if not np.isfinite(distances).all():
            raise ValueError(
                "latents and codebook lie so far apart that "
                "their squared distances overflow float64"
            )
        yield slice(start, start + len(x)), distances


@dataclass(frozen=True)
class EMAState:
    """The codebook and its averages, validated and held as float64.

    codebook, ema_means: (K, D). ema_count: (K,), at least 0.
    steps: the number of updates so far, which a debiased dialect needs.
    normalized: whether codes are unit vectors, as in ``ModelSpec``. Every code that moves is then
        put back on the sphere. count and means are updated as for other codebooks.

    Raises ValueError for arrays that do not fit each other.
    """

    codebook: Float64
    ema_count: Float64
    ema_means: Float64
    steps: int = 0
    normalized: bool = False

    def __post_init__(self) -> None:
        codebook = as_float64("codebook", self.codebook, ("K", "D"))
        object.__setattr__(self, "codebook", codebook)
        for name, shape in (("ema_count", codebook.shape[:1]), ("ema_means", codebook.shape)):
            object.__setattr__(self, name, as_float64(name, getattr(self, name), shape))
        if self.ema_count.size and self.ema_count.min() < 0:
            found = f"the smallest is {self.ema_count.min():g}"
            raise ValueError(f"ema_count: {found}, expected counts of at least 0")

    @classmethod
    def from_params(cls, params: Params, steps: int = 0, *, normalized: bool = False) -> EMAState:
        """Returns the state that a model's parameters hold after ``steps`` updates."""
        return cls(params[CODEBOOK], params[EMA_COUNT], params[EMA_MEANS], steps, normalized)

    @classmethod
    def start(
        cls,
        codebook: npt.ArrayLike,
        dialect: Dialect = POST,
        means: npt.ArrayLike | None = None,
        *,
        normalized: bool = False,
    ) -> EMAState:
        """Returns the state from which a dialect starts.

        means: (K, D), for a dialect whose means start from values of their own.
        Raises ValueError if they are missing, or if a dialect that does not use them gets them.
        """
        codebook = as_float64("codebook", codebook, ("K", "D"))
        if (means is not None) != (dialect.means == "own"):
            wanted = (
                "needs means of its own"
                if dialect.means == "own"
                else f"starts its means from {dialect.means}"
            )
            raise ValueError(f"means: {dialect.name} {wanted}")
        if means is None:
            means = codebook if dialect.means == "codebook" else np.zeros_like(codebook)
        count = np.full(len(codebook), dialect.count)
        return cls(codebook, count, np.asarray(means, np.float64), normalized=normalized)

    def placed(self, rows: Float64, codes: Float64) -> Float64:
        """Returns the new places of codes (n, D) that move to rows (n, D).

        Unit codes move to the rows divided by their lengths. Rows shorter than LEAST_LENGTH have no
        direction, so their codes stay.
        """
        if not self.normalized:
            return rows
        length = np.sqrt(np.square(rows).sum(axis=1, keepdims=True))
        return np.where(length < LEAST_LENGTH, codes, rows / np.maximum(length, LEAST_LENGTH))


def grid(levels: Sequence[int]) -> Float64:
    """Returns the codebook (K, D) of finite scalar quantization (Mentzer et al. 2023).

    Write k in a number system whose d-th digit takes levels[d] values and whose first digit changes
    fastest. Element d of row k is (n - h) / h, where n is the d-th digit of k and
    h = levels[d] // 2.
    """
    digits = np.unravel_index(np.arange(math.prod(levels)), tuple(levels), order="F")
    halves = np.array(levels) // 2
    return np.asarray((np.stack(digits, axis=1) - halves) / halves, np.float64)


def averaged(params: Params) -> dict[str, Array]:
    """Returns the parameters, with averages in which each code counts once.

    Averages that are already there stay.
    """
    codebook = params[CODEBOOK]
    return {EMA_COUNT: np.ones(len(codebook), np.float32), EMA_MEANS: codebook, **params}


def update_ema(
    state: EMAState,
    latents: npt.ArrayLike,
    indices: npt.ArrayLike,
    decay: float = 0.99,
    epsilon: float = 1e-5,
    dialect: Dialect = POST,
) -> EMAState:
    """Returns the state after one step that assigned latents (N, S, D) to indices (N, S).

    It is a new state; nothing changes in place.

    count    <- decay * count + (1 - decay) * hits
    means    <- decay * means + (1 - decay) * sum of the latents that hit
    codebook <- means / (count + epsilon)

    The last line is the post's; ``vqref.dialects`` gives those of other dialects. Unit codes are
    put back on the sphere, row by row: codebook <- codebook / ||codebook||. Rows without a
    direction are skipped, and their codes stay.

    Raises ValueError for arrays that do not fit, a decay outside [0, 1], an epsilon that is not
    positive, or counts from which a dialect cannot make a codebook.
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
    share = _share(decay, steps, dialect)
    if share == 0.0:
        raise ValueError(f"decay is {decay!r}: {dialect.name} divides by 1 - decay**steps")
    size = _smoothed(count / share, epsilon, dialect)
    codebook = state.placed(means / share / size[:, None], state.codebook)
    count = size if dialect.stores_smoothed else count
    return EMAState(codebook, count, means, steps, state.normalized)


def _share(decay: float, steps: int, dialect: Dialect) -> float:
    """Returns the share of the averages that is data. The rest is their initial values."""
    return 1 - decay**steps if dialect.debiased else 1.0


def _smoothed(count: Float64, epsilon: float, dialect: Dialect) -> Float64:
    """Returns the counts (K,) that the means are divided by."""
    if dialect.smoothing == "epsilon":
        return count + epsilon
    total = count.sum()
    if not total > 0:
        raise ValueError(
            f"ema_count: no code was ever hit, and {dialect.name} divides by shares of the hits"
        )
    return np.asarray((count + epsilon) / (total + len(count) * epsilon) * total)


def draw_indices(
    latents: npt.ArrayLike, codebook: npt.ArrayLike, gumbel: npt.ArrayLike, temperature: float
) -> Int64:
    """Draws indices (N, S) at random, nearer codes more often, by the Gumbel-max rule.

    The distribution is softmax over k of -d_k / (2 * temperature * variance). d_k is the squared
    distance of a latent (N, S, D) to codebook row k. variance is the mean over all latents of the
    smallest d_k, divided by D. gumbel (N, S, K) is the noise: -log(-log(u)) of uniform u. As the
    temperature falls to 0, this becomes ``quantize``. It follows Takida et al. 2022, SQ-VAE, where
    the variance is learned.

    Raises ValueError for arrays that do not fit or a temperature that is not positive.
    """
    return np.asarray(draw_scores(latents, codebook, gumbel, temperature).argmax(axis=2), np.int64)


def draw_scores(
    latents: npt.ArrayLike, codebook: npt.ArrayLike, gumbel: npt.ArrayLike, temperature: float
) -> Float64:
    """Returns the scores (N, S, K) whose largest ``draw_indices`` takes.

    They are gumbel - d / (2 * temperature * variance).
    """
    codebook = as_float64("codebook", codebook, ("K", "D"))
    latents = as_float64("latents", latents, ("N", "S", codebook.shape[1]))
    gumbel = as_float64("gumbel", gumbel, (*latents.shape[:2], len(codebook)))
    if not 0.0 < temperature < np.inf:
        raise ValueError(f"temperature is {temperature!r}, expected a positive number")
    distances = np.empty((latents.shape[0] * latents.shape[1], len(codebook)))
    for rows, part in squared_distances(latents.reshape(-1, latents.shape[2]), codebook):
        distances[rows] = part
    variance = distances.min(axis=1).mean() / latents.shape[2]
    scores: Float64 = gumbel - distances.reshape(gumbel.shape) / (
        2 * temperature * max(variance, SMALLEST_VARIANCE)
    )
    return scores


def reset_codes(
    state: EMAState,
    codes: npt.ArrayLike,
    rows: npt.ArrayLike,
    counts: npt.ArrayLike,
    decay: float = 0.99,
    epsilon: float = 1e-5,
    dialect: Dialect = POST,
) -> EMAState:
    """Returns a new state with codes (n,) moved to rows (n, D).

    Codebook, count and means change together, as if each code had long been hit counts (n,) times
    per step. Rows of unit codes are put on the sphere first.

    decay, epsilon, dialect: as in ``update_ema``.
    Raises ValueError for arrays that do not fit, a code named twice, or counts below 0.
    """
    k, d = state.codebook.shape
    codes = as_indices(codes, ("n",), k)
    rows = state.placed(as_float64("rows", rows, (len(codes), d)), state.codebook[codes])
    counts = as_float64("counts", counts, (len(codes),))
    if len(np.unique(codes)) != len(codes):
        raise ValueError("codes: a code is named twice")
    share = _share(decay, state.steps, dialect)
    codebook, count, means = state.codebook.copy(), state.ema_count.copy(), state.ema_means.copy()
    codebook[codes], count[codes] = rows, share * counts
    size = _smoothed(count / share, epsilon, dialect) if share else count
    means[codes] = share * rows * size[codes, None]
    return EMAState(codebook, count, means, state.steps, state.normalized)
