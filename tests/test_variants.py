"""Graphs in other forms (tables, fixed batches, opsets, precisions): each is the right model."""

import dataclasses
import json
from typing import Any

import numpy as np
import onnx
import pytest
from support import sign, small_model

import vqref
from vqdeploy import Codec
from vqdeploy.agreement import check_graphs
from vqdeploy.bundle import Bundle, describe_graphs
from vqdeploy.card import write_card
from vqdeploy.export import export
from vqdeploy.graphs.build import GraphOptions, build_graphs
from vqdeploy.graphs.int8 import quantize_graphs
from vqdeploy.proof.golden import Answered
from vqdeploy.proof.measure import measure
from vqdeploy.runtime.protobuf import OPSETS
from vqdeploy.runtime.sessions import open_sessions
from vqdeploy.sources import read_parameters
from vqdeploy.stages import INDEX_TYPES, STAGES
from vqdeploy.verify import verify
from vqref import families
from vqref.agreement.report import Report
from vqref.errors import InputError
from vqref.host.images import as_batch
from vqref.spec import CODEBOOK, EMA_COUNT, EMA_MEANS
from vqtrain.modelfile import write_model

SPEC = families.post((1, 28, 28), base_depth=4, latent_size=2, num_codes=16, code_size=8)


@pytest.fixture(scope="module")
def small():
    """A model of family post, with so few tokens that its detokenizer may be a table."""
    return small_model(SPEC)


@pytest.fixture(scope="module")
def images(many_images):
    return as_batch(many_images[:100], SPEC.image_shape)


@pytest.fixture(scope="module", params=["post", "residual"])
def family(request, small, images):
    """A model of each family, and 100 images for it."""
    if request.param == "post":
        return small, images
    model = request.getfixturevalue("residual_model")
    return model, as_batch(request.getfixturevalue("colour_images")[:100], model.spec.image_shape)


@pytest.fixture
def family_file(family, tmp_path):
    write_model(tmp_path / "model.pt", family[0])
    return tmp_path / "model.pt"


def opened(model, **options):
    chosen = GraphOptions(**options)
    return open_sessions(
        build_graphs(model.spec, model.params, chosen), model.spec, "cpu", batch=chosen.batch
    )[0]


def folds(model, **options):
    return GraphOptions(**options).folds(model.spec)


def test_a_table_gives_what_the_network_gives(small):
    table, network = opened(small), opened(small, fold=False)
    indices = np.stack(np.meshgrid(np.arange(16), np.arange(16), indexing="ij"), axis=-1).reshape(
        -1, 2
    )
    found = table["detokenizer"](indices)[0]
    assert found.dtype == np.float32
    assert np.abs(found - network["detokenizer"](indices)[0]).max() <= 1e-6
    outputs = vqref.decode(small.spec, small.params, small.params[CODEBOOK][indices])
    exact = vqref.reconstruct(small.spec, outputs)
    np.testing.assert_array_equal(found, exact.astype(np.float32))
    assert table["detokenizer"](indices[:0])[0].shape == (0, 1, 28, 28)


def test_a_table_is_one_node_and_is_made_only_if_it_is_small(small, model, residual_model):
    graph = onnx.load_from_string(build_graphs(small.spec, small.params)["detokenizer"]).graph
    assert [node.op_type for node in graph.node] == ["GatherND"]
    assert not folds(model)  # 65,536 entries, but of 205 MB
    assert folds(model, fold=True)
    assert not folds(small, fold=False)
    assert not folds(residual_model)
    with pytest.raises(ValueError, match=r"fold: 64\^4 .*more than the 65536"):
        GraphOptions(fold=True).folds(families.post(latent_size=4))
    with pytest.raises(ValueError, match=r"fold: 32\^16 "):
        folds(residual_model, fold=True)


@pytest.mark.parametrize("opset", OPSETS)
def test_opsets_compute_the_same_with_equal_pads(family, opset):
    model, images = family
    found = opened(model, opset=opset)
    assert check_graphs(model.spec, model.params, images, found, folded=folds(model)).passed
    for content in build_graphs(model.spec, model.params, GraphOptions(opset=opset)).values():
        for node in onnx.load_from_string(content).graph.node:
            pads = [list(a.ints) for a in node.attribute if a.name == "pads"]
            assert all(each[:2] == each[2:] for each in pads), node.name


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_graphs_for_a_processor_compute_the_same_without_its_slow_elu(family, precision):
    model, images = family
    chosen = {"target": "cpu", "precision": precision, "fold": False}
    found, usual = opened(model, **chosen), opened(model, precision=precision, fold=False)
    reading = {"fp32": "float32", "fp16": "float16"}[precision]
    assert check_graphs(model.spec, model.params, images, found, precision=reading).passed
    np.testing.assert_allclose(
        found["encoder"](images)[0],
        usual["encoder"](images)[0],
        atol=1e-6 if precision == "fp32" else 1e-2,
    )
    for stage, content in build_graphs(model.spec, model.params, GraphOptions(**chosen)).items():
        operators = {node.op_type for node in onnx.load_from_string(content).graph.node}
        assert "Elu" not in operators, stage


