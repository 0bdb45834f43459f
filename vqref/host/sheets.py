"""Draws sheets of images as PNG."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np

from vqref.errors import InputError
from vqref.host.files import write_file
from vqref.host.pillow import pillow
from vqref.preprocessing import CHANNELS
from vqref.validation import Array

GAP = 2
"""Pixels between images."""

SHEET_PIXELS, MOST_COLUMNS = 900, 16
"""About how wide a sheet is, and the most images in a row of pairs.

Images are enlarged by a whole factor to reach this width."""

BACKGROUND = 0.5
"""The grey level between images."""


def save_sheet(path: Path, images: Array, columns: int) -> None:
    """Writes images (N, C, H, W) in [0, 1] as a PNG with ``columns`` images per row.

    Four channels are shown without the last, which is alpha. Of two channels, or of more than four,
    only the first is shown.
    """
    image = pillow()
    rows = math.ceil(len(images) / columns)
    pixels = _visible(images).transpose(0, 2, 3, 1)  # (N, H, W, 1 or 3)
    _, height, width, channels = pixels.shape
    sheet = np.full(
        (rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, channels), BACKGROUND
    )
    for i, one in enumerate(pixels):
        top, left = GAP + (i // columns) * (height + GAP), GAP + (i % columns) * (width + GAP)
        sheet[top : top + height, left : left + width] = one
    levels = np.round(255 * sheet).astype(np.uint8)
    picture = image.fromarray(levels[..., 0] if channels == 1 else levels)
    factor = max(1, round(SHEET_PIXELS / picture.width))
    size = (picture.width * factor, picture.height * factor)
    buffer = io.BytesIO()
    picture.resize(size, image.Resampling.NEAREST).save(buffer, "png")
    write_file(path, buffer.getvalue())


def save_pairs(path: Path, images: Array, *others: Array) -> None:
    """Writes rows of images (N, C, H, W), with rows of their reconstructions beneath.

    others: what to show beneath each image, each (N, 1 or C or 3, H, W).

    A row has at most MOST_COLUMNS images, fewer if they are large.
    """
    parts = [_visible(part) for part in (images, *others)]
    columns = max(1, min(MOST_COLUMNS, len(images), SHEET_PIXELS // (images.shape[3] + GAP)))
    rows = math.ceil(len(images) / columns)
    channels = max(part.shape[1] for part in parts)
    cells = np.full((rows, len(parts), columns, channels, *images.shape[2:]), BACKGROUND)
    for i, part in enumerate(parts):
        for row in range(rows):
            shown = part[row * columns : (row + 1) * columns]
            cells[row, i, : len(shown)] = shown  # grey is repeated in all channels
    save_sheet(path, cells.reshape(-1, *cells.shape[3:]), columns)


def save_square(path: Path, images: Array) -> None:
    """Writes images (N, C, H, W) as a sheet about as high as wide."""
    save_sheet(path, images, math.ceil(math.sqrt(len(images))))


def as_png(image: Array) -> bytes:
    """Returns a PNG of one image (C, H, W), uint8: grey, colour, or colour with alpha.

    Raises InputError for another number of channels.
    """
    if image.shape[0] not in CHANNELS:
        raise InputError(f"images have {image.shape[0]} channels, expected 1, 3 or 4 for a PNG")
    buffer = io.BytesIO()
    levels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
    pillow().fromarray(levels).save(buffer, "png")
    return buffer.getvalue()


def _visible(images: Array) -> Array:
    """The one or three channels of images (N, C, H, W) that are shown."""
    channels = images.shape[1]
    return images[:, : 3 if channels in (3, 4) else 1]
