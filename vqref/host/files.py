"""Reads files from outside without trust. Publishes our own files whole or not at all.

Standard library only.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from vqref.errors import CommandError, InputError, MachineError
from vqref.host import renames
from vqref.host.interrupts import hold
from vqref.host.streams import plain

try:
    import fcntl
except ModuleNotFoundError:  # Windows, where leftovers of killed processes stay
    fcntl = None  # type: ignore[assignment]

LARGEST_FILE = 8 * 2**30
"""The most bytes read of any file, because memory holds them."""

LONGEST_REASON = 200
"""The most characters of a parser's own words that an error repeats."""

_KINDS = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)

_LINK = "link"
"""The name of the link to a folder while the link is still in that folder."""

_HIDDEN = r"\.{}\.[0-9a-f]{{8}}"
"""The hidden names of files and folders that are not yet published, or no longer.

They lie beside the published name."""

_LOG = logging.getLogger(__name__)


def read_bytes(path: Path, limit: int = LARGEST_FILE) -> bytes:
    """Returns the content of a regular file of at most ``limit`` bytes.

    Refuses anything else before it reads a byte. So neither a FIFO nor an endless device can block
    a command. Raises InputError that names the file.
    """
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            found = os.fstat(file.fileno())
            kind = next((kind for test, kind in _KINDS if test(found.st_mode)), None)
            if kind is not None:
                raise InputError(f"{path}: is {kind}, not a regular file")
            size = found.st_size
            if size > limit:
                raise InputError(f"{path}: {size} bytes, more than the {limit} that may be read")
            content = file.read(size + 1)
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name that no system allows
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    except MemoryError:
        raise InputError(f"{path}: {size} bytes, more than there is memory for") from None
    if len(content) != size:
        raise InputError(f"{path}: changed while it was read")
    return content


@contextmanager
def parsed(complaint: str) -> Iterator[None]:
    """Turns any error of a parser of bytes from outside into one InputError.

    Its message is the complaint and the parser's reason. CommandErrors pass unchanged. Hides the
    parser's warnings.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CommandError:
        raise
    except Exception as error:  # damaged bytes can raise anything in a parser
        raise InputError(f"{complaint}: {_reason(error)}") from None


@contextmanager
def about(path: Path) -> Iterator[None]:
    """Adds the file's name to InputErrors about its content."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {plain(str(error))}") from None  # it may quote the file


def is_folder(path: Path) -> bool:
    """Returns whether there is a folder: False also for a name that the system cannot look up."""
    try:
        return path.is_dir()
    except OSError:
        return False


def require_writable(path: Path) -> None:
    """Raises MachineError if no file can be published at ``path`` now. Leaves nothing behind."""
    if path.is_dir():
        raise MachineError(f"{path}: is a folder; name a file to write to")
    if path.exists() and not path.is_file():
        raise MachineError(f"{path}: is not a regular file")
    _require_folder_writable(path)


