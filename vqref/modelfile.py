"""``model.pt`` as plain data: what stands in it, whoever writes or reads it.

``torch.save`` writes the file and ``torch.load(weights_only=True)`` reads it, which executes
nothing. This module knows the dictionary inside alone, with NumPy arrays for the file's tensors,
and is handed the loader.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vqref.errors import InputError
from vqref.families import post
from vqref.spec import ModelSpec
from vqref.validation import Params, check_params

FORMAT = "vqtrain-model"
FORMAT_VERSION = 2

_TABLES = ("spec", "parameters", "training", "metrics", "provenance")


@dataclass(frozen=True)
class Model:
    """A trained model: its spec and parameters, how it was trained, what was measured, its origin.

    params      {name: array} for every parameter of the spec
    training    the options of the run, plain data
    metrics     plain numbers of the last epoch, and "history", a list with those of each epoch
    provenance  data set and its sha256, seed, recipe, versions; plain data

    Raises ValueError for parameters that do not fit the spec.
    """

    spec: ModelSpec
    params: Params
    training: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_params(self.spec, self.params)

    def to_plain(self) -> dict[str, Any]:
        """The dictionary that goes into the file."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "spec": self.spec.to_dict(),
            "parameters": dict(self.params),
            "training": dict(self.training),
            "metrics": dict(self.metrics),
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_plain(cls, data: Any) -> Model:
        """The inverse of ``to_plain``; version 1, which knew family post alone, is read too.

        Raises InputError for anything else, a newer format, or parameters that do not fit.
        """
        version = _require_version(data)
        for key in _TABLES:
            if not isinstance(data.get(key), dict):
                raise InputError(f"the entry {key!r} is missing or not a dictionary")
            if key != "parameters":
                _require_plain(key, data[key])
        if not isinstance(data["provenance"].get("data", {}), dict):
            raise InputError("the entry provenance.data is not a dictionary")
        for name, array in data["parameters"].items():
            dtype = getattr(array, "dtype", type(array).__name__)
            if not isinstance(name, str) or dtype != np.float32:
                raise InputError(f"the parameter {name!r} is {dtype}, expected float32")
        try:
            spec = READERS[version](data["spec"])
            return cls(spec, *(data[key] for key in _TABLES[1:]))
        except ValueError as error:
            raise InputError(str(error)) from None


def _read_version_1(fields: Mapping[str, Any]) -> ModelSpec:
    """The five sizes from which the post's network followed."""
    names = ("image_shape", "base_depth", "latent_size", "num_codes", "code_size")
    if set(fields) != set(names):
        raise ValueError(
            f"the spec has fields {', '.join(map(str, fields))}, not {', '.join(names)}"
        )
    if not isinstance(fields["image_shape"], list | tuple):
        raise ValueError(f"image_shape is {fields['image_shape']!r}, expected three sizes")
    return post(tuple(fields["image_shape"]), *(fields[name] for name in names[1:]))


READERS: Mapping[int, Callable[[Any], ModelSpec]] = {1: _read_version_1, 2: ModelSpec.from_dict}
"""How each format version says what the network is."""


def read(path: str | Path, load: Callable[[BinaryIO], Any]) -> tuple[Model, str]:
    """The model in the file at ``path``, and the file's sha256.

    load: turns the file into plain data and executes nothing, ``torch.load(weights_only=True)``.
    Raises InputError that names the file and what is wrong with it.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a loader's remarks on a file about to be judged
            data = load(io.BytesIO(content))
    except pickle.UnpicklingError:
        raise InputError(
            f"{path}: refused: not a model file but a pickle of other things; nothing was executed"
        ) from None
    except Exception as error:  # damaged bytes surface as whatever the loader stumbled on
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{path}: not a model file ({type(error).__name__}: {reason})") from None
    try:
        if isinstance(data, dict) and isinstance(data.get("parameters"), dict):
            arrays = {name: _as_array(array) for name, array in data["parameters"].items()}
            data = {**data, "parameters": arrays}
        return Model.from_plain(data), hashlib.sha256(content).hexdigest()
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _require_version(data: Any) -> int:
    """The file's format version. Raises InputError for a foreign file or a newer version."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise InputError("not a model file of vqtrain")
    version = data.get("format_version")
    if type(version) is not int or version < 1:
        raise InputError(f"format version is {version!r}, expected {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        newest = f"{FORMAT_VERSION}, the newest known"
        raise InputError(f"format version {version} is newer than {newest}; upgrade portable-vqvae")
    return version


def _as_array(value: Any) -> Any:
    """A tensor as a NumPy array if NumPy has its kind; anything else as it is, refused by name."""
    try:
        return np.asarray(value.detach() if hasattr(value, "detach") else value)
    except (TypeError, RuntimeError):  # a sparse tensor, a dtype that NumPy lacks
        return value


def _require_plain(name: str, value: Any) -> None:
    """Raises InputError unless ``value`` is what JSON can hold."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the entry {name!r} holds more than plain data: {error}") from None
