"""SIGINT and SIGTERM as exceptions that arrive only where nothing is half done."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from vqref.errors import ExitCode


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to end. ``exit_code`` is 130 for SIGINT, 143 for SIGTERM."""

    def __init__(self, signum: int, message: str = "interrupted") -> None:
        super().__init__(message)
        self.signum = signum
        self.exit_code = ExitCode.TERMINATED if signum == signal.SIGTERM else ExitCode.INTERRUPTED


class Interrupts:
    """While entered, the first signal raises Interrupted: at once, or when a ``hold`` ends.

    A second signal ends the process where it stands. Files are published by renames, so the last
    snapshot stays whole.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._pending: int | None = None
        self._holds = 0
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        self._former = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """A stretch that a signal must not cut: one training step, one save."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
        if self._pending is not None and not self._holds:
            self._deliver()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._signalled:
            os._exit(ExitCode.TERMINATED if signum == signal.SIGTERM else ExitCode.INTERRUPTED)
        self._signalled, self._pending = True, signum
        if not self._holds:
            self._deliver()

    def _deliver(self) -> None:
        """Raises the pending signal, once: it does not interrupt what is saved in answer to it."""
        signum, self._pending = self._pending, None
        if signum is not None:
            raise Interrupted(signum)
