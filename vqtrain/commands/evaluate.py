"""``python -m vqtrain evaluate``: measures a model on images, and explains each measure."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vqref.agreement.budget import seconds_per_proof
from vqref.errors import ExitCode
from vqref.host.commandline import Command, count, option
from vqref.host.images import to_unit_interval
from vqref.host.pictures import Reading
from vqref.spec import ModelSpec
from vqref.validation import Array
from vqtrain.commands.shared import SourceOptions, StreamOptions, ThreadOptions
from vqtrain.data import holdout
from vqtrain.data.measured import Measured, choose
from vqtrain.data.sources import load_source
from vqtrain.run.floor import clustering_floor, patch_floor, patch_grid

if TYPE_CHECKING:
    import torch

    from vqref.modelfile import Model
    from vqref.prior import Prior
    from vqtrain.data.batches import Batches
    from vqtrain.model import VQVAE

MEANING = {
    "reconstruction": "nats per image to send the pixels",
    "prior": "nats per image to send the indices",
    "uniform_prior": "nats per image if all codes were equally likely",
    "bound": "nats per image to send both",
    "pixel_entropy": "nats per image of a perfect reconstruction",
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
    "proved": "share of tokens proved for float32 in any order",
    "proved_in_lanes": "share proved in 16 lanes or more",
    "proved_images": "images that these two are of",
}
"""What each measure means, in the order of printing, short enough for a terminal.

``vqtrain.run.floor`` computes the clustering floor and the k-means on patches."""

FLOORS = {"clustering_floor", "patches_nmse"}
"""The measures that k-means fits. A model has at most one of them."""

MOST_IMAGES, MOST_PIXELS = 256, 2**18
"""The most images and pixels of a batch, so that large images are measured a few at a time."""

PROOF_SECONDS = 5.0
"""The longest time that proving the tokens may take."""

LARGEST_VARIANCE = 0.25
"""Values in [0, 1] have at most this variance. A spec with more does not hold the data's."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ThreadOptions, StreamOptions, SourceOptions):
    """Which model to measure, on which images and which device."""

    model: Path = option(type=Path, help="the file that vqtrain wrote")
    held_out: float | Path | None = option(
        "--held-out",
        default=None,
        type=holdout.parse,
        metavar="PATH|FRACTION",
        help="images to measure on: a path to other images, or a fraction of these, chosen by "
        "hash; 0: all (default: those that the source or the training held out, else all)",
    )
    device: str = option(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="device to compute on"
    )
    binarize: bool = option(
        "--binarize",
        default=False,
        action="store_true",
        help="draw each pixel as 0 or 1; its grey level is the probability of 1",
    )
    seed: int = option(
        "--seed", default=0, type=count, metavar="N", help="seed of --binarize and of the floors"
    )
    json: bool = option(
        "--json", default=False, action="store_true", help="print the measures as JSON"
    )


def evaluate(options: EvaluateOptions) -> int:
    """Prints the measures. Raises CommandError for files that do not fit, and Interrupted."""
    from vqtrain.device import choose_device, threads
    from vqtrain.modelfile import read_model
    from vqtrain.run.narrator import say

    tell = _ignore if options.json else say
    model, device = read_model(options.model), choose_device(options.device)
    how = {"recursive": options.recursive, "skip_bad": options.skip_bad}
    reading = Reading.of(model.preprocessing, model.spec.image_shape, **how)
    source = load_source(options.data, tell, reading, options.streaming())
    chosen = choose(source, model, options.held_out, reading)
    for line in chosen.said:
        tell(line)
    with threads(options.threads):
        found = _measure(model, chosen, device, options, tell)
    figures = {name: found[name] for name in MEANING if name in found}
    if options.json:
        print(json.dumps({**_about(chosen, figures, options), **figures}))
        return ExitCode.DONE
    print(f"{options.model} on {chosen}{', binarized' * options.binarize}, {device}")
    for name, value in figures.items():
        print(f"  {name:<19}{_shown(value):>9}  {MEANING[name]}")
    if chosen.others is None:
        for name in FLOORS & figures.keys():
            print(f"  {name} was fitted to the measured images themselves")
    if len(model.spec.latent_shape) == 3 and patch_grid(model.spec) is None:
        print("  no k-means on patches: each has several tokens in this model")
    return ExitCode.DONE


