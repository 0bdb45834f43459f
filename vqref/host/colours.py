"""Colours of codes, for maps of tokens."""

from __future__ import annotations

import numpy as np

from vqref.validation import Array, Float64

LIGHTNESS, CHROMA = (0.3, 0.95), 0.14
"""The colours of a map of tokens in Oklab: the range of lightness, and the distance from grey."""


def code_colours(codebook: Array, hits: Array) -> Float64:
    """Returns colours (K, 3) in [0, 1] for the codebook's rows (K, D); similar rows look similar.

    The first principal component gives the lightness, the next two give the hue. Each counts by
    rank, so a map has as many colours as codes. Only the codes in use give the components, so codes
    that lie far away do not matter.

    hits: (K,), how often each code was chosen, not all 0.
    """
    used = codebook[hits > 0].astype(np.float64)
    weights = hits[hits > 0] / hits.sum()
    centre = weights @ used
    _, axes = np.linalg.eigh(((used - centre).T * weights) @ (used - centre))
    scores = (codebook - centre) @ axes[:, :-4:-1]  # (K, up to 3)
    scores *= np.where(scores[hits.argmax()] < 0, -1, 1)  # the most used code stays light
    places = np.full((len(codebook), 3), 0.5)
    for i, column in enumerate(scores.T):
        among = np.sort(column[hits > 0])
        places[:, i] = np.searchsorted(among, column) / max(1, len(among) - 1)
    dark, light = LIGHTNESS
    lightness = dark + (light - dark) * places[:, :1].clip(0, 1)
    return _oklab_to_rgb(np.hstack([lightness, CHROMA * (2 * places[:, 1:].clip(0, 1) - 1)]))


def _oklab_to_rgb(colours: Float64) -> Float64:
    """sRGB in [0, 1] of Oklab colours (n, 3) (Ottosson 2020). Clips what no screen can show."""
    to_cones = [
        [1, 0.3963377774, 0.2158037573],
        [1, -0.1055613458, -0.0638541728],
        [1, -0.0894841775, -1.2914855480],
    ]
    to_light = [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
    linear = ((colours @ np.transpose(to_cones)) ** 3 @ np.transpose(to_light)).clip(0, 1)
    curved = 1.055 * linear ** (1 / 2.4) - 0.055
    return np.asarray(np.where(linear <= 0.0031308, 12.92 * linear, curved))
