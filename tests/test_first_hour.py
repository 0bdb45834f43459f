"""From a folder of mixed pictures to a shipped tokenizer and back.

Runs the commands of docs/pictures.md as they stand, made small, and the ten lines of Python there.
"""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from mixed_pictures import make
from PIL import Image
from support import ROOT

import vqref
from vqdeploy import Codec
from vqref.spec import CODEBOOK
from vqtrain import VQVAE
from vqtrain.modelfile import read_model

DOCUMENT = (ROOT / "docs" / "pictures.md").read_text()
COMMANDS = re.findall(r"^    python -m (.*)$", DOCUMENT, re.MULTILINE)
PYTHON = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)

SIDE = 16
SMALL = (
    f"--resize {SIDE}x{SIDE} --epochs 1 --hidden 16 --blocks 1 --block-hidden 8 --num-codes 32 "
    "--code-size 8 --precision float32 --check-images 4"
).split()
"""Options that make the documented training take seconds: the last one on a command line wins."""

COUNT = int(os.environ.get("MIXED_PICTURES", "100"))


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """A folder in which the documented commands have run, what each printed, and the pictures."""
    place = tmp_path_factory.mktemp("first hour")
    pictures = make(place / "pictures", COUNT)
    printed = {}
    for command in COMMANDS:
        words = command.split()
        more = SMALL if words[0] == "vqtrain" else []
        done = subprocess.run(
            [sys.executable, "-m", *words, *more],
            cwd=place,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (command, done.stderr)
        assert done.stderr == "", command
        printed[words[1] if words[0] == "vqdeploy" else "train"] = done.stdout
    return place, printed, {picture.name: picture for picture in pictures}


def test_the_documented_commands_are_those_that_a_user_needs():
    words = [command.split() for command in COMMANDS]
    assert [w[1] if w[0] == "vqdeploy" else w[0] for w in words] == [
        "vqtrain",
        "export",
        "verify",
        "reconstruct",
        "encode",
        "decode",
    ]


def counted(notes, pictures):
    return sum(notes in picture.notes for picture in pictures.values())


def test_every_command_says_what_it_did_to_the_pictures(walked):
    _, printed, pictures = walked
    for command in ("train", "verify", "reconstruct", "encode"):
        said = printed[command]
        assert re.search(rf"of {len(pictures)} pictures? resized to {SIDE}x{SIDE}", said), said
        for note, words in (
            ("turned", "turned as the EXIF data say"),
            ("laid", "laid on #ffffff"),
            ("deep", "of 16 bits"),
            ("CMYK", "CMYK"),
            ("first", "the first of each"),
        ):
            line = next(line for line in said.splitlines() if words in line)
            assert re.match(rf"{counted(note, pictures)}\b", line), (note, line)
        assert "1 skipped, broken" in said
    assert "verified: what runs is what was trained" in printed["verify"]


def fitted(pixels):
    """Returns the middle of a picture, resized by Pillow: what --crop --resize says."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    lanczos, picture = Image.Resampling.LANCZOS, Image.fromarray(pixels)
    across = picture.resize((SIDE, height), lanczos, box=(left, 0, left + side, height))
    resized = across.resize((SIDE, SIDE), lanczos, box=(0, top, SIDE, top + side))
    return np.asarray(resized).transpose(2, 0, 1)


@pytest.fixture(scope="module")
def prepared(walked):
    """Returns pixels (N, 3, H, W) uint8 from the reference reader and Pillow, and their names."""
    _, _, pictures = walked
    names = sorted(pictures)
    return np.stack([fitted(pictures[name].pixels) for name in names]), names


def test_pixels_are_those_of_a_reference_reader(walked, prepared):
    place, _, _ = walked
    images, names = prepared
    with Codec.load(place / "model-onnx", "cpu") as codec:
        found = codec.prepare([place / "pictures" / name for name in names])
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, images)


def test_tokens_are_equal_on_every_way(walked, prepared):
    """Compares the command, the Codec with paths and with pixels, the trainer's module, the oracle.

    The oracle's gap says where rounding may decide.
    """
    place, _, _ = walked
    images, names = prepared
    with np.load(place / "tokens.npz") as file:
        by_name = dict(zip(file["names"].tolist(), file["indices"], strict=True))
    assert sorted(by_name) == names
    tokens = np.stack([by_name[name] for name in names])
    with Codec.load(place / "model-onnx", "cpu") as codec:
        for given in ([place / "pictures" / name for name in names], images):
            np.testing.assert_array_equal(codec.encode(given), tokens)
    model = read_model(place / "model.pt")
    levels = images.astype(np.float32) / np.float32(255)
    exact = vqref.quantize(vqref.encode(model.spec, model.params, levels), model.params[CODEBOOK])
    clear = exact.gap > 1e-5
    assert clear.mean() > 0.99
    with torch.no_grad():
        trained = VQVAE(model.spec, model.params)(torch.from_numpy(levels)).indices.numpy()
    for found in (exact.indices, trained):
        np.testing.assert_array_equal(tokens[clear], found[clear])


def test_the_model_remembers_how_its_pictures_were_made(walked):
    place, _, _ = walked
    expected = {"size": [SIDE, SIDE], "crop": True, "channels": 3, "background": "#ffffff"}
    assert read_model(place / "model.pt").preprocessing.to_dict() == expected


def test_a_picture_comes_back_for_every_picture(walked):
    place, _, pictures = walked
    assert len(list((place / "decoded").glob("*.png"))) == len(pictures)
    with Image.open(next(iter((place / "decoded").glob("*.png")))) as picture:
        assert picture.size == (SIDE, SIDE)
    with Image.open(place / "reconstructions.png") as sheet:
        assert sheet.mode == "RGB"
    drawn = place / "runs" / "pictures-default" / "pictures"
    assert (drawn / "epoch-001-reconstructions.png").exists()


def test_the_ten_lines_of_python_run_as_they_stand(tmp_path, many_images, bundle):
    lines, codec = PYTHON[:2]
    counted = [line for line in lines.splitlines() if line]
    assert len(counted) - 5 <= 10  # not counting the imports
    np.save(tmp_path / "images.npy", many_images[:160])
    shutil.copytree(bundle, tmp_path / "model-onnx")
    Image.fromarray(many_images[0]).save(tmp_path / "photo.jpg")
    small = lines.replace("epochs=2", "epochs=1, base_depth=4, num_codes=8, code_size=4")
    code = small + "\nprint(indices.shape)\n" + codec
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "(16, 1)" in done.stdout
