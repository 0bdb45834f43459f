"""``model.pt``: written whole or not at all, and read without executing anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from vqref.modelfile import Model, read, with_arrays, write


def read_model(path: Path) -> Model:
    """The model in a file that ``write_model`` wrote. Raises InputError."""
    model, _ = read(path, lambda file: torch.load(file, map_location="cpu", weights_only=True))
    return model


def write_model(path: Path, model: Model) -> None:
    """Publishes the model at ``path``. Raises OSError; ``path`` is then as it was."""
    write(path, model, _save)


def _save(plain: dict[str, Any], file: BinaryIO) -> None:
    torch.save(with_arrays(plain, lambda array: torch.from_numpy(np.asarray(array))), file)
