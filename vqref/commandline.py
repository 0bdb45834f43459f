"""What every command line of the toolkit shares: exit codes, one-line errors, and a parser that names the nearest option.

Standard library only, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NoReturn


class ExitCode(IntEnum):
    """What a process's exit status means, in all packages."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    BAD_INPUT = 3
    PARITY = 4
    ENVIRONMENT = 5
    INTERRUPTED = 130
    TERMINATED = 143


class CommandError(Exception):
    """An expected failure: its message is the one line that the user reads, ``exit_code`` the process's status."""

    exit_code = ExitCode.FAILED


class UsageError(CommandError):
    """The command was asked for something that its options do not allow."""

    exit_code = ExitCode.USAGE


class InputError(CommandError, ValueError):
    """A file or an array is not what the command can work with."""

    exit_code = ExitCode.BAD_INPUT


class MachineError(CommandError):
    """The machine lacks something: the device, the space, the right to write, the network."""

    exit_code = ExitCode.ENVIRONMENT


class Parser(argparse.ArgumentParser):
    """``ArgumentParser`` that prints defaults, never guesses abbreviations, and answers an error with one line."""

    def __init__(self, **options: object) -> None:
        options.setdefault("allow_abbrev", False)
        options.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(**options)  # type: ignore[arg-type]

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


def run(prog: str, command: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Runs ``command(argv)`` and turns expected failures into one line on stderr and an ``ExitCode``.

    Anything else is a bug and keeps its traceback.
    """
    try:
        try:
            return command(argv)
        finally:
            sys.stdout.flush()  # here, where what goes wrong with it can still be said
    except CommandError as error:
        return _say(prog, str(error), error.exit_code)
    except BrokenPipeError:  # the reader of our output closed it (`| head`): nothing left to say, to anyone
        _discard_output()
        return ExitCode.FAILED
    except OSError as error:  # commands check their inputs; what is left is the disk and the rights
        if error.filename is None:
            _discard_output()
        return _say(prog, f"{error.filename or 'standard output'}: {error.strerror or error}", ExitCode.ENVIRONMENT)
    except MemoryError as error:
        return _say(prog, f"not enough memory: {error}", ExitCode.ENVIRONMENT)
    except KeyboardInterrupt as error:  # one of ours says which signal it was and what was saved
        return _say(prog, str(error) or "interrupted", getattr(error, "exit_code", ExitCode.INTERRUPTED))


def _discard_output() -> None:
    """Sends what stdout still holds nowhere, so that the interpreter's last flush has nothing to complain of."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(prog: str, message: str, code: ExitCode) -> int:
    print(f"{prog}: {' '.join(message.split())}", file=sys.stderr)
    return code
