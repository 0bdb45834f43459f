"""``python -m benchmarks.cuda MODEL IMAGES``: measures what only a card can show.

For each form of the bundle: what ``verify`` finds on onnxruntime's CUDA provider, and where the
provider puts each node. With TF32 off and on: the errors of encoder and reconstructions, the tokens
that differ from the oracle's, and those of them that no rounding explains. For tokens proved in
advance for float32: what onnxruntime and PyTorch on the card make of them, in float32 and
otherwise. Then ties, in each case of the adversary; batches of changing size; and images per
second, compared with PyTorch and with the processor.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vqdeploy.graphs.quantizer
import vqref
from benchmarks.advance import (
    LEVELS,
    Found,
    Machine,
    Tokenizer,
    first_of,
    held_out,
    refuted,
)
from benchmarks.measure import Record, in_turns, parser, timed
from vqdeploy import Codec
from vqdeploy.bundle import Bundle
from vqdeploy.export import export
from vqdeploy.graphs.build import TARGETS, GraphOptions, build_graph, build_graphs
from vqdeploy.runtime.library import onnxruntime
from vqdeploy.runtime.sessions import CUDA, Runtime, open_sessions
from vqdeploy.verify import verify
from vqref.agreement.advance import prove
from vqref.agreement.parity import check_indices
from vqref.checks.adversary import CASES
from vqref.errors import CommandError
from vqref.families import post
from vqref.host.images import to_unit_interval
from vqref.modelfile import Model
from vqref.spec import CODEBOOK
from vqref.validation import Array
from vqtrain import VQVAE
from vqtrain.device import arithmetic
from vqtrain.modelfile import read_model

FORMS: Mapping[str, dict[str, Any]] = {
    "default": {},
    "batch 8": {"batch": 8},
    "fp16": {"precision": "fp16"},
    "int8": {"precision": "int8"},
    "opset 20": {"opset": 20},
    "for the processor": {"target": "cpu"},
    "unfolded": {"fold": False},
}
SIZES = (1, 2, 3, 7, 8, 64, 65, 200, 256, 300, 1, 300)
LATENTS, K, D = 20_000, 64, 16
COMPARED = 256


def forms(record: Record, model: Path, images: Array, folder: Path) -> None:
    """Prints what every form's verification finds, and the nodes of its graphs by provider."""
    record.say(f"{'form':<19}{'verdict':<10}{'of tolerance':>13}{'flips':>7}  nodes")
    for name, options in FORMS.items():
        path = folder / name.replace(" ", "-")
        export(model, path, options=GraphOptions(**options))
        try:
            found = verify(Bundle.open(path), "cuda", images[:COMPARED])
        except CommandError as error:
            record.say(f"{name:<19}{error}")
            record.figures[f"form, {name}"] = {"error": str(error)}
            continue
        checks = found.report.checks
        worst = max((c.max_error or 0) / c.allowed for c in checks if c.allowed)
        nodes = Counter[str]()
        for providers in found.placement.values():
            nodes.update({each: sum(kinds.values()) for each, kinds in providers.items()})
        record.figures[f"form, {name}"] = {
            "passed": found.report.passed,
            "of tolerance": worst,
            "flips": sum(c.flips or 0 for c in checks),
            "placement": found.placement,
            "failed": [asdict(c) for c in checks if not c.passed],
        }
        told = ", ".join(f"{count} on {each}" for each, count in nodes.items())
        verdict = "verified" if found.report.passed else "refuted"
        record.say(
            f"{name:<19}{verdict:<10}{worst:>13.2f}{sum(c.flips or 0 for c in checks):>7}  {told}"
        )
        for check in checks:
            if not check.passed:
                record.say(
                    f"    {check.stage}: {check.violations} of {check.compared}: {check.problem}"
                )


def on_onnxruntime(model: Model, tf32: str, level: str, target: str) -> Tokenizer:
    """Returns the tokenizer on the card."""
    options = onnxruntime().SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(onnxruntime().GraphOptimizationLevel, f"ORT_{level}")
    graph = build_graph("tokenizer", model.spec, model.params, GraphOptions(target=target))
    runtime = Runtime(providers=[(CUDA, {"use_tf32": tf32})], session_options=options)
    sessions, _ = open_sessions({"tokenizer": graph}, model.spec, "auto", runtime=runtime)
    return partial(first_of, sessions["tokenizer"])


