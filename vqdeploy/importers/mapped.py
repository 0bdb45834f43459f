"""Imports any state dict of one of our networks; a TOML file describes its names."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from vqdeploy.importers.checkpoint import Checkpoint
from vqdeploy.importers.configuration import MOST_BLOCKS, Fields
from vqdeploy.importers.plan import Choices, Importer, Plan, fitting, ranged
from vqdeploy.importers.tables import Source
from vqref import families
from vqref.errors import UsageError
from vqref.spec import Layer, ModelSpec

_COUNTER = re.compile(r"\{i(\+1)?\}")
"""A counter in names on both sides: {i} counts from 0, {i+1} from 1."""


def _plan(checkpoint: Checkpoint, tensors: Mapping[str, Any], choices: Choices) -> Plan:
    if choices.mapping is None:
        raise UsageError("needs --mapping FILE")
    mapping = Fields.read(choices.mapping)
    mapping.require_known("entry", "left_out", "network", "tensors", "zeros")
    if "entry" in mapping.values:
        entry = mapping.text("entry")
        if entry not in checkpoint.tables:
            raise mapping.fail("entry", f"one of {', '.join(checkpoint.tables)}")
        tensors = checkpoint.tables[entry]
    spec = _network(mapping.table("network"))
    names = {p.name for p in spec.parameters}
    sources: dict[str, Source | None] = {}
    for theirs in mapping.table("tensors").values:
        for ours, source in _sources(mapping.table("tensors"), theirs, names).items():
            if ours in sources:
                raise mapping.table("tensors").fail(
                    theirs, f"a name other than {ours}, which is already mapped"
                )
            sources[ours] = source
    for pattern in mapping.texts("zeros", []):
        biases = (name for name in names - set(sources) if name.endswith(".bias"))
        zeros = [name for name in biases if fnmatchcase(name, pattern)]
        if not zeros:
            raise mapping.fail("zeros", f"biases that are not mapped; none is like {pattern}")
        sources |= dict.fromkeys(zeros)
    left_out = mapping.texts("left_out", [])
    return Plan(spec, tensors, sources, left_out, files={mapping.path.name: mapping.sha256})


def _network(fields: Fields) -> ModelSpec:
    """Returns the network of a table: a family and its sizes, ``range``, ``relu_in_place``.

    Raises InputError.
    """
    fields.only("family", *families.FAMILIES)
    make = families.FAMILIES[fields.text("family")]
    known = inspect.signature(make).parameters
    fields.require_known("family", "range", "relu_in_place", *known)
    given = {name: known[name].default for name in known if name in fields.values}
    sizes = {name: _size(fields, name, default) for name, default in given.items()}
    spec = fitting(str(fields.path), partial(make, **sizes))
    low, high = fields.pair("range", spec.value_range)
    spec = fitting(str(fields.path), partial(ranged, spec, low, high))
    if fields.truth("relu_in_place", False):
        encoder, decoder = _in_place(spec.encoder), _in_place(spec.decoder)
        spec = dataclasses.replace(spec, encoder=encoder, decoder=decoder)
    return spec


def _size(fields: Fields, name: str, default: Any) -> Any:
    """Returns a size, which must have the type of its default. Raises InputError."""
    if isinstance(default, bool):
        return fields.truth(name)
    if isinstance(default, tuple):
        return fields.wholes(name)
    if isinstance(default, int):
        return fields.whole(name, **({"most": MOST_BLOCKS} if name == "blocks" else {}))
    return fields.number(name) if isinstance(default, float) else fields.text(name)


def _in_place(rows: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """Returns rows in which residual blocks add the output of their first ReLU, not its input.

    PyTorch's ``ReLU(inplace=True)`` at the head of a block has that effect.
    """
    relus = {
        before.name: row.name
        for before, row in itertools.pairwise(rows)
        if (row.kind, row.activation, row.inputs) == ("activation", "relu", ())
    }
    return tuple(
        dataclasses.replace(row, inputs=tuple(relus.get(name, name) for name in row.inputs))
        if row.kind == "add"
        else row
        for row in rows
    )


def _sources(table: Fields, theirs: str, names: set[str]) -> dict[str, Source]:
    """Returns the source of each of our parameters that one line maps. Raises InputError."""
    value = table.values[theirs]
    axes: tuple[int, ...] = ()
    if isinstance(value, str):
        ours = value
    else:
        entry = table.table(theirs)
        entry.require_known("name", "axes", "transpose")
        ours, axes = entry.text("name"), entry.axes("axes")
        if entry.truth("transpose", False):
            axes = (1, 0)
    counts = range(MOST_BLOCKS) if _COUNTER.search(ours) else range(1)
    found = {}
    for i in counts:
        mine, other = _numbered(ours, i), _numbered(theirs, i)
        if mine in names:
            found[mine] = Source(other, axes=axes)
        for part in ("weight", "bias"):
            if f"{mine}.{part}" in names:
                found[f"{mine}.{part}"] = Source(f"{other}.{part}", axes=axes * (part == "weight"))
    if not found:
        raise table.fail(theirs, "the name of a row or parameter of the network")
    return found


def _numbered(name: str, i: int) -> str:
    return _COUNTER.sub(lambda found: str(i + bool(found[1])), name)


IMPORTER = Importer(
    "mapped",
    "a state dict that a TOML file describes",
    ("mapping",),
    lambda tensors: True,
    _plan,
    ("", "state_dict", "model", "model_state_dict"),
)
