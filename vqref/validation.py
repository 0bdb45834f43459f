"""Checks of the oracle's inputs. Errors name the array, what was found and what was expected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from vqref.prior import PriorSpec
    from vqref.spec import ModelSpec

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
Params = Mapping[str, Array]


def as_float64(name: str, array: npt.ArrayLike, shape: tuple[int | str, ...]) -> Float64:
    """Returns ``array`` as float64 if its dtype is floating, its shape right and all finite.

    ``shape`` holds sizes, or a symbol such as "N" for any size. Otherwise raises ValueError.
    """
    values = np.asarray(array)
    if not np.issubdtype(values.dtype, np.floating):
        raise ValueError(f"{name}: dtype is {values.dtype}, expected a floating dtype")
    _require_shape(name, values.shape, shape)
    if not np.isfinite(values).all():
        position = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
        raise ValueError(f"{name}: {values[position]} at {position}, expected finite values")
    return values.astype(np.float64)


def as_images(images: npt.ArrayLike, spec: ModelSpec) -> Float64:
    """Returns images (N, C, H, W) as float64. Raises ValueError if not floating in [0, 1]."""
    values = as_float64("images", images, ("N", *spec.image_shape))
    if values.size and not (values.min() >= 0.0 and values.max() <= 1.0):
        found = f"values from {values.min():.9g} to {values.max():.9g}"
        raise ValueError(f"images: {found}, expected grey levels in [0, 1]")
    return values


def as_indices(indices: npt.ArrayLike, shape: tuple[int | str, ...], num_codes: int) -> Int64:
    """Returns indices as int64 if they are integers from 0 to num_codes - 1. Raises ValueError."""
    values = np.asarray(indices)
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"indices: dtype is {values.dtype}, expected an integer dtype")
    _require_shape("indices", values.shape, shape)
    if values.size and not (values.min() >= 0 and values.max() < num_codes):
        found = f"values from {values.min()} to {values.max()}"
        raise ValueError(f"indices: {found}, expected 0 to {num_codes - 1}")
    return values.astype(np.int64)


def check_params(spec: ModelSpec | PriorSpec, params: Params) -> None:
    """Raises ValueError unless parameters are finite and fit the spec: names, shapes, dtypes."""
    expected = {parameter.name: parameter.shape for parameter in spec.parameters}
    if missing := [name for name in expected if name not in params]:
        raise ValueError(f"parameters missing: {', '.join(missing)}")
    if extra := [name for name in params if name not in expected]:
        raise ValueError(f"parameters unknown to the spec: {', '.join(extra)}")
    for name, shape in expected.items():
        as_float64(name, params[name], shape)


def _require_shape(name: str, found: tuple[int, ...], expected: tuple[int | str, ...]) -> None:
    fits = len(found) == len(expected) and all(
        isinstance(want, str) or have == want for have, want in zip(found, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, expected)) + ("," if len(expected) == 1 else "")
        raise ValueError(f"{name}: shape is {found}, expected ({wanted})")
