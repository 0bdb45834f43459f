"""What is known of one image's way through the encoder, and gradients pulled back along it.

The gradients give bounds on the latents. ``vqref.agreement.advance`` has the derivation. Rows on
grids see only a few neighbours, so only the window that a result sees is pulled back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vqref.network import KINDS
from vqref.spec import Layer, Step
from vqref.validation import Float64, Int64

SLACK = 1 + 1e-7
"""A factor on bounds that covers their own rounding.

Bounds are computed in float64, whose unit is 2e-9 of float32's. Its effect on the exact values is
4e-9 of the bound. The factor leaves 25 times as much, for cancellation in a Jacobian."""

PULLED_VALUES = 2**22
"""The most values of gradients held at once, 32 MiB per array."""

PRICES = 5
"""The lowest price tried is 2 ** -PRICES of the highest price that can help."""


class Bounds(NamedTuple):
    """Bounds on the error δ of an array.

    radius: |δ| of each element.
    places: ||δ|| at each place of a grid, (1, H, W). For other arrays, ||δ|| of all, (1, ...).
    whole: ||δ|| of all; inf if not known.
    """

    radius: Float64
    places: Float64
    whole: float

    @classmethod
    def none(cls, array: Float64) -> Bounds:
        return cls(np.zeros_like(array), lengths(np.zeros_like(array)), 0.0)

    def together(self) -> Bounds:
        """Returns the bounds, each as small as the others allow."""
        radius = np.minimum(self.radius, np.minimum(self.places, self.whole))
        places = np.minimum(self.places, lengths(radius))
        return Bounds(radius, places, min(self.whole, length(places)))


def lengths(array: Float64) -> Float64:
    """Returns ||.|| at each place.

    This is (1, H, W) for an array (C, H, W), and one number, (1, ...), for any other array.
    """
    axes = 0 if array.ndim == 3 else tuple(range(array.ndim))
    found: Float64 = SLACK * np.sqrt(np.square(array).sum(axis=axes, keepdims=True))
    return found


def length(array: Float64) -> float:
    return SLACK * float(np.sqrt(np.square(array).sum()))


@dataclass(frozen=True)
class Row:
    """What is known of a row. Its arrays have no axis of images.

    value, off: the result, and bounds on its error.
    z, before: the same before the activation.
    slope: the slope of the activation at z.
    inputs: |ρ|, by which its input moves if factors are rounded; None if they are not.
    error: |e|, the local error.
    after, bend: |r|, which is at most bend δ².
    rounding: the error of the activation's own computation.
    """

    value: Float64
    off: Bounds
    z: Float64
    before: Bounds
    slope: Float64
    inputs: Float64 | None
    error: Float64
    after: Float64
    bend: Float64
    rounding: Float64

    @classmethod
    def exact(cls, value: Float64) -> Row:
        """Returns the row of an array that is known exactly, such as the image."""
        none, bounds = np.zeros_like(value), Bounds.none(value)
        return cls(value, bounds, value, bounds, np.ones_like(value), None, none, none, none, none)


@dataclass(frozen=True)
class Enclosure:
    """One image's way through the encoder, and what rounding can do on it.

    steps: the rows of the network.
    weights: weight and bias by row.
    rows: what is known of each row, by number; 0 is the image.
    """

    steps: tuple[Step, ...]
    weights: Mapping[str, list[Float64]]
    rows: tuple[Row, ...]

    @property
    def latents(self) -> Float64:
        return self.rows[-1].value

    def before(self, number: int) -> Enclosure:
        """Returns the rows up to ``number``, the last one without its activation."""
        row = self.rows[number]
        none = np.zeros_like(row.value)
        plain = replace(row, slope=np.ones_like(none), after=none, bend=none, rounding=none)
        return Enclosure(self.steps[:number], self.weights, (*self.rows[:number], plain))


class Told(NamedTuple):
    """What pulling B gradients back finds on the way.

    curved: (B,), the part of each bound that comes from |r|.
    seen: by number of a row, the largest |g| of each element of its result.
    """

    curved: Float64
    seen: Mapping[int, Float64]


class Window(NamedTuple):
    """A part of each of B gradients of a value. Outside of it, they are 0.

    values: (B, C, h, w).
    origin: (B, 2), row and column of its first place, which may lie outside the value. None means
        that the window is the whole value, of any shape.
    """

    values: Float64
    origin: Int64 | None

    def take(self, kept: npt.NDArray[np.bool_]) -> Window:
        return Window(self.values[kept], None if self.origin is None else self.origin[kept])


def reach(
    enclosure: Enclosure,
    tokens: Int64,
    directions: Float64,
    room: Float64,
    told: Told | None = None,
) -> Float64:
    """Returns bounds (B,) on |direction . δ|, where δ is how far latents of tokens (B,) can move.

    directions: (B, D).
    room: (B,). A bound is what the exact Jacobian gives, or any proved bound below its room.
    """
    largest = max(row.value.size for row in enclosure.rows)
    step = max(1, PULLED_VALUES // min(largest, PULLED_VALUES // 8))
    bounds = np.empty(len(tokens))
    for start in range(0, len(tokens), step):
        part = slice(start, start + step)
        values = np.zeros((len(tokens[part]), *enclosure.latents.shape))
        values[np.arange(len(values)), tokens[part]] = directions[part]
        own = None if told is None else told._replace(curved=told.curved[part])
        bounds[part] = pulled(enclosure, Window(values, None), room[part], own)
    return bounds


def pulled(
    enclosure: Enclosure,
    start: Window,
    room: Float64,
    told: Told | None = None,
    work: float | None = None,
) -> Float64:
    """Returns bounds like ``reach``, for B gradients of the last row.

    Every row passed gives a bound, and the smallest holds.

    work: the most multiplications to spend, on the first gradients if not on all. Each |r| then
        counts for itself.
    """
    bounds, spent = np.full(len(room), np.inf), np.zeros(len(room))
    live = np.arange(len(room))
    gradients = {len(enclosure.steps): start}
    for number, step in reversed([*enumerate(enclosure.steps, 1)]):
        if number not in gradients:
            continue
        if work is not None and step.layer.parameters:
            weight, size = step.layer.parameters[0][1], gradients[number].values[0].size
            cost = size * math.prod(weight[1:])
            kept = np.arange(len(live)) < work // cost
            if not kept.any():
                break
            live, spent, work = live[kept], spent[kept], work - cost * int(kept.sum())
            gradients = {i: g.take(kept) for i, g in gradients.items()}
        g, row = gradients.pop(number), enclosure.rows[number]
        curved = _curved(row, g) if work is None else _weighed(g, row.after)
        spent += curved + _weighed(g, row.rounding)
        if told is not None:
            told.curved[live] += curved
            if number in told.seen:
                _gathered(g, told.seen[number])
        g = g._replace(values=g.values * _cut(row.slope, g))
        spent += _weighed(g, row.error)
        for source, each in zip(step.sources, _pull(enclosure, step, g), strict=True):
            if row.inputs is not None:
                spent += _weighed(each, row.inputs)
            other = gradients.get(source)
            shape = enclosure.rows[source].value.shape
            gradients[source] = each if other is None else _joined(each, other, shape)
        reached = spent + sum(_moved(enclosure.rows[i].off, g) for i, g in gradients.items())
        bounds[live] = np.fmin(bounds[live], SLACK * reached)
        kept = ~(bounds[live] < room[live])
        if not kept.any():
            break
        live, spent = live[kept], spent[kept]
        gradients = {i: g.take(kept) for i, g in gradients.items()}
    return bounds


def _moved(off: Bounds, g: Window) -> Float64:
    """Bounds (B,) on |g . δ|, from the bounds on elements, on places and on the whole."""
    bounds = _weighed(g, off.radius)
    if off.whole == np.inf:
        return bounds
    axes = 1 if g.values.ndim == 4 else tuple(range(1, g.values.ndim))
    sizes = np.sqrt(np.square(g.values).sum(axis=axes, keepdims=True))
    all_places = np.sqrt(np.square(sizes).reshape(len(sizes), -1).sum(axis=1))
    bounds = np.minimum(bounds, _weighed(g._replace(values=sizes), off.places))
    least: Float64 = np.minimum(bounds, off.whole * all_places)
    return least


def _curved(row: Row, g: Window) -> Float64:
    """Bounds (B,) on Σ |g| |r| of a row.

    Takes each r as large as it can be, or charges a price p. Since Σ δ² <= ||δ||² and |r| <= bend
    δ², every p gives

        Σ |g| |r| <= p ||δ||² + Σ min(max(0, |g| bend - p) Δ², |g| max |r|)
    """
    bounds, off = _weighed(g, row.after), row.before
    if not 0 < off.whole < np.inf or not bounds.any():
        return bounds
    places = _cut(np.square(off.places), g)
    square = np.minimum(off.whole**2, places.reshape(len(places), -1).sum(axis=1))
    square = np.maximum(square, np.finfo(float).tiny)
    size, cost = np.abs(g.values), np.square(_cut(off.radius, g))
    each, bend, most = bounds, size * _cut(row.bend, g), size * _cut(row.after, g)
    for power in range(1, PRICES + 1):
        price = bounds * 2.0**-power / square
        rest = (bend - price.reshape(-1, *(1,) * (size.ndim - 1))).clip(0) * cost
        rest = np.minimum(rest, most).reshape(len(rest), -1).sum(axis=1)
        each = np.minimum(each, SLACK * (price * square + rest))
    return each


def _gathered(g: Window, most: Float64) -> None:
    """Raises ``most``, which has a value's shape, to the |g| of each gradient."""
    if g.origin is None:
        np.maximum(most, np.abs(g.values).max(axis=0), out=most)
        return
    rows, columns, inside = _places(g, most.shape)
    size = np.where(inside[:, None], np.abs(g.values), 0.0).transpose(0, 2, 3, 1)
    np.maximum.at(most.transpose(1, 2, 0), (rows, columns), size)


