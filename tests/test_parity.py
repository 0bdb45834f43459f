"""The judge: each check can fail, the bound holds, and a flip is either rounding or a violation."""

import json

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vqref
from vqref.agreement import parity
from vqref.agreement.bounds import array_dtype
from vqref.agreement.parity import check, check_indices
from vqref.agreement.report import Report
from vqref.errors import ExitCode, ParityError

EXPECTED = np.array([[1.0, -2.0], [3.0, -4.0]])


def as32(array: npt.ArrayLike) -> np.ndarray:
    return np.asarray(array, np.float32)


def test_equal_arrays_agree_and_the_report_says_how_closely():
    found = check("encoder", as32(EXPECTED), EXPECTED, precision="float32").require()
    assert (found.compared, found.violations, found.max_error, found.rms_error) == (4, 0, 0.0, 0.0)


def test_a_value_just_inside_the_tolerance_passes_and_just_outside_fails():
    allowed = parity.tolerance("encoder", "float64").relative
    for factor, passes in ((0.9, True), (1.1, False)):
        found = EXPECTED.copy()
        found[1, 0] += factor * allowed * 4.0  # 4 is the largest magnitude of that image
        report = check("encoder", found, EXPECTED, precision="float64")
        assert report.passed is passes
        assert report.max_error == pytest.approx(factor * allowed, rel=1e-3)
        assert report.rms_error == pytest.approx(factor * allowed / 2, rel=1e-3)
        assert report.worst["position"] == [1, 0]
    with pytest.raises(
        ParityError, match=r"encoder \(float64\): 1 violations in 4; the worst at \(1, 0\) is 3"
    ):
        report.require()


def test_a_wild_image_hides_nothing_in_another():
    expected = np.array([[1e6, 1e6], [1.0, 1.0]])
    found = expected.copy()
    found[1, 1] += 1e-3
    assert not check("decoder", as32(found), expected, precision="float32").passed


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        (as32(EXPECTED[:1]), r"shape is (1, 2), expected (2, 2)"),
        (EXPECTED, "dtype is float64, expected float32"),
        (as32([[1.0, -2.0], [3.0, np.nan]]), "the worst at (1, 1) is nan, the oracle's -4"),
        (as32([[1.0, np.inf], [3.0, -4.0]]), "the worst at (0, 1) is inf, the oracle's -2"),
    ],
)
def test_shape_dtype_and_finiteness_are_violations_by_name(found, problem):
    report = check("decoder", found, EXPECTED, precision="float32")
    assert not report.passed
    assert problem in report.problem
    assert problem in str(report)


def test_a_value_where_the_oracle_has_zero_must_be_zero():
    assert check("losses", np.zeros(1), np.zeros(1), precision="float64").passed
    assert not check("losses", np.full(1, 1e-300), np.zeros(1), precision="float64").passed


def test_every_row_of_the_tolerances_has_a_reason_and_can_fail():
    for (stage, precision), row in parity.TOLERANCES.items():
        assert row.reason
        expected = np.ones((2, 3))
        off = max(3 * row.relative, float(np.finfo(array_dtype(precision)).eps))
        found = (expected * (1 + off)).astype(array_dtype(precision))
        assert not check(stage, found, expected, precision=precision).passed, (stage, precision)


def test_an_unknown_stage_or_precision_lists_the_known_ones():
    with pytest.raises(
        ValueError,
        match="no tolerance for stage 'encoder' in precision 'int4'; there are: encoder/float64",
    ):
        check("encoder", EXPECTED, EXPECTED, precision="int4")
    with pytest.raises(ValueError, match="precision is 'int4', expected one of float64, float32"):
        check_indices(
            np.zeros((1, 1), np.int64), np.zeros((1, 1, 2)), np.zeros((3, 2)), precision="int4"
        )


LATENTS = np.array([[[0.1, 0.0]], [[0.9, 0.0]], [[0.5, 0.0]]])
CODEBOOK = np.array([[0.0, 0.0], [1.0, 0.0], [9.0, 9.0]])


