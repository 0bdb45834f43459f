"""Imports checkpoints of other libraries. Each file is one importer; the table is here.

A checkpoint is treated as data: nothing in it is executed. Every tensor is used once or left out by
name. Anything that our networks do not have is refused by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqdeploy.importers import diffusers, llamagen, mapped, taming, vqtorch
from vqdeploy.importers.checkpoint import Checkpoint
from vqdeploy.importers.plan import Choices, Importer, Plan
from vqdeploy.importers.tables import Taken, take
from vqref.errors import InputError, UsageError
from vqref.host.files import about
from vqref.host.streams import plain
from vqref.modelfile import Model
from vqref.validation import Array

IMPORTERS = (
    diffusers.IMPORTER,
    taming.IMPORTER,
    llamagen.IMPORTER,
    vqtorch.IMPORTER,
    mapped.IMPORTER,
)


OPTIONS = {"value_range": "range"}
"""The names of options that differ from the names of their choices."""


@dataclass(frozen=True)
class Imported:
    """A model, the importer that made it, its checkpoint, and lines that the user should read."""

    model: Model
    importer: Importer
    checkpoint: Checkpoint
    said: tuple[str, ...]


def import_model(path: Path, choices: Choices, digest: str | None = None) -> Imported:
    """Returns the model in the checkpoint at ``path``, a file or a folder.

    choices: what the user chose. digest: the sha256 that the file must have.

    Raises InputError that names the unexpected tensor or field, and UsageError for a choice that
    does not apply to this kind of checkpoint.
    """
    checkpoint = Checkpoint.read(path)
    with about(checkpoint.path):
        if digest is not None and checkpoint.sha256 != digest.lower():
            raise InputError(f"its sha256 is {checkpoint.sha256}, expected {digest}")
        importer = _recognised(checkpoint, choices)
        _require_taken(importer, choices)
        entry, tensors = _tensors(importer, checkpoint, choices.weights)
        plan = importer.plan(checkpoint, tensors, choices)
        kept = _kept(plan.base)
        taken = take(plan.spec, plan.tensors, plan.sources, plan.left_out, checkpoint.size, kept)
        params = plan.finish(taken.params)
    said = _said(entry, plan, taken)
    return Imported(
        _model(plan, params, _provenance(importer, checkpoint, plan, said)),
        importer,
        checkpoint,
        said,
    )


def _recognised(checkpoint: Checkpoint, choices: Choices) -> Importer:
    """Returns the importer for the user's choice or the tensors' names. Raises InputError."""
    tables = checkpoint.tables
    if not tables:
        names = ", ".join(plain(str(name)) for name in [*checkpoint.entries][:4])
        raise InputError(f"holds no tensors; its entries are {names or 'none'}")
    if choices.mapping is not None:
        return mapped.IMPORTER
    for importer in IMPORTERS[:-1]:
        if any(importer.knows(table) for table in tables.values()):
            return importer
    names = ", ".join([*next(iter(tables.values()))][:4])
    known = ", ".join(importer.what for importer in IMPORTERS[:-1])
    raise InputError(
        f"its tensors are {names}, …: none of {known}; describe it with --mapping FILE"
    )


def _require_taken(importer: Importer, choices: Choices) -> None:
    """Raises UsageError for a choice that does not apply to the importer."""
    for field in dataclasses.fields(choices):
        if getattr(choices, field.name) is not None and field.name not in importer.takes:
            option = OPTIONS.get(field.name, field.name.replace("_", "-"))
            raise UsageError(f"--{option} does not apply to {importer.what}")


def _tensors(
    importer: Importer, checkpoint: Checkpoint, weights: str | None
) -> tuple[str, dict[str, Any]]:
    """Returns the dictionary of tensors to import, and its entry. Raises InputError."""
    tables = {n: table for n, table in checkpoint.tables.items() if importer.knows(table)}
    if weights is not None and weights not in tables:
        known = ", ".join(filter(None, tables)) or "only one network"
        raise InputError(f"has no network {weights}; it has {known}")
    order = [*importer.entries, *tables] if weights is None else [weights]
    entry = next(entry for entry in order if entry in tables)
    return entry, tables[entry]


def _kept(base: Model | None) -> Mapping[str, Array]:
    """Returns the parameters that a model keeps when it gets another codebook."""
    if base is None:
        return {}
    return {name: base.params[name] for row in base.spec.layers for name, _ in row.parameters}


def _said(entry: str, plan: Plan, taken: Taken) -> tuple[str, ...]:
    """Returns lines for the user: which tensors were taken, converted and left out."""

    def tensors(count: int) -> str:
        return f"{count} tensor{'s' * (count > 1)}"

    return (
        *([f"took the tensors {plain(entry)}"] if entry else []),
        *plan.said,
        *(f"converted {tensors(count)} of {dtype}" for dtype, count in taken.converted.items()),
        *(f"left out {plain(name)}, {tensors(count)}" for name, count in taken.left_out.items()),
    )


def _provenance(
    importer: Importer, checkpoint: Checkpoint, plan: Plan, said: tuple[str, ...]
) -> dict[str, Any]:
    before = {} if plan.base is None else plan.base.provenance
    files = {plain(name): sha256 for name, sha256 in plan.files.items()}
    return {
        **before,
        "imported": {
            "importer": importer.name,
            "file": plain(checkpoint.path.name),
            "sha256": checkpoint.sha256,
            "beside": files,
            "said": list(said),
        },
    }


def _model(plan: Plan, params: dict[str, Array], provenance: dict[str, Any]) -> Model:
    """Returns the model, without the training and metrics of ``plan.base``: they no longer hold."""
    preprocessing = None if plan.base is None else plan.base.preprocessing
    return Model(plan.spec, params, provenance=provenance, preprocessing=preprocessing)
