"""Images and tokens in files, as the commands read and write them."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vqref.agreement.arithmetics import ARITHMETICS
from vqref.errors import InputError, UsageError
from vqref.host.arrow import FOOTER, parquet
from vqref.host.files import about, parsed, read_bytes, write_file
from vqref.host.images import LARGEST_ARRAY, ImageSet, as_batch, read_npy, read_npz
from vqref.host.pictures import Reading, load_any
from vqref.host.pillow import pillow
from vqref.host.streams import plain
from vqref.preprocessing import Preprocessing
from vqref.spec import ModelSpec
from vqref.validation import Array

if TYPE_CHECKING:
    from vqdeploy.codec import Codec

TOKEN_FORMATS = (".npz", ".npy", ".parquet")

PARTS = ("train", "held-out", "all")
"""Which images to read from a folder of the official files."""

LONGEST_SAID = 1000
"""The most bytes of each entry in which a file of tokens describes the bundle that made it."""

MOST_NAMES = 2**24
"""The most names that are read from a parquet file: each becomes a Python object."""

_SAID = ("manifest_sha256", "latent_shape", "num_codes", "arithmetic")
"""The entries that describe the bundle that made the tokens, and the arithmetic of the proofs."""

PER_TOKEN = {"proved": "b", "rivals": "iu"}
"""The arrays that hold proofs, one value per token, and the kinds of dtype that each may have."""

_SHA256 = re.compile("[0-9a-f]{64}", re.ASCII)


class Images(NamedTuple):
    """Images of a file or a folder, in the form that a model takes.

    images: (N, C, H, W), float32 in [0, 1]. names: the paths of pictures within their folder, None
    for arrays. said: lines to print, on what was read, changed or left out. sha256: the digest of
    the file, or of the pixels if they come from several files.
    """

    images: npt.NDArray[np.float32]
    names: tuple[str, ...] | None
    said: tuple[str, ...]
    sha256: str


def read_images(
    path: Path,
    spec: ModelSpec,
    preprocessing: Preprocessing | None = None,
    *,
    part: str = PARTS[0],
    recursive: bool = False,
    skip_bad: bool = False,
    limit: int | None = None,
) -> Images:
    """Returns the images of a file or a folder for a model of ``spec``.

    preprocessing: how to prepare pictures; None for a model that was trained on arrays. part: one
    of PARTS. recursive, skip_bad: see ``vqref.host.pictures.Reading``. limit: how many images to
    return at most, the first ones; None for all.

    Raises InputError for images that the model cannot take. Raises MachineError if the pictures
    need Pillow and it is not installed.
    """
    shape = spec.image_shape
    reading = Reading.of(preprocessing, shape, recursive=recursive, skip_bad=skip_bad)
    found = load_any(path, reading)
    chosen, said = _part(path, found, part)
    with about(path):
        batches = [as_batch(each[:limit], shape) for each in chosen]
    images = batches[0] if len(batches) == 1 else np.concatenate(batches)[:limit]
    names = None if found.names is None else found.names[:limit]
    digest = found.sha256 if part == PARTS[0] or found.held_out is None else _pixels(chosen)
    return Images(images, names, (*found.said, *said), digest)


def _part(path: Path, found: ImageSet, part: str) -> tuple[list[Array], list[str]]:
    """Returns the arrays of one part of a source, and lines to print. Raises InputError."""
    if found.held_out is None:
        if part == "held-out":
            raise InputError(
                f"{path}: holds no held-out images; --part is for a folder of the official files"
            )
        return [found.train], []
    train, held_out = len(found.train), len(found.held_out)
    if part == "all":
        said = f"{train + held_out:,} images of {path}: {train:,} for training, then the others"
        return [found.train, found.held_out], [said]
    if part == "held-out":
        said = f"the {held_out:,} held-out images of {path}; --part train or all for the others"
        return [found.held_out], [said]
    said = f"the {train:,} training images of {path}; --part held-out or all for the others"
    return [found.train], [said]


def _pixels(arrays: Sequence[Array]) -> str:
    """Returns the sha256 of images as they are stored."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def require_format(path: Path, formats: tuple[str, ...]) -> None:
    """Raises UsageError unless the name ends in one of ``formats``.

    Raises MachineError if the library for that format is not installed.
    """
    if path.suffix not in formats:
        raise UsageError(f"{path}: its name must end in {', '.join(formats[:-1])} or {formats[-1]}")
    if path.suffix == ".parquet":
        parquet()
    elif path.suffix in (".png", ".PNG"):
        pillow()


