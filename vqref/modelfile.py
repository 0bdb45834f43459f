"""``model.pt`` as plain data: what the file contains.

``torch.save`` writes the file. ``torch.load(weights_only=True)`` reads it and executes nothing.
This module only knows the dictionary inside, with NumPy arrays for the file's tensors. The caller
passes in the loader.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vqref.errors import InputError
from vqref.families import post
from vqref.host.files import about, parsed, read_bytes, write_file
from vqref.host.pickles import require_bounded, require_bounded_pickles
from vqref.preprocessing import Preprocessing
from vqref.prior import Prior
from vqref.quantizer import grid
from vqref.spec import CODEBOOK, ModelSpec
from vqref.validation import Array, Params, check_params

FORMAT = "vqtrain-model"
FORMAT_VERSION = 2

DIGEST = "sha256"
"""The entry with the digest of all other entries."""

FILE_BYTES = 4 * 2**30
"""The size of the largest model file that ``read`` accepts, in bytes."""

PREPROCESSING = "preprocessing"
"""The entry that only models of pictures have."""

PRIOR = "prior"
"""The entry that only models with a learned prior have."""

UNIT_ERROR = 1e-6
"""The largest error in the length of a unit vector, and in an element of a grid.

It allows for the rounding of elements to float32."""

PLAIN_VALUES, PLAIN_DEPTH = 10**6, 32
"""The most values and the deepest nesting that an entry of plain data may have.

Lists that hold one another take few bytes in a file, but have no end in JSON."""

_OPTIONAL = (PREPROCESSING, PRIOR)
_TABLES = ("spec", "parameters", "training", "metrics", "provenance")

_SEAL = b"vqtrain sha256 "
"""The start of the comment at a file's end. The digest of all bytes before it follows."""

_ZIP_END = b"PK\5\6"
"""The start of the last record of a zip archive: 22 bytes, then the comment."""


@dataclass(frozen=True)
class Model:
    """A trained model: its spec, parameters, training options, metrics and origin.

    params      {name: array} for every parameter of the spec
    training    the options of the run, plain data
    metrics     plain numbers of the last epoch, and "history", a list with those of each epoch
    provenance  data set and its sha256, seed, recipe, versions; plain data
    digested    whether it was read from a file that carries its own digest
    preprocessing  how training turned pictures into images, which every user of the model must
                repeat; None if it was trained on arrays
    prior       the prior over its tokens; None if none was learned

    Raises ValueError for parameters or a preprocessing that do not fit the spec, for codes of a
    normalized model that are not unit vectors, for a codebook that is not the grid of the spec's
    levels, and for a prior of another model.
    """

    spec: ModelSpec
    params: Params
    training: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    digested: bool = False
    preprocessing: Preprocessing | None = None
    prior: Prior | None = None

    def __post_init__(self) -> None:
        check_params(self.spec, self.params)
        if self.spec.normalized:
            _require_unit_rows(self.params[CODEBOOK])
        if self.spec.levels:
            _require_grid(self.params[CODEBOOK], self.spec.levels)
        if self.preprocessing is not None:
            self.preprocessing.require(self.spec.image_shape)
        if self.prior is not None:
            self._require_own(self.prior)

    def _require_own(self, prior: Prior) -> None:
        sizes = prior.spec.latent_size, prior.spec.num_codes
        own = self.spec.latent_size, self.spec.num_codes
        if sizes != own:
            raise ValueError(
                f"the prior is for {sizes[0]} indices of {sizes[1]} codes, "
                f"the model has {own[0]} of {own[1]}"
            )
        if prior.model != (found := self.digest()):
            raise ValueError(f"the prior is for model {prior.model:.12}…, this is {found:.12}…")

    def digest(self) -> str:
        """Returns the digest of all but the prior. A prior names its model by this digest."""
        plain = self.to_plain()
        plain.pop(PRIOR, None)
        return digest(plain)

    def to_plain(self) -> dict[str, Any]:
        """Returns the dictionary that goes into the file, without its digest."""
        plain = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "spec": self.spec.to_dict(),
            "parameters": dict(self.params),
            "training": dict(self.training),
            "metrics": dict(self.metrics),
            "provenance": dict(self.provenance),
        }
        if self.preprocessing is not None:
            plain[PREPROCESSING] = self.preprocessing.to_dict()
        if self.prior is not None:
            plain[PRIOR] = self.prior.to_plain()
        return plain

    @classmethod
    def from_plain(cls, data: Any) -> Model:
        """Inverts ``to_plain``. Also reads version 1, which only knew family post.

        Raises InputError for anything else, for a newer format, and for parameters that do not fit.
        """
        version = _require_version(data)
        for key in _TABLES:
            if not isinstance(data.get(key), dict):
                raise InputError(f"the entry {key!r} is missing or not a dictionary")
            if key != "parameters":
                require_plain(key, data[key])
        if unknown := set(data) - {"format", "format_version", *_TABLES, *_OPTIONAL, DIGEST}:
            raise InputError(f"unknown entries: {', '.join(sorted(map(repr, unknown)))}")
        if not isinstance(data["provenance"].get("data", {}), dict):
            raise InputError("the entry provenance.data is not a dictionary")
        _require_float32(data["parameters"])
        if PRIOR in data:
            require_plain(PRIOR, _without_arrays(data[PRIOR]))
            _require_float32(_arrays(data[PRIOR]))
        try:
            spec = READERS[version](data["spec"])
            params, training, metrics, provenance = (data[key] for key in _TABLES[1:])
            prepared = None
            if PREPROCESSING in data:
                prepared = Preprocessing.from_dict(data[PREPROCESSING], spec.image_shape)
            prior = Prior.from_plain(data[PRIOR]) if PRIOR in data else None
            about = training, metrics, provenance, DIGEST in data
            found = cls(spec, params, *about, prepared, prior)
        except ValueError as error:
            raise InputError(str(error)) from None
        if found.digested and data[DIGEST] != digest(data):
            raise InputError("damaged or changed: its digest is not that of its content")
        return found


