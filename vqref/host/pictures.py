"""Pictures in and out: folders of images, and sheets of them as PNG. The one home of Pillow."""

from __future__ import annotations

import ctypes
import hashlib
import io
import logging
import math
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from vqref.errors import InputError, MachineError
from vqref.host.files import about, is_folder, parsed, read_bytes, write_file
from vqref.host.images import LARGEST_ARRAY, OFFICIAL_NAMES, ImageSet, load
from vqref.host.streams import plain
from vqref.validation import Array

GAP = 2
"""Pixels between images."""

SHEET_PIXELS, MOST_COLUMNS = 900, 16
"""About how wide a sheet is: images are enlarged by a whole factor to reach it. How many a row of
pairs has at most."""

FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
"""What pictures are read, by Pillow's names. It knows others that start programs, or that nobody
keeps images in."""

LARGEST_PICTURE = 2**30
"""The most bytes that the file of a picture may have."""

BACKGROUND = 0.5
"""The grey level between images."""


def load_any(path: Path, resize: tuple[int, int] | None = None) -> ImageSet:
    """The images of a file, of a folder of the official files, or of a folder of pictures.

    resize: (H, W) to which the pictures of a folder are brought. Raises InputError if ``resize`` is
    given for another source, and what ``vqref.host.images.load`` and ``load_folder`` raise.
    """
    if is_folder(path) and not any((path / train).is_file() for train, _ in OFFICIAL_NAMES):
        return load_folder(path, resize)
    if resize:
        raise InputError(f"--resize is for a folder of images; {path} is not one")
    return load(path)


def picture_names(folder: Path) -> list[Path]:
    """The image files of a folder, sorted by name: what ``load_folder`` reads, in its order.

    Raises InputError for a folder that cannot be listed.
    """
    known = _pillow().registered_extensions()
    try:
        return sorted(p for p in folder.iterdir() if known.get(p.suffix.lower()) in FORMATS)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}") from None


def load_folder(folder: Path, resize: tuple[int, int] | None = None) -> ImageSet:
    """The images of ``folder``, sorted by name, (N, C, H, W) uint8: grey if all are, else RGB.

    Raises InputError if there are no images, if a file cannot be read, if sizes differ and there is
    no ``resize``, or if they are too many to be held in memory; MachineError if Pillow is not
    installed.
    """
    paths = picture_names(folder)
    if not paths:
        raise InputError(f"{folder}: the folder holds no image files and no official KMNIST files")
    if resize and len(paths) * resize[0] * resize[1] > LARGEST_ARRAY:
        raise InputError(f"{folder}: {len(paths)} images of {resize[0]}x{resize[1]} are too many")
    pictures: list[Any] = []
    room = LARGEST_ARRAY
    for path in paths:
        picture = _read_picture(path, resize)
        if pictures and picture.size != pictures[0].size:
            a, b = pictures[0].size, picture.size
            raise InputError(
                f"{path}: {b[0]}x{b[1]} pixels, {paths[0].name} has {a[0]}x{a[1]}; use --resize HxW"
            )
        pictures.append(picture)
        room -= picture.width * picture.height * len(picture.getbands())
        if room < 0:
            raise InputError(f"{folder}: more than {LARGEST_ARRAY / 2**30:.0f} GiB of images")
    mode = "RGB" if any(picture.mode == "RGB" for picture in pictures) else "L"
    images = np.stack([np.asarray(picture.convert(mode)) for picture in pictures])
    images = images[:, None] if mode == "L" else images.transpose(0, 3, 1, 2)
    images = np.ascontiguousarray(images)
    digest = hashlib.sha256(images.tobytes()).hexdigest()
    return ImageSet(images, None, plain(folder.name), digest)


def _read_picture(path: Path, resize: tuple[int, int] | None) -> Any:
    """The picture in a file, grey or RGB, resized to (H, W). Raises InputError that names the
    file."""
    pillow = _pillow()
    content = read_bytes(path, LARGEST_PICTURE)
    with about(path), parsed("not a readable image"):
        warnings.simplefilter("error", pillow.DecompressionBombWarning)
        with pillow.open(io.BytesIO(content), formats=FORMATS) as picture:
            found = picture.convert("L" if picture.mode in ("1", "L", "I;16") else "RGB")
        if resize:
            found = found.resize((resize[1], resize[0]), pillow.Resampling.LANCZOS)
        return found


def save_sheet(path: Path, images: Array, columns: int) -> None:
    """Writes images (N, C, H, W) in [0, 1] in rows of ``columns`` as a PNG.

    Four channels are shown without the last, their alpha; two, or more than four, by the first.
    """
    pillow = _pillow()
    rows = math.ceil(len(images) / columns)
    pixels = _visible(images).transpose(0, 2, 3, 1)  # (N, H, W, 1 or 3)
    _, height, width, channels = pixels.shape
    sheet = np.full(
        (rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, channels), BACKGROUND
    )
    for i, image in enumerate(pixels):
        top, left = GAP + (i // columns) * (height + GAP), GAP + (i % columns) * (width + GAP)
        sheet[top : top + height, left : left + width] = image
    levels = np.round(255 * sheet).astype(np.uint8)
    picture = pillow.fromarray(levels[..., 0] if channels == 1 else levels)
    factor = max(1, round(SHEET_PIXELS / picture.width))
    size = (picture.width * factor, picture.height * factor)
    buffer = io.BytesIO()
    picture.resize(size, pillow.Resampling.NEAREST).save(buffer, "png")
    write_file(path, buffer.getvalue())


def save_pairs(path: Path, images: Array, *others: Array) -> None:
    """Writes rows of images (N, C, H, W) with their reconstructions beneath them, and beneath those
    whatever else is to be seen of each image: ``others``, each (N, 1 or C or 3, H, W).

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
            cells[row, i, : len(shown)] = shown  # grey beside colour is spread over its channels
    save_sheet(path, cells.reshape(-1, *cells.shape[3:]), columns)


def save_square(path: Path, images: Array) -> None:
    """Writes a sheet of images (N, C, H, W) that is about as high as wide."""
    save_sheet(path, images, math.ceil(math.sqrt(len(images))))


def _visible(images: Array) -> Array:
    """The one or three channels of images (N, C, H, W) that a PNG can show."""
    channels = images.shape[1]
    return images[:, : 3 if channels in (3, 4) else 1]


@cache
def _pillow() -> Any:
    """Pillow's Image module, whose remarks on damaged pictures go nowhere. Raises MachineError if
    it is not installed."""
    try:
        from PIL import Image, _imaging
    except ModuleNotFoundError:
        raise MachineError("pictures need Pillow: pip install pillow") from None
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    with suppress(
        OSError, AttributeError
    ):  # libtiff, if it can be reached, writes to stderr itself
        libraries = ctypes.CDLL(_imaging.__file__)
        libraries.TIFFSetErrorHandler(None)
        libraries.TIFFSetWarningHandler(None)
    return Image