@dataclass(frozen=True)
class Tokens:
    """The content of a file of tokens.

    indices: (N, S), of an integer dtype. names: the names of the pictures that were encoded.
    manifest_sha256, latent_shape, num_codes: describe the bundle that made the tokens; each is None
    if the file lacks it. proved: (N, S), whether a token is the same on every machine that computes
    in ``arithmetic``. rivals: (N, S), the code that comes nearest to winning. proved, rivals and
    arithmetic are None if no proof was requested.

    Raises InputError for a value that the field cannot have.
    """

    indices: Array
    names: tuple[str, ...] | None = None
    manifest_sha256: str | None = None
    latent_shape: tuple[int, ...] | None = None
    num_codes: int | None = None
    proved: Array | None = None
    rivals: Array | None = None
    arithmetic: str | None = None

    def __post_init__(self) -> None:
        if self.names is not None and len(self.names) != len(self.indices):
            raise InputError(f"holds {len(self.names)} names for {len(self.indices)} rows")
        sha256, shape, codes = self.manifest_sha256, self.latent_shape, self.num_codes
        fits = {
            "manifest_sha256": isinstance(sha256, str) and _SHA256.fullmatch(sha256),
            "latent_shape": isinstance(shape, tuple)
            and 0 < len(shape) < 4
            and all(map(_counts, shape)),
            "num_codes": _counts(codes),
            "arithmetic": self.arithmetic in ARITHMETICS,
        }
        for name, fit in fits.items():
            if (found := getattr(self, name)) is not None and not fit:
                raise InputError(f"its {name} is {found!r:.80}")
        for name, kinds in PER_TOKEN.items():
            array = getattr(self, name)
            if array is not None and (
                array.dtype.kind not in kinds or array.shape != self.indices.shape
            ):
                found = f"{array.dtype} {array.shape}"
                raise InputError(f"its {name} are {found}, but its indices {self.indices.shape}")

    @classmethod
    def of(
        cls, codec: Codec, indices: npt.NDArray[np.int64], names: tuple[str, ...] | None
    ) -> Tokens:
        """Returns the tokens for indices that the bundle of ``codec`` made."""
        spec = codec.spec
        return cls(indices, names, codec.manifest_sha256, spec.latent_shape, spec.num_codes)

    def require(self, codec: Codec, *, force: bool = False) -> str | None:
        """Checks that ``codec`` may decode the tokens, and returns a remark to print.

        The remark is None if the codec's bundle made the tokens. Raises InputError if another
        bundle made them (unless ``force``), and if they do not fit this bundle.
        """
        remark, spec = None, codec.spec
        if self.manifest_sha256 is None:
            remark = "it does not say which bundle made it"
        elif self.manifest_sha256 != codec.manifest_sha256:
            found, expected = self.manifest_sha256[:12], codec.manifest_sha256[:12]
            if not force:
                raise InputError(
                    f"tokens of bundle {found}…, this one is {expected}…; --force decodes them "
                    "anyway"
                )
            remark = f"tokens of bundle {found}…, decoded by {expected}… anyway"
        for name in ("latent_shape", "num_codes"):
            said, expected = getattr(self, name), getattr(spec, name)
            if said not in (None, expected):
                raise InputError(f"its {name} is {said}, this bundle has {expected}")
        shape, length = np.shape(self.indices), spec.latent_size
        if len(shape) == 2 and shape[0] == length != shape[1]:
            raise InputError(f"indices: shape is {shape}, (S, N), expected (N, {length})")
        return remark


def _counts(value: Any) -> bool:
    return type(value) is int and value >= 1


