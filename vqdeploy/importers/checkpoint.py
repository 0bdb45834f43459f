"""Reads files of tensors from other libraries as plain data."""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vqdeploy.sources import read_checkpoint
from vqref.errors import InputError
from vqref.host.files import about, is_folder, read_bytes
from vqref.modelfile import FORMAT
from vqref.validation import Array

ENDINGS = (".safetensors", ".bin", ".pt", ".ckpt")
"""The endings of files of weights in a folder, in order of preference."""


@dataclass(frozen=True)
class Checkpoint:
    """A file of tensors.

    path, sha256, size: the file, the digest of its bytes, and their number.
    entries: the content. Tensors are PyTorch's or NumPy's, depending on the file.
    """

    path: Path
    sha256: str
    size: int
    entries: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """Reads a file, or the only file of weights in a folder. Raises InputError."""
        path = _weights(path) if is_folder(path) else path
        content = read_bytes(path)
        with about(path):
            entries = read_checkpoint(content)
            if not isinstance(entries, dict):
                raise InputError(f"holds {type(entries).__name__}, expected tensors by their names")
            if entries.get("format") == FORMAT:
                raise InputError("is a model.pt already; export takes it as it is")
        return cls(path, hashlib.sha256(content).hexdigest(), len(content), entries)

    @property
    def tables(self) -> dict[str, dict[str, Any]]:
        """The dictionaries of tensors in the file, by their entries; "" is the file itself."""
        tables = {"": self.entries, **self.entries}
        return {
            str(name): {str(key): value for key, value in table.items()}
            for name, table in tables.items()
            if isinstance(table, dict) and any(map(is_tensor, table.values()))
        }

    def options(self) -> dict[str, Any]:
        """Returns the options that a trainer kept of its command line, {} if there are none."""
        args = self.entries.get("args")
        return dict(vars(args)) if isinstance(args, argparse.Namespace) else {}


@dataclass(frozen=True)
class Tensor:
    """A tensor of floating numbers.

    dtype: the name of its dtype in the file; NumPy may lack it. values: finite; float32 if NumPy
    lacks the dtype, else unchanged.
    """

    dtype: str
    values: Array


def is_tensor(value: Any) -> bool:
    """Returns whether a value has a dtype and a shape, as tensors and arrays have."""
    return hasattr(value, "dtype") and hasattr(value, "shape")


def claimed(value: Any) -> int:
    """Returns how many bytes a tensor claims to have, 0 for another value."""
    return math.prod(value.shape) * int(value.dtype.itemsize) if is_tensor(value) else 0


def floats(name: str, value: Any) -> Tensor:
    """Returns a tensor of floating numbers. Raises InputError that names it if it is not one."""
    if not is_tensor(value):
        raise InputError(f"{name} is {type(value).__name__}, expected a tensor")
    dtype = str(value.dtype).removeprefix("torch.")
    if "float" not in dtype:
        raise InputError(f"the tensor {name} is {dtype}, expected floating numbers")
    try:
        values = _as_array(value)
    except (TypeError, RuntimeError, NotImplementedError):  # sparse, quantized, on no device
        raise InputError(f"the tensor {name} is not a dense array of {dtype}") from None
    if not np.isfinite(values).all():
        at = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
        raise InputError(f"the tensor {name} holds {values[at]} at {at}, expected finite numbers")
    return Tensor(dtype, values)


def _as_array(value: Any) -> Array:
    """Returns an array in the tensor's dtype, or in float32 if NumPy lacks that dtype.

    float32 holds every bfloat16 and float8.
    """
    if isinstance(value, np.ndarray):
        return value
    value = value.detach()
    wide = str(value.dtype) in ("torch.float16", "torch.float32", "torch.float64")
    return np.asarray(value if wide else value.float())


def _weights(folder: Path) -> Path:
    """Returns the only file of weights in a folder. Raises InputError for none or several."""
    for ending in ENDINGS:
        found = sorted(path for path in folder.iterdir() if path.suffix == ending)
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(path.name for path in found[:4])
            raise InputError(f"{folder}: holds {names}; name the one to import")
    raise InputError(f"{folder}: holds no file of weights ({', '.join(ENDINGS)})")
