"""``python -m benchmarks.prior MODEL DATA [MODEL DATA …]``: measures what a learned prior is worth,
and what sampling costs.

Measures the cost of held-out tokens under four priors: uniform, the frequencies of each position, a
bigram (by the index before, with counts backed off to the position's frequencies), and the model's
own. Measures the distance of samples from held-out images by a kernel distance (KID's polynomial
kernel, Binkowski et al. 2018, on averages of 4x4 pixels), compared with samples of the uniform
prior and with other held-out images. Draws samples of one seed by the oracle, onnxruntime, PyTorch
and, with ``--javascript FOLDER``, onnxruntime-web, and counts the certified tokens that differ.
Measures images per second, by the graph of one step with its cache and without it.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import Record, in_turns, parser, timed
from vqdeploy import Codec
from vqdeploy.export import export
from vqref import prior
from vqref.host.images import to_unit_interval
from vqref.host.pictures import Reading, load_any
from vqref.modelfile import Model
from vqref.prior import SMOOTHING, Prior
from vqref.validation import Array, Float64, Int64
from vqtrain.data.measured import choose
from vqtrain.modelfile import read_model
from vqtrain.prior import Prior as Module
from vqtrain.run.priors import draw_samples

PIXELS, SAMPLES = 4, 500
"""To a side of the squares whose averages a kernel compares, and images of each kind."""

BACKED_OFF = (1.0, 4.0, 16.0, 64.0, 256.0)
"""How many counts the position's frequencies are worth in the bigram. The best value on the
held-out tokens themselves is taken, in the bigram's favour."""


PAIRS = "models with a prior, each with the images that it was trained on"

Web = subprocess.Popen[str]
"""A process that prints samples as JSON; it draws while other processes do."""


