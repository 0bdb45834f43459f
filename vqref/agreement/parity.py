"""The rules of agreement: the tolerances, and the rule for indices.

The float64 oracle is the truth. A continuous stage passes if the error of every element is within
the stage's row of ``TOLERANCES``. An index passes if it is the oracle's, or if rounding alone can
explain it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from vqref.agreement.bounds import array_dtype, choices, require_bound
from vqref.agreement.report import Check
from vqref.quantizer import squared_distances
from vqref.validation import Float64, as_float64


@dataclass(frozen=True)
class Tolerance:
    """The error that a stage may have.

    relative: the allowed error, divided by a scale.
    of: the scale. "array" is the largest magnitude in the oracle's array, or in the magnitudes that
        the caller gives. "image" is the largest magnitude in the same image, so that one wild image
        hides nothing in another. "element" is each element's own magnitude, or the one that the
        caller gives.
    reason: why the error may be this large, and what was measured.
    floor: the smallest value of the scale.
    """

    relative: float
    of: Literal["array", "image", "element"]
    reason: str
    floor: float = 0.0


ELU_FLOOR = 0.1
"""The floor of scales after an ELU, a tenth of ELU's own unit.

Runtimes compute ELU as exp(x) - 1. Its error is a rounding of 1, however small x is. Activations of
an untrained network may be as small as 0.01. The floor keeps that rounding apart from errors that
matter."""

TOLERANCES: Mapping[tuple[str, str], Tolerance] = MappingProxyType(
    {
        ("encoder", "float64"): Tolerance(
            1e-12, "array", "sums of up to 3136 terms in six layers; 4e-15 measured", ELU_FLOOR
        ),
        ("decoder", "float64"): Tolerance(
            1e-12, "image", "as the encoder; 1e-15 measured", ELU_FLOOR
        ),
        ("reconstructions", "float64"): Tolerance(
            1e-12, "element", "as the decoder, times the sigmoid's slope; 2e-16 measured"
        ),
        ("losses", "float64"): Tolerance(
            1e-12, "element", "a sum of N*C*H*W terms of one sign; 4e-16 measured"
        ),
        ("ema", "float64"): Tolerance(
            1e-12, "element", "a sum over the batch, a product, a quotient; below 1e-16 measured"
        ),
        ("draw", "float64"): Tolerance(
            1e-12, "element", "of the terms of the score: a quotient and a difference"
        ),
        ("draw", "float32"): Tolerance(
            1e-5, "element", "of the terms of the score: a quotient and a difference; 2e-8 measured"
        ),
        ("gradients", "float64"): Tolerance(
            1e-11, "array", "forward and back, summed over the batch; 1e-14 measured"
        ),
        ("gradients", "float32"): Tolerance(
            2e-2,
            "array",
            "8e-6 measured without a relu; 4e-3 with, where its input is rounded across zero",
        ),
        ("gradients", "bfloat16"): Tolerance(0.4, "array", "9e-2 measured, a sum over 8 images"),
        ("gradients", "tf32"): Tolerance(
            0.4, "array", "as bfloat16, which has three bits less; not measured"
        ),
        ("gap", "float64"): Tolerance(
            1e-12, "element", "of the two squared distances: sums of D terms; 1e-16 measured"
        ),
        ("copy", "float64"): Tolerance(0.0, "element", "rows of the codebook, to the last bit"),
        ("encoder", "float32"): Tolerance(
            1e-5,
            "array",
            "2.5e-6 measured, 8e-6 of a grey image in a vqgan of 256x256; TF32 rounds each factor "
            "by 5e-4",
            ELU_FLOOR,
        ),
        ("decoder", "float32"): Tolerance(
            1e-5,
            "image",
            "1.9e-6 measured, 9e-6 in a vqgan of 256x256; TF32 rounds each factor by 5e-4",
            ELU_FLOOR,
        ),
        ("reconstructions", "float32"): Tolerance(
            1e-5, "element", "as the decoder, times the sigmoid's slope; 7e-8 measured"
        ),
        ("losses", "float32"): Tolerance(
            1e-5, "element", "a sum of N*C*H*W terms of one sign; 2e-7 measured"
        ),
        ("ema", "float32"): Tolerance(
            1e-5, "element", "a sum over the batch, a product, a quotient; 1.7e-6 measured"
        ),
        ("log_probabilities", "float64"): Tolerance(1e-12, "image", "6e-16 measured", 1.0),
        ("log_probabilities", "float32"): Tolerance(
            2e-6, "image", "5e-7 measured of a prior of four blocks of 128", 1.0
        ),
        ("encoder", "tf32"): Tolerance(
            2e-2, "array", "factors cut to 10 bits; 4.9e-3 measured", ELU_FLOOR
        ),
        ("decoder", "tf32"): Tolerance(2e-2, "image", "2.2e-3 measured", ELU_FLOOR),
        ("reconstructions", "tf32"): Tolerance(
            2e-2, "element", "as the decoder, times the sigmoid's slope"
        ),
        ("encoder", "float16"): Tolerance(5e-3, "array", "1.2e-3 measured", ELU_FLOOR),
        ("decoder", "float16"): Tolerance(5e-3, "image", "7e-4 measured", ELU_FLOOR),
        ("reconstructions", "float16"): Tolerance(
            5e-3, "element", "as the decoder, times the sigmoid's slope"
        ),
        ("encoder", "bfloat16"): Tolerance(5e-2, "array", "1.2e-2 measured", ELU_FLOOR),
        ("decoder", "bfloat16"): Tolerance(5e-2, "image", "2.6e-3 measured", ELU_FLOOR),
        ("reconstructions", "bfloat16"): Tolerance(
            5e-2, "element", "as the decoder, times the sigmoid's slope"
        ),
        ("encoder", "int8"): Tolerance(
            0.8, "array", "0.35 measured, on noise far from what set the ranges", ELU_FLOOR
        ),
        ("decoder", "int8"): Tolerance(0.5, "image", "0.13 measured", ELU_FLOOR),
        ("reconstructions", "int8"): Tolerance(
            0.1, "element", "as the decoder, times the sigmoid's slope; 0.02 measured"
        ),
    }
)
"""The tolerances by (stage, precision).

