"""A worker of ``benchmarks.training``: ``python -m benchmarks.steps KIND``, one training step of the post's network a line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import vqref
from benchmarks.measure import serve
from benchmarks.peers import Library, Plain
from vqtrain import VQVAE, TrainingOptions
from vqtrain.memory import keep_freed_memory
from vqtrain.rules import Rules
from vqtrain.step import make_optimizer, training_step
from vqtrain.train import prepare

BATCH = 64


def images() -> torch.Tensor:
    """Noise: what a step takes does not depend on what it sees."""
    return torch.rand(BATCH, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def ours(precision: str) -> Callable[[], Any]:
    """The step of ``python -m vqtrain`` in the process as that makes it."""
    keep_freed_memory()
    options, spec = TrainingOptions(precision=precision), vqref.ModelSpec()
    model = prepare(VQVAE(spec, vqref.init_params(spec, np.random.default_rng(0))), torch.device("cpu"))
    optimizer, rules, batch = make_optimizer(model, options), Rules(options, 10**6), images()
    return lambda: training_step(model, optimizer, batch, options, rules, 0)


def peer(made: Callable[[], Any]) -> Callable[[], Any]:
    model, batch = made(), images()
    return lambda: model.step(batch)


KINDS: dict[str, Callable[[], Callable[[], Any]]] = {
    "ours-float32": lambda: ours("float32"),
    "ours-bfloat16": lambda: ours("bfloat16"),
    "plain": lambda: peer(Plain),
    "library": lambda: peer(Library),
}


if __name__ == "__main__":
    serve(KINDS[sys.argv[1]](), torch=torch.__version__)