def write_tokens(path: Path, tokens: Tokens) -> None:
    """Writes tokens to a file, in the format that the ending of ``path`` names.

    The indices get the smallest unsigned dtype that holds every number below ``num_codes``. An .npz
    holds one array per field. An .npy holds only the indices. A .parquet has columns ``indices``
    and ``proved`` of lists of S, a column ``key`` if there are names, and the other fields in its
    metadata; it has no rivals. Raises MachineError if pyarrow is not installed.
    """
    small = _smallest(tokens)
    buffer = io.BytesIO()
    if path.suffix == ".npy":
        np.save(buffer, small, allow_pickle=False)
    elif path.suffix == ".npz":
        arrays = {name: np.array(value) for name, value in _told(tokens).items()}
        if tokens.proved is not None and tokens.rivals is not None:
            arrays |= {"proved": tokens.proved, "rivals": tokens.rivals.astype(small.dtype)}
        np.savez(buffer, allow_pickle=False, indices=small, **named(tokens.names), **arrays)
    else:
        buffer.write(parquet_bytes(tokens, {}))
    write_file(path, buffer.getvalue())


def _smallest(tokens: Tokens) -> Array:
    """Returns the indices in the smallest unsigned dtype that holds all below ``num_codes``."""
    codes = tokens.num_codes or int(tokens.indices.max(initial=0)) + 1
    return tokens.indices.astype(np.min_scalar_type(codes - 1))


def parquet_bytes(tokens: Tokens, more: Mapping[str, str]) -> bytes:
    """Returns the bytes of a ``.parquet`` of tokens, with the entries ``more`` in its metadata.

    Its pages carry checksums. Raises MachineError if pyarrow is not installed.
    """
    pyarrow, module = parquet()
    columns, buffer = {}, io.BytesIO()
    if tokens.names is not None:
        columns["key"] = pyarrow.array(tokens.names, pyarrow.string())
    for name, array in (("indices", _smallest(tokens)), ("proved", tokens.proved)):
        if array is not None:
            values = pyarrow.array(array.ravel())
            columns[name] = pyarrow.FixedSizeListArray.from_arrays(values, array.shape[1])
    told = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in _told(tokens).items()
    }
    table = pyarrow.table(columns).replace_schema_metadata({**told, **more})
    module.write_table(table, buffer, write_page_checksum=True)
    return buffer.getvalue()


def _told(tokens: Tokens) -> dict[str, Any]:
    """Returns the entries that describe the bundle, without those that are None."""
    found = {name: getattr(tokens, name) for name in _SAID}
    return {name: value for name, value in found.items() if value is not None}


def named(names: tuple[str, ...] | None) -> dict[str, Array]:
    """Returns the array ``names`` of an .npz, or nothing if there are no names."""
    return {} if names is None else {"names": np.array(names, dtype=np.str_)}


def read_tokens(path: Path) -> Tokens:
    """Reads tokens from a file of ``write_tokens``, or from any file that holds ``indices``.

    Raises InputError for another file, MachineError if pyarrow is needed and not installed.
    """
    require_format(path, TOKEN_FORMATS)
    content = read_bytes(path)
    with about(path), parsed("holds no tokens"):
        if path.suffix == ".npy":
            return Tokens(read_npy(content))
        if path.suffix == ".parquet":
            return _read_parquet(content)
        arrays = read_npz(content)
        if "indices" not in arrays:
            raise InputError(f"holds no 'indices', only {plain(', '.join(arrays)[:80])}")
        said = {name: _little(name, arrays[name]) for name in _SAID if name in arrays}
        said |= {name: arrays[name] for name in PER_TOKEN if name in arrays}
        return Tokens(arrays["indices"], _texts(arrays.get("names")), **said)


def _texts(names: Array | None) -> tuple[str, ...] | None:
    """Returns the strings in the array ``names`` of an .npz. Raises InputError."""
    if names is None:
        return None
    if names.dtype.kind != "U" or names.ndim != 1:
        raise InputError(f"its names are {names.dtype} {names.shape}, expected (N,) of text")
    return tuple(names.tolist())


def _little(name: str, array: Array) -> Any:
    """Returns a string, a number, or a tuple of them. Raises InputError if the array is large."""
    if array.nbytes > LONGEST_SAID:
        raise InputError(f"its {name} is {array.dtype} {array.shape}")
    found = array.tolist()
    return tuple(found) if isinstance(found, list) else found


