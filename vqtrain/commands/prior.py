"""``python -m vqtrain prior``: learns a prior over a model's tokens and adds it to the file."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vqref.errors import ExitCode, InputError, UsageError
from vqref.host.commandline import Command, count, option, positive
from vqref.host.files import about, parsed, require_writable, write_file
from vqref.host.pictures import Reading
from vqref.validation import Array, Int64
from vqtrain.commands.shared import SourceOptions, ThreadOptions
from vqtrain.data import holdout
from vqtrain.data.measured import choose
from vqtrain.data.sources import load_source
from vqtrain.data.streams import Stream

if TYPE_CHECKING:
    from vqref.modelfile import Model
    from vqref.prior import Prior, PriorSpec
    from vqtrain.run.priors import PriorOptions

AUTO = "auto"

TOKENS = "tokens"
"""The folder of kept tokens, inside the folder of all runs."""


@dataclass(frozen=True, kw_only=True)
class PriorCommand(ThreadOptions, SourceOptions):
    """The model, the images whose tokens the prior learns, and how it learns them."""

    model: Path = option(type=Path, help="the file that vqtrain wrote")
    output: Path | None = option(
        "--output",
        default=None,
        type=Path,
        metavar="FILE",
        help="where to write the model with its prior (default: the model's own file)",
    )
    device: str = option(
        "--device", default=AUTO, choices=(AUTO, "cpu", "cuda"), help="device to train on"
    )
    width: int = option(
        "--width", default=128, type=positive, metavar="N", help="elements per vector"
    )
    depth: int = option("--depth", default=4, type=positive, metavar="N", help="number of blocks")
    heads: int = option("--heads", default=4, type=positive, metavar="N", help="attention heads")
    epochs: int = option(
        "--epochs", default=60, type=positive, metavar="N", help="at most N passes over the tokens"
    )
    patience: int = option(
        "--patience",
        default=5,
        type=positive,
        metavar="N",
        help="stop after N epochs without cheaper held-out tokens; the best epoch is kept",
    )
    batch_size: int = option(
        "--batch-size", default=32, type=positive, metavar="N", help="images per step"
    )
    learning_rate: float = option(
        "--learning-rate", default=1e-3, type=float, metavar="X", help="AdamW's largest rate"
    )
    dropout: float = option(
        "--dropout",
        default=0.1,
        type=float,
        metavar="X",
        help="share of values that training drops",
    )
    precision: str = option(
        "--precision",
        default=AUTO,
        choices=("float32", "bfloat16", AUTO),
        help="precision of products in training; auto: bfloat16 if the device supports it, else "
        "float32",
    )
    seed: int = option(
        "--seed",
        default=0,
        type=count,
        metavar="N",
        help="seed of the initial parameters and the order of images",
    )
    runs: Path = option(
        "--runs", default=Path("runs"), type=Path, metavar="FOLDER", help="folder of all runs"
    )
    name: str | None = option(
        "--name",
        default=None,
        metavar="NAME",
        help="name of the run's folder (default: DATA-prior)",
    )
    resume: str = option(
        "--resume",
        default=AUTO,
        metavar="auto|never|PATH",
        help="auto: continue the last unfinished run with these options; PATH: continue that run",
    )


def run(options: PriorCommand) -> int:
    """Trains as the options say. Raises CommandError, or Interrupted after a signal."""
    from vqtrain.device import choose_device, kept_memory, threads
    from vqtrain.modelfile import read_model, write_model
    from vqtrain.run.narrator import say

    output = options.output or options.model
    require_writable(output)
    model = read_model(options.model)
    model = dataclasses.replace(model, prior=None)
    with ExitStack() as stack:
        stack.enter_context(threads(options.threads))
        device = choose_device(options.device)
        if device.type == "cpu":
            stack.enter_context(kept_memory())
        train, held_out, source = _tokens(options, model, device, say)
        spec = _spec(options, model)
        if spec is None:
            found = _counted(model, train, held_out)
        else:
            found = _trained(options, model, spec, train, held_out, source, device, say)
    write_model(output, dataclasses.replace(model, prior=found))
    for line in _costs(model, found, train, held_out):
        say(line)
    say(f"wrote {output}; next: python -m vqtrain evaluate {output}")
    return ExitCode.DONE


def _spec(options: PriorCommand, model: Model) -> PriorSpec | None:
    """Returns the prior's rows; None for one latent, whose prior is counted. Raises UsageError."""
    from vqref.prior import transformer

    if model.spec.latent_size == 1:
        return None
    sizes = {"width": options.width, "depth": options.depth, "heads": options.heads}
    try:
        return transformer(model.spec.latent_size, model.spec.num_codes, **sizes)
    except ValueError as error:
        raise UsageError(f"--{error}") from None


