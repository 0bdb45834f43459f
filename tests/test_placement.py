"""Every graph runs wholly on CUDA; this is shown without a card.

onnxruntime's own CUDA provider says which nodes it takes, with libraries that do nothing (see
``cuda_stub``).
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from cuda_stub import build as stub
from support import VQGAN

import vqref
from vqdeploy.graphs.build import TARGETS, GraphOptions, build_graphs
from vqdeploy.graphs.int8 import quantize_graphs
from vqdeploy.graphs.network import GraphBuilder
from vqdeploy.graphs.prior import build_prior_graph
from vqdeploy.runtime.protobuf import OPSETS, Graph
from vqdeploy.runtime.sessions import CPU, CUDA
from vqdeploy.stages import PRIOR_STAGES, Port
from vqref.families import post, residual, vqgan
from vqref.prior import categorical, transformer
from vqref.spec import Layer

needs_stub = pytest.mark.skipif(stub.obstacle() is not None, reason=str(stub.obstacle()))

GREY, COLOUR = (1, 8, 8), (3, 16, 16)
SMALL: dict[str, Any] = {"hidden": 8, "block_hidden": 4, "blocks": 1}
LARGE: dict[str, Any] = {"num_codes": 257, "code_size": 32}
MODELS = {
    "post 1": post(GREY, 2, 1, 16, 4),
    "post 4": post(GREY, 2, 4, 4, 4),
    "post 4, large codebook": post(GREY, 2, 4, **LARGE),
    "residual": residual(COLOUR, **SMALL, num_codes=16, code_size=4),
    "residual, large codebook": residual(COLOUR, **SMALL, **LARGE),
    "residual, deep, logistic": residual(
        COLOUR, **SMALL, downsample=8, depth=2, num_codes=16, code_size=4, likelihood="logistic"
    ),
    "residual, a grid of codes": residual(
        COLOUR, **SMALL, num_codes=60, code_size=3, levels=(5, 4, 3)
    ),
    "vqgan": vqgan(COLOUR, **VQGAN),
    "vqgan of unit codes, large codebook": vqgan(COLOUR, **{**VQGAN, **LARGE}, normalized=True),
}

VARIANTS: dict[str, dict[str, Any]] = {
    **{
        f"{precision}, opset {opset}, {target}": {
            "precision": precision,
            "opset": opset,
            "target": target,
        }
        for precision, opset, target in itertools.product(("fp32", "fp16"), OPSETS, TARGETS)
    },
    **{f"int8, opset {opset}": {"precision": "int8", "opset": opset} for opset in OPSETS},
    "batch of 8": {"batch": 8},
    "network": {"fold": False},
    "int32, table": {"index_type": "int32"},
    "int32, network": {"index_type": "int32", "fold": False},
    "int32, batch of 8": {"index_type": "int32", "batch": 8},
    "int32, fp16": {"index_type": "int32", "precision": "fp16"},
    "int32, int8": {"index_type": "int32", "precision": "int8"},
}


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda")
    stub.build(folder)
    return folder


@pytest.fixture
def python(libraries):
    """Runs Python so that onnxruntime finds the libraries; returns the JSON that it prints."""

    def run(*arguments, **environment):
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            env={**os.environ, "LD_LIBRARY_PATH": str(libraries), **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert environment or not done.stderr  # onnxruntime logs a failing run itself
        return json.loads(done.stdout)

    return run


@pytest.fixture
def place(python):
    return lambda *arguments: python(Path(stub.__file__).parent / "place.py", *arguments)


def write(folder, spec, graphs, batch=None):
    folder.mkdir()
    for stage, content in graphs.items():
        (folder / f"{stage}.onnx").write_bytes(content)
    (folder / "spec.json").write_text(json.dumps({"spec": spec.to_dict(), "batch": batch}))


def graphs_of(spec, **options):
    params = vqref.init_params(spec, np.random.default_rng(0))
    graphs = build_graphs(spec, params, GraphOptions(**options))
    if options.get("precision") != "int8":
        return graphs
    images = np.random.default_rng(1).random((2, *spec.image_shape), np.float32)
    out = vqref.forward(spec, params, images)
    inputs: dict[str, np.ndarray] = {"images": images, "indices": out.indices}
    inputs["quantized"] = out.quantized.astype(np.float32)
    return quantize_graphs(graphs, inputs, folded=GraphOptions(**options).folds(spec))


def violations(found):
    """Returns the graphs that are not wholly on CUDA, and copies within a graph."""
    return [
        name
        for name, graph in found.items()
        if set(graph.get("placement", ())) != {CUDA}
        or any("Memcpy" in operator for operator in graph["operators"])
    ]


@needs_stub
def test_both_graphs_of_a_prior_are_placed_wholly_on_cuda(place, tmp_path):
    priors = {
        "transformer": transformer(6, 9, width=8, depth=2, heads=2),
        "categorical": categorical(np.zeros((1, 4), int), 5)[0],
    }
    variants: list[dict[str, Any]] = [{}, {"opset": 20}, {"batch": 8}, {"index_type": "int32"}]
    for name, spec in priors.items():
        params = vqref.init_params(spec, np.random.default_rng(0))
        for i, options in enumerate(variants):
            graphs = {
                stage: build_prior_graph(stage, spec, params, GraphOptions(**options)).to_bytes()
                for stage in PRIOR_STAGES
            }
            write(tmp_path / f"{name} {i}", spec, graphs, options.get("batch"))
    found = place(tmp_path)
    assert len(found) == 2 * 2 * len(variants)
    assert not violations(found), {name: found[name] for name in violations(found)}


@needs_stub
@pytest.mark.parametrize("model", MODELS)
def test_every_variant_is_placed_wholly_on_cuda(model, place, tmp_path):
    spec = MODELS[model]
    for name, options in VARIANTS.items():
        write(tmp_path / name, spec, graphs_of(spec, **options), options.get("batch"))
    found = place(tmp_path)
    assert len(found) == 5 * len(VARIANTS)
    assert not violations(found)
    folded = "GatherND" in found["batch of 8/detokenizer"]["operators"]
    assert folded == GraphOptions().folds(spec)
    # TF32 is on only for graphs with float16 networks.
    tf32 = {name for name, graph in found.items() if graph["use_tf32"] == "1"}
    networks = {"encoder", "decoder", "tokenizer", *(() if folded else ("detokenizer",))}
    reduced = [name for name, options in VARIANTS.items() if options.get("precision") == "fp16"]
    assert tf32 == {f"{name}/{stage}" for name in reduced for stage in networks}


@needs_stub
def test_the_checker_fails_on_a_node_that_cuda_lacks_and_on_copies(place, tmp_path):
    """The provider has no ArgMin that takes the last index on a tie."""
    spec = MODELS["post 1"]
    model = onnx.load_from_string(graphs_of(spec)["quantizer"])
    (last,) = [a for n in model.graph.node for a in n.attribute if a.name == "select_last_index"]
    last.i = 1
    write(tmp_path / "last", spec, {"quantizer": model.SerializeToString(deterministic=True)})

    refused = place(tmp_path)["last/quantizer"]["error"]
    assert refused.startswith(f"quantizer.onnx: onnxruntime cannot run it on {CUDA}: ")
    assert "\n" not in refused

    found = place(tmp_path, CUDA, CPU)
    graph = found["last/quantizer"]
    assert graph["placement"][CPU] == {"ArgMin": 1}
    assert {"MemcpyFromHost", "MemcpyToHost"} <= set(graph["operators"])
    assert violations(found) == ["last/quantizer"]


OPEN = """
import json, sys, warnings
import vqref
from vqdeploy.graphs.build import build_graphs
from vqdeploy.runtime.sessions import open_sessions
from vqref.errors import MachineError, Remark
from vqref.families import post

