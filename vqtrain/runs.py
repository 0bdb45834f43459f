"""A run is a folder: its options, metrics, pictures, checkpoints and model, and a lock so that no two share it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vqref.commandline import InputError, MachineError, UsageError
from vqref.files import write_file
from vqtrain.state import list_states, load_state

OPTIONS, METRICS, MODEL, CHECKPOINTS, PICTURES = "options.toml", "metrics.jsonl", "model.pt", "checkpoints", "pictures"


class RunFolder:
    """``runs/NAME`` while this process trains in it.

    options.toml   the resolved options, which ``--config`` reads back
    metrics.jsonl  a line an epoch
    pictures/      PNGs of every epoch
    checkpoints/   the last two states
    model.pt       the model after the last full epoch

    Raises MachineError where another process holds it or it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        from filelock import FileLock, Timeout

        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / PICTURES).mkdir(exist_ok=True)
            self._lock = FileLock(path / ".lock")
            self._lock.acquire(timeout=0)
        except Timeout:
            raise MachineError(f"{path}: another run is at work in this folder") from None
        except OSError as error:
            raise MachineError(f"{path}: cannot be written: {error.strerror}") from None

    def release(self) -> None:
        """Lets another process in."""
        self._lock.release()

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    def picture(self, epoch: int, what: str) -> Path:
        return self.path / PICTURES / f"epoch-{epoch:03d}-{what}.png"

    def write_options(self, options: Mapping[str, Mapping[str, Any]]) -> None:
        """The resolved options as TOML, a table a group."""
        import tomli_w

        write_file(self.path / OPTIONS, tomli_w.dumps(options).encode())

    def write_metrics(self, history: Sequence[Mapping[str, Any]]) -> None:
        """All epochs so far, a JSON object a line; written anew each time, so that a resumed run repeats none."""
        write_file(self.path / METRICS, "".join(json.dumps(line) + "\n" for line in history).encode())


def read_options(path: Path) -> dict[str, Any]:
    """The options of a TOML file, its tables flattened. Raises InputError."""
    import tomllib

    try:
        tables = tomllib.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not TOML: {error}") from None
    found: dict[str, Any] = {}
    for name, value in tables.items():
        found |= value if isinstance(value, dict) else {name: value}
    return found


def latest_state(run: Path) -> tuple[dict[str, Any], Path, list[str]] | None:
    """The newest sound checkpoint of a run, where it is, and why newer ones were passed over; None where there is none.

    Raises InputError where there are checkpoints and none is sound.
    """
    complaints: list[str] = []
    for path in list_states(run / CHECKPOINTS):
        try:
            return load_state(path), path, complaints
        except InputError as error:
            complaints.append(str(error))
    if complaints:
        raise InputError("; ".join(complaints))
    return None


def differences(course: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What stands otherwise in two sets of options, a phrase each."""
    return [f"{key} {other.get(key)!r}, not {course.get(key)!r}" for key in course if course[key] != other.get(key)]


def require_same_course(run: Path, course: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Raises UsageError that names what changed, where a checkpoint was made under other options."""
    if changed := differences(course, state["course"]):
        raise UsageError(f"{run} was begun with {', '.join(changed)}; use the same options, or another --name")