def on_pytorch(
    model: Model,
    precision: str = "float32",
    *,
    last: bool = False,
    compiled: bool = False,
    tried: bool = False,
) -> Tokenizer:
    """Returns the trainer's modules on the card.

    last: channels last. tried: whether cuDNN tries its algorithms.
    """
    module = VQVAE(model.spec, model.params).cuda()
    encoder: Callable[..., torch.Tensor] = module.encoder
    encoder = torch.compile(encoder) if compiled else encoder

    def tokens(images: Array) -> Array:
        given = torch.from_numpy(images).cuda()
        given = given.contiguous(memory_format=torch.channels_last) if last else given
        with torch.no_grad(), arithmetic(precision, one_size=tried):
            with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16"):
                latents = encoder(given)
            return np.asarray(module.quantizer(latents.float())[0].cpu().numpy())

    return tokens


def machines(model: Model) -> dict[str, Machine]:
    """Returns the machines that claim to compute in float32."""
    found = {
        f"onnxruntime, {target}, {level.lower().replace('_', ' ')}": on_onnxruntime(
            model, "0", level, target
        )
        for target in TARGETS
        for level in (LEVELS[0], LEVELS[-1])
    }
    found |= {
        "PyTorch, eager": on_pytorch(model),
        "PyTorch, channels last": on_pytorch(model, last=True),
        "PyTorch, compiled": on_pytorch(model, compiled=True),
        "PyTorch, cuDNN's fastest": on_pytorch(model, tried=True),
    }
    return {name: Machine(tokens) for name, tokens in found.items()}


def other_machines(model: Model) -> dict[str, Machine]:
    """Returns the machines that compute in another arithmetic."""
    return {
        "onnxruntime, TF32": Machine(on_onnxruntime(model, "1", LEVELS[-1], TARGETS[0])),
        "PyTorch, TF32": Machine(on_pytorch(model, "tf32")),
        "PyTorch, bfloat16": Machine(on_pytorch(model, "bfloat16")),
    }


def proved(record: Record, model: Model, images: Array, tokens: int) -> None:
    """Prints how many tokens proved for float32 differ on the card."""
    kinds = {**machines(model), **other_machines(model)}
    found, _, seen = refuted(model, images, kinds, tokens, 0)
    record.say(f"tokens proved for float32 in any order, of {seen} images")
    record.say(f"{'on the card':<50}{'compared':>12}{'differ':>8}")
    for kind, each in found.items():
        record.figures[f"proved, {kind}"] = Found(*each)._asdict()
        record.say(f"{kind:<50}{each.compared:>12,}{each.differing:>8,}")


def named(record: Record, model: Model, images: Array) -> None:
    """Prints what ``verify`` says about a card whose TF32 is on."""
    from vqdeploy.proof.advance import check_proved

    x = to_unit_interval(images)
    proof = prove(model.spec, model.params, x)
    for kind, machine in other_machines(model).items():
        check = check_proved(model.spec, model.params, x, machine.tokens(x), proof)
        record.say(f"{kind}: {check.problem or 'no proved token differs'}")
        record.figures[f"named, {kind}"] = check.problem


def tf32(record: Record, model: Model, images: Array) -> None:
    """Prints the errors of the stages with TF32 off and on."""
    x = to_unit_interval(images[:COMPARED])
    known = vqref.forward(model.spec, model.params, x)
    graphs = build_graphs(model.spec, model.params)
    record.say(f"{'TF32':<8}{'latents off':>13}{'pixels off':>12}{'tokens differ':>15}{'wrong':>7}")
    for value, name in (("0", "off"), ("1", "on")):
        runtime = Runtime(providers=[(CUDA, {"use_tf32": value})])
        sessions, _ = open_sessions(graphs, model.spec, "auto", runtime=runtime)
        latents = sessions["encoder"](x)[0]
        pixels = sessions["decoder"](known.quantized.astype(np.float32))[1]
        tokens = sessions["tokenizer"](x)[0]
        scale = np.abs(known.latents).max()
        off = float(np.abs(latents - known.latents).max() / scale)
        pixels_off = float(np.abs(pixels - known.reconstructions).max())
        differ = int((tokens != known.indices).sum())
        wrong = check_indices(
            sessions["quantizer"](latents)[0], latents, model.params[CODEBOOK], precision="float32"
        ).violations
        record.say(
            f"{name:<8}{off:>13.1e}{pixels_off:>12.1e}{differ:>9} of {tokens.size:<6}{wrong:>4}"
        )
        record.figures[f"TF32 {name}"] = {
            "latents": off, "pixels": pixels_off, "differ": differ, "tokens": tokens.size,
            "wrong": wrong,
        }  # fmt: skip


