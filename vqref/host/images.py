"""Images from arrays and files, in every form that people have them."""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from vqref.errors import InputError
from vqref.validation import Array

OFFICIAL_NAMES = (
    ("kmnist-train-imgs.npz", "kmnist-test-imgs.npz"),
    ("train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz"),
)
"""File names of the Kuzushiji-MNIST distribution, (training, held out), the preferred first."""

LARGEST_ARRAY = 8 * 2**30
"""The most bytes that an array of images may have: it is held in memory."""

ARRAY_NAMES = ("arr_0", "images", "x_train")
"""Names that mark the images among the arrays of an archive."""

CHANNELS = (1, 3, 4)
"""Numbers of channels by which a layout is recognised if no spec says it."""


@dataclass(frozen=True)
class ImageSet:
    """Images (N, C, H, W), uint8, or float32 in [0, 1].

    train: to train on. held_out: others of the same size, or None if the source has none.
    source: the name of the file that ``train`` came from. sha256: its digest.
    """

    train: Array
    held_out: Array | None
    source: str
    sha256: str


def load(path: str | Path) -> ImageSet:
    """The images of an ``.npz``, ``.npy`` or IDX file (``.gz`` too), or of a folder of the official
    files.

    Raises InputError that names the file, what was found and what was expected.
    """
    path = Path(path)
    if not path.is_dir():
        images, digest = _read(path)
        return ImageSet(images, None, path.name, digest)
    for train, held_out in OFFICIAL_NAMES:
        if (path / train).is_file():
            images, digest = _read(path / train)
            others = _read(path / held_out)[0] if (path / held_out).is_file() else None
            if others is not None and others.shape[1:] != images.shape[1:]:
                raise InputError(
                    f"{path / held_out}: images of {others.shape[1:]}, those of {train} are "
                    f"{images.shape[1:]}"
                )
            return ImageSet(images, others, train, digest)
    expected = " or ".join(train for train, _ in OFFICIAL_NAMES)
    raise InputError(f"{path}: the folder holds no {expected}")


def as_batch(images: npt.ArrayLike, image_shape: tuple[int, int, int]) -> npt.NDArray[np.float32]:
    """Images of a known shape as (N, C, H, W) float32 in [0, 1].

    images: uint8, which is divided by 255, or floating in [0, 1]; (N, C, H, W), (N, H, W, C), or
    (N, H, W) if C is 1; or one image without its N, which becomes a batch of one.

    Raises InputError that says what was found and what was expected.
    """
    array = np.asarray(images)
    channels, height, width = image_shape
    if array.shape in (image_shape, (height, width, channels)) or (
        channels == 1 and array.shape == (height, width)
    ):
        array = array[None]
    if array.ndim == 3 and channels == 1:
        array = array[:, None]
    elif (
        array.ndim == 4
        and array.shape[1:] != image_shape
        and array.shape[1:] == (height, width, channels)
    ):
        array = array.transpose(0, 3, 1, 2)
    if array.shape[1:] != image_shape or array.ndim != 4:
        raise InputError(f"images: shape is {np.shape(images)}, expected {_layouts(image_shape)}")
    return to_unit_interval(_check_values(array))


def to_unit_interval(images: Array) -> npt.NDArray[np.float32]:
    """Divides uint8 by 255 and leaves floating values as they are; float32."""
    if images.dtype == np.uint8:
        return np.asarray(images, np.float32) / np.float32(255)
    return np.ascontiguousarray(images, np.float32)


def _layouts(image_shape: tuple[int, int, int]) -> str:
    c, h, w = image_shape
    return (f"(N, {h}, {w}), " if c == 1 else "") + f"(N, {c}, {h}, {w}) or (N, {h}, {w}, {c})"


def _read(path: Path) -> tuple[Array, str]:
    """The images (N, C, H, W) in a file, and the file's sha256. Raises InputError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    try:
        array = _parse(content)
        images = _channels_first(_check_values(array))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return images, hashlib.sha256(content).hexdigest()


def _parse(content: bytes) -> Array:
    """The images in the bytes of a file, whose form its first bytes tell. Raises InputError."""
    try:
        if content.startswith(b"PK"):
            return _parse_npz(content)
        if content.startswith(b"\x93NUMPY"):
            return _parse_npy(io.BytesIO(content), len(content))
        return _parse_idx(gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content)
    except InputError:
        raise
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"not a readable image file: {error}") from None


def read_npz(content: bytes) -> dict[str, Array]:
    """Every array of an ``.npz`` by its name. Nothing is executed, and memory is given to an array
    only once its size is checked.

    Raises InputError.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            found = {}
            for info in archive.infolist():
                with archive.open(info) as file:
                    found[info.filename.removesuffix(".npy")] = _parse_npy(file, info.file_size)
            return found
    except InputError:
        raise
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"not a readable archive: {error}") from None


