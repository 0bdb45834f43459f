"""The kit: right implementations pass, and every mutation of one is caught by the checks that are
named for it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vqref
from benchmarks.agreement import computed
from vqref.agreement.bounds import FORMS
from vqref.checks.adversary import CASES
from vqref.checks.checks import check_quantizer, quantizer_checks
from vqref.dialects import DIALECTS, POST
from vqref.errors import ExitCode, ParityError
from vqref.precisions import PRECISIONS
from vqref.quantizer import EMAState
from vqtrain import nearest as search
from vqtrain import quantizer as trained


def distances(latents, codebook):
    return np.square(latents[:, :, None] - codebook).sum(-1)


def quantize(latents, codebook):
    indices = distances(latents, codebook).argmin(-1)
    return indices, codebook[indices]


def update(state, latents, indices, decay, epsilon):
    """The post's dialect in float32."""
    count, means = moved(state, latents, indices, np.float32(decay))
    return means / (count + np.float32(epsilon))[:, None], count, means


def moved(state, latents, indices, decay):
    hits = np.bincount(indices.ravel(), minlength=len(state.ema_count)).astype(np.float32)
    sums = np.zeros(state.codebook.shape, np.float32)
    np.add.at(sums, indices.ravel(), latents.reshape(-1, latents.shape[-1]))
    count = decay * state.ema_count.astype(np.float32) + (1 - decay) * hits
    return count, decay * state.ema_means.astype(np.float32) + (1 - decay) * sums


def step(state, latents, decay, epsilon):
    indices, quantized = quantize(latents, state.codebook.astype(np.float32))
    return indices, quantized, update(state, latents, indices, decay, epsilon)


def torch_quantize(latents, codebook):
    return search.nearest(torch.from_numpy(latents), torch.from_numpy(codebook)).numpy()


def torch_update(state, latents, indices, decay, epsilon):
    count, means = (
        torch.from_numpy(array.astype(np.float32)) for array in (state.ema_count, state.ema_means)
    )
    found = trained.update_ema(
        count, means, torch.from_numpy(latents), torch.from_numpy(indices), decay, epsilon
    )
    return tuple(tensor.numpy() for tensor in found)


def test_a_plain_numpy_quantizer_passes_every_check():
    report = check_quantizer(quantize, update, step)
    assert [check.stage for check in report.checks] == [
        str(check) for check in quantizer_checks(quantize, update, step)
    ]
    assert report.passed
    assert all(len(line) <= 80 for line in str(report).splitlines())


def test_the_trainers_quantizer_passes_every_check():
    assert check_quantizer(torch_quantize, torch_update).passed


def test_the_oracle_passes_every_check_in_every_dialect():
    for dialect in DIALECTS.values():

        def update(state, latents, indices, decay, epsilon, dialect=dialect):
            return vqref.update_ema(state, latents, indices, decay, epsilon, dialect)

        def quantize(latents, codebook):
            q = vqref.quantize(latents, codebook)
            return q.indices, q.quantized

        assert check_quantizer(
            quantize, update, precision="float64", dialect=dialect, num_codes=9, code_size=3
        ).passed


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("precision", [name for name, p in PRECISIONS.items() if p.arithmetic])
@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 2**32 - 1),
    d=st.integers(1, 48),
    k=st.integers(4, 40),
    name=st.sampled_from(list(CASES)),
)
def test_no_adversary_finds_rounding_beyond_its_bound(precision, form, seed, d, k, name):
    latents, codebook = CASES[name](np.random.default_rng(seed), 200, k, d, precision)
    found = computed(latents, codebook, precision, form).argmin(-1).numpy()[:, None]
    vqref.agreement.parity.check_indices(
        found, latents, codebook, precision=precision, form=form
    ).require()


@pytest.mark.parametrize("name", CASES)
def test_a_case_is_the_same_for_the_same_seed_and_hard_in_the_way_it_says(name):
    (latents, codebook), again = (
        CASES[name](np.random.default_rng(3), 100, 16, 8, "float32") for _ in range(2)
    )
    np.testing.assert_array_equal(latents, again[0])
    np.testing.assert_array_equal(codebook, again[1])
    assert (latents.shape, codebook.shape, latents.dtype, codebook.dtype) == (
        (100, 1, 8),
        (16, 8),
        np.float32,
        np.float32,
    )
    assert np.isfinite(latents).all()
    assert np.isfinite(codebook).all()
    q = vqref.quantize(latents, codebook)
    with np.errstate(over="ignore"):
        single = distances(latents, codebook)
    hard = {
        "ordinary": q.gap.min() > 0,
        "duplicates": len(np.unique(codebook, axis=0)) < 16 and q.gap.min() == 0,
        "bisector": (q.gap < 1e-5).any(),
        "equidistant": (q.gap == 0).all(),
        "mixed_scales": np.abs(latents).max() > 1e10 and np.abs(latents).max(axis=2).min() < 1e-10,
        "overflowing": np.isinf(single).any() and np.isfinite(single).any(),
        "denormals": (single == 0).all(),
        "far_from_origin": codebook.min() > 10 and np.ptp(codebook) < 20,
        "flown_out": np.abs(codebook).max() > 1e4 and np.abs(codebook).max(axis=1).min() < 1e-4,
        "on_codes": (q.quantized == latents).all(),
        "crowded": np.ptp(codebook, axis=0).max() < 1e-5,
    }
    assert hard[name]