What was measured is the largest error over several networks, by ``python -m
benchmarks.tolerances``."""


def tolerance(stage: str, precision: str) -> Tolerance:
    """Returns the row for (stage, precision). Raises ValueError that lists the known rows."""
    row = TOLERANCES.get((stage, precision))
    if row is None:
        known = ", ".join(f"{s}/{p}" for s, p in TOLERANCES)
        raise ValueError(
            f"no tolerance for stage {stage!r} in precision {precision!r}; there are: {known}"
        )
    return row


def allowed_error(stage: str, expected: npt.ArrayLike, *, precision: str) -> Float64:
    """Returns the absolute error that ``check`` allows in each element of the oracle's array.

    Raises ValueError as ``check`` does.
    """
    row, expected = tolerance(stage, precision), np.asarray(expected, np.float64)
    return row.relative * _scale(row, expected, None)


def _scale(row: Tolerance, expected: Float64, magnitude: npt.ArrayLike | None) -> Float64:
    """Returns the scale by which the error in each element of ``expected`` is judged."""
    given = np.abs(np.asarray(expected if magnitude is None else magnitude))
    if row.of == "array":
        scale = given.max(initial=0.0)
    elif row.of == "image":
        scale = np.abs(expected).max(
            axis=tuple(range(1, expected.ndim)), keepdims=True, initial=0.0
        )
    else:
        scale = given
    return np.broadcast_to(np.maximum(scale, row.floor), expected.shape)


def check(
    stage: str,
    actual: npt.ArrayLike,
    expected: npt.ArrayLike,
    *,
    precision: str,
    name: str | None = None,
    magnitude: npt.ArrayLike | None = None,
    scale: npt.ArrayLike | None = None,
) -> Check:
    """Compares a continuous stage's output with the oracle's: shape, dtype, finiteness, values.

    actual: the output. Its dtype must be the precision's. expected: the oracle's float64 array.
    name: the stage's name in the report. None means ``stage``.
    magnitude: the magnitude of each element, for tolerances with an "array" or "element" scale.
    scale: the scale of each element. It replaces the scale of the tolerance.

    Raises ValueError for a (stage, precision) without a tolerance.
    """
    row, name = tolerance(stage, precision), name or stage
    actual, expected = np.asarray(actual), np.asarray(expected, np.float64)
    if problem := _misfit(actual, expected.shape, array_dtype(precision)):
        return Check(
            name,
            precision,
            expected.size,
            max(1, expected.size),
            allowed=row.relative,
            problem=problem,
        )
    if not expected.size:
        return Check(name, precision, 0, 0, 0.0, 0.0, row.relative)
    scale = _scale(row, expected, magnitude) if scale is None else np.asarray(scale, np.float64)
    with np.errstate(invalid="ignore"):  # an infinity equals itself; other non-finite values fail
        off = np.where(actual == expected, 0.0, np.abs(actual.astype(np.float64) - expected))
    error = np.divide(off, scale, out=np.where(off > 0, np.inf, 0.0), where=scale > 0)
    wrong = ~(error <= row.relative)  # NaN compares false, so it counts as wrong
    at = tuple(
        int(i)
        for i in np.unravel_index(np.where(np.isnan(error), np.inf, error).argmax(), error.shape)
    )
    worst = {"position": list(at), "found": _plain(actual[at]), "expected": _plain(expected[at])}
    problem = None
    if wrong.any():
        problem = (
            f"the worst at {at} is {actual[at]:.9g}, the oracle's {expected[at]:.9g}: "
            f"off by {error[at]:.2g} of its scale, allowed {row.relative:g}"
        )
    finite = bool(np.isfinite(error).all())
    return Check(
        name,
        precision,
        expected.size,
        int(wrong.sum()),
        float(error.max()) if finite else None,
        float(np.sqrt(np.square(error).mean())) if finite else None,
        row.relative,
        worst=worst,
        problem=problem,
    )


def check_indices(
    indices: npt.ArrayLike,
    latents: npt.ArrayLike,
    codebook: npt.ArrayLike,
    *,
    precision: str,
    form: str = "direct",
    latents_error: npt.ArrayLike = 0.0,
    name: str = "quantizer",
) -> Check:
    """Checks that indices (N, S) are the nearest codes, as far as rounding allows.

    latents (N, S, D), codebook (K, D): exactly what the implementation was given.
    latents_error: a number or (N, S), the largest Euclidean distance between the implementation's
        latents and these. It is 0 if the implementation was given these.
    precision, form: how it computes squared distances. These are names of
        ``vqref.precisions.PRECISIONS`` and ``vqref.agreement.bounds.FORMS``.

    Let b be the nearest code in float64. Code k is allowed instead of b only if
    d_k - d_b <= slack_k. ``vqref.agreement.bounds`` derives the slack. The index is certified if
    d_k - d_b > slack_k for every other k.

    Raises ValueError for an unknown precision or form, or arrays that do not fit each other.
    """
    codebook = as_float64("codebook", codebook, ("K", "D"))
    latents = as_float64("latents", latents, ("N", "S", codebook.shape[1]))
    indices, moved = np.asarray(indices), np.asarray(latents_error, np.float64)
    shape, (k, d) = latents.shape[:2], codebook.shape
    if not codebook.size:
        raise ValueError(
            f"codebook: shape is {codebook.shape}, expected at least one row and one element"
        )
    require_bound(d, precision, form)
    if not (np.isfinite(moved).all() and (moved >= 0).all()):
        raise ValueError("latents_error: expected finite numbers of at least 0")
    count = int(np.prod(shape))
    if problem := _misfit(indices, shape, np.dtype(np.int64)):
        return Check(
            name,
            precision,
            count,
            max(1, count),
            certified=0,
            near_ties=0,
            flips=0,
            problem=problem,
        )

    moved = np.broadcast_to(moved, shape).reshape(-1, 1)
    near_ties = flips = 0
    wrong: list[_Wrong] = []
    chosen = indices.ravel()
    flat = latents.reshape(-1, d)
    for rows, distances in squared_distances(flat, codebook):
        best, excess = choices(
            distances, flat[rows], codebook, precision=precision, form=form, moved=moved[rows]
        )
        near_ties += int((np.count_nonzero(excess <= 0, axis=1) > 1).sum())
        found = chosen[rows]
        inside = (found >= 0) & (found < k)
        beyond = np.where(inside, excess[np.arange(len(best)), np.where(inside, found, 0)], np.inf)
        fits = beyond <= 0
        flips += int(((found != best) & fits).sum())
        wrong += [
            (float(beyond[i]), rows.start + int(i), int(best[i])) for i in np.flatnonzero(~fits)
        ]

    worst, problem = _worst_index(wrong, chosen, shape, k)
    return Check(
        name,
        precision,
        count,
        len(wrong),
        certified=count - near_ties,
        near_ties=near_ties,
        flips=flips,
        worst=worst,
        problem=problem,
    )


_Wrong = tuple[float, int, int]
"""A wrong index: how far its code is beyond the slack, the latent, and the oracle's index."""


def _worst_index(
    wrong: list[_Wrong],
    chosen: npt.NDArray[Any],
    shape: tuple[int, ...],
    num_codes: int,
) -> tuple[dict[str, Any] | None, str | None]:
    """Returns the worst of the wrong indices, as data and in words."""
    if not wrong:
        return None, None
    beyond_slack, at, right = max(wrong)
    position = [int(i) for i in np.unravel_index(at, shape)]
    worst = {"position": position, "found": int(chosen[at]), "expected": right}
    far = f"farther by {beyond_slack:.2g} than rounding explains"
    reason = f"outside 0 to {num_codes - 1}" if beyond_slack == np.inf else far
    return worst, f"the worst at {tuple(position)} is {chosen[at]}, the oracle's {right}: {reason}"


def _misfit(actual: npt.NDArray[Any], shape: tuple[int, ...], dtype: np.dtype[Any]) -> str | None:
    if actual.shape != shape:
        return f"shape is {actual.shape}, expected {shape}"
    if actual.dtype != dtype:
        return f"dtype is {actual.dtype}, expected {dtype}"
    return None


def _plain(value: Any) -> float | None:
    """Returns a number that JSON can hold: None if it is not finite."""
    return float(value) if np.isfinite(value) else None
