"""The likelihoods: distributions that sum to one, their means, equal numbers in PyTorch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logit, xlog1py, xlogy

import vqref
import vqref.likelihoods
import vqtrain.likelihoods
from vqref import families
from vqref.likelihoods import LEVELS, LIKELIHOODS, SMALLEST_LOG_SCALE, softplus
from vqtrain.run.metrics import Metrics

VARIANCE = 0.08


def spec_of(likelihood, family="residual", channels=3):
    """Returns a spec of 4x4 images with one code, whose prior costs nothing."""
    sizes = {
        "residual": {"hidden": 2, "blocks": 0, "block_hidden": 1},
        "post": {"base_depth": 1},
    }
    return families.FAMILIES[family](
        (channels, 4, 4),
        **sizes[family],
        num_codes=1,
        code_size=1,
        likelihood=likelihood,
        variance=VARIANCE,
    )


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_decoder_has_the_likelihoods_channels(likelihood, channels):
    spec = spec_of(likelihood, channels=channels)
    wide = (2 if likelihood == "logistic" else 1) * channels
    assert spec.output_shape == (wide, 4, 4)
    found = vqref.reconstruct(spec, np.zeros((5, wide, 4, 4)))
    assert (found.shape, found.dtype) == ((5, channels, 4, 4), np.float64)


def test_both_interpreters_know_every_likelihood():
    assert set(vqtrain.likelihoods.NATS) == set(vqtrain.likelihoods.MEANS) == set(LIKELIHOODS)


def of_every_level(spec, mean, log_scale):
    """Returns -log p (256,) of the 256 grey levels under one logistic."""
    images = np.arange(LEVELS, dtype=np.float64).reshape(-1, 1, 1, 1) / (LEVELS - 1)
    outputs = np.broadcast_to(np.reshape([mean, log_scale], (1, 2, 1, 1)), (LEVELS, 2, 1, 1))
    row = LIKELIHOODS["logistic"]
    return row.nats(spec, images, outputs)[:, 0, 0, 0]


MEANS = st.floats(-2, 2) | st.sampled_from([-1e3, -0.5, 0.5, 1e3])
LOG_SCALES = st.floats(-20, 10) | st.sampled_from([-20.0, SMALLEST_LOG_SCALE, 0.0, 10.0])


@pytest.mark.parametrize("family", ["post", "residual"])
@given(mean=MEANS, log_scale=LOG_SCALES)
def test_the_probabilities_of_all_grey_levels_sum_to_one(family, mean, log_scale):
    """Tries both value ranges of networks, means far outside, and any scale."""
    nats = of_every_level(spec_of("logistic", family, 1), mean, log_scale)
    assert (nats >= 0).all()
    assert math.fsum(np.exp(-nats)) == pytest.approx(1, abs=1e-12)


@given(mean=st.floats(-0.5, 0.5), log_scale=st.floats(-4, 2))
def test_a_grey_level_has_the_logistics_mass_between_its_edges(mean, log_scale):
    """Compares with the textbook's difference of two sigmoids, at scales where nothing cancels."""
    spec = spec_of("logistic", channels=1)
    edges = (np.arange(1, LEVELS) - 0.5) / (LEVELS - 1) - 0.5  # in the network's range
    below = vqref.likelihoods.sigmoid((edges - mean) / np.exp(log_scale))
    expected = np.diff(below, prepend=0.0, append=1.0)
    found = np.exp(-of_every_level(spec, mean, log_scale))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-14)


def test_log_scales_are_not_taken_below_the_smallest():
    spec = spec_of("logistic", channels=1)
    lowest = of_every_level(spec, 0.1, SMALLEST_LOG_SCALE)
    np.testing.assert_array_equal(of_every_level(spec, 0.1, -20.0), lowest)
    assert not np.array_equal(of_every_level(spec, 0.1, SMALLEST_LOG_SCALE + 0.1), lowest)


def uniform_outputs(images):
    """Returns outputs under which each pixel's own grey level has the probability 1/256."""
    half_width = 2 * math.atanh(1 / LEVELS)  # of a level around the mean, in units of the scale
    scale = 0.5 / (LEVELS - 1) / half_width
    means = images - 0.5
    edge = (0.5 / (LEVELS - 1)) - 0.5  # between the first two levels
    first = edge - scale * logit(1 / LEVELS)
    means = np.where(images == 0, first, np.where(images == 1, -first, means))
    return np.concatenate([means, np.full_like(means, math.log(scale))], axis=1)


