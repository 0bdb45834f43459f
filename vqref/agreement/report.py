"""The results of a comparison, in words, in a table and as plain data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vqref.errors import ParityError


@dataclass(frozen=True)
class Check:
    """The result of one comparison.

    stage: the stage, or the name of the array if the stage has several.
    compared: how many elements or indices were compared.
    violations: how many are wrong. The check passes only if this is 0.
    max_error, rms_error, allowed: for a continuous stage, its errors divided by their scale, and
        the tolerance.
    certified, near_ties, flips: for indices, how many choices are proved, how many rounding may
        decide, and how many of the latter differ from the oracle's.
    worst: position, found and expected value of the worst element.
    problem: why nothing could be compared (shape, dtype), or why the worst element is wrong.
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
        return f"{self.stage} ({self.precision}): {verdict} in {self.compared}" + (
            f"; {self.problem}" if self.problem else ""
        )


@dataclass(frozen=True)
class Report:
    """The checks of a comparison, in the order of the stages.

    images: the number of images compared. codes: how many different codes they use; 0 if this was
    not counted. A report prints as one line per stage; ``to_dict`` gives plain data for JSON.
    """

    checks: tuple[Check, ...]
    images: int = 0
    codes: int = 0

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.passed)

    @property
    def worst_error_over_allowed(self) -> float:
        """The largest continuous error, divided by its tolerance.

        It is infinite if an error is not finite.
        """
        shares = [
            np.inf if c.max_error is None else c.max_error / c.allowed
            for c in self.checks
            if c.allowed
        ]
        return float(max(shares, default=0.0))

    def require(self) -> Report:
        """Returns itself, or raises ParityError that names the stage."""
        if not self.passed:
            raise ParityError(str(self.failures[0]), self)
        return self

    def to_dict(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "images": self.images,
            "codes": self.codes,
            "checks": [dataclasses.asdict(check) for check in self.checks],
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        lines = ["stage           compared max err rms err allowed certified    ties   flips wrong"]
        for c in self.checks:
            errors = [
                "-" if e is None else f"{e:.1e}" for e in (c.max_error, c.rms_error, c.allowed)
            ]
            counts = ["-" if n is None else str(n) for n in (c.certified, c.near_ties, c.flips)]
            lines.append(
                f"{c.stage:<15}{c.compared:>9}{errors[0]:>8}{errors[1]:>8}{errors[2]:>8}"
                f"{counts[0]:>10}{counts[1]:>8}{counts[2]:>8}{c.violations:>6}"
            )
        lines += [f"{c.stage}: {c.problem}" for c in self.failures]
        return "\n".join(lines)


def merge(name: str, precision: str, checks: tuple[Check, ...]) -> Check:
    """Merges several comparisons into one.

    Adds up the counts, only those of indices if there are any. Keeps the error that is largest
    relative to its tolerance, and the first problem.
    """
    failed = [check for check in checks if not check.passed]
    problem = failed[0].problem if failed else None
    if failed and failed[0].stage not in (problem or ""):
        problem = f"{failed[0].stage}: {problem}"
    errors = [check for check in checks if check.max_error is not None and check.allowed]
    worst = max(
        errors, key=lambda check: (check.max_error or 0.0) / (check.allowed or 1.0), default=None
    )
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
