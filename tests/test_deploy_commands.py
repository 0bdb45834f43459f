"""The commands on bundles as users run them: what they print and write, one line per mistake."""

import dataclasses
import json
import os
import re
import shutil

import numpy as np
import pytest
from cuda_stub import build as cuda_stub
from PIL import Image
from support import ROOT, sign

from vqdeploy import Codec
from vqdeploy.bundle import FILES
from vqdeploy.commands.export import ExportOptions
from vqdeploy.export import export
from vqdeploy.graphs.build import TARGETS, GraphOptions
from vqdeploy.runtime.protobuf import OPSETS
from vqdeploy.stages import INDEX_TYPES, STAGES
from vqref.preprocessing import Preprocessing
from vqtrain.modelfile import write_model


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
def test_tokens_go_to_a_file_and_come_back_as_images(
    deploy, bundle, images, many_images, tmp_path, form
):
    codec = Codec.load(bundle, "cpu")
    indices = codec.encode(many_images[:30])
    said = deploy("encode", bundle, images, "--output", f"t.{form}", "--device", "cpu")
    assert (
        said
        == f"30 images on cpu: 120 tokens, {len(np.unique(indices))} different; wrote t.{form}\n"
    )
    if form == "npz":
        found = np.load(tmp_path / "t.npz")["indices"]
        assert found.dtype == np.uint8  # the smallest dtype that holds an index
        np.testing.assert_array_equal(found, indices)
    remark = "" if form != "npy" else "t.npy: it does not say which bundle made it\n"
    assert (
        deploy("decode", bundle, f"t.{form}", "--output", "i.npz")
        == f"{remark}30 images on cpu; wrote i.npz\n"
    )
    np.testing.assert_array_equal(
        np.load(tmp_path / "i.npz")["reconstructions"], codec.decode(indices)
    )
    deploy("decode", bundle, f"t.{form}", "--output", "i.png")
    assert pixels(tmp_path / "i.png").shape[0] > 180


@pytest.mark.parametrize("form", ["npz", "parquet"])
def test_a_folder_of_pictures_keeps_its_names(
    deploy, bundle, pictures, many_images, tmp_path, form
):
    deploy("encode", bundle, pictures, "--output", f"t.{form}")
    expected = [f"{i}.png" for i in range(5)]
    if form == "npz":
        with np.load(tmp_path / "t.npz") as found:
            assert found["names"].tolist() == expected
            np.testing.assert_array_equal(
                found["indices"], Codec.load(bundle, "cpu").encode(many_images[:5])
            )
    else:
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(tmp_path / "t.parquet")
        assert table["key"].to_pylist() == expected
        assert str(table["indices"].type) == "fixed_size_list<element: uint8>[4]"
        assert table.schema.metadata[b"latent_shape"] == b"[4]"
        assert table.schema.metadata[b"num_codes"] == b"16"
    deploy("decode", bundle, f"t.{form}")
    assert np.load(tmp_path / "images.npz")["names"].tolist() == expected
    levels = Codec.load(bundle, "cpu").reconstruct(many_images[:5], uint8=True)
    for output in ("out", "out.d/"):
        assert f"wrote {output}" in deploy("decode", bundle, f"t.{form}", "--output", output)
        for name, image in zip(expected, levels[:, 0], strict=True):
            np.testing.assert_array_equal(pixels(tmp_path / output / name), image)


