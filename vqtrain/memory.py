"""What a training process asks of the allocator."""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_LARGEST_THRESHOLD = 32 * 2**20
"""More than this glibc refuses."""


def keep_freed_memory() -> bool:
    """Lets this process keep the arrays that it frees, for the next step. Returns whether the C library is one that was asked.

    glibc gives an array of a few megabytes back to the system when it is freed; the next step then waits for as many pages to
    be cleared as it writes. On a processor that is a tenth of a step, and several times an activation's own time.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_THRESHOLD) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
