"""Tokens proved in advance: what rounding can do to them under a named arithmetic, whatever machine
computes, in whatever order it adds.

The exact network has the parameters and the images as they are in float32. It takes values z_0 (the
image), z_1, ..., z_L (the latents), a row each. A machine has other values z_i + δ_i. What it
computes in row i is off by a local error e_i from what that row makes of the machine's own inputs,
and |e_i| is bounded: see ``arithmetics``. Rows are linear but for their activations, so before
these δ_i is W δ_(i-1) + e_i without remainder. An activation f at z, its input there off by |δ| <=
Δ, gives f(z + δ) = f(z) + f'(z) δ + r, where

    elu     |r| <= Δ² exp(min(0, z + Δ)) / 2 if z - Δ < 0, else 0: f'' is exp(z) below 0 and 0
            above, and f' is continuous
    relu    |r| <= max(0, Δ - |z|): where the input crosses 0, the way beyond
    silu    |r| <= Δ² / 4: |f''| <= 1/2

With r and the activation's own rounding counted as local errors, the latents move by

    δ_L = Σ over rows of J_i (e_i + r_i)

with the exact Jacobians J_i at the exact values: an identity, not an approximation. Δ_i comes from
the rows' magnitudes alone, Δ_i = |W| Δ_(i-1) + |e_i|. It is far too large at the end, but enters
squared, or only where a relu's input is near 0.

The machine answers by the direct form, Σ (x - c)², in float32, and by the first code if some are
equally near. Code k can win over the nearest code b if ||x + δ - c_k||² - ||x + δ - c_b||², which
is gap - 2 (c_k - c_b).δ, is not above the quantizer's own rounding (``vqref.agreement.bounds``). So
a token is proved if for every k

    gap > 2 Σ over rows, elements of |J_i' (c_k - c_b)| (|e_i| + |r_i|) + rounding of two distances

Codes that cannot win even with Δ_L need no Jacobian. The direction c_k - c_b of each other is
pulled back row by row, and no further ones of a token with a code that could win; once the errors
of the rows passed, and Δ for what lies below, cannot close the gap, it is dropped. On grids, whose
rows see a few neighbours, only the window that a token sees is pulled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vqref.agreement.arithmetics import (
    ARITHMETICS,
    Arithmetic,
    activation_error,
    local_error,
    products,
    remainder,
    spread,
)
from vqref.agreement.bounds import distance_error
from vqref.network import ACTIVATIONS, KINDS, before_activation, scattered, weights_of
from vqref.quantizer import squared_distances
from vqref.spec import CODEBOOK, Layer, ModelSpec, Step, plan
from vqref.validation import Array, Float64, Int64, Params, as_images, check_params

SLACK = 1 + 1e-7
"""Bounds are computed in float64, whose unit is 2e-9 of float32's: what it does to the exact values
is 4e-9 of the bound, and this leaves 25 times as much for what cancels in a Jacobian."""

PULLED_VALUES = 2**22
"""Values of gradients held at once, 32 MiB per array."""


CLAIM = "float32"
"""What graphs whose networks are float32 compute in, on the CPU, and on CUDA, where TF32 is off.
Networks of fewer bits round activations, too, which no arithmetic covers."""

NARROW = "lanes"
"""What most machines really do; its share is told beside that of CLAIM."""


class Proof(NamedTuple):
    """What is known in advance of the tokens of some images under an arithmetic.

    indices (N, S): the exact tokens. proved (N, S): whether no rounding can change them. rivals (N,
    S): the code that comes nearest to winning, or one that could; the token itself if there is no
    other code. excess (N, S): by how much that code's squared distance stays beyond what rounding
    can do; negative if it could win. moved (N, S): a bound on the length by which the latent can
    move, from magnitudes alone: far too large.
    """

    indices: Int64
    proved: npt.NDArray[np.bool_]
    rivals: Int64
    excess: Float64
    moved: Float64


def prove(
    spec: ModelSpec, params: Params, images: npt.ArrayLike, arithmetic: str = "float32"
) -> Proof:
    """Proves the tokens of images (N, C, H, W) in [0, 1] as far as they can be, under a name of
    ARITHMETICS. Images and parameters count as float32 rounds them. Raises ValueError for another
    name, for images or parameters that do not fit, and for latents so large that float64 cannot
    hold their distances."""
    if arithmetic not in ARITHMETICS:
        raise ValueError(f"arithmetic is {arithmetic!r}, expected {', '.join(ARITHMETICS)}")
    check_params(spec, params)
    x = as_images(images, spec).astype(np.float32).astype(np.float64)
    params = {name: np.asarray(each, np.float32) for name, each in params.items()}
    codebook = params[CODEBOOK].astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # what has no bound is not proved
        found = [
            _prove_one(enclose(spec, params, image[None], ARITHMETICS[arithmetic]), codebook)
            for image in x
        ]
    if not found:
        nothing = np.empty((0, spec.latent_size))
        return Proof(
            nothing.astype(np.int64), nothing > 0, nothing.astype(np.int64), nothing, nothing
        )
    return Proof(*(np.stack(each) for each in zip(*found, strict=True)))


def count_proved(
    spec: ModelSpec,
    params: Params,
    images: Array,
    proved: npt.NDArray[np.bool_] | None = None,
) -> dict[str, int]:
    """How many tokens of images (N, C, H, W) are proved, plain data: images, tokens, and a count
    for CLAIM and NARROW each.

    proved: which are for CLAIM, if the caller knows. These are for NARROW, too.
    """
    wide = prove(spec, params, images, CLAIM).proved if proved is None else proved
    rest = ~wide.all(axis=1)
    also = prove(spec, params, images[rest], NARROW).proved
    counts = {CLAIM: int(wide.sum()), NARROW: int(wide[~rest].sum() + also.sum())}
    return {"images": len(images), "tokens": wide.size, **counts}


def tell_proved(counts: Mapping[str, Any]) -> str:
    """What ``count_proved`` found, in words."""
    tokens = counts["tokens"]
    shares = [f"{counts[name] / max(1, tokens):.2%}" for name in (CLAIM, NARROW)]
    return (
        f"of {tokens} tokens of {counts['images']} images {shares[0]} are proved for float32 in "
        f"any order, {shares[1]} in 16 lanes or more"
    )


@dataclass(frozen=True)
class Enclosure:
    """One image through the encoder, and what rounding can do on the way.

    steps: the rows. weights: by the names of rows. By number of a value, from 0 for the image:
    values and radius, |δ| <= radius. By number of a row, from 1: slopes, of its activation; errors,
    |e|, and after, |r| and the activation's rounding. All without the axis of images.
    """

    steps: tuple[Step, ...]
    weights: Mapping[str, list[Float64]]
    values: list[Float64]
    radius: list[Float64]
    slopes: list[Float64]
    errors: list[Float64]
    after: list[Float64]

    @property
    def latents(self) -> Float64:
        return self.values[-1]


def enclose(spec: ModelSpec, params: Params, image: Float64, arithmetic: Arithmetic) -> Enclosure:
    """The encoder on one image (1, C, H, W), with bounds."""
    weights, steps = weights_of(spec.encoder, params), plan(spec.encoder)
    values, radius = [image], [np.zeros_like(image)]
    slopes, errors, after = [image], [image], [image]  # of value 0: not used
    for step in steps:
        layer, kind = step.layer, ACTIVATIONS[step.layer.activation]
        taken = [(values[i], radius[i]) for i in step.sources]
        z = before_activation(step, dict(enumerate(values)), weights)
        merged = [_merged(steps, i) for i in step.sources]
        wide = spread(layer, taken, weights[layer.name])
        error = local_error(layer, arithmetic, taken, weights[layer.name], z, wide, merged)
        wide = (wide + error) * SLACK
        y, slope = kind.value(z), kind.slope(z)
        left = remainder(layer.activation, z, wide)
        left += activation_error(layer.activation, z, wide, arithmetic)
        values.append(y)
        radius.append((np.abs(slope) * wide + left) * SLACK)
        for kept, each in ((slopes, slope), (errors, error * SLACK), (after, left * SLACK)):
            kept.append(each)
    parts = (values, radius, slopes, errors, after)
    return Enclosure(steps, weights, *([array[0] for array in part] for part in parts))


def _merged(steps: tuple[Step, ...], value: int) -> int:
    """How many products a value sums up, if a runtime may go on adding to that sum."""
    if value == 0 or steps[value - 1].layer.activation != "linear":
        return 0
    return products(steps[value - 1].layer)


def _prove_one(enclosure: Enclosure, codebook: Float64) -> Proof:
    """A Proof without its first axis."""
    latents, radius = enclosure.latents, enclosure.radius[-1]
    moved = np.sqrt(np.square(radius).sum(axis=1))
    size, norms = codebook.shape[1], np.sqrt(np.square(codebook).sum(axis=1))
    count = len(latents)
    indices, rivals = np.empty(count, np.int64), np.empty(count, np.int64)
    excess = np.empty(count)
    for rows, distances in squared_distances(latents, codebook):
        best, each = distances.argmin(axis=1), np.arange(len(distances))
        wide = moved[rows, None]
        error = distance_error(
            distances,
            np.sqrt(np.square(latents[rows]).sum(axis=1))[:, None],
            norms,
            size,
            precision="float32",
            moved=wide,
        )
        least = distances[each, best][:, None]
        room = (distances - least - error - error[each, best][:, None]) / 2  # (rows, K)
        room[each, best] = np.inf
        left = room - SLACK * wide * (np.sqrt(distances) + np.sqrt(least))
        pairs = np.argwhere(~(left > 0))
        for start in range(0, len(pairs), PULLED_VALUES // size + 1):
            tokens, codes = pairs[start : start + PULLED_VALUES // size + 1].T
            own, where = room[tokens, codes], tokens + (rows.start or 0)
            directions = codebook[codes] - codebook[best[tokens]]
            left[tokens, codes] = own - _bounds(enclosure, where, directions, own)
        left[np.isnan(left)] = -np.inf
        indices[rows], rivals[rows] = best, left.argmin(axis=1)
        excess[rows] = 2 * left[each, rivals[rows]]
    return Proof(indices, excess > 0, rivals, excess, moved)


def _bounds(enclosure: Enclosure, tokens: Int64, directions: Float64, room: Float64) -> Float64:
    """Bounds (B,) on |direction . δ|, from magnitudes alone where these suffice. Elsewhere the
    direction of each token that leaves least room for its length is pulled back first; if it is not
    less than its room the token is not proved, and its others need not be known: -inf."""
    bounds: Float64 = SLACK * (np.abs(directions) * enclosure.radius[-1][tokens]).sum(axis=1)
    hopeless = np.isin(tokens, tokens[~(room > 0)])
    pending = ~(bounds < room) & ~hopeless
    near = room / np.sqrt(np.square(directions).sum(axis=1))
    order = np.lexsort((near, tokens))
    order = order[pending[order]]
    first = order[np.unique(tokens[order], return_index=True)[1]]
    bounds[first] = reach(enclosure, tokens[first], directions[first], room[first])
    pending[first] = False
    lost = pending & np.isin(tokens, tokens[first[~(bounds[first] < room[first])]])
    bounds[lost] = -np.inf
    rest = np.flatnonzero(pending & ~lost)
    bounds[rest] = reach(enclosure, tokens[rest], directions[rest], room[rest])
    return bounds


class _Window(NamedTuple):
    """A part of each of B gradients of a value, outside of which they are 0.

    values (B, C, h, w). origin (B, 2): row and column of its first place, which may lie outside of
    the value; None: it is the whole value, of any shape.
    """

    values: Float64
    origin: Int64 | None

    def take(self, kept: npt.NDArray[np.bool_]) -> _Window:
        return _Window(self.values[kept], None if self.origin is None else self.origin[kept])


def reach(enclosure: Enclosure, tokens: Int64, directions: Float64, room: Float64) -> Float64:
    """Bounds (B,) on |direction . δ|, δ what the latents of some tokens (B,) can move by,
    directions (B, D): what the exact Jacobian gives, or anything that is proved to be less than
    ``room`` (B,)."""
    largest = max(value.size for value in enclosure.values)
    step = max(1, PULLED_VALUES // min(largest, PULLED_VALUES // 8))
    bounds = np.empty(len(tokens))
    for start in range(0, len(tokens), step):
        part = slice(start, start + step)
        bounds[part] = _pulled_at_once(enclosure, tokens[part], directions[part], room[part])
    return bounds


def _pulled_at_once(
    enclosure: Enclosure, tokens: Int64, directions: Float64, room: Float64
) -> Float64:
    bounds, spent = np.empty(len(tokens)), np.zeros(len(tokens))
    live, last = np.arange(len(tokens)), len(enclosure.steps)
    gradients = {last: _start(enclosure, tokens, directions)}
    for number, step in reversed([*enumerate(enclosure.steps, 1)]):
        if number not in gradients:
            continue
        g = gradients.pop(number)
        spent += _weighed(g, enclosure.after[number])
        g = g._replace(values=g.values * _cut(enclosure.slopes[number], g))
        spent += _weighed(g, enclosure.errors[number])
        for source, each in zip(step.sources, _pull(enclosure, step, g), strict=True):
            other = gradients.get(source)
            gradients[source] = (
                each if other is None else _joined(each, other, enclosure.values[source])
            )
        reached = spent + sum(_weighed(g, enclosure.radius[i]) for i, g in gradients.items())
        bounds[live] = SLACK * reached
        kept = ~(SLACK * reached < room[live])
        if not kept.any():
            break
        live, spent = live[kept], spent[kept]
        gradients = {i: g.take(kept) for i, g in gradients.items()}
    return bounds


def _start(enclosure: Enclosure, tokens: Int64, directions: Float64) -> _Window:
    """The directions as gradients of the latents (S, D)."""
    values = np.zeros((len(tokens), *enclosure.latents.shape))
    values[np.arange(len(tokens)), tokens] = directions
    return _Window(values, None)


def _pull(enclosure: Enclosure, step: Step, g: _Window) -> Iterator[_Window]:
    """The gradients of a row's inputs."""
    layer, weights = step.layer, enclosure.weights[step.layer.name]
    if g.origin is not None and layer.kind in ("affine", "add", "activation"):
        scale = layer.scale if layer.kind == "affine" else 1.0
        yield from [g._replace(values=scale * g.values)] * len(step.sources)
    elif g.origin is not None and layer.kind == "conv":
        yield _through_conv(layer, g, weights[0])
    elif layer.kind == "to_vectors" and g.origin is None:
        yield _to_places(layer, g)
    else:
        whole = g if g.origin is None else _whole(g, layer.out_shape)
        taken = [
            np.broadcast_to(enclosure.values[i], (len(g.values), *enclosure.values[i].shape))
            for i in step.sources
        ]
        for each in KINDS[layer.kind].backward(layer, whole.values, *taken, *weights):
            yield _Window(each, None)


