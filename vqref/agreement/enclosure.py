"""One image through the encoder under an arithmetic, and what rounding can do in each row.

``vqref.agreement.advance`` has the derivation.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property

import numpy as np

from vqref.agreement.arithmetics import (
    LIPSCHITZ,
    UNBOUNDED,
    Arithmetic,
    activation_error,
    curvature,
    local_error,
    products,
    remainder,
    spread,
)
from vqref.agreement.pulled import SLACK, Bounds, Enclosure, Row, Window, length, lengths, pulled
from vqref.network import ACTIVATIONS, KINDS, weights_of
from vqref.spec import Layer, ModelSpec, Step, plan
from vqref.validation import Float64, Params

NARROW = 32
"""The most results of a row for which bounds before its activation are pulled back one by one."""


class Network:
    """The encoder's rows under an arithmetic.

    weights: weight and bias by row. If weights are rounded, these are the centres of what they may
        become.
    spare: by row, the radii of rounded weights.
    """

    def __init__(self, spec: ModelSpec, params: Params, arithmetic: Arithmetic) -> None:
        self.arithmetic, self.steps = arithmetic, plan(spec.encoder)
        self.weights = weights_of(spec.encoder, params)
        self.spare: dict[str, Float64] = {}
        if arithmetic.factors is not None:
            for name, pair in self.weights.items():
                if pair:
                    pair[0], self.spare[name] = arithmetic.factors.rounded(pair[0])

    @cached_property
    def norms(self) -> dict[str, tuple[float, float, Float64]]:
        """Returns, for each row with weights, three bounds on l2 norms.

        They are the norm of the whole row, the norm of the part that one place of its result sees,
        and the same for each channel. The last two are inf if the row's kind has no such places.
        """
        found = {}
        for layer in (step.layer for step in self.steps if step.layer.parameters):
            weight, place, each = self.weights[layer.name][0], math.inf, np.array(math.inf)
            if layer.kind in UNBOUNDED:
                found[layer.name] = math.inf, place, each
                continue
            if layer.kind == "conv":
                flat = weight.reshape(len(weight), -1)
                place = SLACK * float(np.linalg.norm(flat, 2))
                each = SLACK * np.sqrt(np.square(flat).sum(axis=1))[:, None, None]
            found[layer.name] = SLACK * norm(layer, weight), place, each
        return found


def enclose(
    network: Network,
    image: Float64,
    *,
    closely: bool = True,
    begun: tuple[Row, ...] = (),
    cap: Float64 | float = math.inf,
) -> Enclosure:
    """Returns the encoder's values on one image (C, H, W), with bounds.

    closely: whether to use lengths and Jacobians too.
    begun: rows that are already known.
    cap: a further bound on the radius, before its activation, of the first row computed here.
    """
    rows = [*begun] or [Row.exact(image)]
    for step in network.steps[len(rows) - 1 :]:
        rows.append(_enclosed(network, tuple(rows), step, closely, cap))
        cap = math.inf
    return Enclosure(network.steps, network.weights, tuple(rows))


def _enclosed(
    network: Network, rows: tuple[Row, ...], step: Step, closely: bool, cap: Float64 | float
) -> Row:
    layer, arithmetic, kind = step.layer, network.arithmetic, ACTIVATIONS[step.layer.activation]
    weights, spare = network.weights[layer.name], network.spare.get(layer.name)
    taken, rho = [(rows[i].value, rows[i].off) for i in step.sources], None
    if spare is not None and arithmetic.factors is not None:
        ((x, off),) = taken
        x, rho = arithmetic.factors.of_inputs(x, off.radius)
        off = Bounds(off.radius + rho, off.places + lengths(rho), off.whole + length(rho))
        taken = [(x, off)]
    pairs = [(x[None], off.radius[None]) for x, off in taken]
    z = KINDS[layer.kind].value(layer, *(x for x, _ in pairs), *weights)
    wide = spread(layer, pairs, weights)
    merged = [_merged(network.steps, i) for i in step.sources]
    error = SLACK * local_error(layer, arithmetic, pairs, weights, z, wide, merged, spare)
    z, wide, error = z[0], np.minimum((SLACK * wide + error)[0], cap), error[0]
    before = Bounds(wide, np.full_like(lengths(z), math.inf), math.inf)
    if closely:
        before = _closer(network, layer, [off for _, off in taken], before, error)
        if layer.activation != "linear" and z.size <= NARROW:
            radius = _one_by_one(network, rows, Row.exact(z), rho, error)
            before = before._replace(radius=np.minimum(before.radius, radius)).together()
    wide, slope = before.radius, kind.slope(z)
    rounding = SLACK * activation_error(layer.activation, z, wide, arithmetic)
    after = SLACK * remainder(layer.activation, z, wide)
    bend = SLACK * curvature(layer.activation, z, wide)
    steep = LIPSCHITZ[layer.activation]
    off = Bounds(
        (np.abs(slope) * wide + after) * SLACK + rounding,
        steep * before.places + lengths(rounding),
        steep * before.whole + length(rounding),
    )
    off = off.together() if closely else off
    return Row(kind.value(z), off, z, before, slope, rho, error, after, bend, rounding)


def _merged(steps: tuple[Step, ...], value: int) -> int:
    """How many products a value sums up, if a runtime may go on adding to that sum; else 0."""
    if value == 0 or steps[value - 1].layer.activation != "linear":
        return 0
    return products(steps[value - 1].layer)


def _closer(
    network: Network, layer: Layer, taken: list[Bounds], before: Bounds, error: Float64
) -> Bounds:
    """Bounds before an activation that also use the lengths of the inputs' errors."""
    radius, places, _ = before
    total = sum(off.whole for off in taken)
    if layer.parameters:
        norm_, place, each = network.norms[layer.name]
        total *= norm_
        if layer.kind == "conv":
            ones = np.ones((1, 1, *layer.kernel))
            squares = np.square(taken[0].places)[None]
            seen = SLACK * np.sqrt(KINDS["conv"].value(layer, squares, ones, np.zeros(1))[0])
            radius = np.minimum(radius, each * seen + error)
            places = place * seen + lengths(error)
    elif layer.kind in ("affine", "add", "activation"):
        scale = abs(layer.scale) if layer.kind == "affine" else 1.0
        total *= scale
        places = scale * np.sum([off.places for off in taken], axis=0) + lengths(error)
    return Bounds(radius, places, SLACK * total + length(error)).together()


