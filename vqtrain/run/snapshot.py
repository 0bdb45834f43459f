"""Snapshots of a run: all that the next step depends on, with a digest. The last two are kept."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqref.errors import InputError, UsageError
from vqref.families import Size, spelt
from vqref.host.files import about, parsed, read_bytes, sweep, write_file
from vqref.host.pickles import require_bounded
from vqref.preprocessing import Preprocessing
from vqref.spec import ModelSpec
from vqtrain.model import VQVAE
from vqtrain.optimizers import Muon
from vqtrain.options import TrainingOptions
from vqtrain.run.fitting import require_fitting
from vqtrain.run.metrics import Meter

MAGIC = b"vqtrain-state 2 "
"""First bytes of a snapshot: the format and its version. The payload's sha256 in hexadecimal and a
newline follow."""

KEPT = 2

DATA, PICTURES = "data_sha256", ("resize", "crop", "background")
"""Entries of a course: which images it trains on, and how pictures are read."""

Course = Mapping[str, Any]
"""All that determines the steps of a run. Runs of the same course end with the same model."""


def course_of(
    spec: ModelSpec,
    options: TrainingOptions,
    sizes: Mapping[str, Size],
    data_sha256: str,
    held_out: float | str | None = None,
    preprocessing: Preprocessing | None = None,
    buffer: int | None = None,
) -> Course:
    """Returns the options, the network and the images of a run, as plain data.

    sizes: the family's sizes, by which users know the network; a digest of its rows is added.
    held_out: the share of the images, or the digest of other images; None for the source's own.
    preprocessing: what was done to pictures, None for arrays. buffer: images of a stream that are
    shuffled together, None for images in memory.
    """
    rows = json.dumps([layer.to_dict() for layer in spec.layers], sort_keys=True).encode()
    return {
        **options.to_dict(),
        "network": spec.family,
        **{name: spelt(size) for name, size in sizes.items()},
        "image_shape": list(spec.image_shape),
        "num_codes": spec.num_codes,
        "code_size": spec.code_size,
        "likelihood": spec.likelihood,
        "held_out": held_out,
        **_read_as(preprocessing),
        "buffer": buffer,
        DATA: data_sha256,
        "rows": hashlib.sha256(rows).hexdigest()[:12],
    }


def _read_as(preprocessing: Preprocessing | None) -> dict[str, Any]:
    """Returns how pictures are read, by the names of the options; None for arrays.

    The number of channels is part of the images' shape.
    """
    if preprocessing is None:
        return dict.fromkeys(PICTURES)
    known, size = preprocessing.to_dict(), preprocessing.size
    resize = None if size is None else "x".join(map(str, size))
    return {"resize": resize, "crop": known["crop"], "background": known["background"]}


def differences(course: Course, other: Course) -> list[str]:
    """Returns a phrase for each difference of two courses; leaves out those that others cause."""
    changed = {key: other.get(key) for key in course if course[key] != other.get(key)}
    if len(changed) > 1:
        changed.pop("rows", None)
    if not changed.keys().isdisjoint(PICTURES):
        changed.pop(DATA, None)
    return [_phrase(key, was, course[key]) for key, was in changed.items()]


def _phrase(key: str, was: Any, now: Any) -> str:
    if key == DATA:
        return f"other images (sha256 {was!s:.12}, not {now!s:.12})"
    return f"{key} {was!r}, not {now!r}"


def require_same_course(run: Path, course: Course, state: Mapping[str, Any]) -> None:
    """Raises UsageError that names the changes if a snapshot belongs to another course."""
    if changed := differences(course, state["course"]):
        raise UsageError(
            f"{run} was begun with {', '.join(changed)}; use the same options, or another --name"
        )


@dataclass
class RunState:
    """The state of a run. Steps change it in place.

    model, optimizer: what is trained. choices: the generator of the rules' random choices.
    meter: what was measured since the epoch began. order: the state of the images' order generator
    when the epoch began.
    epoch, step, seconds: epochs done, and steps and seconds spent in the next one.
    history: a line of metrics per epoch. finished: the last epoch is done and ``output`` written.
    """

    model: VQVAE
    optimizer: torch.optim.Optimizer
    choices: torch.Generator
    meter: Meter
    order: Tensor
    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False

    def to_plain(self) -> dict[str, Any]:
        """Returns the content of a snapshot: tensors and plain data."""
        return {
            "model": self.model.state_dict(),
            "quantizer_steps": self.model.quantizer.steps,
            "optimizer": self.optimizer.state_dict(),
            "choices": self.choices.get_state(),
            "meter": self.meter.state(),
            "finished": self.finished,
            **{name: getattr(self, name) for name in _KEPT_AS_IT_IS},
        }

    def load(self, plain: Mapping[str, Any]) -> None:
        """Loads what ``to_plain`` returned: all of it, or nothing.

        Raises InputError that names an entry that does not fit this run.
        """
        name = "muon" if isinstance(self.optimizer, Muon) else "adam"
        require_fitting(plain, self.model.spec, name)
        self.model.load_state_dict(plain["model"])
        self.model.quantizer.steps.copy_(plain["quantizer_steps"])
        self._load_optimizer(plain["optimizer"])
        self.choices.set_state(plain["choices"])
        self.meter.load(plain["meter"])
        for name in _KEPT_AS_IT_IS:
            setattr(self, name, plain[name])

    def _load_optimizer(self, plain: Mapping[str, Any]) -> None:
        """Loads only the moments and the counts of steps.

        The options give the rest; this run's device decides where tensors are kept.
        """
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": plain["state"], "param_groups": groups})


_KEPT_AS_IT_IS = ("order", "epoch", "step", "seconds", "history")


def save_state(folder: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Writes the snapshot of ``step`` (steps since the start), and removes all but the last KEPT.

    Raises OSError, and then leaves the earlier snapshots as they were.
    """
    payload = io.BytesIO()
    torch.save(state, payload)
    content = payload.getvalue()
    path = folder / f"step-{step:08d}.state"
    folder.mkdir(exist_ok=True)
    sweep(folder, r"step-\d+\.state")
    write_file(path, MAGIC + hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    for old in list_states(folder)[KEPT:]:
        old.unlink()
    return path


def list_states(folder: Path) -> list[Path]:
    """Returns the snapshots in a folder, the latest first."""
    return sorted(folder.glob("step-*.state"), reverse=True)


def load_state(path: Path) -> dict[str, Any]:
    """Returns the state in a snapshot. Executes nothing.

    Raises InputError for a file that is damaged, foreign or of another version.
    """
    head, _, content = read_bytes(path).partition(b"\n")
    if not head.startswith(MAGIC):
        other = head.startswith(MAGIC.split(b" ")[0] + b" ")
        what = "a snapshot of another format version" if other else "not a snapshot of vqtrain"
        raise InputError(f"{path}: {what}")
    if head[len(MAGIC) :] != hashlib.sha256(content).hexdigest().encode():
        raise InputError(f"{path}: damaged: its sha256 is not the one that it was sealed with")
    with about(path), parsed("refused: its payload is not plain data; nothing was executed"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            require_bounded(archive)
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise InputError(f"{path}: not a snapshot of vqtrain")
    return state
