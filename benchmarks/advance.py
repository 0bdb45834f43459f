"""``python -m benchmarks.advance MODEL IMAGES``: proves tokens in advance, tries to refute proofs.

Measures for each arithmetic the share of proved tokens of held-out images; a bound on how far a
latent can move, relative to the latent's length; and the cost of a proof. Measures the worst
perturbation of all rows at once, relative to the bound.

Then counts how many tokens proved for float32 come out differently on other machines. The images
are taken as they are, moved, mirrored, blended and with noise. The machines are onnxruntime with
either target, at each level of optimisation, on one and two threads; PyTorch eager, compiled, with
channels last, without oneDNN; NumPy's float32 with sums in several orders, fused or not; and, with
``--javascript FOLDER``, onnxruntime-web. FOLDER is a copy of examples/javascript after ``npm
install``. Last come machines of other arithmetics, whose differences must be found, and the
arithmetics in which no proved token differs.

``--tokens N`` sets how many proved tokens are compared in all; the tokens of each machine count.
``--large`` adds an image of 256x256.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

import vqref
from benchmarks.measure import ROOT, Record, parser
from benchmarks.pictures import fields
from vqdeploy.graphs.build import TARGETS, GraphOptions, build_graph
from vqdeploy.runtime.library import onnxruntime
from vqdeploy.runtime.sessions import Runtime, Session, open_sessions
from vqref.agreement.advance import Proof, prove
from vqref.agreement.arithmetics import ARITHMETICS, Arithmetic, activation_error
from vqref.agreement.enclosure import Network, enclose
from vqref.agreement.pulled import Enclosure, Row, reach
from vqref.families import residual
from vqref.host.images import to_unit_interval
from vqref.host.pictures import load_any
from vqref.modelfile import Model
from vqref.network import ACTIVATIONS, KINDS
from vqref.spec import CODEBOOK, ModelSpec, plan
from vqref.validation import Array, Float64, Params
from vqtrain import VQVAE
from vqtrain.modelfile import read_model

Tokenizer = Callable[[Array], Array]
Signs = dict[int, tuple[Float64, Float64, Float64]]

BATCH = 64
LEVELS = ("DISABLE_ALL", "ENABLE_BASIC", "ENABLE_EXTENDED", "ENABLE_ALL")
ORDERS = ("forwards", "backwards", "tree", "fused")
FEW = 64
"""Images for NumPy and the emulated machines, which take a second per image and order of sums."""

IN_JAVASCRIPT = 2048
"""Images for onnxruntime-web."""

OTHERS, EXPLAINED = 10_000, BATCH
"""Tokens from each machine of another arithmetic, and images whose tokens are proved for every
arithmetic."""


class Machine(NamedTuple):
    """What makes tokens (N, S) of images (N, C, H, W). images: how many it takes, None for all."""

    tokens: Tokenizer
    images: int | None = None


class Found(NamedTuple):
    """Proved tokens that were compared, and how many of them differ."""

    compared: int
    differing: int


def variations(images: Array, rng: np.random.Generator) -> Iterator[Array]:
    """Yields batches of uint8 images (N, C, H, W): first those given, then new ones from them."""
    for start in range(0, len(images) - BATCH + 1, BATCH):
        yield images[start : start + BATCH]
    while True:
        first, second = images[rng.integers(0, len(images), (2, BATCH))].astype(np.float64)
        share = rng.choice([0.0, 0.25, 0.5], (BATCH, 1, 1, 1))
        mixed = (1 - share) * first + share * second
        mixed = np.roll(mixed, rng.integers(-3, 4, 2), axis=(2, 3))
        mixed = mixed[..., ::-1] if rng.random() < 0.5 else mixed
        mixed += rng.choice([0.0, 2.0, 8.0]) * rng.normal(size=mixed.shape)
        yield np.clip(np.rint(mixed), 0, 255).astype(np.uint8)


# What rounding can do at worst


def bounds_on_length(enclosure: Enclosure, tokens: npt.NDArray[np.int64]) -> Float64:
    """Returns bounds on how far the latents of some tokens can move, by exact Jacobians."""
    size = enclosure.latents.shape[1]
    each = np.tile(np.eye(size), (len(tokens), 1))
    far = np.full(len(each), -np.inf)
    found = reach(enclosure, np.repeat(tokens, size), each, far).reshape(-1, size)
    return np.asarray(np.sqrt(np.square(found).sum(axis=1)))


def worst(found: Enclosure, token: int, direction: Float64) -> Signs:
    """Returns the signs of errors that push a token's latent furthest in a direction.

    They are for every row: for its inputs, and before and after its activation.
    """
    last = len(found.steps)
    gradients = {last: np.zeros_like(found.latents)[None]}
    gradients[last][0, token] = direction
    signs = {}
    for number, step in reversed([*enumerate(found.steps, 1)]):
        if number not in gradients:
            continue
        after = gradients.pop(number)
        g = after * found.rows[number].slope
        taken = [found.rows[i].value[None] for i in step.sources]
        weights = found.weights[step.layer.name]
        pulled = KINDS[step.layer.kind].backward(step.layer, g, *taken, *weights)
        signs[number] = np.sign(pulled[0][0]), np.sign(g[0]), np.sign(after[0])
        for source, each in zip(step.sources, pulled, strict=True):
            gradients[source] = gradients.get(source, 0) + each
    return signs


def moved(
    found: Enclosure, wrong: Callable[[int, Row], tuple[Float64, Float64, Float64]]
) -> list[tuple[Float64, Float64]]:
    """Returns the errors of each row before and after its activation, by number.

    wrong: says how far rounding moves factors, and the errors of the row and of its activation.
    """
    off = [(np.zeros_like(found.rows[0].value),) * 2]
    for number, (step, row) in enumerate(zip(found.steps, found.rows[1:], strict=True), 1):
        layer, (rho, error, rounding) = step.layer, wrong(number, row)
        taken = [off[i][1][None] + rho for i in step.sources]
        weights = found.weights[layer.name]
        linear = layer if layer.kind != "affine" else replace(layer, shift=0.0)
        if weights:
            weights = [weights[0], np.zeros_like(weights[1])]
        before = KINDS[layer.kind].value(linear, *taken, *weights)[0] + error
        after = ACTIVATIONS[layer.activation].value(row.z + before) + rounding - row.value
        off.append((before, after))
    return off


def share_of_bound(
    spec: ModelSpec, params: Params, image: Array, name: str, rng: np.random.Generator
) -> float:
    """Returns the effect of the worst perturbation of all rows at once, divided by the bound.

    The effect is how far a token's latent moves in a direction between two codes.
    """
    arithmetic, codebook = ARITHMETICS[name], params[CODEBOOK].astype(np.float64)
    found = enclose(Network(spec, params, arithmetic), image.astype(np.float64))
    token = int(rng.integers(spec.latent_size))
    a, b = codebook[rng.choice(len(codebook), 2, replace=False)]
    (bound,) = reach(found, np.array([token]), (a - b)[None], np.array([-np.inf]))
    signs = worst(found, token, a - b)

    def wrong(number: int, row: Row) -> tuple[Float64, Float64, Float64]:
        if number not in signs:
            return (np.zeros(()),) * 3
        of_inputs, before, after = signs[number]
        rounding = activation_of(found, number, arithmetic)
        rho = np.zeros(()) if row.inputs is None else of_inputs * row.inputs
        return rho, before * row.error, after * rounding

    off = moved(found, wrong)[-1][1]
    return float(off[token] @ (a - b)) / float(bound)


def activation_of(found: Enclosure, number: int, arithmetic: Arithmetic) -> Float64:
    """Returns the error of an activation's own result for the exact input."""
    z, activation = found.rows[number].z, found.steps[number - 1].layer.activation
    return activation_error(activation, z, np.zeros_like(z), arithmetic)


