"""``python -m vqdeploy``: turns trained models into bundles, verifies and runs them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vqref.host.interrupts import guarded  # other imports wait until signals are handled


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status of the process.

    argv: the words of the command line. If it is None, this takes the words of the process, and
    the process ends with this call.
    """
    return guarded("vqdeploy", lambda: _run(argv), last=argv is None)


def _run(argv: Sequence[str] | None) -> int:
    from vqref.host.commandline import run

    return run("vqdeploy", command, argv)


def command(argv: Sequence[str] | None) -> int:
    """Parses the command line and runs the command that it names."""
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