@pytest.mark.parametrize("batch", [1, 8])
def test_a_graph_of_a_fixed_batch_answers_any_number_of_images(family, batch):
    model, images = family
    fixed, free = opened(model, batch=batch), opened(model)
    for n in (0, 1, 7, 8, 19):
        np.testing.assert_array_equal(
            fixed["tokenizer"](images[:n])[0], free["tokenizer"](images[:n])[0]
        )
    assert check_graphs(model.spec, model.params, images, fixed, folded=folds(model)).passed


NARROW: dict[str, dict[str, Any]] = {
    "plain": {},
    "network": {"fold": False},
    "batch of 8, opset 20, for a processor": {"batch": 8, "opset": 20, "target": "cpu"},
    "fp16": {"precision": "fp16"},
    "int8": {"precision": "int8"},
}


@pytest.mark.parametrize("form", NARROW)
def test_indices_of_int32_are_the_tokens_of_int64_and_verify(family, family_file, tmp_path, form):
    _, images = family
    for dtype in INDEX_TYPES:
        options = GraphOptions(**NARROW[form], index_type=dtype)
        export(family_file, tmp_path / dtype, options=options, images=lambda spec: images)
    wide, narrow = (Bundle.open(tmp_path / dtype) for dtype in INDEX_TYPES)
    assert [bundle.index_type for bundle in (wide, narrow)] == [*INDEX_TYPES]
    assert "index_type" not in wide.manifest
    report = verify(narrow, "cpu", images, samples=1000).report
    assert report.passed, str(report)
    cards = [(bundle.path / "README.md").read_text() for bundle in (wide, narrow)]
    assert ["`indices` are int32 in the graphs" in card for card in cards] == [False, True]
    codecs = [Codec.load(bundle.path, "cpu") for bundle in (wide, narrow)]
    expected, found = (codec.encode(images) for codec in codecs)
    assert (found.dtype, len(np.unique(found)) > 1) == (np.int64, True)
    np.testing.assert_array_equal(found, expected)
    one, other = (codec.decode(expected) for codec in codecs)
    np.testing.assert_array_equal(one, other)
    for stage in STAGES:
        graph = onnx.load_from_string(narrow.graph(stage)).graph
        ports = {port.name: port.type.tensor_type for port in (*graph.input, *graph.output)}
        assert ports.get("indices") is None or ports["indices"].elem_type == onnx.TensorProto.INT32
        before = len(onnx.load_from_string(wide.graph(stage)).graph.node)
        cast = stage in ("quantizer", "tokenizer") or (stage == "detokenizer" and narrow.folded)
        assert len(graph.node) == before + cast


def test_indices_of_a_large_codebook_may_be_int32():
    model = small_model(families.post((1, 8, 8), 2, 4, num_codes=257, code_size=32))
    images = np.random.default_rng(0).random((50, 1, 8, 8), np.float32)
    sessions = [opened(model, index_type=dtype) for dtype in INDEX_TYPES]
    wide, narrow = (each["tokenizer"](images)[0] for each in sessions)
    assert (narrow.dtype, len(np.unique(narrow)) > 16) == (np.int64, True)
    np.testing.assert_array_equal(narrow, wide)


@pytest.mark.parametrize(("written", "said"), [INDEX_TYPES, INDEX_TYPES[::-1]])
@pytest.mark.parametrize("fold", [None, False])
def test_a_manifest_that_says_another_type_of_indices_is_refuted(
    family, family_file, tmp_path, written, said, fold
):
    options = GraphOptions(index_type=written, fold=fold)
    export(family_file, tmp_path / "b", options=options)
    graphs = describe_graphs(family[0].spec, None, said)
    sign(tmp_path / "b", lambda manifest: manifest.update(graphs=graphs))
    (failed,) = verify(Bundle.open(tmp_path / "b"), "cpu").report.failures
    assert failed.stage == "graphs"
    graphs["tokenizer"]["outputs"][0]["dtype"] = "uint8"
    sign(tmp_path / "b", lambda manifest: manifest.update(graphs=graphs))
    with pytest.raises(InputError, match="inputs and outputs of the graphs are not those"):
        Bundle.open(tmp_path / "b")