def _require_unit_rows(codebook: Array) -> None:
    """Raises ValueError if a code's length differs from 1 by more than rounding."""
    lengths = np.sqrt(np.square(codebook.astype(np.float64)).sum(axis=1))
    if (wrong := np.flatnonzero(~(np.abs(lengths - 1) <= UNIT_ERROR))).size:
        raise ValueError(
            f"{CODEBOOK}: row {wrong[0]} has length {lengths[wrong[0]]:.6g}; codes of a normalized "
            "model have length 1"
        )


def _require_grid(codebook: Array, levels: tuple[int, ...]) -> None:
    """Raises ValueError if a code differs from the grid's by more than rounding."""
    off = np.abs(codebook.astype(np.float64) - grid(levels)).max(axis=1)
    if (wrong := np.flatnonzero(~(off <= UNIT_ERROR))).size:
        raise ValueError(
            f"{CODEBOOK}: row {wrong[0]} differs by {off[wrong[0]]:.6g} from the grid of levels "
            f"{levels}, which must be the codebook of this model"
        )


def _require_float32(arrays: Mapping[Any, Any]) -> None:
    """Raises InputError for a parameter that is not a float32 array."""
    for name, array in arrays.items():
        dtype = getattr(array, "dtype", type(array).__name__)
        if not isinstance(name, str) or dtype != np.float32:
            raise InputError(f"the parameter {name!r} is {dtype}, expected float32")


def _arrays(prior: Any) -> dict[Any, Any]:
    """Returns the parameters of a prior's entry, if it has any."""
    found = prior.get("parameters") if isinstance(prior, dict) else None
    return found if isinstance(found, dict) else {}


def _without_arrays(prior: Any) -> Any:
    if not isinstance(prior, dict):
        return prior
    return {key: value for key, value in prior.items() if key != "parameters"}


def _read_version_1(fields: Mapping[str, Any]) -> ModelSpec:
    """Reads the five sizes that determine the post's network."""
    names = ("image_shape", "base_depth", "latent_size", "num_codes", "code_size")
    if set(fields) != set(names):
        raise ValueError(
            f"the spec has fields {', '.join(map(str, fields))}, not {', '.join(names)}"
        )
    if not isinstance(fields["image_shape"], list | tuple):
        raise ValueError(f"image_shape is {fields['image_shape']!r}, expected three sizes")
    return post(tuple(fields["image_shape"]), *(fields[name] for name in names[1:]))


READERS: Mapping[int, Callable[[Any], ModelSpec]] = {1: _read_version_1, 2: ModelSpec.from_dict}
"""How each format version states the network."""


def read(path: str | Path, load: Callable[[BinaryIO], Any]) -> tuple[Model, str]:
    """Returns the model in the file at ``path``, and the file's sha256.

    load: turns the file into plain data and executes nothing: ``torch.load(weights_only=True)``.
    Raises InputError that names the file and says what is wrong with it.
    """
    content = read_bytes(Path(path), FILE_BYTES)
    with about(Path(path)):
        data = unpickled(content, load)
        if isinstance(data, dict):
            data = with_arrays(data, _as_array)
            arrays = [*_arrays(data).values(), *_arrays(data.get(PRIOR)).values()]
            if sum(array.nbytes for array in arrays if isinstance(array, np.ndarray)) > len(
                content
            ):
                raise InputError("its parameters claim to be larger than the file")
        return Model.from_plain(data), hashlib.sha256(content).hexdigest()


def write(path: Path, model: Model, save: Callable[[dict[str, Any], BinaryIO], None]) -> None:
    """Writes the model to ``path`` with a seal: the digest of the file's bytes.

    save: writes a dictionary of plain data and arrays, as ``torch.save`` writes one of tensors.
    Raises OSError and then leaves ``path`` as it was.
    """
    plain = model.to_plain()
    plain[DIGEST] = digest(plain)
    content = io.BytesIO()
    save(plain, content)
    write_file(path, seal(content.getvalue()))


