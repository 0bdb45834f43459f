"""The oracle's derivatives of every kind of row, activation and likelihood, and of the loss.

They are compared with golden gradients of TensorFlow and Sonnet, with PyTorch, and with finite
differences.
"""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import GOLDEN, ROWS, VQGAN, inputs_of, small_model

import vqref
import vqref.network
import vqtrain.network
from vqref import families
from vqref.agreement import parity
from vqref.likelihoods import LIKELIHOODS
from vqref.network import ACTIVATIONS, KINDS
from vqref.spec import CODEBOOK
from vqtrain import VQVAE
from vqtrain.losses import compute_losses

STEP = 1e-5
"""The step along a direction. The quotient errs by the rounding of two losses divided by it."""


def off(found, expected):
    """Returns the largest error, divided by the array's largest magnitude."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype == np.float64
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-300))


def all_off(found, expected):
    """Returns the largest error of gradients by name, relative to their magnitudes.

    A bias's error is also relative to the weight of its row: a bias without effect, such as a
    key's, has a gradient of rounding only.
    """
    assert set(found) == set(expected)
    worst = {}
    for name, each in expected.items():
        assert (found[name].shape, found[name].dtype) == (each.shape, np.float64)
        weight = expected[f"{name.rpartition('.')[0]}.weight"] if name.endswith("bias") else each
        scale = max(np.abs(each).max(), np.abs(weight).max())
        worst[name] = float(np.abs(found[name] - each).max() / scale)
    return max(worst.values())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ROWS)
def test_numpy_and_pytorch_pull_a_gradient_back_alike_through_every_kind(name, activation):
    row, rng = ROWS[name], np.random.default_rng(1)
    kind = row.kind
    row = dataclasses.replace(row, activation=activation)
    weights = [rng.normal(size=shape) for _, shape in row.parameters]
    inputs = inputs_of(row, rng)
    tensors = [torch.from_numpy(array) for array in (*inputs, *weights)]
    for tensor in tensors:
        tensor.requires_grad_(tensor.is_floating_point())
    y = vqtrain.network.ACTIVATIONS[activation](vqtrain.network.KINDS[kind](row, *tensors))
    gradient = rng.normal(size=(3, *row.out_shape))
    y.backward(torch.from_numpy(gradient))
    before = KINDS[kind].value(row, *inputs, *weights)
    g = gradient * ACTIVATIONS[activation].slope(before)
    pulled = KINDS[kind].backward(row, g, *inputs, *weights) + KINDS[kind].learn(row, g, *inputs)
    assert len(pulled) == len(tensors)
    for found, tensor in zip(pulled, tensors, strict=True):
        if tensor.requires_grad:
            assert off(found, tensor.grad.numpy()) <= 1e-12
        else:
            assert not found.any()


@pytest.mark.parametrize("size", [0.0, 1e-13, 1e-6])
def test_numpy_and_pytorch_divide_vectors_shorter_than_the_least_by_a_constant(size):
    row, rng = ROWS["unit_norm"], np.random.default_rng(7)
    x, g = size * rng.normal(size=(2, *row.in_shape)), rng.normal(size=(2, *row.in_shape))
    tensor = torch.from_numpy(x).requires_grad_()
    y = vqtrain.network.KINDS["unit_norm"](row, tensor)
    y.backward(torch.from_numpy(g))
    np.testing.assert_allclose(KINDS["unit_norm"].value(row, x), y.detach(), rtol=1e-14)
    (pulled,) = KINDS["unit_norm"].backward(row, g, x)
    assert off(pulled, tensor.grad.numpy()) <= 1e-9  # (g - y g.y) cancels


@pytest.mark.parametrize("name", ACTIVATIONS)
@given(x=st.floats(-20, 20).filter(lambda x: abs(x) > 1e-4))
def test_an_activations_slope_is_its_difference_quotient(name, x):
    activation, h = ACTIVATIONS[name], 1e-5
    lower, upper = (activation.value(np.array([x + step])) for step in (-h, h))
    expected = (upper - lower) / (2 * h)
    assert activation.slope(np.array([x])) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", LIKELIHOODS)
@given(data=st.data())
def test_a_likelihoods_derivative_is_its_difference_quotient(name, data):
    spec = families.residual((1, 4, 4), downsample=2, likelihood=name, variance=0.05)
    level = data.draw(st.sampled_from([0, 1, 100, 254, 255])) / 255
    x = np.full((1, 1, 4, 4), level)
    outputs = np.full((1, *spec.output_shape), data.draw(st.floats(-2, 2)))
    outputs[:, 1:] = data.draw(st.floats(-6, 1))
    likelihood, h = LIKELIHOODS[name], 1e-6
    found = likelihood.backward(spec, x, outputs)
    assert found.shape == outputs.shape
    for channel in range(outputs.shape[1]):
        step = np.zeros_like(outputs)
        step[:, channel] = h
        lower, upper = (likelihood.nats(spec, x, outputs + s) for s in (-step, step))
        expected = (upper - lower) / (2 * h)
        np.testing.assert_allclose(found[:, [channel]], expected, rtol=1e-5, atol=1e-6)


def test_a_log_scale_below_the_smallest_moves_nothing():
    spec = families.residual((1, 4, 4), downsample=2, likelihood="logistic")
    outputs = np.full((1, *spec.output_shape), -9.0)
    found = LIKELIHOODS["logistic"].backward(spec, np.full((1, 1, 4, 4), 0.5), outputs)
    assert np.isfinite(found).all()
    assert (found[:, 1:] == 0).all()
    assert (found[:, :1] != 0).all()


def test_the_oracle_computes_the_golden_gradient_of_every_parameter(golden):
    found = vqref.gradients(golden.spec, golden.params, golden["images"])
    recorded = {key.removeprefix("grad/") for key in golden.arrays if key.startswith("grad/")}
    assert set(found) == recorded
    for name, gradient in found.items():
        assert off(gradient, golden[f"grad/{name}"]) <= 1e-11, name


def cases():
    post = families.post((1, 12, 12), 4, 2, 8, 4)
    yield "post", post
    for likelihood in LIKELIHOODS:
        sizes: dict[str, Any] = {
            "hidden": 8,
            "blocks": 2,
            "block_hidden": 4,
            "num_codes": 16,
            "code_size": 4,
        }
        spec = families.residual((3, 16, 16), **sizes, variance=0.07, likelihood=likelihood)
        yield f"residual, {likelihood}", spec
    for likelihood in ("gaussian", "logistic"):
        spec = families.vqgan((3, 16, 8), **VQGAN, variance=0.07, likelihood=likelihood)
        yield f"vqgan, {likelihood}", spec
    yield "vqgan of unit codes", families.vqgan((3, 16, 8), **VQGAN, normalized=True)
    levels = {**sizes, "num_codes": 60, "code_size": 3, "levels": (5, 4, 3)}
    yield "a grid of codes", families.residual((3, 16, 16), **levels)
    yield "two latents at a place", families.residual((3, 8, 8), **{**sizes, "depth": 2})


CASES = dict(cases())


def autograd(spec, params, images, beta):
    """Returns PyTorch's gradients in float64, and the indices that it chose."""
    module = VQVAE(spec, {name: array.astype(np.float64) for name, array in params.items()})
    x = torch.from_numpy(images)
    out = module(x)
    compute_losses(spec, x, out.outputs, out.latents, out.quantized, beta).total.backward()
    return {name: p.grad.numpy() for name, p in module.named_parameters()}, out.indices.numpy()