def _pull(enclosure: Enclosure, step: Step, g: Window) -> Iterator[Window]:
    """The gradients of a row's inputs."""
    layer, weights = step.layer, enclosure.weights[step.layer.name]
    if g.origin is not None and layer.kind in ("affine", "add", "activation"):
        scale = layer.scale if layer.kind == "affine" else 1.0
        yield from [g._replace(values=scale * g.values)] * len(step.sources)
    elif layer.kind == "conv":
        yield _through_conv(layer, g, weights[0])
    elif layer.kind == "to_vectors" and g.origin is None:
        yield _to_places(layer, g)
    else:
        whole = g if g.origin is None else _whole(g, layer.out_shape)
        values = [enclosure.rows[i].value for i in step.sources]
        taken = [np.broadcast_to(value, (len(g.values), *value.shape)) for value in values]
        for each in KINDS[layer.kind].backward(layer, whole.values, *taken, *weights):
            yield Window(each, None)


def _to_places(layer: Layer, g: Window) -> Window:
    """The gradient of a grid's latents (S, D), as windows of one place of the grid each.

    If one of them has several places, returns the whole grid instead.
    """
    (whole,) = KINDS[layer.kind].backward(
        layer, g.values, np.empty((len(g.values), *layer.in_shape))
    )
    flat = (whole != 0).max(axis=1).reshape(len(whole), -1)  # (B, h*w)
    place = np.stack(np.unravel_index(flat.argmax(axis=1), layer.in_shape[1:]), axis=1)
    if (flat.sum(axis=1) > 1).any():
        return Window(whole, None)
    each = np.arange(len(whole))
    return Window(whole[each, :, place[:, 0], place[:, 1]][:, :, None, None], place)


