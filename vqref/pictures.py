"""Pictures in and out: folders of images, and sheets of them. Needs Pillow, which nothing else of the oracle does."""

from __future__ import annotations

import hashlib
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vqref.commandline import InputError, MachineError
from vqref.files import write_file
from vqref.images import OFFICIAL_NAMES, ImageSet, load

Array = npt.NDArray[Any]

GAP = 2
"""Pixels between images."""

SHEET_PIXELS = 900
"""About how wide a sheet is; images are enlarged by a whole factor to reach it."""


def load_any(path: Path, resize: tuple[int, int] | None = None) -> ImageSet:
    """Images of whatever a user names: a file, a folder of the official files, or a folder of pictures.

    resize: (H, W) to which pictures of a folder are brought; for other sources an error. Raises what ``vqref.images.load`` and
    ``load_folder`` do.
    """
    if path.is_dir() and not any((path / train).is_file() for train, _ in OFFICIAL_NAMES):
        return load_folder(path, resize)
    if resize:
        raise InputError(f"--resize is for a folder of images; {path} is not one")
    return load(path)


def picture_names(folder: Path) -> list[Path]:
    """The image files of a folder, sorted by name: those that ``load_folder`` reads, in its order."""
    known = _pillow().registered_extensions()
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in known)


def load_folder(folder: Path, resize: tuple[int, int] | None = None) -> ImageSet:
    """Every image file in ``folder``, sorted by name, grey where all are grey, else RGB; (N, C, H, W) uint8.

    Raises InputError for a folder without images, a file that cannot be read, or sizes that differ and no ``resize``,
    MachineError where Pillow is not installed.
    """
    pillow = _pillow()
    paths = picture_names(folder)
    if not paths:
        raise InputError(f"{folder}: the folder holds no image files and no official KMNIST files")
    pictures = []
    for path in paths:
        try:
            with pillow.open(path) as picture:
                pictures.append(picture.convert("L" if picture.mode in ("1", "L", "I;16") else "RGB"))
        except (OSError, pillow.DecompressionBombError) as error:
            raise InputError(f"{path}: not a readable image: {error}") from None
    if resize:
        pictures = [picture.resize((resize[1], resize[0]), pillow.Resampling.LANCZOS) for picture in pictures]
    sizes = {picture.size: path for path, picture in zip(paths, pictures, strict=True)}
    if len(sizes) > 1:
        (a, first), (b, second) = list(sizes.items())[:2]
        raise InputError(f"{second}: {b[0]}x{b[1]} pixels, {first.name} has {a[0]}x{a[1]}; use --resize HxW")
    mode = "RGB" if any(picture.mode == "RGB" for picture in pictures) else "L"
    images = np.stack([np.asarray(picture.convert(mode)) for picture in pictures])
    images = images[:, None] if mode == "L" else images.transpose(0, 3, 1, 2)
    images = np.ascontiguousarray(images)
    return ImageSet(images, None, folder.name, hashlib.sha256(images.tobytes()).hexdigest())


def save_sheet(path: Path, images: Array, columns: int) -> None:
    """Images (N, C, H, W) in [0, 1], C of 1 or 3 (of others the first), in rows of ``columns``, as a PNG."""
    pillow = _pillow()
    if images.shape[1] not in (1, 3):
        images = images[:, :1]
    rows = -(-len(images) // columns)
    _, channels, height, width = images.shape
    sheet = np.full((rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, channels), 0.5)
    for i, image in enumerate(images):
        top, left = GAP + (i // columns) * (height + GAP), GAP + (i % columns) * (width + GAP)
        sheet[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    pixels = np.round(255 * sheet).astype(np.uint8)
    picture = pillow.fromarray(pixels[..., 0] if channels == 1 else pixels)
    factor = max(1, round(SHEET_PIXELS / picture.width))
    buffer = io.BytesIO()
    picture.resize((picture.width * factor, picture.height * factor), pillow.Resampling.NEAREST).save(buffer, "png")
    write_file(path, buffer.getvalue())


def save_pairs(path: Path, images: Array, reconstructions: Array, columns: int = 16) -> None:
    """Rows of images, each above the row of their reconstructions."""
    rows = [part[i : i + columns] for i in range(0, len(images), columns) for part in (images, reconstructions)]
    save_sheet(path, np.concatenate(rows), min(columns, len(images)))


def save_square(path: Path, images: Array) -> None:
    """A sheet about as high as wide."""
    save_sheet(path, images, math.ceil(math.sqrt(len(images))))


def _pillow() -> Any:
    """Pillow's Image module. Raises MachineError where it is not installed."""
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise MachineError("pictures need Pillow: pip install pillow") from None
    return Image
