"""Files from outside, read without trust, and files of ours that exist whole or not at all.
Standard library only."""

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
except ModuleNotFoundError:  # Windows: nothing that a killed process left is cleaned there
    fcntl = None  # type: ignore[assignment]

LARGEST_FILE = 8 * 2**30
"""The most bytes that are read of any file: it is held in memory."""

LONGEST_REASON = 200
"""Characters of a parser's own words that an error repeats."""

_KINDS = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)

_LINK = "link"
"""What the link to a folder is called while it is still in there."""

_HIDDEN = r"\.{}\.[0-9a-f]{{8}}"
"""What is not yet published, or no longer, is called, beside what is published under a name."""

_LOG = logging.getLogger(__name__)


def read_bytes(path: Path, limit: int = LARGEST_FILE) -> bytes:
    """The content of a regular file of at most ``limit`` bytes.

    Anything else is refused before a byte of it is read, so that neither a FIFO nor an endless
    device can hold a command up. Raises InputError that names the file.
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
    except (OSError, ValueError) as error:  # ValueError: a name that no system has
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    except MemoryError:
        raise InputError(f"{path}: {size} bytes, more than there is memory for") from None
    if len(content) != size:
        raise InputError(f"{path}: changed while it was read")
    return content


@contextmanager
def parsed(complaint: str) -> Iterator[None]:
    """Where bytes from outside are parsed: whatever a parser stumbles on becomes one InputError,
    the complaint and the parser's reason, and its warnings go nowhere. CommandErrors pass."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CommandError:
        raise
    except Exception as error:  # damaged bytes surface as whatever the parser stumbled on
        raise InputError(f"{complaint}: {_reason(error)}") from None


@contextmanager
def about(path: Path) -> Iterator[None]:
    """Names the file in the InputErrors of what is done with its content."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {plain(str(error))}") from None  # it may quote the file


def is_folder(path: Path) -> bool:
    """Whether there is a folder; False, too, for a name that the system cannot look up."""
    try:
        return path.is_dir()
    except OSError:
        return False


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
    if not replace and os.path.lexists(path):
        raise InputError(f"{path}: exists already; use --replace, or another --output")
    if os.path.lexists(path) and not (_version(path) or (path.is_dir() and not path.is_symlink())):
        raise InputError(f"{path}: is not a folder")
    _require_folder_writable(path)


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Writes beside the place, forces the bytes to the disk and renames, so that a reader sees the
    old file or the new one. Follows a link. Removes what killed processes left of the same work.

    Raises OSError, and ``path`` is then as it was.
    """
    path = Path(os.path.realpath(path))
    sweep(path.parent, re.escape(path.name))
    with _claimed(path, _new_file) as temporary:
        _write(temporary, content)
        temporary.replace(path)
        _sync_folder(path.parent)


def publish_folder(path: Path, files: Mapping[str, bytes], *, replace: bool) -> None:
    """Writes {name: content} into a folder beside the place, which then takes the place in one
    step: however the process ends, a whole folder is there, the former or the new one. A name may
    be "subfolder/name".

    With ``replace`` the two are exchanged, and the former is removed; if it cannot be, it stays
    under a hidden name, with a warning. On a file system that cannot exchange, the place becomes a
    link to the new folder, and the next time another link takes its place; a former folder that is
    no link makes way by a rename, once. Removes what killed processes left of the same work.

    Raises InputError if ``path`` exists and may not be replaced, and OSError; ``path`` is then as
    it was.
    """
    require_new_folder(path, replace=replace)
    path = path.absolute()
    sweep(path.parent, re.escape(path.name))
    with _claimed(path, _new_folder) as temporary:
        for name, content in files.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            _write(temporary / name, content)
        for folder in {(temporary / name).parent for name in files} | {temporary}:
            _sync_folder(folder)
        with hold():
            _install(temporary, path)
            _sync_folder(path.parent)
    sweep(path.parent, re.escape(path.name))


def sweep(folder: Path, names: str) -> None:
    """Removes what killed processes left in ``folder`` of files and folders that were to be
    published there under a name that fits ``names``, a regular expression.

    What a process is at work on stays, and so does a folder that is in use: the name links to it,
    or the name is free, so that it may be all there is.
    """
    pattern = re.compile(_HIDDEN.format(names))
    with suppress(OSError):
        found = [path for path in folder.iterdir() if pattern.fullmatch(path.name)]
        for left in found:
            with suppress(OSError), hold():
                _sweep(left)


def _sweep(left: Path) -> None:
    """Raises OSError if another process is at work on it."""
    if left.is_symlink():  # such a name is one's only after an exchange
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
    """What ``make`` makes under a hidden name beside ``path``, held so that no other process takes
    it for a leftover. Whatever has the name in the end is removed, unless ``path`` links to it."""
    claimed: Path | None = None
    descriptor: int | None = None
    try:
        with hold():
            while claimed is None:
                made = _beside(path)
                make(made)
                with suppress(BlockingIOError, FileNotFoundError):  # a sweep was quicker
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
    """A descriptor that holds the file or folder as long as it is open, or None where there are no
    locks. Raises BlockingIOError if another holds it, and OSError."""
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
    """Whether the open file or folder still has its name."""
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
    """Makes the place a link to the new folder, or puts the folder there if there are no links.
    Raises OSError; the place is then as it was."""
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
    """The name of the hidden folder to which ``path`` was made a link, None if it is no such
    link."""
    try:
        target = str(path.readlink())
    except OSError:
        return None
    return target if re.fullmatch(_HIDDEN.format(re.escape(path.name)), target) else None


def _discard(path: Path) -> None:
    """Removes a file, a folder or a link, if it is there. Warns if that cannot be."""
    try:
        _remove(path)
    except OSError as error:
        _LOG.warning("%s: left over, and cannot be removed: %s", path, error.strerror)


def _remove(path: Path) -> None:
    """Removes a file, a folder, read-only ones too, or a link, if it is there. Raises OSError."""
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
    """Raises MachineError unless a file can be made beside ``path``."""
    try:
        with _claimed(path, _new_file):
            pass
    except OSError as error:
        raise MachineError(f"{path}: cannot be written: {error.strerror}") from None


def _open_at_once(path: str, flags: int) -> int:
    """Opens without waiting for the other end of a FIFO."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))


def _reason(error: BaseException) -> str:
    """What a parser said, as part of a line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return plain(lines[0])[:LONGEST_REASON]


def _beside(path: Path) -> Path:
    """A hidden name in the same folder, so that a rename to ``path`` stays within a file system.

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
