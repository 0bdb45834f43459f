"""``python -m vqtrain evaluate``: a model's measures on images, each with what it means."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vqref.errors import ExitCode, InputError
from vqref.host.commandline import Command, count, option
from vqref.host.images import ImageSet, to_unit_interval
from vqref.spec import ModelSpec
from vqref.validation import Array
from vqtrain.commands.shared import SourceOptions
from vqtrain.data.sources import load_source
from vqtrain.run.floor import clustering_floor, patch_floor, patch_grid

if TYPE_CHECKING:
    import torch

    from vqref.modelfile import Model

MEANING = {
    "reconstruction": "nats per image to send the pixels",
    "prior": "nats per image to send the indices",
    "bound": "nats per image to send both",
    "clustering_floor": "bound of as many fixed pictures at their best",
    "above_floor": "bound - clustering_floor",
    "bits_per_dimension": "bound in bits per pixel and channel",
    "nmse": "mean squared error / variance of the data",
    "patches_nmse": "of k-means on patches: as many codes, no network",
    "psnr": "dB, of the mean squared error of all images",
    "patches_psnr": "of the same k-means on patches",
    "mean_psnr": "dB, mean of each image's own",
    "ssim": "structural similarity, 1 for equal images",
    "commitment": "mean squared distance to the code, per element",
    "perplexity": "codes in use by their shares: exp(entropy)",
    "codes_used": "codes that were chosen at all",
}
"""What each measure means, in the width that a terminal leaves, in the order in which they are
printed. ``vqtrain.run.floor`` has the clustering floor and the k-means on patches."""

MOST_IMAGES, MOST_PIXELS = 256, 2**18
"""Of a batch, so that large images are measured a few at a time."""

LARGEST_VARIANCE = 0.25
"""No values in [0, 1] have a larger variance: a spec that says so does not know its data's."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(SourceOptions):
    """What is measured, on which images, and where."""

    model: Path = option(type=Path, help="the file that vqtrain wrote")
    device: str = option(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute"
    )
    binarize: bool = option(
        "--binarize",
        default=False,
        action="store_true",
        help="draw each pixel black or white by its grey level",
    )
    seed: int = option(
        "--seed", default=0, type=count, metavar="N", help="of --binarize and of the floors"
    )
    json: bool = option(
        "--json", default=False, action="store_true", help="print the measures as JSON"
    )


def evaluate(options: EvaluateOptions) -> int:
    """Prints the measures. Raises CommandError for files that do not fit, and Interrupted."""
    from vqtrain.device import choose_device
    from vqtrain.modelfile import read_model
    from vqtrain.run.metrics import variance_of

    model, device = read_model(options.model), choose_device(options.device)
    source = load_source(options.data, _ignore if options.json else print, options.resize)
    train, measured = choose_images(source, model.spec)
    if options.binarize:
        rng = np.random.default_rng(options.seed)
        train, measured = (_binarized(part, rng) for part in (train, measured))
    known = model.spec.variance <= LARGEST_VARIANCE and not options.binarize
    variance = model.spec.variance if known else variance_of(train)
    found = _measure(model, measured, device, variance)
    found |= floors(model.spec, train, measured, variance, options.seed)
    if "clustering_floor" in found:
        found["above_floor"] = found["bound"] - found["clustering_floor"]
    figures = {name: found[name] for name in MEANING if name in found}
    about = {
        "model": str(options.model),
        "data": source.source,
        "images": len(measured),
        "which": "images" if source.held_out is None else "held-out images",
        "binarized": options.binarize,
    }
    if options.json:
        print(json.dumps({**about, **figures}))
    else:
        drawn, fitted = ", binarized" * options.binarize, ", floors too" * (measured is train)
        of = f"{about['which']} of {source.source}{drawn}{fitted}"
        print(f"{options.model} on {len(measured)} {of}, {device}")
        for name, value in figures.items():
            print(f"  {name:<19}{_shown(value):>9}  {MEANING[name]}")
        if len(model.spec.latent_shape) == 3 and patch_grid(model.spec) is None:
            print("  no k-means on patches: each has several tokens in this model")
    return ExitCode.DONE


def choose_images(source: ImageSet, spec: ModelSpec) -> tuple[Array, Array]:
    """The training images and those to measure on: the held-out ones if there are any.

    Raises InputError if there are none, or of another size than the model's.
    """
    if source.train.shape[1:] != spec.image_shape:
        raise InputError(
            f"{source.source}: images of {source.train.shape[1:]}, the model's are "
            f"{spec.image_shape}"
        )
    measured = source.train if source.held_out is None else source.held_out
    if not len(source.train) or not len(measured):
        raise InputError(f"{source.source}: no images to measure on")
    return source.train, measured


def _measure(
    model: Model, images: Array, device: torch.device, variance: float
) -> dict[str, float]:
    """The measures of ``vqtrain.run.metrics``, by name."""
    from vqtrain.data.batches import Batches
    from vqtrain.model import VQVAE
    from vqtrain.options import TrainingOptions
    from vqtrain.run import metrics
    from vqtrain.run.start import prepare

    _, height, width = model.spec.image_shape
    batch = max(1, min(MOST_IMAGES, MOST_PIXELS // (height * width)))
    batches = Batches(np.ascontiguousarray(images), batch, device)
    module = prepare(VQVAE(model.spec, model.params), device)
    return metrics.evaluate(module, batches, TrainingOptions(), variance).to_dict(model.spec)


def floors(
    spec: ModelSpec, train: Array, measured: Array, variance: float, seed: int
) -> dict[str, float]:
    """What as many codes reach on ``measured`` without a network, fitted to ``train`` by k-means
    with that seed: for one latent of a Bernoulli model the bound of fixed pictures, else the error
    of patches. {} if the model has neither, or if there is too little to fit them to."""
    from vqtrain.run.metrics import picture_errors

    rng = np.random.default_rng(seed)
    if spec.latent_size == 1 and spec.likelihood == "bernoulli":
        if len(train) < spec.num_codes:
            return {}
        parts = to_unit_interval(train), to_unit_interval(measured)
        return {"clustering_floor": clustering_floor(*parts, spec.num_codes, rng)}
    error = patch_floor(spec, train, measured, rng)
    if error is None:
        return {}
    nmse, psnr = picture_errors(error, variance)
    return {"patches_nmse": nmse, "patches_psnr": psnr}


def _binarized(images: Array, rng: np.random.Generator) -> Array:
    """Each pixel 1 with its grey level as probability, else 0; float32."""
    levels = to_unit_interval(images)
    return (rng.random(levels.shape, np.float32) < levels).astype(np.float32)


def _shown(value: float) -> str:
    """A measure in the digits that matter."""
    if isinstance(value, int):
        return f"{value}"
    digits = 4 if abs(value) < 10 else 2 if abs(value) < 1e5 else 0
    return f"{value:.{digits}f}"


def _ignore(line: str) -> None:
    """Says nothing, so that JSON is all there is."""


COMMAND = Command("evaluate", "measure a model on images", EvaluateOptions, evaluate)
