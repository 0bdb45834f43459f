"""Tokens proved in advance, as users see them.

``vqdeploy prove``, ``encode --prove``, the stage of ``verify`` that names another arithmetic, and
what the card, ``inspect`` and the certificate say.
"""

import json

import numpy as np
import pytest
from PIL import Image
from support import sign

from vqdeploy.bundle import Bundle
from vqdeploy.export import export
from vqdeploy.graphs.build import GraphOptions
from vqdeploy.proof import advance
from vqdeploy.proof.certificate import read_certificate, write_certificate
from vqdeploy.tokens import read_tokens
from vqdeploy.verify import verify
from vqref.agreement.advance import prove, tell_proved
from vqref.agreement.arithmetics import ARITHMETICS
from vqref.errors import InputError, ParityError

COUNT = 24


@pytest.fixture(scope="module")
def x(many_images):
    return (many_images[:COUNT, None] / np.float32(255)).astype(np.float32)


@pytest.fixture
def images(tmp_path, many_images):
    np.save(tmp_path / "images.npy", many_images[:COUNT])
    return tmp_path / "images.npy"


def told(done):
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def test_prove_prints_the_share_of_each_arithmetic_and_the_least_provable(
    run, bundle, images, model, x
):
    lines = told(
        run("-m", "vqdeploy", "prove", bundle, images, "--arithmetic", "all", "--picture", "p.png")
    ).splitlines()
    assert all(len(line) <= 80 for line in lines if str(images) not in line)
    rows = {line.split()[0]: line.split()[1] for line in lines if line[:1] != " "}
    for name in ARITHMETICS:
        share = prove(model.spec, model.params, x, name).proved.mean()
        assert rows[name] == f"{share:.2%}"
    with Image.open(images.parent / "p.png") as picture:
        assert picture.size[0] > picture.size[1] > 0


def test_prove_as_json_says_it_of_every_token(run, bundle, images, model, x):
    found = json.loads(
        told(run("-m", "vqdeploy", "prove", bundle, images, "--json", "--per-token"))
    )
    proof = prove(model.spec, model.params, x)
    row = found["arithmetics"]["float32"]
    assert (found["images"], found["tokens"]) == (COUNT, proof.proved.size)
    assert row["proved_tokens"] == proof.proved.tolist()
    assert row["rivals"] == proof.rivals.tolist()
    assert found["indices"] == proof.indices.tolist()
    worst = found["least"][0]
    assert worst["excess"] == pytest.approx(proof.excess.min())
    assert found["manifest_sha256"] == Bundle.open(bundle).sha256


def test_the_picture_shows_both_codes_of_the_least_provable_tokens(
    run, residual_bundle, tmp_path, colour_images
):
    np.save(tmp_path / "c.npy", colour_images[:3])
    told(run("-m", "vqdeploy", "prove", residual_bundle, "c.npy", "--picture", "p.png"))
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.mode == "RGB"
        rows = np.asarray(picture, np.int64)
    assert len(np.unique(rows.reshape(-1, 3), axis=0)) > 50  # the picture is not empty


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--per-token"], "--per-token needs --json"),
        (["--arithmetic", "double"], "invalid choice"),
        (["--picture", "p.jpg"], ".png"),
        (["--limit", "0"], "at least 1"),
    ],
)
def test_what_makes_no_sense_is_one_line(refused, bundle, images, words, said):
    assert said in refused(2, "-m", "vqdeploy", "prove", bundle, images, *words)


def test_nothing_is_proved_of_networks_of_fewer_bits(refused, model_file, tmp_path, images):
    export(model_file, tmp_path / "half", options=GraphOptions(precision="fp16"))
    assert "proved" not in Bundle.open(tmp_path / "half").manifest
    for words in (["prove", "half", images], ["encode", "half", images, "--prove", "float32"]):
        assert "export it with --precision fp32" in refused(3, "-m", "vqdeploy", *words)


@pytest.mark.parametrize("form", ["npz", "parquet"])
def test_encode_writes_what_is_proved_of_each_token(run, bundle, images, model, x, form):
    said = told(
        run("-m", "vqdeploy", "encode", bundle, images, "--prove", "lanes", "--output", f"t.{form}")
    )
    proof, found = (
        prove(model.spec, model.params, x, "lanes"),
        read_tokens(images.parent / f"t.{form}"),
    )
    assert f"{proof.proved.sum()} proved for lanes" in said
    np.testing.assert_array_equal(found.proved, proof.proved)
    np.testing.assert_array_equal(found.indices, proof.indices)
    assert found.arithmetic == "lanes"
    if form == "npz":
        np.testing.assert_array_equal(found.rivals, proof.rivals)


