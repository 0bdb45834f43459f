"""Signals: each is answered once, by one line and its exit code, whatever the process does.

Real signals go to real processes.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from support import ROOT

from benchmarks.hostile.signals import campaign, is_right
from vqref.host.interrupts import Interrupted, guarded, hold, watched

START = """
import os, signal, sys, time, weakref
from vqref.host.interrupts import guarded, hold, watched
def kill(number=signal.SIGTERM):
    os.kill(os.getpid(), number)
def long():
    end = time.monotonic() + 60
    while time.monotonic() < end:
        pass
"""
END = "\nsys.exit(guarded('tool', body, last=True))"


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Starts a program in a new process, in an empty folder, with this project on its path."""
    with tempfile.TemporaryDirectory() as folder:
        return _run([sys.executable, "-c", code, *arguments], Path(folder))


def _run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


DROPPED = {
    "the callback of a weak reference": """
class Thing: pass
def body():
    thing = Thing()
    reference = weakref.ref(thing, lambda _: kill())
    del thing
    long()
""",
    "a destructor": """
class Thing:
    def __del__(self): kill()
def body():
    Thing()
    long()
""",
    "C code that prints what its callback raised": """
import ctypes
callback = ctypes.CFUNCTYPE(None)(kill)
def body():
    callback()
    long()
""",
    "an except that takes everything": """
def body():
    try:
        kill()
    except BaseException:
        pass
    long()
""",
    "an except that makes another error of it": """
def body():
    try:
        kill()
    except BaseException as error:
        raise RuntimeError("failed") from error
""",
    "a command that then comes to its end": """
class Thing:
    def __del__(self): kill()
def body():
    Thing()
    return 0
""",
}


@pytest.mark.parametrize("where", DROPPED)
def test_a_signal_whose_exception_is_dropped_arrives_all_the_same(where):
    done = python(START + DROPPED[where] + END)
    assert (done.returncode, done.stderr) == (143, "tool: interrupted\n")


def test_what_cleans_up_after_a_signal_is_not_cut_by_its_repetition():
    code = """
def body():
    try:
        kill(signal.SIGINT)
    finally:
        try:
            raise ValueError
        except ValueError:
            end = time.monotonic() + 0.5
            while time.monotonic() < end:
                pass
        print("cleaned")
"""
    done = python(START + code + END)
    assert (done.returncode, done.stdout) == (130, "cleaned\n")
    assert done.stderr == "tool: interrupted\n"


TWICE = """
def twice():
    with watched(), hold():
        kill(signal.SIGINT)
        kill(signal.SIGINT)
        print("went on")
"""


def test_a_second_signal_ends_a_command_at_once():
    done = python(START + TWICE + "guarded('tool', twice)")
    assert (done.returncode, done.stdout) == (130, "")


def test_a_second_signal_does_not_end_a_process_that_is_no_command():
    code = """
for _ in range(2):
    try:
        twice()
    except KeyboardInterrupt:
        print("interrupted")
"""
    done = python(START + TWICE + code)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == 2 * "went on\ninterrupted\n"


def test_a_signal_after_the_end_of_a_command_does_not_change_its_exit_status():
    code = """
import atexit
def body():
    atexit.register(lambda: (kill(), kill(signal.SIGINT)))
    return 3
"""
    done = python(START + code + END)
    assert (done.returncode, done.stderr) == (3, "")


