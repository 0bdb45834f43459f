"""The commands on bundles, as a user has them: what they print, what they write, and one line for each mistake."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from vqdeploy import Codec
from vqdeploy.bundle import FILES
from vqdeploy.doctor import examine


@pytest.fixture
def images(tmp_path, many_images):
    np.save(tmp_path / "images.npy", many_images[:30])
    return tmp_path / "images.npy"


@pytest.fixture
def pictures(tmp_path, many_images):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, image in enumerate(many_images[:5]):
        Image.fromarray(image).save(folder / f"{i}.png")
    return folder


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


@pytest.fixture
def deploy(run):
    def go(*arguments, **options):
        done = run("-m", "vqdeploy", *arguments, **options)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        wide = [line for line in done.stdout.splitlines() if len(line) > 80 and "tmp" not in line]
        assert not wide or done.stdout[0] in "{["
        return done.stdout

    return go


@pytest.mark.parametrize("form", ["npz", "npy", "parquet"])
def test_tokens_go_to_a_file_and_come_back_as_images(deploy, bundle, images, many_images, tmp_path, form):
    codec = Codec.load(bundle, "cpu")
    indices = codec.encode(many_images[:30])
    said = deploy("encode", bundle, images, "--output", f"t.{form}", "--device", "cpu")
    assert said == f"30 images on cpu: 120 tokens, {len(np.unique(indices))} different; wrote t.{form}\n"
    if form == "npz":
        np.testing.assert_array_equal(np.load(tmp_path / "t.npz")["indices"], indices)
    assert deploy("decode", bundle, f"t.{form}", "--output", "i.npz") == "30 images on cpu; wrote i.npz\n"
    np.testing.assert_array_equal(np.load(tmp_path / "i.npz")["probabilities"], codec.decode(indices))
    deploy("decode", bundle, f"t.{form}", "--output", "i.png")
    assert pixels(tmp_path / "i.png").shape[0] > 180


@pytest.mark.parametrize("form", ["npz", "parquet"])
def test_a_folder_of_pictures_keeps_its_names(deploy, bundle, pictures, many_images, tmp_path, form):
    deploy("encode", bundle, pictures, "--output", f"t.{form}")
    expected = [f"{i}.png" for i in range(5)]
    if form == "npz":
        with np.load(tmp_path / "t.npz") as found:
            assert found["names"].tolist() == expected
            np.testing.assert_array_equal(found["indices"], Codec.load(bundle, "cpu").encode(many_images[:5]))
    else:
        import pyarrow.parquet

        assert pyarrow.parquet.read_table(tmp_path / "t.parquet")["name"].to_pylist() == expected


def test_pictures_are_drawn_of_reconstructions_and_samples(deploy, bundle, images, tmp_path):
    deploy("reconstruct", bundle, images, "--output", "r.png", "--limit", "16")
    deploy("sample", bundle, "--output", "s.png", "--number", "9", "--seed", "3")
    first = (tmp_path / "s.png").read_bytes()
    deploy("sample", bundle, "--output", "s.png", "--number", "9", "--seed", "3")
    assert (tmp_path / "s.png").read_bytes() == first
    assert pixels(tmp_path / "r.png").std() > 20


def test_inspect_tells_and_checks_every_file(deploy, refused, bundle, tmp_path):
    said = deploy("inspect", bundle)
    for name in (*FILES, "images float32 ['N', 1, 28, 28]", "violations", "opset 18"):
        assert name in said
    assert json.loads(deploy("inspect", bundle, "--json"))["format"] == "vqdeploy-bundle"
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    (copy / "oracle.npz").write_bytes(b"")
    assert "oracle.npz: damaged" in refused(3, "-m", "vqdeploy", "inspect", copy)


def test_bench_measures_the_codec_and_torch_in_turns(deploy, bundle):
    found = json.loads(deploy("bench", bundle, "--batch", 1, "--batch", 3, "--seconds", 0.05, "--json"))
    assert (found["device"], found["providers"]) == ("cpu", ["CPUExecutionProvider"])
    rows = {(row["direction"], row["batch"], row["implementation"]): row for row in found["rows"]}
    assert set(rows) == {(d, b, i) for d in ("encode", "decode") for b in (1, 3) for i in ("codec", "torch")}
    for row in rows.values():
        assert row["calls"] >= 1
        assert 0 < row["p50_ms"] <= row["p99_ms"]
        assert row["tokens_per_second"] == pytest.approx(4 * row["images_per_second"])
    assert "tokens/s" in deploy("bench", bundle, "--batch", 1, "--seconds", 0.01)


def test_doctor_says_what_there_is(deploy):
    said = deploy("doctor")
    assert "CPUExecutionProvider" in said
    assert all(finding["fine"] for finding in json.loads(deploy("doctor", "--json")))


@pytest.mark.parametrize(
    ("installed", "advice"),
    [
        ({"onnxruntime": "1.30", "onnxruntime-gpu": "1.30"}, "they overwrite each other"),
        ({}, "pip install onnxruntime-gpu (or onnxruntime)"),
    ],
)
def test_doctor_sees_two_runtimes_and_none(monkeypatch, installed, advice):
    from importlib.metadata import PackageNotFoundError

    def version(name):
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr("vqdeploy.doctor.version", version)
    (finding,) = [finding for finding in examine() if finding.what == "onnxruntime"]
    assert finding.fatal
    assert not finding.fine
    assert advice in finding.advice


def test_mistakes_are_one_line_each(refused, bundle, images, tmp_path):
    def line(code, *arguments):
        return refused(code, "-m", "vqdeploy", *arguments)

    assert "no such" in line(3, "encode", bundle, "none.npy").lower()
    assert "must end in .npz, .npy or .parquet" in line(2, "encode", bundle, images, "--output", "t.csv")
    assert "must end in" in line(2, "sample", bundle, "--output", "s.gif")
    np.save(tmp_path / "wide.npy", np.zeros((2, 28, 27), np.uint8))
    assert "wide.npy: images: shape is (2, 1, 28, 27)" in line(3, "encode", bundle, "wide.npy")
    np.savez(tmp_path / "t.npz", indices=np.array([[0, 0, 0, 16]]))
    assert "t.npz: indices: values from 0 to 16, expected 0 to 15" in line(3, "decode", bundle, "t.npz")
    np.savez(tmp_path / "u.npz", other=np.zeros(1))
    assert "u.npz: holds no 'indices'" in line(3, "decode", bundle, "u.npz")
    (tmp_path / "v.parquet").write_bytes(b"PAR1 not one")
    assert "v.parquet: holds no tokens" in line(3, "decode", bundle, "v.parquet")
    (tmp_path / "d.npz").mkdir()
    assert "is a folder" in line(5, "encode", bundle, images, "--output", "d.npz")
    assert "export needs either" in line(2, "export")
    assert "must end in .npz or .safetensors" in line(2, "export", "--from-params", "p.pt")
    assert "opset is 17" in line(2, "export", "model.pt", "--opset", "17")
    for command in ("verify", "bench", "encode", "decode", "reconstruct", "sample"):
        more = [images] if command in ("encode", "decode", "reconstruct") else []
        assert "device cuda" in line(5, command, bundle, *more, "--device", "cuda")
