"""Samples of a learned prior from a bundle: the graphs draw what the oracle draws.

This holds on every machine and in every batch. A bundle's prior is checked against the oracle.
"""

import dataclasses

import numpy as np
import pytest
from support import prior_params, sign

from vqdeploy import Codec
from vqdeploy.bundle import FILES, PRIOR_FILES, Bundle
from vqdeploy.export import export
from vqdeploy.graphs.build import GraphOptions
from vqdeploy.verify import verify
from vqref import prior
from vqref.errors import InputError, ParityError
from vqref.prior import Prior, categorical, gumbel, transformer
from vqtrain.modelfile import write_model

SPEC = transformer(4, 16, width=16, depth=2, heads=2)
PARAMS = prior_params(SPEC)


def with_prior(model, spec=SPEC, params=PARAMS):
    return dataclasses.replace(
        model, prior=Prior(spec, params, model.digest(), {"seed": 0}, {"held_out": 9.5})
    )


@pytest.fixture(scope="module")
def learned(model, tmp_path_factory):
    """The bundle of ``model`` with a learned prior."""
    folder = tmp_path_factory.mktemp("prior")
    write_model(folder / "model.pt", with_prior(model))
    export(folder / "model.pt", folder / "bundle")
    return folder / "bundle"


@pytest.fixture(scope="module")
def codec(learned):
    return Codec.load(learned, "cpu")


PRIOR_STAGES = ["golden prior", "prior", "prior_step", "samples"]


def test_a_bundle_with_a_prior_holds_its_graphs_and_verifies_them(learned):
    assert {path.name for path in learned.iterdir()} == {*FILES, *PRIOR_FILES, "manifest.json"}
    found = verify(Bundle.open(learned), "cpu")
    found.report.require()
    assert set(PRIOR_STAGES) <= {check.stage for check in found.report.checks}
    assert {"prior", "prior_step"} <= set(found.placement)
    assert Bundle.open(learned).prior == SPEC
    assert Bundle.open(learned).manifest["prior"]["nats"] == 9.5
    card = (learned / "README.md").read_text()
    assert "| `prior_step.onnx` | one position |" in card
    assert "held-out ones cost 9.5 nats" in " ".join(card.split())


def test_verify_counts_the_samples_that_are_certified(learned):
    for asked, images in ((0, 4), (1000, 64)):
        found = verify(Bundle.open(learned), "cpu", samples=asked)
        (check,) = [check for check in found.report.checks if check.stage == "samples"]
        assert check.compared == 4 * images
        assert (check.violations, check.certified) == (0, check.compared - check.near_ties)
        assert check.certified > 0.95 * check.compared


@pytest.mark.parametrize(
    "options", [{"batch": 3}, {"precision": "fp16"}, {"precision": "int8"}, {"opset": 20},
                {"index_type": "int32"}, {"target": "cpu"}],
)  # fmt: skip
def test_other_forms_of_it_verify_too(model, tmp_path, options):
    export(with_prior(model), tmp_path / "b", options=GraphOptions(**options))
    verify(Bundle.open(tmp_path / "b"), "cpu").report.require()
    codec = Codec.load(tmp_path / "b", "cpu")
    np.testing.assert_array_equal(
        codec.draw(5, seed=3).indices, prior.sample(SPEC, PARAMS, gumbel(3, SPEC, 5))
    )


def test_a_categorical_prior_is_drawn_too(model, tmp_path):
    rows = np.random.default_rng(0).integers(0, 3, (50, 4))
    spec, params = categorical(rows, 16)
    export(with_prior(model, spec, params), tmp_path / "b")
    verify(Bundle.open(tmp_path / "b"), "cpu").report.require()
    drawn = Codec.load(tmp_path / "b", "cpu").draw(300, seed=1).indices
    assert (drawn < 3).mean() > 0.8
    np.testing.assert_array_equal(drawn, prior.sample(spec, params, gumbel(1, spec, 300)))


@pytest.mark.parametrize("how", [{}, {"temperature": 0.7}, {"top_k": 3}])
def test_the_codec_draws_what_the_oracle_draws(codec, how):
    drawn = codec.draw(200, seed=11, **how)
    exact = prior.sample(SPEC, PARAMS, gumbel(11, SPEC, 200), **how)
    held = np.logical_and.accumulate(drawn.certified, axis=1)
    assert (drawn.indices == exact)[held].all()
    assert drawn.certified.all(axis=1).mean() > 0.99
    images, sure = codec.sample(200, seed=11, certify=True, **how)
    np.testing.assert_array_equal(images, codec.decode(drawn.indices))
    np.testing.assert_array_equal(sure, drawn.certified.all(axis=1))


