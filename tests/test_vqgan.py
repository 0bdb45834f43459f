"""Family vqgan: equal to upstream's code in float64; training, export and proofs."""

import dataclasses
import tomllib

import numpy as np
import pytest
import torch
import vqgans
from support import VQGAN, small_model

import vqref
from vqdeploy.agreement import check_graphs
from vqdeploy.graphs.build import GraphOptions, build_graphs
from vqdeploy.runtime.sessions import open_sessions
from vqref import families
from vqref.spec import CODEBOOK
from vqtrain import VQVAE, TrainingOptions
from vqtrain.agreement import check_against_oracle
from vqtrain.modelfile import read_model, write_model

CASES = tuple(vqgans.SPECS)


@pytest.fixture(scope="module", params=CASES)
def upstream(request):
    return (
        vqgans.SPECS[request.param],
        vqgans.params_of(request.param),
        vqgans.arrays(request.param),
    )


def off(found, expected):
    """Returns the largest error."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    return float(np.abs(found - expected).max())


def test_the_oracle_computes_upstreams_latents_tokens_and_outputs(upstream):
    spec, params, golden = upstream
    out = vqref.forward(spec, params, golden["images"])
    assert off(out.latents, golden["latents"]) <= 1e-12 * np.abs(golden["latents"]).max()
    np.testing.assert_array_equal(out.indices, golden["indices"])
    np.testing.assert_array_equal(out.quantized, golden["quantized"])
    assert off(out.outputs, golden["reconstructions"]) <= 1e-11


def test_pytorch_computes_upstreams_latents_tokens_and_outputs(upstream):
    spec, params, golden = upstream
    module = VQVAE(spec, {name: array.astype(np.float64) for name, array in params.items()})
    with torch.no_grad():
        out = module(torch.from_numpy(golden["images"].astype(np.float64)))
    latents = out.latents.numpy()
    assert off(latents, golden["latents"]) <= 1e-12 * np.abs(golden["latents"]).max()
    np.testing.assert_array_equal(out.indices.numpy(), golden["indices"])
    assert off(out.outputs.numpy(), golden["reconstructions"]) <= 1e-11


def graphs_of(spec, params, **options):
    graphs = build_graphs(spec, params, GraphOptions(**options))
    return open_sessions(graphs, spec, "cpu")[0]


def test_onnxruntime_computes_upstreams_latents_tokens_and_outputs(upstream):
    spec, params, golden = upstream
    sessions = graphs_of(spec, params)
    latents = sessions["encoder"](golden["images"])[0]
    scale = np.abs(golden["latents"]).max()
    assert off(latents.astype(np.float64), golden["latents"]) <= 1e-5 * scale
    np.testing.assert_array_equal(sessions["tokenizer"](golden["images"])[0], golden["indices"])
    outputs = sessions["decoder"](golden["quantized"].astype(np.float32))[0].astype(np.float64)
    scale = np.abs(golden["reconstructions"]).max()
    assert off(outputs, golden["reconstructions"]) <= 1e-5 * scale


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_plain_images_are_as_near_as_others(upstream, level):
    """In a group of a plain image, nothing varies, so rounding counts a thousandfold.

    In float32, a mean must be subtracted twice.
    """
    spec, params, _ = upstream
    image = np.full((1, *spec.image_shape), level, np.float32)
    exact = vqref.encode(spec, params, image)
    with torch.no_grad():
        in_torch = VQVAE(spec, params).encoder(torch.from_numpy(image)).numpy()
    for found in (in_torch, graphs_of(spec, params)["encoder"](image)[0]):
        assert off(found.astype(np.float64), exact) <= 1e-5 * np.abs(exact).max()


@pytest.fixture(scope="module", params=["gaussian", "logistic", "unit codes"])
def small(request):
    how = {"normalized": True} if request.param == "unit codes" else {"likelihood": request.param}
    return small_model(families.vqgan((3, 16, 8), **VQGAN, variance=0.1, **how))


@pytest.mark.parametrize(("option", "precision"), [("fp32", "float32"), ("fp16", "float16")])
def test_all_interpreters_agree_at_every_stage(small, option, precision):
    spec, params = small.spec, small.params
    images = np.random.default_rng(1).random((6, *spec.image_shape)).astype(np.float32)
    check_against_oracle(VQVAE(spec, params), images, TrainingOptions()).require()
    sessions = graphs_of(spec, params, precision=option)
    check_graphs(spec, params, images, sessions, precision=precision).require()


def test_a_wrong_epsilon_is_found(small, monkeypatch):
    """The wrong one is that of PyTorch's own group norm."""
    spec, params = small.spec, small.params
    images = np.random.default_rng(1).random((6, *spec.image_shape)).astype(np.float32)
    monkeypatch.setattr("vqtrain.network.GROUP_EPSILON", 1e-5)
    double = {name: array.astype(np.float64) for name, array in params.items()}
    report = check_against_oracle(VQVAE(spec, double), images, TrainingOptions())
    assert {"encoder", "decoder"} <= {c.stage for c in report.checks if not c.passed}


def test_a_normalized_model_comes_back_from_its_file_and_its_codes_have_length_one(tmp_path):
    model = small_model(families.vqgan((3, 16, 8), **VQGAN, normalized=True))
    write_model(tmp_path / "model.pt", model)
    assert read_model(tmp_path / "model.pt").spec == model.spec
    longer = {**model.params, CODEBOOK: model.params[CODEBOOK] * np.float32(1.00001)}
    with pytest.raises(ValueError, match=r"quantizer\.codebook: row \d+ has length 1\.00001"):
        dataclasses.replace(model, params=longer)


SIZES = (
    *("--base-channels", 8, "--multipliers", "1,2", "--attention", "none", "--groups", 4),
    *("--blocks", 1, "--latent-channels", 4, "--num-codes", 16, "--code-size", 4),
)


@pytest.mark.parametrize("likelihood", ["gaussian", "logistic"])
def test_a_vqgan_is_trained_exported_and_verified(run, tmp_path, colour_images, likelihood):
    np.save(tmp_path / "colour.npy", colour_images[:120])
    done = run(
        *("-m", "vqtrain", "--data", "colour.npy", "--network", "vqgan", *SIZES, "--epochs", 1),
        *("--batch-size", 32, "--likelihood", likelihood, "--check-images", 4, "--name", "v"),
        *("--no-middle-attention", "--precision", "float32"),
    )
    assert done.returncode == 0, done.stderr
    assert f"network vqgan: 3x16x16 images, 8x8 latents, 16 codes, {likelihood}" in done.stdout
    assert "agrees on 4 images" in done.stdout
    options = tomllib.loads((tmp_path / "runs" / "v" / "options.toml").read_text())["model"]
    spelt = [options[name] for name in ("multipliers", "attention", "middle_attention")]
    assert spelt == ["1,2", "none", False]
    found = read_model(tmp_path / "model.pt").spec
    assert not [row for row in found.layers if row.kind == "attention"]
    again = run("-m", "vqtrain", "--config", tmp_path / "runs" / "v" / "options.toml")
    assert again.returncode == 0, again.stderr
    assert read_model(tmp_path / "model.pt").spec == found
    done = run("-m", "vqdeploy", "export", "model.pt")
    assert done.returncode == 0, done.stderr
    done = run("-m", "vqdeploy", "verify", "model-onnx", "--device", "cpu")
    assert done.returncode == 0, done.stdout
    assert "proved" not in done.stdout
    done = run("-m", "vqdeploy", "prove", "model-onnx", "colour.npy", "--limit", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == (
        "nothing is proved: the effect of rounding has no known bound in group_norm"
    )