def _through_conv(layer: Layer, g: Window, weight: Float64) -> Window:
    """The same as ``conv_backward``, also for windows, in a third of the time.

    It is faster because channels lie together in memory. The input's window begins where the kernel
    of its first place begins.
    """
    (height, width), s = g.values.shape[2:], layer.stride
    places = g.values.transpose(0, 2, 3, 1).reshape(-1, len(weight))
    taps = np.ascontiguousarray(weight.transpose(2, 3, 0, 1))
    sides = [s * (n - 1) + k for n, k in zip((height, width), layer.kernel, strict=True)]
    origin = np.array([-pads[0] for pads in layer.pads])
    if g.origin is None:
        pairs = zip(sides, layer.in_shape[1:], layer.pads, strict=True)
        sides = [max(side, n + sum(pads)) for side, n, pads in pairs]
    total = np.zeros((len(g.values), *sides, layer.in_shape[0]))
    for a, b in np.ndindex(layer.kernel):
        at = total[:, a : a + s * (height - 1) + 1 : s, b : b + s * (width - 1) + 1 : s]
        at += (places @ taps[a, b]).reshape(at.shape)
    values = total.transpose(0, 3, 1, 2)
    if g.origin is None:
        top, left = -origin
        rows, columns = layer.in_shape[1:]
        return Window(values[:, :, top : top + rows, left : left + columns], None)
    window = Window(values, s * g.origin + origin)
    if math.prod(sides) > math.prod(layer.in_shape[1:]):
        return _whole(window, layer.in_shape)
    return window


