"""Sessions: what each device does, and batches that fit in memory."""

import numpy as np
import onnxruntime as ort
import pytest

import vqdeploy.graphs.network
from vqdeploy.graphs.build import GraphOptions, build_graphs
from vqdeploy.runtime.protobuf import read_graph
from vqdeploy.runtime.sessions import (
    CPU,
    Session,
    batch_size,
    open_sessions,
    resolve_device,
)
from vqref import init_params
from vqref.errors import MachineError
from vqref.families import post, residual

ENCODER, DIRECT = frozenset({"Conv"}), frozenset({"ArgMin"})
PRODUCTS = DIRECT | {"NonZero"}


def test_batches_hold_what_their_graph_needs_and_no_less():
    small, many = post(), post(num_codes=16_384, code_size=64)
    assert batch_size(small, ENCODER | DIRECT) == 256
    assert batch_size(small, ENCODER, cores=2) == 41  # the widest row fits in the cores' caches
    assert batch_size(small, ENCODER, cores=64) == 256
    assert batch_size(many, DIRECT) == 32  # K*D differences and their squares
    assert batch_size(many, PRODUCTS) == 256  # K scores
    assert batch_size(many, ENCODER) == 256  # no search

    grid = residual((3, 256, 256), downsample=8, num_codes=16_384)
    assert grid.latent_size == 1024
    assert batch_size(grid, DIRECT) == 1
    assert batch_size(grid, PRODUCTS) == 6
    assert batch_size(grid, ENCODER) == 42


def test_the_operators_of_a_search_are_those_that_batches_are_measured_by():
    for spec, expected in ((post(), DIRECT), (residual(num_codes=1024), PRODUCTS)):
        graph = build_graphs(spec, init_params(spec, np.random.default_rng(0)))["quantizer"]
        assert read_graph("quantizer.onnx", graph).operators & PRODUCTS == expected


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
                assert not read_graph(stage, graph).operators & {"Cast", "QuantizeLinear"}
        half = build_graphs(spec, params, GraphOptions(precision="fp16"))
        assert "Cast" in read_graph("encoder", half["encoder"]).operators
        assert "Cast" not in read_graph("quantizer", half["quantizer"]).operators


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
