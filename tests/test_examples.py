"""The examples as readers run them: programs in other languages get the Codec's tokens."""

import dataclasses
import json
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import mixed_pictures
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support import RESIDUAL, ROOT, png, prior_params, small_model

from vqdeploy import Codec
from vqdeploy.export import export
from vqdeploy.graphs.build import GraphOptions
from vqref import families
from vqref.preprocessing import Preprocessing
from vqref.prior import Prior, transformer

EXAMPLES = ROOT / "examples"
PAGE = Path("vqdeploy/page")
MODELS: dict[str, Any] = {
    "grey": (
        families.post((1, 28, 28), 4, 4, num_codes=16, code_size=8),
        Preprocessing(1, (28, 28), background=(240, 10, 90)),
        {},
    ),
    "colour": (
        families.residual((3, 16, 24), **RESIDUAL, variance=0.08),
        Preprocessing(3, (16, 24), crop=True),
        {"index_type": "int32"},
    ),
    "alpha": (
        families.residual((4, 12, 8), **RESIDUAL, variance=0.08),
        Preprocessing(4, (12, 8)),
        {"batch": 5},
    ),
    "cube": (families.residual((4, 4, 4), **RESIDUAL, variance=0.08), None, {}),
}
"""Per model: a spec, what is done to pictures, and how the graphs are written."""


@pytest.fixture(scope="module")
def bundle_of(tmp_path_factory):
    """Returns the bundle of one of MODELS."""
    made = {}

    def make(name):
        if name not in made:
            spec, prepared, options = MODELS[name]
            model = dataclasses.replace(small_model(spec), preprocessing=prepared)
            made[name] = tmp_path_factory.mktemp(name) / "model-onnx"
            export(model, made[name], options=GraphOptions(**options))
        return made[name]

    return make


