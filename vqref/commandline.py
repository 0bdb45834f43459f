"""What every command line of the toolkit shares: exit codes, one-line errors, and a parser that names the nearest option.

Standard library only, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
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
        """``parse_args`` with an answer to unknown options that names the nearest known one."""
        parsed, unknown = self.parse_known_args(argv)
        if unknown:
            word = next((word for word in unknown if word.startswith("-")), unknown[0]).split("=")[0]
            self.error(f"unknown {'option' if word.startswith('-') else 'argument'} {word}{self._nearest(word)}")
        return parsed

    def _nearest(self, word: str) -> str:
        close = difflib.get_close_matches(word, list(self._known_options()), n=1, cutoff=0.5)
        return f"; did you mean {close[0]}?" if close else ""

    def _known_options(self) -> Iterator[str]:
        for action in self._actions:
            yield from action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    yield from parser._known_options()

    def error(self, message: str) -> NoReturn:
        one_line = " ".join(message.split())
        self.exit(ExitCode.USAGE, f"{self.prog}: {one_line} (see {self.prog} --help)\n")


def positive(text: str) -> int:
    """The type of options that count: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def run(prog: str, command: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Runs ``command(argv)`` and turns expected failures into one line on stderr and an ``ExitCode``.

    Anything else is a bug and keeps its traceback.
    """
    try:
        return command(argv)
    except CommandError as error:
        return _say(prog, str(error), error.exit_code)
    except BrokenPipeError:  # the reader of our output closed it (`| head`): nothing left to say, to anyone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAILED
    except OSError as error:  # commands check their inputs; what is left is the disk, the memory, the rights
        return _say(prog, f"{error.filename or 'the system'}: {error.strerror}", ExitCode.ENVIRONMENT)
    except KeyboardInterrupt:
        return _say(prog, "interrupted", ExitCode.INTERRUPTED)


def _say(prog: str, message: str, code: ExitCode) -> int:
    print(f"{prog}: {' '.join(message.split())}", file=sys.stderr)
    return code
