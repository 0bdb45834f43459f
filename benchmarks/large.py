"""``python -m benchmarks.large``: measures time and memory of a large model: 256×256 colour, 1,024
tokens of 16,384 codes of 64 elements.

Measures seconds and peak memory of a training step with one, two and four images, of the k-means
start, of ``vqdeploy export``, of ``vqdeploy verify``, and of ``Codec.encode`` of 64 images. Each is
a process of its own, and its peak includes its libraries. The images are smooth random fields. The
network is untrained; k-means sets its codebook.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import Record, parser, spent, timed
from benchmarks.pictures import fields
from vqref.families import residual
from vqref.spec import ModelSpec

DOWNSAMPLE = 8
BATCHES, ENCODED = (1, 2, 4), 64
STEPS = 3
"""Steps whose median is taken, after one that is not counted."""

RUN = 3000
"""How many steps the whole run would have."""


def spec_of(pixels: int, codes: int) -> ModelSpec:
    shape = 3, pixels, pixels
    return residual(shape, downsample=DOWNSAMPLE, num_codes=codes, code_size=64)


def trainer(spec: ModelSpec, count: int, batch: int) -> tuple[Any, ...]:
    """Returns model, options, rules and batches of a default run on ``count`` images."""
    import dataclasses

    import torch

    from vqtrain.data.batches import Batches
    from vqtrain.device import choose_precision, keep_freed_memory
    from vqtrain.options import RECIPES
    from vqtrain.run.metrics import variance_of
    from vqtrain.run.rules import Rules
    from vqtrain.run.start import start_model

    keep_freed_memory()
    images, cpu = fields(count, spec.image_shape), torch.device("cpu")
    spec = dataclasses.replace(spec, variance=variance_of(images))
    options = dataclasses.replace(
        RECIPES["default"](spec), batch_size=batch, precision=choose_precision(cpu)
    )
    model = start_model(spec, options, images, cpu)
    return model, options, Rules(options, RUN), Batches(images, batch, cpu)


def step(spec: ModelSpec, batch: str) -> float:
    """Returns the seconds of a training step."""
    from vqtrain.run.step import make_optimizer, training_step

    model, options, rules, batches = trainer(spec, int(batch), int(batch))
    optimizer, (images,) = make_optimizer(model, options), batches.in_order()

    def run() -> None:
        training_step(model, optimizer, images, options, rules, rules.plain_steps)

    run()
    return float(np.median([timed(run) for _ in range(STEPS)]))


def start(spec: ModelSpec, path: str) -> float:
    """Returns the seconds of the k-means start; writes the model after it."""
    from vqref.modelfile import Model
    from vqtrain.modelfile import write_model
    from vqtrain.run.rules import KMEANS_LATENTS, LATENTS_PER_CODE

    wanted = max(KMEANS_LATENTS, LATENTS_PER_CODE * spec.num_codes)
    model, _, rules, batches = trainer(spec, -(-wanted // spec.latent_size), 1)
    seconds = timed(lambda: rules.start(model, batches))
    write_model(Path(path), Model(model.spec, model.params()))
    return seconds


def encode(spec: ModelSpec, bundle: str) -> float:
    """Returns the seconds of encoding images with an open Codec."""
    from vqdeploy import Codec

    images = fields(ENCODED, spec.image_shape)
    with Codec.load(bundle, "cpu") as codec:
        return timed(lambda: codec.encode(images))


PARTS: dict[str, Callable[[ModelSpec, str], float]] = {
    "step": step,
    "start": start,
    "encode": encode,
}
"""The parts, by their names in ``--part``; each takes one more word."""


def commands(sizes: Sequence[str], folder: Path) -> dict[str, list[str]]:
    """Returns what is measured, in this order, since later commands need files of earlier ones."""
    model, bundle = str(folder / "model.pt"), str(folder / "bundle")

    def part(name: str, word: str) -> list[str]:
        return ["-m", "benchmarks.large", *sizes, "--part", name, word]

    return {
        **{f"training step, batch of {n}": part("step", str(n)) for n in BATCHES},
        "k-means start": part("start", model),
        "vqdeploy export": ["-m", "vqdeploy", "export", model, "--output", bundle],
        "vqdeploy verify": ["-m", "vqdeploy", "verify", bundle],
        f"Codec.encode, {ENCODED} images": part("encode", bundle),
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--pixels", type=int, default=256, help="of a side (default: %(default)s)")
    options.add_argument("--num-codes", type=int, default=16_384, help="(default: %(default)s)")
    options.add_argument(
        "--part", nargs=2, metavar=("NAME", "WORD"), help="one part, in this process"
    )
    arguments = options.parse_args()
    spec = spec_of(arguments.pixels, arguments.num_codes)
    if arguments.part:
        name, word = arguments.part
        print(json.dumps(PARTS[name](spec, word)))
        return
    record = Record(arguments)
    record.say(
        f"{arguments.pixels}x{arguments.pixels} colour, {spec.latent_size} tokens of "
        f"{spec.num_codes} codes of {spec.code_size}"
    )
    record.say(f"{'':<28}{'seconds':>10}{'peak MiB':>10}")
    sizes = ["--pixels", str(arguments.pixels), "--num-codes", str(arguments.num_codes)]
    with tempfile.TemporaryDirectory() as folder:
        for name, command in commands(sizes, Path(folder)).items():
            found = spent(command)
            seconds = json.loads(found.printed) if "--part" in command else found.seconds
            record.figures[name] = {"seconds": seconds, "peak": found.peak}
            record.say(f"{name:<28}{seconds:>10.2f}{found.peak:>10.0f}")
    record.write()


if __name__ == "__main__":
    main()
