"""Bounds on what a machine may get wrong in one row of a network, under a named arithmetic.

Take a sum. Each product is rounded once, or it is fused into the sum. In any order, the products
and the bias are the leaves of a tree whose nodes are additions. The error of the sum is exactly the
sum of the errors of its nodes. Each of these is at most u times what the node holds. A node holds
the sum of some of the terms and nothing else. Let A be the sum of all magnitudes, Σ |w| |x| + |b|,
and z the exact result. Then a node holds at most

    M = max(sum of the positive terms, -(sum of the negative terms)) = (A + |z|) / 2

Nodes also hold the errors of the nodes below them. So n additions are off by at most g(n) M, where
g(n) = n u / (1 - n u). The products are off by at most u A (1 + g(n)). Terms that are 0, as after a
relu or in padding, add nothing and are not counted. In lanes or in a balanced tree, each term
passes few additions. With k roundings on its way, the sum is off by at most g(k) A (Higham 2002,
equation 3.5). The smaller of the two bounds holds.

These bounds do not hold for results that no sum of these terms gives. Examples are Winograd's
algorithm (which has its own arithmetic below), fast Fourier transforms, Strassen's algorithm, and
rows that were merged beforehand by changing weights. Fused rows that keep the terms are covered. An
activation applied on top rounds nothing, and an addition may go into the sum of the row before, see
``local_error``.
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
LARGEST = distances_in("float32").largest
"""The unit roundoff, the smallest normal and the largest number of float32.

Every arithmetic adds in float32."""


def any_order(n: int) -> int:
    """Returns the number of roundings on a term's way if additions come in any order.

    There is one for the product, and n for adding n products and a bias one after another. Here and
    below, one more is for what another row may add, see ``local_error``.
    """
    return n + 2


def in_lanes(n: int) -> int:
    """Returns the same for 16 or more sums side by side, which are then added in a tree.

    There are n/16 additions in a lane, 4 in the tree, a product and a bias.
    """
    return -(-n // 16) + 7


def in_a_tree(n: int) -> int:
    """Returns the same for a balanced tree: log2 n additions, a product and a bias."""
    return math.ceil(math.log2(max(n, 2))) + 3


@dataclass(frozen=True)
class Factors:
    """How factors are rounded.

    Each row may round in its own way, or not at all, but rounds one input in the same way for all
    its products.

    bits: the number of bits after the point.
    cut: whether some machines cut factors off instead of rounding them to nearest.
    tiny: the smallest normal number. Results below it may be flushed to zero.
    largest: the bound that results must not reach.
    """

    bits: int
    cut: bool
    tiny: float
    largest: float

    def ulp(self, size: Float64) -> Float64:
        """Returns the distance between neighbouring numbers at a magnitude."""
        spacing = np.ldexp(1.0, np.frexp(size)[1] - 1 - self.bits)
        return np.where(size > 0, np.maximum(spacing, self.tiny * 2.0**-self.bits), 0.0)

    def rounded(self, x: Float64) -> tuple[Float64, Float64]:
        """Returns centre and radius of an interval around x and all values it may be rounded to.

        As it contains x itself, machines that round less are covered.
        """
        size, ulp = np.abs(x), self.ulp(np.abs(x))
        down = np.floor(size / np.where(ulp > 0, ulp, 1.0)) * ulp
        rest = size - down
        low = np.where((rest <= ulp / 2) | self.cut, down, size)
        low = np.where(size < self.tiny, 0.0, low)
        high = np.where((rest >= ulp / 2) & (rest > 0), down + ulp, size)
        return np.sign(x) * (low + high) / 2, (high - low) / 2

    def of_inputs(self, x: Float64, radius: Float64) -> tuple[Float64, Float64]:
        """Returns x + shift, and ρ: rounding moves values near x by shift, give or take ρ.

        The machine's values lie within ``radius`` of x. In units in the last place, rounding to
        nearest moves them by -1/2 to 1/2. If they may also be cut, they move by -1 to 1/2, which is
        3/4 to either side of -1/4.
        """
        size = np.abs(x)
        most = self.ulp(size + radius)
        shift = self.ulp(size) / 4 * ((radius < size) & self.cut)
        low = (most if self.cut else most / 2) - shift
        spread = np.maximum(low, most / 2 + shift)
        flushed = np.where(size - radius < self.tiny, np.minimum(size + radius, self.tiny), 0.0)
        spread = np.maximum(spread, flushed + shift)
        centre, known = self.rounded(x)
        exact = radius == 0
        return (
            np.where(exact, centre, x - np.sign(x) * shift),
            np.where(exact, known, spread),
        )


@dataclass(frozen=True)
class Arithmetic:
    """How a machine computes the rows of a network.

    Results and factors below tiny may be flushed to zero. An affine row takes two roundings, and
    one for its constants. An addition takes one.

    meaning: a description in words.
    way: how many roundings a term passes, as a function of the number of products.
    unit: the unit roundoff of sums.
    factors: how factors are rounded; None if they are not.
    exp: exp(x) has a relative error of at most (exp + 4 |x|) u. It grows with |x|, as in WebGPU and
        in CUDA's fast exp. exp(0) is 1.
    winograd: whether convolutions of 3x3 and stride 1 use Winograd's F(4x4, 3x3), see
        ``_winograd``.

    The activations use exp as follows:

    elu: computed as max(x, 0) + (exp(min(x, 0)) - 1). This adds at most two roundings of the
        result. expm1 is more accurate.
    silu: computed as x / (1 + exp(-x)) or x * sigmoid(x). It is off by at most (exp + 4) u |x|.
    gelu: computed as x/2 (1 + tanh(v)). It is off by at most (exp + 8) u |x|: v is off by 5 u |v|,
        which moves tanh(v) by at most 2.3 u, and tanh itself is off by exp u.
    """

    meaning: str
    way: Callable[[int], int] = any_order
    unit: float = UNIT
    factors: Factors | None = None
    exp: float = 8
    winograd: bool = False

    @property
    def plain(self) -> bool:
        """Whether rows are sums of float32 products and nothing else."""
        return self.factors is None and not self.winograd

    def sums(self, n: int) -> float:
        """Returns the largest error of n products and a bias, relative to the sum of magnitudes."""
        return roundings(self.way(n), self.unit)


CUT = 4 * UNIT
"""The unit roundoff of sums in tensor cores.

