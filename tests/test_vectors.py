"""Conformance vectors: they hold the oracle's answers, and plain Python can judge by them alone."""

import io
import json

import numpy as np
import pytest

import vqref
from vqref.agreement.parity import check_indices
from vqref.checks.vectors import conformance_vectors
from vqref.dialects import DIALECTS
from vqref.quantizer import EMAState


@pytest.fixture(scope="module")
def vectors():
    return conformance_vectors()


def test_the_command_writes_them_and_writes_them_again_the_same(run, tmp_path, vectors):
    for _ in range(2):
        done = run("-m", "vqref", "vectors", tmp_path / "v")
        assert (done.returncode, done.stderr) == (0, "")
    for name, content in vectors.items():
        assert (tmp_path / "v" / name).read_bytes() == content or name == "vectors.npz"


@pytest.mark.parametrize(
    ("arguments", "code"), [(["vectors"], 2), (["vectors", "x", "--seed", "-1"], 2), ([], 2)]
)
def test_what_cannot_be_meant_is_one_line(refused, arguments, code):
    refused(code, "-m", "vqref", *arguments)


def test_a_folder_that_cannot_be_written_is_one_line(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in refused(5, "-m", "vqref", "vectors", tmp_path / "file")


def test_plain_loops_over_the_json_reach_only_allowed_indices(vectors):
    cases = json.loads(vectors["quantizer.json"])["cases"]
    assert {case["name"] for case in cases} >= {"bisector", "denormals", "far_from_origin"}
    several = 0
    for case in cases:
        for (latent,), (index,), allowed in zip(
            case["latents"], case["indices"], case["allowed"], strict=True
        ):
            assert index in allowed
            several += len(allowed) > 1
            with np.errstate(over="ignore"):
                rows = [
                    [np.float32(x) - np.float32(c) for x, c in zip(latent, row, strict=True)]
                    for row in case["codebook"]
                ]
                found = [float(sum((r * r for r in row), np.float32(0))) for row in rows]
            assert found.index(min(found)) in allowed, case["name"]
    assert several > 0


def test_allowed_is_what_check_indices_allows(vectors):
    for case in json.loads(vectors["quantizer.json"])["cases"]:
        latents, codebook = np.array(case["latents"]), np.array(case["codebook"])
        for index in range(len(codebook)):
            report = check_indices(
                np.full((len(latents), 1), index), latents, codebook, precision="float32"
            )
            assert report.violations == sum(index not in allowed for allowed in case["allowed"]), (
                case["name"]
            )


def test_the_ema_steps_are_the_oracles_from_the_json_alone(vectors):
    cases = json.loads(vectors["ema.json"])["cases"]
    assert {case["dialect"] for case in cases} == set(DIALECTS)
    for case in cases:
        state = EMAState(
            np.array(case["codebook"]), np.array(case["ema_count"]), np.array(case["ema_means"])
        )
        for step in case["steps"]:
            latents, indices = np.array(step["latents"]), np.array(step["indices"])
            state = vqref.update_ema(
                state, latents, indices, case["decay"], case["epsilon"], DIALECTS[case["dialect"]]
            )
            for name in ("codebook", "ema_count", "ema_means"):
                np.testing.assert_array_equal(
                    getattr(state, name), np.array(step[name]), err_msg=case["dialect"]
                )


def test_the_npz_holds_the_same_arrays_as_the_json(vectors):
    packed = np.load(io.BytesIO(vectors["vectors.npz"]), allow_pickle=False)
    case = json.loads(vectors["quantizer.json"])["cases"][0]
    for name in ("latents", "codebook", "indices", "gap"):
        np.testing.assert_array_equal(packed[f"{case['name']}/{name}"], np.array(case[name]))
    step = json.loads(vectors["ema.json"])["cases"][1]
    np.testing.assert_array_equal(
        packed[f"{step['dialect']}/3/codebook"], np.array(step["steps"][3]["codebook"])
    )
