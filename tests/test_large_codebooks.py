"""Graphs with a large codebook search by a product, and answer as the direct form does."""

import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from support import small_model

import vqdeploy.graphs.quantizer
import vqdeploy.search
import vqref
from vqdeploy import Codec
from vqdeploy.bundle import Bundle
from vqdeploy.export import export
from vqdeploy.graphs.build import GraphOptions, build_graph
from vqdeploy.graphs.quantizer import takes_parts, takes_products
from vqdeploy.runtime.sessions import open_sessions
from vqdeploy.verify import verify
from vqref.agreement.bounds import distance_error, roundings, score_slack
from vqref.agreement.parity import check_indices
from vqref.checks.adversary import CASES
from vqref.checks.checks import check_quantizer
from vqref.families import post, residual
from vqref.spec import CODEBOOK
from vqtrain.modelfile import write_model

K, D = 83, 7
LARGE = post((1, 28, 28), base_depth=2, latent_size=2, num_codes=1000, code_size=16)
GRID = residual((3, 16, 16), hidden=16, blocks=1, block_hidden=8, num_codes=1000, code_size=16)


@pytest.fixture
def products(monkeypatch):
    """Makes small codebooks count as large ones."""
    monkeypatch.setattr(vqdeploy.graphs.quantizer, "PRODUCT_ELEMENTS", 1)


def small(num_codes, code_size):
    return post((1, 4, 4), base_depth=1, num_codes=num_codes, code_size=code_size)


def graph(codebook, spec=None):
    spec = spec or small(*codebook.shape)
    params = {CODEBOOK: codebook.astype(np.float32)}
    return build_graph("quantizer", spec, params, GraphOptions()).to_bytes()


def session(codebook):
    content, spec = graph(codebook), small(*codebook.shape)
    return open_sessions({"quantizer": content}, spec, "cpu")[0]["quantizer"]


def operators(content):
    return {node.op_type for node in onnx.load_from_string(content).graph.node}


def test_small_codebooks_take_the_direct_form_and_large_ones_a_product():
    assert "MatMul" not in operators(graph(np.ones((K, D))))
    assert not takes_products(post())
    assert takes_products(LARGE)
    assert "MatMul" in operators(graph(np.ones((1000, 16)), LARGE))


def test_short_codes_and_small_codebooks_are_multiplied_in_parts():
    assert takes_parts(small(16_384, 8))
    assert takes_parts(small(512, 64))
    assert not takes_parts(small(16_384, 64))


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("k", "d"), [(K, D), (90, 64)])
def test_no_certified_index_differs_on_an_adversary(name, k, d):
    latents, codebook = CASES[name](np.random.default_rng(1), 800, k, d, "float32")
    indices, quantized = session(codebook)(latents)
    assert (indices.shape, indices.dtype) == ((800, 1), np.int64)
    check_indices(indices, latents, codebook, precision="float32").require()
    np.testing.assert_array_equal(quantized, codebook[indices])


@pytest.mark.usefixtures("products")
def test_a_graph_with_a_product_passes_the_kit():
    def quantize(latents, codebook):
        spec = post(
            (1, 4, 4),
            base_depth=1,
            latent_size=latents.shape[1],
            num_codes=len(codebook),
            code_size=codebook.shape[1],
        )
        sessions, _ = open_sessions({"quantizer": graph(codebook, spec)}, spec, "cpu")
        return tuple(sessions["quantizer"](np.ascontiguousarray(latents)))

    check_quantizer(quantize, num_codes=64, sizes="fixed")


@pytest.mark.usefixtures("products")
def test_onnx_reads_the_graph_as_onnxruntime_does():
    latents, codebook = CASES["bisector"](np.random.default_rng(2), 50, K, D, "float32")
    evaluator = ReferenceEvaluator(onnx.load_from_string(graph(codebook)))
    witness = [*evaluator.run(None, {"latents": latents})]
    found = session(codebook)(latents)
    check_indices(witness[0], latents, codebook, precision="float32").require()
    check_indices(found[0], latents, codebook, precision="float32").require()
    assert (witness[0] == found[0]).mean() > 0.9


def by_name(content):
    tensors = onnx.load_from_string(content).graph.initializer
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in tensors}


def in_tf32(array):
    """Returns ``array`` cut to ten bits after the point, as tensor cores may do."""
    return (np.asarray(array, np.float32).view(np.int32) & ~((1 << 13) - 1)).view(np.float32)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("margin", [True, False])
