"""``python -m benchmarks.quality --data FOLDER``: measures how good the default run is, how much of
its time is not training, and how long it takes to a held-out bound, beside others.

First come whole runs of ``python -m vqtrain``, one per seed. The time outside of training steps is
everything from the command to the file: imports, checks against the oracle, evaluation, pictures,
reports and snapshots.

Then come the times to the bound, from the start of each process to the end of the first epoch whose
held-out bound is low enough. Ours is ``python -m vqtrain`` with each of the options ``SHORT``.
``--earlier TREE`` runs the same command of another checkout of this project. ``--library`` trains
vector-quantize-pytorch: the same network in PyTorch's own modules, with the library's quantizer
between them, k-means start and dead-code replacement, in batches of 64 by the loop of the library's
README. Its evaluation is not counted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, Record, parser
from vqref.families import post
from vqref.host.images import ImageSet
from vqtrain.data.sources import load_source
from vqtrain.modelfile import read_model

SHORT = (
    ("--epochs", "6"),
    ("--epochs", "4", "--learning-rate", "0.003", "--decay", "0.97"),
)
"""Options of ours for a short run. The second ones are docs/recipes.md's for few epochs."""

BATCH = 64
DEAD_BELOW = 0.05
"""The library's threshold of its averaged counts. Their mean is 1 here: with its README's 2, nearly
every code is replaced at every step (286 nats after seven epochs)."""


def peer(data: Path, epochs: int) -> None:
    """Trains the peer; prints each epoch, its held-out bound and the seconds of evaluation."""
    import torch

    from benchmarks.peers import Library
    from vqtrain.data.batches import Batches

    torch.manual_seed(0)
    images = load_source(str(data), lambda line: None)
    assert isinstance(images, ImageSet)
    assert images.held_out is not None
    batches = Batches(images.train, BATCH, torch.device("cpu"))
    held_out = torch.cat(list(Batches(images.held_out, BATCH, torch.device("cpu")).in_order()))
    model = Library(
        post(), decay=0.99, kmeans_init=True, kmeans_iters=10, threshold_ema_dead_code=DEAD_BELOW
    )
    generator, beside = torch.Generator().manual_seed(0), 0.0
    for epoch in range(1, epochs + 1):
        for batch in batches.shuffled(generator):
            model.step(batch)
        start = time.perf_counter()
        costs = [
            float(model.loss(part, answer.outputs)) * len(part)
            for part, answer in model.answers(held_out)
        ]
        bound = sum(costs) / len(held_out) + math.log(model.spec.num_codes)
        beside += time.perf_counter() - start
        print(f"{epoch} {bound} {beside}", flush=True)


def progress(command: list[str], folder: Path, tree: Path) -> Iterator[tuple[float, list[str]]]:
    """Yields (seconds since the process began, words) of each line that it prints.

    tree: the checkout whose packages it runs. The process is stopped when nobody asks for more.
    """
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(tree)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            yield time.perf_counter() - start, line.split()
    finally:
        process.terminate()
        process.communicate()


def trained(data: Path, *options: str) -> list[str]:
    """Returns the command of a run."""
    return [sys.executable, "-m", "vqtrain", "--data", str(data), "--device", "cpu", *options]


