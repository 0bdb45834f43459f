"""A training step: a recording gives the same result as a normal step, and is possible."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeCopyMode

import vqtrain.run.step
from vqref import families
from vqtrain import RECIPES, VQVAE, TrainingOptions, training_step
from vqtrain.losses import compute_losses
from vqtrain.run.metrics import Meter
from vqtrain.run.recording import WARM_UP, RecordedSteps, can_be_recorded
from vqtrain.run.rules import Rules
from vqtrain.run.step import make_optimizer, take

STEPS = 40
EVERY_RULE = dataclasses.replace(
    RECIPES["default"](families.post()),
    batch_size=16,
    plain_steps=10,
    kmeans_start=False,
    revive_below=0.9,
    temperature=0.5,
    anneal_until=0.5,
)


@pytest.fixture
def batch(real_images):
    return [torch.from_numpy(np.roll(real_images, step, axis=0)) for step in range(STEPS)]


def parts(model, options):
    module = VQVAE(model.spec, model.params)
    return module, make_optimizer(module, options), Rules(options, STEPS)


def again(body):
    """Returns a recording that runs its body on tensors in fixed places, as a CUDA graph does."""
    return body


@pytest.mark.parametrize(
    "options", [TrainingOptions(batch_size=16), EVERY_RULE], ids=["post", "every rule"]
)
def test_recorded_steps_are_the_steps_bit_for_bit(model, batch, options):
    module, optimizer, rules = parts(model, options)
    alone = [
        training_step(module, optimizer, images, options, rules, step)
        for step, images in enumerate(batch)
    ]
    second, optimizer, rules = parts(model, options)
    recorded = RecordedSteps(second, optimizer, options, rules, record=again)
    for step, images in enumerate(batch):
        losses, indices = recorded(images, step)
        assert torch.equal(losses.total, alone[step][0].total)
        assert torch.equal(indices, alone[step][1])
    for name, array in second.params().items():
        np.testing.assert_array_equal(array, module.params()[name])
    assert all(
        kind.replay is not None and kind.taken == WARM_UP for kind in recorded._kinds.values()
    )
    assert len(recorded._kinds) == (4 if options is EVERY_RULE else 1)


def test_a_step_that_cannot_be_recorded_is_taken_all_the_same(model, batch):
    def refuse(body):
        raise RuntimeError("operation not permitted\nwhen a stream is capturing")

    said: list[str] = []
    options = TrainingOptions(batch_size=16)
    module, optimizer, rules = parts(model, options)
    for step, images in enumerate(batch[:8]):
        training_step(module, optimizer, images, options, rules, step)
    second, optimizer, rules = parts(model, options)
    recorded = RecordedSteps(second, optimizer, options, rules, record=refuse, say=said.append)
    for step, images in enumerate(batch[:8]):
        recorded(images, step)
    assert said == [
        "steps are not recorded, but taken one operation at a time: operation not permitted"
    ]
    for name, array in second.params().items():
        np.testing.assert_array_equal(array, module.params()[name])


@pytest.mark.parametrize("step", [0, 12, 30, 38])
def test_no_kind_of_step_waits_for_its_device(model, step):
    """Tensors without values raise if a step asks for a value, as a CUDA graph would."""
    module, _, rules = parts(model, EVERY_RULE)
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        module, choices = copy.deepcopy((module, rules.choices(step, model.spec, 16)))
    with mode:
        optimizer = make_optimizer(module, EVERY_RULE)
        losses, indices = take(module, optimizer, torch.empty(16, 1, 28, 28), EVERY_RULE, choices)
        Meter(model.spec, torch.device("cpu")).add(losses, indices)
    assert (losses.total.shape, indices.shape) == ((), (16, model.spec.latent_size))


def test_a_step_that_asked_for_a_value_would_be_seen(model, monkeypatch):
    def waiting(latents, *_):
        return torch.zeros(latents.shape[:2], dtype=torch.int64, device=latents.device) + int(
            latents.sum() > 0
        )

    monkeypatch.setattr(vqtrain.run.step, "draw", waiting)
    with pytest.raises(DataDependentOutputException):
        test_no_kind_of_step_waits_for_its_device(model, 12)


def test_a_large_codebook_is_searched_in_a_step_that_is_not_recorded():
    assert can_be_recorded(families.post(), TrainingOptions())
    assert not can_be_recorded(families.post(num_codes=16_384, code_size=64), TrainingOptions())


@pytest.mark.parametrize("family", ["post", "residual"])
def test_a_step_in_bfloat16_has_the_gradients_of_autocast(family, model, residual_model):
    """They are equal up to a few roundings of bfloat16.

    The products are the same, but here phases add up gradients of biases in bfloat16, and autocast
    does so in float32.
    """
    of = {"post": model, "residual": residual_model}[family]
    images = torch.rand(8, *of.spec.image_shape, generator=torch.Generator().manual_seed(0))

    def gradients(half):
        module = VQVAE(of.spec, of.params)
        with module.in_half().in_place() if half else torch.autocast("cpu", torch.bfloat16):
            out = module(images)
        arrays = images, out.outputs, out.latents, out.quantized
        compute_losses(of.spec, *arrays, beta=0.25).total.backward()
        if half:
            module.in_half().hand_gradients_back()
        return {name: parameter.grad for name, parameter in module.named_parameters()}

    ours, autocast = gradients(half=True), gradients(half=False)
    assert ours.keys() == autocast.keys()
    for name, gradient in ours.items():
        assert gradient.dtype == torch.float32
        off = (gradient - autocast[name]).abs().max() / autocast[name].abs().max()
        assert off <= 2.0**-6, name
