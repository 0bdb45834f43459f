"""``python -m vqdeploy``: makes bundles of trained models, verifies and runs them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vqref.host.interrupts import guarded  # all else is imported once signals are watched


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the process's exit status.

    argv: the words of the command line; None takes the process's, whose end this then is.
    """
    return guarded("vqdeploy", lambda: _run(argv), last=argv is None)


def _run(argv: Sequence[str] | None) -> int:
    from vqref.host.commandline import run

    return run("vqdeploy", command, argv)


def command(argv: Sequence[str] | None) -> int:
    """Parses, and runs the command that is named."""
    from vqdeploy.commands import (
        bench,
        decode,
        doctor,
        encode,
        export,
        import_,
        inspect,
        page,
        prove,
        reconstruct,
        sample,
        triton,
        verify,
    )
    from vqref.host.commandline import run_command

    makers = (import_, export)
    users = (verify, prove, inspect, bench, encode, decode, reconstruct, sample)
    others = (triton, page, doctor)
    summary = (
        "Export VQ-VAEs, trained here or elsewhere, to ONNX bundles; prove, verify and run them."
    )
    return run_command(
        "vqdeploy", summary, [module.COMMAND for module in (*makers, *users, *others)], argv
    )


if __name__ == "__main__":
    sys.exit(main())