def _to_places(layer: Layer, g: _Window) -> _Window:
    """The gradient of a grid's latents (S, D) as that of one place of the grid each, if there is
    one place."""
    (whole,) = KINDS[layer.kind].backward(
        layer, g.values, np.empty((len(g.values), *layer.in_shape))
    )
    flat = (whole != 0).max(axis=1).reshape(len(whole), -1)  # (B, h*w)
    place = np.stack(np.unravel_index(flat.argmax(axis=1), layer.in_shape[1:]), axis=1)
    if (flat.sum(axis=1) > 1).any():
        return _Window(whole, None)
    each = np.arange(len(whole))
    return _Window(whole[each, :, place[:, 0], place[:, 1]][:, :, None, None], place)


def _through_conv(layer: Layer, g: _Window, weight: Float64) -> _Window:
    """As ``conv_backward``, of a window: the input's window begins where the kernel of its first
    place does."""
    assert g.origin is not None
    taps = np.tensordot(g.values, weight, axes=((1,), (0,)))
    sides = (layer.stride * (n - 1) + k for n, k in zip(taps.shape[1:3], layer.kernel, strict=True))
    values = scattered(layer, taps, (len(taps), layer.in_shape[0], *sides))
    window = _Window(values, layer.stride * g.origin - np.array([pads[0] for pads in layer.pads]))
    if math.prod(values.shape[2:]) > math.prod(layer.in_shape[1:]):
        return _whole(window, layer.in_shape)
    return window


