"""``python -m vqref``: what the oracle gives to other programs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vqref.host.interrupts import guarded  # all else is imported once signals are watched


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the process's exit status.

    argv: the words of the command line; None takes the process's, whose end this then is.
    """
    return guarded("vqref", lambda: _run(argv), last=argv is None)


def _run(argv: Sequence[str] | None) -> int:
    from vqref.host.commandline import run

    return run("vqref", command, argv)


def command(argv: Sequence[str] | None) -> int:
    """Parses, and runs the command that is named."""
    from vqref.commands.vectors import COMMAND
    from vqref.host.commandline import run_command

    summary = "The oracle's answers, for implementations in any language."
    return run_command("vqref", summary, (COMMAND,), argv)


if __name__ == "__main__":
    sys.exit(main())
