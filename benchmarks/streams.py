"""``python -m benchmarks.streams [FOLDER]``: compares training on images that do not fit in memory
with training on the same images in memory.

FOLDER, or a temporary folder, gets 200,000 images of 64x64 colour: as tars of JPEG and as parquet
of PNG, 10,000 per file, as WebDataset and ``datasets`` write them, and as one ``.npy``. Existing
files are used again. Processes on shards may have 1 GiB of data, including their libraries. That is
less than half of the images' pixels; the process in memory holds all of them. Each trains the
residual network with one thread, and one more process decodes.

First measures the speed, in turns: a pass over some images, including the start of its decoding
processes. Then measures memory: a smaller network makes a pass over every image, and at each tenth
the memory of the process and its helpers is noted.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.measure import ROOT, Record, Worker, in_turns, parser, serve, summary
from benchmarks.pictures import fields

SHAPE, BATCH, EACH = (3, 64, 64), 64, 10_000
LIMIT = 2**30
"""The bytes of data that a process on shards may have."""

HIDDEN, SMALL = 64, 8
"""Channels of the network whose speed is measured, and of the network that takes every image."""

KINDS = ("memory", "npy", "parquet", "tar")


def generated(count: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Yields different images, (EACH, C, H, W) at a time: random fields, rolled and mirrored."""
    base = fields(min(count, EACH), SHAPE)
    for part in range(0, count, EACH):
        rolled = np.roll(base, 7 * part // EACH, axis=3)
        turned = rolled[..., ::-1] if part // EACH % 2 else rolled
        yield np.ascontiguousarray(turned[: count - part])


def prepare(folder: Path, count: int) -> None:
    """Writes the files that do not exist yet."""
    import pyarrow
    from pyarrow import parquet

    done = folder / f"{count}.done"
    if done.exists():
        return
    for kind in ("npy", "parquet", "tar"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    path = folder / "npy" / "images.npy"
    whole = np.lib.format.open_memmap(path, "w+", np.uint8, (count, *SHAPE))
    for i, images in enumerate(generated(count)):
        whole[i * EACH : i * EACH + len(images)] = images
        rows = [{"bytes": encoded(each, "PNG"), "path": None} for each in images]
        shard = folder / "parquet" / f"train-{i:05}.parquet"
        parquet.write_table(pyarrow.table({"image": rows}), shard, row_group_size=100)
        with tarfile.open(folder / "tar" / f"{i:05}.tar", "w") as archive:
            for n, each in enumerate(images):
                content = encoded(each, "JPEG")
                info = tarfile.TarInfo(f"{i:05}{n:05}.jpg")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    whole.flush()
    done.touch()


def encoded(image: npt.NDArray[np.uint8], form: str) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(buffer, form, compress_level=1)
    return buffer.getvalue()


def trainer(
    folder: Path, kind: str, hidden: int, workers: int
) -> tuple[int, Callable[[int | None], Iterator[int]]]:
    """Returns the number of images, and a generator function that takes steps of a new pass.

    It takes this many steps, or all for None, and yields their numbers.
    """
    import torch

    from vqref.families import residual
    from vqtrain import TrainingOptions
    from vqtrain.data.holdout import hold_out
    from vqtrain.data.sources import load_source
    from vqtrain.data.stream_batches import batches_of
    from vqtrain.data.streams import Streaming
    from vqtrain.device import keep_freed_memory
    from vqtrain.run.rules import Rules
    from vqtrain.run.start import start_model
    from vqtrain.run.step import make_optimizer, training_step

    torch.set_num_threads(1)
    keep_freed_memory()
    device, say = torch.device("cpu"), lambda line: None
    if kind == "memory":
        source = load_source(str(folder / "npy" / "images.npy"), say)
    else:
        resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
        source = load_source(str(folder / kind), say, streaming=Streaming(workers=workers))
    images = hold_out(source, 0.0)
    spec = residual(SHAPE, hidden, 1, hidden // 2, num_codes=256, code_size=16)
    options = TrainingOptions(batch_size=BATCH)
    model = start_model(spec, options, images.train, device)
    optimizer, rules = make_optimizer(model, options), Rules(options, 10**6)
    batches = batches_of(images, BATCH, device, say)
    generator = torch.Generator().manual_seed(0)

    def run(steps: int | None) -> Iterator[int]:
        for step, batch in enumerate(batches.shuffled(generator)):
            training_step(model, optimizer, batch, options, rules, 0)
            yield step
            if step + 1 == steps:
                return

    return images.count, run


def speed(folder: Path, kind: str, steps: int, workers: int) -> None:
    """The Worker's side: takes this many steps of a new pass."""
    _, run = trainer(folder, kind, HIDDEN, workers)

    def turn() -> None:
        for _ in run(steps):
            pass

    serve(turn)


def whole(folder: Path, kind: str, workers: int) -> None:
    """Prints seconds and MiB at each tenth of a pass over every image."""
    start = time.perf_counter()
    count, run = trainer(folder, kind, SMALL, workers)
    opened = time.perf_counter() - start
    steps, held = count // BATCH, [held_now()]
    held += [held_now() for step in run(None) if (step + 1) % (steps // 10) == 0]
    seconds = time.perf_counter() - start - opened
    said = {"count": count, "opened": opened, "seconds": seconds, "held": held, "peak": peak()}
    print(json.dumps(said))


def held_now() -> tuple[float, float]:
    """Returns the MiB that this process and its children hold for themselves."""
    me = os.getpid()
    children = Path(f"/proc/{me}/task/{me}/children").read_text().split()
    return anonymous(me), sum(anonymous(int(child)) for child in children)


def anonymous(process: int) -> float:
    """Returns the MiB of a process that are not pages of files."""
    return status(process, "RssAnon")


def peak() -> float:
    """Returns the most MiB that this process has held, pages of files included."""
    return status(os.getpid(), "VmHWM")


def status(process: int, name: str) -> float:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    record, workers = Record(arguments), arguments.workers
    prepare(folder, arguments.images)
    pixels = arguments.images * int(np.prod(SHAPE))
    sizes = {
        kind: sum(path.stat().st_size for path in (folder / kind).iterdir()) for kind in KINDS[1:]
    }
    record.say(
        f"{arguments.images} images of 64x64 colour: {pixels / 2**20:.0f} MiB of pixels, "
        f"{sizes['parquet'] / 2**20:.0f} as parquet of PNG, {sizes['tar'] / 2**20:.0f} as tars of "
        f"JPEG; {LIMIT / 2**20:.0f} MiB of data allowed"
    )
    words = (str(folder), "--turn", str(arguments.turn), "--workers", str(workers))
    runs = {kind: Worker("benchmarks.streams", *words, "--speed", kind) for kind in KINDS}
    found = in_turns(runs, rounds=arguments.rounds, warm_up=0)
    for worker in runs.values():
        worker.close()
    alone = float(np.median(runs["memory"].computed))
    record.say(f"hidden {HIDDEN}, passes over {arguments.turn} images")
    record.say("                 images/s   of memory's   ms of the process an image   of memory's")
    for kind, seconds in found.items():
        ratios = [m / s for m, s in zip(found["memory"], seconds, strict=True)]
        rate, ratio = arguments.turn / float(np.median(seconds)), float(np.median(ratios))
        computed = float(np.median(runs[kind].computed))
        figures = {"images a second": rate, "ratio": ratio, "computed": computed}
        record.figures[kind] = {**summary(seconds), **figures}
        record.say(
            f"{kind:<14}{rate:>11.0f}{ratio:>14.2f}{1e3 * computed / arguments.turn:>29.3f}"
            f"{computed / alone:>14.3f}"
        )
    record.say(f"hidden {SMALL}, one pass over all     images/s   MiB held at its start, half, end")
    for kind in ("tar", "parquet"):
        command = [sys.executable, "-m", "benchmarks.streams", *words, "--whole", kind]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        said = json.loads(done.stdout)
        record.figures[f"{kind}, whole"] = said
        own = [f"{mine:.0f}+{others:.0f}" for mine, others in said["held"]]
        rate = said["count"] / said["seconds"]
        record.say(
            f"{kind:<35}{rate:>11.0f}   {own[0]}, {own[1]}, {own[5]}, {own[-1]} (itself+helpers)"
        )
    record.write()


def main() -> None:
    options = parser(__doc__)
    options.add_argument("folder", type=Path, nargs="?", help="where the images are or are written")
    options.add_argument("--images", type=int, default=200_000, help="how many")
    options.add_argument("--turn", type=int, default=16_384, help="images of a turn")
    options.add_argument("--rounds", type=int, default=3, help="turns of each")
    options.add_argument("--workers", type=int, default=1, help="processes that decode")
    options.add_argument("--speed", choices=KINDS, help="be one of the processes in turns")
    options.add_argument("--whole", choices=KINDS, help="take one pass")
    arguments = options.parse_args()
    if arguments.speed:
        steps = arguments.turn // BATCH
        speed(arguments.folder, arguments.speed, steps, arguments.workers)
    elif arguments.whole:
        whole(arguments.folder, arguments.whole, arguments.workers)
    elif arguments.folder is None:
        with tempfile.TemporaryDirectory() as folder:
            measure(arguments, Path(folder))
    else:
        measure(arguments, arguments.folder)


if __name__ == "__main__":
    main()
