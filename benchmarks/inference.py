"""``python -m benchmarks.inference MODEL``: encodes 256 images and one by ours, onnxruntime alone
and PyTorch, decodes as many unless the decoder is a table, and compares the search of a large
codebook in the graph with the direct form.

Each implementation works in a process of its own, with its own choice of threads, in turns. Ours is
the Codec on a bundle made for the CPU (``export --target cpu``) and on the default bundle. The
peers are onnxruntime on the same file, with the batch in one piece, and PyTorch's own modules with
channels last, eager and by torch.compile (skipped without a C++ compiler).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import vqref
from benchmarks.measure import (
    Record,
    Worker,
    in_turns,
    parser,
    product_rates,
    serve,
    summary,
    timed,
)
from vqdeploy.bundle import Bundle
from vqref.families import post
from vqref.spec import CODEBOOK, Layer, ModelSpec

BATCH = 256
LARGE = ((1024, 16), (4096, 16), (16_384, 64))
"""Codebooks (K, D) of the search."""


def given(bundle: Path, direction: str, count: int) -> Any:
    """Returns what a direction takes: drawn images, or random tokens."""
    from vqdeploy.proof.samples import draw_images

    found = Bundle.open(bundle)
    if direction == "encode":
        return draw_images(found.spec, found.oracle().params, count)
    rng = np.random.default_rng(0)
    return rng.integers(found.spec.num_codes, size=(count, found.spec.latent_size))


def codec(bundle: Path, direction: str, count: int) -> Callable[[], Any]:
    from vqdeploy import Codec

    run = getattr(Codec.load(bundle, "cpu"), direction)
    return partial(run, given(bundle, direction, count))


def bare(bundle: Path, direction: str, count: int) -> Callable[[], Any]:
    import onnxruntime as ort

    stage = {"encode": "tokenizer", "decode": "detokenizer"}[direction]
    session = ort.InferenceSession(
        (bundle / f"{stage}.onnx").read_bytes(), providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    return partial(session.run, None, {name: given(bundle, direction, count)})


def network_of(spec: ModelSpec, direction: str) -> tuple[str, tuple[Layer, ...]]:
    """Returns the name and the rows of the network that works in a direction."""
    return ("encoder", spec.encoder) if direction == "encode" else ("decoder", spec.decoder)


def torch_modules(bundle: Path, direction: str, count: int, *, compiled: bool) -> Callable[[], Any]:
    """The bundle's parameters in PyTorch's own modules, with the codebook and cdist."""
    import torch

    from benchmarks.peers import Rows
    from vqtrain.likelihoods import mean

    found = Bundle.open(bundle)
    params, spec = found.oracle().params, found.spec
    name, rows = network_of(spec, direction)
    network = Rows(rows).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    values = [torch.from_numpy(params[each]) for each in params if each.startswith(f"{name}.")]
    for parameter, value in zip(network.parameters(), values, strict=True):
        parameter.data.copy_(value)
    codebook = torch.from_numpy(params[CODEBOOK])

    def encode(x: torch.Tensor) -> torch.Tensor:
        return torch.cdist(network(x).reshape(-1, spec.code_size), codebook).argmin(-1)

    def decode(x: torch.Tensor) -> torch.Tensor:
        return mean(spec, network(codebook[x]))

    body = {"encode": encode, "decode": decode}[direction]
    chosen = torch.compile(body) if compiled else body
    batch = torch.from_numpy(given(bundle, direction, count))

    def run() -> Any:
        with torch.no_grad():
            return chosen(batch)

    run()
    return run


KINDS: dict[str, Callable[[Path, str, int], Callable[[], Any]]] = {
    "codec": codec,
    "bare": bare,
    "eager": partial(torch_modules, compiled=False),
    "compiled": partial(torch_modules, compiled=True),
}

IMPLEMENTATIONS = {
    "ours, --target cpu": ("codec", "cpu"),
    "ours": ("codec", "any"),
    "onnxruntime by itself": ("bare", "any"),
    "PyTorch, eager": ("eager", "any"),
    "PyTorch, torch.compile": ("compiled", "any"),
}
"""What the table calls them, their kind, and the target of their bundle."""


def compare(
    record: Record, paths: dict[str, Path], direction: str, count: int, rounds: int, rate: float
) -> None:
    """Measures all implementations in one direction at one batch size.

    rate: operations per second of the best product.
    """
    workers: dict[str, Worker] = {}
    for name, (kind, target) in IMPLEMENTATIONS.items():
        words = "serve", kind, str(paths[target]), direction, str(count)
        try:
            workers[name] = Worker("benchmarks.inference", *words)
        except RuntimeError as error:
            record.say(f"{name}: skipped: {error}")
    times = in_turns(workers, rounds=rounds, warm_up=2, pause=0.1)
    for worker in workers.values():
        worker.close()
    _, rows = network_of(Bundle.open(paths["any"]).spec, direction)
    limit = count * sum(2 * layer.products for layer in rows) / rate
    plural = "s" if count > 1 else ""
    record.say(
        f"{f'{direction}, {count} image{plural}':<28}{'median ms':>10}{'10-90 %':>14}"
        f"{'images/s':>10}{'over ours':>11}{'of limit':>10}"
    )
    found = {name: summary(taken) for name, taken in times.items()}
    ours = found["ours, --target cpu"]["median"]
    for name, row in found.items():
        record.say(
            f"{name:<28}{1e3 * row['median']:>10.2f}"
            f"{1e3 * row['low']:>8.2f}-{1e3 * row['high']:<6.2f}{count / row['median']:>9.0f}"
            f"{row['median'] / ours:>10.2f}x{limit / row['median']:>10.0%}"
        )
    record.figures[f"{direction}, {count}"] = {"times": found, "limit": limit}


def search(record: Record) -> None:
    """Measures the quantizer's graph on 256 latents, by the direct form and by products."""
    import vqdeploy.graphs.quantizer
    from vqdeploy.graphs.build import build_graphs
    from vqdeploy.runtime.sessions import open_sessions

    record.say(f"{'nearest code, 256 latents':<28}{'direct ms':>10}{'product ms':>11}{'faster':>8}")
    rng = np.random.default_rng(0)
    usual = vqdeploy.graphs.quantizer.PRODUCT_ELEMENTS
    for k, d in LARGE:
        spec = post((1, 4, 4), base_depth=1, num_codes=k, code_size=d)
        params = vqref.init_params(spec, rng) | {
            CODEBOOK: rng.normal(size=(k, d)).astype(np.float32)
        }
        latents = rng.normal(size=(BATCH, 1, d)).astype(np.float32)
        runs: dict[str, Callable[[], float]] = {}
        for name, elements in (("direct", 2**62), ("product", 1)):
            vqdeploy.graphs.quantizer.PRODUCT_ELEMENTS = elements
            sessions, _ = open_sessions(
                {"quantizer": build_graphs(spec, params)["quantizer"]}, spec, "cpu"
            )
            runs[name] = partial(timed, partial(sessions["quantizer"], latents))
        vqdeploy.graphs.quantizer.PRODUCT_ELEMENTS = usual
        found = {
            name: summary(taken) for name, taken in in_turns(runs, rounds=9, pause=0.05).items()
        }
        record.figures[f"search, {k} x {d}"] = found
        direct, product = (1e3 * found[name]["median"] for name in ("direct", "product"))
        record.say(
            f"  {k} codes of {d:<14}{direct:>12.2f}{product:>11.2f}{direct / product:>7.1f}x"
        )


