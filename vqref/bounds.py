"""What rounding can do to a squared distance: the bounds behind a certified index.

Terms: u the unit roundoff, g(n) = n*u / (1 - n*u), which bounds the relative error of n roundings in a row (Higham 2002,
Accuracy and Stability of Numerical Algorithms, lemma 3.1); tiny the smallest normal number, below which a value may be
flushed to zero; x a latent, c a code, d = ||x - c||^2, D the code_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from vqref.validation import Float64


@dataclass(frozen=True)
class Precision:
    """An arithmetic.

    unit     u, the largest relative error of one operation
    inputs   the relative error by which latents and codebook are rounded before anything else
    factors  the relative error by which the factors of a matrix product are rounded, beyond ``inputs``
    tiny, largest   the smallest normal and the largest finite number
    """

    unit: float
    inputs: float
    factors: float
    tiny: float
    largest: float


_SINGLE_TINY, _SINGLE_LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127

PRECISIONS: Mapping[str, Precision] = MappingProxyType(
    {
        "float64": Precision(2.0**-53, 0.0, 0.0, 2.0**-1022, (2 - 2.0**-52) * 2.0**1023),
        "float32": Precision(2.0**-24, 0.0, 0.0, _SINGLE_TINY, _SINGLE_LARGEST),
        "tf32": Precision(2.0**-23, 0.0, 2.0**-10, _SINGLE_TINY, _SINGLE_LARGEST),
        "bfloat16": Precision(2.0**-8, 2.0**-8, 0.0, _SINGLE_TINY, (2 - 2.0**-7) * 2.0**127),
        "float16": Precision(2.0**-11, 2.0**-11, 0.0, 2.0**-14, 65504.0),
    }
)
"""tf32: 10 bits after the point, in the factors of matrix products alone; tensor cores may cut factors and partial sums off
instead of rounding them (Fasi et al. 2021, Numerical behavior of NVIDIA tensor cores), hence twice the unit. bfloat16 and
float16: every value and every operation, so that what accumulates in float32 is inside the bound."""


def array_dtype(precision: str) -> np.dtype[np.floating[Any]]:
    """Of the arrays that hold results of a precision: float64 for itself, float32 for every other."""
    return np.dtype(np.float64 if precision == "float64" else np.float32)


@dataclass(frozen=True)
class Form:
    """A way to compute a squared distance. expanded: x.x - 2 x.c + c.c, which cancels where norms are large beside the
    distance; else the sum of (x - c)^2. rooted: what is compared is its square root, itself rounded."""

    expanded: bool
    rooted: bool


FORMS: Mapping[str, Form] = MappingProxyType(
    {
        "direct": Form(expanded=False, rooted=False),
        "direct root": Form(expanded=False, rooted=True),
        "expanded": Form(expanded=True, rooted=False),
        "expanded root": Form(expanded=True, rooted=True),
    }
)
"""By name. Ours are all "direct"; others take "expanded" for speed, and the root out of habit."""


def require_bound(code_size: int, precision: str, form: str) -> None:
    """Raises ValueError for an unknown precision or form, or sums of so many terms that they have no bound."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
    if form not in FORMS:
        raise ValueError(f"form is {form!r}, expected one of {', '.join(FORMS)}")
    if (code_size + 5) * PRECISIONS[precision].unit >= 0.5:
        raise ValueError(f"code_size is {code_size}: sums of so many terms have no bound in {precision}")


def roundings(count: int, unit: float) -> float:
    """g(count): the largest relative error of ``count`` roundings in a row."""
    return count * unit / (1 - count * unit)