def require_new_folder(path: Path, *, replace: bool) -> None:
    """Checks that a folder can be published at ``path``.

    Raises InputError if ``path`` exists and may not be replaced. Raises MachineError if it cannot
    be written.
    """
    if not replace and os.path.lexists(path):
        raise InputError(f"{path}: exists already; use --replace, or another --output")
    if os.path.lexists(path) and not (_version(path) or (path.is_dir() and not path.is_symlink())):
        raise InputError(f"{path}: is not a folder")
    _require_folder_writable(path)


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Writes a file so that a reader sees either the old file or the new one.

    Writes beside the place, forces the bytes to the disk and renames. Follows a link. Removes what
    killed processes left of the same work. Raises OSError; ``path`` is then as it was.
    """
    path = Path(os.path.realpath(path))
    sweep(path.parent, re.escape(path.name))
    with _claimed(path, _new_file) as temporary:
        _write(temporary, content)
        temporary.replace(path)
        _sync_folder(path.parent)


def publish_folder(path: Path, files: Mapping[str, bytes], *, replace: bool) -> None:
    """Publishes {name: content} as a folder in one step.

    Writes a folder beside the place, which then takes the place. However the process ends, a whole
    folder is there, the old or the new one. A name may have folders, with "/" between the parts.

    With ``replace``, exchanges the two and removes the old folder. If the old folder cannot be
    removed, it stays under a hidden name, with a warning. On a file system that cannot exchange,
    the place becomes a link to the new folder. Next time, another link replaces this link. An old
    folder that is not a link is first renamed, once. Removes what killed processes left of the same
    work.

    Raises InputError if ``path`` exists and may not be replaced, and OSError. ``path`` is then as
    it was.
    """
    require_new_folder(path, replace=replace)
    path = path.absolute()
    sweep(path.parent, re.escape(path.name))
    with _claimed(path, _new_folder) as temporary:
        for name, content in files.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            _write(temporary / name, content)
        for folder in {(temporary / name).parent for name in files} | {temporary}:
            _sync_folder(folder)
        with hold():
            _install(temporary, path)
            _sync_folder(path.parent)
    sweep(path.parent, re.escape(path.name))


def sweep(folder: Path, names: str) -> None:
    """Removes what killed processes left in ``folder``.

    names: a regular expression. Only leftovers of files and folders to be published under such
        names are removed.

    Keeps what another process is working on. Also keeps a folder to which its name links, or whose
    name is free, because it may be the only copy.
    """
    pattern = re.compile(_HIDDEN.format(names))
    with suppress(OSError):
        found = [path for path in folder.iterdir() if pattern.fullmatch(path.name)]
        for left in found:
            with suppress(OSError), hold():
                _sweep(left)


def _sweep(left: Path) -> None:
    """Raises OSError if another process is at work on it."""
    if left.is_symlink():  # only an exchange gives a link such a name
        left.unlink()
        return
    descriptor = _lock(left)
    if descriptor is None:
        return
    try:
        place = left.with_name(left.name[1:-9])
        if not left.is_dir() or (os.path.lexists(place) and _version(place) != left.name):
            _remove(left)
    finally:
        os.close(descriptor)


@contextmanager
def _claimed(path: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """Makes a hidden file or folder beside ``path`` and locks it, so that others do not remove it.

    At the end, removes whatever has the hidden name, unless ``path`` links to it.
    """
    claimed: Path | None = None
    descriptor: int | None = None
    try:
        with hold():
            while claimed is None:
                made = _beside(path)
                make(made)
                with suppress(BlockingIOError, FileNotFoundError):  # a sweep was faster
                    descriptor = _lock(made)
                    claimed = made
                    if descriptor is not None and not _is_at(made, descriptor):
                        os.close(descriptor)
                        claimed = descriptor = None
        yield claimed
    finally:
        with hold():
            if claimed is not None and _version(path) != claimed.name:
                _discard(claimed)
            if descriptor is not None:
                os.close(descriptor)


def _lock(path: Path) -> int | None:
    """Returns a descriptor that locks the file or folder while it is open, or None without locks.

    Raises BlockingIOError if another process has the lock, and OSError.
    """
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file or folder still has this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _new_file(path: Path) -> None:
    path.touch(exist_ok=False)
    path.chmod(stat.S_IMODE(path.stat().st_mode) | 0o600)  # whatever the umask


def _new_folder(path: Path) -> None:
    path.mkdir()
    path.chmod(stat.S_IMODE(path.stat().st_mode) | 0o700)


def _install(temporary: Path, path: Path) -> None:
    """Gives the new folder its place. Raises OSError; the place is then as it was."""
    if not os.path.lexists(path):
        if not renames.take_free(temporary, path):
            temporary.rename(path)
    elif not renames.exchange(temporary, path):
        _link(temporary, path)


def _link(temporary: Path, path: Path) -> None:
    """Makes the place a link to the new folder, or puts the folder there if links are impossible.

    Raises OSError; the place is then as it was.
    """
    new = temporary / _LINK
    try:
        new.symlink_to(temporary.name, target_is_directory=True)
    except OSError:
        new = temporary
    linked = _version(path)
    former = _beside(path) if linked is None else path.with_name(linked)
    if linked is None:
        path.rename(former)
    try:
        new.replace(path)
    except BaseException:
        if linked is None:
            former.rename(path)
        raise
    _discard(former)


def _version(path: Path) -> str | None:
    """The name of the hidden folder to which we linked ``path``; None if it is no such link."""
    try:
        target = str(path.readlink())
    except OSError:
        return None
    return target if re.fullmatch(_HIDDEN.format(re.escape(path.name)), target) else None


def _discard(path: Path) -> None:
    """Removes a file, a folder or a link, if it is there. Warns if it cannot be removed."""
    try:
        _remove(path)
    except OSError as error:
        _LOG.warning("%s: left over, and cannot be removed: %s", path, error.strerror)


def _remove(path: Path) -> None:
    """Removes a file, a link or a folder, even a read-only one, if it is there. Raises OSError."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    with suppress(FileNotFoundError):  # another process removes it, too
        try:
            shutil.rmtree(path)
        except PermissionError:
            _make_writable(path)
            shutil.rmtree(path)


def _make_writable(folder: Path) -> None:
    """Lets the owner remove what is in the folder. Raises OSError."""
    folder.chmod(0o700)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            _make_writable(path)


def _require_folder_writable(path: Path) -> None:
    """Raises MachineError if no file can be made beside ``path``."""
    try:
        with _claimed(path, _new_file):
            pass
    except OSError as error:
        raise MachineError(f"{path}: cannot be written: {error.strerror}") from None


def _open_at_once(path: str, flags: int) -> int:
    """Opens without waiting for the other end of a FIFO."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))


def _reason(error: BaseException) -> str:
    """What a parser said, shortened to part of a line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return plain(lines[0])[:LONGEST_REASON]


def _beside(path: Path) -> Path:
    """A hidden name in the same folder, so that a rename to ``path`` stays within one file system.

    Raises InputError for the root, which is in no folder.
    """
    path = path.absolute()
    if not path.name:
        raise InputError(f"{path}: is not a name that a file or folder could have")
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def _write(path: Path, content: bytes | memoryview) -> None:
    """Writes a file and forces it to the disk. Raises OSError that names the folder."""
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        # the error of a write names no file
        raise OSError(error.errno, error.strerror, str(path.parent)) from None


def _sync_folder(path: Path) -> None:
    """Makes a rename survive a power cut, if the system can open a folder. Windows cannot."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
