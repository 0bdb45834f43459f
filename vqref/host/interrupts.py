"""SIGINT and SIGTERM as an exception that arrives, and only where nothing is half done.

Python runs a signal's handler between any two instructions of the main thread. In a destructor or
in the callback of a weak reference, Python drops what the handler raises. A library may also catch
it with everything else. So a signal stays pending until ``watched`` has seen Interrupted arrive.
Until then, a timer raises it again and again.

Signals belong to the process, and so does the state of this module. Standard library only, and
little of it, because programs import this module before all others.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from vqref.host.streams import tell

TYPE_CHECKING = False  # type checkers take it for true; importing typing takes long
if TYPE_CHECKING:
    from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)

AGAIN = 0.1
"""Seconds after which an Interrupted that has not arrived is raised again."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to end.

    ``exit_code`` is 130 for SIGINT and 143 for SIGTERM, as in shells.
    """

    def __init__(self, signum: int, message: str = "interrupted") -> None:
        super().__init__(message)
        self.signum = signum
        self.exit_code = 128 + signum


class _State:
    """What the process knows of its signals.

    watching, guarding, holds: how many ``watched``, ``guarded`` and ``hold`` are entered.
    signalled: whether a signal has come.
    pending: that signal, until Interrupted has arrived.
    alarm: the handler and the timer that ours replaced.
    deaf: whether signals no longer change anything.
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
    """Protects work that a signal must not cut: one training step, one save.

    Raises Interrupted at the end of the outermost ``hold`` if a signal came. Does nothing in
    threads, because signals do not reach them.
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
    """Makes the first signal raise Interrupted: at once, or when a ``hold`` ends.

    At the end, raises Interrupted if it has not arrived, even if another exception is being raised.
    Within ``guarded``, a second signal ends the process at once. Files stay whole, because they are
    published by renames. Outside ``guarded``, the process belongs to somebody else, and a second
    signal changes nothing. Does nothing in threads. May be nested: the inner one sees Interrupted
    first.
    """
    return _Watch()


class _Watch:
    """``watched`` as a class, because a signal just before its end would cut a generator.

    guards: whether a second signal ends the process.
    last: whether signals are ignored afterwards. If not, their former handlers return.
    """

    def __init__(self, *, guards: bool = False, last: bool = False) -> None:
        self.guards, self.last = guards, last
        self.handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        if not _in_main_thread():
            return
        _state.holds += 1  # a signal is only noted until everything is in place
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
    """Runs ``body()`` under ``watched``. A signal gives one line on stderr and its exit status.

    prog: the start of that line.
    last: whether the process ends after this. Its exit status is then decided, and further signals
        do not change it.
    """
    try:
        with _Watch(guards=True, last=last):
            return body()
    except KeyboardInterrupt as stop:  # an Interrupted names the signal and what was saved
        _settle()
        tell(prog, str(stop) or "interrupted")
        return getattr(stop, "exit_code", 128 + signal.SIGINT)


def pending() -> int | None:
    """Returns the signal that came, if it has not yet arrived as Interrupted; else None.

    Long work within a ``hold`` can ask this and end by itself.
    """
    return _state.pending


def deafen() -> None:
    """Makes this signal and all further ones change nothing.

    For a process that is about to end and whose exit status is decided.
    """
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
    """Raises the pending signal, unless something holds it or it is already on its way."""
    if _state.pending is None or _state.holds or _on_its_way():
        return
    _arm()
    raise Interrupted(_state.pending)


def _arm() -> None:
    """Starts the timer if the system has one. Windows has none."""
    if _state.alarm is None and hasattr(signal, "setitimer"):
        handler = signal.signal(signal.SIGALRM, _deliver)
        _state.alarm = handler, signal.setitimer(signal.ITIMER_REAL, AGAIN, AGAIN)


def _on_its_way() -> bool:
    """Whether an ``except`` or ``finally`` is handling an Interrupted; a new one would cut it."""
    error, seen = sys.exception(), set()
    while error is not None and id(error) not in seen:
        if isinstance(error, Interrupted):
            return True
        seen.add(id(error))
        error = error.__context__
    return False


def _settle() -> int | None:
    """Stops the timer. Returns the signal that was pending and forgets it."""
    pending, _state.pending = _state.pending, None
    if _state.alarm is not None:
        (handler, timer), _state.alarm = _state.alarm, None
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)
    return pending


def _without_interrupted(tell: Any, tell_dropped: Any) -> tuple[Any, Any]:
    """Returns both hooks, changed so that they do not report Interrupted, which comes again.

    C code that prints an error and continues calls ``sys.excepthook``. Python calls
    ``sys.unraisablehook`` with an error that it drops.
    """

    def excepthook(kind: type[BaseException], error: BaseException, trace: object) -> None:
        if not isinstance(error, Interrupted):
            tell(kind, error, trace)

    def unraisablehook(dropped: Any) -> None:
        if not isinstance(dropped.exc_value, Interrupted):
            tell_dropped(dropped)

    return excepthook, unraisablehook