Tensor cores add blocks of four or more products to the sum so far, and cut all of these off at the
last bit of the largest (Fasi et al. 2021). This costs (4 + 2) / 4 times 2 units per product."""

ARITHMETICS: Mapping[str, Arithmetic] = MappingProxyType(
    {
        "float32": Arithmetic("float32, sums in any order, fused or not"),
        "lanes": Arithmetic("float32, sums in 16 lanes or more", in_lanes),
        "pairwise": Arithmetic("float32, sums in a balanced tree", in_a_tree),
        "winograd": Arithmetic(
            "float32, 3x3 convolutions by Winograd's F(4x4, 3x3)", winograd=True
        ),
        "tf32": Arithmetic(
            "factors cut or rounded to TF32, sums in float32",
            unit=CUT,
            factors=Factors(10, True, TINY, LARGEST),
        ),
        "float16": Arithmetic(
            "factors rounded to float16, sums in float32",
            unit=CUT,
            factors=Factors(10, False, 2.0**-14, 65504.0),
        ),
        "bfloat16": Arithmetic(
            "factors rounded to bfloat16, sums in float32",
            unit=CUT,
            factors=Factors(7, False, TINY, LARGEST),
        ),
    }
)
"""The arithmetics by name.

float32 includes lanes and pairwise: adding in lanes or in a tree is adding in some order."""


def spread(
    layer: Layer, taken: Sequence[tuple[Float64, Float64]], weights: Sequence[Float64]
) -> Float64:
    """Returns how far a row's result can move, |W| Δ, for inputs (value, radius)."""
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
    spare: Float64 | None = None,
) -> Float64:
    """Returns a bound on the error of the row's own operations.

    The error is the distance of the machine's result from the exact result of the machine's own
    inputs. The oracle has z for that exact result, and is at most ``wide`` away from it.

    taken: the inputs (value, radius) after rounding.
    weights, spare: the centres of what the rounded weights may be, and their radii.
    merged: for an addition, how many products each input sums up; 0 if the input is no such sum. A
        runtime may add the other input y within that sum, first or last. Then M grows by |y|, and
        every addition may be off by u |y| more.
    """
    sizes = [np.abs(x) + radius for x, radius in taken]
    if layer.kind in UNBOUNDED:
        return np.full_like(z, np.inf)
    if weights:
        weight, bias = map(np.abs, weights)
        off = np.zeros_like(z)
        if spare is not None:
            off = KINDS[layer.kind].value(layer, sizes[0], spare, np.zeros_like(bias))
            weight = weight + spare
        return off + _product_error(
            layer, arithmetic, sizes[0], weight, bias, np.abs(z), wide + off
        )
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
    """The same for a row with weights. All arguments are magnitudes."""
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
    error[2 * all_terms >= LARGEST] = np.inf
    if (count + 2) * arithmetic.unit >= 0.5:  # g is then no bound
        error[:] = np.inf
    factors = arithmetic.factors
    if factors is not None and max(size.max(), weight.max()) >= factors.largest:
        error[:] = np.inf
    return error