def _joined(a: _Window, b: _Window, value: Float64) -> _Window:
    """The sum of two gradients of one value."""
    if a.origin is None or b.origin is None:
        a, b = (g if g.origin is None else _whole(g, value.shape) for g in (a, b))
        return _Window(a.values + b.values, None)
    apart = (b.origin - a.origin)[0]  # the same for all: both came down from one place
    ends = np.maximum(a.values.shape[2:], apart + b.values.shape[2:])
    begin = np.minimum(0, apart)
    total = np.zeros((*a.values.shape[:2], *(ends - begin)))
    for g, (top, left) in ((a, -begin), (b, apart - begin)):
        height, width = g.values.shape[2:]
        total[:, :, top : top + height, left : left + width] += g.values
    return _Window(total, a.origin + begin)


def _whole(g: _Window, shape: tuple[int, ...]) -> _Window:
    """A window as the whole value of ``shape`` (C, H, W)."""
    assert g.origin is not None
    total = np.zeros((len(g.values), *shape))
    rows, columns, inside = _places(g, shape)
    each = np.arange(len(total))[:, None, None]
    moved = np.where(inside[:, None], g.values, 0.0).transpose(0, 2, 3, 1)  # (B, h, w, C)
    np.add.at(total.transpose(0, 2, 3, 1), (each, rows, columns), moved)
    return _Window(total, None)