def _tokens(
    options: PriorCommand, model: Model, device: Any, say: Callable[[str], None]
) -> tuple[Int64, Int64, str]:
    """Returns the tokens of the training and held-out images, and the data's name."""
    how = {"recursive": options.recursive, "skip_bad": options.skip_bad}
    reading = Reading.of(model.preprocessing, model.spec.image_shape, **how)
    source = load_source(options.data, say, reading)
    if isinstance(source, Stream):
        raise InputError(f"--data {options.data}: a prior needs images that fit in memory")
    chosen = choose(source, model, options.held_out, reading)
    for line in chosen.said:
        say(line)
    train, held_out = chosen.others, chosen.images
    if train is None:
        apart = holdout.split(held_out, holdout.FRACTION)
        train, held_out = held_out[~apart], held_out[apart]
    if not len(train) or not len(held_out):
        raise InputError(f"{options.data}: too few images to train on some and measure on others")
    digest = hashlib.sha256(model.digest().encode())
    for images in (train, held_out):
        digest.update(np.ascontiguousarray(images).data)
    path = options.runs / TOKENS / f"{digest.hexdigest()[:32]}.npz"
    found = _kept(path, model, len(train), len(held_out))
    if found is None:
        found = (
            _tokenised(model, train, device, say),
            _tokenised(model, held_out, device, say),
        )
        buffer = io.BytesIO()
        np.savez_compressed(buffer, train=found[0], held_out=found[1])
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, buffer.getvalue())
    else:
        say(f"tokens: read from {path}, kept by an earlier run")
    return found[0], found[1], chosen.source


def _kept(path: Path, model: Model, *counts: int) -> tuple[Int64, Int64] | None:
    """Returns the tokens that an earlier run kept, or None if none fit."""
    if not path.exists():
        return None
    try:
        with about(path), parsed("not tokens"), np.load(path, allow_pickle=False) as arrays:
            found = tuple(arrays[name] for name in ("train", "held_out"))
    except InputError:
        return None
    for rows, number in zip(found, counts, strict=True):
        fits = rows.shape == (number, model.spec.latent_size) and rows.dtype == np.int64
        if not fits or rows.min() < 0 or rows.max() >= model.spec.num_codes:
            return None
    return found[0], found[1]


def _tokenised(model: Model, images: Array, device: Any, say: Callable[[str], None]) -> Int64:
    from vqtrain.data.batches import Batches
    from vqtrain.device import arithmetic
    from vqtrain.model import VQVAE
    from vqtrain.run.priors import tokenise
    from vqtrain.run.progress import counting
    from vqtrain.run.start import prepare

    module = prepare(VQVAE(model.spec, model.params), device)
    batch = max(1, min(256, 2**18 // math.prod(model.spec.image_shape[1:])))
    batches = Batches(np.ascontiguousarray(images), batch, device)
    with arithmetic("float32"):
        return tokenise(module, batches, counting(say, "tokens", len(images)))


def _counted(model: Model, train: Int64, held_out: Int64) -> Prior:
    """Returns the prior of a single latent: the frequencies of the codes."""
    from vqref import prior

    spec, params = prior.categorical(train, model.spec.num_codes)
    nats = float(prior.nats(spec, params, held_out).mean())
    return prior.Prior(spec, params, model.digest(), {}, {"held_out": nats})


def _trained(
    options: PriorCommand,
    model: Model,
    spec: PriorSpec,
    train: Int64,
    held_out: Int64,
    source: str,
    device: Any,
    say: Callable[[str], None],
) -> Prior:
    from vqtrain.run.folder import open_run
    from vqtrain.run.priors import (
        PriorTrainer,
        PriorWork,
        course_of_prior,
        require_prior_state,
    )

    how = _how(options, device)
    digest = hashlib.sha256(train.tobytes() + held_out.tobytes()).hexdigest()
    course = course_of_prior(spec, how, model.digest(), digest)
    fits = partial(require_prior_state, spec=spec)
    name = f"{Path(source).stem}-prior"
    folder, state = open_run(options.runs, options.name, name, options.resume, course, say, fits)
    try:
        work = PriorWork(device, folder, say, output=options.output or options.model)
        found = PriorTrainer(spec, how, model, train, held_out, work, course, state).run()
    finally:
        folder.release()
    say(f"pictures and metrics are in {folder.path}")
    return found


def _how(options: PriorCommand, device: Any) -> PriorOptions:
    """Returns how to train. Raises UsageError."""
    from vqtrain.device import choose_precision
    from vqtrain.run.priors import PriorOptions

    given = {each.name: getattr(options, each.name) for each in dataclasses.fields(PriorOptions)}
    if options.precision == AUTO:
        given["precision"] = choose_precision(device)
    try:
        return PriorOptions(**given)
    except ValueError as error:
        raise UsageError(f"--{str(error).replace('_', '-')}") from None


def _costs(model: Model, found: Prior, train: Int64, held_out: Int64) -> list[str]:
    """Returns a line for each of three priors, with the cost of the held-out tokens under it."""
    from vqref import prior

    uniform = model.spec.latent_size * math.log(model.spec.num_codes)
    counted = prior.nats(*prior.categorical(train, model.spec.num_codes), held_out).mean()
    costs = {"uniform": uniform, "frequencies": counted, "this prior": found.metrics["held_out"]}
    per_dimension = 1 / (math.log(2) * math.prod(model.spec.image_shape))
    return [
        f"held-out tokens under {name:<12}{nats:>9.2f} nats, {nats * per_dimension:.4f} bits/dim"
        for name, nats in costs.items()
    ]


COMMAND = Command("prior", "learn a prior over a model's tokens", PriorCommand, run)
