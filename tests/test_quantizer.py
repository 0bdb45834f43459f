"""The quantizer and its moving averages, in the oracle and in the trainer.

The nearest code is compared with exact arithmetic, the recurrence with results by hand, and the
trainer with the oracle in every dialect.
"""

import dataclasses
import tracemalloc
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import unit

import vqref
from vqref import families, quantizer
from vqref.dialects import DIALECTS, POST
from vqtrain.quantizer import (
    SETTLED,
    Quantizer,
    assigned,
    draw,
    reset_codes,
    revive_codes,
    update_ema,
)

SMALL = st.integers(-4, 4).map(float)


@st.composite
def latents_and_codebook(draw):
    k, d, n = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(0, 4))
    codebook = draw(st.lists(st.lists(SMALL, min_size=d, max_size=d), min_size=k, max_size=k))
    latents = draw(st.lists(st.lists(SMALL, min_size=d, max_size=d), min_size=n, max_size=n))
    return np.array(latents).reshape(n, 1, d), np.array(codebook)


@given(latents_and_codebook())
def test_quantize_is_the_first_nearest_code_in_exact_arithmetic(case):
    latents, codebook = case
    q = vqref.quantize(latents, codebook)
    for n, latent in enumerate(latents[:, 0]):
        exact = [
            sum((Fraction(x) - Fraction(c)) ** 2 for x, c in zip(latent, row, strict=True))
            for row in codebook
        ]
        assert q.indices[n, 0] == exact.index(min(exact))
        best, *others = sorted(exact)
        assert q.gap[n, 0] == (float(others[0] - best) if others else np.inf)
        np.testing.assert_array_equal(q.quantized[n, 0], codebook[q.indices[n, 0]])


def test_shapes_and_dtypes_are_those_of_the_vocabulary():
    q = vqref.quantize(np.zeros((5, 3, 2), np.float32), np.ones((4, 2), np.float32))
    assert (q.indices.shape, q.indices.dtype) == ((5, 3), np.int64)
    assert (q.quantized.shape, q.quantized.dtype) == ((5, 3, 2), np.float64)
    assert (q.gap.shape, q.gap.dtype) == ((5, 3), np.float64)


def test_latents_cut_into_pieces_give_the_same_answer(monkeypatch):
    rng = np.random.default_rng(0)
    latents, codebook = rng.normal(size=(50, 2, 7)), rng.normal(size=(11, 7))
    whole = vqref.quantize(latents, codebook)
    monkeypatch.setattr(quantizer, "DISTANCE_BYTES", 1)
    pieces = vqref.quantize(latents, codebook)
    np.testing.assert_array_equal(pieces.indices, whole.indices)
    np.testing.assert_array_equal(pieces.gap, whole.gap)


def test_memory_does_not_grow_with_the_product_of_latents_and_codes():
    """All 20,000 x 2,048 distances would take 328 MB; the working memory is some tens of MB."""
    rng = np.random.default_rng(0)
    latents, codebook = rng.normal(size=(20_000, 1, 4)), rng.normal(size=(2048, 4))
    tracemalloc.start()
    vqref.quantize(latents, codebook)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40e6


@pytest.mark.parametrize(
    ("latents", "codebook", "message"),
    [
        (
            np.zeros((2, 1, 3)),
            np.zeros((4, 2)),
            r"latents: shape is \(2, 1, 3\), expected \(N, S, 2\)",
        ),
        (np.zeros((2, 2)), np.zeros((4, 2)), r"latents: shape is \(2, 2\)"),
        (np.full((2, 1, 2), np.nan), np.zeros((4, 2)), r"latents: nan at \(0, 0, 0\)"),
        (np.zeros((2, 1, 2), int), np.zeros((4, 2)), "latents: dtype is int64"),
        (
            np.zeros((2, 1, 2)),
            np.zeros((0, 2)),
            r"codebook: shape is \(0, 2\), expected at least one row",
        ),
        (np.zeros((2, 1, 2)), np.full((4, 2), np.inf), r"codebook: inf at \(0, 0\)"),
    ],
)
def test_what_cannot_be_quantized_is_named(latents, codebook, message):
    with pytest.raises(ValueError, match=message):
        vqref.quantize(latents, codebook)


