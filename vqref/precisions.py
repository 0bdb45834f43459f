"""Every precision that the toolkit knows: one table for the judge, the trainer and the exporter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Arithmetic:
    """What rounding can do.

    unit     u, the largest relative error of one operation
    inputs   the relative error by which latents and codebook are rounded before anything else
    factors  the relative error by which factors of a matrix product are rounded beyond ``inputs``
    tiny, largest   the smallest normal and the largest finite number
    """

    unit: float
    inputs: float
    factors: float
    tiny: float
    largest: float


@dataclass(frozen=True)
class Precision:
    """A precision of networks.

    option  its name on command lines: its own, or a shorter one
    arithmetic  of distances computed in it; None if nothing bounds them
    trains  whether ``vqtrain --precision`` takes it
    exports whether ``vqdeploy export --precision`` takes it
    """

    option: str
    arithmetic: Arithmetic | None
    trains: bool = False
    exports: bool = False


_SINGLE = 2.0**-126, (2 - 2.0**-23) * 2.0**127

PRECISIONS: Mapping[str, Precision] = MappingProxyType(
    {
        "float64": Precision(
            "float64", Arithmetic(2.0**-53, 0.0, 0.0, 2.0**-1022, (2 - 2.0**-52) * 2.0**1023)
        ),
        "float32": Precision(
            "fp32", Arithmetic(2.0**-24, 0.0, 0.0, *_SINGLE), trains=True, exports=True
        ),
        "tf32": Precision("tf32", Arithmetic(2.0**-23, 0.0, 2.0**-10, *_SINGLE), trains=True),
        "bfloat16": Precision(
            "bf16",
            Arithmetic(2.0**-8, 2.0**-8, 0.0, _SINGLE[0], (2 - 2.0**-7) * 2.0**127),
            trains=True,
        ),
        "float16": Precision(
            "fp16", Arithmetic(2.0**-11, 2.0**-11, 0.0, 2.0**-14, 65504.0), exports=True
        ),
        "int8": Precision("int8", None, exports=True),
    }
)
"""By name. tf32 has 10 bits after the point in the factors of matrix products alone; tensor cores
may cut factors and partial sums off instead of rounding them (Fasi et al. 2021, Numerical behavior
of NVIDIA tensor cores), hence twice the unit. bfloat16 and float16 round every value and every
operation, so that what accumulates in float32 is inside the bound."""


def of_option(option: str) -> str:
    """The name of the precision that command lines call ``option``."""
    return next(name for name, row in PRECISIONS.items() if row.option == option)


def arithmetic(precision: str) -> Arithmetic:
    """Of distances in ``precision``. Raises ValueError if it is unknown or nothing bounds it."""
    row = PRECISIONS.get(precision)
    if row is None or row.arithmetic is None:
        known = ", ".join(name for name, other in PRECISIONS.items() if other.arithmetic)
        raise ValueError(f"precision is {precision!r}, expected one of {known}")
    return row.arithmetic