def products(layer: Layer) -> int:
    """Returns the most products that a result of the row adds up; 0 if it adds up none."""
    if not layer.parameters:
        return 0
    if layer.kind == "conv_transpose":
        return layer.in_shape[0] * math.prod(-(-k // layer.stride) for k in layer.kernel)
    return layer.fan_in


UNBOUNDED = frozenset(
    {"embedding", "layer_norm", "group_norm", "unit_norm", "bounded", "upsample", "attention"}
)
"""Kinds of rows for which no bound is derived here.

Nothing is proved for encoders that have them."""


def unbounded(rows: Sequence[Layer]) -> list[str]:
    """Returns the kinds of ``rows`` that have no known bound."""
    return sorted({row.kind for row in rows} & UNBOUNDED)


BENT = {"silu": 0.25, "gelu": 0.41}
"""Half the largest |f''| of an activation, or more. The largest |f''| of gelu is 0.798, at 0."""

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
    """A bound on the error of Winograd's algorithm.

    Y = A'[Σ over channels of (G g G') ⊙ (B' d B)]A is not a sum of the convolution's terms in any
    order. Its terms are larger and cancel. Each factor passes two transforms of at most 6 terms
    each, and so does the result. Between them, C products are added. These are at most C + 50
    roundings. The magnitudes of the terms add up to at most

        |A'| [Σ over channels of (|G| |g| |G'|) ⊙ (|B'| |d| |B|)] |A|

    in a tile. A result may be at any of the 16 places of its tile, so the largest of these holds.
    """
    from numpy.lib.stride_tricks import sliding_window_view

    data, of_weights, result = map(
        np.abs, map(np.array, (WINOGRAD_DATA, WINOGRAD_WEIGHTS, WINOGRAD_RESULT))
    )
    sides = [(before + 3, after + 3) for before, after in layer.pads]
    padded = np.pad(size[0], ((0, 0), *sides))
    height, width = layer.out_shape[1:]
    of_g = (of_weights @ weight @ of_weights.T).reshape(*weight.shape[:2], 36).transpose(2, 0, 1)
    total = np.zeros((1, *layer.out_shape))
    for row in range(height + 3):  # rows of tiles; a tile begins at each place
        tiles = sliding_window_view(padded[:, row : row + 6], (6, 6), axis=(1, 2))[:, 0]
        of_d = (data @ tiles @ data.T).reshape(*tiles.shape[:2], 36).transpose(2, 0, 1)
        terms = (of_g @ of_d).transpose(1, 2, 0).reshape(len(weight), -1, 6, 6)
        found = result @ terms @ result.T  # (O, W + 3, 4, 4)
        for a, b in np.ndindex(4, 4):
            if 0 <= row - 3 + a < height:
                at = total[0, :, row - 3 + a]
                np.maximum(at, found[:, 3 - b : 3 - b + width, a, b], out=at)
    error: Float64 = roundings(size.shape[1] + 50, UNIT) * (total + bias[:, None, None])
    return error


def curvature(activation: str, z: Float64, wide: Float64) -> Float64:
    """Returns the largest |r| / δ² of an activation at z whose input is off by at most ``wide``."""
    if activation == "elu":
        return _elu_curvature(z, wide)
    if activation == "relu":  # (δ - |z|) / δ² is largest at 2 |z|
        at = np.maximum(np.minimum(wide, 2 * np.abs(z)), TINY)
        bend: Float64 = np.maximum(0.0, at - np.abs(z)) / np.square(at)
        return bend
    return np.full_like(z, BENT.get(activation, 0.0))


def _elu_curvature(z: Float64, wide: Float64) -> Float64:
    """The same for elu, in closed form.

        z = -m < 0, input stays below 0   exp(-m) (exp(δ) - 1 - δ) / δ², which grows with δ
        z = -m < 0, input crosses 0       (δ - m + 1 - exp(-m) (1 + δ)) / δ², which is largest at
                                          δ = 2 (m - 1 + exp(-m)) / (1 - exp(-m))
        z >= 0                            (Δ - z)² / (2 Δ²): only the last Δ - z of the way is
                                          curved, and f'' is at most 1 there

    Where these formulas cancel, takes half the largest f''.
    """
    plain = np.where(z - wide < 0, 0.5 * np.exp(np.minimum(0.0, z + wide)), 0.0)
    inside, m = np.clip(wide, 0.01, 700.0), np.maximum(-z, 0.01)
    below = np.exp(z) * (np.expm1(inside) - inside) / np.square(inside)
    across = np.square(np.expm1(-m)) / (4 * (m + np.expm1(-m)))
    below = np.where(wide >= 0.01, below, plain)
    above = 0.5 * np.square((wide - z).clip(0) / np.maximum(wide, TINY))
    found = np.where(z < -0.01, np.where(wide <= -z, below, across), plain)
    found = np.where(z < 0, found, above)
    least: Float64 = np.minimum(found, plain)
    return least


def remainder(activation: str, z: Float64, wide: Float64) -> Float64:
    """Returns the largest |r| of an activation at z whose input is off by at most ``wide``."""
    if activation == "relu":
        return np.maximum(0.0, wide - np.abs(z))
    bent: Float64 = curvature(activation, z, wide) * np.square(wide)
    return bent


LIPSCHITZ = {"linear": 1.0, "elu": 1.0, "relu": 1.0, "silu": 1.1, "gelu": 1.13}
"""The largest slope of each activation, or more."""


def activation_error(activation: str, z: Float64, wide: Float64, arithmetic: Arithmetic) -> Float64:
    """Returns a bound on the error of the activation's own computation."""
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
