"""What a comparison found, in words, in a table and as plain data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vqref.commandline import CommandError, ExitCode


class ParityError(CommandError):
    """Two implementations disagree by more than rounding explains. ``report`` holds the checks made until then."""

    exit_code = ExitCode.PARITY

    def __init__(self, message: str, report: Report | None = None) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class Check:
    """What one comparison found.

    stage       the stage, with the array's name where the stage has several
    compared    elements (continuous) or indices compared
    violations  how many are wrong; 0 is the only passing number
    max_error, rms_error, allowed   continuous stages: errors over their scale, and the tolerance
    certified, near_ties, flips     indices: where the choice is proved; where rounding may choose; where it chose otherwise
    worst       position, found and expected of the worst offender
    problem     why nothing could be compared (shape, dtype), or why the worst offender is wrong
    """

    stage: str
    precision: str
    compared: int
    violations: int
    max_error: float | None = None
    rms_error: float | None = None
    allowed: float | None = None
    certified: int | None = None
    near_ties: int | None = None
    flips: int | None = None
    worst: Mapping[str, Any] | None = None
    problem: str | None = None

    @property
    def passed(self) -> bool:
        return self.violations == 0

    def require(self) -> Check:
        """Returns itself, or raises ParityError."""
        if not self.passed:
            raise ParityError(str(self), Report((self,)))
        return self

    def __str__(self) -> str:
        verdict = "agrees" if self.passed else f"{self.violations} violations"
        return f"{self.stage} ({self.precision}): {verdict} in {self.compared}" + (f"; {self.problem}" if self.problem else "")


@dataclass(frozen=True)
class Report:
    """Checks in the order of the stages. Prints as one line a stage; ``to_dict`` is plain data for JSON."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.passed)

    @property
    def worst_error_over_allowed(self) -> float:
        """The largest continuous error as a share of its tolerance; infinite where an error is not finite."""
        shares = [np.inf if c.max_error is None else c.max_error / c.allowed for c in self.checks if c.allowed]
        return float(max(shares, default=0.0))

    def require(self) -> Report:
        """Returns itself, or raises ParityError that says which stage."""
        if not self.passed:
            raise ParityError(str(self.failures[0]), self)
        return self

    def to_dict(self) -> dict[str, Any]:
        return {"passed": self.passed, "checks": [dataclasses.asdict(check) for check in self.checks]}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        lines = ["stage          compared  max err  rms err  allowed certified  ties  flips wrong"]
        for c in self.checks:
            errors = ["-" if e is None else f"{e:.1e}" for e in (c.max_error, c.rms_error, c.allowed)]
            counts = ["-" if n is None else str(n) for n in (c.certified, c.near_ties, c.flips)]
            lines.append(
                f"{c.stage:<14}{c.compared:>9}{errors[0]:>9}{errors[1]:>9}{errors[2]:>9}"
                f"{counts[0]:>10}{counts[1]:>6}{counts[2]:>7}{c.violations:>6}"
            )
        lines += [f"{c.stage}: {c.problem}" for c in self.failures]
        return "\n".join(lines)


def merge(name: str, precision: str, checks: tuple[Check, ...]) -> Check:
    """Several comparisons as one line: sums of counts (of indices alone, where there are any), the largest error over its
    tolerance, the first problem."""
    failed = [check for check in checks if not check.passed]
    problem = failed[0].problem if failed else None
    if failed and failed[0].stage not in (problem or ""):
        problem = f"{failed[0].stage}: {problem}"
    errors = [check for check in checks if check.max_error is not None and check.allowed]
    worst = max(errors, key=lambda check: (check.max_error or 0.0) / (check.allowed or 1.0), default=None)
    counted = [check for check in checks if check.certified is not None]
    return Check(
        name,
        precision,
        sum(check.compared for check in counted or checks),
        sum(check.violations for check in checks),
        max_error=worst.max_error if worst else None,
        rms_error=worst.rms_error if worst else None,
        allowed=worst.allowed if worst else None,
        certified=sum(check.certified or 0 for check in counted) if counted else None,
        near_ties=sum(check.near_ties or 0 for check in counted) if counted else None,
        flips=sum(check.flips or 0 for check in counted) if counted else None,
        worst=failed[0].worst if failed else None,
        problem=problem,
    )
