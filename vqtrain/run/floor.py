"""Clustering floors: what a codebook of the model's size can do without a network.

With one latent, a decoder is a table of num_codes pictures. The best table is the best mixture of
num_codes Bernoulli prototypes with hard assignments and a uniform prior. K-means under the
Bernoulli log-likelihood comes close to it. With a grid of latents, k-means on patches uses as many
tokens per image as the model, one per patch. What a network gains over that, it has learned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vqref.host.images import to_unit_interval
from vqref.spec import ModelSpec
from vqref.validation import Array

Float32 = npt.NDArray[np.float32]

SMOOTHING = 0.5
"""Copies of the mean picture added to each cluster, so that no pixel of a prototype is certain."""

RESTARTS = 4
"""The clustering floor is the best of this many fits."""

MOST_VECTORS, LEAST_VECTORS, PASS_WORK = 100_000, 20_000, 4 * 10**9
"""If there are more vectors, only a sample is clustered and measured. A pass over it takes about
PASS_WORK multiplications, within the first two limits."""

LEAST_PER_CODE = 2
"""The fewest vectors per code in a sample that is clustered."""

MOST_PASSES, LEAST_PASSES, FIT_WORK = 60, 3, 3 * 10**11
"""The passes of a fit take about FIT_WORK multiplications, within the first two limits."""

SETTLED = 1e-4
"""A fit ends when a pass lowers the cost by less than this share."""

BLOCK = 2**22
"""How many costs are held at once (16 MiB)."""


@dataclass(frozen=True)
class Cost:
    """The cost of sending a vector x by a prototype: own(x) + offset - slope.x.

    linear: prototypes (K, D) -> slopes (K, D) and offsets (K,). own: x (n, D) -> (n,).
    smoothing: how many copies of the mean of all vectors each cluster holds besides its own.
    """

    linear: Callable[[Float32], tuple[Float32, Float32]]
    own: Callable[[Float32], Float32]
    smoothing: float


def clustering_floor(
    train: Float32, held_out: Float32, num_codes: int, rng: np.random.Generator
) -> float:
    """Returns the bound on ``held_out``, in nats per image, of prototypes fitted to ``train``.

    The bound is reconstruction + ln num_codes, the best of RESTARTS fits. Both sets are (N, ...) in
    [0, 1], with grey levels as probabilities of white; ``train`` has at least num_codes images.
    """
    x, y = train.reshape(len(train), -1), held_out.reshape(len(held_out), -1)
    x = x[_sample(len(x), num_codes, x.shape[1], LEAST_PER_CODE * num_codes, rng)]
    fits = [_fit(x, num_codes, BERNOULLI, rng) for _ in range(RESTARTS)]
    prototypes, _ = min(fits, key=lambda fit: fit[1])
    _, costs = _nearest(y, prototypes, BERNOULLI)
    return float(costs.mean(dtype=np.float64)) + float(np.log(num_codes))


def patch_floor(
    spec: ModelSpec, train: Array, measured: Array, rng: np.random.Generator
) -> float | None:
    """Returns the mean squared error on ``measured`` of num_codes patches fitted to ``train``.

    K-means fits the patches, each of the size that a token covers; errors are of values in [0, 1].
    Both sets are (N, C, H, W), uint8 or in [0, 1]. Returns None if ``patch_grid`` returns None, or
    if there are fewer patches than codes.
    """
    grid = patch_grid(spec)
    if grid is None or len(train) * grid[0] * grid[1] < spec.num_codes:
        return None
    k = spec.num_codes
    x, y = _patches(train, grid, k, LEAST_PER_CODE * k, rng), _patches(measured, grid, k, 0, rng)
    prototypes, _ = _fit(x, k, SQUARES, rng)
    nearest, _ = _nearest(y, prototypes, SQUARES)
    return float(np.square(y - prototypes[nearest]).mean(dtype=np.float64))


def patch_grid(spec: ModelSpec) -> tuple[int, int] | None:
    """Returns the rows and columns of patches that have one token each.

    Returns None if latents have no place in the image, if a place has several latents, or if
    patches would not be whole.
    """
    grid = (1, 1) if spec.latent_size == 1 else spec.latent_shape[:2]
    _, height, width = spec.image_shape
    if len(grid) < 2 or grid[0] * grid[1] != spec.latent_size:
        return None
    return None if height % grid[0] or width % grid[1] else (grid[0], grid[1])


def _patches(
    images: Array, grid: tuple[int, int], k: int, least: int, rng: np.random.Generator
) -> Float32:
    """Returns patches (n, C*height*width) of images (N, C, H, W).

    If they are too many for k codes, returns a sample of at least ``least``.
    """
    count, channels, height, width = images.shape
    rows, columns = grid
    tall, wide = height // rows, width // columns
    chosen = _sample(count * rows * columns, k, channels * tall * wide, least, rng)
    image, row, column = np.unravel_index(chosen, (count, rows, columns))
    view = images.reshape(count, channels, rows, tall, columns, wide)
    return to_unit_interval(view[image, :, row, :, column, :].reshape(len(chosen), -1))


def _sample(
    count: int, k: int, size: int, least: int, rng: np.random.Generator
) -> npt.NDArray[np.intp]:
    """Returns which of ``count`` vectors of ``size`` elements to compare with k codes."""
    most = max(least, LEAST_VECTORS, min(MOST_VECTORS, PASS_WORK // (k * size)))
    return np.arange(count) if count <= most else rng.choice(count, most, replace=False)


def _fit(x: Float32, k: int, cost: Cost, rng: np.random.Generator) -> tuple[Float32, float]:
    """Fits prototypes (K, D) to x (n, D) by Lloyd's algorithm; returns them and their mean cost.

    Empty clusters restart at vectors drawn by their cost, as in k-means++.
    """
    from scipy.sparse import csr_array

    mean, smoothing = x.mean(axis=0), np.float32(cost.smoothing)

    def soften(rows: Float32) -> Float32:
        return np.asarray((rows + 2 * smoothing * mean) / (1 + 2 * smoothing))

    prototypes = soften(x[rng.choice(len(x), k, replace=False)])
    total = np.inf
    for _ in range(min(MOST_PASSES, max(LEAST_PASSES, FIT_WORK // (x.size * k)))):
        nearest, served = _nearest(x, prototypes, cost)
        former, total = total, float(served.sum(dtype=np.float64))
        if not total or total >= (1 - SETTLED) * former:
            break
        counts = np.bincount(nearest, minlength=k)
        ones = np.ones(len(x), np.float32)
        sums = csr_array((ones, (nearest, np.arange(len(x)))), (k, len(x))) @ x
        filled = np.flatnonzero(counts)
        weights = (counts[filled] + smoothing)[:, None]
        prototypes[filled] = (sums[filled] + smoothing * mean) / weights
        empty = np.flatnonzero(counts == 0)
        drawn = rng.choice(len(x), len(empty), p=served.astype(np.float64) / total)
        prototypes[empty] = soften(x[drawn])
    return prototypes, total / len(x)


def _nearest(x: Float32, prototypes: Float32, cost: Cost) -> tuple[npt.NDArray[np.intp], Float32]:
    """Returns for each of x (n, D) the prototype (K, D) with the least cost, and that cost."""
    nearest, served = np.empty(len(x), np.intp), cost.own(x)
    slopes, offsets = cost.linear(prototypes)
    step = max(1, BLOCK // len(prototypes))
    for start in range(0, len(x), step):
        gains = x[start : start + step] @ slopes.T  # (rows, K)
        gains -= offsets
        nearest[start : start + step] = gains.argmax(axis=1)
        served[start : start + step] -= gains.max(axis=1)
    return nearest, served.clip(min=0)  # rounding may have made it less than 0


def _logits(prototypes: Float32) -> tuple[Float32, Float32]:
    """Slopes and offsets of -log Bernoulli(x; p) = -x * logit(p) - log(1 - p), over all pixels."""
    p = np.clip(prototypes, 1e-6, 1 - 1e-6)
    return np.log(p) - np.log1p(-p), -np.log1p(-p).sum(axis=1)


def _doubled(prototypes: Float32) -> tuple[Float32, Float32]:
    """Slopes and offsets of ||x - c||² = ||x||² - 2 x.c + ||c||²."""
    return 2 * prototypes, np.square(prototypes).sum(axis=1)


BERNOULLI = Cost(_logits, lambda x: np.zeros(len(x), np.float32), SMOOTHING)
SQUARES = Cost(_doubled, lambda x: np.square(x).sum(axis=1), 0.0)
