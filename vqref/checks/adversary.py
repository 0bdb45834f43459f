"""Hard cases for a quantizer: rounding, ties, cancellation or overflow decide the index.

Each case is a function of (rng, latents, codes, code_size, precision). It returns latents (N, 1, D)
and a codebook (K, D) in the precision's dtype. ``CASES`` names the cases. The same rng gives the
same case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from vqref.agreement.bounds import array_dtype
from vqref.precisions import arithmetic
from vqref.validation import Array, Float64

Case = Callable[[np.random.Generator, int, int, int, str], tuple[Array, Array]]


NEIGHBOURS = 8
"""How many codes are tried to find a near one for a bisector.

If two codes are far apart, a third may be nearer to the points between them."""


def decades(precision: str) -> float:
    """Returns how many powers of ten values may lie above or below 1.

    Most squared distances are then finite and normal.
    """
    return 0.4 * math.log10(arithmetic(precision).largest)


def _held(latents: Array, codebook: Array, precision: str) -> tuple[Array, Array]:
    """Returns latents (N, D) as (N, 1, D), and the codebook, in the precision's dtype.

    Clips both to what the precision holds.
    """
    dtype, limit = array_dtype(precision), arithmetic(precision).largest
    held = [np.clip(array, -limit, limit).astype(dtype) for array in (latents, codebook)]
    return held[0][:, None], held[1]


def ordinary(
    rng: np.random.Generator, n: int, k: int, d: int, precision: str
) -> tuple[Array, Array]:
    """Latents and codes from a normal distribution about the origin."""
    return _held(rng.normal(size=(n, d)), rng.normal(size=(k, d)), precision)


def duplicates(
    rng: np.random.Generator, n: int, k: int, d: int, precision: str
) -> tuple[Array, Array]:
    """A codebook that holds every code several times, equal to the last bit."""
    codebook = rng.normal(size=(-(-k // 3), d))[rng.integers(0, -(-k // 3), k)]
    return _held(rng.normal(size=(n, d)), codebook, precision)


def bisector(
    rng: np.random.Generator, n: int, k: int, d: int, precision: str
) -> tuple[Array, Array]:
    """Latents on the bisector of two codes, or one, two or many ulps to either side of it."""
    codebook = rng.normal(size=(k, d)).astype(array_dtype(precision))
    return _held(_between(rng, codebook, n, precision), codebook, precision)


def equidistant(
    rng: np.random.Generator, n: int, k: int, d: int, precision: str
) -> tuple[Array, Array]:
    """Codes on the axes, all equally far from the origin, and latents at zero or on a diagonal."""
    axes = np.concatenate([np.eye(d), -np.eye(d)])
    codebook = axes[np.arange(k) % len(axes)] * 2.0 ** rng.integers(-3, 4)
    latents = rng.integers(-1, 2, (n, d)) * 2.0 ** rng.integers(-3, 4, (n, 1))
    return _held(latents, codebook, precision)


def mixed_scales(
    rng: np.random.Generator, n: int, k: int, d: int, precision: str
) -> tuple[Array, Array]:
    """Each latent and each code at its own scale.

    Scales go from the smallest to the largest that can be squared.
    """
    span = decades(precision)
    latents = rng.normal(size=(n, d)) * 10 ** rng.uniform(-span, span, (n, 1))
    return _held(
        latents, rng.normal(size=(k, d)) * 10 ** rng.uniform(-span, span, (k, 1)), precision
    )


def overflowing(
    rng: np.random.Generator, n: int, k: int, d: int, precision: str
) -> tuple[Array, Array]:
    """Values whose squares overflow the precision, and others whose squares do not."""
    largest = math.log10(arithmetic(precision).largest)
    exponents = rng.uniform(0.35 * largest, 0.6 * largest, (n + k, 1))
    if precision == "float64":  # the oracle itself overflows beyond this
        exponents = np.minimum(exponents, 0.49 * largest)
    both = rng.normal(size=(n + k, d)) * 10**exponents
    return _held(both[:n], both[n:], precision)


def denormals(
    rng: np.random.Generator, n: int, k: int, d: int, precision: str
) -> tuple[Array, Array]:
    """Values near the smallest normal number. Squares underflow; values may be flushed to zero."""
    tiny = arithmetic(precision).tiny
    return _held(rng.normal(size=(n, d)) * tiny, rng.normal(size=(k, d)) * tiny * 4, precision)


def far_from_origin(
    rng: np.random.Generator, n: int, k: int, d: int, precision: str
) -> tuple[Array, Array]:
    """A codebook much further from the origin than it is wide: x.x - 2 x.c + c.c cancels."""
    offset = 0.01 / arithmetic(precision).unit ** 0.5
    latents, codebook = offset + rng.normal(size=(n, d)), offset + rng.normal(size=(k, d))
    return _held(latents, codebook, precision)


def flown_out(
    rng: np.random.Generator, n: int, k: int, d: int, precision: str
) -> tuple[Array, Array]:
    """Codes 1e5 away (as if divided by epsilon alone), codes near zero, and a few live codes."""
    codebook = rng.normal(size=(k, d))
    far = min(1e5, 10 ** decades(precision))
    codebook *= rng.choice([far, 1.0, 1e-6], (k, 1), p=[0.5, 0.25, 0.25])
    return _held(rng.normal(size=(n, d)), codebook, precision)


def on_codes(
    rng: np.random.Generator, n: int, k: int, d: int, precision: str
) -> tuple[Array, Array]:
    """Latents that equal a code, to the last bit."""
    codebook = rng.normal(size=(k, d)) * 10 ** rng.uniform(-2, 2, (k, 1))
    return _held(codebook[rng.integers(0, k, n)], codebook, precision)


def crowded(
    rng: np.random.Generator, n: int, k: int, d: int, precision: str
) -> tuple[Array, Array]:
    """A codebook within a few ulps of one point, so that almost nothing can be certified."""
    unit = arithmetic(precision).unit
    codebook = rng.normal(size=d) * (1 + 4 * unit * rng.integers(-2, 3, (k, d)))
    return _held(rng.normal(size=(n, d)), codebook, precision)


def close_seconds(
    rng: np.random.Generator, n: int, k: int, d: int, precision: str
) -> tuple[Array, Array]:
    """Latents whose second-best code is farther by a share of 1e-5 to 1e-1.

    This shows pruning that is too generous. One fifth of the codes each has only its leading half,
    its trailing half, its first element or its last element, and zeros elsewhere. So part of a
    distance, or the difference of two norms, may already be all of it.
    """
    codebook = rng.normal(size=(k, d))
    codebook[1::5, d - d // 2 :] = 0.0
    codebook[2::5, : d // 2] = 0.0
    codebook[3::5, 1:] = 0.0
    codebook[4::5, :-1] = 0.0
    first, second = _neighbours(rng, codebook, n, apart=5)
    across = second - first
    length = np.square(across).sum(axis=1, keepdims=True)
    along = _orthogonal(rng.normal(size=(n, d)) * ((first != 0) | (second != 0)), across)
    along *= rng.choice([0.0, 0.1, 0.3], (n, 1)) * np.sqrt(length / d)
    nearest = np.square(along).sum(axis=1, keepdims=True) + length / 4
    share = 10 ** rng.uniform(-5, -1, (n, 1)) * rng.choice([-1, 1], (n, 1))
    # moved by t * across, the two distances differ by 2 * t * length
    moved = share * np.divide(nearest, 2 * length, out=np.zeros_like(length), where=length > 0)
    return _held((first + second) / 2 + along + across * moved, codebook, precision)


def around_bisectors(rng: np.random.Generator, codebook: Array, n: int, precision: str) -> Array:
    """Returns latents (n, 1, D) on, or ulps beside, the bisectors of a given codebook (K, D)."""
    return _held(_between(rng, np.asarray(codebook), n, precision), codebook, precision)[0]


def _between(rng: np.random.Generator, codebook: Array, n: int, precision: str) -> Array:
    """Returns midpoints (n, D) of two codes, moved along the bisector.

    Some are then moved towards one of the codes by a few ulps.
    """
    first, second = _neighbours(rng, codebook, n)
    across = second - first
    length = np.square(across).sum(axis=1, keepdims=True)
    along = rng.normal(size=across.shape) * np.sqrt(length) * rng.choice([0.0, 0.1, 1.0], (n, 1))
    ulps = rng.choice([0, 0, 1, -1, 2, -2, 30, -30], (n, 1)) * 2 * arithmetic(precision).unit
    return np.asarray((first + second) / 2 + _orthogonal(along, across) + across * ulps)


def _neighbours(
    rng: np.random.Generator, codebook: Array, n: int, apart: int = 1
) -> tuple[Float64, Float64]:
    """Returns two codes per latent, each (n, D): a random one and a near one.

    The near one is the nearest of a few codes whose numbers differ from the first by a multiple of
    ``apart``.
    """
    k = len(codebook)
    a = rng.integers(0, k, n)
    others = (a[:, None] + apart * rng.integers(1, max(k, 2), (n, NEIGHBOURS))) % k  # (n, few)
    first = codebook[a].astype(np.float64)
    nearest = (
        np.square(codebook[others].astype(np.float64) - first[:, None]).sum(axis=2).argmin(axis=1)
    )
    return first, codebook[others[np.arange(n), nearest]].astype(np.float64)


def _orthogonal(along: Float64, across: Float64) -> Float64:
    """Returns ``along`` (n, D) without its component in the direction of ``across``."""
    length = np.square(across).sum(axis=1, keepdims=True)
    component = (along * across).sum(axis=1, keepdims=True)
    share = np.divide(component, length, out=np.zeros_like(length), where=length > 0)
    return np.asarray(along - across * share)


CASES: Mapping[str, Case] = MappingProxyType(
    {
        case.__name__: case
        for case in (
            ordinary,
            duplicates,
            bisector,
            equidistant,
            mixed_scales,
            overflowing,
            denormals,
            far_from_origin,
            flown_out,
            on_codes,
            crowded,
            close_seconds,
        )
    }
)
"""The cases by name."""