def test_what_was_done_to_pictures_is_said_by_every_command(
    deploy, refused, model, pictures, tmp_path
):
    """For a model of pictures. These have another size, one is broken, one is in a subfolder."""
    done = Preprocessing(1, (28, 28), crop=True)
    export(dataclasses.replace(model, preprocessing=done), tmp_path / "b")
    (pictures / "sub").mkdir()
    Image.new("RGB", (50, 40)).save(pictures / "sub" / "ü.jpg")
    (pictures / "x.tmp.png").write_bytes(b"no picture")
    assert "--skip-bad" in refused(3, "-m", "vqdeploy", "encode", "b", pictures)
    options = ("--recursive", "--skip-bad", "--threads", 1)
    expected = ("1 of 6 pictures resized to 28x28", "1 in colour made grey", "x.tmp.png")
    for command in ("encode", "reconstruct"):
        told = deploy(command, "b", pictures, *options)
        assert all(line in told for line in expected), told
        assert "6 images on " in told
    assert np.load(tmp_path / "tokens.npz")["names"][-1] == "sub/ü.jpg"
    told = deploy("verify", "b", "--data", pictures, *options)
    assert all(line in told for line in expected), told
    assert "golden batch and 6 images" in told
    found = json.loads(deploy("verify", "b", "--data", pictures, *options, "--json"))
    assert all(line in "\n".join(found["said"]) for line in expected)
    write_model(tmp_path / "m.pt", dataclasses.replace(model, preprocessing=done))
    told = deploy("export", "m.pt", "--data", pictures, *options[:2])
    assert all(line in told for line in expected), told
    manifest = json.loads((tmp_path / "m-onnx" / "manifest.json").read_text())
    assert (manifest["measured"]["images"], manifest["measured"]["of"]) == (6, "data")
    deploy("encode", "b", pictures / "sub" / "ü.jpg", "--output", "one.npz")
    assert np.load(tmp_path / "one.npz")["names"].tolist() == ["ü.jpg"]


def test_a_folder_of_the_official_files_gives_the_part_that_is_asked_for_and_says_so(
    deploy, refused, bundle, many_images, tmp_path
):
    official = tmp_path / "official"
    official.mkdir()
    np.savez(official / "kmnist-train-imgs.npz", many_images[:7])
    np.savez(official / "kmnist-test-imgs.npz", many_images[7:10])
    expected = Codec.load(bundle, "cpu").encode(many_images[:10])
    told = deploy("encode", bundle, "official").splitlines()
    said = "the 7 training images of official; --part held-out or all for the others"
    assert (told[0], told[1][:8]) == (said, "7 images")
    np.testing.assert_array_equal(np.load(tmp_path / "tokens.npz")["indices"], expected[:7])
    for part, rows in (("held-out", expected[7:]), ("all", expected)):
        assert f"{len(rows)} " in deploy("encode", bundle, "official", "--part", part)
        np.testing.assert_array_equal(np.load(tmp_path / "tokens.npz")["indices"], rows)
    assert "3 images" in deploy("reconstruct", bundle, "official", "--part", "held-out")
    assert "and 10 images" in deploy("verify", bundle, "--data", "official", "--part", "all")
    np.save(tmp_path / "x.npy", many_images[:2])
    assert "x.npy: holds no held-out images" in refused(
        3, "-m", "vqdeploy", "encode", bundle, "x.npy", "--part", "held-out"
    )


def test_tokens_decode_with_the_bundle_that_made_them_and_no_other(
    deploy, refused, bundle, images, tmp_path
):
    other = tmp_path / "other"
    shutil.copytree(bundle, other)
    sign(other, lambda manifest: manifest["training"].update(epochs=2))
    for form in ("npz", "parquet"):
        deploy("encode", bundle, images, "--output", f"t.{form}")
        line = refused(3, "-m", "vqdeploy", "decode", other, f"t.{form}")
        digests = [Codec.load(path, "cpu").manifest_sha256[:12] for path in (bundle, other)]
        for said in (f"t.{form}: tokens of bundle", *digests, "--force"):
            assert said in line
        assert not (tmp_path / "images.npz").exists()
        told = deploy("decode", other, f"t.{form}", "--force", "--output", f"{form}.png")
        for said in (f"t.{form}: tokens of bundle", *digests):
            assert said in told
    assert "tokens of bundle" not in deploy("decode", bundle, "t.npz", "--force")