# Machines


def sums(terms: Array, order: str, rng: np.random.Generator) -> Array:
    """Returns float32 sums along the last axis, added in this order."""
    terms = terms.astype(np.float32)
    if order == "backwards":
        terms = terms[..., ::-1]
    if order == "tree":
        terms = terms[..., rng.permutation(terms.shape[-1])]
        while terms.shape[-1] > 1:
            if terms.shape[-1] % 2:
                terms = np.concatenate([terms, np.zeros_like(terms[..., :1])], axis=-1)
            terms = terms[..., 0::2] + terms[..., 1::2]
        return terms[..., 0]
    return np.asarray(np.add.accumulate(terms, axis=-1, dtype=np.float32)[..., -1])


def products(x: Array, weight: Array, order: str, rng: np.random.Generator) -> Array:
    """Returns float32 sums of products along the last axis.

    fused: each product is exact, and is rounded once, together with the sum so far.
    """
    if order != "fused":
        return sums(x * weight, order, rng)
    x, weight = np.broadcast_arrays(x, weight)
    total = np.zeros(x.shape[:-1], np.float32)
    for a, b in zip(np.moveaxis(x, -1, 0), np.moveaxis(weight, -1, 0), strict=True):
        total = (total + a.astype(np.float64) * b).astype(np.float32)
    return total


