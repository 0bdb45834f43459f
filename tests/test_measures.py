"""Measures of a set of images meet their definitions: each is compared with a plain version."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.ndimage import gaussian_filter1d
from support import CPU, small_model, trainer

import vqref
from vqref import families
from vqref.host.images import to_unit_interval
from vqtrain.data.batches import Batches
from vqtrain.likelihoods import nats
from vqtrain.losses import Losses
from vqtrain.model import VQVAE
from vqtrain.options import TrainingOptions
from vqtrain.run.folder import latest_state
from vqtrain.run.metrics import (
    LEAST_ERROR,
    Meter,
    decibels,
    evaluate,
    least_reconstruction,
    pixel_entropy,
    ssim,
    variance_of,
)

FLOAT32 = 1e-4
"""The models compute in float32; plain versions take the oracle's reconstructions in float64."""


def measured(model, images, batch=32, variance=0.1):
    module = VQVAE(model.spec, model.params)
    return evaluate(module, Batches(images, batch, CPU), TrainingOptions(), variance)


def plain_ssim(x, y):
    """Returns the SSIM of two images (H, W), at least 11 pixels each way, by SciPy's filter."""

    def local(values):
        for axis in (0, 1):
            values = gaussian_filter1d(values, 1.5, axis=axis, radius=5)
        return values[5:-5, 5:-5]  # where the window does not cross the edge

    mean_x, mean_y = local(x), local(y)
    variance_x, variance_y = local(x * x) - mean_x**2, local(y * y) - mean_y**2
    covariance = local(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    above = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (above / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))).mean()


def plain_ssims(x, y):
    """Returns the SSIM of each pair of images (N, C, H, W), the mean over channels."""
    a, b = (images.reshape(-1, *x.shape[2:]) for images in (x, y))
    found = [plain_ssim(*pair) for pair in zip(a, b, strict=True)]
    return np.reshape(found, x.shape[:2]).mean(axis=1)


@pytest.fixture(params=["grey, bernoulli", "colour, gaussian", "colour, logistic"])
def case(request, model, residual_model, many_images, colour_images):
    if request.param == "grey, bernoulli":
        return model, many_images[:70, None]
    if request.param == "colour, logistic":
        spec = families.residual(
            (3, 16, 16), 16, 1, 8, num_codes=32, code_size=8, likelihood="logistic"
        )
        return small_model(spec), colour_images[:70]
    return residual_model, colour_images[:70]


def test_every_measure_is_its_definition(case):
    model, images = case
    found = measured(model, images, variance=0.07)
    x = to_unit_interval(images).astype(np.float64)
    out = vqref.forward(model.spec, model.params, x)
    y = out.reconstructions
    errors = np.square(x - y).mean(axis=(1, 2, 3))
    expected = {
        "reconstruction": out.losses.reconstruction,
        "commitment": out.losses.commitment,
        "prior": out.losses.prior,
        "bound": out.losses.reconstruction + out.losses.prior,
        "bits_per_dimension": out.losses.bound / math.log(2) / images[0].size,
        "nmse": errors.mean() / 0.07,
        "psnr": -10 * np.log10(errors.mean()),
        "mean_psnr": (-10 * np.log10(errors)).mean(),
        "ssim": plain_ssims(x, y).mean(),
        "codes_used": len(np.unique(out.indices)),
    }
    figures = found.to_dict(model.spec)
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, rel=FLOAT32), name
    np.testing.assert_array_equal(
        found.hits, np.bincount(out.indices.ravel(), minlength=model.spec.num_codes)
    )


@pytest.mark.parametrize("shape", [(2, 3, 16, 24), (3, 1, 11, 11), (1, 1, 40, 12)])
def test_ssim_is_the_plain_one_to_the_last_digits(shape):
    rng = np.random.default_rng(0)
    x = rng.random(shape)
    y = np.clip(x + rng.normal(0, 0.1, shape), 0, 1)
    found = ssim(torch.from_numpy(x), torch.from_numpy(y))
    np.testing.assert_allclose(
        found, plain_ssims(x, y), rtol=1e-11
    )  # cancellation of about 1e5 epsilon