def test_threads_reach_onnxruntime(bundle, images, run):
    program = f"""
import sys
from vqdeploy.runtime import sessions
asked = set()
class Watched(sessions.Session):
    def _open(self, graph, device, runtime):
        asked.add(runtime.intra_op_num_threads)
        super()._open(graph, device, runtime)
sessions.Session = Watched
from vqdeploy.__main__ import main
command, *more = sys.argv[1:]
assert main([command, {str(bundle)!r}, *more, "--threads", "3"]) == 0
assert asked == {{3}}, asked
"""
    for words in (
        ("encode", images, "--output", "t.npz"),
        ("decode", "t.npz"),
        ("reconstruct", images),
        ("sample",),
        ("verify",),
        ("bench", "--batch", "1", "--seconds", "0"),
    ):
        done = run("-c", program, *words, PYTHONPATH=str(ROOT))
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("form", ["npz", "npy", "parquet"])
def test_grids_of_tokens_of_colour_images_come_back_whole(
    deploy, residual_bundle, colour_images, tmp_path, form
):
    np.save(tmp_path / "c.npy", colour_images[:9].transpose(0, 2, 3, 1))
    codec = Codec.load(residual_bundle, "cpu")
    expected = codec.reconstruct(colour_images[:9])
    deploy("encode", residual_bundle, "c.npy", "--output", f"t.{form}")
    deploy("decode", residual_bundle, f"t.{form}", "--output", "i.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "i.npy"), expected)
    deploy("reconstruct", residual_bundle, "c.npy", "--output", "r.png")
    deploy("sample", residual_bundle, "--output", "s.png", "--number", 4)
    assert pixels(tmp_path / "r.png").shape[2] == pixels(tmp_path / "s.png").shape[2] == 3


def test_pictures_are_drawn_of_reconstructions_and_samples(deploy, bundle, images, tmp_path):
    deploy("reconstruct", bundle, images, "--output", "r.png", "--limit", "16")
    deploy("sample", bundle, "--output", "s.png", "--number", "9", "--seed", "3")
    first = (tmp_path / "s.png").read_bytes()
    deploy("sample", bundle, "--output", "s.png", "--number", "9", "--seed", "3")
    assert (tmp_path / "s.png").read_bytes() == first
    assert pixels(tmp_path / "r.png").std() > 20


def test_help_answers_without_a_heavy_library(run):
    names = (
        *("export", "verify", "prove", "inspect", "bench", "encode", "decode", "reconstruct"),
        *("sample", "import"),
    )
    for words in ([], *([name] for name in (*names, "doctor"))):
        code = (
            "import sys; from vqdeploy.__main__ import main\n"
            f"try: main([*{words!r}, '--help'])\n"
            "except SystemExit: print(*sys.modules)"
        )
        done = run("-c", code, PYTHONPATH=str(ROOT))
        assert done.returncode == 0, done.stderr
        assert words or all(name in done.stdout for name in names)
        modules = set(done.stdout.splitlines()[-1].split())
        assert not modules & {"torch", "onnx", "onnxruntime", "scipy", "PIL", "vqtrain"}


def test_the_options_of_export_start_as_those_of_the_graphs_do():
    options, graphs = ExportOptions(), GraphOptions()
    for name in ("opset", "precision", "target", "fold", "index_type"):
        assert getattr(options, name) == getattr(graphs, name)
    fields = ExportOptions.__dataclass_fields__
    for name, known in (("target", TARGETS), ("index_type", INDEX_TYPES)):
        assert fields[name].metadata["choices"] == known
    assert (OPSETS[0], OPSETS[-1]) == (18, 20)


def test_inspect_tells_and_checks_every_file(deploy, refused, bundle, residual_bundle, tmp_path):
    assert "residual: images (3, 16, 16), gaussian" in deploy("inspect", residual_bundle)
    said = deploy("inspect", bundle)
    assert "pictures    of 28×28 pixels are turned as their EXIF data say, made grey" in said
    for name in (*FILES, "images float32 ['N', 1, 28, 28]", "violations", "opset 18"):
        assert name in said
    assert json.loads(deploy("inspect", bundle, "--json"))["format"] == "vqdeploy-bundle"
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    (copy / "oracle.npz").write_bytes(b"")
    assert "oracle.npz: damaged" in refused(3, "-m", "vqdeploy", "inspect", copy)


def test_verify_tells_the_placement_to_programs(deploy, residual_bundle):
    found = json.loads(deploy("verify", residual_bundle, "--json"))
    assert (found["device"], found["passed"]) == ("cpu", True)
    nodes = found["placement"]["tokenizer"]["CPUExecutionProvider"]
    assert (nodes["ArgMin"], nodes["Conv"]) == (1, 6)


@pytest.mark.skipif(cuda_stub.obstacle() is not None, reason=str(cuda_stub.obstacle()))
def test_verify_on_cuda_prints_a_line_of_placement_for_each_graph(run, residual_bundle, tmp_path):
    """With libraries that do nothing, the placement is the provider's own; numbers are wrong."""
    libraries = tmp_path / "cuda"
    libraries.mkdir()
    cuda_stub.build(libraries)
    verify = ("-m", "vqdeploy", "verify", residual_bundle, "--device", "cuda")
    done = run(*verify, "--certificate", "c.json", LD_LIBRARY_PATH=str(libraries))
    assert (done.returncode, done.stderr) == (4, "")
    placed = dict(re.findall(r"^(\w+) +CUDA \d+: (.*)$", done.stdout, re.M))
    assert list(placed) == list(STAGES)
    assert "6 Conv" in placed["tokenizer"]
    assert not re.search("CPU|Memcpy", done.stdout)
    certificate = json.loads((tmp_path / "c.json").read_text())
    assert certificate["verdict"] == "refuted"
    assert list(certificate["placement"]["decoder"]) == ["CUDAExecutionProvider"]


def test_bench_measures_codec_and_torch_in_turns_and_numbers_of_threads_alone(deploy, bundle):
    cores = os.cpu_count()
    counts = [*(n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n < cores), cores]
    names = ("codec", "torch", *(f"{n} thread{'s' * (n > 1)}" for n in counts))
    found = json.loads(
        deploy("bench", bundle, "--batch", 1, "--batch", 3, "--seconds", 0.05, "--json")
    )
    assert (found["device"], found["providers"]) == ("cpu", ["CPUExecutionProvider"])
    rows = {(row["direction"], row["batch"], row["implementation"]): row for row in found["rows"]}
    assert set(rows) == {(d, b, i) for d in ("encode", "decode") for b in (1, 3) for i in names}
    for row in rows.values():
        assert row["calls"] >= 1
        assert 0 < row["p50_ms"] <= row["p99_ms"]
        assert row["tokens_per_second"] == pytest.approx(4 * row["images_per_second"])
    shortest = deploy("bench", bundle, "--batch", 1, "--seconds", "1e-300")  # one call per row
    assert [line.split()[-1] for line in shortest.splitlines()[2:]] == ["1"] * 2 * len(names)
    assert all(len(line) <= 80 for line in shortest.splitlines()[1:])
    alone = json.loads(
        deploy("bench", bundle, "--batch", 1, "--seconds", 0, "--threads", 1, "--json")
    )
    assert [row["implementation"] for row in alone["rows"]] == ["codec", "torch"] * 2


def test_bench_measures_a_grid(deploy, residual_bundle):
    told = deploy("bench", residual_bundle, "--batch", 2, "--seconds", 0, "--threads", 1, "--json")
    rows = json.loads(told)["rows"]
    assert [row["direction"] for row in rows] == ["encode"] * 2 + ["decode"] * 2


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
def test_doctor_sees_two_runtimes_and_none(run, installed, advice):
    program = f"""
import importlib.metadata as metadata
def version(name):
    if name not in {installed!r}:
        raise metadata.PackageNotFoundError(name)
    return {installed!r}[name]
metadata.version = version
from vqdeploy.__main__ import main
raise SystemExit(main(["doctor", "--json"]))
"""
    done = run("-c", program, PYTHONPATH=str(ROOT))
    assert done.returncode == 5
    assert done.stderr == "vqdeploy: no bundle can run here: onnxruntime\n"
    (finding,) = [each for each in json.loads(done.stdout) if each["what"] == "onnxruntime"]
    assert finding["fatal"]
    assert not finding["fine"]
    assert advice in finding["advice"]


def test_mistakes_are_one_line_each(refused, bundle, images, tmp_path):
    def line(code, *arguments):
        return refused(code, "-m", "vqdeploy", *arguments)

    assert "no such" in line(3, "encode", bundle, "none.npy").lower()
    assert "must end in .npz, .npy or .parquet" in line(
        2, "encode", bundle, images, "--output", "t.csv"
    )
    assert "must end in" in line(2, "sample", bundle, "--output", "s.gif")
    np.save(tmp_path / "wide.npy", np.zeros((2, 28, 27), np.uint8))
    assert "wide.npy: images: shape is (2, 1, 28, 27)" in line(3, "encode", bundle, "wide.npy")
    np.savez(tmp_path / "t.npz", indices=np.array([[0, 0, 0, 16]]))
    assert "t.npz: indices: values from 0 to 16, expected 0 to 15" in line(
        3, "decode", bundle, "t.npz"
    )
    for wrong, said in (
        ({"indices": np.zeros((4, 3), int)}, "shape is (4, 3), (S, N), expected (N, 4)"),
        ({"indices": np.zeros((2, 2, 2), int)}, "shape is (2, 2, 2), expected (N, 4)"),
        ({"indices": np.zeros((2, 4))}, "dtype is float64, expected an integer dtype"),
        ({"indices": np.zeros((2, 4), int), "latent_shape": [2, 2]}, "latent_shape is (2, 2)"),
        ({"indices": np.zeros((2, 4), int), "num_codes": 17}, "num_codes is 17, this bundle has"),
    ):
        np.savez(tmp_path / "w.npz", **wrong)
        refusal = line(3, "decode", bundle, "w.npz")
        assert "w.npz: " in refusal
        assert said in refusal
    np.savez(tmp_path / "u.npz", other=np.zeros(1))
    assert "u.npz: holds no 'indices'" in line(3, "decode", bundle, "u.npz")
    (tmp_path / "v.parquet").write_bytes(b"PAR1 not one")
    assert "v.parquet: holds no tokens" in line(3, "decode", bundle, "v.parquet")
    (tmp_path / "d.npz").mkdir()
    assert "is a folder" in line(5, "encode", bundle, images, "--output", "d.npz")
    assert "there is a folder already; name a new one" in line(
        3, "decode", bundle, "t.npz", "--output", tmp_path
    )
    assert "argument --threads: 0 is not at least 1" in line(2, "sample", bundle, "--threads", "0")
    Image.new("L", (20, 30)).save(tmp_path / "small.png")
    assert "small.png: 30x20 pixels; this model was trained on images of 28x28" in line(
        3, "encode", bundle, "small.png"
    )
    assert "export needs either" in line(2, "export")
    assert "must end in .npz or .safetensors" in line(2, "export", "--from-params", "p.pt")
    assert "--number is 85599; for images (1, 28, 28) it must be at most 85598" in line(
        2, "sample", bundle, "--number", 85599
    )
    assert "--batch is 85599" in line(2, "bench", bundle, "--batch", 85599)
    np.save(tmp_path / "many.npy", np.zeros((85599, 4), np.int64))
    assert "85599 images are too many for a picture" in line(
        3, "decode", bundle, "many.npy", "--output", "many.png"
    )
    assert "opset is 17" in line(2, "export", "model.pt", "--opset", "17")
    for command in ("verify", "bench", "encode", "decode", "reconstruct", "sample"):
        more = [images] if command in ("encode", "decode", "reconstruct") else []
        assert "device cuda" in line(5, command, bundle, *more, "--device", "cuda")


@pytest.mark.parametrize(
    "words", [["--limit", "3"], ["--part", "all"], ["--recursive"], ["--skip-bad"]]
)
@pytest.mark.parametrize("command", ["verify", "export"])
def test_how_data_are_read_is_refused_where_there_are_none(
    command, words, refused, bundle, model_file
):
    line = refused(
        2, "-m", "vqdeploy", command, bundle if command == "verify" else model_file, *words
    )
    assert f"{words[0]} says how to read --data, but there is no --data" in line
