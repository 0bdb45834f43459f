"""A kit that checks any quantizer against the oracle."""

from vqref.checks.adversary import CASES
from vqref.checks.checks import QuantizerCheck, check_quantizer, quantizer_checks
from vqref.checks.vectors import conformance_vectors

__all__ = ["CASES", "QuantizerCheck", "check_quantizer", "conformance_vectors", "quantizer_checks"]