@pytest.mark.parametrize("other", [{"index_type": "int32"}, {"opset": 19}])
def test_a_table_in_another_form_than_the_manifests_is_refuted(small, tmp_path, other):
    export(small, tmp_path / "b")
    options: tuple[dict[str, Any], ...] = ({}, other)
    tables = [build_graphs(small.spec, small.params, GraphOptions(**each)) for each in options]
    own, foreign = (graphs["detokenizer"] for graphs in tables)
    assert (tmp_path / "b" / "detokenizer.onnx").read_bytes() == own
    (tmp_path / "b" / "detokenizer.onnx").write_bytes(foreign)
    sign(tmp_path / "b")
    (failed,) = verify(tmp_path / "b", "cpu").report.failures
    assert failed.stage == "graphs"
    assert "detokenizer: its" in failed.problem


@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("fold", [None, False])
def test_reduced_bundles_verify_and_say_what_they_lose(
    family, family_file, tmp_path, precision, fold
):
    model, images = family
    options = GraphOptions(precision=precision, fold=fold)
    export(family_file, tmp_path / "b", options=options, images=lambda spec: images)
    bundle = Bundle.open(tmp_path / "b")
    report = verify(bundle, "cpu", images).report
    assert report.passed, str(report)
    found = {check.stage: check for check in report.checks}
    assert found["encoder"].max_error > 1e-5  # its precision is reduced
    assert found["quantizer"].precision == "float32"
    assert (found["detokenizer"].max_error < 1e-6) == folds(model, fold=fold)
    measured, card = bundle.manifest["measured"], (tmp_path / "b" / "README.md").read_text()
    assert (measured["images"], measured["of"]) == (100, "data")
    assert 0.5 < measured["equal_tokens"] <= 1
    assert abs(measured["nats_lost"]) < 5
    assert abs(measured["psnr_lost"]) < 1
    assert f"Networks in {bundle.precision}" in card
    assert f"{measured['equal_tokens']:.4%} of the tokens equal" in card
    full = len(build_graphs(model.spec, model.params)["encoder"])
    assert len(bundle.graph("encoder")) < 0.9 * full
    codec = Codec.load(tmp_path / "b", "cpu")
    assert codec.encode(images).shape == (100, model.spec.latent_size)


def test_two_int8_exports_give_the_same_bytes(family, family_file, tmp_path):
    for name in ("a", "b"):
        export(
            family_file,
            tmp_path / name,
            options=GraphOptions(precision="int8"),
            images=lambda spec: family[1],
        )
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_int8_graphs_of_a_fixed_batch_give_the_tokens_of_any(family):
    model, images = family
    out = vqref.forward(model.spec, model.params, images[:4])
    inputs = {"images": images[:4], "quantized": out.quantized.astype(np.float32)}

    def tokens(batch):
        options = GraphOptions(precision="int8", batch=batch, fold=False)
        graphs = quantize_graphs(
            build_graphs(model.spec, model.params, options), inputs, folded=False
        )
        return open_sessions(graphs, model.spec, "cpu", batch=batch)[0]["tokenizer"](images)[0]

    np.testing.assert_array_equal(tokens(8), tokens(None))


def test_a_float16_graph_called_float32_is_refuted(family):
    model, images = family
    sessions = opened(model, precision="fp16")
    report = check_graphs(model.spec, model.params, images, sessions, folded=folds(model))
    assert "encoder" in [check.stage for check in report.failures]


def test_what_float16_cannot_hold_is_refused(small):
    params = {
        **small.params,
        "encoder.conv1.bias": small.params["encoder.conv1.bias"] + np.float32(1e5),
    }
    with pytest.raises(
        ValueError, match=r"encoder\.conv1\.bias: holds values beyond float16's 65504"
    ):
        build_graphs(small.spec, params, GraphOptions(precision="fp16"))