def images_of(name, count=70):
    """Returns smooth images (N, C, H, W) of many colours."""
    spec = MODELS[name][0]
    coarse = np.random.default_rng(0).integers(0, 256, (count, spec.image_shape[0], 4, 4))
    h, w = (-(-n // 4) for n in spec.image_shape[1:])
    fine = coarse.repeat(h, axis=2).repeat(w, axis=3)
    return fine[:, :, : spec.image_shape[1], : spec.image_shape[2]].astype(np.uint8)


@pytest.fixture(scope="module")
def javascript(tmp_path_factory):
    """The example with its packages installed."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("needs node and npm")
    root = tmp_path_factory.mktemp("javascript")
    for path in (Path("examples/javascript"), PAGE):
        shutil.copytree(ROOT / path, root / path, ignore=shutil.ignore_patterns("node_modules"))
    folder = root / "examples/javascript"
    installed = subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if installed.returncode != 0:
        reason = installed.stderr.strip().splitlines()[-1:]
        pytest.skip(f"npm cannot install onnxruntime-web and sharp: {reason}")
    return folder


@pytest.fixture(params=["Python", "JavaScript"])
def example(request, run):
    """Runs an example with arguments, in Python and in JavaScript."""
    if request.param == "Python":
        return lambda *arguments: run(EXAMPLES / "plain_onnxruntime.py", *arguments)
    folder = request.getfixturevalue("javascript")
    return lambda *arguments: subprocess.run(
        ["node", "tokens.js", *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def tokens(example):
    """Runs the example and returns the tokens."""

    def go(*arguments):
        done = example(*arguments)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return json.loads(done.stdout)

    return go


@pytest.fixture
def refusal(example):
    """Runs the example, which must fail with one line, and returns the line."""

    def go(*arguments):
        done = example(*arguments)
        assert (done.returncode, done.stdout) == (1, "")
        (line,) = done.stderr.splitlines()
        return line

    return go


def test_reconstructions_are_drawn_below_their_images(
    run, residual_bundle, colour_images, tmp_path
):
    np.save(tmp_path / "images.npy", colour_images[:20])
    program = EXAMPLES / "reconstructions.py"
    done = run(program, residual_bundle, "images.npy", "p.png", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "p.png") as picture:
        assert (picture.mode, picture.size) == ("RGB", (16 * 20 * 3, 2 * 20 * 3))


def test_the_examples_know_nothing_of_the_package():
    names = ("javascript/tokens.js", "javascript/samples.js")
    for path in ("plain_onnxruntime.py", "samples.py", *names):
        text = (EXAMPLES / path).read_text()
        assert not any(f"{way} {name}" in text for way in ("import", "from") for name in NAMES)
    for name in ("graphs.js", "pictures.js", "prior.js"):  # the examples share them with the page
        assert "import " not in (ROOT / PAGE / name).read_text()


NAMES = ("vqdeploy", "vqref", "vqtrain")


@pytest.mark.parametrize("name", ["grey", "colour", "alpha"])
def test_arrays_of_either_layout_give_the_codecs_tokens(bundle_of, tokens, tmp_path, name):
    bundle, images = bundle_of(name), images_of(name)
    expected = Codec.load(bundle, "cpu").encode(images).tolist()
    assert len(np.unique(expected)) > 3
    layouts = [images, images.transpose(0, 2, 3, 1), *([images[:, 0]] if name == "grey" else [])]
    for array in layouts:
        np.save(tmp_path / "images.npy", np.ascontiguousarray(array))
        assert tokens(bundle, tmp_path / "images.npy") == expected


REFUSED = {
    "another width": ("grey", (3, 1, 28, 27), np.uint8),
    "another width, bare": ("grey", (3, 28, 27), np.uint8),
    "bare, in colour": ("colour", (3, 16, 24), np.uint8),
    "grey for colour": ("colour", (3, 1, 16, 24), np.uint8),
    "transposed": ("colour", (3, 24, 16, 3), np.uint8),
    "both layouts": ("cube", (3, 4, 4, 4), np.uint8),
    "floats": ("grey", (3, 1, 28, 28), np.float32),
    "int64": ("grey", (3, 1, 28, 28), np.int64),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_arrays_that_do_not_fit_are_refused_with_one_line(bundle_of, refusal, tmp_path, kind):
    name, shape, dtype = REFUSED[kind]
    np.save(tmp_path / "images.npy", np.zeros(shape, dtype))
    assert "uint8" in refusal(bundle_of(name), tmp_path / "images.npy")


UNREAD = (".bmp", ".tga", ".jp2", ".ppm", ".pgm", ".pbm")
"""Endings of formats that sharp does not read."""


def read_by_javascript(path, one, channels):
    """Returns whether the example reads a picture as the package does.

    sharp does not tell which colours a GIF hides where it is transparent; four channels would show
    them.
    """
    return not (
        path.suffix in UNREAD or "CMYK" in one.notes or (channels == 4 and path.suffix == ".gif")
    )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """One picture of each kind, by its path."""
    folder = tmp_path_factory.mktemp("pictures")
    made = mixed_pictures.make(folder, len(mixed_pictures.MAKERS), 1)
    return {folder / one.name: one for one in made}


@pytest.mark.parametrize("name", ["grey", "colour", "alpha"])
def test_pictures_of_every_kind_give_the_codecs_tokens(bundle_of, request, pictures, tokens, name):
    channels = MODELS[name][0].image_shape[0]
    read = [
        path
        for path, one in pictures.items()
        if "Python" in request.node.name or read_by_javascript(path, one, channels)
    ]
    assert len(read) > 20
    with Codec.load(bundle_of(name), "cpu") as codec:
        expected = codec.encode(read).tolist()
    assert len(np.unique(expected)) > 3
    assert tokens(bundle_of(name), *read) == expected


PIXELS = """
import sharp from "sharp";
import { readFileSync, writeFileSync } from "node:fs";
import { prepare } from "../../vqdeploy/page/pictures.js";

const images = [];
for (const { file, done, shape } of JSON.parse(readFileSync("wanted.json"))) {
  const source = sharp(file, { ignoreIcc: true });
  const { orientation } = await source.metadata();
  const { data, info } = await source.ensureAlpha().raw().toBuffer({ resolveWithObject: true });
  images.push(prepare({ ...info, data }, orientation ?? 1, done, shape));
}
writeFileSync("found.raw", Buffer.concat(images));
"""


@pytest.fixture(scope="module")
def prepared(pictures):
    """Returns pictures, what to do to them, and the package's images, of random sizes.

    Sizes are larger and smaller than the pictures. Pixels are compared, since tokens would hide an
    error of one level.
    """
    from vqref.host.pictures import prepare

    rng, found = np.random.default_rng(0), []
    for path, one in pictures.items():
        for channels in (1, 3, 4):
            for size in (one.pixels.shape[:2], *rng.integers(3, 160, (3, 2)).tolist()):
                crop, colour = bool(rng.integers(2)), tuple(rng.integers(0, 256, 3).tolist())
                height, width = map(int, size)
                done = Preprocessing(channels, (height, width), crop, colour)
                shape = (channels, *done.size)
                asked = {"file": str(path), "done": done.to_dict(), "shape": shape}
                found.append((asked, one, prepare(path, shape, done)[0]))
    return found


def test_plain_python_prepares_pictures_to_the_last_bit(prepared):
    examples = runpy.run_path(str(EXAMPLES / "plain_onnxruntime.py"))
    for asked, _, image in prepared:
        own = examples["picture"](Path(asked["file"]), asked["done"], asked["shape"])
        np.testing.assert_array_equal(own, image, str(asked))


def test_javascript_prepares_pictures_to_the_last_bit(javascript, prepared):
    wanted, expected = [], []
    for asked, one, image in prepared:
        if read_by_javascript(Path(asked["file"]), one, asked["shape"][0]):
            wanted.append(asked)
            expected.append(image)
    assert len(wanted) > 200
    (javascript / "wanted.json").write_text(json.dumps(wanted))
    (javascript / "pixels.js").write_text(PIXELS)
    subprocess.run(["node", "pixels.js"], cwd=javascript, check=True)
    found = np.fromfile(javascript / "found.raw", np.uint8)
    ends = np.cumsum([image.size for image in expected])
    assert found.size == ends[-1]
    for ask, image, own in zip(wanted, expected, np.split(found, ends[:-1]), strict=True):
        np.testing.assert_array_equal(own.reshape(image.shape), image, str(ask))


def test_pictures_that_do_not_fit_are_refused_with_one_line(bundle_of, refusal, tmp_path):
    bundle, path = bundle_of("grey"), tmp_path / "p.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    assert "p.png" in refusal(bundle, path)
    assert "none.png" in refusal(bundle, tmp_path / "none.png")
    Image.fromarray(np.zeros((3, 5), np.float32)).save(tmp_path / "p.tif")
    assert "p.tif: its levels have no known range" in refusal(bundle, tmp_path / "p.tif")
    Image.new("L", (5, 3)).save(path)
    line = refusal(bundle_of("cube"), path)
    assert line.endswith("p.png: 5x3 pixels, and the model was trained on 4x4")


@pytest.mark.parametrize("name", ["grey", "colour", "alpha"])
def test_reconstructions_are_written_as_pictures(bundle_of, tokens, tmp_path, name):
    images = images_of(name, 7)
    np.save(tmp_path / "images.npy", images)
    folder = tmp_path / "made"
    tokens(bundle_of(name), tmp_path / "images.npy", "--decode", folder)
    expected = Codec.load(bundle_of(name), "cpu").reconstruct(images)
    assert len([*folder.iterdir()]) == 7
    for i, image in enumerate(expected):
        with Image.open(folder / f"{i}.png") as picture:
            levels = np.asarray(picture).astype(float)
        found = levels.reshape(*image.shape[1:], -1).transpose(2, 0, 1)
        assert np.abs(found - 255 * image).max() < 0.51


def test_a_damaged_graph_is_refused(bundle_of, refusal, tmp_path):
    copy = Path(shutil.copytree(bundle_of("grey"), tmp_path / "copy"))
    np.save(tmp_path / "images.npy", images_of("grey", 2))
    content = bytearray((copy / "tokenizer.onnx").read_bytes())
    content[-1] ^= 1
    (copy / "tokenizer.onnx").write_bytes(content)
    assert refusal(copy, tmp_path / "images.npy") == "tokenizer.onnx: damaged"


@pytest.mark.parametrize("options", [{}, {"index_type": "int32"}, {"batch": 4}])
@pytest.mark.parametrize("language", ["Python", "JavaScript"])
def test_samples_of_a_seed_are_the_codecs_in_every_language(
    request, run, model, tmp_path, language, options
):
    spec = transformer(4, 16, width=16, depth=2, heads=2)
    learned = Prior(spec, prior_params(spec), model.digest(), {}, {"held_out": 9.5})
    bundle = tmp_path / "bundle"
    export(dataclasses.replace(model, prior=learned), bundle, options=GraphOptions(**options))
    seed = 12345678901234567890123  # more than 64 bits
    drawn = Codec.load(bundle, "cpu").draw(70, seed=seed)
    assert drawn.certified.all(axis=1).mean() > 0.9
    if language == "Python":
        done = run(EXAMPLES / "samples.py", bundle, 70, "--seed", seed, "--decode", "drawn")
        assert len([*(tmp_path / "drawn").iterdir()]) == 70
    else:
        folder = request.getfixturevalue("javascript")
        words = ["node", "samples.js", str(bundle), "70", "--seed", str(seed)]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    held = np.logical_and.accumulate(drawn.certified, axis=1)
    assert (np.array(json.loads(done.stdout)) == drawn.indices)[held].all()


def test_a_pipeline_of_ray_adds_the_codecs_tokens_to_its_rows(
    run, residual_bundle, colour_images, tmp_path
):
    rows = [{"bytes": png(image), "path": None} for image in colour_images[:20]]
    pq.write_table(pa.table({"image": rows, "label": range(20)}), tmp_path / "images.parquet")
    done = run(
        *(EXAMPLES / "ray_tokens.py", residual_bundle, "images.parquet", "tokens"),
        PYTHONPATH=str(ROOT), RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = pq.read_table(tmp_path / "tokens").sort_by("label")
    assert found.column_names == ["label", "indices"]
    tokens = np.array(found["indices"].to_pylist())
    np.testing.assert_array_equal(
        tokens, Codec.load(residual_bundle, "cpu").encode(colour_images[:20])
    )
