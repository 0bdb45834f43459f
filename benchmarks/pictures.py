"""Images that compress like pictures, for benchmarks that need some of any size."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FALL = 2.0
"""Amplitudes fall with the frequency to this power. PNG then takes a third of the bytes of 256x256
images, which is less than for most photographs."""

CONTRAST, COLOUR = 0.2, 0.4
"""The standard deviation of grey levels, and the share of it that each channel has to itself."""

AT_ONCE = 2**20
"""Values made at once, so that memory stays flat."""


def fields(count: int, image_shape: tuple[int, int, int], seed: int = 0) -> npt.NDArray[np.uint8]:
    """Smooth random fields (count, C, H, W): noise whose amplitudes fall with frequency, one for
    the brightness and a weaker one for each channel."""
    channels, height, width = image_shape
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    amplitude = np.maximum(frequency, 1 / max(height, width)) ** -FALL
    rng = np.random.default_rng(seed)
    images = np.empty((count, *image_shape), np.uint8)
    step = max(1, AT_ONCE // images[0].size) if count else 1
    for start in range(0, count, step):
        part = images[start : start + step]
        noise = rng.standard_normal((len(part), channels + 1, height, width))
        smooth = np.fft.irfft2(np.fft.rfft2(noise) * amplitude, s=(height, width))
        smooth /= np.sqrt(np.square(smooth).mean(axis=(0, 2, 3), keepdims=True))
        mixed = np.sqrt(1 - COLOUR**2) * smooth[:, :1] + COLOUR * smooth[:, 1:]
        part[:] = np.rint(255 * np.clip(0.5 + CONTRAST * mixed, 0, 1))
    return images