def test_a_product_in_tf32_changes_no_certified_index_because_of_the_margin(margin, monkeypatch):
    """Rounds only a factor of the product, as a card does if a program leaves TF32 on.

    In a product in parts, this would not matter.
    """
    monkeypatch.setattr(vqdeploy.graphs.quantizer, "takes_parts", lambda spec: False)
    latents, codebook = CASES["bisector"](np.random.default_rng(3), 2000, K, D, "float32")
    model = onnx.load_from_string(graph(codebook))
    (product,) = (node for node in model.graph.node if node.op_type == "MatMul")
    rounded = in_tf32(by_name(graph(codebook))[product.input[1]])
    model.graph.initializer.append(numpy_helper.from_array(rounded, "rounded"))
    product.input[1] = "rounded"
    slopes = [f"quantizer.{name}" for name in ("squares", "products", "floor")]
    for tensor in model.graph.initializer:
        if tensor.name in slopes and not margin:
            tensor.CopyFrom(numpy_helper.from_array(np.array(0, np.float32), tensor.name))
    found, *_ = ReferenceEvaluator(model).run(None, {"latents": latents})
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
def test_the_margin_is_no_less_than_what_rounding_can_do(monkeypatch):
    """Adds up the errors of scores and direct distances, for latents of any length."""
    monkeypatch.setattr(vqdeploy.graphs.quantizer, "takes_parts", lambda spec: False)
    codebook = np.random.default_rng(5).normal(size=(K, D))
    constants = by_name(graph(codebook))
    squares, products, floor, longest = (
        float(constants[f"quantizer.{name}"])
        for name in ("squares", "products", "floor", "longest")
    )
    unit, factor = 2.0**-24, 2.0**-10  # 2**-10: factors cut to TF32
    norm = float(np.linalg.norm(codebook, axis=1).max())
    for length in (0.0, 1e-30, 1e-3, 1.0, norm, 1e3, 1e15):
        margin = squares * (length + longest) ** 2 + products * length * longest + floor
        latent, farthest = np.array([[length]]), np.array([[(length + norm) ** 2]])
        direct = distance_error(farthest, latent, np.array([norm]), D, precision="float32")[0, 0]
        score = (roundings(2 * D + 1, unit) + 2 * factor) * (norm**2 / 2 + length * norm)
        assert margin > direct + 2 * score


@settings(deadline=None, max_examples=40)
@given(
    d=st.integers(1, 40),
    scale=st.sampled_from([1e-12, 1e-3, 1.0, 1e6]),
    far=st.sampled_from([0.0, 1.0, 100.0]),
    seed=st.integers(0, 999),
)
def test_scores_and_distances_are_off_by_less_than_their_slack(d, scale, far, seed):
    """In float32, with sums in NumPy's order and one by one, and with factors cut to TF32."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(20, d)) * scale + far).astype(np.float32)
    c = (rng.normal(size=(30, d)) + far).astype(np.float32)
    halves = np.float32(0.5) * np.cumsum(c * c, axis=1, dtype=np.float32)[:, -1:]
    wide, columns = np.append(x, np.ones_like(x[:, :1]), 1), np.append(-c, halves, 1)
    exact = np.square(c.astype(float)).sum(1) / 2 - x.astype(float) @ c.astype(float).T
    norms, longest = np.linalg.norm(x.astype(float), axis=1), np.linalg.norm(c, axis=1).max()
    for precision, cut in (("float32", lambda a: a), ("tf32", in_tf32)):
        found = np.cumsum(cut(wide)[:, None] * cut(columns), axis=2, dtype=np.float32)[..., -1]
        slack = score_slack(d, precision)
        own = slack.products * (longest**2 / 2 + norms * longest) + slack.floor
        assert (np.abs(found - exact).max(axis=1) <= own / 2).all()


@pytest.mark.parametrize(("k", "d", "tiles"), [(5000, 3, 3), (262_144, 4, 128)])
def test_scores_of_many_codes_are_made_tile_by_tile(k, d, tiles, monkeypatch):
    monkeypatch.setattr(vqdeploy.search, "TILE_SCORES", 2**13)
    spec = post((1, 4, 4), base_depth=1, latent_size=4, num_codes=k, code_size=d)
    rng = np.random.default_rng(8)
    codebook = rng.normal(size=(k, d)).astype(np.float32)
    content = graph(codebook, spec)
    products = [n for n in onnx.load_from_string(content).graph.node if n.op_type == "MatMul"]
    assert len(products) == tiles
    latents = (codebook[rng.integers(0, k, (25, 4))] + 0.01 * rng.normal(size=(25, 4, d))).astype(
        np.float32
    )
    found = open_sessions({"quantizer": content}, spec, "cpu")[0]["quantizer"](latents)[0]
    check_indices(found, latents, codebook, precision="float32").require()


def pairs(content, latents):
    """Counts the pairs of a latent and a group of codes that the direct form compares."""
    model = onnx.load_from_string(content)
    model.graph.output.append(
        onnx.helper.make_tensor_value_info("quantizer.pairs", onnx.TensorProto.INT64, ["P"])
    )
    run = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return len(run.run(["quantizer.pairs"], {"latents": latents})[0])


@pytest.mark.parametrize("length", [0.1, 1.0, 100.0])
def test_the_direct_form_compares_a_few_groups_whatever_the_latents_length(length):
    """The pairs decide the memory. Here the codebook is at its start, with latents far longer."""
    spec = residual((3, 32, 32), num_codes=2048, code_size=32)
    codebook = np.random.default_rng(6).uniform(-0.3, 0.3, (2048, 32))
    latents = length * np.random.default_rng(7).normal(size=(8, 64, 32)).astype(np.float32)
    assert pairs(graph(codebook, spec), latents) < 1.5 * 8 * 64


@pytest.mark.parametrize(
    "options", [{}, {"precision": "fp16"}, {"precision": "int8"}, {"batch": 8}, {"opset": 20}]
)
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


def test_a_grid_of_latents_and_a_large_codebook_verify_themselves(tmp_path, colour_images):
    model = small_model(GRID)
    write_model(tmp_path / "model.pt", model)
    export(tmp_path / "model.pt", tmp_path / "b")
    verify(Bundle.open(tmp_path / "b"), "cpu", samples=2000)[0].require()
    tokens = Codec.load(tmp_path / "b", "cpu").encode(colour_images[:20])
    latents = vqref.encode(GRID, model.params, colour_images[:20] / 255)
    assert (tokens == vqref.quantize(latents, model.params[CODEBOOK]).indices).mean() > 0.99
