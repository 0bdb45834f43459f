"""``python -m vqtrain``: trains a model, measures one, or learns a prior over its tokens."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vqref.host.interrupts import guarded  # the rest is imported once signals are watched

TYPE_CHECKING = False  # type checkers take it as True; typing itself is slow to import
if TYPE_CHECKING:
    import argparse

    from vqref.host.commandline import Command, Parser

COMMANDS = {"evaluate": "vqtrain.commands.evaluate", "prior": "vqtrain.commands.prior"}
"""The named commands and their modules; each module has a COMMAND. Training has no name."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line, and returns the process's exit status.

    argv: the words of the command line. None takes the process's own, and may end the process here.
    """
    try:
        code = guarded("vqtrain", lambda: _run(argv), last=argv is None)
    except SystemExit as end:  # from a rank that lets another one report the error
        if argv is not None or not isinstance(end.code, int):
            raise
        code = end.code
    from vqtrain.torchrun import leave, world

    if argv is None and world() > 1:
        leave(code)
    return code


def _run(argv: Sequence[str] | None) -> int:
    from vqref.host.commandline import run

    return run("vqtrain", command, argv)


def command(argv: Sequence[str] | None) -> int:
    """Parses the words and runs the command that they name."""
    from importlib import import_module

    from vqref.host.commandline import Parser, fill
    from vqtrain.torchrun import require_one_process, said_once

    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in COMMANDS:
        found: Command = import_module(COMMANDS[words[0]]).COMMAND
        parser = Parser(prog=f"vqtrain {found.name}", description=found.summary)
        parser.add_options(found.options)
        with said_once():
            options = fill(found.options, parser.parse(words[1:]))
            require_one_process(found.name)
        return found.run(options)
    from vqtrain.commands.train import TrainOptions, train

    with said_once():
        options = fill(TrainOptions, parse_with_config(build_parser(), words))
    return train(options)


def build_parser() -> Parser:
    """Returns the parser of training."""
    from typing import cast

    from vqref.host.commandline import Parser
    from vqtrain.commands.train import GROUPS

    parser = Parser(
        prog="vqtrain",
        description="Train a VQ model on images, checking it against the NumPy oracle.",
        epilog="python -m vqtrain evaluate model.pt measures a model, and python -m vqtrain prior "
        "model.pt learns a prior over its tokens: see their --help.",
    )
    parser.add_version()
    for title, options in GROUPS.items():
        group = parser.add_argument_group(title) if title else parser
        Parser.add_options(cast(Parser, group), options)
    return parser


def parse_with_config(parser: Parser, words: list[str]) -> argparse.Namespace:
    """Returns the arguments. Those of the command line override those of ``--config``.

    Raises InputError for a file that is not TOML, names an unknown option, or gives an option a
    value of the wrong kind.
    """
    found = parser.parse(words)
    if found.config is None:
        return found
    from vqref.errors import InputError
    from vqtrain.run.folder import read_options

    actions = {each.dest: each for each in parser._actions if each.dest not in ("help", "config")}
    from_file: list[str] = []
    for key, value in read_options(found.config).items():
        if key not in actions:
            near = parser.nearest("--" + key.replace("_", "-"))
            raise InputError(f"{found.config}: unknown option {key}{near}")
        if wrong := _what_is_wrong(actions[key], value):
            raise InputError(f"{found.config}: {key} is {wrong}")
        flags = actions[key].option_strings  # a switch has a flag to set it, then one to clear it
        if isinstance(value, bool):
            from_file += flags[:1] if value else flags[1:2]
        else:
            from_file.append(f"{flags[0]}={value}")
    return parser.parse(from_file + words)


def _what_is_wrong(action: argparse.Action, value: str | bool | float) -> str | None:
    """Returns what is wrong with a value from a file; None if the command line could give it."""
    if action.nargs == 0 and not isinstance(value, bool):
        return f"{value!r}; it must be true or false"
    if action.nargs != 0 and isinstance(value, bool):
        return f"{str(value).lower()}; it must be a number or a text"
    if isinstance(value, str) and "\0" in value:
        return f"{value!r}; a text must not contain a null character"
    return None


if __name__ == "__main__":
    sys.exit(main())
