"""The judge: decides if an implementation agrees with the oracle as far as rounding allows."""

from vqref.agreement.parity import (
    TOLERANCES,
    Tolerance,
    allowed_error,
    check,
    check_indices,
    tolerance,
)
from vqref.agreement.report import Check, Report, merge
from vqref.agreement.stages import Backend, check_reconstructions, compare

__all__ = [
    "TOLERANCES",
    "Backend",
    "Check",
    "Report",
    "Tolerance",
    "allowed_error",
    "check",
    "check_indices",
    "check_reconstructions",
    "compare",
    "merge",
    "tolerance",
]
