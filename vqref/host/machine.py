"""Describes the machine and the versions with which a figure or a certificate was made."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vqref.host.streams import plain


def describe_machine(packages: Sequence[str]) -> dict[str, str | int]:
    """Returns processor, cores, system, Python version, and the versions of installed packages."""
    found: dict[str, str | int] = {
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
    }
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    """The processor's name, as well as the system knows it."""
    with suppress(OSError):  # some systems have no such file, or hide it
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return plain(line.partition(":")[2].strip())
    return platform.processor() or platform.machine()