def _parse_npz(content: bytes) -> Array:
    """The only array of an archive, or the one that one of ARRAY_NAMES marks."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        name = next((n for n in (*ARRAY_NAMES, *members) if n in members), "")
        if not (name in ARRAY_NAMES or len(members) == 1):
            found = ", ".join(members) or "(none)"
            raise InputError(f"holds arrays {found}; expected one, or one named arr_0 or images")
        with archive.open(members[name]) as file:
            return _parse_npy(file, members[name].file_size)


def _parse_npy(file: IO[bytes], size: int) -> Array:
    """The array in a ``.npy`` stream of ``size`` bytes.

    Its header is checked before memory is given to it: a small archive can promise, and deliver,
    more than any machine has. Raises InputError.
    """
    start = file.tell()
    major, _ = np.lib.format.read_magic(file)
    read_header = (
        np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    )
    shape, _, dtype = read_header(file)
    declared = math.prod(shape) * dtype.itemsize
    if dtype.hasobject:
        raise InputError(
            "images: dtype is object, expected uint8, or a floating dtype with values in [0, 1]"
        )
    if declared != size - (file.tell() - start):
        raise InputError(
            f"not a readable image file: its header declares {declared} bytes, "
            f"{size - file.tell() + start} are there"
        )
    if declared > LARGEST_ARRAY:
        raise InputError(
            f"holds {declared / 2**30:.1f} GiB of images, more than the "
            f"{LARGEST_ARRAY / 2**30:.0f} GiB read at once"
        )
    file.seek(start)
    return np.asarray(np.lib.format.read_array(file, allow_pickle=False))


def _parse_idx(content: bytes) -> Array:
    """IDX as LeCun's MNIST page defines it: 0, 0, 8 for uint8, the number of axes, their sizes as
    big-endian integers, the values. Raises InputError."""
    axes = content[3] if len(content) > 4 and content[:3] == b"\0\0\x08" else 0
    if axes not in (3, 4):
        raise InputError("neither .npz, .npy nor IDX images of uint8")
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", axes, 4))
    start = 4 + 4 * axes
    if len(content) - start != math.prod(shape):
        raise InputError(f"IDX header says {shape}, but {len(content) - start} bytes follow")
    values = np.frombuffer(content, np.uint8, offset=start)
    return values.reshape(shape).copy()  # PyTorch wants arrays that can be written


def _check_values(array: Array) -> Array:
    """The array itself if it is uint8, or floating, finite and in [0, 1]. Raises InputError."""
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(
            f"images: dtype is {array.dtype}, expected uint8, or a floating dtype with values in "
            "[0, 1]"
        )
    if not np.isfinite(array).all():
        at = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise InputError(f"images: {array[at]} at {at}, expected finite values")
    if array.size and not (array.min() >= 0 and array.max() <= 1):
        raise InputError(
            f"images: values from {array.min():.9g} to {array.max():.9g}, expected [0, 1] (or "
            "uint8)"
        )
    return array


def _channels_first(array: Array) -> Array:
    """(N, H, W), (N, H, W, C) or (N, C, H, W), C one of CHANNELS, as (N, C, H, W); float32 if
    floating. Raises InputError."""
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[1] in CHANNELS and array.shape[3] in CHANNELS:
        raise InputError(
            f"images: shape is {array.shape}, which could be (N, C, H, W) or (N, H, W, C)"
        )
    elif array.ndim == 4 and array.shape[3] in CHANNELS:
        array = array.transpose(0, 3, 1, 2)
    elif array.ndim != 4 or array.shape[1] not in CHANNELS:
        raise InputError(
            f"images: shape is {array.shape}, expected (N, H, W), (N, H, W, C) or (N, C, H, W), "
            "C 1, 3 or 4"
        )
    return np.ascontiguousarray(array, np.uint8 if array.dtype == np.uint8 else np.float32)
