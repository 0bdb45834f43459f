"""Truth from outside: one training step that TensorFlow computed in float64."""

import numpy as np
import pytest
import torch

import vqref
from vqref import parity
from vqref.spec import EMA_COUNT
from vqtrain import VQVAE
from vqtrain.losses import compute_losses
from vqtrain.quantizer import update_ema

STAGES = ("latents", "quantized", "logits", "probabilities")
LOSSES = ("reconstruction", "commitment", "prior", "total")
STATE = ("codebook", "ema_count", "ema_means")


def off(found, expected: np.ndarray) -> float:
    """Largest error beside the array's largest magnitude."""
    found = np.asarray(found)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype == np.float64
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_the_oracle_computes_every_stage_of_the_golden_step(golden):
    out = vqref.forward(golden.spec, golden.params, golden["images"])
    np.testing.assert_array_equal(out.indices, golden["indices"])
    for name in STAGES:
        assert off(getattr(out, name), golden[name]) <= 1e-12, name
    for name in LOSSES:
        assert off(np.float64(getattr(out.losses, name)), golden[f"loss/{name}"]) <= 1e-12, name


def test_the_oracle_computes_the_golden_ema_step(golden):
    assert (golden.params[EMA_COUNT] == 0).sum() == 3
    state = vqref.EMAState.from_params(golden.params)
    after = vqref.update_ema(state, golden["latents"], golden["indices"])
    for name in STATE:
        assert off(getattr(after, name), golden[f"after/quantizer.{name}"]) <= 1e-12, name


@pytest.fixture
def trained(golden):
    """The trainer's module in float64 after one forward and backward pass on the golden batch."""
    module = VQVAE(golden.spec, {name: array.astype(np.float64) for name, array in golden.params.items()})
    images = torch.from_numpy(golden["images"])
    out = module(images)
    losses = compute_losses(golden.spec, images, out.logits, out.latents, out.quantized, beta=0.25)
    losses.total.backward()
    return module, out, losses


def test_the_trainer_computes_every_stage_of_the_golden_step(golden, trained):
    _, out, losses = trained
    np.testing.assert_array_equal(out.indices.numpy(), golden["indices"])
    for name in ("latents", "quantized", "logits"):
        assert off(getattr(out, name).detach().numpy(), golden[name]) <= 1e-11, name
    assert off(out.logits.sigmoid().detach().numpy(), golden["probabilities"]) <= 1e-11
    for name in LOSSES:
        assert off(getattr(losses, name).detach().numpy(), golden[f"loss/{name}"]) <= 1e-11, name


def test_the_trainer_computes_the_golden_gradient_of_every_parameter(golden, trained):
    module, _, _ = trained
    gradients = {name: parameter.grad.numpy() for name, parameter in module.named_parameters()}
    recorded = {key.removeprefix("grad/") for key in golden.arrays if key.startswith("grad/")}
    assert set(gradients) == recorded
    for name, gradient in gradients.items():
        parity.check("gradients", gradient, golden[f"grad/{name}"], precision="float64").require()
    assert parity.tolerance("gradients", "float64").relative <= 1e-11


def test_the_trainer_computes_the_golden_ema_step(golden):
    state = [torch.from_numpy(golden.params[f"quantizer.{name}"].astype(np.float64)) for name in ("ema_count", "ema_means")]
    latents, indices = torch.from_numpy(golden["latents"]), torch.from_numpy(golden["indices"])
    after = update_ema(*state, latents, indices, decay=0.99, epsilon=1e-5)
    for name, found in zip(STATE, after, strict=True):
        assert off(found.numpy(), golden[f"after/quantizer.{name}"]) <= 1e-11, name
