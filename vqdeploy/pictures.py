"""Reconstructions in files: an array, or a folder of PNGs."""

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
"""Bytes of a file's name, before what makes it the only one: file systems take 255."""

_UNSAFE = frozenset('/\\:*?"<>|')
"""Characters that some system lets no file's name have."""


def write_reconstructions(
    path: Path, reconstructions: npt.NDArray[np.float32], names: tuple[str, ...] | None = None
) -> None:
    """Writes (N, C, H, W) as ``reconstructions`` of an .npz, beside ``names`` if there are any, or
    as an .npy."""
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

    names: of the pictures that they were made of; None numbers them. Raises InputError if there is
    something already, or no PNG can hold them; MachineError if Pillow is not installed.
    """
    from vqref.host.sheets import as_png

    if not len(images):
        raise InputError(f"{folder}: no images to write")
    digits = len(str(len(images) - 1))
    own = names or [f"{number:0{digits}}" for number in range(len(images))]
    with about(folder):
        files = dict(zip(file_names(own), map(as_png, images), strict=True))
    if folder.is_dir():
        folder.rmdir()  # which takes no folder that holds something
    publish_folder(folder, files, replace=False)


def require_free(folder: Path) -> None:
    """Raises InputError unless nothing is there, or an empty folder; MachineError if a folder
    cannot be made there, or Pillow is not installed."""
    pillow()
    if not is_folder(folder):
        if os.path.lexists(folder):
            raise InputError(f"{folder}: is not a folder")
    elif folder.is_symlink() or folder.samefile(Path.cwd()) or any(folder.iterdir()):
        raise InputError(f"{folder}: there is a folder already; name a new one")
    require_new_folder(folder, replace=True)


def file_names(names: Sequence[str]) -> list[str]:
    """A PNG's name for each picture, no two the same, none outside the folder: ``sub/a.jpg``
    becomes ``sub-a.png``, and ``sub-a-2.png`` where that is taken."""
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
    """What is left of a picture's path for the name of a file."""
    suffix = PurePosixPath(name).suffix
    bare = name.removesuffix(suffix) if suffix.lower() in ENDINGS else name
    composed = unicodedata.normalize("NFC", bare)
    safe = "".join("-" if c in _UNSAFE or not c.isprintable() else c for c in composed)
    return safe.encode()[:LONGEST_STEM].decode(errors="ignore").strip(". ") or "image"
