"""The clustering floor: how well as many fixed pictures as there are codes could do, without a network.

For one latent a decoder is a table of num_codes pictures, so the best table is the best mixture of that many Bernoulli
prototypes with hard assignments and a uniform prior: k-means under the Bernoulli log-likelihood.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

SMOOTHING = 0.5
"""Pseudo-images of the mean picture in each cluster, so that no pixel of a prototype is certain."""

ITERATIONS, RESTARTS = 60, 4


def clustering_floor(
    train: npt.NDArray[np.float32], held_out: npt.NDArray[np.float32], num_codes: int, rng: np.random.Generator
) -> float:
    """Bound in nats an image (reconstruction + ln num_codes) on held_out of prototypes fitted to train.

    Both (N, ...) in [0, 1], grey levels as probabilities. The best of RESTARTS fits on train, by train. ``num_codes`` is at
    most the number of training images.
    """
    x, y = train.reshape(len(train), -1), held_out.reshape(len(held_out), -1)
    fits = [_fit(x, num_codes, rng) for _ in range(RESTARTS)]
    prototypes, _ = min(fits, key=lambda fit: fit[1])
    return float(_costs(y, prototypes).min(axis=1).mean()) + float(np.log(num_codes))


def _fit(x: npt.NDArray[np.float32], k: int, rng: np.random.Generator) -> tuple[npt.NDArray[Any], float]:
    """Prototypes (K, pixels) by Lloyd's alternation, and their mean cost on x. A cluster left empty restarts at the image
    that is served worst."""
    mean = x.mean(axis=0)
    prototypes = 0.5 * x[rng.choice(len(x), k, replace=False)] + 0.5 * mean
    cost = np.inf
    for _ in range(ITERATIONS):
        costs = _costs(x, prototypes)
        nearest, served = costs.argmin(axis=1), costs.min(axis=1)
        if served.mean() >= cost - 1e-6:
            break
        cost = float(served.mean())
        counts = np.bincount(nearest, minlength=k)
        sums = np.stack([x[nearest == code].sum(axis=0) for code in range(k)])
        prototypes = (sums + SMOOTHING * mean) / (counts + SMOOTHING)[:, None]
        empty = np.flatnonzero(counts == 0)
        prototypes[empty] = 0.5 * x[np.argsort(served)[::-1][: len(empty)]] + 0.5 * mean
    return prototypes, cost


def _costs(x: npt.NDArray[np.float32], prototypes: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """-log Bernoulli(x; prototype) summed over pixels, (N, K): one matrix product, in float32."""
    p = np.clip(prototypes, 1e-6, 1 - 1e-6).astype(np.float32)
    logits = np.log(p) - np.log1p(-p)
    return np.asarray(-(x @ logits.T) - np.log1p(-p).sum(axis=1))