def bfloat16(array):
    return (np.ascontiguousarray(array, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(
        np.float32
    )


def expanded(x, c):
    return np.square(x).sum(-1)[..., None] - 2 * x @ c.T + np.square(c).sum(-1)


def in_place(latents, codebook):
    latents -= latents.mean()
    return distances(latents, codebook).argmin(-1)


class Stale:
    """Remembers the first codebook that it saw."""

    def __init__(self):
        self.codebook = None

    def __call__(self, latents, codebook):
        self.codebook = codebook if self.codebook is None else self.codebook
        return distances(latents, self.codebook).argmin(-1)


def straight_through(latents, codebook):
    indices, quantized = quantize(latents, codebook)
    return indices, latents + (quantized - latents)


QUANTIZER_MUTATIONS = {
    "argmin over the latents instead of the codes": (
        lambda x, c: distances(x, c).argmin(0),
        "ordinary",
    ),
    "argmax": (lambda x, c: distances(x, c).argmax(-1), "ordinary"),
    "the last index on a tie": (
        lambda x, c: len(c) - 1 - distances(x, c)[..., ::-1].argmin(-1),
        "exact_ties",
    ),
    "bfloat16 distances called float32": (
        lambda x, c: bfloat16(distances(x, c)).argmin(-1),
        "ordinary",
    ),
    "float16 distances called float32": (
        lambda x, c: distances(x, c).astype(np.float16).argmin(-1),
        "ordinary",
    ),
    "bfloat16 latents called float32": (
        lambda x, c: distances(bfloat16(x), c).argmin(-1),
        "ordinary",
    ),
    "the expanded form called direct": (lambda x, c: expanded(x, c).argmin(-1), "far_from_origin"),
    "sum of magnitudes": (lambda x, c: np.abs(x[:, :, None] - c).sum(-1).argmin(-1), "ordinary"),
    "largest product": (lambda x, c: (x @ c.T).argmax(-1), "ordinary"),
    "a product without the latents' share": (
        lambda x, c: (np.square(c).sum(-1) - x @ c.T).argmin(-1),
        "ordinary",
    ),
    "one more than the index": (lambda x, c: (distances(x, c).argmin(-1) + 1) % len(c), "ordinary"),
    "int32": (lambda x, c: distances(x, c).argmin(-1).astype(np.int32), "ordinary"),
    "all but the last element": (
        lambda x, c: distances(x[..., :-1], c[:, :-1]).argmin(-1),
        "ordinary",
    ),
    "all but the last code": (lambda x, c: distances(x, c[:-1]).argmin(-1), "on_codes"),
    "positions and images exchanged": (
        lambda x, c: distances(x, c).argmin(-1).T.reshape(x.shape[:2]),
        "positions",
    ),
    "positions lost": (lambda x, c: distances(x, c).argmin(-1).ravel(), "positions"),
    "no batch of none": (
        lambda x, c: distances(x, c).argmin(-1) + 0 * int(1 / len(x)),
        "empty_batch",
    ),
    "latents cut off at 1000": (
        lambda x, c: distances(np.clip(x, -1e3, 1e3), c).argmin(-1),
        "mixed_scales",
    ),
    "normalised latents": (
        lambda x, c: distances(x / np.linalg.norm(x, axis=-1, keepdims=True), c).argmin(-1),
        "ordinary",
    ),
    "latents changed in place": (in_place, "inputs_kept"),
    "the first codebook remembered": (Stale(), "fresh_codebook"),
    "quantized by the straight-through sum": (straight_through, "ordinary"),
    "quantized rounded": (
        lambda x, c: (quantize(x, c)[0], bfloat16(quantize(x, c)[1])),
        "ordinary",
    ),
}


@pytest.mark.parametrize("mutation", QUANTIZER_MUTATIONS)
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid", "ignore:divide")
def test_a_mutated_quantizer_is_caught_by_name(mutation):
    mutant, check = QUANTIZER_MUTATIONS[mutation]
    with pytest.raises(ParityError) as caught:
        check_quantizer(mutant)
    assert check in [failed.stage for failed in caught.value.report.failures]
    assert check in str(caught.value)
    assert caught.value.exit_code == ExitCode.PARITY


def exchanged(state, latents, indices, decay, epsilon):
    return update(state, latents, indices, 1 - decay, epsilon)


def no_epsilon(state, latents, indices, decay, epsilon):
    count, means = moved(state, latents, indices, np.float32(decay))
    return means / np.maximum(count, np.float32(1e-30))[:, None], count, means


def set_not_summed(state, latents, indices, decay, epsilon):
    hits, sums = (
        np.zeros(len(state.ema_count), np.float32),
        np.zeros(state.codebook.shape, np.float32),
    )
    hits[indices.ravel()], sums[indices.ravel()] = 1, latents.reshape(-1, latents.shape[-1])
    decay = np.float32(decay)
    count, means = (
        decay * state.ema_count + (1 - decay) * hits,
        decay * state.ema_means + (1 - decay) * sums,
    )
    return tuple(
        np.asarray(a, np.float32) for a in (means / (count + epsilon)[:, None], count, means)
    )


def only_hit_codes(state, latents, indices, decay, epsilon):
    after = update(state, latents, indices, decay, epsilon)
    hit = np.isin(np.arange(len(state.ema_count)), indices)
    before = (a.astype(np.float32) for a in (state.codebook, state.ema_count, state.ema_means))
    return tuple(
        np.where(hit.reshape(-1, *[1] * (a.ndim - 1)), a, b)
        for a, b in zip(after, before, strict=True)
    )


def old_count(state, latents, indices, decay, epsilon):
    _, count, means = update(state, latents, indices, decay, epsilon)
    return means / (state.ema_count.astype(np.float32) + np.float32(epsilon))[:, None], count, means


def mean_of_hits(state, latents, indices, decay, epsilon):
    hits = np.maximum(np.bincount(indices.ravel(), minlength=len(state.ema_count)), 1)[indices]
    _, count, _ = update(state, latents, indices, decay, epsilon)
    _, _, means = update(
        state, (latents / hits[..., None]).astype(np.float32), indices, decay, epsilon
    )
    return means / (count + np.float32(epsilon))[:, None], count, means


def renearest(state, latents, indices, decay, epsilon):
    return update(
        state, latents, quantize(latents, state.codebook.astype(np.float32))[0], decay, epsilon
    )


def per_image(state, latents, indices, decay, epsilon):
    codebook, count, means = update(state, latents, indices, decay, epsilon)
    share = np.float32(1 / max(indices.size, 1))
    return (
        codebook,
        np.float32(decay) * state.ema_count.astype(np.float32)
        + (count - decay * state.ema_count) * share,
        means,
    )


def changes_state(state, latents, indices, decay, epsilon):
    after = update(state, latents, indices, decay, epsilon)
    state.ema_count[:] = after[1]
    return after


def float16_state(state, latents, indices, decay, epsilon):
    return tuple(
        a.astype(np.float16).astype(np.float32)
        for a in update(state, latents, indices, decay, epsilon)
    )


def first_position(state, latents, indices, decay, epsilon):
    return update(state, latents[:, :1], indices[:, :1], decay, epsilon)


def in_dialect(name):
    def of_another_library(state, latents, indices, decay, epsilon):
        after = vqref.update_ema(state, latents, indices, decay, epsilon, DIALECTS[name])
        return tuple(
            a.astype(np.float32) for a in (after.codebook, after.ema_count, after.ema_means)
        )

    return of_another_library


UPDATE_MUTATIONS = {
    "decay and 1 - decay exchanged": (exchanged, "one_step"),
    "no epsilon": (no_epsilon, "large_epsilon"),
    "hits set, not summed": (set_not_summed, "one_takes_all"),
    "only codes that were hit": (only_hit_codes, "never_hit"),
    "codebook from the count before": (old_count, "one_step"),
    "the mean of the latents instead of their sum": (mean_of_hits, "one_step"),
    "the nearest codes instead of the indices given": (renearest, "foreign_indices"),
    "hits as a share of the batch": (per_image, "one_step"),
    "the state changed in place": (changes_state, "state_kept"),
    "float16 averages": (float16_state, "one_step"),
    "the first position only": (first_position, "one_step"),
    "zero-debias": (in_dialect("sonnet"), "first_step"),
    "Laplace smoothing": (in_dialect("rosinality"), "never_hit"),
    "the smoothed count stored back": (in_dialect("zalandoresearch"), "hundred_steps"),
}


@pytest.mark.parametrize("mutation", UPDATE_MUTATIONS)
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid", "ignore:divide")
def test_a_mutated_update_is_caught_by_name(mutation):
    mutant, check = UPDATE_MUTATIONS[mutation]
    with pytest.raises(ParityError) as caught:
        check_quantizer(quantize, mutant)
    assert check in [failed.stage for failed in caught.value.report.failures]


def update_first(state, latents, decay, epsilon):
    indices, _ = quantize(latents, state.codebook.astype(np.float32))
    after = update(state, latents, indices, decay, epsilon)
    return (*quantize(latents, after[0]), after)


def new_rows(state, latents, decay, epsilon):
    indices, _, after = step(state, latents, decay, epsilon)
    return indices, after[0][indices], after


def update_with_quantized(state, latents, decay, epsilon):
    indices, quantized, _ = step(state, latents, decay, epsilon)
    return indices, quantized, update(state, quantized, indices, decay, epsilon)


@pytest.mark.parametrize("mutant", [update_first, new_rows, update_with_quantized])
def test_a_step_in_another_order_is_caught_by_name(mutant):
    with pytest.raises(ParityError, match="order failed"):
        check_quantizer(quantize, update, mutant)


def test_an_implementation_that_raises_is_a_violation_that_says_so():
    def broken(latents, codebook):
        raise RuntimeError("no such kernel")

    with pytest.raises(
        ParityError,
        match="ordinary: 1 violations in 1; RuntimeError: no such kernel".replace(":", ".*"),
    ):
        check_quantizer(broken)


def test_each_check_runs_by_itself():
    checks = {str(check): check for check in quantizer_checks(quantize, update)}
    assert checks["bisector"].run().require().certified > 0
    with pytest.raises(ValueError, match="num_codes is 2, expected at least 4"):
        quantizer_checks(quantize, num_codes=2)
    with pytest.raises(ValueError, match="form is 'cosine', expected one of direct"):
        quantizer_checks(quantize, form="cosine")


def test_the_first_step_of_each_dialect_does_what_the_table_says():
    """One latent at 3 hits code 0 of two codes at 1 and 2; the other is never hit."""
    codebook, latents, indices = np.array([[1.0], [2.0]]), np.array([[[3.0]]]), np.array([[0]])
    expected = {
        "post": (1.98 / (0.01 + 1e-5) * 0 + (0.99 * 1 + 0.01 * 3) / (0.01 + 1e-5), 0.99 * 2 / 1e-5),
        "sonnet": (3 / ((1 + 1e-5) / (1 + 2e-5)), 0.0),
        "rosinality": (
            (0.99 + 0.03) / (1.00001 / 1.99002 * 1.99),
            1.98 / (0.99001 / 1.99002 * 1.99),
        ),
        "vector-quantize-pytorch": (
            (0.99 + 0.03) / (1.00001 / 1.99002 * 1.99),
            1.98 / (0.99001 / 1.99002 * 1.99),
        ),
        "zalandoresearch": (
            (0.99 * 5 + 0.03) / (0.01001 / 0.01002 * 0.01),
            0.99 * 6 / (1e-5 / 0.01002 * 0.01),
        ),
    }
    for name, dialect in DIALECTS.items():
        state = EMAState.start(
            codebook, dialect, np.array([[5.0], [6.0]]) if dialect.means == "own" else None
        )
        after = vqref.update_ema(state, latents, indices, decay=0.99, dialect=dialect)
        np.testing.assert_allclose(after.codebook[:, 0], expected[name], rtol=1e-12, err_msg=name)
        smoothed = dialect.stores_smoothed
        np.testing.assert_allclose(
            after.ema_count.sum(), 0.99 * 2 * dialect.count + 0.01, rtol=1e-12
        )
        assert (after.ema_count[1] > 0.99 * dialect.count) == smoothed


def test_a_dialect_refuses_what_it_cannot_divide_by():
    codebook, nothing = np.ones((2, 1)), (np.zeros((0, 1, 1)), np.zeros((0, 1), int))
    with pytest.raises(ValueError, match=r"divides by 1 - decay\*\*steps"):
        vqref.update_ema(
            EMAState.start(codebook, DIALECTS["sonnet"]),
            *nothing,
            decay=1.0,
            dialect=DIALECTS["sonnet"],
        )
    with pytest.raises(ValueError, match="no code was ever hit"):
        vqref.update_ema(
            EMAState.start(codebook, DIALECTS["sonnet"]), *nothing, dialect=DIALECTS["sonnet"]
        )
    with pytest.raises(ValueError, match="zalandoresearch needs means of its own"):
        EMAState.start(codebook, DIALECTS["zalandoresearch"])
    with pytest.raises(ValueError, match="post starts its means from codebook"):
        EMAState.start(codebook, POST, codebook)
