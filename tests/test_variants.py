"""Graphs in other forms: tables, fixed batches, symmetric pads, opsets and precisions, each the model it says it is."""

import json

import numpy as np
import onnx
import pytest
from conftest import small_model

import vqref
from vqdeploy import Codec
from vqdeploy.bundle import Bundle
from vqdeploy.export import export, read_parameters
from vqdeploy.graphs import OPSETS, GraphOptions, build_graphs
from vqdeploy.measure import measure
from vqdeploy.sessions import open_sessions
from vqdeploy.verify import check_graphs, verify
from vqref.commandline import InputError
from vqref.spec import EMA_COUNT, EMA_MEANS
from vqtrain.checkpoint import write_model

SPEC = vqref.ModelSpec((1, 28, 28), base_depth=4, latent_size=2, num_codes=16, code_size=8)


@pytest.fixture(scope="module")
def small():
    return small_model(SPEC)


@pytest.fixture(scope="module")
def small_file(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "model.pt"
    write_model(path, small)
    return path


@pytest.fixture(scope="module")
def images(many_images):
    return (many_images[:100, None] / np.float32(255)).astype(np.float32)


def opened(model, **options):
    chosen = GraphOptions(**options)
    return open_sessions(build_graphs(model.spec, model.params, chosen), model.spec, "cpu", batch=chosen.batch)[0]


def test_a_table_gives_what_the_network_gives(small, images):
    table, network = opened(small), opened(small, fold=False)
    indices = np.stack(np.meshgrid(np.arange(16), np.arange(16), indexing="ij"), axis=-1).reshape(-1, 2)
    found = table["detokenizer"](indices)[0]
    assert found.dtype == np.float32
    assert np.abs(found - network["detokenizer"](indices)[0]).max() <= 1e-6
    exact = vqref.sigmoid(vqref.decode(small.spec, small.params, small.params["quantizer.codebook"][indices]))
    np.testing.assert_array_equal(found, exact.astype(np.float32))
    assert table["detokenizer"](indices[:0])[0].shape == (0, 1, 28, 28)


def test_a_table_is_one_node_and_is_made_only_where_it_is_small(small, model):
    graph = onnx.load_from_string(build_graphs(small.spec, small.params)["detokenizer"]).graph
    assert [node.op_type for node in graph.node] == ["GatherND"]
    assert not GraphOptions().folds(model.spec)  # 65,536 entries, but 205 MB of them
    assert GraphOptions(fold=True).folds(model.spec)
    assert not GraphOptions(fold=False).folds(small.spec)
    with pytest.raises(ValueError, match=r"fold: 64\^4 entries, at most 65536 make a table"):
        GraphOptions(fold=True).folds(vqref.ModelSpec(latent_size=4))


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("symmetric_pads", [False, True])
def test_opsets_and_symmetric_pads_compute_the_same(small, images, opset, symmetric_pads):
    options = {"opset": opset, "symmetric_pads": symmetric_pads}
    assert check_graphs(small.spec, small.params, images, opened(small, **options), folded=True).passed
    graph = onnx.load_from_string(build_graphs(small.spec, small.params, GraphOptions(**options))["encoder"]).graph
    pads = [list(a.ints) for node in graph.node if node.op_type == "Conv" for a in node.attribute if a.name == "pads"]
    assert all(p[:2] == p[2:] for p in pads) == symmetric_pads


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_graphs_for_a_processor_compute_the_same_without_its_slow_elu(small, images, precision):
    chosen = {"target": "cpu", "precision": precision, "fold": False}
    found, usual = opened(small, **chosen), opened(small, precision=precision, fold=False)
    reading = {"fp32": "float32", "fp16": "float16"}[precision]
    assert check_graphs(small.spec, small.params, images, found, precision=reading).passed
    np.testing.assert_allclose(
        found["encoder"](images)[0], usual["encoder"](images)[0], atol=1e-6 if precision == "fp32" else 1e-2
    )
    for stage, content in build_graphs(small.spec, small.params, GraphOptions(**chosen)).items():
        assert "Elu" not in {node.op_type for node in onnx.load_from_string(content).graph.node}, stage


@pytest.mark.parametrize("batch", [1, 8])
def test_a_graph_of_a_fixed_batch_answers_any_number_of_images(small, images, batch):
    fixed, free = opened(small, batch=batch), opened(small)
    for n in (0, 1, 7, 8, 19):
        np.testing.assert_array_equal(fixed["tokenizer"](images[:n])[0], free["tokenizer"](images[:n])[0])
    assert check_graphs(small.spec, small.params, images, fixed, folded=True).passed


@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("fold", [True, False])
def test_reduced_bundles_verify_and_say_what_they_lose(small, small_file, images, tmp_path, precision, fold):
    export(small_file, tmp_path / "b", options=GraphOptions(precision=precision, fold=fold), images=lambda spec: images)
    bundle = Bundle.open(tmp_path / "b")
    report, _ = verify(bundle, "cpu", images)
    assert report.passed, str(report)
    found = {check.stage: check for check in report.checks}
    assert found["encoder"].max_error > 1e-5  # it is reduced
    assert found["quantizer"].precision == "float32"
    assert (found["detokenizer"].max_error < 1e-6) == fold
    measured = bundle.manifest["measured"]
    assert (measured["images"], measured["of"]) == (100, "data")
    assert 0.5 < measured["equal_tokens"] <= 1
    assert abs(measured["nats_lost"]) < 5
    assert f"Networks in {bundle.precision}" in (tmp_path / "b" / "README.md").read_text()
    assert f"{measured['equal_tokens']:.4%} of the tokens equal" in (tmp_path / "b" / "README.md").read_text()
    full = len(build_graphs(small.spec, small.params)["encoder"])
    assert len(bundle.graph("encoder")) < 0.7 * full
    assert Codec.load(tmp_path / "b", "cpu").encode(images).shape == (100, 2)


def test_two_int8_exports_give_the_same_bytes(small_file, images, tmp_path):
    for name in ("a", "b"):
        export(small_file, tmp_path / name, options=GraphOptions(precision="int8"), images=lambda spec: images)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_a_float16_graph_called_float32_is_refuted(small, images):
    report = check_graphs(small.spec, small.params, images, opened(small, precision="fp16"), folded=True)
    assert "encoder" in [check.stage for check in report.failures]


def test_what_float16_cannot_hold_is_refused(small, tmp_path):
    params = {**small.params, "encoder.conv1.bias": small.params["encoder.conv1.bias"] + np.float32(1e5)}
    with pytest.raises(ValueError, match=r"encoder\.conv1\.bias: holds values beyond float16's 65504"):
        build_graphs(small.spec, params, GraphOptions(precision="fp16"))


def test_measuring_sees_tokens_and_nats_that_differ(small, images):
    sessions = opened(small)
    same = measure(small.spec, small.params, images, sessions)
    assert same["equal_tokens"] > 0.99
    assert abs(same["nats_lost"]) < 0.01 or same["equal_tokens"] < 1

    def zeros(batch):
        return [np.zeros((len(batch), 2), np.int64)]

    other = measure(small.spec, small.params, images, {**sessions, "tokenizer": zeros})
    assert other["equal_tokens"] < 0.9
    assert other["nats"] != same["nats"]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("whole", [True, False])
def test_parameters_in_a_file_make_the_same_graphs(small, tmp_path, suffix, whole):
    params = {name: array for name, array in small.params.items() if whole or name not in (EMA_COUNT, EMA_MEANS)}
    path = tmp_path / f"p{suffix}"
    if suffix == ".npz":
        np.savez(path, **params)
    else:
        from safetensors.numpy import save_file

        save_file(params, path)
    model, _ = read_parameters(path)
    assert model.spec == small.spec
    export(path, tmp_path / "b")
    assert Bundle.open(tmp_path / "b").graph("tokenizer") == build_graphs(small.spec, small.params)["tokenizer"]
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["provenance"]["parameters"] == path.name


def test_parameters_that_are_no_model_are_named(small, tmp_path):
    def refused(message, **params):
        np.savez(tmp_path / "p.npz", **params)
        with pytest.raises(InputError, match=message):
            read_parameters(tmp_path / "p.npz")

    refused(r"p\.npz: holds no quantizer\.codebook; its names are x", x=np.ones(2))
    refused(r"encoder\.dense\.bias: shape is \(3,\), expected \(16,\)", **{**small.params, "encoder.dense.bias": np.ones(3)})
    refused("unknown parameters: more", **small.params, more=np.ones(1))
    (tmp_path / "p.safetensors").write_bytes(b"not one")
    with pytest.raises(InputError, match="not a safetensors file"):
        read_parameters(tmp_path / "p.safetensors")
    with pytest.raises(InputError, match="No such file"):
        read_parameters(tmp_path / "none.npz")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 17}, "opset is 17"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
        ({"batch": 0}, "batch is 0"),
        ({"target": "gpu"}, "target is 'gpu'"),
    ],
)
def test_options_that_no_graph_has_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        GraphOptions(**options)
