"""What a program says, one line at a time, whatever has become of the streams that it says it on.
Standard library only."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

TYPE_CHECKING = False  # as type checkers know it; typing itself takes long to import
if TYPE_CHECKING:
    from typing import Any

LONGEST_LINE = 1000
"""Characters of an error; what is longer loses its middle."""


def plain(text: str) -> str:
    r"""``text`` with escapes, as "\x1b", for all that is not printed as a character: so that a name
    from a file moves no cursor, breaks no line and hides nothing."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def tell(prog: str, message: str) -> None:
    """Says an error or a remark in one line on stderr, if there is anybody who reads that."""
    line = plain(f"{prog}: {' '.join(message.split())}")
    if len(line) > LONGEST_LINE:
        line = f"{line[: LONGEST_LINE // 2]} … {line[-LONGEST_LINE // 2 :]}"
    if sys.stderr is not None:
        try:
            print(line, file=sys.stderr, flush=True)
        except OSError:
            discard(sys.stderr)


def prepare() -> None:
    """Opens what is closed of the three streams, to nowhere, so that no file gets their numbers;
    and lets output be printed whose characters the terminal lacks, as escapes."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            # the system gives the lowest number that is free
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: PTH123, SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def discard(stream: Any) -> None:
    """Sends what a stream still holds nowhere, so that the interpreter's last flush has nothing to
    complain of."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
