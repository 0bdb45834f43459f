"""Files that exist whole or not at all. Standard library only."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

from vqref.errors import InputError, MachineError


def require_writable(path: Path) -> None:
    """Raises MachineError unless a file can be published at ``path`` now. Leaves nothing behind."""
    if path.is_dir():
        raise MachineError(f"{path}: is a folder; name a file to write to")
    if path.exists() and not path.is_file():
        raise MachineError(f"{path}: is not a regular file")
    _require_folder_writable(path)


def require_new_folder(path: Path, *, replace: bool) -> None:
    """Raises InputError if ``path`` exists and may not be replaced, MachineError if a folder cannot
    be published there."""
    if not replace and (path.exists() or path.is_symlink()):
        raise InputError(f"{path}: exists already; use --replace, or another --output")
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise InputError(f"{path}: is not a folder")
    _require_folder_writable(path)


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Writes beside the place, forces the bytes to the disk and renames, so that a reader sees the
    old file or the new one. Follows a link.

    Raises OSError, and ``path`` is then as it was.
    """
    path = path.resolve()
    temporary = _beside(path)
    try:
        _write(temporary, content)
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def publish_folder(path: Path, files: Mapping[str, bytes], *, replace: bool) -> None:
    """Writes {name: content} into a folder beside the place and renames it there.

    With ``replace``, an existing folder makes way by a rename. It comes back if anything, even a
    signal, keeps the new one from taking its place, and is removed only once the new one is there.

    Raises InputError if ``path`` exists and may not be replaced, and OSError; ``path`` is then as
    it was.
    """
    require_new_folder(path, replace=replace)
    temporary, former = _beside(path), _beside(path)
    try:
        temporary.mkdir()
        for name, content in files.items():
            _write(temporary / name, content)
        _sync_folder(temporary)
        if path.exists():
            path.rename(former)
        temporary.rename(path)
        _sync_folder(path.parent)
    finally:
        if former.exists() and not path.exists():
            former.rename(path)
        if temporary.exists():
            shutil.rmtree(temporary)
    if former.exists():
        shutil.rmtree(former)


def _require_folder_writable(path: Path) -> None:
    """Raises MachineError unless a file can be made beside ``path``."""
    try:
        probe = _beside(path)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise MachineError(f"{path}: cannot be written: {error.strerror}") from None


def _beside(path: Path) -> Path:
    """A hidden name in the same folder, so that a rename to ``path`` stays within a file system.

    Raises InputError for the root, which is in no folder.
    """
    path = path.absolute()
    if not path.name:
        raise InputError(f"{path}: is not a name that a file or folder could have")
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def _write(path: Path, content: bytes | memoryview) -> None:
    """Writes a new file and forces it to the disk. Raises OSError that names the folder."""
    try:
        with path.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        # a write does not say where it failed
        raise OSError(error.errno, error.strerror, str(path.parent)) from None


def _sync_folder(path: Path) -> None:
    """Makes a rename survive a power cut, if the system can open a folder; Windows cannot."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