def distance_error(
    distances: Float64,
    latent_norms: Float64,
    code_norms: Float64,
    code_size: int,
    *,
    precision: str,
    form: str = "direct",
    moved: Float64 | float = 0.0,
) -> Float64:
    """The largest error of each computed squared distance that does not overflow, (M, K).

    distances (M, K): d in float64. latent_norms (M, 1) and code_norms (K,): ||x|| and ||c||. moved, a number or (M, 1): the
    length by which the latents of the implementation may differ from these.

    inputs      Rounded by a relative p, x - c moves by at most e = p*(||x|| + ||c||), and by 2*sqrt(D)*tiny where inputs
                below tiny are flushed to zero. So d becomes at most t = (sqrt(d) + e)^2, and moves by 2*sqrt(d)*e + e^2.
    direct      Each of D terms is a subtraction, which the square doubles, a square, and at most D - 1 additions in any
                order: D + 2 roundings. No term is negative, so the sum is off by g(D + 2)*t (Higham, section 3.1).
    expanded    x.x, x.c and c.c take D roundings at most (Higham, equation 3.5), 2 more additions; factors of x.c are rounded
                by f each. |x|.|c| <= ||x||*||c||, so it is off by (1 + g) * (g*(||x|| + ||c||)^2 + 2*(2f + f^2)*||x||*||c||),
                g = g(D + 2), whatever the distance itself.
    rooted      A root rounded by u is the root of a value that is off by g(2) more.
    underflow   Each of at most 3*D + 3 operations may lose tiny.
    float64     The distances given here were computed by the direct form in float64: its g(D + 2)*d on top.
    """
    number, shape = PRECISIONS[precision], FORMS[form]
    norms = latent_norms + moved + code_norms  # (M, K), as all below
    root = distances**0.5 + moved
    shift = number.inputs * norms + 2 * code_size**0.5 * number.tiny
    true = (root + shift) ** 2
    each = roundings(code_size + 2, number.unit)
    error: Float64 = (2 * root + shift) * shift + (3 * code_size + 3) * number.tiny
    error += roundings(code_size + 2, PRECISIONS["float64"].unit) * distances
    if shape.expanded:
        factors = 2 * number.factors + number.factors**2
        error += (1 + each) * (each * norms**2 + 2 * factors * (latent_norms + moved) * code_norms)
    else:
        error += each * true
    if shape.rooted:
        error += roundings(2, number.unit) * (true + error)
    return error


def choices(
    distances: Float64,
    latents: Float64,
    codebook: Float64,
    *,
    precision: str,
    form: str = "direct",
    moved: Float64 | float = 0.0,
) -> tuple[npt.NDArray[np.intp], Float64]:
    """The nearest code of each latent (M,), and by how much every code is farther than rounding explains, (M, K): at most 0
    where it may be chosen, -inf for the nearest itself.

    distances (M, K), in float64, of latents (M, D) and codebook (K, D); moved as in ``distance_error``.
    """
    best = distances.argmin(axis=1)
    each = np.arange(len(best))
    slack = _slack(distances, best, latents, codebook, precision, form, np.broadcast_to(moved, (len(latents), 1)))
    excess: Float64 = distances - distances[each, best][:, None] - slack
    excess[each, best] = -np.inf
    return best, excess


def _slack(
    distances: Float64,
    best: npt.NDArray[np.intp],
    latents: Float64,
    codebook: Float64,
    precision: str,
    form: str,
    moved: Float64,
) -> Float64:
    """By how much d_k may exceed the best squared distance and k be chosen all the same, (M, K).

    Code k beats the best code b only where the errors of both close the gap: d_k - d_b <= error_k + error_b. Latents that
    move by e, ||e|| <= moved, change d_k - d_b by -2 e.(c_k - c_b), at most 2*moved*||c_k - c_b||.
    Infinite where overflow decides: a direct distance becomes infinite, and two that are infinite are equal; inputs that
    overflow, and the expanded form, can make NaN, which argmin takes.
    """
    latent_norms = np.sqrt(np.square(latents).sum(axis=1))[:, None]
    code_norms = np.sqrt(np.square(codebook).sum(axis=1))
    size, chosen = codebook.shape[1], (np.arange(len(best)), best)
    error = distance_error(distances, latent_norms, code_norms, size, precision=precision, form=form, moved=moved)
    slack = error + error[chosen][:, None]
    if moved.any():
        for code in np.unique(best):
            apart = np.sqrt(np.square(codebook - codebook[code]).sum(axis=1))  # (K,)
            slack[best == code] += 2 * moved[best == code] * apart

    number, norms = PRECISIONS[precision], latent_norms + moved + code_norms
    infinite = np.square(np.sqrt(distances) + moved) + error >= number.largest
    infinite &= infinite[chosen][:, None]
    undefined = norms >= number.largest if number.inputs else np.zeros_like(infinite)
    if FORMS[form].expanded:
        undefined |= np.square(norms) * (1 + roundings(size + 2, number.unit)) >= number.largest
    slack[infinite | undefined | undefined[chosen][:, None]] = np.inf
    return slack