def test_one_ema_step_by_hand():
    state = vqref.EMAState(np.array([[1.0], [2.0]]), np.array([0.0, 4.0]), np.array([[1.0], [8.0]]))
    after = vqref.update_ema(
        state, np.array([[[3.0]], [[5.0]]]), np.array([[1], [1]]), decay=0.5, epsilon=0.25
    )
    np.testing.assert_array_equal(after.ema_count, [0.0, 3.0])
    np.testing.assert_array_equal(after.ema_means, [[0.5], [8.0]])
    np.testing.assert_array_equal(after.codebook, [[0.5 / 0.25], [8.0 / 3.25]])


def test_a_code_never_hit_flies_out_from_count_zero():
    """At the post's start, the count is 0, so means are divided by epsilon."""
    state = vqref.EMAState(np.array([[1.0], [2.0]]), np.zeros(2), np.array([[1.0], [2.0]]))
    after = vqref.update_ema(state, np.array([[[1.0]]]), np.array([[0]]))
    assert after.codebook[1, 0] == pytest.approx(0.99 * 2 / 1e-5)


@given(decay=st.floats(0, 1), seed=st.integers(0, 1000))
def test_an_ema_step_conserves_counts_and_changes_nothing_it_was_given(decay, seed):
    rng = np.random.default_rng(seed)
    arrays = rng.normal(size=(5, 3)), rng.uniform(0, 3, 5), rng.normal(size=(5, 3))
    copies = [array.copy() for array in arrays]
    latents, indices = rng.normal(size=(4, 2, 3)), rng.integers(0, 5, (4, 2))
    state = vqref.EMAState(*arrays)
    after = vqref.update_ema(state, latents, indices, decay=decay)
    assert after.ema_count.sum() == pytest.approx(decay * copies[1].sum() + (1 - decay) * 8)
    np.testing.assert_allclose(
        after.ema_means.sum(0),
        decay * copies[2].sum(0) + (1 - decay) * latents.sum((0, 1)),
        atol=1e-12,
    )
    for array, copy in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": np.array([[5]])}, "indices: values from 5 to 5, expected 0 to 1"),
        ({"indices": np.array([[-1]])}, "indices: values from -1 to -1"),
        ({"indices": np.array([[0.0]])}, "indices: dtype is float64, expected an integer dtype"),
        ({"indices": np.array([0])}, r"indices: shape is \(1,\), expected \(1, 1\)"),
        ({"decay": 1.5}, "decay is 1.5"),
        ({"epsilon": 0.0}, "epsilon is 0.0"),
        ({"latents": np.zeros((1, 1, 2))}, r"latents: shape is \(1, 1, 2\), expected \(N, S, 1\)"),
    ],
)
def test_an_ema_step_that_cannot_be_is_named(change, message):
    state = vqref.EMAState(np.array([[1.0], [2.0]]), np.zeros(2), np.array([[1.0], [2.0]]))
    arguments = {"latents": np.zeros((1, 1, 1)), "indices": np.array([[0]])} | change
    with pytest.raises(ValueError, match=message):
        vqref.update_ema(state, **arguments)


def test_an_ema_state_that_cannot_be_is_named():
    with pytest.raises(ValueError, match=r"ema_count: shape is \(3,\), expected \(2,\)"):
        vqref.EMAState(np.zeros((2, 1)), np.zeros(3), np.zeros((2, 1)))
    with pytest.raises(ValueError, match="ema_count: the smallest is -1"):
        vqref.EMAState(np.zeros((2, 1)), np.array([0.0, -1.0]), np.zeros((2, 1)))


def test_drawn_indices_follow_the_softmax_of_distances():
    """Compares 20,000 draws for one latent between three codes with the rule's probabilities."""
    codebook = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
    latents = np.broadcast_to([0.4, 0.1], (20_000, 1, 2))
    gumbel = np.random.default_rng(0).gumbel(size=(20_000, 1, 3))
    found = (
        np.bincount(vqref.draw_indices(latents, codebook, gumbel, 0.5).ravel(), minlength=3)
        / 20_000
    )
    distances = np.square(latents[0] - codebook).sum(axis=1)
    weights = np.exp(-distances / (2 * 0.5 * distances.min() / 2))
    np.testing.assert_allclose(found, weights / weights.sum(), atol=0.01)