def test_the_window_of_ssim_shrinks_to_a_small_image():
    rng = np.random.default_rng(0)
    x, y = rng.random((2, 1, 1, 6, 20))
    near = np.exp(-np.square(np.arange(6) - 2.5) / 4.5)  # six rows, and 11 of 20 columns
    wide = np.exp(-np.square(np.arange(11) - 5) / 4.5)
    weights = np.outer(near / near.sum(), wide / wide.sum())
    values = []
    for left in range(10):
        a, b = x[0, 0, :, left : left + 11], y[0, 0, :, left : left + 11]
        p, q = (weights * a).sum(), (weights * b).sum()
        spread = (weights * (np.square(a - p) + np.square(b - q))).sum()
        shared = (weights * (a - p) * (b - q)).sum()
        light = (2 * p * q + 1e-4) / (p * p + q * q + 1e-4)
        values.append(light * (2 * shared + 9e-4) / (spread + 9e-4))
    found = ssim(torch.from_numpy(x), torch.from_numpy(y))
    np.testing.assert_allclose(found, [np.mean(values)], rtol=1e-11)


def test_ssim_of_equal_images_is_1_and_of_opposite_ones_below_0():
    x = torch.from_numpy(np.random.default_rng(0).random((3, 3, 16, 16)))
    np.testing.assert_allclose(ssim(x, x), 1, rtol=1e-12)
    assert (ssim(x, 1 - x) < 0).all()


def test_an_image_that_is_reproduced_exactly_does_not_make_the_mean_infinite():
    found = decibels(torch.tensor([0.0, LEAST_ERROR, 0.01], dtype=torch.float64))
    np.testing.assert_allclose(found, [100, 100, 20], rtol=1e-12)


def test_the_measures_do_not_depend_on_how_the_set_is_cut(case):
    model, images = case
    whole, cut = measured(model, images, batch=70), measured(model, images, batch=9)
    for name, value in whole.to_dict(model.spec).items():
        # each batch is convolved in float32, whose sums may go another way
        assert cut.to_dict(model.spec)[name] == pytest.approx(value, rel=1e-5), name


def test_perplexity_is_of_the_whole_set_and_not_of_its_batches(model, many_images):
    """Images are in the order of their codes: a batch uses few codes, and the set all."""
    images = many_images[:256, None]
    x = to_unit_interval(images)
    indices = vqref.forward(model.spec, model.params, x).indices
    images = images[np.lexsort(indices.T)]
    whole = measured(model, images, batch=16)
    batches = [measured(model, images[i : i + 16]).perplexity for i in range(0, 256, 16)]
    shares = np.bincount(indices.ravel()) / indices.size
    shares = shares[shares > 0]
    assert whole.perplexity == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert np.mean(batches) < 0.9 * whole.perplexity


def test_the_gaussian_reconstruction_says_the_same_as_nmse(residual_model, colour_images):
    """reconstruction = (CHW / 2) (NMSE + ln 2 pi variance), as long as no output is clipped."""
    spec = residual_model.spec
    images = colour_images[:40]
    out = vqref.forward(spec, residual_model.params, to_unit_interval(images))
    assert np.abs(out.outputs).max() < 0.5
    found = measured(residual_model, images, variance=spec.variance)
    expected = 384 * (found.fidelity.nmse + math.log(2 * math.pi * spec.variance))
    assert found.reconstruction == pytest.approx(expected, rel=1e-6)


def test_an_epoch_has_no_measures_of_pictures(model):
    meter = Meter(model.spec, CPU)
    meter.add(Losses(*torch.ones(4)), torch.zeros(2, 4, dtype=torch.int64))
    found = meter.read()
    meter.add(Losses(*torch.ones(4)), torch.ones(2, 4, dtype=torch.int64))
    assert found.fidelity is None
    assert "ssim" not in found.to_dict(model.spec)
    assert (found.perplexity, found.codes_used, found.hits[0], found.hits[1]) == (1.0, 1, 8, 0)
    assert meter.read().perplexity == pytest.approx(2)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_the_variance_of_the_data_is_numpys(colour_images, dtype):
    images = colour_images if dtype == np.uint8 else to_unit_interval(colour_images)
    expected = (colour_images / 255.0).var()
    assert variance_of(images) == pytest.approx(expected, rel=1e-6)
    assert variance_of(np.full((4, 1, 8, 8), 77, np.uint8)) == pytest.approx(0, abs=1e-15)


