"""Sessions: what never reaches onnxruntime, what each device does, and batches that fit memory."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import vqdeploy.graphs.network
from vqdeploy.graphs.build import GraphOptions, build_graphs
from vqdeploy.runtime.protobuf import require_plain
from vqdeploy.runtime.sessions import (
    CPU,
    Session,
    batch_size,
    open_sessions,
    resolve_device,
)
from vqref import init_params
from vqref.errors import InputError, MachineError
from vqref.families import post, residual
from vqref.spec import CODEBOOK


@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x3a\x05ab", b"\xff" * 40])
def test_a_session_refuses_bytes_that_are_no_graph(model, content):
    with pytest.raises(InputError, match=r"encoder\.onnx: refused: not an ONNX file"):
        Session("encoder", content, model.spec, "cpu")


def graph_changed(change):
    """The quantizer's file after ``change`` of its ModelProto."""

    def changed(model) -> bytes:
        proto = onnx.load_from_string(build_graphs(model.spec, model.params)["quantizer"])
        change(proto)
        return proto.SerializeToString()

    return changed


def outside(proto):
    tensor = next(t for t in proto.graph.initializer if t.name == CODEBOOK)
    onnx.external_data_helper.set_external_data(tensor, "weights.bin")
    tensor.ClearField("raw_data")


def renamed_operator(**fields):
    def change(proto):
        for name, value in fields.items():
            setattr(proto.graph.node[0], name, value)

    return change


