"""Generated brush-drawn cursive hiragana, 28×28, in place of Kuzushiji-MNIST when offline.

An allograph of ``vqtrain.data.strokes`` is a linear map from its control points to points half a
pixel apart on its curves, so all images of an allograph are drawn together. The control points are
jittered, mapped, slanted, warped and fitted to the square. Each point stamps a disc of the brush's
radius. Then the ink is dried, spread and printed. All random numbers of an image come from
``numpy.random.default_rng([seed, index])``. ``benchmarks/glyphs.py`` measures how close this set is
to the genuine one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import interpolate, ndimage

from vqtrain.data.strokes import CLASSES, Allograph

Floats = npt.NDArray[np.float32]

SIDE = 28
MARGIN = 6
"""Pixels on each side of the square, so that discs are not clipped at its edge."""
REACH = 4
"""Half the side of a disc's window. The largest disc and its soft edge fit into it."""
SPACING = 0.55
"""Pixels between two points of a curve. This is far less than a brush's radius, so that no single
disc shows in the outline."""
CHUNK = 1000
"""Images drawn at a time. This bounds the memory (120 MB with the interpreter) and changes nothing
else."""

CONTROLS = 48
"""The number of control points for which an image has random numbers. Allographs have fewer."""
WAVES = 3
FRAGMENT = 12
"""Points of the piece of a neighbouring character at the edge of some images."""

# Standard normal numbers of an image, in the order of its generator.
_SIZES = {
    "jitter": 2 * CONTROLS,
    "pressure": CONTROLS,
    "whole": 12,
    "waves": 6 * WAVES,
    "grain": SIDE * SIDE,
    "noise": SIDE * SIDE,
}
_ENDS = np.cumsum(list(_SIZES.values()))
_SLICES = {
    name: slice(int(end) - size, int(end))
    for (name, size), end in zip(_SIZES.items(), _ENDS, strict=True)
}
UNIFORMS = 8


@dataclass(frozen=True)
class Hand:
    """How the brush moves and the sheet is printed; tuned by eye and by ``benchmarks.glyphs``.

    jitter: of the control points, in the box's units
    shear, rotation (radians), log_aspect: standard deviations, for the whole character
    aspect: factor that narrows the box
    radius, radius_spread: median in pixels and standard deviation of the logarithm, over images
    pressure: the same standard deviation within an image
    chisel: how much thinner a stroke is along the edge of the brush
    taper: share of the radius lost at a stroke's end
    warp: displacement by smooth waves, in the box's units
    fragment: share of images with a piece of a neighbour
    edge: pixels from black to white
    dry: how deep the grain of the paper cuts
    noise: grey levels around the ink
    """

    jitter: float = 0.022
    shear: float = 0.14
    rotation: float = 0.08
    aspect: float = 0.85
    log_aspect: float = 0.16
    radius: float = 1.39
    radius_spread: float = 0.24
    pressure: float = 0.32
    chisel: float = 0.4
    taper: float = 0.55
    warp: float = 0.028
    fragment: float = 0.5
    edge: float = 1.3
    dry: float = 0.155
    noise: float = 5.0


HAND = Hand()


@dataclass(frozen=True)
class _Curves:
    """An allograph's curves: controls (K, 2), basis (P, K) and place (P,).

    points = basis @ controls; place is where each point lies along its stroke, from 0 to 1.
    """

    controls: Floats
    basis: Floats
    place: Floats


