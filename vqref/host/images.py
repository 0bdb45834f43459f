"""Images from arrays and files, in every common form."""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from vqref.errors import InputError
from vqref.host.files import LARGEST_FILE, about, is_folder, parsed, read_bytes
from vqref.host.streams import plain
from vqref.preprocessing import Preprocessing
from vqref.validation import Array

OFFICIAL_NAMES = (
    ("kmnist-train-imgs.npz", "kmnist-test-imgs.npz"),
    ("train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz"),
)
"""File names of the Kuzushiji-MNIST distribution, (training, held out). The first is preferred."""

LARGEST_ARRAY = LARGEST_FILE
"""The most bytes of all arrays of a file together, because memory holds them."""

MOST_MEMBERS = 2**14
"""The most arrays in an archive."""

LONGEST_HEADER = 10_000
"""The most bytes in the header of an ``.npy`` file, NumPy's own limit."""

Stream = IO[bytes] | gzip.GzipFile

_MEMBER = b"PK\x01\x02"  # the start of each entry in an archive's directory
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)

ARRAY_NAMES = ("arr_0", "images", "x_train")
"""The names that mark the images if an archive holds several arrays."""

CHANNELS = (1, 3, 4)
"""Numbers of channels by which a layout is recognised if no spec tells it."""


@dataclass(frozen=True)
class ImageSet:
    """Images (N, C, H, W), uint8, or float32 in [0, 1].

    train: the images to train on.
    held_out: other images of the same size, or None if the source has none.
    source, sha256: the name and the digest of the file that ``train`` came from.
    preprocessing: what was done to pictures; None for arrays.
    names: the names of the pictures in ``train``, as paths within their folder with "/" between the
        parts; None for arrays.
    said: a line per kind of change that was made to some of them, or per kind that was left out.
    held_out_as: how the held-out images were chosen: "fraction", or "source" and "sha256". None if
        the source itself separates them.
    """

    train: Array
    held_out: Array | None
    source: str
    sha256: str
    preprocessing: Preprocessing | None = None
    names: tuple[str, ...] | None = None
    said: tuple[str, ...] = ()
    held_out_as: Mapping[str, Any] | None = None

    @property
    def count(self) -> int:
        """The number of images to train on."""
        return len(self.train)


def load(path: str | Path) -> ImageSet:
    """Loads the images of an ``.npz``, ``.npy`` or IDX file (also ``.gz``), or of a folder.

    A folder must hold the official files. Raises InputError that names the file, what was found and
    what was expected.
    """
    path = Path(path)
    if not is_folder(path):
        images, digest = _read(path)
        return ImageSet(images, None, plain(path.name), digest)
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
    """Returns images of a known shape as (N, C, H, W) float32 in [0, 1]. Divides uint8 by 255.

    Takes and raises the same as ``in_layout``.
    """
    return to_unit_interval(in_layout(images, image_shape))


def in_layout(images: npt.ArrayLike, image_shape: tuple[int, int, int]) -> Array:
    """Returns images of a known shape as (N, C, H, W). Keeps their dtype.

    images: uint8, or floating in [0, 1]. Their shape is (N, C, H, W) or (N, H, W, C), or (N, H, W)
        if C is 1. One image without N becomes a batch of one.

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
    return _check_values(array)


def as_images(images: npt.ArrayLike) -> Array:
    """Returns images of any shape as (N, C, H, W), uint8, or float32 in [0, 1].

    images: uint8, or floating in [0, 1]. Their shape is (N, H, W), (N, H, W, C) or (N, C, H, W),
        where C is one of CHANNELS.

    Raises InputError for anything else, and for a shape that fits two of these layouts.
    """
    return _channels_first(_check_values(np.asarray(images)))


def to_unit_interval(images: Array) -> npt.NDArray[np.float32]:
    """Returns float32 images: uint8 divided by 255, floating values as they are."""
    if images.dtype == np.uint8:
        return np.asarray(images, np.float32) / np.float32(255)
    return np.ascontiguousarray(images, np.float32)


def _layouts(image_shape: tuple[int, int, int]) -> str:
    c, h, w = image_shape
    return (f"(N, {h}, {w}), " if c == 1 else "") + f"(N, {c}, {h}, {w}) or (N, {h}, {w}, {c})"


def _read(path: Path) -> tuple[Array, str]:
    """Returns the images (N, C, H, W) of a file and the file's sha256. Raises InputError."""
    content = read_bytes(path)
    with about(path), parsed("not a readable image file"):
        images = as_images(_parse(content))
    return images, hashlib.sha256(content).hexdigest()


def _parse(content: bytes) -> Array:
    """Returns the images in a file's bytes. The first bytes tell its form.

    Raises InputError, and what parsers raise.
    """
    if content.startswith(b"PK"):
        return _parse_npz(content)
    file = io.BytesIO(content)
    if content.startswith(b"\x93NUMPY"):
        return _parse_npy(file, len(content))
    if content.startswith(b"\x1f\x8b"):
        with gzip.open(file) as unpacked:
            return _parse_idx(unpacked)
    return _parse_idx(file)


def read_npz(content: bytes) -> dict[str, Array]:
    """Returns every array of an ``.npz`` by its name: numbers and text.

    Executes nothing. Allocates memory for an array only after its size is checked. Raises
    InputError.
    """
    with parsed("not a readable archive"), _archive(content) as archive:
        members = _members(archive)
        total = sum(info.file_size for info in members.values())
        _require_size(total)
        return {name: _read_member(archive, info) for name, info in members.items()}


def read_npy(content: bytes) -> Array:
    """Returns the array of an ``.npy`` as safely as ``read_npz``. Raises InputError."""
    with parsed("not a readable array"):
        return _parse_npy(io.BytesIO(content), len(content))


