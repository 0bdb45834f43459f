"""Two renames that Python lacks: swap two names in one step, and take a name only if it is free.

Standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

_LACKING = {
    *(errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV),
    errno.EPERM,  # the answer of a sandbox to calls that it does not know
}
"""The answers of a system or a file system that has no such rename."""

_EXCHANGE = {"linux": 2, "darwin": 2}
_TAKE_FREE = {"linux": 1, "darwin": 4}
_HERE = {"linux": -100, "darwin": -2}  # AT_FDCWD: names are relative to the working folder
_CALLS = {"linux": "renameat2", "darwin": "renameatx_np"}


def exchange(first: Path, second: Path) -> bool:
    """Swaps two names in one step. Returns False, and does nothing, if the system cannot.

    Raises OSError.
    """
    return _rename(first, second, _EXCHANGE)


def take_free(old: Path, new: Path) -> bool:
    """Renames ``old`` to the free name ``new``. Returns False, and does nothing, if it cannot.

    Raises FileExistsError if the name is taken, and OSError.
    """
    return _rename(old, new, _TAKE_FREE)


def _rename(old: Path, new: Path, flags: dict[str, int]) -> bool:
    if sys.platform not in _CALLS:
        return False
    call = getattr(ctypes.CDLL(None, use_errno=True), _CALLS[sys.platform], None)
    if call is None:  # an old C library
        return False
    here = _HERE[sys.platform]
    if call(here, os.fsencode(old), here, os.fsencode(new), ctypes.c_uint(flags[sys.platform])):
        code = ctypes.get_errno()
        if code in _LACKING:
            return False
        raise OSError(code, os.strerror(code), str(new))
    return True
