"""The examples, as their readers run them: programs in other languages get the Codec's tokens."""

import json
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from support import ROOT

from vqdeploy import Codec

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def expected(bundle, many_images):
    return Codec.load(bundle, "cpu").encode(many_images[:100]).tolist()


@pytest.fixture
def images(tmp_path, many_images):
    np.save(tmp_path / "images.npy", many_images[:100])
    return tmp_path / "images.npy"


def test_reconstructions_are_drawn_below_their_images(
    run, residual_bundle, colour_images, tmp_path
):
    np.save(tmp_path / "images.npy", colour_images[:20])
    program = EXAMPLES / "reconstructions.py"
    done = run(program, residual_bundle, "images.npy", "p.png", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "p.png") as picture:
        assert (picture.mode, picture.size) == ("RGB", (16 * 20 * 3, 2 * 20 * 3))


@pytest.mark.parametrize("shape", [(3, 28, 27), (3, 1, 28, 27)])
def test_images_of_another_size_are_refused(run, bundle, tmp_path, shape):
    np.save(tmp_path / "wide.npy", np.zeros(shape, np.uint8))
    done = run(EXAMPLES / "plain_onnxruntime.py", bundle, "wide.npy")
    assert done.returncode == 1
    assert "expected ['N', 1, 28, 28]" in done.stderr


def test_plain_onnxruntime_in_python_gives_the_same_tokens(run, bundle, images, expected):
    done = run(EXAMPLES / "plain_onnxruntime.py", bundle, images)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected
    assert "vqdeploy" not in (EXAMPLES / "plain_onnxruntime.py").read_text()


@pytest.fixture(scope="module")
def javascript(tmp_path_factory):
    """The example with its packages installed."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("needs node and npm")
    folder = tmp_path_factory.mktemp("javascript")
    for path in (EXAMPLES / "javascript").iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    installed = subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if installed.returncode != 0:
        pytest.skip(
            f"npm cannot install onnxruntime-web: {installed.stderr.strip().splitlines()[-1:]}"
        )
    return folder


def node(folder, *arguments):
    return subprocess.run(
        ["node", "tokens.js", *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_onnxruntime_in_javascript_gives_the_same_tokens(javascript, bundle, images, expected):
    done = node(javascript, bundle, images)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


def test_both_refuse_a_damaged_graph(javascript, run, bundle, images, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    content = bytearray((copy / "tokenizer.onnx").read_bytes())
    content[-1] ^= 1
    (copy / "tokenizer.onnx").write_bytes(content)
    for done in (
        node(javascript, copy, images),
        run(EXAMPLES / "plain_onnxruntime.py", copy, images),
    ):
        assert done.returncode != 0
        assert "tokenizer.onnx: damaged" in done.stderr
