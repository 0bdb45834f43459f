"""``python -m vqtrain``: trains a model on images, or measures one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import cast

from vqref.errors import InputError
from vqref.host.commandline import Command, Parser, fill, run
from vqtrain.commands.train import GROUPS, TrainOptions, train

COMMANDS = {"evaluate": "vqtrain.commands.evaluate"}
"""Commands beside training, which has no name, and their modules, each with a COMMAND."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the process's exit status."""
    return run("vqtrain", command, argv)


def command(argv: Sequence[str] | None) -> int:
    """Parses, and runs what is asked for."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in COMMANDS:
        found: Command = import_module(COMMANDS[words[0]]).COMMAND
        parser = Parser(prog=f"vqtrain {found.name}", description=found.summary)
        parser.add_options(found.options)
        return found.run(fill(found.options, parser.parse(words[1:])))
    return train(fill(TrainOptions, parse_with_config(build_parser(), words)))


def build_parser() -> Parser:
    """The parser of training."""
    parser = Parser(
        prog="vqtrain",
        description="Train a VQ model on images, held to the NumPy oracle as it goes.",
        epilog="python -m vqtrain evaluate model.pt measures a model: see vqtrain evaluate --help.",
    )
    for title, options in GROUPS.items():
        group = parser.add_argument_group(title) if title else parser
        Parser.add_options(cast(Parser, group), options)
    return parser


def parse_with_config(parser: Parser, words: list[str]) -> argparse.Namespace:
    """The arguments, those of ``--config`` first, so that the command line has the last word.

    Raises InputError for a file that is not TOML or names an unknown option.
    """
    found = parser.parse(words)
    if found.config is None:
        return found
    from vqtrain.run.folder import read_options

    known = {action.dest: action.option_strings for action in parser._actions}
    from_file: list[str] = []
    for key, value in read_options(found.config).items():
        if key not in known:
            near = parser.nearest("--" + key.replace("_", "-"))
            raise InputError(f"{found.config}: unknown option {key}{near}")
        flags = known[key]  # of a switch: what sets it, then what clears it, if anything does
        if isinstance(value, bool):
            from_file += flags[:1] if value else flags[1:2]
        else:
            from_file += [flags[0], str(value)]
    return parser.parse(from_file + words)


if __name__ == "__main__":
    sys.exit(main())
