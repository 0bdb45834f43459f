"""``python -m benchmarks.training``: one training step of the post's network on the CPU, ours beside its peers, in turns.

Batches of 64, each implementation in a process of its own. Peers around the same encoder and decoder: PyTorch's own modules
with the post's step written plainly; vector-quantize-pytorch as its README shows it; and the post's recipe in TensorFlow, eager
as the post runs it and compiled, where ``--tensorflow`` names a Python that has tensorflow-cpu, tf-keras and
tensorflow-probability. The limit is the arithmetic of the step at the best rate of a matrix product, measured in the same run;
the sum of its convolutions alone, each timed by itself, stands beside it.
"""

from __future__ import annotations

import os

import numpy as np
import torch

import vqref
from benchmarks.measure import Record, Worker, copy_rate, forward_operations, in_turns, parser, product_rates, summary, timed
from benchmarks.steps import BATCH
from vqref.spec import Layer
from vqtrain.memory import keep_freed_memory
from vqtrain.network import KINDS

OURS = {"ours, float32": "ours-float32", "ours, bfloat16": "ours-bfloat16"}
PEERS = {"plain PyTorch": "plain", "vector-quantize-pytorch": "library"}
TENSORFLOW = {"TensorFlow, eager": "eager", "TensorFlow, compiled": "compiled"}


def operations(layer: Layer) -> float:
    """Floating-point operations of a row in one step: forward, and twice as many back."""
    return 3 * BATCH * forward_operations(layer)


def layer_alone(layer: Layer) -> float:
    """Seconds of a row's product in bfloat16, forward and back, by itself: the median of nine."""
    shape = (BATCH, *layer.in_shape)
    x = torch.randn(shape).bfloat16()
    x = (x.contiguous(memory_format=torch.channels_last) if len(layer.in_shape) == 3 else x).requires_grad_()
    weights = [torch.randn(parameter.shape).bfloat16() / 100 for parameter in layer.parameters]
    weights = [w.contiguous(memory_format=torch.channels_last) if w.ndim == 4 else w for w in weights]
    parameters = [w.requires_grad_() for w in weights]
    y = KINDS[layer.kind](layer, x, *parameters)
    gradient = torch.randn_like(y)

    def run() -> None:
        torch.autograd.grad(KINDS[layer.kind](layer, x, *parameters), [x, *parameters], gradient)

    run()
    return float(np.median([timed(run) for _ in range(9)]))


def workers(record: Record, tensorflow: str | None) -> dict[str, Worker]:
    """The processes that take turns; what cannot run says why."""
    found = {name: Worker("benchmarks.steps", kind) for name, kind in OURS.items()}
    wanted = [(name, ("benchmarks.steps", kind), None) for name, kind in PEERS.items()]
    if tensorflow:
        wanted += [(name, ("benchmarks.steps_tensorflow", kind), tensorflow) for name, kind in TENSORFLOW.items()]
    else:
        record.say("TensorFlow: skipped: --tensorflow PYTHON names none")
    for name, command, python in wanted:
        try:
            found[name] = Worker(*command, python=python) if python else Worker(*command)
        except (RuntimeError, OSError) as error:
            record.say(f"{name}: skipped: {error}")
    record.figures["versions"] = {name: worker.said for name, worker in found.items()}
    return found


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=25, help="steps of each (default: %(default)s)")
    options.add_argument("--tensorflow", metavar="PYTHON", help="an interpreter of an environment with TensorFlow")
    arguments = options.parse_args()
    record = Record(arguments)
    runs = workers(record, arguments.tensorflow)
    times = in_turns(runs, rounds=arguments.rounds, warm_up=3)
    for worker in runs.values():
        worker.close()
    keep_freed_memory()
    layers = vqref.ModelSpec().layers
    needed, alone = sum(map(operations, layers)), {layer.name: layer_alone(layer) for layer in layers if layer.parameters}
    rates = product_rates()
    figures = {name: summary(taken) for name, taken in times.items()}
    fastest = figures["ours, bfloat16"]["median"]
    record.say(f"{'one step, batch of 64':<26}{'median ms':>10}{'10-90 %':>14}{'over ours':>11}{'of limit':>10}")
    for name, found in figures.items():
        limit = needed / rates["bfloat16" if "bfloat16" in name else "float32"]
        found["share"] = limit / found["median"]
        record.say(
            f"{name:<26}{1e3 * found['median']:>10.1f}{1e3 * found['low']:>8.0f}-{1e3 * found['high']:<5.0f}"
            f"{found['median'] / fastest:>10.2f}x{found['share']:>10.0%}"
        )
    record.say(
        f"limit: {needed / 1e9:.1f} Gflop a step; products at {rates['float32'] / 1e9:.0f} (float32) "
        f"and {rates['bfloat16'] / 1e9:.0f} Gflop/s (bfloat16)"
    )
    total = sum(alone.values())
    record.say(
        f"its products alone, bfloat16, each by itself: {1e3 * total:.1f} ms, {needed / rates['bfloat16'] / total:.0%} of limit"
    )
    for layer in layers:
        if layer.parameters:
            share = operations(layer) / rates["bfloat16"] / alone[layer.name]
            record.say(
                f"  {layer.name:<18}{1e3 * alone[layer.name]:>6.2f} ms{operations(layer) / 1e9:>7.2f} Gflop{share:>6.0%}"
            )
    record.figures |= {"steps": figures, "rates": rates, "operations": needed, "layers": alone, "copy": copy_rate()}
    record.figures["threads"] = {"torch": torch.get_num_threads(), "cores": os.cpu_count()}
    record.write()


if __name__ == "__main__":
    main()
