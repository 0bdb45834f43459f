"""The optimizers of the networks: Muon's orthogonal steps, and Adam's for the rest."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import SPEC, trainer
from torch.nn import Parameter

from vqref.errors import InputError
from vqtrain.optimizers import ADAMS_SIZE, MAKERS, MOMENTUM, inverse_roots, is_matrix
from vqtrain.options import OPTIMIZERS
from vqtrain.run.fitting import require_fitting

RATE = 0.01
HOW = {"lr": RATE, "betas": (0.9, 0.99), "eps": 1e-7, "capturable": False}


def drawn(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_every_optimizer_that_an_option_names_is_made_and_no_other():
    assert tuple(MAKERS) == OPTIMIZERS


def orthogonal(matrix):
    """Returns what Muon takes for the nearest matrix with orthogonal rows, or columns."""
    wide = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    turned = inverse_roots((wide @ wide.T)[None])[0] @ wide
    return turned if wide is matrix else turned.T


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6), st.floats(-6, 6))
def test_singular_values_become_about_one_and_singular_vectors_stay(rows, columns, seed, size):
    """The range of three rounds: 0.01 of the norm and above become 0.73 to 1.27."""
    u, s, v = torch.linalg.svd(drawn(seed, rows, columns), full_matrices=False)
    s = s.clamp(min=0.01 * s.norm())
    found = orthogonal(10**size * (u * s) @ v)
    turned = u.T @ found @ v.T
    values = turned.diagonal()
    assert (turned - torch.diag(values)).abs().max() < 1e-9
    assert values.min() > 0.729
    assert values.max() < 1.27


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_gradients_of_any_size_turn_alike(dtype, size):
    matrix = drawn(3, 4, 9, dtype=dtype)
    np.testing.assert_allclose(orthogonal(size * matrix), orthogonal(matrix), rtol=1e-4)


def test_matrices_of_many_sides_move_together_as_each_would_alone():
    shapes = (3, 7, 1, 1), (5, 6, 1, 1), (3, 4, 2, 1), (9, 2, 1, 1), (2, 2, 3, 3), (5, 5, 1, 1)
    moved: dict[bool, list[Parameter]] = {True: [], False: []}
    for together, found in moved.items():
        found += [Parameter(drawn(i, *shape)) for i, shape in enumerate(shapes)]
        for i, p in enumerate(found):
            p.grad = drawn(100 + i, *p.shape)
        for group in [found] if together else [[p] for p in found]:
            MAKERS["muon"](group, **HOW).step()
    for one, other in zip(moved[True], moved[False], strict=True):
        np.testing.assert_allclose(one.detach(), other.detach(), rtol=1e-12)


def test_a_zero_matrix_stays_zero():
    assert torch.equal(orthogonal(torch.zeros(3, 5)), torch.zeros(3, 5))


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (32, 8, 1, 1)])
def test_the_order_in_memory_does_not_change_a_step(shape):
    moved = []
    for order in (torch.contiguous_format, torch.channels_last):
        p = Parameter(drawn(4, *shape).to(memory_format=order))
        p.grad = drawn(5, *shape).to(memory_format=order)
        MAKERS["muon"]([p], **HOW).step()
        moved.append(p.detach())
    np.testing.assert_allclose(moved[0], moved[1], rtol=1e-9)


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (4, 32, 2, 2)])
def test_a_first_step_of_muon_is_as_large_as_adams_and_goes_along_the_gradient(shape):
    gradient = drawn(0, *shape, dtype=torch.float32)
    p = Parameter(torch.zeros(shape))
    p.grad = gradient
    MAKERS["muon"]([p], **HOW).step()
    step = p.detach().flatten(1)
    assert (step * gradient.flatten(1)).sum() < 0
    size = step.square().mean().sqrt()
    assert 0.5 * ADAMS_SIZE < size / RATE < 1.3 * ADAMS_SIZE
    expected = -RATE * ADAMS_SIZE * max(step.shape) ** 0.5 * orthogonal(gradient.flatten(1))
    np.testing.assert_allclose(step, expected, rtol=1e-4, atol=1e-7)


def test_muons_mean_gradient_looks_ahead_as_nesterov_does():
    first, second = drawn(1, 3, 5, 2, 2), drawn(2, 3, 5, 2, 2)
    p = Parameter(torch.zeros(3, 5, 2, 2, dtype=torch.float64))
    optimizer = MAKERS["muon"]([p], **HOW)
    p.grad = first
    optimizer.step()
    before = p.detach().clone()
    p.grad = second
    optimizer.step()
    mean = MOMENTUM * (1 - MOMENTUM) * first + (1 - MOMENTUM) * second
    ahead = (1 - MOMENTUM) * second + MOMENTUM * mean
    expected = RATE * ADAMS_SIZE * 20**0.5 * orthogonal(ahead.flatten(1))
    np.testing.assert_allclose((before - p.detach()).flatten(1), expected, rtol=1e-9)


def test_parameters_that_are_no_matrix_move_as_with_adam_bit_for_bit():
    shapes = (7,), (5, 3), (8, 1, 3, 3), (1, 8, 3, 3)
    assert not any(map(is_matrix, shapes))
    moved = {}
    for name in MAKERS:
        params = [Parameter(drawn(i, *shape)) for i, shape in enumerate(shapes)]
        optimizer = MAKERS[name](params, **HOW)
        for step in range(5):
            for i, p in enumerate(params):
                p.grad = drawn(100 * step + i, *p.shape)
            optimizer.step()
        moved[name] = [p.detach() for p in params]
    assert all(map(torch.equal, moved["adam"], moved["muon"]))
    assert not torch.equal(moved["adam"][0], drawn(0, 7))


def test_a_snapshot_of_one_optimizer_does_not_fit_a_run_with_the_other(tmp_path, many_images):
    states = {}
    for name in OPTIMIZERS:
        (tmp_path / name).mkdir()
        run = trainer(tmp_path / name, many_images, optimizer=name, epochs=1)
        run.run()
        states[name] = run.state.to_plain()
        require_fitting(states[name], SPEC, name)
    for name, other, said in (
        ("muon", "adam", r"optimizer\.state\.2\.step is missing"),
        ("adam", "muon", r"optimizer\.state\.2\.step is not known"),
    ):
        with pytest.raises(InputError, match=said):
            require_fitting(states[name], SPEC, other)


def test_a_parameter_without_a_gradient_stays():
    params = [Parameter(torch.ones(3, 3, 2, 2)), Parameter(torch.ones(3))]
    MAKERS["muon"](params, **HOW).step()
    assert all((p == 1).all() for p in params)