def _parse_npz(content: bytes) -> Array:
    """The only array of an archive, or the first that is named in ARRAY_NAMES."""
    with _archive(content) as archive:
        members = _members(archive)
        name = next((n for n in (*ARRAY_NAMES, *members) if n in members), "")
        if not (name in ARRAY_NAMES or len(members) == 1):
            found = plain(", ".join(list(members)[:8])) or "(none)"
            raise InputError(f"holds arrays {found}; expected one, or one named arr_0 or images")
        return _read_member(archive, members[name])


def _archive(content: bytes) -> zipfile.ZipFile:
    """Opens the archive in ``content``.

    Raises InputError if it has more than MOST_MEMBERS members, before they are listed.
    """
    if content.count(_MEMBER) > MOST_MEMBERS:
        raise InputError(f"holds more than {MOST_MEMBERS} arrays")
    return zipfile.ZipFile(io.BytesIO(content))


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Returns the members of an archive by the names of their arrays.

    Raises InputError if two have the same name, and for what NumPy does not write.
    """
    found: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        if name in found:
            raise InputError(f"holds two arrays named {plain(name)}")
        if info.flag_bits & 1 or info.compress_type not in _COMPRESSIONS:
            raise InputError(
                f"the array {plain(name)} is encrypted, or compressed by another method than "
                "deflate"
            )
        found[name] = info
    return found


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Array:
    with archive.open(info) as file:
        return _parse_npy(file, info.file_size)


def _parse_npy(file: IO[bytes], size: int) -> Array:
    """Returns the array in a ``.npy`` stream of ``size`` bytes.

    Checks its header before it allocates memory: a small archive can declare, and deliver, more
    than any machine can hold. Raises InputError, and what parsers raise.
    """
    start, read_header = _npy_header(file)  # without the 8 bytes of magic
    shape, fortran, dtype = read_header(start)
    if dtype.kind not in "biufU":
        raise InputError(f"an array's dtype is {dtype}, expected numbers or text")
    declared, there = math.prod(shape) * dtype.itemsize, size - 8 - len(start.getbuffer())
    if declared != there or min(shape, default=0) < 0:
        raise InputError(f"an array's header declares {declared} bytes, {there} are there")
    _require_size(declared)
    values = np.frombuffer(_read_at_most(file, declared), dtype)
    return values.reshape(shape, order="F" if fortran else "C")


def _npy_header(file: IO[bytes]) -> tuple[io.BytesIO, Callable[[IO[bytes]], Any]]:
    """Returns the header of a ``.npy`` stream after its magic, and the function that reads it.

    Raises InputError, and what parsers raise.
    """
    version = np.lib.format.read_magic(file)
    first = version == (1, 0)
    if not first and version not in ((2, 0), (3, 0)):
        raise InputError(f"format version {version} of .npy is not known")
    prefix = file.read(2 if first else 4)
    length = int.from_bytes(prefix, "little")
    if length > LONGEST_HEADER:
        raise InputError(f"its header has {length} bytes, more than the {LONGEST_HEADER} expected")
    read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
    return io.BytesIO(prefix + file.read(length)), read


def _parse_idx(file: Stream) -> Array:
    """Parses IDX as LeCun's MNIST page defines it.

    The parts are 0, 0, 8 for uint8, the number of axes, their sizes as big-endian integers, the
    values. Raises InputError, and what parsers raise.
    """
    magic = file.read(4)
    axes = magic[3] if len(magic) == 4 and magic[:3] == b"\0\0\x08" else 0
    if axes not in (3, 4):
        raise InputError("neither .npz, .npy nor IDX images of uint8")
    shape = tuple(int(n) for n in np.frombuffer(file.read(4 * axes), ">u4", axes))
    count = math.prod(shape)
    _require_size(count)
    values = _read_at_most(file, count + 1)
    if len(values) != count:
        more = "or more " if len(values) > count else ""
        raise InputError(f"IDX header says {shape}, but {len(values)} bytes {more}follow")
    return np.frombuffer(values, np.uint8).reshape(shape)


def _read_at_most(file: Stream, limit: int) -> bytearray:
    """Reads up to ``limit`` bytes of a stream, and allocates memory only as they arrive."""
    found = bytearray()
    while piece := file.read(min(2**20, limit - len(found))):
        found += piece
    return found


def _require_size(size: int) -> None:
    """Raises InputError if ``size`` is more bytes than an array may have."""
    if size > LARGEST_ARRAY:
        raise InputError(
            f"holds {size / 2**30:.1f} GiB of images, more than the "
            f"{LARGEST_ARRAY / 2**30:.0f} GiB read at once"
        )


def _check_values(array: Array) -> Array:
    """Returns the array if it is uint8, or floating, finite and in [0, 1]. Raises InputError."""
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
    """Returns images as (N, C, H, W), uint8 or float32.

    array: (N, H, W), (N, H, W, C) or (N, C, H, W), where C is one of CHANNELS.

    Raises InputError.
    """
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[1] in CHANNELS and array.shape[3] in CHANNELS:
        raise InputError(
            f"images: shape is {array.shape}, which could be (N, C, H, W) or (N, H, W, C)"
        )
    elif array.ndim == 4 and array.shape[3] in CHANNELS:
        array = array.transpose(0, 3, 1, 2)
    if array.ndim != 4 or array.shape[1] not in CHANNELS or 0 in array.shape[2:]:
        raise InputError(
            f"images: shape is {array.shape}, expected (N, H, W), (N, H, W, C) or (N, C, H, W), "
            "C 1, 3 or 4"
        )
    return np.ascontiguousarray(array, np.uint8 if array.dtype == np.uint8 else np.float32)
