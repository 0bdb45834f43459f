"""Reads pictures: from files, from folders, and from a program's memory."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqref.errors import InputError, UsageError
from vqref.host.files import is_folder, read_bytes
from vqref.host.images import LARGEST_ARRAY, OFFICIAL_NAMES, ImageSet, load
from vqref.host.listing import ENDINGS, MOST_NAMED, list_folder, many
from vqref.host.pixels import MODES, Done, pixels
from vqref.host.streams import plain
from vqref.preprocessing import WHITE, Colour, Preprocessing

LARGEST_PICTURE = 2**30
"""The most bytes of a picture's file."""


@dataclass(frozen=True)
class Reading:
    """How pictures are read.

    channels: 1, 3 or 4. None means 1 if all pictures are grey, else 3.
    size, crop, background: as in ``vqref.preprocessing.Preprocessing``.
    recursive: whether subfolders of a folder are read.
    skip_bad: whether pictures that cannot be read are left out.
    expected: the (H, W) of a model's images, if pictures are read for a model.
    """

    channels: int | None = None
    size: tuple[int, int] | None = None
    crop: bool = False
    background: Colour = WHITE
    recursive: bool = False
    skip_bad: bool = False
    expected: tuple[int, int] | None = None

    @classmethod
    def of(
        cls,
        preprocessing: Preprocessing | None,
        image_shape: tuple[int, int, int],
        *,
        recursive: bool = False,
        skip_bad: bool = False,
    ) -> Reading:
        """Returns how to read pictures for a model of images (C, H, W).

        preprocessing: the model's. None means that the model was trained on arrays.

        Raises ValueError if the preprocessing gives other images.
        """
        done = preprocessing or Preprocessing(image_shape[0])
        done.require(image_shape)
        height, width = image_shape[1:]
        return cls(
            done.channels,
            done.size,
            done.crop,
            done.background,
            recursive,
            skip_bad,
            (height, width),
        )


def load_any(path: Path, reading: Reading = Reading()) -> ImageSet:
    """Loads the images of a file or a folder.

    Takes any file that ``vqref.host.images.load`` reads, a folder of the official files, a folder
    of pictures, or one picture. Raises InputError if options of pictures are given for something
    else, and what ``load`` and ``load_folder`` raise.
    """
    if is_folder(path):
        if not any((path / train).is_file() for train, _ in OFFICIAL_NAMES):
            return load_folder(path, reading)
    elif path.suffix.lower() in ENDINGS:
        return _load(path, [(path.name, path)], reading, [])
    if option := asked_of_pictures(reading):
        raise InputError(f"{option} is for a folder of pictures; {path} is not one")
    return load(path)


def load_folder(folder: Path, reading: Reading = Reading()) -> ImageSet:
    """Loads the pictures of a folder as images (N, C, H, W) uint8, sorted by path in the folder.

    Raises InputError if there are none, if one cannot be read (with ``skip_bad``: if none can), if
    one has the wrong size, or if memory cannot hold them all. Raises UsageError for options that
    make no sense together, and MachineError if Pillow is not installed.
    """
    found = list_folder(folder, reading.recursive)
    if not found.files:
        if found.subfolders:
            raise InputError(
                f"{folder}: holds no image files itself; --recursive reads its "
                f"{many(found.subfolders, 'subfolder')}"
            )
        within = ", nor do its subfolders" if reading.recursive else ""
        raise InputError(f"{folder}: holds no image files and no official KMNIST files{within}")
    return _load(folder, found.files, reading, found.said())