def test_a_draw_without_temperature_is_the_nearest_code():
    rng = np.random.default_rng(0)
    latents, codebook = rng.normal(size=(50, 2, 4)), rng.normal(size=(9, 4))
    gumbel = rng.gumbel(size=(50, 2, 9))
    np.testing.assert_array_equal(
        vqref.draw_indices(latents, codebook, gumbel, 1e-9),
        vqref.quantize(latents, codebook).indices,
    )


def test_codes_that_are_reset_stand_where_they_were_put_after_the_next_update():
    rng = np.random.default_rng(0)
    state = vqref.EMAState(rng.normal(size=(5, 3)), rng.uniform(0, 3, 5), rng.normal(size=(5, 3)))
    rows = rng.normal(size=(2, 3))
    after = vqref.reset_codes(state, np.array([4, 1]), rows, np.array([2.0, 0.5]))
    np.testing.assert_array_equal(after.codebook[[4, 1]], rows)
    np.testing.assert_array_equal(after.codebook[[0, 2, 3]], state.codebook[[0, 2, 3]])
    np.testing.assert_array_equal(after.ema_count[[4, 1]], [2.0, 0.5])
    unhit = vqref.update_ema(after, np.zeros((1, 1, 3)), np.array([[0]]))
    np.testing.assert_allclose(unhit.codebook[[4, 1]], rows, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": np.array([1, 1])}, "codes: a code is named twice"),
        ({"codes": np.array([1, 5])}, "indices: values from 1 to 5, expected 0 to 4"),
        ({"rows": np.zeros((1, 3))}, r"rows: shape is \(1, 3\), expected \(2, 3\)"),
        ({"counts": np.array([1.0, -1.0])}, "ema_count: the smallest is -1"),
    ],
)
def test_a_reset_that_cannot_be_is_named(change, message):
    state = vqref.EMAState(np.zeros((5, 3)), np.zeros(5), np.zeros((5, 3)))
    arguments = {
        "codes": np.array([0, 1]),
        "rows": np.zeros((2, 3)),
        "counts": np.zeros(2),
    } | change
    with pytest.raises(ValueError, match=message):
        vqref.reset_codes(state, **arguments)


def test_a_draw_that_cannot_be_is_named():
    with pytest.raises(ValueError, match=r"temperature is 0\.0"):
        vqref.draw_indices(np.zeros((1, 1, 2)), np.zeros((3, 2)), np.zeros((1, 1, 3)), 0.0)
    with pytest.raises(ValueError, match=r"gumbel: shape is \(1, 1, 2\), expected \(1, 1, 3\)"):
        vqref.draw_indices(np.zeros((1, 1, 2)), np.zeros((3, 2)), np.zeros((1, 1, 2)), 1.0)


STATE = ("codebook", "ema_count", "ema_means")
EACH_DIALECT = pytest.mark.parametrize("dialect", DIALECTS.values(), ids=list(DIALECTS))


def started(dialect, rng, k=7, d=3, *, normalized=False):
    """Returns the oracle's state at the dialect's start, and the trainer's quantizer."""
    own = rng.normal(size=(k, d)) if dialect.means == "own" else None
    codebook = unit(rng.normal(size=(k, d))) if normalized else rng.normal(size=(k, d))
    state = vqref.EMAState.start(codebook, dialect, own, normalized=normalized)
    sizes = {"hidden": 2, "blocks": 0, "downsample": 2, "num_codes": k, "code_size": d}
    spec = families.residual((1, 2, 4), **sizes, normalized=normalized)
    module = Quantizer(spec, dialect).double()
    for name in STATE:
        getattr(module, name).copy_(torch.from_numpy(getattr(state, name)))
    return state, module


def require_same(module, state):
    """Requires that each array of the trainer's state is within 1e-12 of the oracle's."""
    assert int(module.steps) == state.steps
    for name in STATE:
        found, expected = getattr(module, name).numpy(), getattr(state, name)
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12 * np.abs(expected).max())


def tensors(*arrays):
    return [torch.from_numpy(np.asarray(array)) for array in arrays]


def hits_and_sums(latents, indices):
    """Returns what an update of 7 codes takes."""
    return assigned(torch.from_numpy(latents), torch.from_numpy(indices), 7)


def reset(module, arrays, *how):
    """Returns the trainer's state after some codes are reset. arrays: codes, rows, counts."""
    codes, rows, counts = tensors(*arrays)
    codebook, count, means = (getattr(module, name) for name in STATE)
    return reset_codes(codebook, count, means, codes, rows, counts, *how)


