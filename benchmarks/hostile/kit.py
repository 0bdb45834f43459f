"""``python -m benchmarks.hostile.kit``: runs ``vqref.checks`` on wrong and right implementations.

The implementations are quantizers, averages and training steps. For each wrong one, a check is
named that must catch it. The right ones have many forms, and none may be refused.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.hostile.mutants import Mutation
from benchmarks.hostile.right import right
from benchmarks.hostile.wrong_averages import STEPPING, UPDATES
from benchmarks.hostile.wrong_quantizers import QUANTIZERS
from benchmarks.measure import Record, parser

MUTATIONS: Mapping[str, Mutation] = {
    f"{kind}: {name}": mutation
    for kind, table in (("quantize", QUANTIZERS), ("update", UPDATES), ("step", STEPPING))
    for name, mutation in table.items()
}


@dataclass
class Findings:
    """What the campaign found.

    caught: each mutation with its named check, which it failed. missed: mutations that passed their
    check. alarms: checks that refused something right. checks: how many checks of right
    implementations ran.
    """

    caught: dict[str, str] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)
    alarms: list[str] = field(default_factory=list)
    checks: int = 0


def campaign(
    count: int | None = None,
    seed: int = 0,
    *,
    say: Callable[[str], object] = lambda line: None,
    **sizes: Any,
) -> Findings:
    """Runs the named checks of ``count`` mutations or all, and all checks of right ones.

    There are as many right implementations as mutations.

    say: takes a line on each. sizes: of the codebooks, as ``quantizer_checks`` takes them.
    """
    found = Findings()
    with np.errstate(all="ignore"):
        for name, mutation in itertools.islice(MUTATIONS.items(), count):
            checks = mutation.checks(seed=seed, **sizes)
            named = next(check for check in checks if check.name == mutation.caught_by)
            if named.run().passed:
                found.missed.append(name)
            else:
                found.caught[name] = named.name
            say(f"{name}: {found.caught.get(name, 'NOT caught')}")
        for name, checks in itertools.islice(right(seed, **sizes), count):
            refused = [result for check in checks if not (result := check.run()).passed]
            found.alarms += [f"{name}: {result}" for result in refused]
            found.checks += len(checks)
            say(f"{name}: {len(refused)} of {len(checks)} checks refused it")
    return found


def main() -> int:
    options = parser(__doc__)
    options.add_argument(
        "--count", type=int, help="mutations and right implementations (default: all)"
    )
    options.add_argument(
        "--seed", type=int, default=0, help="of everything drawn (default: %(default)s)"
    )
    arguments = options.parse_args()
    record = Record(arguments)
    start = time.perf_counter()
    found = campaign(arguments.count, arguments.seed, say=print)
    record.say(
        f"{len(found.caught)} mutations caught by name, {len(found.missed)} not; "
        f"{found.checks} checks of right implementations, {len(found.alarms)} false alarms"
    )
    for line in (*found.missed, *found.alarms):
        record.say(line)
    record.figures = dataclasses.asdict(found) | {"seconds": time.perf_counter() - start}
    record.write()
    return 1 if found.missed or found.alarms else 0


if __name__ == "__main__":
    sys.exit(main())