def test_a_certified_index_must_be_equal():
    report = check_indices(np.array([[0], [0], [0]]), LATENTS, CODEBOOK, precision="float32")
    assert (
        report.compared,
        report.certified,
        report.near_ties,
        report.flips,
        report.violations,
    ) == (3, 2, 1, 0, 1)
    assert report.worst == {"position": [1, 0], "found": 0, "expected": 1}
    assert "farther by 0.8 than rounding explains" in str(report)


def test_at_a_near_tie_either_code_is_right_and_a_third_is_not():
    for index, flips, violations in ((0, 0, 0), (1, 1, 0), (2, 0, 1)):
        report = check_indices(
            np.array([[0], [1], [index]]), LATENTS, CODEBOOK, precision="float32"
        )
        assert (report.flips, report.violations) == (flips, violations)


@pytest.mark.parametrize("index", [-1, 3, 2**40])
def test_an_index_outside_the_codebook_is_a_violation(index):
    report = check_indices(np.array([[0], [1], [index]]), LATENTS, CODEBOOK, precision="float32")
    assert report.violations == 1
    assert "outside 0 to 2" in report.problem


def test_indices_of_another_shape_or_dtype_are_violations():
    assert (
        "dtype is int32"
        in check_indices(np.zeros((3, 1), np.int32), LATENTS, CODEBOOK, precision="float32").problem
    )
    assert (
        "shape is (3,)"
        in check_indices(np.zeros(3, np.int64), LATENTS, CODEBOOK, precision="float32").problem
    )


def test_an_encoder_error_explains_a_flip_only_across_the_distance_it_can_move():
    """At the second latent, d1 - d0 = 0.8 and the codes are 1 apart.

    So an error of 0.4 explains the flip, and 0.39 does not.
    """
    found = np.array([[0], [0], [0]])
    assert check_indices(found, LATENTS, CODEBOOK, precision="float64", latents_error=0.4001).passed
    assert not check_indices(
        found, LATENTS, CODEBOOK, precision="float64", latents_error=0.39
    ).passed
    each = np.array([[0.0], [0.4001], [0.0]])
    assert check_indices(found, LATENTS, CODEBOOK, precision="float64", latents_error=each).passed


@settings(deadline=None, max_examples=200)
@given(
    seed=st.integers(0, 2**32 - 1),
    d=st.integers(1, 40),
    scale=st.floats(-15, 15),
    ulps=st.integers(0, 4),
    offset=st.sampled_from([0.0, 1.0, 1e3]),
)
def test_float32_rounding_in_any_order_of_sums_is_within_the_bound(seed, d, scale, ulps, offset):
    """Latents are a few ulps from the bisector of two codes, at all scales, far from the origin."""
    rng = np.random.default_rng(seed)
    codebook = as32(10**scale * (offset + rng.normal(size=(8, d))))
    pairs = codebook[rng.integers(0, 8, (64, 2))]
    latents = pairs.mean(axis=1, dtype=np.float32)[:, None]
    latents = as32(
        latents * (1 + ulps * np.finfo(np.float32).eps * rng.integers(-1, 2, latents.shape))
    )
    square = np.square(latents - codebook)  # (64, 8, d) in float32
    for distances in (
        square.sum(-1),
        square[..., ::-1].cumsum(-1)[..., -1],
        square[..., rng.permutation(d)].cumsum(-1)[..., -1],
    ):
        assert distances.dtype == np.float32
        found = distances.argmin(-1)[:, None]
        check_indices(found, latents, codebook, precision="float32").require()


def test_the_expanded_form_fails_where_it_cancels():
    """Far from the origin, x.x - 2x.c + c.c loses the difference.

    So the bound is for the direct form.
    """
    rng = np.random.default_rng(0)
    codebook, latents = (
        as32(1e4 + rng.normal(size=(32, 16))),
        as32(1e4 + rng.normal(size=(500, 1, 16))),
    )
    x = latents[:, 0]
    expanded = (x * x).sum(1)[:, None] - 2 * x @ codebook.T + (codebook * codebook).sum(1)
    report = check_indices(expanded.argmin(1)[:, None], latents, codebook, precision="float32")
    assert report.violations > 0