def dead_codes(state, latents, below, decay, dialect):
    """Returns the codes that the trainer calls dead: counts below this share of the mean."""
    share = 1 - decay**state.steps if dialect.debiased else 1.0
    return np.flatnonzero(state.ema_count < below * latents / len(state.ema_count) * share)


@EACH_DIALECT
@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 9999),
    decay=st.floats(0, 0.999),
    epsilon=st.floats(1e-7, 0.1),
    normalized=st.booleans(),
)
def test_the_trainer_updates_resets_and_revives_as_the_oracle_does(
    dialect, seed, decay, epsilon, normalized
):
    """Each side takes six steps from its own state.

    One step in three resets codes, and another revives dead ones. Unit codes are still unit codes
    after each step.
    """
    rng, how = np.random.default_rng(seed), (decay, epsilon)
    state, module = started(dialect, rng, normalized=normalized)
    for step in range(6):
        latents, indices = rng.normal(size=(4, 2, 3)), rng.integers(0, 5, (4, 2))
        module.update(*hits_and_sums(latents, indices), *how)
        state = vqref.update_ema(state, latents, indices, *how, dialect)
        require_same(module, state)
        if step % 3 == 1:
            codes, rows, counts = np.array([6, 2]), rng.normal(size=(2, 3)), rng.uniform(0, 4, 2)
            options = (*how, dialect, module.steps, normalized)
            found = reset(module, (codes, rows, counts), *options)
            state = vqref.reset_codes(state, codes, rows, counts, *how, dialect)
            for name, value in zip(STATE, found, strict=True):
                getattr(module, name).copy_(value)
        if step % 3 == 2:
            order = rng.permutation(8)
            dead = dead_codes(state, 8, 0.3, decay, dialect)[:8]
            rows = latents.reshape(-1, 3)[order]
            module.revive(*tensors(rows), 8 / 7, 0.3, *how)
            rows = rows[: len(dead)]
            state = vqref.reset_codes(state, dead, rows, np.full(len(dead), 8 / 7), *how, dialect)
        require_same(module, state)
        if normalized:
            lengths = np.linalg.norm(state.codebook, axis=1)
            np.testing.assert_allclose(lengths, 1, rtol=1e-14)


def test_a_unit_code_is_the_direction_of_its_means():
    """By hand, for (3, 4) of length 5.

    The count does not matter, and the averages are as for other codebooks.
    """
    state = vqref.EMAState(np.eye(2), np.ones(2), np.eye(2))
    unit_state = dataclasses.replace(state, normalized=True)
    latents, indices = np.array([[[5.0, 8.0]]]), np.array([[0]])
    plain, on_sphere = (
        vqref.update_ema(each, latents, indices, decay=0.5) for each in (state, unit_state)
    )
    np.testing.assert_allclose(on_sphere.codebook, [[0.6, 0.8], [0.0, 1.0]], rtol=1e-15)
    np.testing.assert_array_equal(on_sphere.ema_means, plain.ema_means)
    np.testing.assert_array_equal(on_sphere.ema_count, plain.ema_count)
    reset = vqref.reset_codes(unit_state, [1], [[0.0, -9.0]], [2.0])
    np.testing.assert_array_equal(reset.codebook, [[1.0, 0.0], [0.0, -1.0]])
    np.testing.assert_allclose(reset.ema_means[1], [0.0, -2.0], rtol=1e-4)


@EACH_DIALECT
def test_a_unit_code_that_nothing_hits_stays_however_long(dialect):
    """Its means shrink to nothing, or start there; decay 0 forgets them at once."""
    rng = np.random.default_rng(0)
    state, module = started(dialect, rng, normalized=True)
    latents, indices = rng.normal(size=(4, 2, 3)), np.zeros((4, 2), int)
    before = state.codebook.copy()
    for _ in range(3):
        state = vqref.update_ema(state, latents, indices, 0.0, 1e-5, dialect)
        module.update(*hits_and_sums(latents, indices), 0.0, 1e-5)
        require_same(module, state)
    np.testing.assert_array_equal(state.codebook[1:], before[1:])
    assert (state.codebook[0] != before[0]).all()