def prepare(
    pictures: Any, image_shape: tuple[int, int, int], preprocessing: Preprocessing
) -> NDArray[np.uint8]:
    """Returns pictures as the images (N, C, H, W) of a model of images (C, H, W).

    pictures: a path or a Pillow image, or a sequence of them.

    Raises InputError that names the picture, and MachineError if Pillow is not installed.
    """
    reading = Reading.of(preprocessing, image_shape)
    given = [pictures] if is_picture(pictures) else list(pictures)
    _require_channels("pictures", reading.channels)
    _require_room("pictures", len(given), image_shape)
    images = np.empty((len(given), *image_shape), np.uint8)
    for i, one in enumerate(given):
        if not is_picture(one):
            raise InputError(
                f"picture {i} is a {type(one).__name__}, expected a path or a PIL image"
            )
        name = str(one if isinstance(one, str | os.PathLike) else getattr(one, "filename", ""))
        try:
            array, _ = read_pixels(one, reading)
        except InputError as error:
            reason = plain(str(error).removeprefix(f"{name}: "))
            raise InputError(f"{name or f'picture {i}'}: {reason}") from None
        _require_size(name or f"picture {i}", array, reading)
        images[i] = _channels_first(array)
    return images


def read_picture(content: bytes, reading: Reading) -> NDArray[np.uint8]:
    """Returns the image (C, H, W) of a picture's bytes.

    Raises InputError with the reason, and MachineError if Pillow is not installed.
    """
    array, _ = read_pixels(content, reading)
    _require_size("", array, reading)
    return _channels_first(array)


def is_picture(thing: Any) -> bool:
    """Returns whether ``thing`` is a path or a Pillow image."""
    return isinstance(thing, str | os.PathLike) or any(
        (kind.__module__, kind.__name__) == ("PIL.Image", "Image") for kind in type(thing).__mro__
    )


def _load(
    source: Path, pictures: list[tuple[str, Path]], reading: Reading, left_out: list[str]
) -> ImageSet:
    """Returns the images of pictures, given as (name, path). Raises what ``load_folder`` raises."""
    found = _read_all(source, pictures, reading)
    if not found.arrays:
        files = many(len(pictures), "image file")
        raise InputError(f"{source}: {files}, of which none can be read; {found.broken[0]}")
    images = np.empty((len(found.arrays), found.channels, *found.arrays[0].shape[:2]), np.uint8)
    for i, array in enumerate(found.arrays):
        images[i] = _channels_first(array)
        found.arrays[i] = array[:0]
    preprocessing = Preprocessing(found.channels, reading.size, reading.crop, reading.background)
    said = (*in_words(found.done, preprocessing, images.shape), *_skipped(found.broken), *left_out)
    digest = hashlib.sha256(images.tobytes()).hexdigest()
    return ImageSet(
        images, None, plain(source.name), digest, preprocessing, tuple(found.names), said
    )


