"""What every command line shares: typed options, one-line errors, and a parser.

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
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from vqref.errors import CommandError, ExitCode, Remark
from vqref.host.extras import PACKAGE, missing
from vqref.host.interrupts import guarded
from vqref.host.streams import discard, prepare, tell

MOST = 2**63 - 1
"""The largest value of an option: the largest int64, because seeds and sizes must fit one."""

_OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|[Ff]ailed to allocate|bad alloc")
"""How libraries that raise no MemoryError say that memory is full."""


def option(*flags: str, default: Any = dataclasses.MISSING, help: str, **how: Any) -> Any:
    """Declares a field of a command's options, which the parser fills.

    flags: the option strings. Without any, it is a positional argument with the field's name.
    default: None if no value means the same as leaving the option out.
    how: further arguments of ``argparse``: type, choices, metavar, action, nargs.
    """
    return dataclasses.field(default=default, metadata={"flags": flags, "help": help, **how})


@dataclass(frozen=True)
class Command:
    """One command of a program: its name, a one-line summary, its options and its function.

    options: a frozen dataclass. Its fields are made by ``option``.
    run: takes an instance of it and returns the exit code.
    """

    name: str
    summary: str
    options: type[Any]
    run: Callable[[Any], int]


def run_command(
    prog: str, summary: str, commands: Sequence[Command], argv: Sequence[str] | None
) -> int:
    """Parses ``argv``, fills the options of the command that it names, and runs that command."""
    parser = Parser(prog=prog, description=summary)
    parser.add_version()
    named = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")
    for command in commands:
        each = named.add_parser(command.name, help=command.summary, description=command.summary)
        each.add_options(command.options)
    found = parser.parse(argv)
    chosen = next(command for command in commands if command.name == found.command)
    return chosen.run(fill(chosen.options, found))


def fill(options: type[Any], found: argparse.Namespace) -> Any:
    """Returns an instance of ``options`` with the parsed values of its fields."""
    return options(
        **{field.name: getattr(found, field.name) for field in dataclasses.fields(options)}
    )


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to a help text, unless it is None or False."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` with defaults in its help, no abbreviations, and one-line errors."""

    def __init__(self, **options: object) -> None:
        options.setdefault("allow_abbrev", False)
        options.setdefault("formatter_class", HelpFormatter)
        super().__init__(**options)  # type: ignore[arg-type]

    def add_version(self) -> None:
        """Adds ``--version``."""
        self.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")

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
        """Parses like ``parse_args``, but for an unknown option names the nearest known one."""
        words = list(sys.argv[1:] if argv is None else argv)
        known = self._known_options(words)
        for word in itertools.takewhile(lambda word: word != "--", words):
            option = word.split("=")[0]
            if option.startswith("--") and option not in known:
                self.error(f"unknown option {option}{self.nearest(option, known)}")
            if word.endswith("=--"):  # argparse would take "--" for the end of the options
                self.error(f"argument {option}: '--' is no value; for a file, write ./--")
        return self.parse_args(words)

    def nearest(self, word: str, known: Sequence[str] | None = None) -> str:
        """Returns "; did you mean …?" with the known option most like ``word``, or nothing."""
        close = difflib.get_close_matches(word, known or self._known_options([]), n=1, cutoff=0.5)
        return f"; did you mean {close[0]}?" if close else ""

    def _known_options(self, words: Sequence[str]) -> list[str]:
        """Returns this parser's options and those of the first command named in ``words``."""
        options = [option for action in self._actions for option in action.option_strings]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                named = next((word for word in words if word in action.choices), None)
                options += action.choices[named]._known_options(words) if named else []
        return options

    def _print_message(self, message: str, file: Any = None) -> None:
        """Writes like argparse, but raises if the output cannot be written."""
        (file or sys.stdout).write(message)

    def error(self, message: str) -> NoReturn:
        tell(self.prog, f"{message} (see {self.prog} --help)")
        self.exit(ExitCode.USAGE)


class _Version(argparse.Action):
    """Prints the version of the packages."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version

        print(f"{parser.prog} of {PACKAGE} {version(PACKAGE)}")
        parser.exit()


def whole(least: int, most: int = MOST) -> Callable[[str], int]:
    """Returns the type of options that are integers from ``least`` to ``most``."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} is not at least {least}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{text} is not at most {most}")
        return value

    number.__name__ = "int"  # the name in argparse's error for a text that is no integer
    return number


def real(least: float, most: float) -> Callable[[str], float]:
    """Returns the type of options that are numbers from ``least`` to ``most``."""

    def number(text: str) -> float:
        value = float(text)
        if not least <= value <= most:  # also true for nan
            raise argparse.ArgumentTypeError(f"{text} is not from {least:g} to {most:g}")
        return value

    number.__name__ = "float"
    return number


positive = whole(1)
"""The type of options that are counts: an integer of at least 1."""

count = whole(0)
"""The type of options that count from 0, and of seeds."""


def run(
    prog: str, command: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None
) -> int:
    """Runs ``command(argv)``. Signals and expected failures end in one line and an ``ExitCode``.

    The line goes to stderr. Any other exception is a bug and keeps its traceback. Libraries print
    nothing on stderr. A ``Remark`` is printed as one line.
    """
    prepare()
    return guarded(prog, lambda: _answer(prog, command, argv))


def _answer(
    prog: str, command: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None
) -> int:
    try:
        try:
            with _remarks(prog):
                return command(argv)
        except ModuleNotFoundError as error:
            raise missing(error) or error from None
        finally:
            sys.stdout.flush()  # here, because its errors can still be reported
    except CommandError as error:
        return _fail(prog, str(error), error.exit_code)
    except BrokenPipeError:
        # the reader of our output closed it (`| head`), so nobody reads more
        discard(sys.stdout)
        return ExitCode.FAILED
    except OSError as error:  # commands check their inputs, so this is the disk or the permissions
        if error.filename is None:
            discard(sys.stdout)
        what = f"{error.filename or 'standard output'}: {error.strerror or error}"
        return _fail(prog, what, ExitCode.ENVIRONMENT)
    except (RecursionError, OverflowError) as error:
        return _fail(prog, f"too large, or nested too deeply: {error}", ExitCode.BAD_INPUT)
    except Exception as error:
        if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
            return _fail(prog, f"not enough memory: {error}", ExitCode.ENVIRONMENT)
        raise


@contextmanager
def _remarks(prog: str) -> Iterator[None]:
    """While a command runs, hides warnings other than ``Remark`` and logs without a handler."""
    last_resort, logging.lastResort = logging.lastResort, None
    raising, logging.raiseExceptions = logging.raiseExceptions, False

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        if issubclass(category, Remark):
            tell(prog, str(message))

    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    finally:
        logging.lastResort, logging.raiseExceptions = last_resort, raising


def _fail(prog: str, message: str, code: ExitCode) -> int:
    tell(prog, message)
    return code
