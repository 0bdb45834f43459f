"""What every command line shares: typed options, one-line errors, a parser that names the
nearest option.

A command is a frozen dataclass of options and a function that takes it:

    @dataclass(frozen=True, kw_only=True)
    class InspectOptions:
        bundle: Path = option(type=Path, help="the bundle")
        json: bool = option("--json", default=False, action="store_true", help="print JSON")

    COMMAND = Command("inspect", "say what a bundle holds", InspectOptions, inspect)

Standard library only, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from vqref.errors import CommandError, ExitCode


def option(*flags: str, default: Any = dataclasses.MISSING, help: str, **how: Any) -> Any:
    """A field of a command's options, filled by the parser.

    flags: its option strings; none for a positional argument, which takes the field's name.
    default: None where the absence of an option means something else than a value of it.
    how: what ``argparse`` takes besides: type, choices, metavar, action, nargs.
    """
    return dataclasses.field(default=default, metadata={"flags": flags, "help": help, **how})


@dataclass(frozen=True)
class Command:
    """One command of a program: its name, a line on what it does, its options and its function.

    options: a frozen dataclass whose fields are made by ``option``. run: takes an instance of it
    and returns the exit code.
    """

    name: str
    summary: str
    options: type[Any]
    run: Callable[[Any], int]


def run_command(
    prog: str, summary: str, commands: Sequence[Command], argv: Sequence[str] | None
) -> int:
    """Parses ``argv``, fills the options of the command that it names, and runs it."""
    parser = Parser(prog=prog, description=summary)
    named = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")
    for command in commands:
        each = named.add_parser(command.name, help=command.summary, description=command.summary)
        each.add_options(command.options)
    found = parser.parse(argv)
    chosen = next(command for command in commands if command.name == found.command)
    return chosen.run(fill(chosen.options, found))


def fill(options: type[Any], found: argparse.Namespace) -> Any:
    """An instance of ``options`` with what was parsed for its fields."""
    return options(
        **{field.name: getattr(found, field.name) for field in dataclasses.fields(options)}
    )


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to a help text, unless there is none to speak of."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """``ArgumentParser`` that prints defaults, never guesses abbreviations, and answers an error
    with one line."""

    def __init__(self, **options: object) -> None:
        options.setdefault("allow_abbrev", False)
        options.setdefault("formatter_class", HelpFormatter)
        super().__init__(**options)  # type: ignore[arg-type]

    def add_options(self, options: type[Any]) -> None:
        """Adds an argument for each field of a dataclass whose fields are made by ``option``."""
        for field in dataclasses.fields(options):
            how = dict(field.metadata)
            flags, default = how.pop("flags"), field.default
            if default is dataclasses.MISSING:
                self.add_argument(*(flags or [field.name]), **how)
            elif not flags:
                self.add_argument(field.name, nargs="?", default=default, **how)
            else:
                self.add_argument(*flags, dest=field.name, default=default, **how)

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """``parse_args`` that first looks for unknown options, and names the nearest known one."""
        words = list(sys.argv[1:] if argv is None else argv)
        known = self._known_options(words)
        for word in itertools.takewhile(lambda word: word != "--", words):
            option = word.split("=")[0]
            if option.startswith("--") and option not in known:
                self.error(f"unknown option {option}{self.nearest(option, known)}")
        return self.parse_args(words)

    def nearest(self, word: str, known: Sequence[str] | None = None) -> str:
        """ "; did you mean …?" with the known option most like ``word``, or nothing."""
        close = difflib.get_close_matches(word, known or self._known_options([]), n=1, cutoff=0.5)
        return f"; did you mean {close[0]}?" if close else ""

    def _known_options(self, words: Sequence[str]) -> list[str]:
        """This parser's options and those of the command that is named first among ``words``."""
        options = [option for action in self._actions for option in action.option_strings]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                named = next((word for word in words if word in action.choices), None)
                options += action.choices[named]._known_options(words) if named else []
        return options

    def error(self, message: str) -> NoReturn:
        one_line = " ".join(message.split())
        self.exit(ExitCode.USAGE, f"{self.prog}: {one_line} (see {self.prog} --help)\n")


def positive(text: str) -> int:
    """The type of options that count: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def count(text: str) -> int:
    """The type of options that count from 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not at least 0")
    return value


def run(
    prog: str, command: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None
) -> int:
    """Runs ``command(argv)`` and turns expected failures into one line on stderr and an
    ``ExitCode``.

    Anything else is a bug and keeps its traceback.
    """
    try:
        try:
            return command(argv)
        finally:
            sys.stdout.flush()  # here, where what goes wrong with it can still be said
    except CommandError as error:
        return _say(prog, str(error), error.exit_code)
    except (
        BrokenPipeError
    ):  # the reader of our output closed it (`| head`): nothing left to say, to anyone
        _discard_output()
        return ExitCode.FAILED
    except OSError as error:  # commands check their inputs; what is left is the disk and the rights
        if error.filename is None:
            _discard_output()
        return _say(
            prog,
            f"{error.filename or 'standard output'}: {error.strerror or error}",
            ExitCode.ENVIRONMENT,
        )
    except MemoryError as error:
        return _say(prog, f"not enough memory: {error}", ExitCode.ENVIRONMENT)
    except KeyboardInterrupt as error:  # one of ours says which signal it was and what was saved
        return _say(
            prog, str(error) or "interrupted", getattr(error, "exit_code", ExitCode.INTERRUPTED)
        )


def _discard_output() -> None:
    """Sends what stdout still holds nowhere, so that the interpreter's last flush has nothing to
    complain of."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(prog: str, message: str, code: ExitCode) -> int:
    print(f"{prog}: {' '.join(message.split())}", file=sys.stderr)
    return code
