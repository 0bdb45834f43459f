"""Prints what a program says, one line at a time, even if its streams are closed or broken.

Standard library only.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress

TYPE_CHECKING = False  # type checkers take it for true; importing typing takes long
if TYPE_CHECKING:
    from typing import Any

LONGEST_LINE = 1000
"""The most characters of an error line. A longer line loses its middle."""


def plain(text: str) -> str:
    r"""Returns ``text`` with escapes such as "\x1b" for characters that are not printable.

    So a name from a file cannot move the cursor, break the line or hide anything.
    """
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def tell(prog: str, message: str) -> None:
    """Prints an error or a remark as one line on stderr, if stderr is open."""
    line = plain(f"{prog}: {' '.join(message.split())}")
    if len(line) > LONGEST_LINE:
        line = f"{line[: LONGEST_LINE // 2]} … {line[-LONGEST_LINE // 2 :]}"
    if sys.stderr is not None:
        try:
            print(line, file=sys.stderr, flush=True)
        except OSError:
            discard(sys.stderr)


def prepare() -> None:
    """Opens any closed standard stream to the null device, so that no file gets its number.

    Characters that the terminal lacks are then printed as escapes.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            # the system assigns the lowest free number
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: PTH123, SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def discard(stream: Any) -> None:
    """Sends what a stream still holds to the null device.

    So the interpreter's last flush does not fail.
    """
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