def with_arrays(plain: Mapping[str, Any], turn: Callable[[Any], Any]) -> dict[str, Any]:
    """Applies ``turn`` to every array in a file's entries: the model's and the prior's."""

    def turned(entries: Mapping[str, Any]) -> dict[str, Any]:
        arrays = {name: turn(array) for name, array in _arrays(entries).items()}
        return {**entries, "parameters": arrays} if arrays else dict(entries)

    found = turned(plain)
    if isinstance(plain.get(PRIOR), dict):
        found[PRIOR] = turned(plain[PRIOR])
    return found


def seal(content: bytes) -> bytes:
    """Adds the digest of a zip archive's bytes to the archive, as its comment.

    The archive must have no comment, as ``torch.save`` writes it. The seal reveals every flipped
    bit, even in the padding.
    """
    size = len(_SEAL) + 64
    before = content[:-2] + size.to_bytes(2, "little")
    return before + _SEAL + hashlib.sha256(before).hexdigest().encode()


def unpickled(content: bytes, load: Callable[[BinaryIO], Any], what: str = "model file") -> Any:
    """Loads the bytes of a file that ``torch.save`` wrote.

    First checks that they do not claim to hold more than is there. what: names the expected kind of
    file in messages. Raises InputError.
    """
    _require_whole(content, what)
    with parsed(f"not a {what}"):
        try:
            return load(io.BytesIO(content))
        except pickle.UnpicklingError:
            raise InputError(
                f"refused: not a {what} but a pickle of other things; nothing was executed"
            ) from None


def _require_whole(content: bytes, what: str) -> None:
    """Raises InputError for a zip archive that is cut off, compressed or wrongly sealed.

    An archive without a comment needs no seal, because other programs write such files.
    """
    if not content.startswith(b"PK"):
        require_bounded_pickles(content)  # the old format of PyTorch; the loader says what it is
        return
    end = content.rfind(_ZIP_END)
    if end < 0:
        raise InputError(f"not a {what}: it is cut off, or not a zip archive")
    if len(content) > end + 22 and content != seal(content[: end + 20] + b"\0\0"):
        raise InputError("damaged: its seal is not the digest of its bytes")
    with parsed(f"not a {what}"), zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
        stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
        if not stored or sum(member.file_size for member in members) > len(content):
            raise InputError(f"not a {what}: its data are compressed, or claim to exceed the file")
        require_bounded(archive)


def _require_version(data: Any) -> int:
    """Returns the file's format version. Raises InputError for a foreign file or newer version."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise InputError("not a model file of vqtrain")
    version = data.get("format_version")
    if type(version) is not int or not 1 <= version < 2**63:
        found = version if version is None or isinstance(version, bool) else type(version).__name__
        raise InputError(f"format version is {found}, expected {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        newest = f"{FORMAT_VERSION}, the newest known"
        raise InputError(f"format version {version} is newer than {newest}; upgrade portable-vqvae")
    return version


def digest(plain: Mapping[str, Any]) -> str:
    """Returns the digest of all entries except DIGEST.

    It covers the names, dtypes, shapes and bytes of the parameters (arrays), and the other entries
    as JSON.
    """
    others = {key: value for key, value in plain.items() if key not in ("parameters", DIGEST)}
    arrays = {**plain["parameters"], **_arrays(plain.get(PRIOR))}
    if PRIOR in others:
        others[PRIOR] = _without_arrays(others[PRIOR])
    found = hashlib.sha256(json.dumps(others, sort_keys=True, allow_nan=False).encode())
    for name, value in sorted(arrays.items()):
        array = np.ascontiguousarray(value)
        found.update(json.dumps([name, array.dtype.str, value.shape]).encode())
        found.update(array.data)
    return found.hexdigest()


def _as_array(value: Any) -> Any:
    """Returns a tensor as a NumPy array if NumPy has its kind. Returns anything else unchanged."""
    if not hasattr(value, "detach"):
        return value
    try:
        return np.asarray(value.detach())
    except (TypeError, RuntimeError):  # a sparse tensor, a dtype that NumPy lacks
        return value


def require_plain(name: str, value: Any) -> None:
    """Raises InputError unless JSON can hold ``value`` and it is not too large."""
    level, values = [value], 0
    for _ in range(PLAIN_DEPTH):
        values += len(level)
        if values > PLAIN_VALUES:
            raise InputError(f"the entry {name!r} holds more than {PLAIN_VALUES} values")
        below: list[Any] = []
        for each in level:
            if isinstance(each, dict | list | tuple):
                below += _children(name, each)
            elif not _is_plain(each):
                shown = f"{each!r:.60}".partition("\n")[0]
                raise InputError(f"the entry {name!r} holds more than plain data: {shown}")
            if len(below) > PLAIN_VALUES:
                break
        if not below:
            return
        level = below
    raise InputError(f"the entry {name!r} is nested deeper than {PLAIN_DEPTH} levels")


def _children(name: str, value: Any) -> list[Any]:
    """The values of a dictionary with keys of text, or of a list."""
    if not isinstance(value, dict):
        return list(value)
    for key in value:
        if not isinstance(key, str):
            raise InputError(f"the entry {name!r} holds more than plain data: a key {key!r:.60}")
    return list(value.values())


def _is_plain(value: Any) -> bool:
    """Whether JSON has it: text, a finite number of 64 bits, a truth value, nothing."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return value is None or isinstance(value, str)
