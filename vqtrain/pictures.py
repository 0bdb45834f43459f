"""Pictures of a run: what one looks at after every epoch."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vqref.files import write_file

Array = npt.NDArray[Any]

GAP = 2
"""Pixels between images."""

SHEET_PIXELS = 900
"""About how wide a sheet is; images are enlarged by a whole factor to reach it."""


def save_sheet(path: Path, images: Array, columns: int) -> None:
    """Images (N, C, H, W) in [0, 1], C of 1 or 3 (of others the first), in rows of ``columns``, as a PNG."""
    from PIL import Image

    if images.shape[1] not in (1, 3):
        images = images[:, :1]
    rows = -(-len(images) // columns)
    _, channels, height, width = images.shape
    sheet = np.full((rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, channels), 0.5)
    for i, image in enumerate(images):
        top, left = GAP + (i // columns) * (height + GAP), GAP + (i % columns) * (width + GAP)
        sheet[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    pixels = np.round(255 * sheet).astype(np.uint8)
    picture = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    factor = max(1, round(SHEET_PIXELS / picture.width))
    buffer = io.BytesIO()
    picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST).save(buffer, "png")
    write_file(path, buffer.getvalue())


def save_pairs(path: Path, images: Array, reconstructions: Array, columns: int = 16) -> None:
    """Rows of images, each above the row of their reconstructions."""
    rows = [part[i : i + columns] for i in range(0, len(images), columns) for part in (images, reconstructions)]
    save_sheet(path, np.concatenate(rows), min(columns, len(images)))


def save_square(path: Path, images: Array) -> None:
    """A sheet about as high as wide."""
    save_sheet(path, images, math.ceil(math.sqrt(len(images))))


def save_curves(path: Path, history: Sequence[Mapping[str, Any]], num_codes: int) -> None:
    """Bound and perplexity over the epochs, training and held-out."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it remarks on its font cache at the first start
    from matplotlib.figure import Figure

    epochs = [line["epoch"] for line in history]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, key, title in ((left, "bound", "bound, nats an image"), (right, "perplexity", f"perplexity, of {num_codes}")):
        axes.plot(epochs, [line[key] for line in history], marker=".", label="training")
        held_out = [line["held_out"][key] for line in history if "held_out" in line]
        if len(held_out) == len(epochs):
            axes.plot(epochs, held_out, marker=".", label="held out")
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    right.set_ylim(0, num_codes)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    write_file(path, buffer.getvalue())