def test_bfloat16_distances_called_float32_are_caught():
    rng = np.random.default_rng(0)
    codebook, latents = as32(rng.normal(size=(64, 16))), as32(rng.normal(size=(2000, 1, 16)))
    square = np.square(latents - codebook).sum(-1)
    rounded = (square.view(np.uint32) & np.uint32(0xFFFF0000)).view(
        np.float32
    )  # the upper 16 bits of a float32
    assert (
        check_indices(square.argmin(-1)[:, None], latents, codebook, precision="float32").violations
        == 0
    )
    assert (
        check_indices(
            rounded.argmin(-1)[:, None], latents, codebook, precision="float32"
        ).violations
        > 0
    )


def test_distances_that_overflow_are_no_proof_of_anything():
    codebook = np.array([[0.0], [1e19], [3e19]])
    latents = np.array([[[-3e19]]])
    with np.errstate(over="ignore"):
        single = np.square(as32(latents) - as32(codebook)).sum(-1)  # inf, inf, inf in float32
    assert np.isinf(single).all()
    report = check_indices(np.array([[1]]), latents, codebook, precision="float32")
    assert (report.certified, report.flips, report.violations) == (0, 1, 0)
    with pytest.raises(ValueError, match="overflow float64"):
        check_indices(np.array([[1]]), latents * 1e190, codebook, precision="float64")
    with pytest.raises(ValueError, match="overflow float64"):
        vqref.quantize(latents * 1e190, codebook)


@pytest.mark.parametrize("error", [np.nan, np.inf, -1.0])
def test_an_encoder_error_that_is_no_length_is_refused(error):
    with pytest.raises(ValueError, match="latents_error: expected finite numbers of at least 0"):
        check_indices(
            np.array([[2], [1], [0]]), LATENTS, CODEBOOK, precision="float64", latents_error=error
        )


def test_an_empty_codebook_and_sums_without_a_bound_are_refused():
    with pytest.raises(ValueError, match=r"codebook: shape is \(0, 2\), expected at least one row"):
        check_indices(np.zeros((3, 1), np.int64), LATENTS, np.zeros((0, 2)), precision="float32")
    wide = np.zeros((1, 2**23))
    with pytest.raises(ValueError, match="no bound in float32"):
        check_indices(np.zeros((1, 1), np.int64), wide[None], wide, precision="float32")


def test_the_bound_is_tight_enough_to_certify_ordinary_latents():
    rng = np.random.default_rng(0)
    codebook, latents = as32(rng.normal(size=(64, 16))), as32(rng.normal(size=(2000, 1, 16)))
    q = vqref.quantize(latents, codebook)
    assert check_indices(q.indices, latents, codebook, precision="float32").certified >= 1999


def test_a_report_prints_a_line_a_stage_within_80_columns_and_stores_as_strict_json():
    good = check("encoder", as32(EXPECTED), EXPECTED, precision="float32")
    bad = check("decoder", as32([[1.0, -2.0], [3.0, np.nan]]), EXPECTED, precision="float32")
    indices = check_indices(np.array([[0], [0], [0]]), LATENTS, CODEBOOK, precision="float32")
    report = Report((good, bad, indices))
    head, *lines = str(report).splitlines()
    assert len(lines) == 3 + 2
    assert all(len(line) <= 80 for line in (head, *lines[:3]))
    stored = json.loads(
        report.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON")
    )
    assert stored["passed"] is False
    assert [c["stage"] for c in stored["checks"]] == ["encoder", "decoder", "quantizer"]
    assert stored["checks"][2]["worst"] == {"position": [1, 0], "found": 0, "expected": 1}
    assert report.worst_error_over_allowed == np.inf


def test_a_parity_error_carries_the_report_and_the_exit_code():
    bad = check("decoder", as32(EXPECTED + 1), EXPECTED, precision="float32")
    with pytest.raises(ParityError) as caught:
        Report((bad,)).require()
    assert caught.value.exit_code == ExitCode.PARITY == 4
    assert caught.value.report.failures == (bad,)
