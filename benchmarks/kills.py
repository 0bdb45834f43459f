"""``python -m benchmarks.kills [--kills N]``: kills a short run N times at random moments, resumes
it each time, and compares what it ends with to a run that nobody disturbed.

A small network on random images, a snapshot every second step. SIGKILL, so that nothing in the
process can help; ``benchmarks.hostile.signals`` sends those that a process can answer.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.measure import ROOT, Record, parser
from vqtrain.modelfile import read_model
from vqtrain.run.folder import SNAPSHOTS, latest_state
from vqtrain.run.snapshot import list_states

OPTIONS = (
    *("--data", "data.npz", "--base-depth", "2", "--num-codes", "8", "--batch-size", "16"),
    *("--snapshot-steps", "2", "--device", "cpu"),
)
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def write_images(place: Path, rng: np.random.Generator) -> None:
    """The images that OPTIONS name, in the folder in which the runs are made."""
    np.savez(place / "data.npz", rng.integers(0, 256, (128, 28, 28), np.uint8))


def training(name: str, epochs: int) -> list[str]:
    """The command of a run, which writes NAME.pt."""
    words = [sys.executable, "-m", "vqtrain", *OPTIONS, "--epochs", str(epochs)]
    return [*words, "--name", name, "--output", f"{name}.pt"]


def equal(first: Path, second: Path) -> bool:
    """Whether two models have the same parameters, bit for bit."""
    a, b = read_model(first).params, read_model(second).params
    return all(np.array_equal(a[name], b[name]) for name in a)


def main() -> int:
    options = parser(__doc__)
    options.add_argument(
        "--kills", type=int, default=200, help="how many times (default: %(default)s)"
    )
    options.add_argument(
        "--epochs", type=int, default=60, help="epochs of the run (default: %(default)s)"
    )
    options.add_argument(
        "--seed", type=int, default=0, help="of the moments (default: %(default)s)"
    )
    arguments = options.parse_args()
    rng = np.random.default_rng(arguments.seed)
    record = Record(arguments)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_images(place, rng)

        def start(name: str) -> subprocess.Popen[bytes]:
            words = training(name, arguments.epochs)
            return subprocess.Popen(words, cwd=place, env=ENVIRONMENT, stdout=subprocess.DEVNULL)

        if start("whole").wait() != 0:
            return 1
        kills = lost = restarts = 0
        furthest = -1
        while kills < arguments.kills:
            process = start("killed")
            time.sleep(rng.uniform(0.1, 6.0))
            if process.poll() is not None:
                break  # it came to its end
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            states = list_states(place / "runs" / "killed" / SNAPSHOTS)
            reached = int(states[0].stem.removeprefix("step-")) if states else -1
            found = latest_state(place / "runs" / "killed") if states else None
            lost += bool(found and found[2]) + (reached < furthest)
            restarts += reached == furthest
            furthest = max(furthest, reached)
        if process.poll() is None or not (place / "killed.pt").exists():
            start("killed").wait()
        same = equal(place / "whole.pt", place / "killed.pt")
    record.say(
        f"{kills} SIGKILLs, {restarts} of them before a new snapshot; "
        f"{lost} lost or damaged snapshots"
    )
    record.say(
        f"final parameters {'equal' if same else 'NOT equal'} to the undisturbed run's bit for bit"
    )
    record.figures = {
        "kills": kills,
        "without a new snapshot": restarts,
        "lost": lost,
        "equal": same,
    }
    record.write()
    return 0 if same and not lost else 1


if __name__ == "__main__":
    sys.exit(main())
