"""What a machine may get wrong in one row of a network, under a named arithmetic.

Sums. A product is rounded once, or fused into the sum. Whatever the order, the products and the
bias are the leaves of a tree whose nodes are additions, and the error of a sum is exactly the sum
of what its nodes are off by, u of what a node holds each. A node holds the sum of some of the terms
and nothing else, which is at most

    M = max(sum of the positive terms, sum of the negative ones) = (A + |z|) / 2

A being the sum of all magnitudes, Σ |w| |x| + |b|, and z the exact result. So n additions are off
by at most g(n) M, g(n) = n u / (1 - n u) since nodes also hold what those below them are off by,
and products by u A (1 + g(n)). Terms that are 0, as after a relu or in padding, add nothing and are
not counted. In lanes or in a balanced tree each term passes few additions: with k roundings on its
way, g(k) A (Higham 2002, equation 3.5). The smaller of the two holds.

What these bounds do not know: results that no sum of these terms gives, such as those of Winograd's
algorithm (which has a row), of fast Fourier transforms or Strassen's, and of rows that were merged
beforehand by changing weights. Fused rows that keep the terms are covered: an activation on top
rounds nothing, and an addition may go into the sum of the row before, see ``local_error``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from vqref.agreement.bounds import roundings
from vqref.network import KINDS
from vqref.precisions import arithmetic as distances_in
from vqref.spec import Layer
from vqref.validation import Float64

UNIT, TINY = 2.0**-24, 2.0**-126
"""The unit roundoff and the smallest normal number of float32, in which every arithmetic adds
up."""


def any_order(n: int) -> int:
    """Roundings on a term's way: a product, and n additions one after another for n products and a
    bias; one more, here and below, for what another row may add, see ``local_error``."""
    return n + 2


def in_lanes(n: int) -> int:
    """16 sums side by side, or more, then these in a tree: n/16 additions in a lane, 4 in the tree,
    a product and a bias."""
    return -(-n // 16) + 7


def in_a_tree(n: int) -> int:
    """log2 n additions, a product and a bias."""
    return math.ceil(math.log2(max(n, 2))) + 3


@dataclass(frozen=True)
class Arithmetic:
    """How a machine computes the rows of a network.

    Results below tiny, and factors, may be flushed to zero. An affine row takes two roundings, and
    one for its constants; an addition one. elu: exp(x) is off by (exp + 4 |x|) u of itself, which
    grows with |x| as that of WebGPU and of CUDA's fast exp does, and two roundings of the result
    follow (as max(x, 0) + (exp(min(x, 0)) - 1), or with fewer; expm1 is nearer); exp(0) is 1. silu:
    as x / (1 + exp(-x)) or x * sigmoid(x), off by (exp + 4) u |x|. gelu: as x/2 (1 + tanh(v)), off
    by (exp + 8) u |x|: v is off by 5 u |v|, which moves tanh(v) by at most 2.3 u, and tanh itself
    by exp u.

    meaning: in words. way: how many roundings a term passes, of the number of products. unit: of
    sums. factors: of ``vqref.precisions``, whose rounding factors take; None if none. winograd:
    whether convolutions of 3x3 and stride 1 are computed by Winograd's F(4x4, 3x3), see
    ``_winograd``.
    """

    meaning: str
    way: Callable[[int], int] = any_order
    unit: float = UNIT
    factors: str | None = None
    exp: float = 8
    winograd: bool = False

    def sums(self, n: int) -> float:
        """What n products and a bias are off by, beside the sum of their magnitudes."""
        return roundings(self.way(n), self.unit)


CUT = 4 * UNIT
"""For sums in tensor cores, which cut blocks of four products or more, and the sum so far, off at
the last bit of the largest (Fasi et al. 2021): (4 + 2) / 4 times 2 units for each product."""

ARITHMETICS: Mapping[str, Arithmetic] = MappingProxyType(
    {
        "float32": Arithmetic("float32, sums in any order, fused or not"),
        "lanes": Arithmetic("float32, sums in 16 lanes or more", in_lanes),
        "pairwise": Arithmetic("float32, sums in a balanced tree", in_a_tree),
        "winograd": Arithmetic(
            "float32, 3x3 convolutions by Winograd's F(4x4, 3x3)", winograd=True
        ),
        "tf32": Arithmetic("factors cut to TF32, sums in float32", unit=CUT, factors="tf32"),
        "float16": Arithmetic(
            "factors rounded to float16, sums in float32", unit=CUT, factors="float16"
        ),
        "bfloat16": Arithmetic(
            "factors rounded to bfloat16, sums in float32", unit=CUT, factors="bfloat16"
        ),
    }
)
"""By name. float32 holds the next two: whoever adds in a tree or in lanes adds in some order."""


def spread(
    layer: Layer, taken: Sequence[tuple[Float64, Float64]], weights: Sequence[Float64]
) -> Float64:
    """What a row makes of inputs (value, radius) that are off by at most their radius: |W| Δ."""
    wide = [radius for _, radius in taken]
    if weights:
        return KINDS[layer.kind].value(layer, *wide, np.abs(weights[0]), np.zeros_like(weights[1]))
    if layer.kind == "affine":
        return abs(layer.scale) * wide[0]
    return KINDS[layer.kind].value(layer, *wide)


def local_error(
    layer: Layer,
    arithmetic: Arithmetic,
    taken: Sequence[tuple[Float64, Float64]],
    weights: Sequence[Float64],
    z: Float64,
    wide: Float64,
    merged: Sequence[int] = (),
) -> Float64:
    """What a row's result is off by, beside the exact result of the machine's own inputs, which is
    z in the oracle and off by at most ``wide``.

    merged: of an addition, how many products each input sums up, 0 if it is no such sum. A runtime
    may add the other input y within that sum, first or last: M grows by |y| and every addition may
    be off by u |y| more.
    """
    sizes = [np.abs(x) + radius for x, radius in taken]
    if layer.kind in UNBOUNDED:
        return np.full_like(z, np.inf)
    if weights:
        weight, bias = map(np.abs, weights)
        return _product_error(layer, arithmetic, sizes[0], weight, bias, np.abs(z), wide)
    if layer.kind == "affine":
        exact = layer.scale == 1 and layer.shift == 0
        terms = abs(layer.scale) * sizes[0] + abs(layer.shift)
        return np.zeros_like(terms) if exact else roundings(3, UNIT) * terms + 2 * TINY
    if layer.kind == "add":
        error = UNIT * (sizes[0] + sizes[1]) + TINY
        for count, other in zip(merged, reversed(sizes), strict=True):
            error += arithmetic.sums(count) * other if count else 0.0
        return error
    return np.zeros_like(z)


def _product_error(
    layer: Layer,
    arithmetic: Arithmetic,
    size: Float64,
    weight: Float64,
    bias: Float64,
    z: Float64,
    wide: Float64,
) -> Float64:
    """Of a row with weights; all are magnitudes."""
    value, count = KINDS[layer.kind].value, products(layer)
    total = value(layer, size, weight, np.zeros_like(bias))
    all_terms = total + (bias if layer.kind == "dense" else bias[:, None, None])
    if arithmetic.winograd and layer.kind == "conv" and (layer.kernel, layer.stride) == ((3, 3), 1):
        error = _winograd(layer, size, weight, bias)
    else:
        one = weight if layer.kind == "conv_transpose" else weight[:1]
        terms = value(layer, (size > 0).astype(np.float64), np.ones_like(one), np.zeros(len(one)))
        each = (terms + 1) * arithmetic.unit
        each /= 1 - each
        error = each * (all_terms + z + wide) / 2 + (1 + each) * arithmetic.unit * total
        error = np.minimum(error, arithmetic.sums(count) * all_terms)
    error += 2 * count * TINY * (1 + size.max() + weight.max())
    error[2 * all_terms >= distances_in("float32").largest] = np.inf
    if (count + 2) * arithmetic.unit >= 0.5:  # g is no bound
        error[:] = np.inf
    return (
        error
        if arithmetic.factors is None
        else error + _factors_error(layer, arithmetic, size, weight, total)
    )


def _factors_error(
    layer: Layer, arithmetic: Arithmetic, size: Float64, weight: Float64, total: Float64
) -> Float64:
    """What rounding the factors first adds: (1 + f)² - 1 of each product, and of what sums of them
    are off by; products of factors that may be flushed to zero."""
    assert arithmetic.factors is not None
    row, value, count = distances_in(arithmetic.factors), KINDS[layer.kind].value, products(layer)
    f = max(row.inputs, row.factors)
    error: Float64 = (1 + arithmetic.sums(count)) * (2 * f + f * f) * total
    if row.tiny > TINY:  # |w| tiny + |x| tiny + tiny² each
        none = np.zeros(layer.parameters[1][1])
        error = error + row.tiny * (
            value(layer, np.ones_like(size), weight, none)
            + value(layer, size, np.ones_like(weight), none)
            + count * row.tiny
        )
    return error if max(size.max(), weight.max()) < row.largest else np.full_like(error, np.inf)


def products(layer: Layer) -> int:
    """How many products each result of a row adds up, at most; 0 if it adds up none."""
    if not layer.parameters:
        return 0
    if layer.kind == "conv_transpose":
        return layer.in_shape[0] * math.prod(-(-k // layer.stride) for k in layer.kernel)
    return layer.fan_in


UNBOUNDED = frozenset({"embedding", "layer_norm", "attention"})
"""Kinds of rows, of a prior mostly, of which no bound is known: behind them nothing is proved."""

GELU_CURVE = 0.82
"""More than |f''| of gelu anywhere: 0.798 at 0, where it is largest."""

WINOGRAD_DATA = (  # B', d -> B'dB, of F(4x4, 3x3) (Lavin and Gray 2016)
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
WINOGRAD_WEIGHTS = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
WINOGRAD_RESULT = (
    (1, 1, 1, 1, 1, 0),
    (0, 1, -1, 2, -2, 0),
    (0, 1, 1, 4, 4, 0),
    (0, 1, -1, 8, -8, 1),
)


def _winograd(layer: Layer, size: Float64, weight: Float64, bias: Float64) -> Float64:
    """Y = A'[Σ over channels of (G g G') ⊙ (B' d B)]A is no sum in any order: its terms are larger
    than those of the convolution and cancel.

    Each factor passes two transforms, of at most 6 terms each, and so does the result; C products
    are added between: C + 50 roundings. With |B'||d||B| <= β² max |d|, β the largest row sum of
    |B'|, and m the columnwise largest of |A'||G|, a result's terms add up to at most β² Σ over c of
    max |d_c| Σ over a,b of m_a m_b |g_cab|, the largest over all pixels of any tile that the result
    may be in: four to each side.
    """
    from numpy.lib.stride_tricks import sliding_window_view

    data, of_weights, result = map(
        np.abs, map(np.array, (WINOGRAD_DATA, WINOGRAD_WEIGHTS, WINOGRAD_RESULT))
    )
    growth = data.sum(axis=1).max() ** 2
    m = (result @ of_weights).max(axis=0)
    sides = [(before + 3, after + 3) for before, after in layer.pads]
    padded = np.pad(size, ((0, 0), (0, 0), *sides))
    largest = sliding_window_view(padded, (9, 9), axis=(2, 3)).max(axis=(4, 5))
    each = np.einsum("ocab,a,b->oc", weight, m, m)
    total = growth * np.einsum("oc,nchw->nohw", each, largest) + bias[:, None, None]
    error: Float64 = roundings(size.shape[1] + 50, UNIT) * total
    return error


def remainder(activation: str, z: Float64, wide: Float64) -> Float64:
    """|r| of an activation at z whose input is off by at most ``wide``."""
    if activation == "elu":
        half = 0.5 * np.square(wide) * np.exp(np.minimum(0.0, z + wide))
        return np.where(z - wide < 0, half, 0.0)
    if activation == "relu":
        return np.maximum(0.0, wide - np.abs(z))
    if activation == "silu":
        quarter: Float64 = 0.25 * np.square(wide)
        return quarter
    if activation == "gelu":
        bent: Float64 = GELU_CURVE / 2 * np.square(wide)
        return bent
    return np.zeros_like(z)


def activation_error(activation: str, z: Float64, wide: Float64, arithmetic: Arithmetic) -> Float64:
    """What the activation's own result is off by."""
    if activation == "elu":
        far = np.abs(z) + wide
        power = (arithmetic.exp + 4 * far) * np.exp(np.minimum(0.0, z + wide))
        error = UNIT * (power + 2 * np.minimum(1.0, far)) + TINY
        return np.where(z - wide > 0, 0.0, error)
    if activation == "silu":
        silu: Float64 = UNIT * (arithmetic.exp + 4) * (np.abs(z) + wide) + TINY
        return silu
    if activation == "gelu":
        gelu: Float64 = UNIT * (arithmetic.exp + 8) * (np.abs(z) + wide) + TINY
        return gelu
    return np.zeros_like(z)