def glyphs(
    count: int, seed: int = 0, start: int = 0
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Returns images ``start`` to ``start + count - 1`` of the generated set of ``seed``.

    Images are (count, 28, 28) uint8, white ink (255) on black. Labels are (count,) uint8, 0 to 9
    for お き す つ な は ま や れ を; image i has class i mod 10. Image i does not depend on
    ``start`` and ``count``.

    Raises ValueError if count, seed or start is not an integer of at least 0.
    """
    for name, value in (("count", count), ("seed", seed), ("start", start)):
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{name} is {value!r}; it must be an integer of at least 0")
    images = np.empty((count, SIDE, SIDE), np.uint8)
    for first in range(0, count, CHUNK):
        last = min(first + CHUNK, count)
        images[first:last] = _draw_chunk(np.arange(start + first, start + last), int(seed))
    labels = (np.arange(start, start + count) % len(CLASSES)).astype(np.uint8)
    return images, labels


def _draw_chunk(indices: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.uint8]:
    normal = np.empty((len(indices), int(_ENDS[-1])), np.float32)
    uniform = np.empty((len(indices), UNIFORMS), np.float32)
    for row, index in enumerate(indices):
        rng = np.random.default_rng([seed, int(index)])
        rng.standard_normal(dtype=np.float32, out=normal[row])
        rng.random(dtype=np.float32, out=uniform[row])
    labels = indices % len(CLASSES)
    forms = np.array([len(allographs) for allographs in CLASSES])[labels]
    form = (uniform[:, 0] * forms).astype(np.int64)  # which allograph
    ink = np.empty((len(indices), SIDE, SIDE), np.float32)
    for label, allographs in enumerate(CLASSES):
        for number, allograph in enumerate(allographs):
            members = np.flatnonzero((labels == label) & (form == number))
            if len(members):
                ink[members] = _draw(
                    _curves(allograph), _named(normal[members]), uniform[members], HAND
                )
    return _print(ink, _named(normal), uniform, HAND)


def _named(normal: Floats) -> dict[str, Floats]:
    return {name: normal[:, part] for name, part in _SLICES.items()}


@functools.cache
def _curves(allograph: Allograph) -> _Curves:
    """The curves through the control points, sampled evenly for a character of full size."""
    strokes = [
        np.array([(int(p[:2]), int(p[2:])) for p in stroke.split()]) / 99 for stroke in allograph
    ]
    total = sum(map(len, strokes))
    bases, places, done = [], [], 0
    for points in strokes:
        # Centripetal: knots at the square root of the distance keep the curve from overshooting at
        # sharp turns.
        knots = np.concatenate(
            [[0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1) ** 0.5)]
        )
        spline = interpolate.make_interp_spline(
            knots, np.eye(len(points)), k=min(3, len(points) - 1)
        )
        fine = np.linspace(0, knots[-1], 400)
        length = np.concatenate(
            [[0], np.cumsum(np.linalg.norm(np.diff(spline(fine) @ points, axis=0), axis=1))]
        )
        place = np.linspace(0, 1, int(length[-1] * SIDE / SPACING) + 2)
        basis = np.zeros((len(place), total))
        basis[:, done : done + len(points)] = spline(np.interp(place * length[-1], length, fine))
        bases.append(basis)
        places.append(place)
        done += len(points)
    arrays = (np.concatenate(a).astype(np.float32) for a in (strokes, bases, places))
    return _Curves(*arrays)


def _draw(curves: _Curves, normal: dict[str, Floats], uniform: Floats, hand: Hand) -> Floats:
    """Ink in 0..1 of n images of one allograph, (n, 28, 28)."""
    n, k = len(uniform), len(curves.controls)
    whole = normal["whole"]
    controls = curves.controls + hand.jitter * normal["jitter"][:, : 2 * k].reshape(n, k, 2)
    points = curves.basis @ controls  # (n, P, 2)
    radius = _brush(curves, points, normal, hand)  # (n, P)
    points = _place(_bend(points, normal, hand), uniform, hand, radius)
    extra, extra_radius = _fragment(normal, uniform, hand)
    points, radius = np.concatenate([points, extra], 1), np.concatenate([radius, extra_radius], 1)
    edge = hand.edge * np.exp(0.2 * np.clip(whole[:, 4], -2, 2))
    return _stamp(points, radius, edge)


def _bend(points: Floats, normal: dict[str, Floats], hand: Hand) -> Floats:
    """Slants, turns, stretches and warps whole characters, so that crossing strokes still cross."""
    whole, waves = normal["whole"], normal["waves"].reshape(-1, WAVES, 6)
    for wave in range(WAVES):
        frequency, phase, size = waves[:, wave, :2], waves[:, wave, 2:4], waves[:, wave, 4:]
        angle = (
            4 * (points * frequency[:, None]).sum(2, keepdims=True) + 3 * phase[:, None]
        )  # (n, P, 2)
        points = points + hand.warp * size[:, None] * np.sin(angle)
    x, y = points[..., 0] - 0.5, points[..., 1] - 0.5
    x = x * hand.aspect * np.exp(hand.log_aspect * whole[:, 0:1]) - hand.shear * whole[:, 1:2] * y
    cos, sin = np.cos(hand.rotation * whole[:, 2:3]), np.sin(hand.rotation * whole[:, 2:3])
    return np.stack([cos * x - sin * y, sin * x + cos * y], 2)


def _brush(curves: _Curves, points: Floats, normal: dict[str, Floats], hand: Hand) -> Floats:
    """The radius in pixels at every point, (n, P): pressure, the chisel's angle, and thin ends."""
    k = len(curves.controls)
    whole = normal["whole"]
    base = hand.radius * np.exp(hand.radius_spread * np.clip(whole[:, 3:4], -2.5, 2.2))
    pressure = (curves.basis @ normal["pressure"][:, :k, None])[..., 0]
    along = np.gradient(points, axis=1)
    turn = np.arctan2(along[..., 1], along[..., 0]) + 0.9 + 0.25 * whole[:, 5:6]
    chisel = 1 - hand.chisel * np.cos(turn) ** 2
    start, end = np.clip(curves.place / 0.10, 0, 1), np.clip((1 - curves.place) / 0.3, 0, 1)
    taper = 1 - hand.taper * (1 - end) - 0.15 * (1 - start)
    radius: Floats = base * np.exp(hand.pressure * np.clip(pressure, -2, 2)) * chisel * taper
    return np.clip(radius, 0.3, REACH - 1)


def _place(points: Floats, uniform: Floats, hand: Hand, radius: Floats) -> Floats:
    """Fits the longest side of the inked box to the square, in pixels, as in the genuine set."""
    low, high = points.min(1), points.max(1)  # (n, 2)
    thick = 2 * radius.mean(1, keepdims=True)
    fill = SIDE * (0.89 + 0.1 * uniform[:, 1:2])
    scale = (fill - thick) / (high - low).max(1, keepdims=True)
    centre = SIDE / 2 - 0.5 + 1.6 * (uniform[:, 2:4] - 0.5)
    fitted: Floats = (points - (low + high)[:, None] / 2) * scale[:, None] + centre[:, None]
    return fitted


def _fragment(normal: dict[str, Floats], uniform: Floats, hand: Hand) -> tuple[Floats, Floats]:
    """Points (n, 12, 2) and radii (n, 12) of a neighbour above or below; radius 0 if none shows."""
    whole = normal["whole"]
    shows = uniform[:, 4] < hand.fragment
    along = np.linspace(-0.5, 0.5, FRAGMENT, dtype=np.float32)
    below = uniform[:, 5] < 0.7
    length = 3 + 6 * uniform[:, 7:8]
    x = SIDE * (0.1 + 0.8 * uniform[:, 6:7]) + length * along
    y = (
        np.where(below, SIDE - 0.6, -0.4)[:, None]
        + 1.2 * whole[:, 6:7] * along
        + 0.5 * np.abs(whole[:, 7:8])
    )
    radius = (
        np.where(shows, 0.9 * np.exp(0.3 * np.clip(whole[:, 8], -2, 2)), 0)[:, None] + 0 * along
    )
    return np.stack([x, y], 2).astype(np.float32), radius.astype(np.float32)


def _stamp(points: Floats, radius: Floats, edge: Floats) -> Floats:
    """The union of soft discs, (n, 28, 28); points (n, P, 2) in pixels, radius (n, P), edge (n,).

    Stamps each disc only in the window around it, and takes the maximum: 81 distances per point,
    not 784.
    """
    side = SIDE + 2 * MARGIN
    window = np.arange(-REACH, REACH + 1)
    points = np.clip(points, REACH - MARGIN, SIDE - 1 + MARGIN - REACH)
    nearest = np.rint(points).astype(np.int32)  # (n, P, 2)
    offset = (window - (points - nearest)[..., None]).astype(np.float32)  # (n, P, 2, window)
    square = offset * offset
    distance = np.sqrt(
        square[:, :, 1, :, None] + square[:, :, 0, None, :]
    )  # (n, P, window, window)
    ink = (radius[..., None, None] - distance) / edge[:, None, None, None] + 0.5
    corner = (
        (np.arange(len(points), dtype=np.int32)[:, None] * side + nearest[..., 1] + MARGIN) * side
        + nearest[..., 0]
        + MARGIN
    )
    at = corner[..., None, None] + (window[:, None] * side + window).astype(np.int32)
    seen = ink > 0
    canvas = np.zeros(len(points) * side * side, np.float32)
    np.maximum.at(canvas, at[seen], ink[seen])
    inner = slice(MARGIN, MARGIN + SIDE)
    return np.minimum(canvas.reshape(-1, side, side)[:, inner, inner], 1)


def _print(
    ink: Floats, normal: dict[str, Floats], uniform: Floats, hand: Hand
) -> npt.NDArray[np.uint8]:
    """Grey levels: the paper's grain breaks dry strokes, the scan leaves noise around the ink."""
    shape = ink.shape
    whole = normal["whole"]
    # 1.96 brings the smoothed grain back to a standard deviation of 1.
    grain = 1.96 * ndimage.gaussian_filter(
        normal["grain"].reshape(shape), (0, 0.6, 0.6), truncate=2.5
    )
    depth = hand.dry * np.exp(np.clip(whole[:, 9], -2, 1.8))[:, None, None]
    paper = ink * (1 - 0.4 * depth * np.maximum(grain + 0.2, 0))
    near = ndimage.uniform_filter(ink, (0, 5, 5))
    level = 255 * 1.12 * paper + hand.noise * (normal["noise"].reshape(shape) - 1.0) * (near > 0.08)
    grey: npt.NDArray[np.uint8] = np.clip(np.rint(level), 0, 255).astype(np.uint8)
    return grey