def ties(record: Record) -> None:
    """Prints the wrong tokens in the adversary's cases, for both forms of the search."""
    spec = post((1, 4, 4), base_depth=1, num_codes=K, code_size=D)
    usual = vqdeploy.graphs.quantizer.PRODUCT_ELEMENTS
    record.say(
        f"{'ties':<20}{'near ties':>10}{'direct: flips, wrong':>22}{'products: flips, wrong':>24}"
    )
    for name, case in CASES.items():
        latents, codebook = case(np.random.default_rng(5), LATENTS, K, D, "float32")
        params = vqref.init_params(spec, np.random.default_rng(0)) | {CODEBOOK: codebook}
        found = {}
        for form, elements in (("direct", usual), ("products", 1)):
            vqdeploy.graphs.quantizer.PRODUCT_ELEMENTS = elements
            graphs = {"quantizer": build_graphs(spec, params)["quantizer"]}
            sessions, _ = open_sessions(graphs, spec, "cuda")
            found[form] = check_indices(
                sessions["quantizer"](latents)[0], latents, codebook, precision="float32"
            )
        vqdeploy.graphs.quantizer.PRODUCT_ELEMENTS = usual
        told = [f"{each.flips}, {each.violations}" for each in found.values()]
        record.say(f"{name:<20}{found['direct'].near_ties:>10}{told[0]:>22}{told[1]:>24}")
        record.figures[f"ties, {name}"] = {form: asdict(each) for form, each in found.items()}


def batches(record: Record, bundle: Path, images: Array) -> None:
    """Prints whether an image's token depends on its batch, and the time of a call."""
    codec, usual = Codec.load(bundle, "cuda"), Codec.load(bundle, "cpu").encode(images[:300])
    record.say(f"{'batch':>7}{'ms, first':>11}{'ms, then':>10}{'differ from the processor':>27}")
    for n in SIZES:
        start = time.perf_counter()
        found = codec.encode(images[:n])
        first = time.perf_counter() - start
        then = float(np.median([timed(partial(codec.encode, images[:n])) for _ in range(9)]))
        differ = int((found != usual[:n]).sum())
        record.say(f"{n:>7}{1e3 * first:>11.2f}{1e3 * then:>10.2f}{differ:>20} of {found.size}")
        record.figures[f"batch {n}"] = {"first": first, "then": then, "differ": differ}
    free, total = torch.cuda.mem_get_info()
    record.say(f"memory of the card in use: {(total - free) / 2**20:.0f} MiB")


def _first(call: Callable[[Array], Any], array: Array, n: int) -> Callable[[], Any]:
    """Returns a call with the first n of an array."""
    return partial(call, array[:n])


def rates(record: Record, model: Model, folder: Path, images: Array) -> None:
    """Prints images per second."""
    x = to_unit_interval(images[:256])
    runs: dict[str, Callable[[int], Callable[[], Any]]] = {}
    for name in ("default", "fp16", "int8"):
        codec = Codec.load(folder / name, "cuda")
        runs[f"Codec, {name}, encode"] = partial(_first, codec.encode, x)
        runs[f"Codec, {name}, decode"] = partial(_first, codec.decode, codec.encode(x))
    host = Codec.load(folder / "default", "cpu")
    runs["Codec, default, encode, processor"] = lambda n: partial(host.encode, x[:n])
    eager, compiled = on_pytorch(model, last=True), on_pytorch(model, last=True, compiled=True)
    runs["PyTorch, eager, encode"] = lambda n: partial(eager, x[:n])
    runs["PyTorch, compiled, encode"] = lambda n: partial(compiled, x[:n])
    sizes = (1, 64, 256)
    record.say(f"{'images a second, by batch':<38}" + "".join(f"{n:>12}" for n in sizes))
    for name, made in runs.items():
        found = {}
        for n in sizes:
            run = made(n)
            run()
            taken = in_turns({"it": partial(timed, run)}, seconds=0.4)["it"]
            found[n] = n / float(np.median(taken))
        record.say(f"{name:<38}" + "".join(f"{found[n]:>12,.0f}" for n in sizes))
        record.figures[f"rate, {name}"] = found


def main() -> None:
    options = parser(__doc__)
    options.add_argument("model", type=Path, help="a trained model.pt")
    options.add_argument("images", type=Path, help="held-out images, or a set that has such")
    options.add_argument(
        "--tokens", type=int, default=1_000_000, help="compared in all (default: %(default)s)"
    )
    arguments = options.parse_args()
    record = Record(arguments)
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    record.say(f"{driver}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    images = held_out(arguments.images)
    model = read_model(arguments.model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        forms(record, arguments.model, to_unit_interval(images), folder)
        tf32(record, model, images)
        named(record, model, images[:COMPARED])
        proved(record, model, images, arguments.tokens)
        ties(record)
        batches(record, folder / "default", images)
        rates(record, model, folder, images)
    record.write()


if __name__ == "__main__":
    main()
