"""Reads what torchrun tells a process through the environment. Needs only the standard library."""

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
    """Returns the number of this process among all ranks, from 0."""
    return int(os.environ["RANK"]) if world() > 1 else 0


def local_rank() -> int:
    """Returns the number of this process among this machine's ranks, from 0."""
    return int(os.environ["LOCAL_RANK"]) if world() > 1 else 0


def local_world() -> int:
    """Returns the number of ranks on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if world() > 1 else 1


@contextmanager
def said_once() -> Iterator[None]:
    """Lets only rank 0 print, since all ranks fail alike as they read the command line.

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
    """Ends a rank's process without shutting down its libraries.

    About one process in fifty aborted while its connections shut down, however the run had ended.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
