"""Finite scalar quantization: a bounded row, and a codebook that is a grid and stays a grid."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from support import ROWS, small_model

import vqref
import vqtrain.network
from vqdeploy.export import export
from vqdeploy.graphs.build import GraphOptions
from vqdeploy.verify import verify
from vqref import families
from vqref.modelfile import Model
from vqref.network import bounded
from vqref.quantizer import grid
from vqref.spec import CODEBOOK, Layer, ModelSpec
from vqtrain import RECIPES, train
from vqtrain.options import require_still

LEVELS = (5, 4, 3)
SIZES: dict[str, Any] = {"hidden": 8, "blocks": 1, "block_hidden": 4}
GRID: dict[str, Any] = {**SIZES, "num_codes": 60, "code_size": 3, "levels": LEVELS}


@pytest.mark.parametrize("levels", [LEVELS, (8, 8, 8), (7, 5, 5, 5), (8, 5)])
def test_codes_and_tokens_are_those_of_vector_quantize_pytorch(levels):
    library = pytest.importorskip("vector_quantize_pytorch")
    peer = library.FSQ(list(levels))
    codebook = grid(levels)
    np.testing.assert_array_equal(codebook.astype(np.float32), peer.implicit_codebook.numpy())
    x = np.random.default_rng(0).normal(0, 2, (4, 50, len(levels)))
    row = Layer("x.y", "bounded", x.shape[1:], x.shape[1:], levels=levels)
    found = vqref.quantize(bounded(row, x), codebook)
    quantized, indices = peer(torch.from_numpy(x).float())
    sure = found.gap > 1e-5
    assert sure.mean() > 0.99
    np.testing.assert_array_equal(found.indices[sure], indices.numpy()[sure])
    np.testing.assert_allclose(found.quantized[sure], quantized.detach().numpy()[sure], atol=1e-6)


@pytest.mark.parametrize("count", [3, 4, 5, 8])
def test_every_value_is_reached_and_zero_stays(count):
    row = Layer("x.y", "bounded", (1, 1), (1, 1), levels=(count,))
    x = np.linspace(-30, 30, 60001)[:, None, None]
    reached = vqref.quantize(bounded(row, x), grid((count,))).indices
    assert set(reached.ravel()) == set(range(count))
    assert abs(bounded(row, np.zeros((1, 1, 1))).item()) < 1e-15


def test_the_gap_of_a_grid_is_that_to_the_nearer_plane_half_way():
    """In closed form, moving element d to its next value costs (step - 2 |off|) * step."""
    rng = np.random.default_rng(1)
    latents, codebook = rng.uniform(-0.9, 0.9, (3, 20, 3)), grid((5, 5, 7))
    found = vqref.quantize(latents, codebook)
    step = 1 / (np.array([5, 5, 7]) // 2)
    off = np.abs(latents - found.quantized)
    np.testing.assert_allclose(found.gap, ((step - 2 * off) * step).min(axis=2), atol=1e-14)


def test_half_precision_bounds_in_float32():
    row = ROWS["bounded"]
    x = torch.randn(2, *row.in_shape).bfloat16()
    y = vqtrain.network.KINDS["bounded"](row, x)
    assert y.dtype == torch.float32
    np.testing.assert_allclose(y.numpy(), bounded(row, x.double().numpy()), atol=1e-6)


def test_a_grid_has_as_many_codes_as_its_levels_say():
    spec = families.residual((3, 8, 8), **GRID)
    assert spec.levels == LEVELS
    assert ModelSpec.from_dict(spec.to_dict()) == spec
    assert families.residual((3, 8, 8), **SIZES).levels == ()
    with pytest.raises(ValueError, match=r"num_codes is 61; a grid of levels \(5, 4, 3\) has 60"):
        dataclasses.replace(spec, num_codes=61)
    with pytest.raises(ValueError, match=r"code_size is 64; levels are \(5, 4, 3\)"):
        families.residual((3, 8, 8), **SIZES, num_codes=60, levels=LEVELS)
    assert families.implied({"levels": LEVELS}) == {
        "num_codes": 60,
        "code_size": 3,
        "levels": LEVELS,
    }
    assert families.implied({"levels": (), "hidden": 8}) == {"levels": (), "hidden": 8}


def test_a_model_whose_grid_was_moved_is_refused():
    model = small_model(families.residual((3, 8, 8), **GRID))
    moved = model.params[CODEBOOK].copy()
    moved[7, 1] += 2**-9
    with pytest.raises(ValueError, match=r"codebook: row 7 differs by 0\.00\d* from the grid"):
        dataclasses.replace(model, params={**model.params, CODEBOOK: moved})


def test_options_that_would_move_a_grid_are_refused_by_name():
    spec = families.residual((3, 8, 8), **GRID)
    still = RECIPES["default"](spec)
    require_still(spec, still)
    for name, value in (("decay", 0.9), ("kmeans_start", True), ("revive_below", 0.5)):
        with pytest.raises(ValueError, match=f"{name} is .*: the codebook is a grid"):
            require_still(spec, dataclasses.replace(still, **dict[str, Any]({name: value})))
    with pytest.raises(ValueError, match="dialect is 'post'; it must be 'rosinality'"):
        require_still(spec, RECIPES["post"](spec))
    learned = families.residual((3, 8, 8), **SIZES)
    require_still(learned, RECIPES["post"](learned))


@pytest.fixture(scope="module")
def images():
    coarse = np.random.default_rng(0).integers(0, 256, (40, 3, 2, 2))
    return coarse.repeat(4, axis=2).repeat(4, axis=3).astype(np.uint8)


@pytest.fixture(scope="module")
def trained(images) -> Model:
    """The model of a run that is checked against the oracle, gradients too."""
    sizes = {name: value for name, value in GRID.items() if name not in ("num_codes", "code_size")}
    how: dict[str, Any] = {"epochs": 4, "batch_size": 4, "optimizer": "adam", "device": "cpu"}
    return train(images, network="residual", **how, **sizes)


def test_training_moves_the_encoder_and_leaves_the_grid(trained):
    np.testing.assert_allclose(trained.params[CODEBOOK], grid(LEVELS), atol=1e-6)
    assert trained.metrics["oracle"]["passed"]
    rng = np.random.default_rng(trained.training["seed"])
    before = vqref.init_params(trained.spec, rng)
    name = "encoder.to_latents.weight"
    assert np.abs(trained.params[name] - before[name]).max() > 1e-3


def test_the_command_line_says_which_option_would_move_the_grid(images):
    with pytest.raises(ValueError, match=r"decay is 0\.5; it must be 1\.0: the codebook"):
        train(images, network="residual", epochs=1, device="cpu", decay=0.5, levels=LEVELS)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_grids_bundle_proves_itself(trained, tmp_path, precision):
    last = "encoder.to_latents.weight"  # after so few steps, all latents are near the middle
    params = {**trained.params, last: 100 * trained.params[last]}
    export(
        dataclasses.replace(trained, params=params),
        tmp_path / "bundle",
        options=GraphOptions(precision=precision),
    )
    found = verify(tmp_path / "bundle", "cpu").report.require()
    quantizer = next(check for check in found.checks if check.stage == "quantizer")
    assert quantizer.certified > 0.9 * quantizer.compared
    assert found.codes > 8