import numpy as np

spec = post((1, 8, 8), 2, 1, 16, 4)
graphs = build_graphs(spec, vqref.init_params(spec, np.random.default_rng(0)))
found = {}
for device in ("cuda", "auto"):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", RuntimeWarning)
        try:
            found[device] = open_sessions(graphs, spec, device)[1]
        except MachineError as error:
            found[device] = str(error)
    found[f"{device} warns"] = [str(w.message) for w in said if w.category is Remark]
print(json.dumps(found))
"""


@needs_stub
def test_a_first_run_that_fails_is_the_machines_error_and_auto_takes_the_cpu(python):
    """cuDNN may find no engine for a layer. This shows only at the first run."""
    whole = {"cuda": "cuda", "auto": "cuda", "cuda warns": [], "auto warns": []}
    assert python("-c", OPEN) == whole
    found = python("-c", OPEN, STUB_CUDNN_STATUS="5000")
    line = f"encoder.onnx: its first run on {CUDA} failed: "
    assert found["cuda"].startswith(line)
    assert "\n" not in found["cuda"]
    assert found["auto"] == "cpu"
    (warned,) = found["auto warns"]
    assert warned.startswith(f"there is a CUDA device, but it cannot be used: {line}")


@needs_stub
def test_a_command_whose_first_run_fails_says_so_in_one_line(libraries, bundle):
    done = subprocess.run(
        [sys.executable, "-m", "vqdeploy", "verify", str(bundle), "--device", "cuda"],
        env={**os.environ, "LD_LIBRARY_PATH": str(libraries), "STUB_CUDNN_STATUS": "5000"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 5
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"vqdeploy: encoder.onnx: its first run on {CUDA} failed: ")


ROWS = {
    "the post's": ((28, 28), (5, 5), 2, ((1, 2), (1, 2))),
    "an odd image": ((27, 28), (5, 5), 2, ((2, 2), (1, 2))),
    "an even kernel": ((9, 9), (4, 2), 1, ((1, 2), (0, 1))),
    "more at the beginning": ((8, 8), (3, 3), 1, ((2, 0), (3, 1))),
    "far more at the end": ((16, 17), (5, 4), 2, ((0, 4), (1, 2))),
    "equal": ((8, 8), (4, 4), 2, ((1, 1), (1, 1))),
}


def conv_row(size, kernel, stride, pads, kind="conv"):
    if kind == "conv":
        out = [(n + sum(p) - k) // stride + 1 for n, p, k in zip(size, pads, kernel, strict=True)]
    else:
        out = [stride * (n - 1) + k - sum(p) for n, p, k in zip(size, pads, kernel, strict=True)]
    return Layer("encoder.row", kind, (16, *size), (32, *out), (), "linear", kernel, stride, pads)


def run_row(builder, row, x):
    """Returns the value "y" of the builder's nodes for ``x``, by onnxruntime's CPU provider."""
    ports = [
        Port(name, "float32", ("N", *shape))
        for name, shape in (("x", row.in_shape), ("y", row.out_shape))
    ]
    graph = Graph(
        "row", OPSETS[0], tuple(ports[:1]), tuple(ports[1:]), tuple(builder.nodes), builder.tensors
    )
    session = ort.InferenceSession(graph.to_bytes(), providers=[CPU])
    return session.run(None, {"x": x})[0]


def builders(row, rng):
    """Returns two builders of the row, ours and one with the row's own pads, and an input."""
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in row.parameters}
    ours, plain = GraphBuilder(params), GraphBuilder(params)
    ours.run([row], "x", "y")
    (top, bottom), (left, right) = row.pads
    plain.node(
        {"conv": "Conv", "conv_transpose": "ConvTranspose"}[row.kind],
        ["x", *plain.weights(row)],
        "y",
        kernel_shape=row.kernel,
        strides=[row.stride] * 2,
        pads=[top, left, bottom, right],
    )
    return ours, plain, rng.normal(size=(3, *row.in_shape)).astype(np.float32)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("kind", ["conv", "conv_transpose"])
def test_equal_pads_give_the_bits_of_the_rows_own(kind, name):
    row = conv_row(*ROWS[name], kind)
    ours, plain, x = builders(row, np.random.default_rng(0))
    for node in ours.nodes:
        for attribute in onnx.NodeProto.FromString(node.attributes).attribute:
            if attribute.name == "pads":
                assert list(attribute.ints[:2]) == list(attribute.ints[2:])
    assert {node.operator for node in ours.nodes} <= {"Conv", "ConvTranspose", "Slice"}
    if name == "equal":
        assert len(ours.nodes) == 1
    found, expected = run_row(ours, row, x), run_row(plain, row, x)
    assert found.shape == expected.shape == (3, *row.out_shape)
    np.testing.assert_array_equal(found, expected)
