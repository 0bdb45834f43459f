"""Bounds on the rounding error of squared distances, the basis of certified indices.

Terms: u is the unit roundoff. g(n) = n*u / (1 - n*u) bounds the relative error of n roundings in a
row (Higham 2002, Accuracy and Stability of Numerical Algorithms, lemma 3.1). tiny is the smallest
normal number; smaller values may be flushed to zero. x is a latent, c a code, d = ||x - c||^2, and
D the code_size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from vqref.precisions import arithmetic
from vqref.validation import Float64


def array_dtype(precision: str) -> np.dtype[np.floating[Any]]:
    """Returns the dtype of results in a precision: float64 for float64, float32 for all others."""
    return np.dtype(np.float64 if precision == "float64" else np.float32)


@dataclass(frozen=True)
class Form:
    """A way to compute a squared distance.

    expanded: True computes x.x - 2 x.c + c.c, which cancels if norms are large compared with the
        distance. False computes the sum of (x - c)^2.
    rooted: whether the square root is compared. It is rounded too.
    """

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
"""The forms by name. Ours are all "direct". Others use "expanded" for speed, roots from habit."""


def require_bound(code_size: int, precision: str, form: str) -> None:
    """Raises ValueError if precision or form is unknown, or sums of ``code_size`` are unbounded."""
    number = arithmetic(precision)
    if form not in FORMS:
        raise ValueError(f"form is {form!r}, expected one of {', '.join(FORMS)}")
    if (code_size + 5) * number.unit >= 0.5:
        raise ValueError(
            f"code_size is {code_size}: sums of so many terms have no bound in {precision}"
        )


def roundings(count: int, unit: float) -> float:
    """Returns g(count), the largest relative error of ``count`` roundings in a row.

    It is infinite if they may leave no correct digit.
    """
    return count * unit / (1 - count * unit) if count * unit < 1 else math.inf


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
    """Returns the largest error of each squared distance that does not overflow, (M, K) float64.

    distances: d in float64, (M, K). latent_norms, code_norms: ||x|| (M, 1) and ||c|| (K,).
    moved: a number or (M, 1), the largest distance between the implementation's latents and these.

    Sources of error:

    inputs: if they are rounded by a relative p, x - c moves by at most e = p*(||x|| + ||c||). If
        inputs below tiny are flushed to zero, it moves by 2*sqrt(D)*tiny more. So d becomes at
        most t = (sqrt(d) + e)^2, and moves by 2*sqrt(d)*e + e^2.
    direct: each of D terms takes a subtraction and a square, which doubles the rounding of the
        subtraction. At most D - 1 additions follow, in any order. These are D + 2 roundings. No
        term is negative, so the sum is off by g(D + 2)*t (Higham, section 3.1).
    expanded: x.x, x.c and c.c take at most D roundings each (Higham, equation 3.5), and 2 additions
        follow. The factors of x.c are rounded by f each. |x|.|c| <= ||x||*||c||. So the result is
        off by (1 + g) * (g*(||x|| + ||c||)^2 + 2*(2f + f^2)*||x||*||c||), where g = g(D + 2),
        however small the distance is.
    rooted: a root rounded by u is the root of a value that is off by g(2) more.
    underflow: each of at most 3*D + 3 operations may lose tiny.
    float64: the distances given here come from the direct form in float64, which adds g(D + 2)*d.
    """
    number, shape = arithmetic(precision), FORMS[form]
    norms = latent_norms + moved + code_norms  # (M, K), as all below
    root = distances**0.5 + moved
    shift = number.inputs * norms + 2 * code_size**0.5 * number.tiny
    true = (root + shift) ** 2
    each = roundings(code_size + 2, number.unit)
    error: Float64 = (2 * root + shift) * shift + (3 * code_size + 3) * number.tiny
    error += roundings(code_size + 2, arithmetic("float64").unit) * distances
    if shape.expanded:
        factors = 2 * number.factors + number.factors**2
        error += (1 + each) * (each * norms**2 + 2 * factors * (latent_norms + moved) * code_norms)
    else:
        error += each * true
    if shape.rooted:
        error += roundings(2, number.unit) * (true + error)
    return error


@dataclass(frozen=True)
class ScoreSlack:
    """Score margin: a code further than this from the smallest score cannot win.

    Scores are c.c / 2 - x.c, and the direct form decides the winner. The margin is
    squares * (||x|| + L)^2 + products * (L^2 / 2 + ||x|| * L) + floor, where L is the longest
    code's norm.
    """

    squares: float
    products: float
    floor: float


def score_slack(code_size: int, precision: str, *, parts: bool = False) -> ScoreSlack:
    """Returns the slack of scores that are one product each: of (x, 1) with (-c, h), h = c.c / 2.

    A score is half a distance minus half of x.x. So each of the two scores compared adds half the
    error of its direct distance, and its own error. A product of n terms, in any order, rounds each
    term n times. h has D roundings before that, and each factor is rounded by f. So with n = D + 1,
    a score is off by (g + (1 + g) * (2f + f^2)) * (h + ||x||*||c||), where g = g(n + D). Also, 2*n
    operations may lose tiny.

    parts: every number is given as two. The first has 11 bits or fewer, so rounding of factors does
    not change it. The second is at most 2^-11 of the whole. All their products are taken except
    those of two second parts. Then n = 3*D + 2, and 2f + f^2 is replaced by 2^-22 times
    (f^2 + 2f + 1), plus two times 2^-11 * f.
    """
    number = arithmetic(precision)
    terms, factors = code_size + 1, 2 * number.factors + number.factors**2
    if parts:
        terms, second = 3 * code_size + 2, 2.0**-11
        factors = second**2 * (1 + factors) + 2 * second * number.factors
    each = roundings(terms + code_size, number.unit)

    def direct(distance: float, norms: float) -> float:
        wide = np.full((1, 1), distance), np.full((1, 1), norms), np.zeros(1)
        return float(distance_error(*wide, code_size, precision=precision)[0, 0])

    floor, own = direct(0, 0), each + (1 + each) * factors
    return ScoreSlack(direct(1, 1) - floor, 2 * own, floor + 4 * terms * number.tiny)


def choices(
    distances: Float64,
    latents: Float64,
    codebook: Float64,
    *,
    precision: str,
    form: str = "direct",
    moved: Float64 | float = 0.0,
) -> tuple[npt.NDArray[np.intp], Float64]:
    """Returns the nearest code of each latent, (M,), and each code's excess distance, (M, K).

    The excess is how much farther the code is than rounding explains. It is at most 0 if the code
    may be chosen, and -inf for the nearest code.

    distances: (M, K) in float64, of latents (M, D) and codebook (K, D). moved: as in
    ``distance_error``.
    """
    best = distances.argmin(axis=1)
    each = np.arange(len(best))
    wide = np.broadcast_to(moved, (len(latents), 1))
    slack = _slack(distances, best, latents, codebook, precision, form, wide)
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
    """Returns the slack (M, K): how far d_k may exceed the smallest if code k may be chosen.

    Code k beats the nearest code b only if the errors of both close the gap: d_k - d_b <=
    error_k + error_b. Latents that move by e, with ||e|| <= moved, change d_k - d_b by
    -2 e.(c_k - c_b), at most 2*moved*||c_k - c_b||.

    The slack is infinite if overflow decides. Direct distances that overflow are all infinite, and
    so equal. Inputs that overflow, and the expanded form, can give NaN, which argmin takes.
    """
    latent_norms = np.sqrt(np.square(latents).sum(axis=1))[:, None]
    code_norms = np.sqrt(np.square(codebook).sum(axis=1))
    size, chosen = codebook.shape[1], (np.arange(len(best)), best)
    error = distance_error(
        distances, latent_norms, code_norms, size, precision=precision, form=form, moved=moved
    )
    slack = error + error[chosen][:, None]
    if moved.any():
        for code in np.unique(best):
            apart = np.sqrt(np.square(codebook - codebook[code]).sum(axis=1))  # (K,)
            slack[best == code] += 2 * moved[best == code] * apart

    number, norms = arithmetic(precision), latent_norms + moved + code_norms
    infinite = np.square(np.sqrt(distances) + moved) + error >= number.largest
    infinite &= infinite[chosen][:, None]
    undefined = norms >= number.largest if number.inputs else np.zeros_like(infinite)
    if FORMS[form].expanded:
        undefined |= np.square(norms) * (1 + roundings(size + 2, number.unit)) >= number.largest
    slack[infinite | undefined | undefined[chosen][:, None]] = np.inf
    return slack