def test_a_sample_depends_on_its_seed_and_number_alone(codec):
    whole = codec.draw(130, seed=5).indices  # two whole batches and a part
    np.testing.assert_array_equal(codec.draw(70, seed=5).indices, whole[:70])
    assert (codec.draw(130, seed=6).indices != whole).any()
    assert codec.sample(0, seed=5).shape[0] == 0
    assert (codec.draw(9).indices != codec.draw(9).indices).any()


def test_likelihoods_are_the_oracles(codec):
    rows = np.random.default_rng(0).integers(0, 16, (9, 4))
    np.testing.assert_allclose(
        codec.log_likelihood(rows), -prior.nats(SPEC, PARAMS, rows), rtol=1e-5
    )
    with pytest.raises(ValueError, match="expected 0 to 15"):
        codec.log_likelihood(rows + 1)


def test_a_bundle_without_a_prior_says_so(bundle, codec):
    without = Codec.load(bundle, "cpu")
    assert without.prior is None
    for wrong in ({"temperature": 0.5}, {"top_k": 3}, {"certify": True}):
        with pytest.raises(ValueError, match="need a bundle with a prior"):
            without.sample(2, seed=0, **wrong)
    for ask in (lambda: without.draw(2), lambda: without.log_likelihood([[0] * 4])):
        with pytest.raises(ValueError, match="has no learned prior"):
            ask()
    for wrong in ({"temperature": 0}, {"top_k": 0}, {"seed": 2**128}, {"seed": -1}):
        with pytest.raises(ValueError, match="expected"):
            codec.sample(2, **{"seed": 0, **wrong})
    with pytest.raises(TypeError, match="seed is a generator"):
        codec.sample(2, seed=np.random.default_rng(0))


def copied(learned, tmp_path):
    import shutil

    shutil.copytree(learned, tmp_path / "b")
    return tmp_path / "b"


def test_another_weight_in_a_graph_or_in_the_oracle_is_found(learned, tmp_path, model):
    other = {n: a * np.float32(1 + 0.1 * ("hidden.weight" in n)) for n, a in PARAMS.items()}
    export(with_prior(model, SPEC, other), tmp_path / "other")
    folder = copied(learned, tmp_path)
    for name in PRIOR_FILES:
        before = (folder / name).read_bytes()
        (folder / name).write_bytes((tmp_path / "other" / name).read_bytes())
        sign(folder)
        found = verify(Bundle.open(folder), "cpu")
        failed = {check.stage for check in found.report.checks if not check.passed}
        assert "weights" in failed
        assert name.removesuffix(".onnx") in failed
        (folder / name).write_bytes(before)
    (folder / "oracle.npz").write_bytes((tmp_path / "other" / "oracle.npz").read_bytes())
    sign(folder)
    with pytest.raises(ParityError):
        verify(Bundle.open(folder), "cpu").report.require()


DAMAGE = {
    "no spec": (lambda m: m["prior"].pop("spec"), "lacks 'spec'"),
    "other sizes": (lambda m: m["prior"]["spec"].update(num_codes=9), "prior"),
    "no table": (lambda m: m.update(prior=3), "prior"),
    "no prior": (lambda m: m.pop("prior"), "names files that no bundle has"),
    "another port": (
        lambda m: m["graphs"]["prior_step"]["inputs"][0].update(dtype="float32"),
        "inputs and outputs",
    ),
    "a file less": (lambda m: m["files"].pop("prior.onnx"), "prior.onnx"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_manifest_whose_prior_is_damaged_is_refused(learned, tmp_path, name):
    folder, (change, message) = copied(learned, tmp_path), DAMAGE[name]
    sign(folder, change)
    with pytest.raises(InputError, match=message):
        Bundle.open(folder)


def test_a_damaged_graph_of_a_prior_is_refused(learned, tmp_path):
    folder = copied(learned, tmp_path)
    content = bytearray((folder / "prior_step.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "prior_step.onnx").write_bytes(content)
    with pytest.raises(InputError, match=r"prior_step\.onnx: damaged"):
        Codec.load(folder, "cpu").draw(1, seed=0)


def test_the_command_draws_a_sheet_and_counts_what_is_certified(run, learned, tmp_path):
    words = ("-m", "vqdeploy", "sample", learned, "--number", 9, "--seed", 2, "--device", "cpu")
    done = run(*words, "--temperature", 0.8, "--top-k", 8)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout == (
        "9 samples of the autoregressive prior on cpu, 9 certified; wrote samples.png\n"
    )
    assert (tmp_path / "samples.png").stat().st_size > 500


def test_options_of_a_prior_need_one(refused, bundle, learned):
    sample = ("-m", "vqdeploy", "sample")
    assert "need a bundle with a learned prior" in refused(2, *sample, bundle, "--top-k", 3)
    assert "temperature is 0.0" in refused(2, *sample, learned, "--temperature", 0)
