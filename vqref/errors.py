"""The errors that a user can meet, and the exit codes of all programs. Standard library only."""

from __future__ import annotations

from enum import IntEnum
from typing import Any


class ExitCode(IntEnum):
    """The exit status of a process, the same in all packages."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    BAD_INPUT = 3
    PARITY = 4
    ENVIRONMENT = 5
    INTERRUPTED = 130
    TERMINATED = 143


class CommandError(Exception):
    """An expected failure. Its message is the one line that the user reads.

    ``exit_code`` is the exit status of the process.
    """

    exit_code = ExitCode.FAILED


class Remark(RuntimeWarning):
    """A warning to the user of a command that continues: one line on stderr."""


class UsageError(CommandError):
    """The user asked for something that the command's options do not allow."""

    exit_code = ExitCode.USAGE


class InputError(CommandError, ValueError):
    """The command cannot use a file or an array."""

    exit_code = ExitCode.BAD_INPUT


class MachineError(CommandError):
    """The machine lacks something: the device, the space, the right to write, the network."""

    exit_code = ExitCode.ENVIRONMENT


class ParityError(CommandError):
    """Two implementations disagree by more than rounding explains.

    ``report`` is the ``vqref.agreement.Report`` of the checks made so far, or None.
    """

    exit_code = ExitCode.PARITY

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report
