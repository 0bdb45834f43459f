"""``python -m benchmarks.hostile.signals [--count N]``: sends N SIGTERMs and N SIGINTs to commands.

Moments are drawn uniformly from the whole life of the processes. Signals that were not answered are
reported. Two in three go to a short training run. It is continued after each signal until it ends,
and is then compared with an undisturbed run. Every third signal goes to another command. Python
itself answers signals until it has imported this project; which signals the process catches when
one is sent tells the two apart (on Linux).
"""

from __future__ import annotations

import itertools
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.kills import ENVIRONMENT, equal, of_prior, training, write_images
from benchmarks.measure import Record, parser

EPOCHS = 6
OTHERS = ("export", "verify", "evaluate", "vectors", "prior")
"""Commands other than training; verify takes what export wrote."""

LONGEST = 120.0
"""Seconds after which a signalled process counts as hanging."""

PYTHONS_OWN = {signal.SIGINT: (-signal.SIGINT, 1), signal.SIGTERM: (-signal.SIGTERM,)}
"""How Python itself ends at a signal, before it has reached this project."""


@dataclass
class Findings:
    """What the campaign found.

    sent: how many signals met a process. early: how many of these came before our first line; late:
    after a command's last line. ends: runs that finished. wrong: a line for each signal that was
    not answered as it should be.
    """

    sent: int = 0
    early: int = 0
    late: int = 0
    ends: int = 0
    wrong: list[str] = field(default_factory=list)

    def __add__(self, other: Findings) -> Findings:
        sums = (getattr(self, name) + getattr(other, name) for name in self.__dict__)
        return Findings(*sums)


def campaign(
    count: int, seed: int = 0, jobs: int = 1, epochs: int = EPOCHS, others: Sequence[str] = OTHERS
) -> Findings:
    """Sends ``count`` SIGTERMs and as many SIGINTs.

    jobs: how many processes are signalled at a time. epochs: of each run. others: the commands that
    every third signal goes to.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_images(place, np.random.default_rng(seed))
        spans = {name: _span(place, _words(name, "whole", epochs)) for name in ("train", *others)}
        with ThreadPoolExecutor(jobs) as pool:
            shares = [2 * count // jobs + (job < 2 * count % jobs) for job in range(jobs)]
            seeds = range(1000 * seed, 1000 * seed + jobs)
            parts = [
                pool.submit(_campaign, place, share, each, spans, epochs)
                for share, each in zip(shares, seeds, strict=True)
            ]
            return sum((part.result() for part in parts), Findings())


def _words(kind: str, name: str, epochs: int) -> list[str]:
    """Returns a command line. name: of what it writes, or continues."""
    commands = {
        "export": ["vqdeploy", "export", "whole.pt", "--output", f"{name}-onnx"],
        "verify": ["vqdeploy", "verify", "whole-onnx"],
        "evaluate": ["vqtrain", "evaluate", "whole.pt", "--data", "data.npz"],
        "vectors": ["vqref", "vectors", f"{name}-vectors"],
    }
    if kind in commands:
        return [sys.executable, "-m", *commands[kind]]
    return (of_prior if kind == "prior" else training)(name, epochs)


def _span(place: Path, words: Sequence[str]) -> float:
    """Returns the seconds of an undisturbed command."""
    start = time.perf_counter()
    done = subprocess.run(
        words, cwd=place, env=ENVIRONMENT, check=False, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed undisturbed: {done.stderr}")
    return time.perf_counter() - start


def _campaign(
    place: Path, signals: int, seed: int, spans: dict[str, float], epochs: int
) -> Findings:
    """Returns what one worker finds with its share of the signals."""
    rng, found = np.random.default_rng(seed), Findings()
    numbers = itertools.cycle((signal.SIGTERM, signal.SIGINT))
    number, runs = next(numbers), 0
    name, others = f"run-{seed}-0", itertools.cycle(list(spans)[1:])
    while found.sent < signals or (place / "runs" / name).exists():
        kind = next(others, "train") if found.sent % 3 == 2 and found.sent < signals else "train"
        words = _words(kind, name if kind == "train" else f"other-{seed}-{found.sent}", epochs)
        moment = rng.uniform(0, spans[kind]) if found.sent < signals else LONGEST
        sent, said = found.sent, _signalled(place, words, number, moment, found)
        number = next(numbers) if found.sent > sent else number
        if kind == "train" and (not said or "at its end" in said):
            found.ends += 1
            if not equal(place / "whole.pt", place / f"{name}.pt"):
                found.wrong.append(f"{name}: the end is not that of the undisturbed run")
            runs += 1
            name = f"run-{seed}-{runs}"
    return found


def _signalled(
    place: Path, words: Sequence[str], number: signal.Signals, moment: float, found: Findings
) -> str:
    """Runs a command, signals it after ``moment`` seconds, and notes the answer.

    Returns its stderr, which is empty if the command finished.
    """
    process = subprocess.Popen(
        words,
        cwd=place,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    state = "ended"
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        state = _state(process.pid, number)
        process.send_signal(number)
    try:
        said = process.communicate(timeout=LONGEST)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        said = process.communicate()[1] + "\nhangs"
    code = process.returncode
    found.sent += state != "ended"
    found.early += state == "early"
    found.late += state == "late"
    if not is_right(state, number, code, said):
        asked = " ".join(words[2:4])
        found.wrong.append(f"{asked}, {number.name} after {moment:.3f} s: {state} {code} {said!r}")
    return said or ("killed" if code else "")


def is_right(state: str, number: int, code: int, said: str) -> bool:
    """Returns whether this is how a process in this state should answer this signal."""
    answered = (
        code == 128 + number and re.fullmatch(r"vq\w+: interrupted[^\n]*\n", said) is not None
    )
    if state == "early":
        return answered or code in PYTHONS_OWN[signal.Signals(number)]
    undisturbed = (code, said) == (0, "")
    return answered or (undisturbed and state in ("ended", "late"))


def _state(pid: int, number: int) -> str:
    """Returns what a process does with a signal: "early", "watched" or "late".

    Early: Python or the system answers. Late: the signal is ignored because the command is done.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "late"
    caught, ignored = (
        int(re.findall(rf"{mask}:\s*(\w+)", status)[0], 16) for mask in ("SigCgt", "SigIgn")
    )
    if ignored >> (number - 1) & 1:
        return "late"
    term = signal.SIGTERM - 1  # Python itself catches SIGINT from its start, but not SIGTERM
    return "watched" if caught >> term & 1 else "early"


def main() -> int:
    options = parser(__doc__)
    options.add_argument(
        "--count", type=int, default=200, help="of each signal (default: %(default)s)"
    )
    options.add_argument(
        "--seed", type=int, default=0, help="of the moments (default: %(default)s)"
    )
    options.add_argument("--jobs", type=int, default=2, help="at a time (default: %(default)s)")
    arguments = options.parse_args()
    record = Record(arguments)
    found = campaign(arguments.count, arguments.seed, arguments.jobs)
    record.say(
        f"{found.sent} signals, {found.early} of them before the first line of this project and "
        f"{found.late} after a command's last; {found.ends} runs came to their ends"
    )
    record.say(f"{len(found.wrong)} signals swallowed, answered otherwise, or runs that changed")
    for line in found.wrong:
        record.say(line)
    record.figures = found.__dict__
    record.write()
    return 1 if found.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