@pytest.mark.parametrize("name", CASES)
def test_oracle_and_pytorch_agree_on_the_gradient_of_every_parameter(name):
    spec = CASES[name]
    params = small_model(spec).params
    images = np.random.default_rng(2).random((5, *spec.image_shape))
    expected, _ = autograd(spec, params, images, beta=0.7)
    found = vqref.gradients(spec, params, images, beta=0.7)
    assert all_off(found, expected) <= 1e-12


@pytest.mark.parametrize("name", CASES)
def test_the_decoders_gradients_are_difference_quotients_of_the_loss(name):
    """Only the decoder's are, since the straight-through estimator is not a derivative."""
    spec, rng = CASES[name], np.random.default_rng(3)
    params = {n: a.astype(np.float64) for n, a in small_model(spec).params.items()}
    images = rng.random((2, *spec.image_shape))
    found = vqref.gradients(spec, params, images)
    for parameter in (n for n in found if n.startswith("decoder.")):
        direction = rng.normal(size=params[parameter].shape)
        h = STEP / np.linalg.norm(direction)
        around = [
            vqref.forward(spec, params | {parameter: params[parameter] + s * direction}, images)
            for s in (-h, h)
        ]
        lower, upper = (out.losses.total for out in around)
        along = float((found[parameter] * direction).sum())
        scale = np.linalg.norm(found[parameter]) * np.linalg.norm(direction)
        allowed = 1e-6 * scale + 8 * np.finfo(np.float64).eps * abs(upper) / h
        assert (upper - lower) / (2 * h) == pytest.approx(along, abs=allowed), parameter