def test_measuring_sees_tokens_nats_and_fidelity_that_differ(family):
    model, images = family
    sessions, how = opened(model), {"folded": folds(model)}
    seen = Answered.of(model.spec, model.params, images)
    same = measure(model.spec, model.params, seen, sessions, **how)
    assert same["equal_tokens"] > 0.99
    assert abs(same["nats_lost"]) < 0.01 or same["equal_tokens"] < 1
    error = np.square(images - seen.known.reconstructions)
    assert same["psnr"] == pytest.approx(-10 * np.log10(error.mean()), abs=0.1)
    assert same["nmse"] == pytest.approx(error.mean() / images.var(), rel=0.02)
    assert same["psnr_lost"] == pytest.approx(0, abs=0.01)

    def zeros(batch):
        return [np.zeros((len(batch), model.spec.latent_size), np.int64)]

    other = measure(model.spec, model.params, seen, {**sessions, "tokenizer": zeros}, **how)
    assert other["equal_tokens"] < 0.9
    for lost in ("nats_lost", "nmse_lost", "psnr_lost"):
        assert other[lost] != same[lost]
    codes = model.params[CODEBOOK][np.zeros_like(seen.known.indices)]
    outputs = vqref.decode(model.spec, model.params, codes)
    exact = vqref.nats(model.spec, images, outputs).mean()
    assert other["nats"] == pytest.approx(exact, rel=1e-5)


def test_a_card_shows_what_was_measured_and_the_block_that_hubs_read(family, family_file, tmp_path):
    export(family_file, tmp_path / "b")
    manifest = dict(Bundle.open(tmp_path / "b").manifest)
    measures = {"bound": 12.345, "bits_per_dimension": 1.5, "nmse": 0.07, "psnr": 21.9}
    measures |= {"mean_psnr": 22.5, "ssim": 0.81, "perplexity": 9.5, "codes_used": 16}
    manifest["metrics"] = {"bound": 13.0, "held_out": measures}
    spec = family[0].spec
    card = write_card(spec, manifest, Report(()))
    block = card.split("---\n")[1]
    assert card.startswith("---\nlibrary_name: onnx\n")
    assert "license" not in block
    assert "| bound, nats per image | 13.00 | 12.35 |" in card
    assert "| mean PSNR, dB |  | 22.50 |" in card
    assert "| codes used |  | 16 |" in card
    assert f"{spec.likelihood} likelihood" in card
    manifest["metrics"] = {"training_sample": measures}
    assert "a sample of the training images |" in write_card(spec, manifest, Report(()))


def written(path, params, spec=None):
    """Returns a file of parameters, with the spec as an entry if one is given."""
    said = {} if spec is None else {"spec": json.dumps(spec.to_dict())}
    if path.suffix == ".npz":
        entries = {name: np.array(text) for name, text in said.items()}
        np.savez(path, allow_pickle=False, **params, **entries)
    else:
        from safetensors.numpy import save_file

        save_file(dict(params), path, said)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("whole", [True, False])
def test_parameters_in_a_file_make_the_same_graphs(family, tmp_path, suffix, whole):
    model = family[0]
    params = {
        name: array
        for name, array in model.params.items()
        if whole or name not in (EMA_COUNT, EMA_MEANS)
    }
    path = tmp_path / f"p{suffix}"
    written(path, params, None if model.spec.family == "post" else model.spec)
    assert read_parameters(path)[0].spec == model.spec
    export(path, tmp_path / "b")
    graphs = build_graphs(model.spec, model.params)
    assert Bundle.open(tmp_path / "b").graph("tokenizer") == graphs["tokenizer"]
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert manifest["provenance"]["parameters"] == path.name


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_parameters_whose_shapes_do_not_say_everything_need_a_spec(
    residual_model, tmp_path, suffix
):
    path, params = tmp_path / f"p{suffix}", residual_model.params
    written(path, params)
    with pytest.raises(
        InputError, match=rf"p\{suffix}: .* add an entry 'spec' with the spec as JSON"
    ):
        read_parameters(path)
    written(path, params, dataclasses.replace(residual_model.spec, num_codes=7))
    with pytest.raises(InputError, match=r"quantizer\.\w+: shape is"):
        read_parameters(path)


def test_parameters_that_are_no_model_are_named(small, tmp_path):
    def refused(message, **params):
        np.savez(tmp_path / "p.npz", **params)
        with pytest.raises(InputError, match=message):
            read_parameters(tmp_path / "p.npz")

    refused(r"p\.npz: holds no quantizer\.codebook; its names are x", x=np.ones(2))
    refused(
        r"encoder\.dense\.bias: shape is \(3,\), expected \(16,\)",
        **{**small.params, "encoder.dense.bias": np.ones(3)},
    )
    refused("unknown parameters: more", **small.params, more=np.ones(1))
    refused("the entry 'spec' is float64", **small.params, spec=np.ones(1))
    refused("the entry 'spec' is not a spec: ", **small.params, spec=np.array("{"))
    refused("the entry 'spec' is not a spec: the spec lacks", **small.params, spec=np.array("{}"))
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
        ({"index_type": "uint8"}, "index_type is 'uint8', expected one of int64, int32"),
    ],
)
def test_options_that_no_graph_has_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        GraphOptions(**options)
