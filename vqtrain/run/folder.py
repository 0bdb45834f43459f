"""The folder of a run: options, metrics, pictures, snapshots and model, locked for one process."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vqref.errors import InputError, MachineError
from vqref.host.files import about, parsed, read_bytes, write_file
from vqref.host.streams import plain
from vqtrain.run.fitting import require_course
from vqtrain.run.snapshot import (
    Course,
    differences,
    list_states,
    load_state,
    require_same_course,
)

OPTIONS, METRICS, USE, MODEL, SNAPSHOTS, PICTURES = (
    "options.toml",
    "metrics.jsonl",
    "use.jsonl",
    "model.pt",
    "snapshots",
    "pictures",
)

State = dict[str, Any]
Say = Callable[[str], None]
Require = Callable[[State], None]
Option = str | bool | int | float

LARGEST_OPTIONS = 2**14
"""The most bytes in a file of options."""


class RunFolder:
    """``runs/NAME`` while this process trains in it.

    options.toml   the resolved options, which ``--config`` reads back
    metrics.jsonl  a line per epoch
    use.jsonl      a line per epoch: how often codes were chosen
    pictures/      PNGs of every epoch, or every few
    report.html    a page that shows all of this, see ``vqtrain.run.webreport``
    snapshots/     the last two states
    model.pt       the model after the last full epoch

    held: whether this process works in the folder; else it only knows the name.

    Raises MachineError if another process holds the folder, or if it cannot be made.
    """

    def __init__(self, path: Path, *, held: bool = True) -> None:
        from filelock import FileLock, Timeout

        self.path = path
        self._lock = FileLock(path / ".lock")
        if not held:
            return
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / PICTURES).mkdir(exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise MachineError(f"{path}: another run is at work in this folder") from None
        except OSError as error:
            raise MachineError(f"{path}: cannot be written: {error.strerror}") from None

    def release(self) -> None:
        """Releases the folder to other processes."""
        self._lock.release()

    @property
    def snapshots(self) -> Path:
        return self.path / SNAPSHOTS

    def picture(self, epoch: int, what: str) -> Path:
        """Returns the path of a picture of an epoch."""
        return self.path / PICTURES / f"epoch-{epoch:03d}-{what}.png"

    def write_options(self, options: Mapping[str, Mapping[str, Any]]) -> None:
        """Writes the resolved options as TOML, a table per group."""
        import tomli_w

        text = tomli_w.dumps(options)
        write_file(self.path / OPTIONS, text.encode(errors="surrogateescape"))  # paths are bytes

    def write_metrics(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Writes all epochs so far, a JSON object per line, so that a resumed run repeats none."""
        lines = "".join(json.dumps(line) + "\n" for line in history)
        write_file(self.path / METRICS, lines.encode())

    def settings(self) -> dict[str, Any]:
        """Returns the tables that ``write_options`` wrote, or {}. Raises OSError, ValueError."""
        import tomllib

        path = self.path / OPTIONS
        if not path.exists():
            return {}
        return tomllib.loads(path.read_bytes().decode(errors="surrogateescape"))

    def write_use(self, epoch: int, use: Mapping[str, Any]) -> None:
        """Adds an epoch's use of codes, plain data, to that of earlier epochs."""
        kept = {number: line for number, line in self.read_use().items() if number < epoch}
        lines = "".join(
            json.dumps(line) + "\n" for line in (*kept.values(), {"epoch": epoch, **use})
        )
        write_file(self.path / USE, lines.encode())

    def read_use(self) -> dict[int, dict[str, Any]]:
        """Returns what ``write_use`` wrote, by epoch. Skips damaged lines."""
        found = {}
        path = self.path / USE
        for line in path.read_bytes().splitlines() if path.exists() else ():
            with suppress(ValueError, TypeError, KeyError):
                use = json.loads(line)
                found[int(use["epoch"])] = use
        return found


def read_options(path: Path) -> dict[str, Option]:
    """Returns the options in all tables of a TOML file: text, booleans and finite numbers.

    Raises InputError.
    """
    import tomllib

    content = read_bytes(path, LARGEST_OPTIONS)
    with about(path):
        with parsed("not TOML"):
            tables = tomllib.loads(content.decode(errors="surrogateescape"))
        found: dict[str, Option] = {}
        for name, value in tables.items():
            for key, option in value.items() if isinstance(value, dict) else [(name, value)]:
                if key in found:
                    raise InputError(f"{plain(key)} is given twice")
                found[key] = _option(key, option)
    return found