def test_the_encoders_gradients_are_difference_quotients_of_what_the_estimator_says():
    """The loss takes the decoder's input as latents plus a constant, and the code as a constant."""
    spec, rng = CASES["residual, gaussian"], np.random.default_rng(4)
    params = {n: a.astype(np.float64) for n, a in small_model(spec).params.items()}
    images, beta = rng.random((2, *spec.image_shape)), 0.5
    known = vqref.forward(spec, params, images)
    found = vqref.gradients(spec, params, images, beta)

    def total(moved):
        latents = vqref.encode(spec, moved, images)
        outputs = vqref.decode(spec, moved, latents + (known.quantized - known.latents))
        return vqref.compute_losses(spec, images, outputs, latents, known.quantized, beta).total

    for parameter in (n for n in found if n.startswith("encoder.")):
        direction = rng.normal(size=params[parameter].shape)
        h = STEP / np.linalg.norm(direction)
        lower, upper = (
            total(params | {parameter: params[parameter] + s * direction}) for s in (-h, h)
        )
        along = float((found[parameter] * direction).sum())
        scale = np.linalg.norm(found[parameter]) * np.linalg.norm(direction)
        allowed = 1e-6 * scale + 8 * np.finfo(np.float64).eps * abs(upper) / h
        assert (upper - lower) / (2 * h) == pytest.approx(along, abs=allowed), parameter


def test_indices_that_are_given_take_the_place_of_the_nearest():
    spec = CASES["post"]
    params = small_model(spec).params
    images = np.random.default_rng(5).random((3, *spec.image_shape))
    nearest = vqref.forward(spec, params, images).indices
    own, same, other = (
        vqref.gradients(spec, params, images, indices=indices)
        for indices in (None, nearest, (nearest + 1) % spec.num_codes)
    )
    for name, gradient in own.items():
        np.testing.assert_array_equal(gradient, same[name])
        assert not np.array_equal(gradient, other[name])
    with pytest.raises(ValueError, match="indices: values"):
        vqref.gradients(spec, params, images, indices=nearest + spec.num_codes)


@pytest.mark.parametrize("name", ["residual, gaussian", "vqgan, gaussian"])
def test_batches_and_bands_of_any_size_add_up(name, monkeypatch):
    spec = CASES[name]
    params = small_model(spec).params
    images = np.random.default_rng(6).random((7, *spec.image_shape))
    whole = vqref.gradients(spec, params, images)
    monkeypatch.setattr("vqref.network.WINDOW_BYTES", 1)
    assert all_off(vqref.gradients(spec, params, images), whole) <= 1e-13


def test_the_oracle_computes_sonnets_gradients():
    with np.load(GOLDEN / "sonnet_step.npz") as arrays:
        step = {key: arrays[key] for key in arrays.files}
    hidden, blocks, block_hidden, num_codes, code_size = map(int, step["sizes"])
    spec = families.residual(
        (3, 32, 32),
        hidden=hidden,
        blocks=blocks,
        block_hidden=block_hidden,
        num_codes=num_codes,
        code_size=code_size,
        variance=float(step["variance"]),
    )
    params = {p.name: step.get(f"param/{p.name}") for p in spec.parameters}
    params[CODEBOOK] = step["before/codebook"]
    params["quantizer.ema_count"] = step["before/count"]
    params["quantizer.ema_means"] = step["before/means"]
    images = np.rint(255 * step["images"].astype(np.float64)) / 255
    values = math.prod(spec.image_shape)
    found = vqref.gradients(spec, params, images, beta=0.25 * values / 2)
    for name, gradient in found.items():
        assert off(gradient * 2 / values, step[f"grad/{name}"]) <= 1e-11, name


def test_a_tolerance_for_gradients_is_as_strict_as_these_tests():
    assert parity.tolerance("gradients", "float64").relative <= 1e-11