def _about(chosen: Measured, figures: dict[str, float], options: EvaluateOptions) -> dict[str, Any]:
    """Returns what was measured, and on which images, as plain data."""
    about = {
        "model": str(options.model),
        "data": chosen.source,
        "images": len(chosen.images),
        "which": chosen.kind,
        "how": chosen.how,
        "said": list(chosen.said),
        "binarized": options.binarize,
    }
    if FLOORS & figures.keys():
        about["floor_fitted_to"] = "measured images" if chosen.others is None else "other images"
    return about


def _measure(
    model: Model,
    chosen: Measured,
    device: torch.device,
    options: EvaluateOptions,
    tell: Callable[[str], None],
) -> dict[str, float]:
    """Returns the measures of ``vqtrain.run.metrics`` and the floors, by name.

    tell: takes a line every half minute.
    """
    from vqtrain.agreement import share_proved
    from vqtrain.data.batches import Batches
    from vqtrain.model import VQVAE
    from vqtrain.options import TrainingOptions
    from vqtrain.run import metrics
    from vqtrain.run.progress import counting
    from vqtrain.run.start import prepare

    images, others, spec = chosen.images, chosen.others, model.spec
    if options.binarize:
        rng = np.random.default_rng(options.seed)
        others = None if others is None else _binarized(others, rng)
        images = _binarized(images, rng)
    fitted = images if others is None else others
    known = spec.variance <= LARGEST_VARIANCE and not options.binarize
    variance = spec.variance if known else metrics.variance_of(fitted)
    _, height, width = spec.image_shape
    batch = max(1, min(MOST_IMAGES, MOST_PIXELS // (height * width)))
    batches = Batches(np.ascontiguousarray(images), batch, device)
    module = prepare(VQVAE(spec, model.params), device)
    measured = counting(tell, "evaluate", len(images))
    found = metrics.evaluate(module, batches, TrainingOptions(), variance, measured).to_dict(spec)
    if model.prior is not None:
        found |= _with_prior(model, model.prior, module, batches, found)
    count = int(PROOF_SECONDS / seconds_per_proof(spec))
    found |= share_proved(spec, model.params, to_unit_interval(images[:count]))
    found |= floors(spec, fitted, images, variance, options.seed)
    if "clustering_floor" in found:
        found["above_floor"] = found["bound"] - found["clustering_floor"]
    return found


def _with_prior(
    model: Model, learned: Prior, module: VQVAE, batches: Batches, found: Mapping[str, float]
) -> dict[str, float]:
    """Returns the measures that change if the model's own prior sends the indices."""
    import torch

    from vqtrain.device import arithmetic
    from vqtrain.prior import Prior as Module
    from vqtrain.run.priors import measure, tokenise

    device = module.quantizer.codebook.device
    with arithmetic("float32"):
        indices = torch.from_numpy(tokenise(module, batches)).to(device)
        nats = measure(Module(learned.spec, learned.params).to(device), indices)
    bound = found["bound"] - found["prior"] + nats
    bits = bound / (math.log(2) * math.prod(model.spec.image_shape))
    uniform = found["prior"]
    return {"prior": nats, "uniform_prior": uniform, "bound": bound, "bits_per_dimension": bits}


def floors(
    spec: ModelSpec, train: Array, measured: Array, variance: float, seed: int
) -> dict[str, float]:
    """Returns what as many codes reach on ``measured`` without a network.

    K-means with this seed fits codes to ``train``. For a Bernoulli model with one latent, returns
    the bound of fixed pictures, else the error of patches. Returns {} if the model has neither, or
    if ``train`` is too small.
    """
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
    """Draws each pixel as 0 or 1, float32; its grey level is the probability of 1."""
    levels = to_unit_interval(images)
    return (rng.random(levels.shape, np.float32) < levels).astype(np.float32)


def _shown(value: float) -> str:
    """Formats a measure with the digits that matter."""
    if isinstance(value, int):
        return f"{value}"
    digits = 4 if abs(value) < 10 else 2 if abs(value) < 1e5 else 0
    return f"{value:.{digits}f}"


def _ignore(line: str) -> None:
    """Says nothing, so that only JSON is printed."""


COMMAND = Command("evaluate", "measure a model on images", EvaluateOptions, evaluate)
