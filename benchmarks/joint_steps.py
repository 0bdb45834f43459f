"""Takes fifty steps in float64 with every rule on, alone or under torchrun, for a comparison.

Each rank writes the state that it ends with.

    torchrun --nproc-per-node N -m benchmarks.joint_steps FOLDER [PASSES]
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from vqref import families
from vqref.spec import ModelSpec
from vqref.validation import Array
from vqtrain import TrainingOptions, training_step
from vqtrain.data.batches import Batches
from vqtrain.run import rules
from vqtrain.run.ranks import ALONE, Ranks, joined
from vqtrain.run.start import start_model
from vqtrain.run.step import Split, make_optimizer
from vqtrain.torchrun import leave, world

CPU = torch.device("cpu")
STEPS = 50

EVERY_RULE = TrainingOptions(
    epochs=1,
    center=True,
    plain_steps=5,
    kmeans_start=True,
    temperature=0.3,
    anneal_until=0.8,
    revive_below=0.9,
    cosine=True,
)

SPECS = {
    "post": (
        families.post((1, 28, 28), base_depth=2, latent_size=2, num_codes=8, code_size=4),
        dataclasses.replace(EVERY_RULE, batch_size=7),
    ),
    "residual": (
        families.residual(
            (3, 16, 16), hidden=8, blocks=1, block_hidden=4, num_codes=24, code_size=4, variance=0.1
        ),
        dataclasses.replace(EVERY_RULE, batch_size=3, dialect="sonnet", beta=50.0),
    ),
}
"""Batches that cannot be split evenly, and batches with fewer images than four ranks."""


def fifty_steps(
    spec: ModelSpec, options: TrainingOptions, ranks: Ranks = ALONE, passes: int = 1
) -> dict[str, Array]:
    """Returns all parameters after the steps, the optimizer's state, and this rank's losses."""
    count = STEPS * options.batch_size
    images = np.random.default_rng(0).random((count, *spec.image_shape))
    model = start_model(spec, options, images, CPU).double()
    optimizer, each = make_optimizer(model, options), rules.Rules(options, STEPS)
    batches = Batches(images, options.batch_size, CPU, ranks.part(options.batch_size))
    split, generator = Split(ranks, passes), torch.Generator().manual_seed(0)
    losses = []
    for step, batch in enumerate(batches.shuffled(generator)):
        if each.starts(step):
            each.start(model, batches, ranks)
        taken, _ = training_step(model, optimizer, batch, options, each, step, split)
        losses.append(float(taken.total))
    moments = {
        f"{name}.{i}": value.numpy()
        for i, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    return {**model.params(), **moments, "losses": np.array(losses)}


def fifty_steps_of_each(ranks: Ranks = ALONE, passes: int = 1) -> dict[str, dict[str, Array]]:
    """Returns ``fifty_steps`` of both networks, and of one whose noise is made from a seed."""
    found = {name: fifty_steps(*each, ranks, passes) for name, each in SPECS.items()}
    most, rules.CHOICE_ELEMENTS = rules.CHOICE_ELEMENTS, 100
    try:
        return {**found, "seeded": fifty_steps(*SPECS["residual"], ranks, passes)}
    finally:
        rules.CHOICE_ELEMENTS = most


def off(found: Mapping[str, Array], expected: Mapping[str, Array]) -> float:
    """Returns the largest difference of any array, without losses, relative to its magnitude."""
    return max(
        float(np.abs(found[name] - value).max() / max(np.abs(value).max(), 1e-30))
        for name, value in expected.items()
        if name != "losses"
    )


def main() -> None:
    folder, passes = Path(sys.argv[1]), int((sys.argv[2:] or ["1"])[0])
    with joined("cpu") as ranks:
        for name, found in fifty_steps_of_each(ranks, passes).items():
            np.savez(folder / f"{name}-{ranks.rank}.npz", allow_pickle=False, **found)
    if world() > 1:
        leave(0)


if __name__ == "__main__":
    main()
