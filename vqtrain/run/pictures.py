"""Pictures of a run besides those of ``vqref.host.sheets``: maps of tokens, and use of codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vqref.host.sheets import save_pairs
from vqref.spec import ModelSpec
from vqref.validation import Array, Float64, Int64

MOST_RANKS = 200
"""The most codes whose share of tokens is kept. If there are more, some rarer ones are left out."""


def save_tokens(
    path: Path,
    spec: ModelSpec,
    images: Array,
    reconstructions: Array,
    indices: Int64,
    colours: Float64,
) -> None:
    """Draws images (N, C, H, W), their reconstructions, and maps of their indices (N, S).

    Each row is below the one before. A map has one cell per token, in the colour of its code. If a
    place has g tokens, there are g maps.

    path: of the PNG, written whole or not at all. spec: has a latent_shape of (h, w) or (h, w, g).
    colours: (K, 3), from ``vqref.host.colours``.
    """
    height, width, *groups = spec.latent_shape
    cells = colours[indices].reshape(len(images), height, width, *(groups or [1]), 3)
    rows, columns = (
        np.arange(pixels) * cells_across // pixels
        for pixels, cells_across in zip(images.shape[2:], (height, width), strict=True)
    )
    maps = cells[:, rows][:, :, columns].transpose(3, 0, 4, 1, 2)  # (g, N, 3, H, W)
    save_pairs(path, images, reconstructions, *maps)


def use_of_codes(hits: Int64) -> dict[str, Any]:
    """Returns each code's share of all tokens, most used first, as plain data.

    hits (K,): how often each code was chosen, not all 0.
    """
    shares = np.sort(hits[hits > 0] / hits.sum())[::-1]
    perplexity = float(np.exp(-(shares * np.log(shares)).sum()))
    ranks = np.arange(1, len(shares) + 1)
    if len(ranks) > MOST_RANKS:
        ranks = np.unique(np.rint(np.geomspace(1, len(shares), MOST_RANKS)).astype(np.int64))
    return {
        "codes": len(hits),
        "used": len(shares),
        "perplexity": perplexity,
        "ranks": ranks.tolist(),
        "shares": shares[ranks - 1].tolist(),
    }
