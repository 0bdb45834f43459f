"""Images and tokens in files: what the commands read and write."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vqref.commandline import InputError, MachineError, UsageError
from vqref.files import write_file
from vqref.images import OFFICIAL_NAMES, as_batch, read_npz
from vqref.pictures import load_any, picture_names
from vqref.spec import ModelSpec

Array = npt.NDArray[Any]

TOKEN_FORMATS = (".npz", ".npy", ".parquet")


def read_images(path: Path, spec: ModelSpec) -> tuple[npt.NDArray[np.float32], list[str] | None]:
    """Images (N, C, H, W) of a file or a folder, and the names of a folder's pictures. Raises InputError."""
    found = load_any(path)
    named = path.is_dir() and not any((path / train).is_file() for train, _ in OFFICIAL_NAMES)
    names = [picture.name for picture in picture_names(path)] if named else None
    try:
        return as_batch(found.train, spec.image_shape), names
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def require_format(path: Path, formats: tuple[str, ...]) -> None:
    """Raises UsageError unless the name ends as one of the formats does."""
    if path.suffix not in formats:
        raise UsageError(f"{path}: its name must end in {', '.join(formats[:-1])} or {formats[-1]}")


def write_indices(path: Path, indices: npt.NDArray[np.int64], names: list[str] | None) -> None:
    """Indices (N, S) as ``indices`` of an .npz, beside ``names`` where there are any; as an .npy; or as a .parquet with a
    column for each position, index_0 on. Raises MachineError where pyarrow is not installed."""
    buffer = io.BytesIO()
    if path.suffix == ".npy":
        np.save(buffer, indices, allow_pickle=False)
    elif path.suffix == ".npz":
        arrays: dict[str, Array] = {"indices": indices}
        if names is not None:
            arrays["names"] = np.array(names, dtype=np.str_)
        np.savez(buffer, allow_pickle=False, **arrays)
    else:
        pyarrow, parquet = _parquet(path)
        columns: dict[str, Any] = {} if names is None else {"name": names}
        columns |= {f"index_{position}": column for position, column in enumerate(indices.T)}
        parquet.write_table(pyarrow.table(columns), buffer)
    write_file(path, buffer.getvalue())


def read_indices(path: Path) -> Array:
    """Indices (N, S) of a file that ``write_indices`` wrote, or of any .npz with ``indices``. Raises InputError."""
    require_format(path, TOKEN_FORMATS)
    try:
        content = path.read_bytes()
        if path.suffix == ".npy":
            return np.asarray(np.load(io.BytesIO(content), allow_pickle=False))
        if path.suffix == ".npz":
            return read_npz(content)["indices"]
        _, parquet = _parquet(path)
        table = parquet.read_table(io.BytesIO(content))
        names = [name for name in table.column_names if name.startswith("index_")]
        return np.stack([table[f"index_{position}"].to_numpy() for position in range(len(names))], axis=1)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except KeyError as error:
        raise InputError(f"{path}: holds no {error}") from None
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: holds no tokens: {error}") from None


def write_probabilities(path: Path, probabilities: npt.NDArray[np.float32]) -> None:
    """(N, C, H, W) as ``probabilities`` of an .npz, or as an .npy."""
    buffer = io.BytesIO()
    if path.suffix == ".npy":
        np.save(buffer, probabilities, allow_pickle=False)
    else:
        np.savez_compressed(buffer, allow_pickle=False, probabilities=probabilities)
    write_file(path, buffer.getvalue())


def _parquet(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise MachineError(f"{path}: parquet needs pip install pyarrow") from None
    return pyarrow, pyarrow.parquet
