"""Turns a checkpoint's tensors ("theirs") into our parameters ("ours").

Every tensor is used once and has the expected shape, or is left out by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from vqdeploy.importers.checkpoint import claimed, floats
from vqref.errors import InputError
from vqref.quantizer import averaged
from vqref.spec import EMA_COUNT, EMA_MEANS, ModelSpec, Shape
from vqref.validation import Array


@dataclass(frozen=True)
class Source:
    """The tensor that becomes one of our parameters, and how its axes change.

    name: the tensor's name. squeezed: its axes of length 1 that ours lacks. axes: which of the
    others become the first, second, … axis of ours; () keeps their order.
    """

    name: str
    squeezed: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()

    def shape(self, ours: Shape) -> Shape:
        """Returns the shape that theirs must have. Raises InputError for axes that ours lacks."""
        if self.axes and sorted(self.axes) != list(range(len(ours))):
            raise InputError(f"the tensor {self.name}: axes {self.axes} are not those of {ours}")
        theirs = [ours[self.axes.index(i)] for i in range(len(ours))] if self.axes else [*ours]
        for axis in self.squeezed:
            theirs.insert(axis, 1)
        return tuple(theirs)

    def turned(self, values: Array) -> Array:
        """Returns the values with the axes of ours."""
        values = np.squeeze(values, self.squeezed)
        return values.transpose(self.axes) if self.axes else values


@dataclass(frozen=True)
class Taken:
    """The result of ``take``.

    params: ours, float32. converted: how many tensors had another dtype, by dtype. left_out: how
    many tensors were left out, by the pattern that they match.
    """

    params: dict[str, Array]
    converted: Mapping[str, int]
    left_out: Mapping[str, int]


def take(
    spec: ModelSpec,
    tensors: Mapping[str, Any],
    sources: Mapping[str, Source | None],
    left_out: Sequence[str],
    size: int,
    kept: Mapping[str, Array],
) -> Taken:
    """Takes every parameter of the spec from a checkpoint's tensors.

    sources: by the parameter's name; None for a parameter of zeros. The averages of the quantizer
    may be absent; then each code counts once. left_out: patterns for names of tensors to ignore.
    size: the file's size in bytes; its tensors cannot be larger. kept: parameters that stay.

    Raises InputError that names a tensor that is missing, left over, used twice, or not as
    expected.
    """
    wanted = {p.name: p.shape for p in spec.parameters if p.name not in kept}
    _require_all(wanted, sources)
    used = {name: source for name, source in sources.items() if source is not None}
    _require_there(used, wanted, tensors)
    gone = _left_out(tensors, used, left_out)
    if sum(claimed(tensors[source.name]) for source in used.values()) > size:
        raise InputError("its tensors claim to be larger than the file")
    params = {
        **kept,
        **{name: np.zeros(wanted[name], np.float32) for name in sources.keys() - used},
    }
    converted: Counter[str] = Counter()
    for name, source in used.items():
        params[name], dtype = _taken(source, tensors[source.name])
        converted[dtype] += dtype != "float32"
    return Taken(averaged(params), +converted, gone)


def _require_all(wanted: Mapping[str, Shape], sources: Mapping[str, Source | None]) -> None:
    """Raises InputError for a parameter without a source, and for a source without a parameter."""
    if unknown := sorted(set(sources) - set(wanted)):
        raise InputError(f"the network has no {unknown[0]}; {_some('it has', [*wanted])}")
    free = () if EMA_COUNT in sources else (EMA_COUNT, EMA_MEANS)
    if unsaid := [name for name in wanted if name not in sources and name not in free]:
        raise InputError(_some("no tensor is given for", unsaid))


def _require_there(
    used: Mapping[str, Source], wanted: Mapping[str, Shape], tensors: Mapping[str, Any]
) -> None:
    """Raises InputError for a tensor that is missing, used twice or of another shape."""
    names = Counter(source.name for source in used.values())
    if missing := [name for name in names if name not in tensors]:
        raise InputError(_some("lacks", missing))
    if twice := [name for name, count in names.items() if count > 1]:
        raise InputError(_some("used more than once:", twice))
    for name, source in used.items():
        found = tuple(getattr(tensors[source.name], "shape", ()))
        if found != (expected := source.shape(wanted[name])):
            raise InputError(f"the tensor {source.name} has shape {found}, expected {expected}")


def _left_out(
    tensors: Mapping[str, Any], used: Mapping[str, Source], patterns: Sequence[str]
) -> Counter[str]:
    """Returns how many unused tensors match each pattern. Raises InputError if one matches none."""
    names = {source.name for source in used.values()}
    return Counter(_pattern(name, patterns) for name in tensors if name not in names)


def _taken(source: Source, tensor: Any) -> tuple[Array, str]:
    """Returns a parameter, and the dtype of its tensor. Raises InputError."""
    theirs = floats(source.name, tensor)
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(source.turned(theirs.values), np.float32)
    if not np.isfinite(values).all():
        raise InputError(f"the tensor {source.name} holds numbers that float32 cannot hold")
    return values, theirs.dtype


def _pattern(name: str, patterns: Sequence[str]) -> str:
    """Returns the pattern that the name matches. Raises InputError if none does."""
    found = next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)
    if found is None:
        raise InputError(f"holds a tensor that the network does not have: {name}")
    return found


def _some(what: str, names: Sequence[str]) -> str:
    more = f", and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what} {', '.join(names[:3])}{more}"