def test_a_model_that_gives_each_level_its_256th_costs_eight_bits_per_dimension():
    spec = spec_of("logistic")
    images = np.random.default_rng(0).integers(0, LEVELS, (50, 3, 4, 4)) / (LEVELS - 1)
    images[0, 0, 0, 0], images[0, 0, 0, 1] = 0, 1
    latents = np.zeros((50, 1, 1))
    losses = vqref.compute_losses(spec, images, uniform_outputs(images), latents, latents)
    assert losses.bound == pytest.approx(48 * math.log(256), rel=1e-12)
    metrics = Metrics(**vars(losses), hits=np.array([50]))
    assert metrics.to_dict(spec)["bits_per_dimension"] == pytest.approx(8, abs=1e-12)


@given(x=st.floats(0, 1), y=st.floats(-30, 30))
def test_bernoulli_is_the_textbooks(x, y):
    """The textbook's formula is -(x ln p + (1 - x) ln(1 - p)); p is the probability of white."""
    p, q = vqref.likelihoods.sigmoid(y), vqref.likelihoods.sigmoid(-y)
    found = LIKELIHOODS["bernoulli"].nats(spec_of("bernoulli"), np.asarray(x), np.asarray(y))
    assert found == pytest.approx(-(xlogy(x, p) + xlogy(1 - x, q)), rel=1e-12, abs=1e-12)
    assert found == pytest.approx(-(xlogy(x, p) + xlog1py(1 - x, -p)), rel=1e-3, abs=1e-12)


@pytest.mark.parametrize("variance", [1e-6, 0.08, 3.0])
@pytest.mark.parametrize("family", ["post", "residual"])
def test_gaussian_integrates_to_one_and_is_the_likeliest_at_its_mean(family, variance):
    spec = families.FAMILIES[family]((1, 4, 4), likelihood="gaussian", variance=variance)
    low, high = spec.value_range
    y = 0.3
    x = y + math.sqrt(variance) * np.linspace(-12, 12, 20_001)
    nats = LIKELIHOODS["gaussian"].nats(spec, x, np.asarray(low + (high - low) * y))
    assert np.trapezoid(np.exp(-nats), x) == pytest.approx(1, abs=1e-12)
    assert x[nats.argmin()] == pytest.approx(y, abs=1e-12)
    assert nats.min() == pytest.approx(0.5 * math.log(2 * math.pi * variance))


def test_gaussian_nats_are_the_scaled_squared_error():
    """reconstruction = (CHW/2) * (NMSE + ln 2πσ²)."""
    spec, rng = spec_of("gaussian"), np.random.default_rng(0)
    images, outputs = rng.random((7, 3, 4, 4)), rng.normal(0, 0.3, (7, 3, 4, 4))
    nmse = np.square(images - (outputs + 0.5)).mean() / VARIANCE
    expected = 24 * (nmse + math.log(2 * math.pi * VARIANCE))
    assert vqref.nats(spec, images, outputs).mean() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_reconstructions_are_means_mapped_back_and_clipped(likelihood):
    spec, rng = spec_of(likelihood), np.random.default_rng(0)
    outputs = rng.normal(0, 3, (4, *spec.output_shape))
    found = vqref.reconstruct(spec, outputs)
    centre = outputs[:, :3]
    expected = 1 / (1 + np.exp(-centre)) if likelihood == "bernoulli" else centre + 0.5
    np.testing.assert_allclose(found, np.clip(expected, 0, 1), rtol=1e-14, atol=1e-15)
    assert found.min() >= 0
    assert found.max() <= 1
    assert likelihood == "bernoulli" or {found.min(), found.max()} == {0, 1}


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_a_mean_moves_at_most_by_its_slope_per_change_of_an_output(likelihood):
    spec, rng = spec_of(likelihood), np.random.default_rng(0)
    outputs, step = rng.normal(0, 2, (50, *spec.output_shape)), 1e-6
    row = LIKELIHOODS[likelihood]
    change = np.abs(row.mean(spec, outputs + step) - row.mean(spec, outputs)).max() / step
    assert change <= row.slope(spec) * (1 + 1e-6)
    assert row.mean(spec, np.zeros((1, *spec.output_shape)) + step).max() == pytest.approx(
        row.mean(spec, np.zeros((1, *spec.output_shape))).max() + row.slope(spec) * step
    )


