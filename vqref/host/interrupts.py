"""SIGINT and SIGTERM as an exception that arrives where nothing is half done, and does arrive.

Python runs a signal's handler between two instructions of the main thread, whichever they are. If
they stand in a destructor or in the callback of a weak reference, what the handler raises is
dropped, and a library may catch it with everything else. So a signal stays pending until
``watched`` has seen Interrupted come by; until then a timer raises it again.

Signals belong to the process, and so does what this module knows of them. Standard library only,
and little of it: a program imports this before all else.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from vqref.host.streams import tell

TYPE_CHECKING = False  # as type checkers know it; typing itself takes long to import
if TYPE_CHECKING:
    from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)

AGAIN = 0.1
"""Seconds after which an Interrupted that has not arrived is raised again."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to end. ``exit_code`` is 130 for SIGINT, 143 for SIGTERM, as
    shells have it."""

    def __init__(self, signum: int, message: str = "interrupted") -> None:
        super().__init__(message)
        self.signum = signum
        self.exit_code = 128 + signum


class _State:
    """What the process knows of its signals.

    watching, guarding, holds: how many ``watched``, ``guarded`` and ``hold`` are entered.
    signalled: whether a signal has come. pending: which, until Interrupted has arrived. alarm: what
    the timer took the place of. deaf: whether signals change nothing any more.
    """

    watching = 0
    guarding = 0
    holds = 0
    signalled = False
    pending: int | None = None
    alarm: tuple[Any, tuple[float, float]] | None = None
    deaf = False


_state = _State()


@contextmanager
def hold() -> Iterator[None]:
    """A stretch that a signal must not cut: one training step, one save.

    The end of the outermost raises Interrupted if a signal came. Does nothing in threads, which
    signals do not reach.
    """
    if not _in_main_thread():
        yield
        return
    _state.holds += 1
    try:
        yield
    finally:
        _state.holds -= 1
        _deliver()


def watched() -> AbstractContextManager[None]:
    """While entered, the first signal raises Interrupted: at once, or when a ``hold`` ends.

    Its end raises Interrupted if that has not arrived, whatever else is being raised. Within
    ``guarded`` a second signal ends the process where it stands: files are published by renames, so
    that they stay whole. Elsewhere the process is somebody else's, and a second signal changes
    nothing. Does nothing in threads. May be entered within itself: the inner one sees Interrupted
    first.
    """
    return _Watch()


class _Watch:
    """``watched``. A generator would be cut by a signal that comes just before its end.

    guards: whether a second signal ends the process. last: whether signals are ignored afterwards,
    instead of what they did before.
    """

    def __init__(self, *, guards: bool = False, last: bool = False) -> None:
        self.guards, self.last = guards, last
        self.handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        if not _in_main_thread():
            return
        _state.holds += 1  # until all is in place, a signal is only noted
        self.hooks = sys.excepthook, sys.unraisablehook
        sys.excepthook, sys.unraisablehook = _without_interrupted(*self.hooks)
        self.handlers = {number: signal.signal(number, _handle) for number in SIGNALS}
        _state.watching += 1
        _state.guarding += self.guards
        _state.holds -= 1
        if _state.pending is not None:
            _arm()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        if not self.handlers:
            return
        _state.holds += 1
        for number, handler in self.handlers.items():
            signal.signal(number, signal.SIG_IGN if self.last else handler)
        missed = _settle()
        sys.excepthook, sys.unraisablehook = self.hooks
        _state.watching -= 1
        _state.guarding -= self.guards
        _state.signalled = _state.signalled and _state.watching > 0
        _state.holds -= 1
        if missed is not None and not isinstance(error, Interrupted):
            raise Interrupted(missed) from None


def guarded(prog: str, body: Callable[[], int], *, last: bool = False) -> int:
    """``body()`` under ``watched``; a signal becomes one line on stderr and its exit status.

    prog: what the line begins with. last: whether the process ends with this. Its exit status is
    then decided, and further signals do not change it.
    """
    try:
        with _Watch(guards=True, last=last):
            return body()
    except KeyboardInterrupt as stop:  # one of ours says which signal it was and what was saved
        _settle()
        tell(prog, str(stop) or "interrupted")
        return getattr(stop, "exit_code", 128 + signal.SIGINT)


def pending() -> int | None:
    """The signal that came and has not arrived as Interrupted yet: within a ``hold`` that is to
    last, the work may end by itself."""
    return _state.pending


def deafen() -> None:
    """Makes this signal and all further ones change nothing: the process is about to end, and how
    is decided."""
    _state.deaf = True
    _settle()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _handle(signum: int, frame: object) -> None:
    if _state.deaf:
        return
    if _state.signalled and _state.guarding:
        os._exit(128 + signum)
    _state.signalled, _state.pending = True, signum
    _deliver()


def _deliver(*_: object) -> None:
    """Raises the pending signal, unless something holds it or it is on its way already."""
    if _state.pending is None or _state.holds or _on_its_way():
        return
    _arm()
    raise Interrupted(_state.pending)


def _arm() -> None:
    """Starts the timer, on a system that has one: Windows has none."""
    if _state.alarm is None and hasattr(signal, "setitimer"):
        handler = signal.signal(signal.SIGALRM, _deliver)
        _state.alarm = handler, signal.setitimer(signal.ITIMER_REAL, AGAIN, AGAIN)


def _on_its_way() -> bool:
    """Whether an ``except`` or ``finally`` is at work on an Interrupted, which would be cut."""
    error, seen = sys.exception(), set()
    while error is not None and id(error) not in seen:
        if isinstance(error, Interrupted):
            return True
        seen.add(id(error))
        error = error.__context__
    return False


def _settle() -> int | None:
    """Stops the timer. Returns the signal that was pending, and no longer is."""
    pending, _state.pending = _state.pending, None
    if _state.alarm is not None:
        (handler, timer), _state.alarm = _state.alarm, None
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)
    return pending


def _without_interrupted(tell: Any, tell_dropped: Any) -> tuple[Any, Any]:
    """``sys.excepthook``, which C code calls that prints an error and goes on, and
    ``sys.unraisablehook``, which Python calls with an error that it drops, made to say nothing of
    Interrupted: it comes again."""

    def excepthook(kind: type[BaseException], error: BaseException, trace: object) -> None:
        if not isinstance(error, Interrupted):
            tell(kind, error, trace)

    def unraisablehook(dropped: Any) -> None:
        if not isinstance(dropped.exc_value, Interrupted):
            tell_dropped(dropped)

    return excepthook, unraisablehook