def _read_parquet(content: bytes) -> Tokens:
    """Returns the tokens of a parquet file.

    Reads the columns ``indices`` and ``proved``, (N, S), and ``key``, and the metadata. Raises
    InputError, MachineError, and what pyarrow raises.
    """
    with _opened(content) as file:
        schema, count = file.schema_arrow, file.metadata.num_rows
        found = {}
        for name, expected in (("indices", "integers"), ("proved", "booleans")):
            if name == "indices" or name in schema.names:
                found[name] = _lists(file, name, count, expected)
    names = None
    if "key" in schema.names:
        with _opened(content, read_dictionary=["key"]) as file:
            names = _keys(file)
    said = schema.metadata or {}
    told = {name: _said(name, said[name.encode()]) for name in _SAID if name.encode() in said}
    return Tokens(found["indices"], names, proved=found.get("proved"), **told)


def parquet_metadata(content: bytes) -> dict[str, str]:
    """Returns the metadata of a parquet file. Raises InputError, MachineError."""
    with parsed("holds no tokens"), _opened(content) as file:
        said = file.schema_arrow.metadata or {}
        return {name.decode(): value.decode() for name, value in said.items()}


def _opened(content: bytes, **how: Any) -> Any:
    """Opens a parquet file; checks the checksums of its pages, if they have any.

    Raises what pyarrow raises.
    """
    _, module = parquet()
    source = io.BytesIO(content)
    return module.ParquetFile(source, page_checksum_verification=True, **FOOTER, **how)


def _lists(file: Any, name: str, count: int, expected: str) -> Array:
    """Returns a column of ``count`` lists of one size S as an array (N, S).

    expected: "integers" or "booleans". Raises InputError, and what pyarrow raises.
    """
    pyarrow, _ = parquet()
    kind = file.schema_arrow.field(name).type
    size, fits = (
        getattr(kind, "list_size", 0),
        {
            "integers": pyarrow.types.is_integer,
            "booleans": pyarrow.types.is_boolean,
        },
    )
    if size < 1 or not fits[expected](kind.value_type):
        raise InputError(f"{name} are {kind}, expected lists of one size, of {expected}")
    if count * size * max(8, kind.value_type.bit_width) // 8 > LARGEST_ARRAY:
        raise InputError(f"holds {count} rows, too many to be held in memory")
    rows = file.read([name], use_threads=False)[name].combine_chunks()
    if rows.null_count or rows.flatten().null_count:
        raise InputError(f"{name} has gaps")
    values = rows.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(values).reshape(-1, size)


def _keys(file: Any) -> tuple[str, ...]:
    """Returns the column ``key`` of a parquet file.

    The file must be opened with this column as a dictionary. A few bytes can stand for many copies
    of a long text; the dictionary shows that before the copies take memory. Raises InputError, and
    what pyarrow raises.
    """
    if file.metadata.num_rows > MOST_NAMES:
        raise InputError(f"holds {file.metadata.num_rows} names, more than {MOST_NAMES}")
    names, longest = [], 0
    for chunk in file.read(["key"], use_threads=False)["key"].chunks:
        values = getattr(chunk, "dictionary", None)
        if values is None or str(values.type) not in ("string", "large_string"):
            raise InputError(f"key is {chunk.type}, expected text")
        if chunk.null_count:
            raise InputError("key has gaps")
        texts = values.to_pylist()
        names += [texts[at] for at in chunk.indices.to_pylist()]
        longest = max([longest, *map(len, texts)])
    if 4 * longest * len(names) > LARGEST_ARRAY:
        raise InputError(f"the longest of its {len(names)} names has {longest} characters")
    return tuple(names)


def _said(name: str, text: bytes) -> Any:
    """Parses an entry of a parquet file's metadata. Raises InputError, and what parsers raise."""
    if len(text) > LONGEST_SAID:
        raise InputError(f"its {name} has {len(text)} bytes")
    if name in ("manifest_sha256", "arithmetic"):
        return text.decode()
    found = json.loads(text)
    return tuple(found) if isinstance(found, list) else found
