"""What an importer is given and what it gives: a file's content in, the way to a model out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vqdeploy.importers.checkpoint import Checkpoint
from vqdeploy.importers.configuration import Fields, beside
from vqdeploy.importers.tables import Source
from vqref.errors import InputError
from vqref.modelfile import Model
from vqref.spec import ModelSpec
from vqref.validation import Array


@dataclass(frozen=True)
class Choices:
    """What the user says besides the file; None where the file or the importer decides.

    config: the configuration's file. mapping: a file that describes the names. model: a model.pt
    that gets another codebook. image_size: side of its square images. value_range: what 0 and 1 of
    an image are to the networks. weights: which of several dictionaries of tensors.
    """

    config: Path | None = None
    mapping: Path | None = None
    model: Path | None = None
    image_size: int | None = None
    value_range: tuple[float, float] | None = None
    weights: str | None = None


@dataclass(frozen=True)
class Plan:
    """How a checkpoint becomes a model.

    spec: the network. tensors: theirs. sources, left_out: as ``tables.take`` has them. said: what
    the user should know of choices that were made. finish: the last change of the parameters, of
    which the tensors are no more than the start. files: other files that it was made of, with
    their sha256. base: a model whose other parameters stay.
    """

    spec: ModelSpec
    tensors: Mapping[str, Any]
    sources: Mapping[str, Source | None]
    left_out: tuple[str, ...] = ()
    said: tuple[str, ...] = ()
    finish: Callable[[dict[str, Array]], dict[str, Array]] = lambda params: params
    files: Mapping[str, str] = field(default_factory=dict)
    base: Model | None = None


@dataclass(frozen=True)
class Importer:
    """One kind of checkpoint.

    name, what: of the importer, and of what it reads. takes: the choices that it knows what to do
    with. knows: whether these are names of such tensors. entries: of dictionaries of tensors in the
    file, the one that is taken first; "" is the file itself. plan: raises InputError for what is
    no network of ours.
    """

    name: str
    what: str
    takes: tuple[str, ...]
    knows: Callable[[Mapping[str, Any]], bool]
    plan: Callable[[Checkpoint, Mapping[str, Any], Choices], Plan]
    entries: tuple[str, ...] = ("", "state_dict")


def configuration(checkpoint: Checkpoint, choices: Choices) -> Fields:
    """The one that the user named, or that lies beside the checkpoint. Raises InputError."""
    found = optional_configuration(checkpoint, choices)
    if found is None:
        raise InputError("no configuration beside it; name it by --config FILE")
    return found


def optional_configuration(checkpoint: Checkpoint, choices: Choices) -> Fields | None:
    """The same, or None if there is none. Raises InputError."""
    path = choices.config or beside(checkpoint.path)
    return None if path is None else Fields.read(path)


def fitting(where: str, make: Callable[[], ModelSpec]) -> ModelSpec:
    """The network. where: what describes it. Raises InputError for sizes that none has."""
    try:
        return make()
    except ValueError as error:
        raise InputError(f"{where} describes no network of ours: {error}") from None


def ranged(spec: ModelSpec, low: float, high: float) -> ModelSpec:
    """The network whose images are in [low, high]. Raises InputError for one without a first row
    that says so."""
    first, *rows = spec.encoder
    if (low, high) == spec.value_range:
        return spec
    if first.kind != "affine":
        raise InputError(f"a network of family {spec.family} takes images in {spec.value_range}")
    scaled = dataclasses.replace(first, scale=float(high - low), shift=float(low))
    return dataclasses.replace(spec, encoder=(scaled, *rows), value_range=(low, high))
