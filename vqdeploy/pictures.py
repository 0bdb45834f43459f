"""Writes reconstructions as an array or as a folder of PNGs."""

from __future__ import annotations

import io
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from vqdeploy.tokens import named
from vqref.errors import InputError
from vqref.host.files import about, is_folder, publish_folder, require_new_folder, write_file
from vqref.host.listing import ENDINGS
from vqref.host.pillow import pillow

LONGEST_STEM = 200
"""The most bytes of a file name before its number and ending: file systems take 255 in all."""

_UNSAFE = frozenset('/\\:*?"<>|')
"""Characters that some system forbids in file names."""


def write_reconstructions(
    path: Path, reconstructions: npt.NDArray[np.float32], names: tuple[str, ...] | None = None
) -> None:
    """Writes reconstructions (N, C, H, W) as an .npy or .npz.

    An .npz holds them as ``reconstructions``, and also ``names`` if there are any.
    """
    buffer = io.BytesIO()
    if path.suffix == ".npy":
        np.save(buffer, reconstructions, allow_pickle=False)
    else:
        arrays = {"reconstructions": reconstructions, **named(names)}
        np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_file(path, buffer.getvalue())


def write_pictures(
    folder: Path, images: npt.NDArray[np.uint8], names: tuple[str, ...] | None = None
) -> None:
    """Writes images (N, C, H, W) as PNGs into a folder that appears whole or not at all.

    names: the names of the encoded pictures; None numbers the images. Raises InputError if the
    folder exists and is not empty, and if no PNG can hold the images. Raises MachineError if Pillow
    is not installed.
    """
    from vqref.host.sheets import as_png

    if not len(images):
        raise InputError(f"{folder}: no images to write")
    digits = len(str(len(images) - 1))
    own = names or [f"{number:0{digits}}" for number in range(len(images))]
    with about(folder):
        files = dict(zip(file_names(own), map(as_png, images), strict=True))
    if folder.is_dir():
        folder.rmdir()  # fails if the folder is not empty
    publish_folder(folder, files, replace=False)


def require_free(folder: Path) -> None:
    """Raises InputError unless ``folder`` does not exist or is an empty folder.

    Raises MachineError if it cannot be made, and if Pillow is not installed.
    """
    pillow()
    if not is_folder(folder):
        if os.path.lexists(folder):
            raise InputError(f"{folder}: is not a folder")
    elif folder.is_symlink() or folder.samefile(Path.cwd()) or any(folder.iterdir()):
        raise InputError(f"{folder}: there is a folder already; name a new one")
    require_new_folder(folder, replace=True)


def file_names(names: Sequence[str]) -> list[str]:
    """Returns a distinct PNG name for each picture, without folders.

    ``sub/a.jpg`` becomes ``sub-a.png``, or ``sub-a-2.png`` if that name is taken.
    """
    taken, following, found = set[str](), dict[str, int](), list[str]()
    for name in names:
        stem = _stem(name)
        number = following.get(stem.casefold(), 1)
        while (file := f"{stem}-{number}.png" if number > 1 else f"{stem}.png").casefold() in taken:
            number += 1
        following[stem.casefold()] = number + 1
        taken.add(file.casefold())
        found.append(file)
    return found


def _stem(name: str) -> str:
    """Turns a picture's path into a safe file name without ending."""
    suffix = PurePosixPath(name).suffix
    bare = name.removesuffix(suffix) if suffix.lower() in ENDINGS else name
    composed = unicodedata.normalize("NFC", bare)
    safe = "".join("-" if c in _UNSAFE or not c.isprintable() else c for c in composed)
    return safe.encode()[:LONGEST_STEM].decode(errors="ignore").strip(". ") or "image"
