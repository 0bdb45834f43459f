"""A kit that checks any quantizer against the oracle, with named checks that run one by one.

To run all of them, with a ParityError that names the failed ones:

    vqref.checks.check_quantizer(quantize, update)

To run each as a test:

    @pytest.mark.parametrize("check", vqref.checks.quantizer_checks(quantize, update), ids=str)
    def test_quantizer(check):
        check.run().require()

An implementation takes NumPy arrays and returns anything that ``np.asarray`` takes. If it does not,
wrap it in an adapter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from vqref.agreement.bounds import require_bound
from vqref.agreement.report import Check, Report, merge
from vqref.checks.averaging import stepping_checks, updating_checks
from vqref.checks.kit import DEFAULT, THOROUGH, Kit, Quantize, Step, Update
from vqref.checks.quantizing import quantizing_checks
from vqref.dialects import POST, Dialect
from vqref.errors import ParityError


@dataclass(frozen=True)
class QuantizerCheck:
    """One named check. ``run`` returns its result.

    If the implementation raises an exception, the result is a violation that says so.
    """

    name: str
    _compare: Callable[[Kit], Iterable[Check]] = field(repr=False)
    _kit: Kit = field(repr=False)

    def run(self) -> Check:
        precision = self._kit.precision
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # some cases are meant to overflow
                found = [check for kit in self._kits() for check in self._compare(kit)]
                return merge(self.name, precision, tuple(found))
        except Exception as error:  # somebody's implementation can raise anything
            return Check(self.name, precision, 1, 1, problem=f"{type(error).__name__}: {error}")

    def _kits(self) -> Iterable[Kit]:
        for number in range(self._kit.amounts.seeds):
            yield dataclasses.replace(self._kit, seed=self._kit.seed + number)

    def __str__(self) -> str:
        return self.name


def check_quantizer(
    quantize: Quantize, update: Update | None = None, step: Step | None = None, **options: Any
) -> Report:
    """Runs every check of ``quantizer_checks`` and returns the report.

    Takes the arguments of ``quantizer_checks``. Raises ParityError that names the failed checks and
    carries the report. Raises ValueError for a precision, form or sizes that have no bound.
    """
    report = Report(
        tuple(check.run() for check in quantizer_checks(quantize, update, step, **options))
    )
    if failed := [check.stage for check in report.failures]:
        raise ParityError(f"{', '.join(failed)} failed; the first: {report.failures[0]}", report)
    return report


def quantizer_checks(
    quantize: Quantize,
    update: Update | None = None,
    step: Step | None = None,
    *,
    precision: str = "float32",
    form: str = "direct",
    dialect: Dialect = POST,
    num_codes: int = 64,
    code_size: int = 16,
    sizes: Literal["any", "fixed"] = "any",
    seed: int = 0,
    thorough: bool = False,
) -> list[QuantizerCheck]:
    """Returns the checks for an implementation, with those of ``update`` and ``step`` if given.

    quantize: takes latents (N, S, D) and a codebook (K, D). Returns indices (N, S) int64, or
        indices and quantized (N, S, D).
    update: takes (state, latents, indices, decay, epsilon). Returns the EMAState after the update,
        or its codebook, ema_count and ema_means.
    step: takes (state, latents, decay, epsilon). Returns indices, quantized and the state after:
        all that a training step does in the quantizer.
    precision, form: how distances are computed. These are names of
        ``vqref.precisions.PRECISIONS`` and ``vqref.agreement.bounds.FORMS``.
    dialect: the dialect of the moving averages.
    num_codes, code_size: K >= 4 and D of the codebooks in most checks.
    sizes: "any" if the implementation takes any K and D; the checks then try several. "fixed" if it
        only takes ``num_codes`` and ``code_size``. It must take any N and S. Batches that would be
        too large for these sizes are left out, with their checks.
    seed: the seed of all random numbers.
    thorough: tries more latents, calls, steps and sizes, and three seeds. Takes minutes.

    Raises ValueError for a precision, form or sizes that have no bound.
    """
    require_bound(code_size, precision, form)
    if num_codes < 4:
        raise ValueError(f"num_codes is {num_codes}, expected at least 4")
    if sizes not in ("any", "fixed"):
        raise ValueError(f"sizes is {sizes!r}, expected 'any' or 'fixed'")
    amounts = THOROUGH if thorough else DEFAULT
    how = precision, form, dialect, num_codes, code_size, sizes == "any", seed, amounts
    kit = Kit(quantize, update, step, *how)
    named = quantizing_checks(kit)
    if update is not None:
        named |= updating_checks(kit)
    if step is not None:
        named |= stepping_checks(kit)
    return [QuantizerCheck(name, compare, kit) for name, compare in named.items()]