def test_sigmoid_and_softplus_neither_overflow_nor_lose_their_ends():
    np.testing.assert_allclose(vqref.likelihoods.sigmoid([-1e4, 0.0, 1e4]), [0, 0.5, 1])
    assert vqref.likelihoods.sigmoid(-700.0) == pytest.approx(np.exp(-700.0), rel=1e-14)
    found = softplus(np.array([-700.0, 0.0, 1e4]))
    np.testing.assert_allclose(found, [np.exp(-700.0), math.log(2), 1e4], rtol=1e-14)


def case(likelihood, seed, spread):
    """A spec, images on grey levels (both ends occur), and outputs, some of them extreme."""
    spec, rng = spec_of(likelihood), np.random.default_rng(seed)
    images = rng.integers(0, LEVELS, (3, 3, 4, 4)) / (LEVELS - 1)
    images[:, :, 0], images[:, :, 1] = 0, 1
    outputs = rng.normal(0, spread, (3, *spec.output_shape))
    if likelihood == "logistic":
        outputs[:, 3:] = rng.uniform(-6.5, 2, (3, 3, 4, 4))
    return spec, images, outputs


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@settings(deadline=None)
@given(seed=st.integers(0, 9999), spread=st.sampled_from([0.1, 1.0, 30.0]))
def test_numpy_and_pytorch_agree_in_float64(likelihood, seed, spread):
    spec, images, outputs = case(likelihood, seed, spread)
    arrays = torch.from_numpy(images), torch.from_numpy(outputs)
    nats = vqtrain.likelihoods.nats(spec, *arrays).numpy()
    np.testing.assert_allclose(nats, vqref.nats(spec, images, outputs), rtol=1e-12)
    means = vqtrain.likelihoods.mean(spec, arrays[1]).numpy()
    np.testing.assert_allclose(means, vqref.reconstruct(spec, outputs), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@given(seed=st.integers(0, 9999))
def test_pytorchs_gradients_are_the_oracles_differences(likelihood, seed):
    """The oracle's central differences err by the third derivative times 1e-8, and by rounding."""
    spec, images, outputs = case(likelihood, seed, 0.3)
    row, step = LIKELIHOODS[likelihood], 1e-5
    given_outputs = torch.from_numpy(outputs).requires_grad_()
    vqtrain.likelihoods.nats(spec, torch.from_numpy(images), given_outputs).sum().backward()
    found = given_outputs.grad.numpy()
    for part in range(0, spec.output_shape[0], 3):  # a value has one output in each part
        moved = np.zeros_like(outputs)
        moved[:, part : part + 3] = step
        up, down = (row.nats(spec, images, outputs + sign * moved) for sign in (1, -1))
        scale = np.abs(up) + np.abs(down) + np.abs(found[:, part : part + 3])
        error = np.abs((up - down) / (2 * step) - found[:, part : part + 3]) / (1 + scale)
        assert error.max() < 1e-4


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_pytorchs_gradients_are_finite_and_right_wherever_the_outputs_are(likelihood):
    spec, images, outputs = case(likelihood, 0, 30.0)
    if likelihood == "logistic":
        outputs[:, 3:] = np.linspace(-20, 10, 144).reshape(3, 3, 4, 4)
    for dtype in (torch.float64, torch.float32):
        mine = torch.from_numpy(outputs).to(dtype).requires_grad_()
        nats = vqtrain.likelihoods.nats(spec, torch.from_numpy(images).to(dtype), mine)
        nats.sum().backward()
        assert torch.isfinite(nats).all()
        assert torch.isfinite(mine.grad).all()
    if likelihood == "logistic":
        frozen = torch.from_numpy(outputs[:, 3:] < SMALLEST_LOG_SCALE)
        assert not mine.grad[:, 3:][frozen].any()


def test_what_does_not_fit_is_named():
    spec = spec_of("logistic")
    images = np.zeros((2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"outputs: shape is \(2, 3, 4, 4\), expected \(2, 6, 4,"):
        vqref.nats(spec, images, images)
    with pytest.raises(ValueError, match=r"outputs: shape is \(2, 3, 4, 4\), expected \(N, 6, 4,"):
        vqref.reconstruct(spec, images)
    with pytest.raises(ValueError, match=r"images: values from 2 to 2, expected grey levels"):
        vqref.nats(spec, images + 2, np.zeros((2, 6, 4, 4)))