@EACH_DIALECT
def test_the_order_of_updates_counts_only_for_a_debiased_dialect(dialect):
    """``steps`` may be a tensor or a number."""
    rng = np.random.default_rng(0)
    _, module = started(dialect, rng)
    latents, indices = rng.normal(size=(4, 2, 3)), rng.integers(0, 5, (4, 2))
    state = [getattr(module, name) for name in STATE]
    given: list[Any] = [*state, *tensors(latents, indices), 0.9, 1e-5, dialect]
    third, same, first = (update_ema(*[*given, n]) for n in (torch.tensor(2), 2, 0))
    assert all(torch.equal(a, b) for a, b in zip(third, same, strict=True))
    assert dialect.debiased != torch.equal(third[0], first[0])


@EACH_DIALECT
def test_codes_on_which_their_latents_sit_stay_after_a_start(dialect):
    """The start is as if after long training: count and means fit the codebook, up to epsilon."""
    rng = np.random.default_rng(0)
    _, module = started(dialect, rng)
    rows, counts = rng.normal(size=(7, 3)), rng.integers(1, 5, 7).astype(np.float64)
    module.start(*tensors(rows, counts), 0.9, 1e-5)
    assert int(module.steps) == SETTLED
    np.testing.assert_array_equal(module.codebook.numpy(), rows)
    np.testing.assert_array_equal(module.ema_count.numpy(), counts)
    indices = np.repeat(np.arange(7), counts.astype(int))[None]
    for _ in range(3):
        module.update(*hits_and_sums(rows[indices], indices), 0.9, 1e-5)
        np.testing.assert_allclose(module.codebook.numpy(), rows, rtol=2e-5)
        np.testing.assert_allclose(module.ema_count.numpy(), counts, rtol=2e-5)


@EACH_DIALECT
def test_a_reset_before_the_first_update_is_the_oracles(dialect):
    """The averages of a debiased dialect are empty then, and stay empty."""
    rng = np.random.default_rng(0)
    state, module = started(dialect, rng)
    codes, rows, counts = np.array([3, 0]), rng.normal(size=(2, 3)), np.array([2.0, 0.5])
    found = reset(module, (codes, rows, counts), 0.9, 1e-5, dialect, module.steps)
    expected = vqref.reset_codes(state, codes, rows, counts, 0.9, 1e-5, dialect)
    for name, value in zip(STATE, found, strict=True):
        np.testing.assert_allclose(value.numpy(), getattr(expected, name), rtol=1e-12)


@given(seed=st.integers(0, 999), latents=st.integers(1, 12), below=st.floats(0.01, 1.0))
def test_reviving_is_the_oracles_reset_of_the_dead_codes(seed, latents, below):
    """Tries some dead codes, none, all, and more than there are latents."""
    rng = np.random.default_rng(seed)
    codebook, means, rows = (rng.normal(size=(k, 3)) for k in (7, 7, latents))
    count, order = rng.uniform(0, 2 * latents / 7, 7), rng.permutation(latents)
    held = tensors(codebook, count, means, rows[order])
    given: list[Any] = [*held, latents / 7, below, 0.99, 1e-5]
    found = revive_codes(*given)
    state = vqref.EMAState(codebook, count, means)
    dead = dead_codes(state, latents, below, 0.99, POST)[:latents]
    counts = np.full(len(dead), latents / 7)
    expected = vqref.reset_codes(state, dead, rows[order[: len(dead)]], counts, 0.99, 1e-5)
    for name, tensor in zip(STATE, found, strict=True):
        np.testing.assert_allclose(tensor.numpy(), getattr(expected, name), rtol=0, atol=1e-12)


@settings(deadline=None)
@given(seed=st.integers(0, 9999), temperature=st.floats(0.01, 10), d=st.integers(1, 9))
def test_the_trainer_draws_what_the_oracle_draws(seed, temperature, d):
    """In float64, the scores are equal up to rounding.

    So a difference could only be a tie, and no seed of 50 latents has one.
    """
    rng = np.random.default_rng(seed)
    latents, codebook = rng.normal(size=(25, 2, d)), rng.normal(size=(9, d))
    gumbel = rng.gumbel(size=(25, 2, 9))
    x, c, g = tensors(latents, codebook, gumbel)
    found = draw(x, c, g, temperature)
    expected = vqref.draw_indices(latents, codebook, gumbel, temperature)
    np.testing.assert_array_equal(found.numpy(), expected)


def test_state_holds_the_codebook_and_its_averages_but_not_the_steps():
    _, module = started(POST, np.random.default_rng(0))
    assert set(module.state_dict()) == set(STATE)
    assert not list(module.parameters())
