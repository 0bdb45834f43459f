"""``python -m vqdeploy``: makes bundles of trained models, verifies and runs them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vqdeploy.commands import (
    bench,
    decode,
    doctor,
    encode,
    export,
    inspect,
    reconstruct,
    sample,
    verify,
)
from vqref.host.commandline import run, run_command

SUMMARY = "Export trained VQ-VAEs to ONNX bundles, and verify and run them."

COMMANDS = (
    export.COMMAND,
    verify.COMMAND,
    inspect.COMMAND,
    bench.COMMAND,
    encode.COMMAND,
    decode.COMMAND,
    reconstruct.COMMAND,
    sample.COMMAND,
    doctor.COMMAND,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the process's exit status."""
    return run("vqdeploy", lambda words: run_command("vqdeploy", SUMMARY, COMMANDS, words), argv)


if __name__ == "__main__":
    sys.exit(main())