def _option(name: str, value: Any) -> Option:
    """Returns the value. Raises InputError if no option can have it."""
    if not isinstance(value, Option):
        raise InputError(f"{plain(name)} is a {type(value).__name__}, expected text or a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{plain(name)} is {value}, expected a finite number")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise InputError(f"{plain(name)} is an integer of more than 64 bits")
    return value


def latest_state(
    run: Path, require: Require = require_course
) -> tuple[State, Path, list[str]] | None:
    """Returns a run's newest sound snapshot, its path, and why newer ones were skipped.

    Returns None if the run has no snapshots. Raises InputError if it has some and none is sound.

    require: raises InputError for a state that is not sound.
    """
    complaints: list[str] = []
    for path in list_states(run / SNAPSHOTS):
        try:
            state = load_state(path)
            with about(path):
                require(state)
            return state, path, complaints
        except InputError as error:
            complaints.append(str(error))
    if complaints:
        raise InputError("; ".join(complaints))
    return None


def open_run(
    runs: Path,
    name: str | None,
    default_name: str,
    resume: str,
    course: Course,
    say: Say,
    fits: Require,
) -> tuple[RunFolder, State | None]:
    """Opens and locks the run's folder; returns it and the state to continue from, if any.

    runs: the folder of all runs. name: this run's. None takes the last run named ``default_name``
    if it can continue, else that name with a new number. resume: "auto", "never", or the path of a
    snapshot or a run. fits: raises InputError for a snapshot of the same course that does not fit.
    Such a snapshot is skipped, like a damaged one.

    Raises UsageError if a snapshot belongs to another course, InputError if a run cannot continue,
    and MachineError if another process holds its folder.
    """

    def require(state: State) -> None:
        require_course(state)
        if not differences(course, state["course"]):
            fits(state)

    if resume not in ("auto", "never"):
        return _resume_from(Path(resume), course, require, say)
    if name is not None:
        path = runs / name
        if resume == "never" and path.exists():
            raise InputError(f"{path}: exists already; use another --name")
        folder = RunFolder(path)
        return folder, _go_on(folder, course, require, say, named=True)
    taken = _numbered(runs, default_name)
    if taken and resume == "auto":
        with suppress(MachineError):  # another process holds it, so this run gets a new folder
            folder = RunFolder(taken[-1])
            state = _go_on(folder, course, require, say, named=False)
            if state is not None:
                return folder, state
            folder.release()
    numbered = default_name if not taken else f"{default_name}-{len(taken) + 1}"
    return RunFolder(runs / numbered), None


def _resume_from(path: Path, course: Course, require: Require, say: Say) -> tuple[RunFolder, State]:
    """Opens the run of the given snapshot, or the given run at its last snapshot."""
    if path.is_dir():
        states = list_states(path / SNAPSHOTS)
        if not states:
            raise InputError(f"{path}: holds no snapshots")
        path = states[0]
    state = load_state(path)
    with about(path):
        require(state)
    run = path.parent.parent
    require_same_course(run, course, state)
    folder = RunFolder(run)
    say(f"going on from {path}")
    return folder, state


def _go_on(
    folder: RunFolder, course: Course, require: Require, say: Say, *, named: bool
) -> State | None:
    """Returns the state of an unfinished run of the same course; None to begin a new one.

    A named run must have the same course and be unfinished.
    """
    found = latest_state(folder.path, require)
    if found is None:
        return None
    state, path, complaints = found
    for complaint in complaints:
        say(f"skipped: {complaint}")
    if named:
        require_same_course(folder.path, course, state)
        if state["finished"]:
            raise InputError(f"{folder.path}: is finished; use another --name")
    elif differences(course, state["course"]) or state["finished"]:
        return None
    say(f"going on from {path}")
    return state


def _numbered(runs: Path, name: str) -> list[Path]:
    """Returns NAME, NAME-2, NAME-3, … while they exist."""
    found: list[Path] = []
    while (path := runs / (f"{name}-{len(found) + 1}" if found else name)).exists():
        found.append(path)
    return found
