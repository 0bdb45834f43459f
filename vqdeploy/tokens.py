"""Images and tokens in files, as the commands read and write them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vqref.errors import InputError, MachineError, UsageError
from vqref.host.files import about, is_folder, parsed, read_bytes, write_file
from vqref.host.images import LARGEST_ARRAY, OFFICIAL_NAMES, as_batch, read_npy, read_npz
from vqref.host.pictures import load_any, picture_names
from vqref.host.streams import plain
from vqref.spec import ModelSpec
from vqref.validation import Array

TOKEN_FORMATS = (".npz", ".npy", ".parquet")

LARGEST_FOOTER = 2**24
"""The longest text, and the most entries of a list, in what a parquet file says of itself."""


def read_images(path: Path, spec: ModelSpec) -> tuple[npt.NDArray[np.float32], list[str] | None]:
    """Images (N, C, H, W) of a file or a folder, and the names of a folder's pictures.

    Raises InputError.
    """
    found = load_any(path)
    named = is_folder(path) and not any((path / train).is_file() for train, _ in OFFICIAL_NAMES)
    names = [plain(picture.name) for picture in picture_names(path)] if named else None
    with about(path):
        return as_batch(found.train, spec.image_shape), names


def require_format(path: Path, formats: tuple[str, ...]) -> None:
    """Raises UsageError unless the name ends as one of the formats does."""
    if path.suffix not in formats:
        raise UsageError(f"{path}: its name must end in {', '.join(formats[:-1])} or {formats[-1]}")


def write_indices(
    path: Path, indices: npt.NDArray[np.int64], names: list[str] | None, spec: ModelSpec
) -> None:
    """Writes indices (N, S) in the smallest unsigned type that holds them.

    .npz holds ``indices``, and ``names`` if there are any; .npy the array alone; .parquet a column
    ``indices`` of lists of S, a column ``key`` of names if there are any, and in its metadata
    latent_shape and num_codes. Raises MachineError if pyarrow is not installed.
    """
    small = indices.astype(np.min_scalar_type(spec.num_codes - 1))
    buffer = io.BytesIO()
    if path.suffix == ".npy":
        np.save(buffer, small, allow_pickle=False)
    elif path.suffix == ".npz":
        arrays: dict[str, Array] = {"indices": small}
        if names is not None:
            arrays["names"] = np.array(names, dtype=np.str_)
        np.savez(buffer, allow_pickle=False, **arrays)
    else:
        pyarrow, parquet = _parquet(path)
        rows = pyarrow.FixedSizeListArray.from_arrays(small.ravel(), small.shape[1])
        columns = {"indices": rows} if names is None else {"key": names, "indices": rows}
        said = {"latent_shape": json.dumps(spec.latent_shape), "num_codes": str(spec.num_codes)}
        table = pyarrow.table(columns).replace_schema_metadata(said)
        parquet.write_table(table, buffer)
    write_file(path, buffer.getvalue())


def read_indices(path: Path) -> Array:
    """Indices (N, S) of a file that ``write_indices`` wrote, or of any .npz with ``indices``.

    Raises InputError, and MachineError if pyarrow is not installed.
    """
    require_format(path, TOKEN_FORMATS)
    content = read_bytes(path)
    with about(path), parsed("holds no tokens"):
        if path.suffix == ".npy":
            return read_npy(content)
        if path.suffix == ".parquet":
            return _read_parquet(path, content)
        arrays = read_npz(content)
        if "indices" not in arrays:
            raise InputError(f"holds no 'indices', only {plain(', '.join(arrays)[:80])}")
        return arrays["indices"]


def _read_parquet(path: Path, content: bytes) -> Array:
    """The column ``indices`` of a parquet file, (N, S). Raises InputError, MachineError, and what
    pyarrow raises."""
    pyarrow, parquet = _parquet(path)
    with parquet.ParquetFile(
        io.BytesIO(content),
        thrift_string_size_limit=LARGEST_FOOTER,
        thrift_container_size_limit=LARGEST_FOOTER,
    ) as file:
        kind = file.schema_arrow.field("indices").type
        size = getattr(kind, "list_size", 0)
        if size < 1 or not pyarrow.types.is_integer(kind.value_type):
            raise InputError(f"indices are {kind}, expected lists of one size, of integers")
        if file.metadata.num_rows * size * kind.value_type.bit_width // 8 > LARGEST_ARRAY:
            raise InputError(f"holds {file.metadata.num_rows} rows, too many to be held in memory")
        rows = file.read(["indices"], use_threads=False)["indices"].combine_chunks()
    if rows.null_count or rows.flatten().null_count:
        raise InputError("indices has gaps")
    return np.asarray(rows.flatten()).reshape(-1, size)


def write_reconstructions(path: Path, reconstructions: npt.NDArray[np.float32]) -> None:
    """Writes (N, C, H, W) as ``reconstructions`` of an .npz, or as an .npy."""
    buffer = io.BytesIO()
    if path.suffix == ".npy":
        np.save(buffer, reconstructions, allow_pickle=False)
    else:
        np.savez_compressed(buffer, allow_pickle=False, reconstructions=reconstructions)
    write_file(path, buffer.getvalue())


def _parquet(path: Path) -> tuple[Any, Any]:
    """pyarrow and its parquet module. Raises MachineError if they are not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise MachineError(f"{path}: parquet needs pip install pyarrow") from None
    return pyarrow, pyarrow.parquet