def main() -> None:
    options = parser(__doc__)
    options.add_argument("model", type=Path, help="a model.pt")
    options.add_argument("--rounds", type=int, default=25, help="of each (default: %(default)s)")
    options.add_argument(
        "--no-search", dest="search", action="store_false", help="leave the search out"
    )
    arguments = options.parse_args()
    record = Record(arguments)

    from vqdeploy.export import export
    from vqdeploy.graphs.build import GraphOptions

    rate = product_rates()["float32"]
    with tempfile.TemporaryDirectory() as folder:
        paths = {target: Path(folder) / target for target in ("any", "cpu")}
        for target, path in paths.items():
            export(arguments.model, path, options=GraphOptions(target=target))
        spec = Bundle.open(paths["any"]).spec
        for count in (BATCH, 1):
            compare(record, paths, "encode", count, arguments.rounds, rate)
        if not GraphOptions().folds(spec):
            for count in (BATCH, 1):
                compare(record, paths, "decode", count, arguments.rounds, rate)
    record.say(f"limit: the best product's {rate / 1e9:.0f} Gflop/s (float32)")
    if arguments.search:
        search(record)
    record.write()


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(KINDS[sys.argv[2]](Path(sys.argv[3]), sys.argv[4], int(sys.argv[5])))
    else:
        main()
