"""The interface of importers: each takes a file's content and returns a plan for a model."""

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
    """What the user chooses besides the file. None leaves the choice to the file or the importer.

    config: the configuration file. mapping: a file that maps the names. model: a model.pt that gets
    another codebook. image_size: the side of the square images. value_range: the values that the
    networks see for 0 and 1 of an image. weights: which dictionary of tensors to take if there are
    several.
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

    spec: the network. tensors: the checkpoint's tensors. sources, left_out: as for ``tables.take``.
    said: lines for the user on the choices made. finish: turns the parameters from the tensors
    into the final ones. files: other files that were used, with their sha256. base: a model whose
    other parameters stay.
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

    name: the importer's name. what: the name of what it reads. takes: the choices that apply to it.
    knows: says whether tensors with these names are of its kind. entries: the entries of the file
    that may hold the dictionary of tensors, the preferred one first; "" is the file itself. plan:
    makes the Plan, and raises InputError for what our networks do not have.
    """

    name: str
    what: str
    takes: tuple[str, ...]
    knows: Callable[[Mapping[str, Any]], bool]
    plan: Callable[[Checkpoint, Mapping[str, Any], Choices], Plan]
    entries: tuple[str, ...] = ("", "state_dict")


def configuration(checkpoint: Checkpoint, choices: Choices) -> Fields:
    """Returns the configuration that the user named or that is beside the file.

    Raises InputError.
    """
    found = optional_configuration(checkpoint, choices)
    if found is None:
        raise InputError("no configuration beside it; name it with --config FILE")
    return found


def optional_configuration(checkpoint: Checkpoint, choices: Choices) -> Fields | None:
    """Returns the configuration, or None if there is none. Raises InputError."""
    path = choices.config or beside(checkpoint.path)
    return None if path is None else Fields.read(path)


def fitting(where: str, make: Callable[[], ModelSpec]) -> ModelSpec:
    """Returns the network. where: what describes it. Raises InputError for impossible sizes."""
    try:
        return make()
    except ValueError as error:
        raise InputError(f"{where} describes no network of ours: {error}") from None


def ranged(spec: ModelSpec, low: float, high: float) -> ModelSpec:
    """Returns the network with images in [low, high].

    The first row of the encoder sets the range. Raises InputError if that row cannot.
    """
    first, *rows = spec.encoder
    if (low, high) == spec.value_range:
        return spec
    if first.kind != "affine":
        raise InputError(f"a network of family {spec.family} takes images in {spec.value_range}")
    scaled = dataclasses.replace(first, scale=float(high - low), shift=float(low))
    return dataclasses.replace(spec, encoder=(scaled, *rows), value_range=(low, high))