def latents_in_float32(
    spec: ModelSpec,
    params: Params,
    images: Array,
    order: str = "forwards",
    cut: Callable[[Array], Array] = lambda factor: factor,
    seed: int = 0,
) -> Array:
    """Returns the latents of a network of convolutions and dense rows in NumPy's float32.

    All sums are in this order; factors are cut first.
    """
    rng = np.random.default_rng(seed)
    values: dict[int, Array] = {0: images.astype(np.float32)}
    for number, step in enumerate(plan(spec.encoder), 1):
        layer, x = step.layer, [values[i] for i in step.sources]
        y: Array
        weights = [np.asarray(params[name], np.float32) for name, _ in layer.parameters]
        if layer.kind == "conv":
            padded = np.pad(cut(x[0]), ((0, 0), (0, 0), *layer.pads))
            view = np.lib.stride_tricks.sliding_window_view(padded, layer.kernel, axis=(2, 3))
            view = view[:, :, :: layer.stride, :: layer.stride].transpose(0, 2, 3, 1, 4, 5)
            flat = view.reshape(*view.shape[:3], 1, -1)
            kernels = cut(weights[0]).reshape(len(weights[0]), -1)
            y = (products(flat, kernels, order, rng) + weights[1]).transpose(0, 3, 1, 2)
        elif layer.kind == "dense":
            y = products(cut(x[0])[:, None], cut(weights[0]), order, rng) + weights[1]
        else:
            y = KINDS[layer.kind].value(layer, *x).astype(np.float32)
        if layer.activation == "elu":
            y = np.where(y > 0, y, np.exp(np.minimum(y, np.float32(0))) - np.float32(1))
        elif layer.activation == "silu":
            y = y / (np.float32(1) + np.exp(-y))
        elif layer.activation == "relu":
            y = np.maximum(y, np.float32(0))
        elif layer.activation == "gelu":
            bent = np.float32(0.7978845608) * (y + np.float32(0.044715) * y * y * y)
            y = np.float32(0.5) * y * (np.float32(1) + np.tanh(bent))
        values[number] = y
    return values[len(values) - 1]


def in_float32(
    spec: ModelSpec,
    params: Params,
    images: Array,
    order: str = "forwards",
    cut: Callable[[Array], Array] = lambda factor: factor,
    seed: int = 0,
) -> Array:
    """Returns tokens of ``latents_in_float32``; distances are added in the same order."""
    latents = latents_in_float32(spec, params, images, order, cut, seed)
    difference = latents[:, :, None] - np.asarray(params[CODEBOOK], np.float32)
    rng = np.random.default_rng(seed)
    return np.asarray(sums(np.square(difference), order, rng).argmin(axis=-1))


def one_by_one(tokens: Tokenizer) -> Tokenizer:
    """Takes one image at a time, whose terms fit in memory."""
    return lambda images: np.concatenate([tokens(image[None]) for image in images])


def first_of(session: Session, images: Array) -> Array:
    return session(images)[0]


