"""``python -m vqref``: commands that give the oracle's answers to other programs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vqref.host.interrupts import guarded  # all else is imported once signals are watched


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the process's exit status.

    argv: the words of the command line. None takes the process's own, which then ends here.
    """
    return guarded("vqref", lambda: _run(argv), last=argv is None)


def _run(argv: Sequence[str] | None) -> int:
    from vqref.host.commandline import run

    return run("vqref", command, argv)


def command(argv: Sequence[str] | None) -> int:
    """Parses ``argv`` and runs the command that it names."""
    from vqref.commands.vectors import COMMAND
    from vqref.host.commandline import run_command

    summary = "Give the oracle's answers to implementations in any language."
    return run_command("vqref", summary, (COMMAND,), argv)


if __name__ == "__main__":
    sys.exit(main())
