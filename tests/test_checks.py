"""The kit: right implementations pass, and the named check catches each mutation."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vqref
from benchmarks.agreement import computed
from benchmarks.hostile import kit as hostile
from benchmarks.hostile.mutants import Plain, mutation
from vqref.agreement.bounds import FORMS
from vqref.checks.adversary import CASES
from vqref.checks.checks import check_quantizer, quantizer_checks
from vqref.checks.kit import layouts
from vqref.dialects import DIALECTS, POST
from vqref.errors import ExitCode, ParityError
from vqref.precisions import PRECISIONS
from vqref.quantizer import EMAState
from vqtrain import nearest as search
from vqtrain import quantizer as trained

FIXED: dict[str, Any] = {"num_codes": 9, "code_size": 3, "sizes": "fixed"}


def torch_quantize(latents, codebook):
    return search.nearest(torch.from_numpy(latents), torch.from_numpy(codebook)).numpy()


def torch_update(state, latents, indices, decay, epsilon):
    arrays = state.codebook, state.ema_count, state.ema_means
    held = [torch.from_numpy(array.astype(np.float32)) for array in arrays]
    codebook, count, means, x, i = (*held, torch.from_numpy(latents), torch.from_numpy(indices))
    found = trained.update_ema(codebook, count, means, x, i, decay, epsilon)
    return tuple(tensor.numpy() for tensor in found)


def test_a_plain_numpy_quantizer_passes_every_check():
    plain = Plain()
    report = check_quantizer(plain.quantize, plain.update, plain.step)
    assert [check.stage for check in report.checks] == [
        str(check) for check in quantizer_checks(plain.quantize, plain.update, plain.step)
    ]
    assert report.passed
    assert all(len(line) <= 80 for line in str(report).splitlines())


def test_the_trainers_quantizer_passes_every_check():
    assert check_quantizer(torch_quantize, torch_update).passed


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=lambda dialect: dialect.name)
def test_the_oracle_passes_every_check_in_every_dialect(dialect):
    def update(state, latents, indices, decay, epsilon):
        return vqref.update_ema(state, latents, indices, decay, epsilon, dialect)

    def quantize(latents, codebook):
        q = vqref.quantize(latents, codebook)
        return q.indices, q.quantized

    def step(state, latents, decay, epsilon):
        indices, quantized = quantize(latents, state.codebook)
        return indices, quantized, update(state, latents, indices, decay, epsilon)

    assert check_quantizer(
        quantize, update, step, precision="float64", dialect=dialect, **FIXED
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
        single = Plain().distances(latents, codebook)
    best = np.square(latents - q.quantized).sum(-1)
    share = np.divide(q.gap, best, out=np.zeros_like(best), where=best > 0)
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
        "close_seconds": ((share > 1e-6) & (share < 0.02)).mean() > 0.5,
    }
    assert hard[name]


@pytest.mark.parametrize("name", hostile.MUTATIONS)
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid", "ignore:divide")
def test_a_mutation_is_caught_by_name(name):
    mutant = hostile.MUTATIONS[name]
    checks = {str(check): check for check in mutant.checks()}
    with pytest.raises(ParityError, match=mutant.caught_by) as caught:
        checks[mutant.caught_by].run().require()
    assert caught.value.exit_code == ExitCode.PARITY


def test_every_check_is_shown_to_fail():
    """Each check has a mutation that fails it.

    Exceptions are the hard cases, and checks of updates and steps that are shown for the other of
    the two.
    """

    def kinds(names):
        return {name.removeprefix("ema_").removeprefix("step_") for name in names}

    plain = Plain()
    names = set(map(str, quantizer_checks(plain.quantize, plain.update, plain.step)))
    shown = {mutant.caught_by for mutant in hostile.MUTATIONS.values()}
    assert shown <= names
    assert kinds(names) - kinds(shown) <= set(CASES)


def test_a_wrong_quantizer_is_an_error_that_names_every_check_that_failed():
    wrong = mutation("ordinary", nearest=lambda self, x, c: Plain.nearest(self, x, c) // 2 * 2)
    with pytest.raises(ParityError, match=r"ordinary, .*failed; the first: ordinary") as caught:
        check_quantizer(wrong.make().quantize, **FIXED)
    failed = [check.stage for check in caught.value.report.failures]
    assert {"ordinary", "every_code", "many_calls"} <= set(failed)
    assert str(caught.value).startswith(", ".join(failed))
    assert caught.value.exit_code == ExitCode.PARITY


def test_a_failure_says_in_which_sizes():
    wrong = hostile.MUTATIONS["quantize: latents beyond 4,096"]
    with pytest.raises(ParityError, match=r"of 4097 x 1 latents, K 64, D 16"):
        next(c for c in wrong.checks() if c.name == "batch_sizes").run().require()


def test_a_layout_that_is_refused_is_no_failure_and_one_that_is_misread_is():
    def strict(latents, codebook):
        if not (latents.flags.c_contiguous and codebook.flags.c_contiguous):
            raise TypeError("arrays must be contiguous")
        return Plain().quantize(latents, codebook)

    checks = {str(check): check for check in quantizer_checks(strict, **FIXED)}
    assert checks["layouts"].run().passed


@pytest.mark.parametrize("shape", [(4, 3), (5, 1, 2), (6,)])
def test_other_layouts_hold_the_same_values_in_other_memory(shape):
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    views = list(layouts(array))
    for _, view in views:
        np.testing.assert_array_equal(view, array)
        assert not np.shares_memory(view, array) or len(shape) == 1 or min(shape) == 1
    assert len({view.strides for _, view in views}) > 2


def test_fixed_sizes_try_no_others():
    seen = set()

    def quantize(latents, codebook):
        seen.add(codebook.shape)
        return Plain().quantize(latents, codebook)

    def update(state, *given):
        seen.add(state.codebook.shape)
        return Plain().update(state, *given)

    check_quantizer(quantize, update, **FIXED)
    assert seen == {(9, 3)}
    assert len(quantizer_checks(quantize)) > len(quantizer_checks(quantize, **FIXED))


def test_thorough_tries_more_of_the_same():
    plain = Plain()
    few, many = (
        quantizer_checks(plain.quantize, plain.update, plain.step, thorough=thorough, **FIXED)
        for thorough in (False, True)
    )
    assert list(map(str, few)) == list(map(str, many))
    for name in ("ordinary", "many_calls"):
        less, more = (next(c for c in checks if c.name == name).run() for checks in (few, many))
        assert (less.passed, more.passed) == (True, True)
        assert more.compared > 3 * less.compared


def test_the_campaign_finds_nothing_in_a_few():
    found = hostile.campaign(2, **FIXED)
    assert (found.missed, found.alarms) == ([], [])
    assert len(found.caught) == 2
    assert found.checks > 40


def test_the_campaign_reports_what_got_through_and_what_was_refused(monkeypatch):
    wrong = hostile.MUTATIONS["quantize: argmax"].make()

    def not_right(seed, **sizes):
        yield "wrong", quantizer_checks(wrong.quantize, **sizes)[:1]

    monkeypatch.setattr(hostile, "right", not_right)
    monkeypatch.setattr(hostile, "MUTATIONS", {"no mutation": mutation("ordinary")})
    found = hostile.campaign(**FIXED)
    assert found.missed == ["no mutation"]
    assert [line.split(" ")[:2] for line in found.alarms] == [["wrong:", "ordinary"]]


def test_an_implementation_that_raises_is_a_violation_that_says_so():
    def broken(latents, codebook):
        raise RuntimeError("no such kernel")

    with pytest.raises(
        ParityError,
        match="ordinary: 1 violations in 1; RuntimeError: no such kernel".replace(":", ".*"),
    ):
        check_quantizer(broken)


def test_each_check_runs_by_itself():
    quantize = Plain().quantize
    checks = {str(check): check for check in quantizer_checks(quantize, Plain().update)}
    assert checks["bisector"].run().require().certified > 0
    with pytest.raises(ValueError, match="num_codes is 2, expected at least 4"):
        quantizer_checks(quantize, num_codes=2)
    with pytest.raises(ValueError, match="form is 'cosine', expected one of direct"):
        quantizer_checks(quantize, form="cosine")
    with pytest.raises(ValueError, match="sizes is 'some', expected 'any' or 'fixed'"):
        quantizer_checks(quantize, sizes="some")  # type: ignore[arg-type]


def test_the_first_step_of_each_dialect_does_what_the_table_says():
    """Two codes are at 1 and 2. One latent at 3 hits code 0; code 1 is never hit."""
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
