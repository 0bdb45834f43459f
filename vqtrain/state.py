"""Checkpoints of a run: everything that the next step depends on, sealed with a digest, the last two kept."""

from __future__ import annotations

import hashlib
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from vqref.commandline import InputError
from vqref.files import write_file

MAGIC = b"vqtrain-state 1 "
"""First bytes of a checkpoint: the format and its version; the payload's sha256 in hexadecimal and a newline follow."""

KEPT = 2


def save_state(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Writes the checkpoint of ``step`` (steps taken since the start) and removes all but the last KEPT.

    Raises OSError; the earlier checkpoints are then as they were.
    """
    payload = io.BytesIO()
    torch.save(state, payload)
    content = payload.getvalue()
    path = folder / f"step-{step:08d}.state"
    folder.mkdir(exist_ok=True)
    write_file(path, MAGIC + hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    for old in list_states(folder)[KEPT:]:
        old.unlink()
    return path


def list_states(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the latest first."""
    return sorted(folder.glob("step-*.state"), reverse=True)


def load_state(path: Path) -> dict[str, Any]:
    """The state in a checkpoint. Executes nothing. Raises InputError for a damaged, foreign or newer file."""
    try:
        head, _, content = path.read_bytes().partition(b"\n")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if not head.startswith(MAGIC):
        newer = head.startswith(MAGIC.split(b" ")[0] + b" ")
        raise InputError(f"{path}: {'a checkpoint of another format version' if newer else 'not a checkpoint of vqtrain'}")
    if head[len(MAGIC) :] != hashlib.sha256(content).hexdigest().encode():
        raise InputError(f"{path}: damaged: its sha256 is not the one that it was sealed with")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on a payload that is about to be refused
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise InputError(f"{path}: refused: its payload is not plain data; nothing was executed") from error
    if not isinstance(state, dict):
        raise InputError(f"{path}: not a checkpoint of vqtrain")
    return state
