"""A worker of ``benchmarks.training``: takes one training step per line of its input.

``python -m benchmarks.steps NETWORK KIND`` starts it."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.measure import serve
from benchmarks.peers import Library, Plain
from benchmarks.pictures import fields
from vqref.families import FAMILIES
from vqref.spec import ModelSpec
from vqtrain.data.batches import Batches
from vqtrain.device import keep_freed_memory
from vqtrain.options import RECIPES
from vqtrain.run.metrics import variance_of
from vqtrain.run.rules import Rules
from vqtrain.run.start import start_model
from vqtrain.run.step import make_optimizer, training_step

BATCHES, STEPS = 16, 3000
"""How many batches of images take turns, and how many steps the whole run would have."""


@dataclass(frozen=True)
class Subject:
    """What is trained: a family of networks, and how ours trains it.

    batch: images per step. recipe: ours. channels_last: whether the plain step lays its kernels
    out so, as whoever wants it fast would.
    """

    family: str
    batch: int
    recipe: str
    channels_last: bool = False


SUBJECTS = {
    "post": Subject("post", 64, "post"),
    "residual": Subject("residual", 32, "default", channels_last=True),
}
"""The subjects, by their names in ``--network``."""


def prepared(subject: Subject) -> tuple[ModelSpec, Batches]:
    """Returns the network and images for it."""
    make = FAMILIES[subject.family]
    images = fields(BATCHES * subject.batch, make().image_shape)
    spec = make(variance=variance_of(images))
    return spec, Batches(images, subject.batch, torch.device("cpu"))


def in_turn(batches: Batches) -> Iterator[torch.Tensor]:
    return itertools.cycle(list(batches.in_order()))


def ours(subject: Subject, precision: str) -> Callable[[], Any]:
    """Returns the step of ``python -m vqtrain``, from the first step with a codebook on.

    The process is set up as that command does it.
    """
    keep_freed_memory()
    spec, batches = prepared(subject)
    options = dataclasses.replace(
        RECIPES[subject.recipe](spec), precision=precision, batch_size=subject.batch
    )
    model = start_model(spec, options, batches.images.numpy(), torch.device("cpu"))
    optimizer, rules = make_optimizer(model, options), Rules(options, STEPS)
    if options.kmeans_start:
        rules.start(model, batches)
    steps, images = itertools.count(rules.plain_steps), in_turn(batches)
    return lambda: training_step(model, optimizer, next(images), options, rules, next(steps))


def plain(subject: Subject, *, half: bool = False) -> Callable[[], Any]:
    spec, batches = prepared(subject)
    model = Plain(spec, half=half, channels_last=subject.channels_last)
    images = in_turn(batches)
    return lambda: model.step(next(images))


def library(subject: Subject, *, half: bool = False) -> Callable[[], Any]:
    """Returns the library's step, as in its README, with its defaults and PyTorch's own layout."""
    spec, batches = prepared(subject)
    model, images = Library(spec, half=half), in_turn(batches)
    return lambda: model.step(next(images))


KINDS: dict[str, Callable[[Subject], Callable[[], Any]]] = {
    "ours-float32": partial(ours, precision="float32"),
    "ours-bfloat16": partial(ours, precision="bfloat16"),
    "plain": plain,
    "plain-bfloat16": partial(plain, half=True),
    "library": library,
    "library-bfloat16": partial(library, half=True),
}


if __name__ == "__main__":
    serve(KINDS[sys.argv[2]](SUBJECTS[sys.argv[1]]), torch=torch.__version__)
