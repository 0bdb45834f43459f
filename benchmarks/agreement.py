"""``python -m benchmarks.agreement``: compares backends with the oracle on millions of latents,
and rounding errors with their bounds.

``--latents N`` latents go to each backend, adversarial and ordinary, in several sizes. With
``--model``, each model's codebook gets ``--drawn N`` latents of its own, and a quarter as many
around its bisectors. With ``--data``, each model that takes such images gives the tokens of real
images, from PyTorch and from onnxruntime. Last, for each precision and form, comes the largest
error of a difference of two squared distances, divided by its bound.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from tqdm import tqdm

import vqref
from benchmarks.measure import Record, parser
from vqdeploy.graphs.build import build_graphs
from vqdeploy.proof.samples import own_latents
from vqdeploy.runtime.sessions import open_sessions
from vqref.agreement import Backend, Check, check_indices, compare, merge
from vqref.agreement.bounds import FORMS, distance_error
from vqref.checks.adversary import CASES, around_bisectors
from vqref.families import post
from vqref.host.images import to_unit_interval
from vqref.host.pictures import load_any
from vqref.modelfile import Model
from vqref.precisions import PRECISIONS, arithmetic
from vqref.quantizer import squared_distances
from vqref.spec import CODEBOOK
from vqref.validation import Array
from vqtrain import VQVAE
from vqtrain.modelfile import read_model
from vqtrain.nearest import nearest

Quantize = Callable[[Array], Array]

SIZES = ((64, 16), (512, 8), (17, 3), (32, 64))
AT_ONCE = 20_000
DIFFERENCES = 2**27
"""The most latents at once, and the most differences of latents and codes in the eager form."""

IMAGES_AT_ONCE = 64

TYPES = {"float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


def computed(latents: Array, codebook: Array, precision: str, form: str) -> torch.Tensor:
    """Returns squared distances (N, K) of latents (N, 1, D), or their roots, from PyTorch.

    They are in this precision and form. TF32 is made by cutting the factors.
    """
    x, c = (
        torch.from_numpy(array).to(TYPES.get(precision, torch.float32))
        for array in (latents[:, 0], codebook)
    )
    if FORMS[form].expanded:
        left, right = (
            (a.view(torch.int32) & ~0x1FFF).view(torch.float32) if precision == "tf32" else a
            for a in (x, c)
        )
        d = x.square().sum(1)[:, None] - 2 * (left @ right.T) + c.square().sum(1)
    else:
        d = (x[:, None] - c).square().sum(-1)
    return d.clamp(min=0).sqrt() if FORMS[form].rooted else d


def backends(codebook: Array) -> dict[str, tuple[Quantize, str]]:
    """Returns {name: (function from latents (N, 1, D) to indices (N, 1), form)}."""
    k, d = codebook.shape
    spec = post((1, 4, 4), base_depth=1, num_codes=k, code_size=d)
    graph = build_graphs(
        spec, vqref.init_params(spec, np.random.default_rng(0)) | {CODEBOOK: codebook}
    )["quantizer"]
    sessions, _ = open_sessions({"quantizer": graph}, spec, "cpu")
    evaluator = ReferenceEvaluator(onnx.load_from_string(graph))
    rows = torch.from_numpy(codebook)

    def eager(latents: Array) -> Array:
        return np.asarray(
            (torch.from_numpy(latents)[:, :, None] - rows).square().sum(-1).argmin(-1).numpy()
        )

    def cdist(latents: Array) -> Array:
        return np.asarray(
            torch.cdist(torch.from_numpy(latents[:, 0]), rows).argmin(-1)[:, None].numpy()
        )

    return {
        "torch eager": (eager, "direct"),
        "trainer": (
            lambda latents: np.asarray(nearest(torch.from_numpy(latents), rows).numpy()),
            "direct",
        ),
        "onnxruntime": (lambda latents: np.asarray(sessions["quantizer"](latents)[0]), "direct"),
        "onnx reference": (
            lambda latents: np.asarray(
                next(iter(evaluator.run(["indices"], {"latents": latents})))
            ),
            "direct",
        ),
        "torch.cdist": (cdist, "expanded root"),
    }


def adversarial(latents: int) -> Iterator[tuple[Array, Array]]:
    names = list(CASES)
    for part in range(-(-latents // AT_ONCE)):
        k, d = SIZES[part // len(names) % len(SIZES)]
        yield CASES[names[part % len(names)]](
            np.random.default_rng(part), min(AT_ONCE, latents), k, d, "float32"
        )


def trained(model: Model, latents: int) -> Iterator[tuple[str, Array, Array]]:
    """Returns latents on lines between a model's own latents, and around its bisectors."""
    spec, params, codebook = model.spec, model.params, model.params[CODEBOOK]
    sessions, _ = open_sessions(build_graphs(spec, params), spec, "cpu")
    rng, own = np.random.default_rng(0), own_latents(spec, params, sessions)
    for start in range(0, latents, at_once(codebook)):
        count = min(at_once(codebook), latents - start)
        first, second = own[rng.integers(0, len(own), (2, count))]
        drawn = first + rng.random((count, 1), np.float32) * (second - first)
        yield "its own", drawn[:, None], codebook
        around = around_bisectors(rng, codebook, -(-count // 4), "float32")
        yield "bisectors", around, codebook


def at_once(codebook: Array) -> int:
    return max(1, min(AT_ONCE, DIFFERENCES // codebook.size))


def compare_latents(
    record: Record, title: str, cases: Iterator[tuple[str, Array, Array]], total: int
) -> None:
    """Compares every backend with the oracle on latents of each label."""
    found: dict[tuple[str, str], list[Check]] = {}
    ready: dict[tuple[int, ...], tuple[Array, dict[str, tuple[Quantize, str]]]] = {}
    for label, latents, codebook in tqdm(cases, title, total, disable=None):
        held = ready.get(codebook.shape)
        if held is None or not np.array_equal(held[0], codebook):
            ready[codebook.shape] = held = (codebook, backends(codebook))
        judged: dict[str, tuple[Array, Check]] = {}  # the first backend's answers, by form
        for name, (quantize, form) in held[1].items():
            indices = quantize(latents)
            check = judge(indices, latents, codebook, form, judged.get(form))
            judged.setdefault(form, (indices, check))
            found.setdefault((label, name), []).append(check)
    for (label, name), checks in found.items():
        say(record, label, name, checks)


def compare_tokens(record: Record, title: str, model: Model, images: Array) -> None:
    """Compares tokens of images (N, C, H, W), from PyTorch and onnxruntime, with the oracle's."""
    spec, params = model.spec, model.params
    module = VQVAE(spec, params)
    graphs = {"tokenizer": build_graphs(spec, params)["tokenizer"]}
    session = open_sessions(graphs, spec, "cpu")[0]["tokenizer"]

    @torch.no_grad()
    def trainer(given: Array) -> Array:
        indices, _ = module.quantizer(module.encoder(torch.from_numpy(given)))
        return np.asarray(indices.numpy())

    tokenizers = {"trainer": trainer, "onnxruntime": lambda given: session(given)[0]}
    found: dict[str, list[Check]] = {name: [] for name in tokenizers}
    for start in tqdm(range(0, len(images), IMAGES_AT_ONCE), title, disable=None):
        part = to_unit_interval(images[start : start + IMAGES_AT_ONCE])
        for name, tokenizer in tokenizers.items():
            report = compare(spec, params, part, Backend("float32", tokenizer=tokenizer))
            found[name] += report.checks
    for name, checks in found.items():
        say(record, title, name, checks)


def say(record: Record, label: str, name: str, checks: list[Check]) -> None:
    """Prints the result of one backend's checks on one kind of latents."""
    c = merge(name, "float32", tuple(checks))
    share = (c.certified or 0) / c.compared
    record.say(
        f"{label:<24}{name:<15}{c.compared:>10}{share:>12.5%}{c.near_ties:>9}{c.flips:>9}"
        f"{c.violations:>6}"
    )
    record.figures[f"{label}, {name}"] = dataclasses.asdict(c)
    if c.problem:
        record.say(c.problem)


def judge(
    indices: Array, latents: Array, codebook: Array, form: str, first: tuple[Array, Check] | None
) -> Check:
    """Returns what ``check_indices`` returns.

    If another backend of the same form was judged on the same latents, judges only the answers that
    differ: what is certified does not depend on the answers.
    """
    if first is None or indices.dtype != np.int64 or indices.shape != first[0].shape:
        return check_indices(indices, latents, codebook, precision="float32", form=form)
    answers, check = first
    differs = (indices != answers)[:, 0]
    ours, theirs = (
        check_indices(array[differs], latents[differs], codebook, precision="float32", form=form)
        for array in (indices, answers)
    )
    return dataclasses.replace(
        check,
        violations=check.violations - theirs.violations + ours.violations,
        flips=(check.flips or 0) - (theirs.flips or 0) + (ours.flips or 0),
        problem=ours.problem
        if ours.problem
        else (check.problem if check.violations > theirs.violations else None),
    )


def worst_share(precision: str, form: str) -> float:
    """Returns the largest error of a difference of two squared distances, divided by its bound.

    The bound is the sum of both bounds. Distances that overflow are left out.
    """
    worst, largest = 0.0, arithmetic(precision).largest
    for seed, name, (k, d) in itertools.product(
        range(8), ("ordinary", "far_from_origin", "mixed_scales", "bisector"), SIZES
    ):
        latents, codebook = CASES[name](np.random.default_rng(seed), 500, k, d, precision)
        found = computed(latents, codebook, precision, form).double().numpy()
        found = np.square(found) if FORMS[form].rooted else found
        x, rows = latents[:, 0].astype(np.float64), codebook.astype(np.float64)
        distances = np.concatenate(
            [part.copy() for _, part in squared_distances(x, rows)]
        )  # (500, K)
        norms = np.sqrt(np.square(x).sum(1))[:, None], np.sqrt(np.square(rows).sum(1))
        bound = distance_error(distances, *norms, d, precision=precision, form=form)
        usable = (np.square(norms[0] + norms[1]) < largest / 2) & (distances + bound < largest / 2)
        best = distances.argmin(axis=1)[:, None]
        error = np.where(usable, found - distances, 0.0)
        share = np.abs(error - np.take_along_axis(error, best, 1)) / (
            bound + np.take_along_axis(bound, best, 1)
        )
        worst = max(worst, float(share.max()))
    return worst


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--latents", type=int, default=10_000_000, help="adversarial ones (default: %(default)s)"
    )
    options.add_argument(
        "--model", type=Path, nargs="+", default=[], help="trained models, taken as well"
    )
    options.add_argument(
        "--drawn",
        type=int,
        default=10_000_000,
        help="latents of each model's own, a quarter as many around its bisectors",
    )
    options.add_argument("--data", type=Path, help="images whose tokens are compared")
    options.add_argument(
        "--images", type=int, default=1000, help="of --data, at most (default: %(default)s)"
    )
    arguments = options.parse_args()
    record = Record(arguments)
    record.say(
        f"{'latents':<24}{'backend':<15}{'compared':>10}{'certified':>12}{'ties':>9}{'flips':>9}"
        f"{'wrong':>6}"
    )
    with np.errstate(over="ignore", invalid="ignore"):
        cases = (("adversary", *case) for case in adversarial(arguments.latents))
        compare_latents(record, "adversary", cases, -(-arguments.latents // AT_ONCE))
        for path in arguments.model:
            compare_model(record, read_model(path), arguments)
    record.say("largest error of a difference of squared distances over its bound")
    record.say(f"{'precision':<12}" + "".join(f"{form:>15}" for form in FORMS))
    for precision in (name for name, row in PRECISIONS.items() if row.arithmetic):
        shares = {form: worst_share(precision, form) for form in FORMS}
        record.say(f"{precision:<12}" + "".join(f"{share:>15.3f}" for share in shares.values()))
        record.figures[f"error over bound, {precision}"] = shares
    record.write()


def compare_model(record: Record, model: Model, arguments: argparse.Namespace) -> None:
    """Compares on a model's own latents, its bisectors, and tokens of images if it takes them."""
    family, drawn = model.spec.family, arguments.drawn
    cases = (
        (f"{family}, {label}", latents, codebook)
        for label, latents, codebook in trained(model, drawn)
    )
    total = 2 * -(-drawn // at_once(model.params[CODEBOOK]))
    compare_latents(record, family, cases, total)
    if arguments.data is not None:
        images = load_any(arguments.data).train[: arguments.images]
        if images.shape[1:] == model.spec.image_shape:
            compare_tokens(record, f"{family}, {len(images)} images", model, images)


if __name__ == "__main__":
    main()