def test_the_entropy_of_pixels_is_that_of_so_many_coins():
    images = torch.tensor([[0.0, 1.0, 0.5, 0.25], [1.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    quarter = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    found = pixel_entropy(images.reshape(2, 1, 2, 2))
    np.testing.assert_allclose(found, [math.log(2) + quarter, 0], rtol=1e-15, atol=0)


def test_it_is_the_loss_of_the_logits_that_reproduce_the_image():
    x = torch.arange(256, dtype=torch.float64).reshape(1, 1, 16, 16) / 255
    logits = torch.logit(x).clamp(-40, 40)  # black and white up to 4e-18
    scored = nats(families.post((1, 16, 16)), x, logits)
    np.testing.assert_allclose(pixel_entropy(x), scored, rtol=1e-14, atol=0)


@given(
    x=arrays(np.float64, (3, 1, 4, 4), elements=st.floats(0, 1)),
    logits=arrays(np.float64, (3, 1, 4, 4), elements=st.floats(-50, 50)),
)
@settings(deadline=None)
def test_no_reconstruction_scores_less_than_the_entropy(x, logits):
    images = torch.from_numpy(x)
    scored = nats(families.post((1, 4, 4)), images, torch.from_numpy(logits))
    assert (pixel_entropy(images) <= scored + 1e-12).all()  # rounding of 16 pixels


@pytest.mark.parametrize("kind", ["grey levels", "float32", "black and white"])
def test_a_bernoulli_model_has_a_least_reconstruction(model, many_images, kind):
    images = many_images[:70, None]
    if kind == "float32":
        images = np.random.default_rng(0).random((70, 1, 28, 28), np.float32)
    if kind == "black and white":
        images = np.where(images > 99, 255, 0).astype(np.uint8)
    found = measured(model, images)
    p = to_unit_interval(images).astype(np.float64)
    q = 1 - p
    parts = (np.log(v, where=v > 0, out=np.zeros_like(v)) * v for v in (p, q))
    expected = -sum(part.sum() for part in parts) / 70
    assert found.pixel_entropy == pytest.approx(expected, rel=1e-12)
    assert found.to_dict(model.spec)["pixel_entropy"] == found.pixel_entropy
    assert found.pixel_entropy < found.reconstruction
    assert (found.pixel_entropy == 0) == (kind == "black and white")


def test_other_likelihoods_and_epochs_have_none(residual_model, colour_images):
    assert "pixel_entropy" not in measured(residual_model, colour_images[:20]).to_dict(
        residual_model.spec
    )
    batches = Batches(colour_images[:20], 8, CPU)
    assert least_reconstruction(residual_model.spec, batches) is None


def test_a_run_says_what_a_perfect_reconstruction_would_score(tmp_path, many_images):
    said: list[str] = []
    line = trainer(tmp_path, many_images, said, epochs=1).run().metrics["history"][0]
    least = line["held_out"]["pixel_entropy"]
    assert said[2] == (
        f"held out: a perfect reconstruction would score {least:.1f} nats + 4.2 of prior"
    )
    assert line["held_out"]["prior"] == pytest.approx(2 * math.log(8))
    assert "pixel_entropy" not in line


def test_a_run_from_before_there_was_an_entropy_goes_on(tmp_path, many_images):
    run = trainer(tmp_path, many_images, epochs=1)
    run.run()
    run.work.folder.release()
    state, _, _ = latest_state(tmp_path / "run")
    del state["history"][0]["held_out"]["pixel_entropy"]
    state["finished"] = False
    history = trainer(tmp_path, many_images, state=state).run().metrics["history"]
    assert ["pixel_entropy" in line["held_out"] for line in history] == [False, True]