HOSTILE = {
    "external data": (outside, "keeps weights outside the file"),
    "an unknown operator": (
        renamed_operator(op_type="Loop"),
        "holds the operator Loop, which no bundle has",
    ),
    "another domain": (
        renamed_operator(domain="com.evil"),
        r"holds an operator of the domain com\.evil",
    ),
    "a function": (lambda p: p.functions.add(name="f"), "it holds functions"),
    "a sparse tensor": (lambda p: p.graph.sparse_initializer.add(), "it holds sparse tensors"),
    "a subgraph": (
        lambda p: (
            p.graph.node[0]
            .attribute.add(name="body", type=5)
            .g.CopyFrom(onnx.GraphProto(name="inner"))
        ),
        "it holds subgraphs",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_no_bundle_holds_never_reaches_onnxruntime(model, kind, tmp_path, monkeypatch):
    change, message = HOSTILE[kind]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.bin").write_bytes(np.asarray(model.params[CODEBOOK]).tobytes())
    with pytest.raises(InputError, match=message):
        Session("quantizer", graph_changed(change)(model), model.spec, "cpu")


def test_a_graph_of_another_model_or_stage_is_refused_by_its_ports(model):
    graphs = build_graphs(model.spec, model.params)
    with pytest.raises(InputError, match=r"tokenizer\.onnx: its outputs are .*latents"):
        Session("tokenizer", graphs["encoder"], model.spec, "cpu")
    other = post((1, 28, 28), base_depth=4, latent_size=5, num_codes=16, code_size=8)
    with pytest.raises(
        InputError, match=r"tokenizer\.onnx: its outputs are .*\['N', 4\].* \['N', 5\]"
    ):
        Session("tokenizer", graphs["tokenizer"], other, "cpu")


ENCODER, DIRECT = frozenset({"Conv"}), frozenset({"ArgMin"})
PRODUCTS = DIRECT | {"NonZero"}


def test_batches_hold_what_their_graph_needs_and_no_less():
    small, many = post(), post(num_codes=16_384, code_size=64)
    assert batch_size(small, ENCODER | DIRECT) == 256
    assert batch_size(small, ENCODER, cores=2) == 41  # the widest row in the cores' caches
    assert batch_size(small, ENCODER, cores=64) == 256
    assert batch_size(many, DIRECT) == 32  # K*D differences and their squares
    assert batch_size(many, PRODUCTS) == 256  # K scores
    assert batch_size(many, ENCODER) == 256  # no search

    grid = residual((3, 256, 256), downsample=8, num_codes=16_384)
    assert grid.latent_size == 1024
    assert batch_size(grid, DIRECT) == 1
    assert batch_size(grid, PRODUCTS) == 2
    assert batch_size(grid, ENCODER) == 42


def test_the_operators_of_a_search_are_those_that_batches_are_measured_by():
    for spec, expected in ((post(), DIRECT), (residual(num_codes=1024), PRODUCTS)):
        graph = build_graphs(spec, init_params(spec, np.random.default_rng(0)))["quantizer"]
        assert require_plain("quantizer.onnx", graph) & PRODUCTS == expected


def test_large_inputs_run_in_parts_and_give_the_same(model):
    graph = build_graphs(model.spec, model.params)["quantizer"]
    latents = np.random.default_rng(0).normal(size=(10, 4, 8)).astype(np.float32)
    session = Session("quantizer", graph, model.spec, "cpu")
    whole = session(latents)
    session._largest = 3
    for found, expected in zip(session(latents), whole, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_placement_counts_every_operator_by_provider(model):
    session = Session(
        "quantizer", build_graphs(model.spec, model.params)["quantizer"], model.spec, "cpu"
    )
    ((provider, operators),) = session.placement().items()
    assert provider == CPU
    assert operators["ArgMin"] == operators["Gather"] == 1


def test_float16_and_int8_are_known_by_operators_that_float32_graphs_lack():
    for spec in (post(num_codes=4), residual(hidden=8, block_hidden=4, num_codes=1024)):
        params = init_params(spec, np.random.default_rng(0))
        for target in ("any", "cpu"):
            for stage, graph in build_graphs(spec, params, GraphOptions(target=target)).items():
                assert not require_plain(stage, graph) & {"Cast", "QuantizeLinear"}
        half = build_graphs(spec, params, GraphOptions(precision="fp16"))
        assert "Cast" in require_plain("encoder", half["encoder"])
        assert "Cast" not in require_plain("quantizer", half["quantizer"])


def test_a_graph_that_onnx_files_cannot_hold_is_refused_before_it_is_written(model, monkeypatch):
    monkeypatch.setattr(vqdeploy.graphs.network, "GRAPH_BYTES", 10_000)
    with pytest.raises(
        ValueError, match=r"encoder\..*: its graph would hold .* more than the 2 GiB"
    ):
        build_graphs(model.spec, model.params)


@pytest.mark.parametrize(
    ("options", "folds"),
    [
        ({"num_codes": 64}, True),
        ({"num_codes": 2, "latent_size": 16}, False),
        ({"latent_size": 3}, False),
    ],
)
def test_small_tables_alone_are_folded(options, folds):
    spec = post((1, 28, 28), 2, **options)
    assert GraphOptions().folds(spec) is folds


def test_tables_of_grids_are_refused_without_counting_them():
    spec = residual((3, 256, 256), num_codes=16_384)
    assert not GraphOptions().folds(spec)
    with pytest.raises(ValueError, match=r"fold: 16384\^4096 different rows of indices are more"):
        GraphOptions(fold=True).folds(spec)


def test_a_card_that_cannot_be_used_is_said_and_auto_takes_the_cpu(model, monkeypatch):
    monkeypatch.setattr("vqdeploy.runtime.sessions.resolve_device", lambda device: "cuda")
    original = Session.__init__

    def failing(self, stage, content, spec, device, **options):
        if device == "cuda":
            raise MachineError("no libcublas")
        original(self, stage, content, spec, device)

    monkeypatch.setattr(Session, "__init__", failing)
    graphs = {"encoder": build_graphs(model.spec, model.params)["encoder"]}
    with pytest.warns(RuntimeWarning, match=r"cannot be used: no libcublas; running on the CPU"):
        _, device = open_sessions(graphs, model.spec, "auto")
    assert device == "cpu"
    with pytest.raises(MachineError, match="no libcublas"):
        open_sessions(graphs, model.spec, "cuda")


def test_cuda_where_there_is_none_is_an_error_and_auto_takes_the_cpu(monkeypatch):
    monkeypatch.setattr("vqdeploy.runtime.sessions.cuda_devices", lambda: 0)
    with pytest.raises(MachineError, match=r"device cuda: .*; use device cpu or auto"):
        resolve_device("cuda")
    assert resolve_device("auto") == resolve_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="device is 'tpu', expected one of auto, cpu, cuda"):
        resolve_device("tpu")


def test_an_onnxruntime_without_the_cuda_provider_is_named(monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(
        MachineError, match="this onnxruntime has no CUDA provider; install onnxruntime-gpu"
    ):
        resolve_device("cuda")
