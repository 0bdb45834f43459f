"""``python -m vqref``: what the oracle gives to other programs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vqref.commandline import ExitCode, Parser, count, run


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the process's exit status."""
    return run("vqref", command, argv)


def command(argv: Sequence[str] | None) -> int:
    arguments = build_parser().parse(argv)
    return int(arguments.run(arguments))


def build_parser() -> Parser:
    parser = Parser(prog="vqref", description="The oracle's answers, for implementations in any language.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    vectors = commands.add_parser("vectors", help="write conformance vectors as JSON and npz")
    vectors.add_argument("folder", type=Path, metavar="DIR", help="a folder; files of these names in it are replaced")
    vectors.add_argument("--seed", type=count, default=0, help="of the random cases")
    vectors.set_defaults(run=_vectors)
    return parser


def _vectors(arguments: argparse.Namespace) -> int:
    from vqref.files import write_file
    from vqref.vectors import conformance_vectors

    folder: Path = arguments.folder
    files = conformance_vectors(arguments.seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_file(folder / name, content)
    print(f"wrote {', '.join(files)} to {folder}")
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