def whole_run(data: Path, seed: int) -> dict[str, Any]:
    """Makes a run of 20 epochs; returns its last epoch's measures, its seconds and their parts."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = trained(data, "--epochs", "20", "--seed", str(seed), "--name", "run")
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
        seconds = time.perf_counter() - start
        lines = (Path(folder) / "runs" / "run" / "metrics.jsonl").read_text().splitlines()
        model = read_model(Path(folder) / "model.pt")
    history = [json.loads(line) for line in lines]
    batch = model.training["batch_size"]
    source = load_source(str(data), lambda line: None)
    assert isinstance(source, ImageSet)
    images = source.count // batch * batch
    steps = sum(images / line["images_per_second"] for line in history)
    last = history[-1]["held_out"]
    return {
        "seed": seed,
        "bound": last["bound"],
        "perplexity": last["perplexity"],
        "codes_used": last["codes_used"],
        "checks": sum("oracle" in line for line in history),
        "seconds": seconds,
        "outside": 1 - steps / seconds,
    }


def to_bound(
    title: str, command: list[str], tree: Path, bound: float, record: Record
) -> float | None:
    """Runs a command until an epoch's held-out bound is low enough; returns the seconds."""
    course, reached = [], None
    with tempfile.TemporaryDirectory() as folder:
        for seconds, words in progress(command, Path(folder), tree):
            if len(words) < 3 or not words[0].isdigit() or words[1].startswith("images"):
                continue
            library = "--peer" in command
            found, beside = map(float, words[1:3]) if library else (float(words[2]), 0.0)
            course.append({"epoch": int(words[0]), "bound": found, "seconds": seconds - beside})
            if found <= bound:
                reached = seconds - beside
                break
    record.figures[title] = course
    last = course[-1]
    said = "never" if reached is None else f"{reached:.0f}"
    record.say(f"{title:<56}{last['epoch']:>6}{last['bound']:>9.2f}{said:>9}")
    return reached


def say_whole(data: Path, seeds: list[int], record: Record) -> None:
    """Makes whole runs and prints how good each is, and where its time went."""
    record.say(
        f"{'20 epochs, default':<20}{'seed':>5}{'nats':>9}{'perplexity':>12}{'codes':>7}"
        f"{'checks':>8}{'seconds':>9}{'outside steps':>15}"
    )
    for seed in seeds:
        run = whole_run(data, seed)
        record.figures.setdefault("whole", []).append(run)
        record.say(
            f"{'':<20}{seed:>5}{run['bound']:>9.2f}{run['perplexity']:>12.1f}"
            f"{run['codes_used']:>7.0f}{run['checks']:>8}{run['seconds']:>9.0f}"
            f"{run['outside']:>15.1%}"
        )


def say_times(arguments: argparse.Namespace, data: Path, record: Record) -> None:
    """Runs ours and the others to the bound, and prints their times and ratios."""
    ours = {f"ours, {' '.join(options)}": (trained(data, *options), ROOT) for options in SHORT}
    others: dict[str, tuple[list[str], Path]] = {}
    if arguments.earlier is not None:
        options = ("--epochs", "7", "--precision", "auto")
        tree = arguments.earlier.resolve()
        others[f"the earlier, {' '.join(options)}"] = trained(data, *options), tree
    if arguments.library:
        words = ["--peer", "--data", str(data), "--peer-epochs", str(arguments.peer_epochs)]
        command = [sys.executable, "-m", "benchmarks.quality", *words]
        others["vector-quantize-pytorch"] = command, ROOT
    record.say(
        f"{f'held-out bound at most {arguments.bound}':<56}{'epoch':>6}{'nats':>9}{'seconds':>9}"
    )
    found = {
        title: to_bound(title, *how, arguments.bound, record)
        for title, how in {**ours, **others}.items()
    }
    for title in others:
        for own in ours:
            taken, other = found[own], found[title]
            if taken is not None and other is not None:
                record.say(f"{own}: {taken / other:.2f} of the time of {title}")


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--data",
        type=Path,
        required=True,
        help="a folder with the official NumPy files, or an .npz file",
    )
    options.add_argument(
        "--bound", type=float, default=270.0, help="nats per image, held out (default: %(default)s)"
    )
    options.add_argument(
        "--seeds", type=int, nargs="*", default=[0, 1, 2], help="of whole runs (default: 0 1 2)"
    )
    options.add_argument(
        "--earlier", type=Path, metavar="TREE", help="another checkout of this project"
    )
    options.add_argument(
        "--library", action="store_true", help="train vector-quantize-pytorch, too"
    )
    options.add_argument(
        "--peer-epochs",
        type=int,
        default=30,
        help="that the library is given at most (default: %(default)s)",
    )
    options.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    arguments = options.parse_args()
    data = arguments.data.resolve()
    if arguments.peer:
        peer(data, arguments.peer_epochs)
        return
    record = Record(arguments)
    if arguments.seeds:
        say_whole(data, arguments.seeds, record)
    say_times(arguments, data, record)
    record.write()


if __name__ == "__main__":
    main()
