"""The losses: they meet their definitions under every likelihood, and their total adds up."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import xlog1py, xlogy

import vqref
import vqtrain.losses
from vqref import families
from vqref.likelihoods import LIKELIHOODS

SPEC = families.post((1, 4, 4), base_depth=1, latent_size=2, num_codes=8, code_size=3)


@given(seed=st.integers(0, 1000), beta=st.floats(0, 4))
def test_losses_are_their_definitions(seed, beta):
    rng = np.random.default_rng(seed)
    images, outputs = rng.random((3, 1, 4, 4)), rng.normal(0, 3, (3, 1, 4, 4))
    latents, quantized = rng.normal(size=(3, 2, 3)), rng.normal(size=(3, 2, 3))
    losses = vqref.compute_losses(SPEC, images, outputs, latents, quantized, beta)
    p = 1 / (1 + np.exp(-outputs))
    assert losses.reconstruction == pytest.approx(
        -(xlogy(images, p) + xlog1py(1 - images, -p)).sum() / 3
    )
    assert losses.commitment == pytest.approx(((latents - quantized) ** 2).sum() / (3 * 2 * 3))
    assert losses.prior == pytest.approx(2 * np.log(8))
    assert losses.total == pytest.approx(
        losses.reconstruction + beta * losses.commitment + losses.prior
    )
    assert losses.bound == losses.reconstruction + losses.prior


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@settings(deadline=None)
@given(seed=st.integers(0, 1000), beta=st.floats(0, 1e3))
def test_pytorch_computes_the_same_losses_on_a_grid_and_holds_the_codes_still(
    likelihood, seed, beta
):
    spec = families.residual(
        (3, 8, 8), hidden=2, depth=2, num_codes=5, code_size=4, likelihood=likelihood, variance=0.1
    )
    rng = np.random.default_rng(seed)
    arrays = rng.random((3, 3, 8, 8)), rng.normal(size=(3, *spec.output_shape))
    latents, quantized = rng.normal(size=(2, 3, 8, 4))
    expected = vqref.compute_losses(spec, *arrays, latents, quantized, beta)
    tensors = [torch.from_numpy(a).requires_grad_() for a in (*arrays, latents, quantized)]
    x, outputs, encoded, chosen = tensors
    found = vqtrain.losses.compute_losses(spec, x, outputs, encoded, chosen, beta)
    for name in ("reconstruction", "commitment", "prior", "total"):
        assert getattr(found, name).item() == pytest.approx(getattr(expected, name), rel=1e-12)
    found.total.backward()
    assert chosen.grad is None
    commitment = 2 * beta * (latents - quantized) / latents.size
    np.testing.assert_allclose(encoded.grad.numpy(), commitment, rtol=1e-12, atol=1e-15)


def test_certain_pixels_cost_nothing_and_wrong_ones_their_logit():
    images = np.zeros((1, 1, 4, 4))
    images[0, 0, 0, 0] = 1
    outputs = np.where(images > 0, 1000.0, -1000.0)
    none = np.zeros((1, 2, 3))
    assert vqref.compute_losses(SPEC, images, outputs, none, none).reconstruction == 0
    assert vqref.compute_losses(SPEC, images, -outputs, none, none).reconstruction == 16 * 1000


def batch(images=3, outputs=3, latents=3):
    shapes = (images, 1, 4, 4), (outputs, 1, 4, 4), (latents, 2, 3), (latents, 2, 3)
    return [np.zeros(shape) for shape in shapes]


def test_no_images_have_no_mean():
    with pytest.raises(ValueError, match="at least one image"):
        vqref.compute_losses(SPEC, *batch(0, 0, 0))


def test_arrays_of_different_batches_are_named():
    for arrays, message in (
        (batch(outputs=2), r"outputs: shape is \(2, 1, 4, 4\), expected \(3, 1, 4, 4\)"),
        (batch(latents=2), r"latents: shape is \(2, 2, 3\), expected \(3, 2, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            vqref.compute_losses(SPEC, *arrays)