def test_encode_refuses_a_file_without_room_for_proofs(refused, bundle, images):
    said = refused(
        2, "-m", "vqdeploy", "encode", bundle, images, "--prove", "float32", "--output", "t.npy"
    )
    assert "an .npy cannot hold what --prove finds" in said


@pytest.mark.parametrize(("bits", "name"), [(10, "tf32"), (7, "bfloat16")])
def test_a_machine_of_another_arithmetic_is_found_by_name(model, many_images, bits, name):
    images = (many_images[:, None] / np.float32(255)).astype(np.float32)
    tokens = advance.tokens_of(model.spec, model.params, images, bits, cut=True)
    proof = prove(model.spec, model.params, images, "pairwise")
    check = advance.check_proved(model.spec, model.params, images, tokens, proof, "pairwise")
    wrong = (tokens != proof.indices) & proof.proved
    assert check.violations == wrong.sum() > 0
    assert "another arithmetic" in check.problem
    assert name in check.problem


def test_tokens_of_the_float32_machine_pass(model, x):
    proof = prove(model.spec, model.params, x)
    check = advance.check_proved(model.spec, model.params, x, proof.indices, proof)
    assert (check.violations, check.certified) == (0, proof.proved.sum())
    unproved = np.where(proof.proved, proof.indices, proof.rivals)
    assert advance.check_proved(model.spec, model.params, x, unproved, proof).violations == 0


def test_verify_stops_a_session_whose_proved_tokens_differ(bundle, x, monkeypatch):
    """This holds whatever the stage "tokenizer" finds."""
    from vqdeploy.runtime.sessions import Session

    usual = Session.__call__

    def off(self, array):
        found = usual(self, array)
        if self._name == "tokenizer.onnx" and len(array):
            found[0] = (found[0] + 1) % 16
        return found

    monkeypatch.setattr(Session, "__call__", off)
    found = verify(Bundle.open(bundle), "cpu", x)
    checks = {check.stage: check for check in found.report.checks}
    assert checks["proved"].violations > 0
    with pytest.raises(ParityError):
        found.report.require()


@pytest.mark.parametrize(("bits", "name"), [(10, "tf32"), (7, "bfloat16")])
def test_verify_names_the_arithmetic_of_an_encoder_that_is_too_far_off(
    bundle, model, x, monkeypatch, bits, name
):
    from vqdeploy.runtime.sessions import Session

    usual = Session.__call__

    def off(self, array):
        if self._name != "encoder.onnx":
            return usual(self, array)
        latents = advance.latents_of(model.spec, model.params, array, bits, cut=False)
        return [latents.astype(np.float32)]

    monkeypatch.setattr(Session, "__call__", off)
    found = verify(Bundle.open(bundle), "cpu", x)
    with pytest.raises(ParityError, match=f"encoder.*factors rounded to .*{name}"):
        found.report.require()


def test_card_inspect_and_certificate_say_the_share_and_what_would_refute_it(
    run, bundle, x, tmp_path
):
    manifest = Bundle.open(bundle).manifest
    share = tell_proved(manifest["proved"])
    card = " ".join((bundle / "README.md").read_text().split())
    assert share in card
    assert advance.REFUTED_BY in card
    assert share in " ".join(told(run("-m", "vqdeploy", "inspect", bundle)).split())
    found = verify(Bundle.open(bundle), "cpu", x)
    assert found.proved["images"] == COUNT
    assert found.proved["of"] == "the given images"
    write_certificate(tmp_path / "certificate.json", Bundle.open(bundle), found, {})
    content = read_certificate(tmp_path / "certificate.json")
    assert content["proved"]["refuted_by"] == advance.REFUTED_BY
    assert content["proved"]["float32"] == found.proved["float32"]


def test_a_manifest_whose_proofs_are_damaged_is_refused(bundle, tmp_path):
    import shutil

    for name, value in (("tokens", "many"), ("float32", None), ("images", True)):
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        shutil.copytree(bundle, tmp_path / "b")
        sign(tmp_path / "b", lambda manifest: manifest["proved"].update({name: value}))  # noqa: B023
        with pytest.raises(InputError, match="proved"):
            Bundle.open(tmp_path / "b")
