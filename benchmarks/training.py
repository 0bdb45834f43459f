"""``python -m benchmarks.training``: times a training step on the CPU, ours and its peers'.

Each implementation runs in a process of its own, in turns.

``--network post`` (batches of 64): peers have the same encoder and decoder. They are PyTorch's own
modules with the post's step written plainly; vector-quantize-pytorch as its README shows it; and
the post's recipe in TensorFlow, eager as the post runs it and compiled, if ``--tensorflow`` names a
Python that has tensorflow-cpu, tf-keras and tensorflow-probability.

``--network residual`` (32×32 colour, batches of 32): ours is the default recipe after k-means has
started the codebook. Peers are plain PyTorch with channels last, and the library, in float32 and
under autocast to bfloat16.

The limit is the arithmetic of the step at the best rate of a matrix product, measured in the same
run. The sum of the step's products, each timed alone, is given too.
"""

from __future__ import annotations

import os
from functools import partial

import numpy as np
import torch

from benchmarks.measure import (
    Record,
    Worker,
    copy_rate,
    in_turns,
    parser,
    product_rates,
    summary,
    timed,
)
from benchmarks.steps import SUBJECTS
from vqref.families import FAMILIES
from vqref.spec import Layer
from vqtrain.device import keep_freed_memory
from vqtrain.network import KINDS

OURS = {"ours, float32": "ours-float32", "ours, bfloat16": "ours-bfloat16"}
PEERS = {
    "post": {"plain PyTorch": "plain", "vector-quantize-pytorch": "library"},
    "residual": {
        "plain PyTorch, float32": "plain",
        "plain PyTorch, bfloat16": "plain-bfloat16",
        "vector-quantize-pytorch": "library",
        "the same, bfloat16": "library-bfloat16",
    },
}
TENSORFLOW = {"TensorFlow, eager": "eager", "TensorFlow, compiled": "compiled"}


def operations(layer: Layer, batch: int) -> float:
    """Returns the floating-point operations of a row in one step: forward, and twice that back."""
    return 3 * batch * 2 * layer.products


def layer_alone(layer: Layer, batch: int) -> float:
    """Returns the median seconds of a row's product alone, in bfloat16, forward and back."""

    def array(*shape: int) -> torch.Tensor:
        made = torch.randn(shape).bfloat16()
        last = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        return made.contiguous(memory_format=last).requires_grad_()

    x = array(batch, *layer.in_shape)
    parameters = [array(*shape) for _, shape in layer.parameters]
    gradient = torch.randn_like(KINDS[layer.kind](layer, x, *parameters))

    def run() -> None:
        torch.autograd.grad(KINDS[layer.kind](layer, x, *parameters), [x, *parameters], gradient)

    run()
    return float(np.median([timed(run) for _ in range(9)]))


def workers(record: Record, network: str, tensorflow: str | None) -> dict[str, Worker]:
    """Returns the processes that take turns; prints why others cannot run."""
    found = {name: Worker("benchmarks.steps", network, kind) for name, kind in OURS.items()}
    wanted = {
        name: partial(Worker, "benchmarks.steps", network, kind)
        for name, kind in PEERS[network].items()
    }
    if network == "post" and tensorflow:
        wanted |= {
            name: partial(Worker, "benchmarks.steps_tensorflow", kind, python=tensorflow)
            for name, kind in TENSORFLOW.items()
        }
    elif network == "post":
        record.say("TensorFlow: skipped: --tensorflow PYTHON names none")
    for name, make in wanted.items():
        try:
            found[name] = make()
        except (RuntimeError, OSError) as error:
            record.say(f"{name}: skipped: {error}")
    record.figures["versions"] = {name: worker.said for name, worker in found.items()}
    return found


def say_steps(record: Record, network: str, times: dict[str, list[float]]) -> None:
    """Prints the times of steps, and the time of their arithmetic at the best rate."""
    batch, layers = SUBJECTS[network].batch, FAMILIES[network]().layers
    needed = sum(operations(layer, batch) for layer in layers)
    rates, figures = product_rates(), {name: summary(taken) for name, taken in times.items()}
    fastest = figures["ours, bfloat16"]["median"]
    record.say(
        f"{f'one step, batch of {batch}':<26}{'median ms':>10}{'10-90 %':>14}{'over ours':>11}"
        f"{'of limit':>10}"
    )
    for name, found in figures.items():
        limit = needed / rates["bfloat16" if "bfloat16" in name else "float32"]
        found["share"] = limit / found["median"]
        record.say(
            f"{name:<26}{1e3 * found['median']:>10.1f}"
            f"{1e3 * found['low']:>8.0f}-{1e3 * found['high']:<5.0f}"
            f"{found['median'] / fastest:>10.2f}x{found['share']:>10.0%}"
        )
    record.say(
        f"limit: {needed / 1e9:.1f} Gflop a step; products at {rates['float32'] / 1e9:.0f} "
        f"(float32) and {rates['bfloat16'] / 1e9:.0f} Gflop/s (bfloat16)"
    )
    record.figures |= {"steps": figures, "rates": rates, "operations": needed}


def say_layers(record: Record, network: str) -> None:
    """Prints the time of each product alone."""
    batch, rate = SUBJECTS[network].batch, record.figures["rates"]["bfloat16"]
    layers = [layer for layer in FAMILIES[network]().layers if layer.parameters]
    alone = {layer.name: layer_alone(layer, batch) for layer in layers}
    total = sum(alone.values())
    record.say(
        f"its products alone, bfloat16, each by itself: {1e3 * total:.1f} ms, "
        f"{record.figures['operations'] / rate / total:.0%} of limit"
    )
    for layer in layers:
        seconds, needed = alone[layer.name], operations(layer, batch)
        record.say(
            f"  {layer.name:<22}{1e3 * seconds:>6.2f} ms{needed / 1e9:>7.2f} Gflop"
            f"{needed / rate / seconds:>6.0%}"
        )
    record.figures["layers"] = alone


def main(network: str = "post") -> None:
    options = parser(__doc__)
    options.add_argument(
        "--network", choices=tuple(SUBJECTS), default=network, help="(default: %(default)s)"
    )
    options.add_argument(
        "--rounds", type=int, default=25, help="steps of each (default: %(default)s)"
    )
    options.add_argument(
        "--tensorflow", metavar="PYTHON", help="an interpreter of an environment with TensorFlow"
    )
    arguments = options.parse_args()
    record = Record(arguments)
    runs = workers(record, arguments.network, arguments.tensorflow)
    times = in_turns(runs, rounds=arguments.rounds, warm_up=3)
    for worker in runs.values():
        worker.close()
    keep_freed_memory()
    say_steps(record, arguments.network, times)
    say_layers(record, arguments.network)
    record.figures["copy"] = copy_rate()
    record.figures["threads"] = {"torch": torch.get_num_threads(), "cores": os.cpu_count()}
    record.write()


if __name__ == "__main__":
    main()
