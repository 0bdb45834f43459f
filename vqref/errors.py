"""The failures that a user can meet, and the exit codes of all programs. Standard library only."""

from __future__ import annotations

from enum import IntEnum
from typing import Any


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
    """An expected failure: its message is the one line that the user reads, ``exit_code`` what the
    process returns."""

    exit_code = ExitCode.FAILED


class Remark(RuntimeWarning):
    """What the user of a command should know although it goes on: a line on stderr."""


class UsageError(CommandError):
    """The command was asked for something that its options do not allow."""

    exit_code = ExitCode.USAGE


class InputError(CommandError, ValueError):
    """A file or an array is not what the command can work with."""

    exit_code = ExitCode.BAD_INPUT


class MachineError(CommandError):
    """The machine lacks something: the device, the space, the right to write, the network."""

    exit_code = ExitCode.ENVIRONMENT


class ParityError(CommandError):
    """Two implementations disagree by more than rounding explains.

    ``report`` is the ``vqref.agreement.Report`` of the checks made until then, or None.
    """

    exit_code = ExitCode.PARITY

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report
