"""``python -m benchmarks.kills [--kills N]``: kills short training runs, and resumes them.

Kills a run of a model and a run of a prior N times each, at random moments, and resumes after each
kill. Then compares the result with that of an undisturbed run.

The network is small and the images are random. A model's run saves a snapshot every second step, a
prior's every epoch. SIGKILL leaves the process no chance to react; ``benchmarks.hostile.signals``
sends the signals that a process can answer.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator

from benchmarks.measure import ROOT, Record, parser
from vqtrain.modelfile import read_model
from vqtrain.run.folder import SNAPSHOTS, latest_state
from vqtrain.run.snapshot import list_states

SHARED = ("--data", "data.npz", "--batch-size", "16", "--device", "cpu")
OPTIONS = (
    *("--base-depth", "2", "--num-codes", "8", "--latent-size", "2", "--snapshot-steps", "2"),
    *SHARED,
)
OF_PRIOR = ("--width", "8", "--depth", "1", "--heads", "1", "--patience", "1000000", *SHARED)
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


EPOCHS_OF_PRIOR = 20
"""Epochs of the prior per epoch of training; both take about the same time."""


def write_images(place: Path, rng: np.random.Generator) -> None:
    """Writes the images that OPTIONS name, in the folder of the runs."""
    np.savez(place / "data.npz", rng.integers(0, 256, (128, 28, 28), np.uint8))


def training(name: str, epochs: int) -> list[str]:
    """Returns the command of a run, which writes NAME.pt."""
    return _command(OPTIONS, name, epochs)


def of_prior(name: str, epochs: int, model: str = "whole.pt") -> list[str]:
    """Returns the command of a prior's run on a model of ``training``; it writes NAME.pt."""
    return _command(("prior", model, *OF_PRIOR), name, epochs)


def _command(words: Sequence[str], name: str, epochs: int) -> list[str]:
    ends = ["--epochs", str(epochs), "--name", name, "--output", f"{name}.pt"]
    return [sys.executable, "-m", "vqtrain", *words, *ends]


def equal(first: Path, second: Path) -> bool:
    """Returns whether two models and their priors have the same parameters, bit for bit."""
    a, b = (
        {**model.params, **(model.prior.params if model.prior else {})}
        for model in map(read_model, (first, second))
    )
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def start(words: Sequence[str], place: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(words, cwd=place, env=ENVIRONMENT, stdout=subprocess.DEVNULL)


def campaign(
    place: Path, command: Callable[[str], list[str]], whole: str, kills: int, rng: Generator
) -> dict[str, Any]:
    """Kills ``command("NAME")`` this often, or until it has finished, and compares the results."""
    name = f"{whole}-killed"
    if start(command(whole), place).wait() != 0:
        raise RuntimeError("the undisturbed run failed")
    done = lost = restarts = 0
    furthest = -1
    while done < kills:
        process = start(command(name), place)
        time.sleep(rng.uniform(0.1, 6.0))
        if process.poll() is not None:
            break  # it came to its end
        process.send_signal(signal.SIGKILL)
        process.wait()
        done += 1
        states = list_states(place / "runs" / name / SNAPSHOTS)
        reached = int(states[0].stem.removeprefix("step-")) if states else -1
        found = latest_state(place / "runs" / name) if states else None
        lost += bool(found and found[2]) + (reached < furthest)
        restarts += reached == furthest
        furthest = max(furthest, reached)
    if not (place / f"{name}.pt").exists():
        start(command(name), place).wait()
    same = equal(place / f"{whole}.pt", place / f"{name}.pt")
    return {"kills": done, "without a new snapshot": restarts, "lost": lost, "equal": same}


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
        runs = {
            "training": (partial(training, epochs=arguments.epochs), "whole"),
            "prior": (partial(of_prior, epochs=EPOCHS_OF_PRIOR * arguments.epochs), "prior"),
        }
        for name, (command, whole) in runs.items():
            found = campaign(place, command, whole, arguments.kills, rng)
            record.figures[name] = found
            record.say(
                f"{name}: {found['kills']} SIGKILLs, {found['without a new snapshot']} of them "
                f"before a new snapshot; {found['lost']} lost or damaged snapshots"
            )
            record.say(
                f"final parameters {'equal' if found['equal'] else 'NOT equal'} to the undisturbed "
                "run's bit for bit"
            )
    record.write()
    return 0 if all(each["equal"] and not each["lost"] for each in record.figures.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
