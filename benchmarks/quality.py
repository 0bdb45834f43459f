"""``python -m benchmarks.quality --data FOLDER``: measures the wall time to a held-out bound, for
ours and for vector-quantize-pytorch.

Ours is ``python -m vqtrain --epochs N --precision auto`` as a user starts it, with its checks
against the oracle, evaluation, pictures and snapshots. The peer is the same network in PyTorch's
own modules, with the library's quantizer between them, k-means start and dead-code replacement. The
loop of the library's README trains it in batches of 64; its evaluation is not counted. Both are
timed from the start of their processes to the end of the first epoch whose held-out bound is low
enough.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measure import ROOT, Record, parser
from vqref.families import post

BATCH = 64
DEAD_BELOW = 0.05
"""The library's threshold of its averaged counts. Their mean is 1 here: with its README's 2, nearly
every code is replaced at every step (286 nats after seven epochs)."""


def peer(data: Path, epochs: int) -> None:
    """Trains the peer; prints each epoch, its held-out bound and the seconds of evaluation."""
    import torch

    from benchmarks.peers import Library
    from vqref.host.images import ImageSet
    from vqtrain.data.batches import Batches
    from vqtrain.data.sources import load_source

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


def progress(command: list[str], folder: Path) -> Iterator[tuple[float, list[str]]]:
    """Yields (seconds since the process began, words) of each line that it prints.

    The process is stopped when nobody asks for more.
    """
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
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
        "--epochs", type=int, default=7, help="that ours is told to take (default: %(default)s)"
    )
    options.add_argument(
        "--peer-epochs",
        type=int,
        default=30,
        help="that the peer is given at most (default: %(default)s)",
    )
    options.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    arguments = options.parse_args()
    data = arguments.data.resolve()
    if arguments.peer:
        return peer(data, arguments.peer_epochs)
    record = Record(arguments)
    common = ["--data", str(data), "--device", "cpu"]
    ours = [
        sys.executable,
        "-m",
        "vqtrain",
        *common,
        "--epochs",
        str(arguments.epochs),
        "--precision",
        "auto",
    ]
    theirs = [
        sys.executable,
        "-m",
        "benchmarks.quality",
        "--peer",
        "--data",
        str(data),
        "--peer-epochs",
        str(arguments.peer_epochs),
    ]
    names = {f"ours, --epochs {arguments.epochs}": ours, "vector-quantize-pytorch": theirs}
    record.say(
        f"{f'held-out bound at most {arguments.bound}':<32}{'epoch':>6}{'nats':>9}{'seconds':>9}"
    )
    reached: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, command in names.items():
            course = []
            for seconds, words in progress(command, Path(folder)):
                if len(words) < 3 or not words[0].isdigit() or words[1].startswith("images"):
                    continue
                bound, beside = (
                    (float(words[2]), 0.0)
                    if command is ours
                    else (float(words[1]), float(words[2]))
                )
                course.append({"epoch": int(words[0]), "bound": bound, "seconds": seconds - beside})
                if bound <= arguments.bound:
                    reached[name] = seconds - beside
                    break
            record.figures[name] = course
            last = course[-1]
            seconds_said = f"{last['seconds']:.0f}" if name in reached else "never"
            record.say(f"{name:<32}{last['epoch']:>6}{last['bound']:>9.2f}{seconds_said:>9}")
    if len(reached) == 2:
        first, second = reached.values()
        record.say(f"the library took {second / first:.1f} times as long")
    record.write()
    return None


if __name__ == "__main__":
    main()
