"""``model.pt``: written whole or not at all, and read without executing anything."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch

from vqref.host.files import write_file
from vqref.modelfile import DIGEST, Model, digest, read, seal, with_arrays


def read_model(path: Path) -> Model:
    """The model in a file that ``write_model`` wrote. Raises InputError."""
    model, _ = read(path, lambda file: torch.load(file, map_location="cpu", weights_only=True))
    return model


def write_model(path: Path, model: Model) -> None:
    """Publishes the model at ``path``. Raises OSError; ``path`` is then as it was."""
    plain = model.to_plain()
    plain[DIGEST] = digest(plain)
    content = io.BytesIO()
    torch.save(with_arrays(plain, lambda array: torch.from_numpy(np.asarray(array))), content)
    write_file(path, seal(content.getvalue()))
