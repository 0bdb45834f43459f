"""Reads and writes ``model.pt``. Writes the whole file or nothing; reading executes no code."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from vqref.modelfile import Model, read, with_arrays, write


def read_model(path: Path) -> Model:
    """Returns the model from a file that ``write_model`` wrote. Raises InputError."""
    model, _ = read(path, lambda file: torch.load(file, map_location="cpu", weights_only=True))
    return model


def write_model(path: Path, model: Model) -> None:
    """Writes the model to ``path``. Raises OSError, and then leaves ``path`` as it was."""
    write(path, model, _save)


def _save(plain: dict[str, Any], file: BinaryIO) -> None:
    torch.save(with_arrays(plain, lambda array: torch.from_numpy(np.asarray(array))), file)
