"""The precisions that the toolkit knows, in one table for judge, trainer and exporter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Arithmetic:
    """How much rounding can change numbers.

    unit     u, the largest relative error of one operation
    inputs   the relative error of latents and codebook, rounded before anything else
    factors  the relative error of rounding factors of a matrix product, beyond ``inputs``
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
    arithmetic  the arithmetic of distances computed in it; None if nothing bounds their errors
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
"""The precisions by name.

tf32 has 10 bits after the point, but only in the factors of matrix products. Tensor cores may cut
factors and partial sums off instead of rounding them (Fasi et al. 2021, Numerical behavior of
NVIDIA tensor cores). So its unit is doubled. bfloat16 and float16 round every value and every
operation; the bound also holds if sums accumulate in float32."""


def of_option(option: str) -> str:
    """Returns the name of the precision that command lines call ``option``."""
    return next(name for name, row in PRECISIONS.items() if row.option == option)


def arithmetic(precision: str) -> Arithmetic:
    """Returns the arithmetic of distances. Raises ValueError if it is unknown or unbounded."""
    row = PRECISIONS.get(precision)
    if row is None or row.arithmetic is None:
        known = ", ".join(name for name, other in PRECISIONS.items() if other.arithmetic)
        raise ValueError(f"precision is {precision!r}, expected one of {known}")
    return row.arithmetic