def _cut(array: Float64, g: _Window) -> Float64:
    """The part of an array of the value's shape that a window covers, 0 outside of it."""
    if g.origin is None:
        return array[None]
    rows, columns, inside = _places(g, array.shape)
    return np.where(inside[:, None], array[:, rows, columns].transpose(1, 0, 2, 3), 0.0)


def _places(g: _Window, shape: tuple[int, ...]) -> tuple[Int64, Int64, npt.NDArray[np.bool_]]:
    """Rows (B, h, 1) and columns (B, 1, w) of a window's places, clipped to the value, and which
    lie in it, (B, h, w)."""
    assert g.origin is not None
    height, width = g.values.shape[2:]
    rows = (g.origin[:, :1] + np.arange(height))[:, :, None]
    columns = (g.origin[:, 1:] + np.arange(width))[:, None, :]
    inside = (rows >= 0) & (rows < shape[1]) & (columns >= 0) & (columns < shape[2])
    return rows.clip(0, shape[1] - 1), columns.clip(0, shape[2] - 1), inside


def _weighed(g: _Window, array: Float64) -> Float64:
    """Σ |g| a over a value's elements, (B,)."""
    part = np.abs(g.values) * _cut(array, g)
    total: Float64 = part.reshape(len(part), -1).sum(axis=1)
    return total
