"""``python -m vqtrain evaluate``: a model's figures on images, each with what it means."""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np

from vqref.commandline import ExitCode, InputError
from vqref.images import to_unit_interval
from vqtrain.checkpoint import read_model
from vqtrain.command import choose_device, parse_size
from vqtrain.data import Batches
from vqtrain.floor import clustering_floor
from vqtrain.interrupts import Interrupts
from vqtrain.model import VQVAE
from vqtrain.options import TrainingOptions
from vqtrain.sources import load_source
from vqtrain.train import evaluate

MEANING = {
    "reconstruction": "nats an image to send the pixels",
    "bound": "nats for everything: reconstruction + prior",
    "bits_per_dimension": "the bound in bits a pixel and channel",
    "prior": "nats to send the indices, coded uniformly",
    "commitment": "mean squared distance to the code, an element",
    "perplexity": "codes in use by their shares: exp(entropy)",
    "codes_used": "codes that were chosen at all",
    "clustering_floor": "bound of as many fixed pictures at their best",
    "above_floor": "bound - clustering_floor",
}
"""What each figure means, in the width that a terminal leaves. The clustering floor is that of ``vqtrain.floor``."""


def evaluate_command(arguments: argparse.Namespace) -> int:
    """Prints the figures. Raises CommandError for files that do not fit."""
    model = read_model(arguments.model)
    device = choose_device(arguments.device)
    with Interrupts():
        images = load_source(arguments.data, _ignore if arguments.json else print, parse_size(arguments))
        if images.train.shape[1:] != model.spec.image_shape:
            raise InputError(f"{images.source}: images of {images.train.shape[1:]}, the model's are {model.spec.image_shape}")
        which = "training images" if images.held_out is None else "held-out images"
        measured = images.train if images.held_out is None else images.held_out
        train = images.train
        if not len(measured):
            raise InputError(f"{images.source}: no images to measure on")
        if arguments.binarize:
            rng = np.random.default_rng(arguments.seed)
            train, measured = (_binarized(part, rng) for part in (train, measured))
        module = VQVAE(model.spec, model.params).to(device)
        options = TrainingOptions()
        found = evaluate(module, Batches(np.ascontiguousarray(measured), 256, device), options)
        figures: dict[str, Any] = {name: value for name, value in found.to_dict(model.spec).items() if name in MEANING}
        if model.spec.latent_size == 1 and len(train) >= model.spec.num_codes:
            rng = np.random.default_rng(arguments.seed)
            floor = clustering_floor(to_unit_interval(train), to_unit_interval(measured), model.spec.num_codes, rng)
            figures |= {"clustering_floor": floor, "above_floor": found.bound - floor}
    about = {"model": str(arguments.model), "data": images.source, "images": len(measured), "which": which}
    if arguments.json:
        print(json.dumps({**about, "binarized": arguments.binarize, **figures}))
    else:
        binarized = ", binarized" if arguments.binarize else ""
        print(f"{arguments.model} on {len(measured)} {which} of {images.source}{binarized}, {device}")
        for name, value in figures.items():
            shown = f"{value:.0f}" if isinstance(value, int) else f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"
            print(f"  {name:<19}{shown:>9}  {MEANING[name]}")
    return ExitCode.DONE


def _binarized(images: np.ndarray[Any, Any], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Each pixel 1 with its grey level as probability, else 0; float32."""
    levels = to_unit_interval(images)
    return (rng.random(levels.shape, np.float32) < levels).astype(np.float32)


def _ignore(line: str) -> None:
    """Where JSON is wanted, nothing else is said."""
