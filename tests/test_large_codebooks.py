"""Graphs whose codebook is large find the nearest code by a product, and answer as the direct form does all the same."""

import json

import numpy as np
import onnx
import pytest
from conftest import small_model
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

import vqdeploy.quantizer
import vqref
from vqdeploy import Codec
from vqdeploy.bundle import Bundle
from vqdeploy.export import export
from vqdeploy.graphs import GraphOptions, build_graphs
from vqdeploy.quantizer import takes_products
from vqdeploy.sessions import open_sessions
from vqdeploy.verify import verify
from vqref.adversary import CASES
from vqref.bounds import roundings
from vqref.checks import check_quantizer
from vqref.parity import check_indices
from vqref.spec import CODEBOOK
from vqtrain.checkpoint import write_model

K, D = 83, 7
SPEC = vqref.ModelSpec((1, 4, 4), base_depth=1, num_codes=K, code_size=D)
LARGE = vqref.ModelSpec((1, 28, 28), base_depth=2, latent_size=2, num_codes=1000, code_size=16)


@pytest.fixture
def products(monkeypatch):
    """Small codebooks count as large ones."""
    monkeypatch.setattr(vqdeploy.quantizer, "PRODUCT_ELEMENTS", 1)


def graph(codebook, spec=SPEC):
    params = vqref.init_params(spec, np.random.default_rng(0)) | {CODEBOOK: codebook.astype(np.float32)}
    return build_graphs(spec, params)["quantizer"]


def session(codebook):
    return open_sessions({"quantizer": graph(codebook)}, SPEC, "cpu")[0]["quantizer"]


def operators(content):
    return {node.op_type for node in onnx.load_from_string(content).graph.node}


def test_small_codebooks_take_the_direct_form_and_large_ones_a_product():
    assert "Gemm" not in operators(graph(np.ones((K, D))))
    assert not takes_products(vqref.ModelSpec())
    assert takes_products(LARGE)
    assert "Gemm" in operators(graph(np.ones((1000, 16)), LARGE))


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("name", CASES)
def test_no_certified_index_differs_on_an_adversary(name):
    latents, codebook = CASES[name](np.random.default_rng(1), 800, K, D, "float32")
    indices, quantized = session(codebook)(latents)
    assert (indices.shape, indices.dtype) == ((800, 1), np.int64)
    check_indices(indices, latents, codebook, precision="float32").require()
    np.testing.assert_array_equal(quantized, codebook[indices])


@pytest.mark.usefixtures("products")
def test_a_graph_with_a_product_passes_the_kit():
    def quantize(latents, codebook):
        spec = vqref.ModelSpec(
            (1, 4, 4), base_depth=1, latent_size=latents.shape[1], num_codes=len(codebook), code_size=codebook.shape[1]
        )
        sessions, _ = open_sessions({"quantizer": graph(codebook, spec)}, spec, "cpu")
        return tuple(sessions["quantizer"](np.ascontiguousarray(latents)))

    check_quantizer(quantize, num_codes=64)


@pytest.mark.usefixtures("products")
def test_onnx_reads_the_graph_as_onnxruntime_does():
    latents, codebook = CASES["bisector"](np.random.default_rng(2), 50, K, D, "float32")
    witness = ReferenceEvaluator(onnx.load_from_string(graph(codebook))).run(None, {"latents": latents})
    found = session(codebook)(latents)
    check_indices(witness[0], latents, codebook, precision="float32").require()
    check_indices(found[0], latents, codebook, precision="float32").require()
    assert (witness[0] == found[0]).mean() > 0.9


def in_tf32(array):
    """Ten bits after the point, cut off as a tensor core may."""
    return (np.asarray(array, np.float32).view(np.int32) & ~((1 << 13) - 1)).view(np.float32)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("margin", [True, False])
def test_a_product_in_tf32_changes_no_certified_index_because_of_the_margin(margin):
    """The factors of the product, and nothing else, as a card rounds them where a program leaves TF32 on."""
    latents, codebook = CASES["bisector"](np.random.default_rng(3), 2000, K, D, "float32")
    model = onnx.load_from_string(graph(codebook))
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if tensor.name == "quantizer.codes":
            tensor.CopyFrom(numpy_helper.from_array(in_tf32(array), tensor.name))
        if tensor.name == "quantizer.slope" and not margin:
            tensor.CopyFrom(numpy_helper.from_array(np.float32(0), tensor.name))
    found = ReferenceEvaluator(model).run(None, {"latents": latents})[0]
    assert check_indices(found, latents, codebook, precision="float32").passed is margin


@pytest.mark.usefixtures("products")
def test_what_is_not_a_number_or_overflows_is_an_index_all_the_same():
    rng = np.random.default_rng(4)
    latents = rng.normal(size=(6, 1, D)).astype(np.float32)
    latents[0], latents[1, 0, 2], latents[2] = np.nan, np.inf, 3e38
    indices = session(rng.normal(size=(K, D)))(latents)[0]
    assert indices.min() >= 0
    assert indices.max() < K
    assert session(rng.normal(size=(K, D)))(latents[:0])[0].shape == (0, 1)


@pytest.mark.usefixtures("products")
def test_the_margin_is_no_less_than_what_rounding_can_do():
    """Twice D + 2 roundings of the longest possible terms: the expanded form's, without its squares of latents."""
    codebook = np.random.default_rng(5).normal(size=(K, D))
    slope = next(t for t in onnx.load_from_string(graph(codebook)).graph.initializer if t.name == "quantizer.slope")
    assert numpy_helper.to_array(slope) > roundings(D + 2, 2.0**-24) * 2 + 2.0**-10


@pytest.mark.parametrize("options", [{}, {"precision": "fp16"}, {"precision": "int8"}, {"batch": 8}, {"opset": 20}])
def test_a_bundle_with_a_large_codebook_verifies_itself(tmp_path, many_images, options):
    model = small_model(LARGE)
    write_model(tmp_path / "model.pt", model)
    export(tmp_path / "model.pt", tmp_path / "b", options=GraphOptions(**options))
    bundle = Bundle.open(tmp_path / "b")
    verify(bundle, "cpu", samples=2000)[0].require()
    tokens = Codec.load(tmp_path / "b", "cpu").encode(many_images[:40])
    latents = vqref.encode(model.spec, model.params, many_images[:40, None] / 255)
    equal = (tokens == vqref.quantize(latents, model.params[CODEBOOK]).indices).mean()
    assert equal > (0.3 if options.get("precision") == "int8" else 0.99)
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["agreement"]["passed"]
