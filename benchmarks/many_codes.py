"""``python -m benchmarks.many_codes``: times the search among very many codes.

Finds the nearest of 262,144 codes of 8 elements, and of 16,384 on the unit sphere, for 65,536
latents. Compares the trainer's search and the graph's, each with the bare product of its library.

All scores together would take 64 GiB. So the bare product too works in pieces, of the fastest size,
into one existing array; it finds nothing. The graph runs on 16 images of 64x64 latents. Memory is
the largest growth of a process after its inputs were there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.measure import Record, Worker, in_turns, parser, serve, summary, timed

SIDE, IMAGES = 64, 16
CASES = {"normal": (262_144, 8), "unit": (16_384, 8)}
PIECES = ((256, 1024), (1024, 1024), (1024, 4096), (4096, 256), (4096, 1024), (4096, 4096))
"""Latents and codes of a piece."""


def inputs(case: str) -> tuple[Any, Any]:
    """Latents (IMAGES, SIDE^2, D) and codebook (K, D), float32."""
    k, d = CASES[case]
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((IMAGES, SIDE**2, d), np.float32)
    codebook = rng.standard_normal((k, d), np.float32)
    if case == "unit":
        for each in (latents, codebook):
            np.divide(each, np.linalg.norm(each, axis=-1, keepdims=True), out=each)
    return latents, codebook


def torch_product(case: str) -> Callable[[], Any]:
    import torch

    latents, codebook = (torch.from_numpy(each) for each in inputs(case))
    rows = latents.flatten(0, 1)

    def pieces(m: int, n: int) -> Callable[[], Any]:
        columns = [part.T.contiguous() for part in codebook.split(n)]
        result = torch.empty(m, n)

        def run() -> None:
            for x in rows.split(m):
                for part in columns:
                    torch.mm(x, part, out=result)

        return run

    return min((pieces(*piece) for piece in PIECES), key=timed)


def trainer(case: str) -> Callable[[], Any]:
    import torch

    from vqtrain.nearest import nearest

    latents, codebook = (torch.from_numpy(each) for each in inputs(case))
    return lambda: nearest(latents, codebook)


def onnxruntime_product(case: str) -> Callable[[], Any]:
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    latents, codebook = inputs(case)
    rows = latents.reshape(-1, latents.shape[-1])

    def pieces(m: int, n: int) -> Callable[[], Any]:
        ports = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in (("x", (m, rows.shape[1])), ("y", (m, n)))
        ]
        columns = numpy_helper.from_array(np.ascontiguousarray(codebook[:n].T), "columns")
        node = helper.make_node("MatMul", ["x", "columns"], ["y"])
        graph = helper.make_graph([node], "product", ports[:1], ports[1:], [columns])
        opsets = [helper.make_opsetid("", 18)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        session = ort.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        bound = session.io_binding()
        bound.bind_ortvalue_output(
            "y", ort.OrtValue.ortvalue_from_shape_and_type((m, n), np.float32)
        )

        def run() -> None:
            for first in range(0, len(rows), m):
                bound.bind_cpu_input("x", rows[first : first + m])
                for _ in range(0, len(codebook), n):  # the same columns: a product costs the same
                    session.run_with_iobinding(bound)

        return run

    return min((pieces(*piece) for piece in PIECES), key=timed)


def graph(case: str) -> Callable[[], Any]:
    from vqdeploy.graphs.build import GraphOptions, build_graph
    from vqdeploy.runtime.sessions import open_sessions
    from vqref.families import residual
    from vqref.spec import CODEBOOK

    latents, codebook = inputs(case)
    k, d = codebook.shape
    sizes = {"hidden": 8, "blocks": 0, "block_hidden": 8, "num_codes": k, "code_size": d}
    spec = residual((3, 4 * SIDE, 4 * SIDE), **sizes)
    content = build_graph("quantizer", spec, {CODEBOOK: codebook}, GraphOptions()).to_bytes()
    session = open_sessions({"quantizer": content}, spec, "cpu")[0]["quantizer"]
    return lambda: session(latents)


KINDS = {
    "PyTorch's product": torch_product,
    "the trainer's search": trainer,
    "onnxruntime's product": onnxruntime_product,
    "the graph's search": graph,
}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=3, help="of each (default: %(default)s)")
    arguments = options.parse_args()
    record = Record(arguments)
    for case, (k, d) in CASES.items():
        record.say(f"{IMAGES * SIDE**2:,} latents, {k:,} codes of {d}, {case}")
        record.say(f"{'':<26}{'median s':>10}{'over product':>14}{'grown MiB':>11}")
        names = list(KINDS)
        for pair in (names[:2], names[2:]):
            workers = {n: Worker("benchmarks.many_codes", "serve", n, case) for n in pair}
            times = in_turns(workers, rounds=arguments.rounds)
            base = float(np.median(times[pair[0]]))
            for name in pair:
                found = summary(times[name]) | {"grown": workers[name].grown}
                record.figures[f"{case}, {name}"] = found
                record.say(
                    f"{name:<26}{found['median']:>10.2f}{found['median'] / base:>13.2f}x"
                    f"{found['grown']:>11.0f}"
                )
                workers[name].close()
    record.write()


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(KINDS[sys.argv[2]](sys.argv[3]))
    else:
        main()
