"""The losses: Bernoulli log-probabilities of grey levels, and a total that adds up."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import xlog1py, xlogy

import vqref

SPEC = vqref.ModelSpec((1, 4, 4), base_depth=1, latent_size=2, num_codes=8, code_size=3)


@given(seed=st.integers(0, 1000), beta=st.floats(0, 4))
def test_losses_are_their_definitions(seed, beta):
    rng = np.random.default_rng(seed)
    images, logits = rng.random((3, 1, 4, 4)), rng.normal(0, 3, (3, 1, 4, 4))
    latents, quantized = rng.normal(size=(3, 2, 3)), rng.normal(size=(3, 2, 3))
    losses = vqref.compute_losses(SPEC, images, logits, latents, quantized, beta)
    p = 1 / (1 + np.exp(-logits))
    assert losses.reconstruction == pytest.approx(-(xlogy(images, p) + xlog1py(1 - images, -p)).sum() / 3)
    assert losses.commitment == pytest.approx(((latents - quantized) ** 2).sum() / (3 * 2 * 3))
    assert losses.prior == pytest.approx(2 * np.log(8))
    assert losses.total == pytest.approx(losses.reconstruction + beta * losses.commitment + losses.prior)
    assert losses.bound == losses.reconstruction + losses.prior


def test_certain_pixels_cost_nothing_and_wrong_ones_their_logit():
    images = np.zeros((1, 1, 4, 4))
    images[0, 0, 0, 0] = 1
    logits = np.where(images > 0, 1000.0, -1000.0)
    none = np.zeros((1, 2, 3))
    assert vqref.compute_losses(SPEC, images, logits, none, none).reconstruction == 0
    assert vqref.compute_losses(SPEC, images, -logits, none, none).reconstruction == 16 * 1000


def test_no_images_have_no_mean():
    with pytest.raises(ValueError, match="at least one image"):
        vqref.compute_losses(SPEC, np.zeros((0, 1, 4, 4)), np.zeros((0, 1, 4, 4)), np.zeros((0, 2, 3)), np.zeros((0, 2, 3)))


def test_arrays_of_different_batches_are_named():
    with pytest.raises(ValueError, match=r"logits: shape is \(2, 1, 4, 4\), expected \(3, 1, 4, 4\)"):
        vqref.compute_losses(SPEC, np.zeros((3, 1, 4, 4)), np.zeros((2, 1, 4, 4)), np.zeros((3, 2, 3)), np.zeros((3, 2, 3)))