class Part(dict[str, Any]):
    """The figures of one model, and the lines that report them."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.say = record.say


def bigram(train: Int64, held_out: Int64, codes: int) -> Float64:
    """Returns the costs (N,) of rows of held-out tokens under p(index | index before)."""
    costs = [_bigram(train, held_out, codes, weight) for weight in BACKED_OFF]
    return min(costs, key=lambda each: float(each.mean()))


def _bigram(train: Int64, held_out: Int64, codes: int, weight: float) -> Float64:
    counts = np.zeros((codes, codes), np.float64)
    np.add.at(counts, (train[:, :-1].ravel(), train[:, 1:].ravel()), 1.0)
    usual = np.stack([np.bincount(column, minlength=codes) for column in train.T]) + SMOOTHING
    usual /= usual.sum(axis=1, keepdims=True)
    cost = -np.log(usual[0][held_out[:, 0]])
    for s in range(1, held_out.shape[1]):
        before, now = held_out[:, s - 1], held_out[:, s]
        row = counts[before, now] + weight * usual[s][now]
        cost -= np.log(row / (counts[before].sum(axis=1) + weight))
    return cost


def features(images: Array) -> Float64:
    """Returns the averages (N, F) of squares of images (N, C, H, W)."""
    n, c, h, w = images.shape
    small = images.reshape(n, c, h // PIXELS, PIXELS, w // PIXELS, PIXELS).mean(axis=(3, 5))
    return small.reshape(n, -1).astype(np.float64)


def kernel_distance(a: Float64, b: Float64) -> float:
    """Returns the unbiased squared distance of two sets (N, F) under (x.y / F + 1)^3."""

    def kernel(x: Float64, y: Float64) -> Float64:
        return (x @ y.T / x.shape[1] + 1) ** 3

    within = [
        (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (kernel(a, a), kernel(b, b))
    ]
    return float(sum(within) - 2 * kernel(a, b).mean())


def costs(figures: Part, model: Model, learned: Prior, train: Int64, held_out: Int64) -> None:
    codes, size = model.spec.num_codes, model.spec.latent_size
    own = prior.nats(learned.spec, learned.params, held_out)
    counted = prior.nats(*prior.categorical(train, codes), held_out)
    found = {
        "uniform": size * math.log(codes),
        "frequencies of each position": float(counted.mean()),
        "bigram": float(bigram(train, held_out, codes).mean()),
        "the model's prior": float(own.mean()),
    }
    parameters = sum(array.size for array in learned.params.values())
    seen = len(train) // learned.training["batch_size"] * learned.training["batch_size"] * size
    minutes = sum(seen / line["tokens_per_second"] for line in learned.metrics["history"]) / 60
    epochs, precision = (learned.training[name] for name in ("epochs_trained", "precision"))
    figures.say(
        f"{len(held_out)} held-out images of {size} tokens of {codes} codes; {parameters:,} "
        f"parameters, {epochs} epochs of {len(train)} images in {minutes:.1f} min ({precision})"
    )
    dimensions = math.log(2) * math.prod(model.spec.image_shape)
    for name, nats in found.items():
        figures.say(f"{name:<32}{nats:>9.2f} nats{nats / dimensions:>9.4f} bits a dimension")
    figures |= {**found, "parameters": parameters, "minutes": minutes}


def distances(figures: Part, codec: Codec, held_out: Array) -> None:
    real = features(to_unit_interval(held_out))
    rng, count = np.random.default_rng(0), min(SAMPLES, len(real))
    spec = codec.spec
    uniform = codec.decode(rng.integers(0, spec.num_codes, (count, spec.latent_size)))
    found = {"uniform": kernel_distance(features(uniform), real)}
    for temperature in (1.0, 0.8):
        drawn = codec.sample(count, seed=0, temperature=temperature)
        found[f"the prior at {temperature:g}"] = kernel_distance(features(drawn), real)
    found["reconstructions"] = kernel_distance(features(codec.reconstruct(held_out[:count])), real)
    found["every second one and the others"] = kernel_distance(real[::2], real[1::2])
    figures.say("kernel distance to the held-out images, times 1,000")
    for name, distance in found.items():
        figures.say(f"{name:<32}{1000 * distance:>9.2f}")
        figures[f"distance, {name}"] = distance


def equal(figures: Part, learned: Prior, codec: Codec, count: int, web: Web | None) -> None:
    """Compares what implementations draw from one seed."""
    drawn = codec.draw(count, seed=0)
    module = Module(learned.spec, learned.params)
    parts = [(first, min(64, count - first)) for first in range(0, count, 64)]
    noise = partial(prior.gumbel, 0, learned.spec)
    others: dict[str, Callable[[], Array]] = {
        "the oracle": lambda: np.concatenate(
            [prior.sample(learned.spec, learned.params, noise(n, first)) for first, n in parts]
        ),
        "PyTorch": lambda: np.concatenate(
            [draw_samples(module, noise(n, first)) for first, n in parts]
        ),
    }
    if web is not None:
        others["onnxruntime-web"] = lambda: np.array(json.loads(web.communicate()[0]))
    shares = drawn.certified.mean(), drawn.certified.all(axis=1).mean()
    figures.say(
        f"{count:,} samples of a seed by onnxruntime: {shares[0]:.4%} of the tokens and "
        f"{shares[1]:.2%} of the images are certified"
    )
    figures["certified images"] = float(shares[1])
    held = np.logical_and.accumulate(drawn.certified, axis=1)
    for name, draw in others.items():
        found = draw()
        assert found.shape == held.shape
        wrong = int(((found != drawn.indices) & held).sum())
        images = int((found != drawn.indices).any(axis=1).sum())
        figures.say(
            f"{name:<16}{held.sum():>8,} certified tokens compared, {wrong} differ; of all images "
            f"{images} differ"
        )
        figures[f"differ, {name}"] = wrong


def speeds(figures: Part, codec: Codec) -> None:
    spec = codec.prior
    assert spec is not None

    def without(count: int) -> None:
        noise = prior.gumbel(0, spec, count)
        indices = np.zeros((count, spec.latent_size), np.int64)
        for s in range(spec.latent_size):
            log_p = codec._all("prior", indices)[0][:, s]
            indices[:, s] = prior.choose(log_p, noise[:, s])

    figures.say(f"{'images a second':<18}{'one step':>12}{'without':>12}{'ratio':>8}")
    for count in (1, 64):
        runs = {
            "with": partial(timed, partial(codec.draw, count, seed=0)),
            "without": partial(timed, partial(without, count)),
        }
        found = {name: count / np.median(taken) for name, taken in in_turns(runs, rounds=3).items()}
        ratio = found["with"] / found["without"]
        figures.say(
            f"batch {count:<12}{found['with']:>12.2f}{found['without']:>12.2f}{ratio:>7.1f}x"
        )
        figures[f"batch {count}"] = found


def one(record: Record, arguments: argparse.Namespace, path: Path, data: Path) -> None:
    model = read_model(path)
    learned, figures = model.prior, Part(record)
    if learned is None:
        raise SystemExit(f"{path}: it has no prior")
    chosen = choose(load_any(data), model, None, Reading())
    assert chosen.others is not None
    with tempfile.TemporaryDirectory() as folder:
        bundle, web = Path(folder) / "bundle", None
        export(path, bundle)
        if arguments.javascript is not None:
            words = ["node", "samples.js", str(bundle), str(arguments.samples)]
            web = subprocess.Popen(
                words, cwd=arguments.javascript, stdout=subprocess.PIPE, text=True
            )
        codec = Codec.load(bundle, "cpu")
        tokens = [codec.encode(images) for images in (chosen.others, chosen.images)]
        costs(figures, model, learned, *tokens)
        distances(figures, codec, chosen.images)
        equal(figures, learned, codec, arguments.samples, web)
        speeds(figures, codec)
    record.figures[f"{data.stem}, {model.spec.latent_size} tokens"] = dict(figures)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("models", type=Path, nargs="+", metavar="MODEL DATA", help=PAIRS)
    options.add_argument("--samples", type=int, default=10_000, help="of one seed")
    options.add_argument("--javascript", type=Path, metavar="FOLDER", help="with samples.js")
    arguments = options.parse_args()
    record = Record(arguments)
    for path, data in zip(arguments.models[::2], arguments.models[1::2], strict=True):
        record.say(f"{path.name}, {data.name}")
        one(record, arguments, path, data)
    record.write()


if __name__ == "__main__":
    main()
