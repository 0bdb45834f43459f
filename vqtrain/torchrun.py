"""What torchrun tells a process through the environment. Standard library only."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import NoReturn

from vqref.errors import CommandError, UsageError


def world() -> int:
    """Returns the number of ranks; 1 if torchrun did not start this process."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def rank() -> int:
    """Which of all ranks this process is, from 0."""
    return int(os.environ["RANK"]) if world() > 1 else 0


def local_rank() -> int:
    """Which of this machine's ranks this process is, from 0."""
    return int(os.environ["LOCAL_RANK"]) if world() > 1 else 0


def local_world() -> int:
    """How many ranks this machine has."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if world() > 1 else 1


@contextmanager
def said_once() -> Iterator[None]:
    """Lets only rank 0 speak where all ranks fail alike, as they read the command line.

    The others end with the same exit code.
    """
    if rank() == 0:
        yield
        return
    with (
        Path(os.devnull).open("w") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
    ):
        try:
            yield
        except CommandError as error:
            raise SystemExit(error.exit_code) from None


def require_one_process(command: str) -> None:
    """Raises UsageError under torchrun with several ranks, which ``command`` cannot use."""
    if world() > 1:
        raise UsageError(f"{command} works in one process; start it without torchrun")


def leave(code: int) -> NoReturn:
    """Ends a rank's process before its libraries shut down.

    About one process in fifty aborted as its connections were shut down, however the run ended.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
