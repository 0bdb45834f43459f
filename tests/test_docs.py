"""README.md, the quickstart and the tutorials, as their readers follow them: every block is run as
it stands, on small data and with small networks. And the pages of the API: they leave out nothing
that a package exports."""

import importlib
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from support import GOLDEN, ROOT

from vqdeploy import site

SMALL = "--epochs 1 --threads 1 --check-images 4 --precision float32 --code-size 4"
GREY = f"{SMALL} --base-depth 4 --num-codes 4"
COLOUR = f"{SMALL} --hidden 8 --blocks 1 --block-hidden 4 --num-codes 16"
PRIOR = "--epochs 1 --width 16 --depth 1 --heads 2 --threads 1"
"""What makes training a matter of seconds: the last word on a command line wins."""

FIRST = {"vqtrain": f"{GREY} --data images.npy"}

WALKS = {
    "README.md": ("readme", FIRST, {}),
    "docs/quickstart.md": ("quickstart", FIRST, {}),
    "docs/how-agreement-works.md": ("quickstart", {}, {}),
    "docs/tutorials/characters.md": (
        "characters",
        {"vqtrain": GREY},
        {"glyphs(7000)": "glyphs(200)"},
    ),
    "docs/tutorials/colour.md": ("colour", {"vqtrain": COLOUR, "vqtrain prior": PRIOR}, {}),
    "docs/tutorials/archive.md": ("colour", {}, {}),
    "docs/tutorials/serve.md": ("colour", {"vqdeploy page": "--runtime runtime"}, {}),
    "docs/tutorials/vqgan.md": ("vqgan", {"vqdeploy import": "--image-size 8"}, {}),
    "docs/tutorials/quantizer.md": ("quantizer", {}, {}),
}
"""Documents in the order in which they are followed: the folder, words, and text that is replaced.
Some begin with what an earlier one made."""


def follow(walks, folder):
    """Runs walks, and returns the process."""
    command = [sys.executable, ROOT / "tests" / "walk.py", json.dumps(walks)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def furnish(place, images):
    """What the readers have before they begin."""
    for folder, _, _ in WALKS.values():
        (place / folder).mkdir(exist_ok=True)
    for folder in ("readme", "quickstart"):
        np.save(place / folder / "images.npy", images[:200])
    shutil.copytree(GOLDEN / "vqgan" / "diffusers_small", place / "vqgan" / "vqgan")
    pictures, runtime = place / "colour" / "pictures", place / "colour" / "runtime"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    for number in range(60):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        coarse.resize((40, 34)).save(pictures / f"{number:02}.png")
    (pictures / "broken.jpg").write_bytes(b"no picture")
    runtime.mkdir()
    for name in site.RUNTIME.values():
        (runtime / name).write_bytes(b"stands for onnxruntime-web")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where the documents are followed: a folder of folders."""
    return tmp_path_factory.mktemp("documents")


@pytest.fixture(scope="module")
def said(place, many_images):
    """What each document's blocks printed."""
    furnish(place, many_images)
    walks = [
        {"document": str(ROOT / name), "folder": str(place / folder), "words": words, "text": text}
        for name, (folder, words, text) in WALKS.items()
    ]
    done = follow(walks, place)
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr)
    served = '"POST / HTTP/1.1" 200'
    assert [line for line in done.stderr.splitlines() if served not in line] == []
    parts = re.split(r"^=== .*/([\w-]+)\.md\n", done.stdout, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_the_lines_of_readme_run_as_they_stand(said):
    assert "wrote model-onnx" in said["README"]
    assert re.search(r"tokens \[[\d\s]+\], mean difference 0\.\d{4}\n", said["README"])


def test_readme_is_short_and_keeps_the_commands_of_the_gate():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 120
    assert "pip install -e '.[test]' && python -m pytest -n 2" in text
    (use,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len([line for line in use.splitlines() if line]) == 6


def test_the_quickstart_ends_with_a_verified_bundle(said, place):
    assert "verified: what runs is what was trained" in said["quickstart"]
    assert (place / "quickstart" / "samples.png").exists()


def test_sums_depend_on_their_order_as_it_is_told(said):
    assert said["how-agreement-works"] == "1.0 0.0\n"


def test_grey_characters(said, place):
    for figure in ("bound", "clustering_floor", "codes_used", "perplexity"):
        assert re.search(rf"^ *{figure} ", said["characters"], re.MULTILINE), figure
    assert (place / "characters" / "runs" / "one" / "pictures").is_dir()
    assert (place / "characters" / "reconstructions.png").exists()


def test_colour_images(said, place):
    folder = place / "colour"
    for words in ("60 pictures resized to 32x32", "1 skipped, broken", "patches_nmse"):
        assert words in said["colour"]
    for name in ("samples.png", "reconstructions.png"):
        with Image.open(folder / name) as sheet:
            assert sheet.mode == "RGB"
    assert list((folder / "runs" / "pictures-default" / "pictures").glob("*-reconstructions.png"))


def test_an_archive(said, place):
    assert "60 (60, 64) uint8" in said["archive"]
    assert len(list((place / "colour" / "tokens").glob("*.parquet"))) == 2
    assert len(np.load(place / "colour" / "decoded.npz")["reconstructions"]) == 60


def test_serving(said, place):
    assert "64 tokens" in said["serve"]
    assert (place / "colour" / "page" / "index.html").exists()
    assert (place / "colour" / "models" / "tokenizer" / "config.pbtxt").exists()


def test_a_vqgan(said):
    assert "sha256" in said["vqgan"]
    assert "(3, 8, 8) (4, 4) 64" in said["vqgan"]


def test_a_quantizer_of_ones_own(said):
    assert "exact_ties" in said["quantizer"].splitlines()[-2]


ENTRY = re.compile(r"^::: ([\w.]+)(?:\n    options:\n      members: (.*))?$", re.MULTILINE)
"""What a page of the API documents: an object or a module, and which of a module's members."""


def documented():
    """Every object of the pages of the API, by identity."""
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        for path, members in ENTRY.findall(page.read_text()):
            try:
                module = importlib.import_module(path)
            except ModuleNotFoundError:
                parent, _, name = path.rpartition(".")
                yield getattr(importlib.import_module(parent), name)
                continue
            names = re.findall(r"\w+", members) if members != "false" else []
            public = [name for name in vars(module) if not name.startswith("_")]
            yield from (getattr(module, name) for name in (names if members else public))


@pytest.mark.parametrize(
    "package", ["vqref", "vqref.agreement", "vqref.checks", "vqtrain", "vqdeploy"]
)
def test_the_api_has_all_that_a_package_exports(package):
    module, found = importlib.import_module(package), [id(each) for each in documented()]
    assert [name for name in module.__all__ if id(getattr(module, name)) not in found] == []


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ("```bash\npython -m vqdeploy inspect nothing\n```", "exit code 3"),
        ("```python\nassert not 1\n```", "assert not 1"),
        ("```bash\nrm -r /\n```", "neither ours nor known"),
        ("", "in no block"),
    ],
)
def test_what_fails_in_a_document_is_found(tmp_path, block, reason):
    (tmp_path / "a.md").write_text(f"{block}\n")
    walk = {"document": "a.md", "folder": ".", "words": {} if block else {"vqtrain": "--epochs 1"}}
    done = follow([walk], tmp_path)
    assert done.returncode == 1
    assert reason in done.stderr