def _joined(a: Window, b: Window, shape: tuple[int, ...]) -> Window:
    """The sum of two gradients of one value of the given shape."""
    if a.origin is None or b.origin is None:
        a, b = (g if g.origin is None else _whole(g, shape) for g in (a, b))
        return Window(a.values + b.values, None)
    apart = (b.origin - a.origin)[0]  # the same for all: both came from one place
    ends = np.maximum(a.values.shape[2:], apart + b.values.shape[2:])
    begin = np.minimum(0, apart)
    total = np.zeros((*a.values.shape[:2], *(ends - begin)))
    for g, (top, left) in ((a, -begin), (b, apart - begin)):
        height, width = g.values.shape[2:]
        total[:, :, top : top + height, left : left + width] += g.values
    return Window(total, a.origin + begin)


def _whole(g: Window, shape: tuple[int, ...]) -> Window:
    """A window as the whole value of ``shape`` (C, H, W)."""
    assert g.origin is not None
    total = np.zeros((len(g.values), *shape))
    rows, columns, inside = _places(g, shape)
    each = np.arange(len(total))[:, None, None]
    moved = np.where(inside[:, None], g.values, 0.0).transpose(0, 2, 3, 1)  # (B, h, w, C)
    np.add.at(total.transpose(0, 2, 3, 1), (each, rows, columns), moved)
    return Window(total, None)


def _cut(array: Float64, g: Window) -> Float64:
    """The part of an array of the value's shape that each window covers; 0 outside the array."""
    if g.origin is None:
        return array[None]
    rows, columns, inside = _places(g, array.shape)
    part = array.transpose(1, 2, 0)[rows, columns]  # (B, h, w, C), as gradients lie in memory
    return np.where(inside[..., None], part, 0.0).transpose(0, 3, 1, 2)


def _places(g: Window, shape: tuple[int, ...]) -> tuple[Int64, Int64, npt.NDArray[np.bool_]]:
    """Rows (B, h, 1) and columns (B, 1, w) of a window's places, clipped to the value.

    Also returns which of them lie in the value, (B, h, w).
    """
    assert g.origin is not None
    height, width = g.values.shape[2:]
    rows = (g.origin[:, :1] + np.arange(height))[:, :, None]
    columns = (g.origin[:, 1:] + np.arange(width))[:, None, :]
    inside = (rows >= 0) & (rows < shape[1]) & (columns >= 0) & (columns < shape[2])
    return rows.clip(0, shape[1] - 1), columns.clip(0, shape[2] - 1), inside


def _weighed(g: Window, array: Float64) -> Float64:
    """Σ |g| a over a value's elements, (B,)."""
    part = np.abs(g.values) * _cut(array, g)
    total: Float64 = part.reshape(len(part), -1).sum(axis=1)
    return total