@dataclass
class _Found:
    """What was read.

    arrays: pixels (H, W) or (H, W, C) per picture.
    done: what was done to each picture.
    broken: the pictures that could not be read, with the reason.
    """

    channels: int
    arrays: list[NDArray[np.uint8]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    done: list[Done] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


def _read_all(source: Path, pictures: list[tuple[str, Path]], reading: Reading) -> _Found:
    """Reads pictures that all have one size. Raises what ``load_folder`` raises."""
    if reading.crop and reading.size is None:
        raise UsageError("--crop needs the size to crop to: --resize HxW")
    _require_channels(source, reading.channels)
    found = _Found(reading.channels or 1)
    for name, path in pictures:
        try:
            array, done = read_pixels(path, reading)
        except InputError as error:
            reason = plain(str(error).removeprefix(f"{path}: "))
            if not reading.skip_bad:
                hint = "; --skip-bad leaves out what is broken" if path != source else ""
                raise InputError(f"{path}: {reason}{hint}") from None
            found.broken.append(f"{plain(name)}: {reason}")
            continue
        _require_size(path, array, reading)
        if found.arrays and array.shape[:2] != found.arrays[0].shape[:2]:
            raise InputError(
                f"{path}: {_size(array)} pixels, {found.names[0]} has {_size(found.arrays[0])}; "
                "use --resize HxW"
            )
        if reading.channels is None and not done.grey:
            found.channels = 3
        _require_room(source, len(pictures), (found.channels, *array.shape[:2]))
        found.arrays.append(array)
        found.names.append(plain(name))
        found.done.append(done)
    return found


def read_pixels(picture: Any, reading: Reading) -> tuple[NDArray[np.uint8], Done]:
    """Returns the pixels (H, W) or (H, W, C) of a picture and what was done to them.

    picture: a path, bytes or a Pillow image.

    Raises InputError and MachineError.
    """
    if isinstance(picture, str | os.PathLike):
        picture = read_bytes(Path(picture), LARGEST_PICTURE)
    return pixels(picture, reading.channels, reading.size, reading.crop, reading.background)


def _channels_first(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns (1, H, W) for (H, W), and (C, H, W) for (H, W, C)."""
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def asked_of_pictures(reading: Reading) -> str | None:
    """Returns the first option for pictures that the user gave, not a model; None without any."""
    own = reading.expected is None
    given = {
        "--resize": own and reading.size is not None,
        "--crop": own and reading.crop,
        "--background": own and reading.background != WHITE,
        "--channels": own and reading.channels is not None,
        "--recursive": reading.recursive,
        "--skip-bad": reading.skip_bad,
    }
    return next((option for option, is_given in given.items() if is_given), None)


def _require_channels(source: Path | str, channels: int | None) -> None:
    """Raises InputError for a number of channels that pictures cannot give."""
    if channels is not None and channels not in MODES:
        raise InputError(f"{source}: pictures give images of 1, 3 or 4 channels, not {channels}")


def _require_size(source: Path | str, array: NDArray[np.uint8], reading: Reading) -> None:
    """Raises InputError if the pixels (H, W, ...) do not have the size that a model expects."""
    if reading.expected not in (None, array.shape[:2]):
        height, width = reading.expected
        raise InputError(
            f"{source}: {_size(array)} pixels; this model was trained on images of "
            f"{height}x{width} without resizing, so resize the pictures first"
        )


def _require_room(source: Path | str, count: int, image_shape: tuple[int, ...]) -> None:
    """Raises InputError if ``count`` images (C, H, W) take more memory than is allowed."""
    if count * math.prod(image_shape) > LARGEST_ARRAY:
        size = "x".join(map(str, image_shape[1:]))
        raise InputError(
            f"{source}: {count} images of {size} are too many: more than "
            f"{LARGEST_ARRAY / 2**30:.0f} GiB"
        )


def in_words(
    done: list[Done], preprocessing: Preprocessing, shape: tuple[int, ...]
) -> Iterable[str]:
    """Yields a line per kind of change made to some of the pictures.

    shape: that of the images that they became, (N, C, H, W).
    """
    count, channels, height, width = shape
    resized, reshaped = sum(one.resized for one in done), sum(one.reshaped for one in done)
    if resized:
        how = "cropped to the middle" if preprocessing.crop else "stretched"
        of_them = f", {reshaped} of them {how}" if reshaped else ""
        pictures = many(count, "picture")
        yield f"{resized} of {pictures} resized to {height}x{width}{of_them}"
    ground = "#" + bytes(preprocessing.background).hex()
    deep = [one.deep for one in done if one.deep is not None]
    grey = sum(one.grey for one in done)
    counted = {
        f"laid on {ground} where transparent": sum(one.laid for one in done),
        "turned as the EXIF data say": sum(one.turned for one in done),
        "animated or of several pages: the first of each": sum(one.first for one in done),
        f"of 16 bits: their upper 8 (the brightest level is at most {max(deep, default=0)} of "
        "65535)": len(deep),
        "grey spread to colour": grey if channels > 1 else 0,
        "in colour made grey": count - grey if channels == 1 else 0,
    }
    counted |= {f"of {kind} made RGB": n for kind, n in Counter(one.made for one in done).items()}
    counted.pop("of None made RGB", None)
    yield from (f"{number} {what}" for what, number in counted.items() if number)


def _skipped(broken: list[str]) -> Iterable[str]:
    if broken:
        more = f"; and {len(broken) - MOST_NAMED} more" if len(broken) > MOST_NAMED else ""
        yield f"{len(broken)} skipped, broken: {'; '.join(broken[:MOST_NAMED])}{more}"


def _size(array: Any) -> str:
    return f"{array.shape[0]}x{array.shape[1]}"
