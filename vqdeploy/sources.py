"""Reads and writes models in files.

An export reads a model.pt, or a file of parameters under the spec's names. An import reads a
checkpoint of another library and writes a model.pt.

This is the only place where deployment needs torch and safetensors, each only for its own kind of
file.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

import vqref.modelfile
from vqref import families
from vqref.errors import InputError
from vqref.host.extras import missing
from vqref.host.files import about, parsed, read_bytes
from vqref.host.images import read_npz
from vqref.host.streams import plain
from vqref.modelfile import Model
from vqref.quantizer import averaged
from vqref.spec import CODEBOOK, ModelSpec
from vqref.validation import Array, check_params

PARAMETER_FORMATS = (".npz", ".safetensors")

INERT = (
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
)
"""Classes that trainers left in published checkpoints, as keys of dictionaries. They are not
imported: an empty class replaces them."""

SPEC = "spec"
"""The entry of a parameter file that holds the spec as JSON. It is a string array in an .npz, and a
metadata key in a .safetensors file."""


def read_source(path: Path) -> tuple[Model, str]:
    """Returns the model in a ``model.pt``, .npz or .safetensors file, and the file's sha256.

    Raises InputError, and MachineError if the library that the file needs is not installed.
    """
    if path.suffix in PARAMETER_FORMATS:
        return read_parameters(path)
    import torch

    return vqref.modelfile.read(
        path, lambda file: torch.load(file, map_location="cpu", weights_only=True)
    )


def read_parameters(path: Path) -> tuple[Model, str]:
    """Returns the model with the parameters in a file, and the file's sha256.

    The spec is the file's entry ``spec``. Without that entry it follows from the shapes, which
    works only for family post. Without ``quantizer.ema_count`` and ``quantizer.ema_means`` each
    code counts once.

    Raises InputError, and MachineError if safetensors is not installed.
    """
    content = read_bytes(path)
    with about(path), parsed("not a file of parameters"):
        read = _read_npz if path.suffix == ".npz" else _read_safetensors
        params, written = read(content)
        try:
            model = _model(path, params, written)
        except ValueError as error:
            raise InputError(str(error)) from None
    return model, hashlib.sha256(content).hexdigest()


def read_checkpoint(content: bytes) -> Any:
    """Returns the plain data, tensors and arrays in the bytes of a checkpoint.

    The file may be of ``torch.save``, safetensors or ``numpy.savez``, under any name. Nothing in it
    is executed.

    Raises InputError, and MachineError if the library that the file needs is not installed.
    """
    if content[8:9] == b"{":
        return _load_safetensors(content)
    if not content.startswith(b"PK"):
        raise InputError(
            "neither safetensors, .npz nor a file of torch.save since PyTorch 1.6; if it is an "
            "older one, load it with weights_only=True and save it again"
        )
    with parsed("not a checkpoint"), zipfile.ZipFile(io.BytesIO(content)) as archive:
        if any(name.endswith(".npy") for name in archive.namelist()):
            return read_npz(content)
        damaged = archive.testzip()  # PyTorch ignores wrong checksums
        if damaged is not None:
            raise InputError(f"damaged: the checksum of {plain(damaged)} does not match its bytes")
    return vqref.modelfile.unpickled(content, _load_pickle, "checkpoint")


def write_model(path: Path, model: Model) -> None:
    """Publishes the model at ``path``. Raises OSError and then leaves ``path`` unchanged."""
    import torch

    def save(plain: dict[str, Any], file: BinaryIO) -> None:
        turned = vqref.modelfile.with_arrays(plain, lambda a: torch.from_numpy(np.asarray(a)))
        torch.save(turned, file)

    vqref.modelfile.write(path, model, save)


def _load_pickle(file: BinaryIO) -> Any:
    """Loads plain data. That includes ``argparse.Namespace``, where some trainers keep options.

    Raises InputError that names anything else.
    """
    import torch

    class Inert:
        def __init__(self, *_: object) -> None: ...
        def __setstate__(self, _: object) -> None: ...

    known: list[Any] = [argparse.Namespace, *((Inert, name) for name in INERT)]
    with torch.serialization.safe_globals(known):
        if others := sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file)):
            names = plain(", ".join(others[:3]))
            raise InputError(
                f"refused: holds {names}, which is not data; nothing was executed; save only its "
                "state_dict where it was made"
            )
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


def _load_safetensors(content: bytes) -> dict[str, Any]:
    """Returns PyTorch's tensors, because NumPy lacks bfloat16."""
    from safetensors.torch import load

    with parsed("not a safetensors file"):
        found: dict[str, Any] = load(content)
    return found


def _model(path: Path, params: dict[str, Array], written: str | None) -> Model:
    """Makes the model. Raises ValueError if the parameters are not those of a model."""
    if CODEBOOK not in params:
        names = plain(", ".join(sorted(params)[:4]))
        raise ValueError(f"holds no {CODEBOOK}; its names are {names}, …")
    for name, array in params.items():
        if array.dtype.kind not in "biuf":
            raise ValueError(f"the array {plain(name)} is {array.dtype}, expected numbers")
    params = {name: np.asarray(array, np.float32) for name, array in params.items()}
    if params[CODEBOOK].ndim != 2:
        raise ValueError(f"{CODEBOOK} has shape {params[CODEBOOK].shape}, expected (K, D)")
    params = averaged(params)
    spec = _spec(params, written)
    check_params(spec, params)
    return Model(spec, params, provenance={"parameters": plain(path.name)})


def _spec(params: dict[str, Array], written: str | None) -> ModelSpec:
    if written is None:
        try:
            return families.of_parameters({name: array.shape for name, array in params.items()})
        except ValueError as error:
            raise ValueError(
                f"{error}; if it is another network, add an entry {SPEC!r} with the spec as JSON"
            ) from None
    try:
        return ModelSpec.from_dict(json.loads(written))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the entry {SPEC!r} is not a spec: {error}") from None


def _read_npz(content: bytes) -> tuple[dict[str, Array], str | None]:
    """Returns the arrays of an .npz and its entry ``spec``."""
    params = read_npz(content)
    written = params.pop(SPEC, None)
    if written is not None and (written.shape != () or written.dtype.kind != "U"):
        raise ValueError(f"the entry {SPEC!r} is {written.dtype} {written.shape}, expected text")
    return params, None if written is None else str(written)


def _read_safetensors(content: bytes) -> tuple[dict[str, Array], str | None]:
    """Returns the arrays of a safetensors file and the entry ``spec`` of its metadata."""
    try:
        from safetensors.numpy import load
    except ModuleNotFoundError as error:
        raise missing(error) or error from None
    with parsed("not a safetensors file"):  # damaged, or a dtype that NumPy lacks
        params = load(content)
    size = int.from_bytes(content[:8], "little")  # size of the JSON header; load has validated it
    header: dict[str, Any] = json.loads(content[8 : 8 + size])
    return params, header.get("__metadata__", {}).get(SPEC)
