"""Sessions: what never reaches onnxruntime, what each device does, and batches that fit the memory."""

import dataclasses

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import vqref
from vqdeploy.graphs import build_graphs
from vqdeploy.sessions import Session, batch_size, open_sessions, resolve_device
from vqref.commandline import InputError, MachineError


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
    tensor = next(t for t in proto.graph.initializer if t.name == "quantizer.codebook")
    onnx.external_data_helper.set_external_data(tensor, "weights.bin")
    tensor.ClearField("raw_data")


def renamed_operator(**fields):
    def change(proto):
        for name, value in fields.items():
            setattr(proto.graph.node[0], name, value)

    return change


HOSTILE = {
    "external data": (outside, "keeps weights outside the file"),
    "an unknown operator": (renamed_operator(op_type="Loop"), "holds the operator Loop, which no bundle has"),
    "another domain": (renamed_operator(domain="com.evil"), r"holds an operator of the domain com\.evil"),
    "a function": (lambda p: p.functions.add(name="f"), "it holds functions"),
    "a sparse tensor": (lambda p: p.graph.sparse_initializer.add(), "it holds sparse tensors"),
    "a subgraph": (
        lambda p: p.graph.node[0].attribute.add(name="body", type=5).g.CopyFrom(onnx.GraphProto(name="inner")),
        "it holds subgraphs",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_no_bundle_holds_never_reaches_onnxruntime(model, kind, tmp_path, monkeypatch):
    change, message = HOSTILE[kind]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.bin").write_bytes(np.asarray(model.params["quantizer.codebook"]).tobytes())
    with pytest.raises(InputError, match=message):
        Session("quantizer", graph_changed(change)(model), model.spec, "cpu")


def test_a_graph_of_another_model_or_stage_is_refused_by_its_ports(model):
    graphs = build_graphs(model.spec, model.params)
    with pytest.raises(InputError, match=r"tokenizer\.onnx: its outputs are .*latents"):
        Session("tokenizer", graphs["encoder"], model.spec, "cpu")
    other = dataclasses.replace(model.spec, latent_size=5)
    with pytest.raises(InputError, match=r"tokenizer\.onnx: its outputs are .*\['N', 4\].* \['N', 5\]"):
        Session("tokenizer", graphs["tokenizer"], other, "cpu")


def test_batches_shrink_where_the_codebook_grows():
    assert batch_size(vqref.ModelSpec()) == 256
    assert batch_size(vqref.ModelSpec(num_codes=16_384, code_size=64)) == 32
    assert batch_size(vqref.ModelSpec(num_codes=2**20, code_size=512, latent_size=64)) == 1
    assert batch_size(vqref.ModelSpec(), cores=2) == 41
    assert batch_size(vqref.ModelSpec(), cores=64) == 256


def test_a_card_that_cannot_be_used_is_said_and_auto_takes_the_cpu(model, monkeypatch):
    monkeypatch.setattr("vqdeploy.sessions.resolve_device", lambda device: "cuda")
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
    monkeypatch.setattr("vqdeploy.sessions.cuda_devices", lambda: 0)
    with pytest.raises(MachineError, match=r"device cuda: .*; use device cpu or auto"):
        resolve_device("cuda")
    assert resolve_device("auto") == resolve_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="device is 'tpu', expected one of auto, cpu, cuda"):
        resolve_device("tpu")


def test_an_onnxruntime_without_the_cuda_provider_is_named(monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(MachineError, match="this onnxruntime has no CUDA provider; install onnxruntime-gpu"):
        resolve_device("cuda")