def _one_by_one(
    network: Network, rows: tuple[Row, ...], row: Row, rho: Float64 | None, error: Float64
) -> Float64:
    """Bounds on |δ| before the activation of the next row, by exact Jacobians."""
    number, z = len(rows), row.value
    upto = Enclosure(
        network.steps[:number], network.weights, (*rows, replace(row, inputs=rho, error=error))
    )
    each = Window(np.eye(z.size).reshape(-1, *z.shape), None)
    return pulled(upto, each, np.full(z.size, -math.inf)).reshape(z.shape)


def norm(layer: Layer, weight: Float64) -> float:
    """Returns a bound on the l2 norm of a row with weights.

    A convolution of stride s is one of stride 1, with h x v taps, whose input has the s² phases of
    each channel as separate channels. Padding with zeros and leaving out places can only make the
    norm smaller. So the norm is at most that of a circular convolution on a torus wide enough for
    all places. This is the largest singular value among the matrices W(ω) of all frequencies.

    The square of u* W(ω) v is a trigonometric polynomial of degree h - 1 in one direction. Such a
    polynomial is nowhere larger than 1 / cos(π (h - 1) / n) times its largest value at n equal
    steps (Ehlich and Zeller 1964). So 8 h steps cover all frequencies, if the torus has more.

    A transposed convolution has the norm of the convolution whose gradient it is.
    """
    if layer.kind == "dense":
        return float(np.linalg.norm(weight, 2))
    s = layer.stride
    ends = [(0, -k % s) for k in layer.kernel]
    w = np.pad(weight, ((0, 0), (0, 0), *ends))
    o, c, h, v = (*w.shape[:2], *(side // s for side in w.shape[2:]))
    w = w.reshape(o, c, h, s, v, s).transpose(0, 1, 3, 5, 2, 4).reshape(o, c * s * s, h, v)
    places = (layer.in_shape if layer.kind == "conv_transpose" else layer.out_shape)[1:]
    if places == (1, 1):
        return float(np.linalg.norm(w.reshape(o, -1), 2))
    steps, between = [], 1.0
    for taps, side in zip((h, v), places, strict=True):
        steps.append(min(8 * taps, side + taps - 1))
        if steps[-1] == 8 * taps:
            between *= math.cos(math.pi * (taps - 1) / (8 * taps))
    at = np.fft.rfft2(w, s=steps).transpose(2, 3, 0, 1)
    at = at if o <= c * s * s else at.swapaxes(2, 3)
    square = np.linalg.eigvalsh(at @ at.conj().swapaxes(2, 3))[..., -1].max()
    return float(np.sqrt(square / between))