def kill(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def test_a_signal_waits_for_the_end_of_the_outermost_hold():
    reached = []

    def held():
        with hold():
            with hold():
                kill(signal.SIGINT)
                reached.append("the end of the inner")
            reached.append("the end of the outer")
        reached.append("what comes after")

    with pytest.raises(Interrupted) as caught, watched():
        held()
    assert reached == ["the end of the inner", "the end of the outer"]
    assert caught.value.exit_code == 130


def test_a_failure_in_a_hold_is_no_way_around_a_signal():
    def failing():
        with watched(), hold():
            kill()
            raise OSError

    with pytest.raises(Interrupted):
        failing()


def test_what_answers_a_signal_that_arrived_may_hold():
    def answering():
        try:
            with watched():
                kill()
        except Interrupted:
            with hold():
                time.sleep(0.3)  # longer than the time until it is raised again
            saved.append(True)
            raise

    saved: list[bool] = []
    with pytest.raises(Interrupted), watched():
        answering()
    assert saved


def test_everything_is_put_back():
    def state():
        handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
        timer = signal.getitimer(signal.ITIMER_REAL)
        return [*handlers, timer, sys.excepthook, sys.unraisablehook]

    former = state()
    with pytest.raises(Interrupted), watched(), watched():
        kill()
    assert state() == former
    with watched():
        assert state() != former
    assert state() == former


def test_a_thread_neither_watches_nor_holds():
    found = []

    def elsewhere():
        before = signal.getsignal(signal.SIGTERM)
        with watched(), hold():
            found.append(signal.getsignal(signal.SIGTERM) is before)

    with watched():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert found == [True]


def test_a_keyboard_interrupt_of_other_making_is_130(capsys):
    def body():
        raise KeyboardInterrupt

    assert guarded("tool", body) == 130
    assert capsys.readouterr().err == "tool: interrupted\n"


PROGRAMS = {"vqtrain": "torch", "vqdeploy": "numpy", "vqref": "numpy"}
"""The programs, each with a library that it imports to do something."""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to look into")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_first_signal_that_a_program_can_answer_is_one_line(program, number, tmp_path):
    """Until then, Python itself answers. The signal is sent as soon as SIGTERM is caught."""
    process = subprocess.Popen(
        [sys.executable, "-m", program, "evaluate", "nothing"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    status, caught = Path(f"/proc/{process.pid}/status"), 0
    while not caught >> (signal.SIGTERM - 1) & 1:
        caught = int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16)
    process.send_signal(number)
    assert process.communicate(timeout=60)[1] == f"{program}: interrupted\n"
    assert process.returncode == 128 + number


IMPORTING = """
import os, signal, sys
from importlib import import_module
library = sys.argv.pop(1)
class Signalling:
    def find_spec(name, path=None, target=None):
        if name == library:
            sys.meta_path.remove(Signalling)
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Signalling)
sys.exit(import_module(f"{sys.argv.pop(1)}.__main__").main())
"""
LIBRARIES = {
    "argparse": ("vqdeploy", "doctor"),
    "numpy.linalg": ("vqref", "vectors", "vectors"),
    "torch.nn": ("vqtrain", "evaluate", "model.pt"),
    "onnxruntime.capi": ("vqdeploy", "doctor"),
}


@pytest.mark.parametrize("module", LIBRARIES)
def test_a_signal_while_a_library_is_imported_is_one_line(module):
    program, *words = LIBRARIES[module]
    done = python(IMPORTING, module, program, *words)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == f"{program}: interrupted\n"


def test_the_packages_as_libraries_leave_signals_alone():
    code = """
import signal, vqref, vqtrain.__main__, vqdeploy.__main__, vqref.__main__, vqref.host.commandline
from vqdeploy import Codec
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
"""
    done = python(code)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("state", "code", "said"),
    [
        ("watched", 0, ""),  # the signal is swallowed
        ("watched", -15, ""),
        ("watched", 130, "vqtrain: interrupted\n"),  # SIGINT's
        ("watched", 143, ""),
        ("watched", 143, "vqtrain: interrupted\nException ignored in: x\n"),
        ("late", 120, ""),
        ("early", 1, "Traceback (most recent call last):\n"),
    ],
)
def test_a_signal_that_is_not_answered_is_found(state, code, said):
    assert is_right("watched", signal.SIGTERM, 143, "vqtrain: interrupted\n")
    assert not is_right(state, signal.SIGTERM, code, said)


def test_signals_at_random_moments_are_answered_and_runs_end_at_the_same_bits():
    """Sends a few; ``python -m benchmarks.hostile.signals`` sends as many as you like."""
    found = campaign(1, epochs=2, others=())
    assert found.wrong == []
    assert (found.sent, found.ends > 0) == (2, True)