def in_onnxruntime(model: Model) -> dict[str, Machine]:
    """Returns onnxruntime on the processor: per target, level of optimisation, and threads."""
    found = {}
    for target, level, threads in itertools.product(TARGETS, LEVELS, (1, 2)):
        options = onnxruntime().SessionOptions()
        options.graph_optimization_level = getattr(
            onnxruntime().GraphOptimizationLevel, f"ORT_{level}"
        )
        graph = build_graph("tokenizer", model.spec, model.params, GraphOptions(target=target))
        runtime = Runtime(session_options=options, intra_op_num_threads=threads)
        sessions, _ = open_sessions({"tokenizer": graph}, model.spec, "cpu", runtime=runtime)
        name = f"onnxruntime, {target}, {level.lower().replace('_', ' ')}, {threads} threads"
        found[name] = Machine(partial(first_of, sessions["tokenizer"]))
    return found


@contextmanager
def onednn_off() -> Iterator[None]:
    """Turns oneDNN off; hides PyTorch's warning about Intel's cards, which comes each time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.backends.mkldnn.flags(enabled=False):
            yield


@torch.no_grad()
def asked(module: VQVAE, given: torch.Tensor, encoder: Callable[..., torch.Tensor]) -> Array:
    return np.asarray(module.quantizer(encoder(given))[0].numpy())


def in_pytorch(model: Model) -> dict[str, Machine]:
    """Returns machines of PyTorch on the processor.

    NNPACK is off together with oneDNN. Otherwise it may compute convolutions by Fourier transforms
    and Winograd's algorithm, which are not sums of products.
    """
    module = VQVAE(model.spec, model.params)
    compiled = torch.compile(module.encoder)

    def tokens(
        images: Array, encoder: Callable[..., torch.Tensor] = module.encoder, last: bool = False
    ) -> Array:
        given = torch.from_numpy(images)
        if last:
            given = given.contiguous(memory_format=torch.channels_last)
        return asked(module, given, encoder)

    def without_onednn(images: Array) -> Array:
        with onednn_off(), torch.backends.nnpack.flags(enabled=False):
            return tokens(images)

    return {
        "PyTorch, eager": Machine(tokens),
        "PyTorch, channels last": Machine(lambda images: tokens(images, last=True)),
        "PyTorch, without oneDNN": Machine(without_onednn),
        "PyTorch, compiled": Machine(lambda images: tokens(images, compiled)),
    }


def in_javascript(folder: Path, bundle: Path) -> Machine:
    """Returns onnxruntime-web, in a process that reads uint8 images from a file."""

    def tokens(images: Array) -> Array:
        with tempfile.TemporaryDirectory() as where:
            path = Path(where, "images.npy")
            np.save(path, np.rint(images * 255).astype(np.uint8))
            command = ["node", str(folder.resolve() / "tokens.js"), str(bundle), str(path)]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return np.array(json.loads(said))

    return Machine(tokens, IN_JAVASCRIPT)


def machines(model: Model) -> dict[str, Machine]:
    """Returns the machines that compute in float32 and add up the products, in any order."""
    spec, params = model.spec, model.params
    found = {**in_onnxruntime(model), **in_pytorch(model)}
    for order in ORDERS:
        tokens = partial(in_float32, spec, params, order=order)
        found[f"NumPy, {order}"] = Machine(one_by_one(tokens), FEW)
    return found


def cut_to_tf32(factor: Array) -> Array:
    bits = np.ascontiguousarray(factor, np.float32).view(np.uint32)
    return np.asarray((bits & np.uint32(0xFFFFE000)).view(np.float32))


def to_bfloat16(factor: Array) -> Array:
    """Rounds to nearest, ties to even."""
    bits = np.ascontiguousarray(factor, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return np.asarray(rounded.view(np.float32))


def to_float16(factor: Array) -> Array:
    return factor.astype(np.float16).astype(np.float32)


def with_factors(model: Model, cut: Callable[[Array], Array]) -> Machine:
    """Returns a machine of PyTorch whose rows take rounded factors."""
    params = {
        name: cut(each) if name.endswith(".weight") and name != CODEBOOK else each
        for name, each in model.params.items()
    }
    module = VQVAE(model.spec, params)
    for row in module.encoder.modules():
        if list(row.parameters(recurse=False)):
            row.register_forward_pre_hook(
                lambda _, given: tuple(torch.from_numpy(cut(x.numpy())) for x in given)
            )
    return Machine(lambda images: asked(module, torch.from_numpy(images), module.encoder))


def other_machines(model: Model) -> dict[str, Machine]:
    """Returns the machines that compute in another arithmetic than float32."""
    module = VQVAE(model.spec, model.params)

    def in_nnpack(images: Array) -> Array:
        with onednn_off():
            return asked(module, torch.from_numpy(images), module.encoder)

    return {
        "factors cut to TF32": with_factors(model, cut_to_tf32),
        "factors rounded to float16": with_factors(model, to_float16),
        "factors rounded to bfloat16": with_factors(model, to_bfloat16),
        "PyTorch, NNPACK": Machine(in_nnpack),
    }


# Tables


def shares(record: Record, model: Model, images: Array, count: int) -> None:
    """Prints what each arithmetic proves, and what that costs."""
    spec, params, rng = model.spec, model.params, np.random.default_rng(0)
    x = to_unit_interval(images[:count])
    start = time.perf_counter()
    latents = np.concatenate([vqref.encode(spec, params, image[None]) for image in x])
    vqref.quantize(latents, params[CODEBOOK].astype(np.float64))
    forward = (time.perf_counter() - start) / len(x)
    record.say(
        f"{len(x)} held-out images, {len(x) * spec.latent_size} tokens; the oracle's forward takes "
        f"{1000 * forward:.1f} ms an image"
    )
    record.say(
        f"{'arithmetic':<12}{'tokens':>8}{'proved':>9}{'bound / latent':>16}{'ms an image':>13}"
        f"{'over forward':>14}{'MiB':>7}"
    )
    for name, arithmetic in ARITHMETICS.items():
        part = x if name in ("float32", "lanes", "pairwise") else x[: max(1, len(x) // 5)]
        start = time.perf_counter()
        found = prove(spec, params, part, name)
        each = (time.perf_counter() - start) / len(part)
        ratios = []
        for image, own in zip(part[:40], latents, strict=False):
            with np.errstate(over="ignore", invalid="ignore"):
                network = Network(spec, params, arithmetic)
                enclosure = enclose(network, image.astype(np.float64), closely=False)
                token = rng.integers(spec.latent_size, size=1)
                far = bounds_on_length(enclosure, token)
            ratios.append(float(far[0] / np.sqrt(np.square(own[token[0]]).sum())))
        median = float(np.median(np.nan_to_num(ratios, nan=np.inf)))
        figures = {
            "tokens": found.proved.size,
            "proved": float(found.proved.mean()),
            "bound over latent, median": median if np.isfinite(median) else None,
            "seconds": each,
            "over forward": each / forward,
            "mebibytes": memory_of(spec, params, part[:1], name),
        }
        record.figures[name] = figures
        record.say(
            f"{name:<12}{found.proved.size:>8}{found.proved.mean():>9.2%}{median:>16.1e}"
            f"{1000 * each:>13.1f}{each / forward:>13.1f}x{figures['mebibytes']:>7.0f}"
        )


def memory_of(
    spec: ModelSpec, params: Params, images: Array, name: str, *, closely: bool = True
) -> float:
    """Returns the most MiB that NumPy holds at once for a proof."""
    tracemalloc.start()
    prove(spec, params, images, name, closely=closely)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def near_the_bound(record: Record, model: Model, images: Array, count: int) -> None:
    """Prints how near the worst perturbation comes to the bound."""
    rng, x = np.random.default_rng(1), to_unit_interval(images[:count])
    record.say("the worst perturbation of all rows at once, over the bound")
    for name in ("float32", "lanes", "pairwise"):
        found = [share_of_bound(model.spec, model.params, image, name, rng) for image in x]
        record.figures[f"share of the bound, {name}"] = {
            "least": min(found), "median": float(np.median(found)), "most": max(found)
        }  # fmt: skip
        record.say(
            f"{name:<12}least {min(found):.3f}, median {np.median(found):.3f}, most "
            f"{max(found):.3f}; above 1: {sum(each > 1 for each in found)} of {len(found)}"
        )


def proofs_of(model: Model, x: Array, names: Sequence[str]) -> dict[str, Proof]:
    return {name: prove(model.spec, model.params, x, name) for name in names}


def proofs_ahead(
    model: Model, batches: Iterator[Array], explained: int
) -> Iterator[tuple[Array, dict[str, Proof]]]:
    """Yields images in [0, 1] and their proofs for float32.

    The first ``explained`` images also have proofs for every other arithmetic. One process per core
    proves, a few batches ahead.
    """
    cores = len(os.sched_getaffinity(0))
    waiting = deque[tuple[Array, Future[dict[str, Proof]]]]()
    os.environ["OMP_NUM_THREADS"] = "1"  # for later processes, which share the cores
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
        try:
            for number, batch in enumerate(batches):
                names = [*ARITHMETICS] if number * BATCH < explained else ["float32"]
                x = to_unit_interval(batch)
                waiting.append((x, pool.submit(proofs_of, model, x, names)))
                if len(waiting) > 2 * cores:
                    images, future = waiting.popleft()
                    yield images, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def refuted(
    model: Model, images: Array, kinds: Mapping[str, Machine], tokens: int, explained: int
) -> tuple[dict[str, Found], dict[str, dict[str, Found]], int]:
    """Compares the tokens of every machine with those proved for float32, until there are enough.

    For the first ``explained`` images, also compares with those proved for the other arithmetics.
    Leaves out machines that do not run here. Returns both results, and the number of images.
    """
    found = dict.fromkeys(kinds, Found(0, 0))
    by_row = {kind: dict.fromkeys(ARITHMETICS, Found(0, 0)) for kind in kinds}
    seen, broken = 0, set()
    for x, proofs in proofs_ahead(model, variations(images, np.random.default_rng(2)), explained):
        if sum(each.compared for each in found.values()) >= tokens:
            break
        for kind, machine in kinds.items():
            if kind in broken or (machine.images is not None and seen >= machine.images):
                continue
            try:
                answers = machine.tokens(x)
            except Exception as error:  # errors of compilers have no common type
                broken.add(kind)
                print(f"{kind}: {str(error).splitlines()[0]}", file=sys.stderr)
                continue
            for name, proof in proofs.items():
                differing = int((answers != proof.indices)[proof.proved].sum())
                more = Found(int(proof.proved.sum()), differing)
                if name == "float32":
                    found[kind] = Found(*np.add(found[kind], more).tolist())
                if seen < explained:
                    by_row[kind][name] = Found(*np.add(by_row[kind][name], more).tolist())
        seen += len(x)
    return {kind: each for kind, each in found.items() if kind not in broken}, by_row, seen


def attempts(
    record: Record, model: Model, images: Array, tokens: int, javascript: Machine | None
) -> None:
    kinds = machines(model)
    if javascript is not None:
        kinds["onnxruntime-web"] = javascript
    found, _, seen = refuted(model, images, kinds, tokens, 0)
    record.say(f"tokens proved for float32 that machines were asked for, of {seen} images")
    record.say(f"{'machine':<50}{'compared':>12}{'differ':>8}")
    total = Found(*np.sum([*found.values()], axis=0).tolist())
    for kind, each in {**found, "all": total}.items():
        record.figures[f"refuted, {kind}"] = each._asdict()
        record.say(f"{kind:<50}{each.compared:>12,}{each.differing:>8,}")


def explanations(record: Record, model: Model, images: Array) -> None:
    """Prints what is found about machines of other arithmetics."""
    kinds = other_machines(model)
    found, by_row, seen = refuted(model, images, kinds, OTHERS * len(kinds), EXPLAINED)
    record.say(f"machines of other arithmetics: tokens proved for float32, of {seen} images;")
    record.say(f"by arithmetic, how many of its own proved tokens differ, of {EXPLAINED} images")
    record.say(f"{'machine':<28}{'compared':>10}{'differ':>8}")
    for kind, (compared, differing) in found.items():
        record.say(f"{kind:<28}{compared:>10,}{differing:>8,}")
        rows = [f"{name} {row.differing} of {row.compared}" for name, row in by_row[kind].items()]
        for start in range(0, len(rows), 4):
            record.say(f"    {', '.join(rows[start : start + 4])}")
        record.figures[f"other, {kind}"] = {
            "compared": compared,
            "differing": differing,
            "by arithmetic": {name: row._asdict() for name, row in by_row[kind].items()},
        }


def large(record: Record, model: Model, images: Array) -> None:
    """Prints what the first look at images of 256x256 costs.

    First for an untrained network with three halvings and 1,024 codes, which are latents of the
    image. Then for the model, if its rows take such an image: a mosaic of held-out images.
    """
    spec = residual((3, 256, 256), downsample=8, num_codes=1024)
    rng = np.random.default_rng(0)
    image, params = to_unit_interval(fields(1, spec.image_shape)), vqref.init_params(spec, rng)
    latents = vqref.encode(spec, params, image)[0]
    rows = latents[rng.choice(len(latents), spec.num_codes, replace=False)]
    cases: dict[str, tuple[ModelSpec, Params, Array]] = {
        "untrained": (spec, {**params, CODEBOOK: rows.astype(np.float32)}, image)
    }
    codes, size = model.spec.num_codes, model.spec.code_size
    wide = residual((3, 256, 256), num_codes=codes, code_size=size)
    if [(row.name, row.parameters) for row in wide.encoder] == [
        (row.name, row.parameters) for row in model.spec.encoder
    ]:
        tiles = images[:64].reshape(8, 8, 3, 32, 32).transpose(2, 0, 3, 1, 4)
        mosaic = to_unit_interval(tiles.reshape(1, 3, 256, 256))
        cases["the model, a mosaic"] = (wide, model.params, mosaic)
    for title, (own, parameters, x) in cases.items():
        start = time.perf_counter()
        latents = vqref.encode(own, parameters, x)
        vqref.quantize(latents, parameters[CODEBOOK].astype(np.float64))
        forward = time.perf_counter() - start
        start = time.perf_counter()
        found = prove(own, parameters, x, closely=False)
        each = time.perf_counter() - start
        used = memory_of(own, parameters, x, "float32", closely=False)
        record.say(
            f"256x256, {title}, {own.latent_size:,} tokens of {own.num_codes:,} codes: "
            f"{found.proved.mean():.2%} proved in {each:.1f} s, {each / forward:.1f} times the "
            f"oracle's forward, {used:.0f} MiB"
        )
        record.figures[f"256x256, {title}"] = {
            "tokens": own.latent_size,
            "proved": float(found.proved.mean()),
            "seconds": each,
            "over forward": each / forward,
            "mebibytes": used,
        }


def held_out(path: Path) -> Array:
    """Returns images (N, C, H, W) uint8: those that a set holds out, else all of the set."""
    source = load_any(path)
    images = source.train if source.held_out is None else source.held_out
    return images if images.dtype == np.uint8 else np.rint(images * 255).astype(np.uint8)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("model", type=Path, help="a trained model.pt")
    options.add_argument("images", type=Path, help="held-out images, or a set that has such")
    options.add_argument(
        "--tokens", type=int, default=10_000_000, help="compared in all (default: %(default)s)"
    )
    options.add_argument(
        "--count", type=int, default=1000, help="images whose share is measured, at most"
    )
    options.add_argument("--javascript", type=Path, metavar="FOLDER", help="with tokens.js")
    options.add_argument("--large", action="store_true", help="an image of 256x256, too")
    arguments = options.parse_args()
    model, record = read_model(arguments.model), Record(arguments)
    images = held_out(arguments.images)
    count = min(arguments.count, len(images))
    shares(record, model, images, count)
    near_the_bound(record, model, images, 100)
    with tempfile.TemporaryDirectory() as folder:
        web = None
        if arguments.javascript is not None:
            bundle = Path(folder, "bundle")
            command = [sys.executable, "-m", "vqdeploy", "export", arguments.model.resolve()]
            subprocess.run(
                [*command, "--output", bundle], check=True, cwd=ROOT, stdout=subprocess.DEVNULL
            )
            web = in_javascript(arguments.javascript, bundle)
        attempts(record, model, images, arguments.tokens, web)
    explanations(record, model, images)
    if arguments.large:
        large(record, model, images)
    record.write()


if __name__ == "__main__":
    main()
