"""``python -m benchmarks.epochs``: measures whole epochs on one device, ours and those of a plain
eager loop with a DataLoader.

Ours is what ``python -m vqtrain`` does in an epoch. Images are bytes on the device, which shuffles
and gathers them; the step is recipe post's (on a card, recorded as a CUDA graph); figures are added
up on the device and read once per epoch. The plain loop trains the same network in PyTorch's own
modules, in float32 with PyTorch's defaults, fed by a DataLoader with two workers. Checks against
the oracle, evaluation and pictures are not included. On a card, a profile of a hundred steps
follows: the share of time in which kernels work, and the kernels that work longest.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.measure import Record, parser
from benchmarks.peers import Plain
from vqref.families import post
from vqtrain import TrainingOptions
from vqtrain.data.batches import Batches
from vqtrain.device import keep_freed_memory
from vqtrain.run.metrics import Meter
from vqtrain.run.recording import RecordedSteps
from vqtrain.run.rules import Rules
from vqtrain.run.start import start_model
from vqtrain.run.step import make_optimizer, training_step

BATCH = 64


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def ours(
    images: npt.NDArray[np.uint8], device: torch.device, precision: str, epochs: int
) -> Callable[[], float]:
    """Returns a function that trains more epochs and returns their seconds."""
    options, spec = TrainingOptions(precision=precision, batch_size=BATCH), post()
    model = start_model(spec, options, images, device)
    optimizer, rules = make_optimizer(model, options), Rules(options, 10**6)
    batches = Batches(images, BATCH, device)
    generator = torch.Generator().manual_seed(0)
    recorded = RecordedSteps(model, optimizer, options, rules) if device.type == "cuda" else None

    def run() -> float:
        start = time.perf_counter()
        for _ in range(epochs):
            meter = Meter(spec, device)
            for batch in batches.shuffled(generator):
                if recorded:
                    meter.add(*recorded(batch, 0))
                else:
                    meter.add(*training_step(model, optimizer, batch, options, rules, 0))
            meter.read()
        return time.perf_counter() - start

    return run


def plain(images: npt.NDArray[np.uint8], device: torch.device, epochs: int) -> Callable[[], float]:
    """Returns the same for the plain loop."""
    model = Plain(post()).to(str(device))
    data = TensorDataset(torch.from_numpy(images.astype(np.float32) / 255))
    loader = DataLoader(
        data, BATCH, shuffle=True, drop_last=True, num_workers=2, pin_memory=device.type == "cuda"
    )

    def run() -> float:
        start = time.perf_counter()
        for _ in range(epochs):
            for (batch,) in loader:
                model.step(batch.to(device))
            wait(device)
        return time.perf_counter() - start

    return run


def profile(record: Record, images: npt.NDArray[np.uint8], device: torch.device) -> None:
    """Profiles one epoch of a hundred steps on a card."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    run = ours(images[: 100 * BATCH], device, "bfloat16", 1)
    run()
    with profiler(activities=[ProfilerActivity.CUDA]) as found:
        seconds = run()
    rows = sorted(found.key_averages(), key=lambda row: -row.self_device_time_total)
    busy = sum(row.self_device_time_total for row in rows) / 1e6
    record.say(
        f"a hundred steps, bfloat16: {1e3 * seconds:.0f} ms, "
        f"its kernels at work for {busy / seconds:.0%}; the longest:"
    )
    for row in rows[:8]:
        record.say(f"  {row.key[:70]:<72}{row.self_device_time_total / 1e3:>8.2f} ms")
    record.figures["profile"] = {"seconds": seconds, "busy": busy}


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--images", type=int, default=60_000, help="how many (default: %(default)s)"
    )
    options.add_argument("--epochs", type=int, default=20, help="of ours (default: %(default)s)")
    options.add_argument(
        "--plain-epochs", type=int, default=1, help="of the plain loop (default: %(default)s)"
    )
    options.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    arguments = options.parse_args()
    record = Record(arguments)
    device = torch.device(arguments.device)
    if device.type == "cuda":
        record.say(torch.cuda.get_device_name(device))
    else:
        keep_freed_memory()
    images = np.random.default_rng(0).integers(0, 256, (arguments.images, 1, 28, 28), np.uint8)
    record.say(f"{arguments.images} images, batches of {BATCH}     epochs   seconds   images/s")
    runs = {
        f"ours, {p}": (ours(images, device, p, arguments.epochs), arguments.epochs)
        for p in ("float32", "bfloat16")
    }
    runs["plain loop, DataLoader"] = (
        plain(images, device, arguments.plain_epochs),
        arguments.plain_epochs,
    )
    for name, (run, epochs) in runs.items():
        seconds = run()
        rate = epochs * len(images) / seconds
        record.figures[name] = {"epochs": epochs, "seconds": seconds, "images a second": rate}
        record.say(f"{name:<32}{epochs:>10}{seconds:>10.1f}{rate:>11.0f}")
    if device.type == "cuda":
        profile(record, images, device)
    record.write()


if __name__ == "__main__":
    main()
