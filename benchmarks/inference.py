"""``python -m benchmarks.inference MODEL``: encodes 256 images by ours, by onnxruntime alone and by
PyTorch, and compares the search of a large codebook in the graph with the direct form.

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
from vqref.families import post
from vqref.spec import CODEBOOK

BATCH = 256
LARGE = ((1024, 16), (4096, 16), (16_384, 64))
"""Codebooks (K, D) of the search."""


def images(bundle: Path) -> Any:
    from vqdeploy.bundle import Bundle
    from vqdeploy.proof.samples import draw_images

    found = Bundle.open(bundle)
    return draw_images(found.spec, found.oracle().params, BATCH)


def codec(bundle: Path) -> Callable[[], Any]:
    from vqdeploy import Codec

    return partial(Codec.load(bundle, "cpu").encode, images(bundle))


def bare(bundle: Path) -> Callable[[], Any]:
    import onnxruntime as ort

    session = ort.InferenceSession(
        (bundle / "tokenizer.onnx").read_bytes(), providers=["CPUExecutionProvider"]
    )
    return partial(session.run, None, {"images": images(bundle)})


def torch_encoder(bundle: Path, *, compiled: bool) -> Callable[[], Any]:
    """Returns the bundle's parameters in PyTorch's own modules, followed by codebook and cdist."""
    import torch

    from benchmarks.peers import Rows
    from vqdeploy.bundle import Bundle

    found = Bundle.open(bundle)
    params = found.oracle().params
    encoder = Rows(found.spec.encoder).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    values = [
        torch.from_numpy(array) for name, array in params.items() if name.startswith("encoder.")
    ]
    for parameter, value in zip(encoder.parameters(), values, strict=True):
        parameter.data.copy_(value)
    codebook, batch = torch.from_numpy(params[CODEBOOK]), torch.from_numpy(images(bundle))

    def encode(x: torch.Tensor) -> torch.Tensor:
        return torch.cdist(encoder(x).reshape(-1, found.spec.code_size), codebook).argmin(-1)

    chosen = torch.compile(encode) if compiled else encode

    def run() -> Any:
        with torch.no_grad():
            return chosen(batch)

    run()
    return run


KINDS: dict[str, Callable[[Path], Callable[[], Any]]] = {
    "codec": codec,
    "bare": bare,
    "eager": partial(torch_encoder, compiled=False),
    "compiled": partial(torch_encoder, compiled=True),
}


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
    arguments = options.parse_args()
    record = Record(arguments)

    from vqdeploy.bundle import Bundle
    from vqdeploy.export import export
    from vqdeploy.graphs.build import GraphOptions

    with tempfile.TemporaryDirectory() as folder:
        paths = {target: Path(folder) / target for target in ("any", "cpu")}
        for target, path in paths.items():
            export(arguments.model, path, options=GraphOptions(target=target))
        wanted = {
            "ours, --target cpu": ("codec", "cpu"),
            "ours": ("codec", "any"),
            "onnxruntime by itself": ("bare", "any"),
            "PyTorch, eager": ("eager", "any"),
            "PyTorch, torch.compile": ("compiled", "any"),
        }
        workers: dict[str, Worker] = {}
        for name, (kind, target) in wanted.items():
            try:
                workers[name] = Worker("benchmarks.inference", "serve", kind, str(paths[target]))
            except RuntimeError as error:
                record.say(f"{name}: skipped: {error}")
        spec = Bundle.open(paths["any"]).spec
        times = in_turns(workers, rounds=arguments.rounds, warm_up=2, pause=0.1)
        for worker in workers.values():
            worker.close()
    needed = BATCH * sum(2 * layer.products for layer in spec.encoder)
    limit = needed / product_rates()["float32"]
    record.say(
        f"{f'encode, {BATCH} images':<28}{'median ms':>10}{'10-90 %':>14}{'images/s':>10}"
        f"{'over ours':>11}{'of limit':>10}"
    )
    found = {name: summary(taken) for name, taken in times.items()}
    ours = found["ours, --target cpu"]["median"]
    for name, row in found.items():
        record.say(
            f"{name:<28}{1e3 * row['median']:>10.1f}"
            f"{1e3 * row['low']:>8.1f}-{1e3 * row['high']:<5.1f}{BATCH / row['median']:>10.0f}"
            f"{row['median'] / ours:>10.2f}x{limit / row['median']:>10.0%}"
        )
    record.say(
        f"limit: {needed / 1e9:.1f} Gflop at the best product's "
        f"{needed / limit / 1e9:.0f} Gflop/s (float32)"
    )
    record.figures = {"encode": found, "limit": limit, "operations": needed}
    search(record)
    record.write()


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(KINDS[sys.argv[2]](Path(sys.argv[3])))
    else:
        main()
