"""``python -m benchmarks.large_codebooks --data FOLDER --done FILE``: compares techniques that keep
large codebooks in use.

All train the same residual network with 64 channels and half the image's height and width, so 256
tokens per image of 32x32, and the same number of codes. They take the same number of steps of 32
images in float32 on one thread, and use the nearest row at inference. Ours is recipe default with
the change that the table's name says. SimVQ (Zhu et al. 2024): rows are a frozen normal codebook
times a learned matrix, folded at the end. Wasserstein (Fang et al. 2025): rows are learned, and the
loss adds the distance between two normal distributions, those of latents and of rows. The peer is
vector-quantize-pytorch as in ``benchmarks.grids``. It uses our search, since its own step takes
twenty times as long.

FOLDER is that of ``benchmarks.grids``. NMSE, PSNR and perplexity are for the test images. Used
codes are counted over the test images, and over the training images, which have more tokens than
there are codes. Each training is a process of its own (``--only NAME``) and prints a line of JSON.
``--done FILE`` keeps these lines; a training with a line there is not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.grids import BATCH, CARE, Found, files, measured, shuffled
from benchmarks.measure import ROOT, Record, parser
from vqref.families import residual
from vqref.host.images import load
from vqref.spec import ModelSpec
from vqtrain.data.batches import Batches
from vqtrain.device import keep_freed_memory
from vqtrain.losses import compute_losses
from vqtrain.model import VQVAE
from vqtrain.nearest import nearest
from vqtrain.options import RECIPES, TrainingOptions
from vqtrain.run.metrics import evaluate, variance_of
from vqtrain.run.rules import Rules
from vqtrain.run.start import start_model
from vqtrain.run.step import make_optimizer, set_learning_rate, training_step

SHARED = ("codes", "steps", "seed")
MEASURES = ("nmse", "psnr", "perplexity", "codes_used", "used_in_training")


@dataclasses.dataclass(frozen=True)
class Work:
    """What all trainings share: images, codes, steps and seed."""

    train: Batches
    test: Batches
    variance: float
    codes: int
    steps: int
    seed: int

    def spec(self, code_size: int, *, normalized: bool = False) -> ModelSpec:
        """Returns the network with codes of this many elements."""
        channels, height, width = self.train.images.shape[1:]
        return residual(
            (channels, height, width),
            hidden=64,
            downsample=2,
            num_codes=self.codes,
            code_size=code_size,
            normalized=normalized,
            variance=self.variance,
        )


def ours(
    work: Work,
    code_size: int,
    *,
    normalized: bool = False,
    plain: float = 0.0,
    restarts: tuple[float, ...] = (),
    **changes: Any,
) -> Found:
    """Recipe default with changes.

    plain: the share of steps before k-means, in which the decoder is fed the latents themselves.
    restarts: shares of the steps after which there is k-means again.
    """
    spec = work.spec(code_size, normalized=normalized)
    options, model = started(work, spec, **changes)
    optimizer, rules = make_optimizer(model, options), Rules(options, work.steps)
    rules.plain_steps = int(plain * work.steps)
    again = {int(share * work.steps) for share in restarts}
    for step, images in enumerate(shuffled(work.train, work.steps, work.seed)):
        if rules.starts(step) or step in again:
            rules.start(model, work.train)
        training_step(model, optimizer, images, options, rules, step)
    return of_model(work, model, options)


def started(work: Work, spec: ModelSpec, **changes: Any) -> tuple[TrainingOptions, VQVAE]:
    """Returns recipe default with changes, and the model before its first step."""
    fields = {"batch_size": BATCH, "seed": work.seed} | changes
    options = dataclasses.replace(RECIPES["default"](spec), **fields)
    images = work.train.images
    return options, start_model(spec, options, images.numpy(), images.device)


def of_model(work: Work, model: VQVAE, options: TrainingOptions) -> Found:
    found = evaluate(model, work.test, options, work.variance).to_dict(model.spec)
    return found | used(work, model.encoder, model.quantizer.codebook)


def used(work: Work, encoder: nn.Module, codebook: Tensor) -> Found:
    """Returns how many codes the training images use."""
    hits = torch.zeros(len(codebook), dtype=torch.int64)
    with torch.no_grad():
        for images in work.train.in_order():
            hits += torch.bincount(
                nearest(encoder(images), codebook).flatten(), minlength=work.codes
            )
    return {"used_in_training": int((hits > 0).sum())}


def by_gradient(
    work: Work, code_size: int, rows: str, *, matching: float = 0.0, **changes: Any
) -> Found:
    """Rows of the codebook that are learned by gradient: those of the module ``rows``.

    The loss of rows is four times the commitment's, as in van den Oord et al. (2017). matching: the
    weight of the Wasserstein distance, in commitment losses.
    """
    spec = work.spec(code_size)
    options, model = started(work, spec, kmeans_start=False, revive_below=0.0, **changes)
    codes = {"simvq": Folded, "free": Free}[rows](work.codes, code_size)
    optimizer, rules = make_optimizer(model, options), Rules(options, work.steps)
    optimizer.add_param_group({"params": list(codes.parameters())})
    for step, images in enumerate(shuffled(work.train, work.steps, work.seed)):
        set_learning_rate(optimizer, rules.learning_rate(step))
        latents, table = model.encoder(images), codes()
        indices = nearest(latents.detach(), table.detach())
        found = table[indices]
        outputs = model.decoder(found.detach() + (latents - latents.detach()))
        losses = compute_losses(spec, images, outputs, latents, found, options.beta)
        moved = 4 * (found - latents.detach()).square().mean()
        if matching:
            moved = moved + matching * wasserstein(latents.flatten(0, 1), table)
        optimizer.zero_grad()
        (losses.total + options.beta * moved).backward()
        optimizer.step()
    with torch.no_grad():
        model.quantizer.codebook.copy_(codes())
    return of_model(work, model, options)


class Folded(nn.Module):
    """SimVQ: a frozen normal codebook times a learned matrix."""

    frozen: Tensor

    def __init__(self, codes: int, size: int) -> None:
        super().__init__()
        self.register_buffer("frozen", torch.randn(codes, size) / size**0.5)
        self.matrix = nn.Parameter(torch.eye(size))

    def forward(self) -> Tensor:
        return self.frozen @ self.matrix


class Free(nn.Module):
    """Learned rows that do not depend on each other."""

    def __init__(self, codes: int, size: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(codes, size))

    def forward(self) -> Tensor:
        return self.rows


def wasserstein(latents: Tensor, rows: Tensor) -> Tensor:
    """Returns the squared Wasserstein distance per element of two normal distributions.

    They have the means and covariances of latents (M, D) and of rows (K, D).
    """

    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        centred = x - x.mean(dim=0)
        return x.mean(dim=0), centred.T @ centred / len(x) + 1e-5 * torch.eye(x.shape[1])

    def root(matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        return (vectors * values.clamp(min=1e-8).sqrt()) @ vectors.T

    (mean, spread), (other_mean, other_spread) = moments(latents), moments(rows)
    half = root(spread)
    cross = torch.linalg.eigvalsh(half @ other_spread @ half).clamp(min=1e-8).sqrt().sum()
    spreads = spread.trace() + other_spread.trace() - 2 * cross
    return ((mean - other_mean).square().sum() + spreads) / len(mean)


def library(work: Work, code_size: int, learning_rate: float = 1e-3, **options: Any) -> Found:
    """Takes the same steps with vector-quantize-pytorch, whose codebook searches as ours does."""

    from benchmarks.peers import Library, without_one_hot

    torch.manual_seed(work.seed)
    model = Library(work.spec(code_size), learning_rate, channels_last=True, **options)
    codebook = model.quantizer._codebook
    codebook.forward = partial(without_one_hot, codebook)
    for images in shuffled(work.train, work.steps, work.seed):
        model.step(images)
    found = measured(model, torch.cat(list(work.test.in_order())))
    return found | used(work, model.encoder, codebook.embed[0])


BEST = CARE | {"threshold_ema_dead_code": 0.25}
"""The options of ``benchmarks.grids``, dead codes at half of the mean count, as ours."""

NOTHING: dict[str, Any] = {"kmeans_start": False, "revive_below": 0.0}

RUNS: dict[str, tuple[str, Callable[[Work], Found]]] = {
    "bare-64": ("D 64, no start, no revival", partial(ours, code_size=64, **NOTHING)),
    "default-64": ("D 64", partial(ours, code_size=64)),
    "default-8": ("D 8", partial(ours, code_size=8)),
    "low-8": ("D 8, revived below .1", partial(ours, code_size=8, revive_below=0.1)),
    "high-8": ("D 8, revived below .8", partial(ours, code_size=8, revive_below=0.8)),
    "fast-8": ("D 8, decay .97", partial(ours, code_size=8, decay=0.97)),
    "unit-8": ("D 8, unit norm", partial(ours, code_size=8, normalized=True)),
    "simvq-64": ("D 64, SimVQ", partial(by_gradient, code_size=64, rows="simvq")),
    "simvq-8": ("D 8, SimVQ", partial(by_gradient, code_size=8, rows="simvq")),
    "wasserstein-8": (
        "D 8, Wasserstein matching",
        partial(by_gradient, code_size=8, rows="free", matching=1.0),
    ),
    "restarts-8": (
        "D 8, k-means thrice",
        partial(ours, code_size=8, restarts=(0.25, 0.5)),
    ),
    "plain-8": ("D 8, a tenth plain", partial(ours, code_size=8, plain=0.1)),
    "late-8": ("D 8, half plain", partial(ours, code_size=8, plain=0.5)),
    "default-4": ("D 4", partial(ours, code_size=4)),
    "default-16": ("D 16", partial(ours, code_size=16)),
    "library": ("vector-quantize-pytorch, D 64", partial(library, code_size=64)),
    "library-8": ("the same, D 8", partial(library, code_size=8)),
    "library-best": ("the same, D 8, with care", partial(library, code_size=8, **BEST)),
    "library-fast": (
        "the same at 3e-3",
        partial(library, code_size=8, learning_rate=3e-3, **BEST),
    ),
}
"""The trainings, by the names of ``--only``: their name in the table, and what they do."""


def train_one(arguments: argparse.Namespace) -> Found:
    """Runs one training and measures it."""

    keep_freed_memory()
    torch.set_num_threads(1)
    train, test = (load(path).train for path in files(arguments.data))
    fit, apart = (Batches(images, BATCH, torch.device("cpu")) for images in (train, test))
    torch.manual_seed(arguments.seed)
    start = time.perf_counter()
    work = Work(fit, apart, variance_of(train), arguments.codes, arguments.steps, arguments.seed)
    found = RUNS[arguments.only][1](work)
    about = {"name": arguments.only, **{name: getattr(arguments, name) for name in SHARED}}
    seconds = {"seconds": time.perf_counter() - start}
    return about | seconds | {name: found[name] for name in MEASURES}


def all_found(arguments: argparse.Namespace) -> Iterator[Found]:
    """Yields all trainings in the order of the table; runs those that are not done yet."""
    kept: Path = arguments.done
    lines = kept.read_text().splitlines() if kept.exists() else []
    done = {tuple(line[key] for key in ("name", *SHARED)): line for line in map(json.loads, lines)}
    for name in arguments.names or RUNS:
        about = name, *(getattr(arguments, shared) for shared in SHARED)
        if about not in done:
            words = ["--only", name, "--codes", str(about[1]), "--steps", str(about[2])]
            words += ["--seed", str(about[3])]
            command = [sys.executable, "-m", "benchmarks.large_codebooks", *words]
            command += ["--data", str(arguments.data.resolve())]
            run = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
            done[about] = json.loads(run.stdout)
            with kept.open("a") as file:
                file.write(json.dumps(done[about]) + "\n")
        yield done[about]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data", type=Path, required=True, help="the folder of the two files")
    options.add_argument("--codes", type=int, default=16_384, help="(default: %(default)s)")
    options.add_argument("--steps", type=int, default=1000, help="(default: %(default)s)")
    options.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    options.add_argument("--names", nargs="+", choices=tuple(RUNS), help="these rows alone")
    options.add_argument(
        "--done", type=Path, metavar="FILE", default=Path("large_codebooks.jsonl"), help="lines"
    )
    options.add_argument("--only", choices=tuple(RUNS), help="one training, as a line of JSON")
    arguments = options.parse_args()
    if arguments.only:
        print(json.dumps(train_one(arguments)))
        return
    record = Record(arguments)
    record.say(
        f"{f'{arguments.steps} steps of {BATCH}':<36}{'NMSE':>8}{'PSNR':>8}{'perplexity':>12}"
        f"{'codes':>8}{'training':>10}{'seconds':>9}"
    )
    for one in all_found(arguments):
        record.say(
            f"{RUNS[one['name']][0]:<36}{one['nmse']:>8.4f}{one['psnr']:>8.2f}"
            f"{one['perplexity']:>12.0f}{one['codes_used']:>8.0f}{one['used_in_training']:>10.0f}"
            f"{one['seconds']:>9.0f}"
        )
        record.figures[one["name"]] = one
    record.write()


if __name__ == "__main__":
    main()
