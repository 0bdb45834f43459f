"""README.md, the quickstart, the tutorials and the pages of the API.

Follows documents as their readers do: runs every block as it stands, on small data and with small
networks. The pages of the API must leave out nothing that a package exports.
"""

import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from support import GOLDEN, ROOT

from vqdeploy import site

SMALL = "--epochs 1 --threads 1 --check-images 4 --precision float32 --code-size 4"
GREY = f"{SMALL} --base-depth 4 --num-codes 4"
COLOUR = f"{SMALL} --hidden 8 --blocks 1 --block-hidden 4 --num-codes 16"
PRIOR = "--epochs 1 --width 16 --depth 1 --heads 2 --threads 1"
"""Options that make training take seconds: the last one on a command line wins."""

FIRST = {"vqtrain": f"{GREY} --data images.npy"}


class Walk(NamedTuple):
    """How a document is followed: its folder, and what makes its commands and its Python small.

    check: takes what the blocks printed, and the folder.
    """

    folder: str
    check: Callable[[str, Path], None]
    words: Mapping[str, str] = {}
    text: Mapping[str, str] = {}


def readme(said, folder):
    assert "wrote model-onnx" in said
    assert re.search(r"tokens \[[\d\s]+\], mean difference 0\.\d{4}\n", said)


def quickstart(said, folder):
    assert "verified: what runs is what was trained" in said
    assert (folder / "samples.png").exists()


def how_agreement_works(said, folder):
    assert said == "1.0 0.0\n"


def characters(said, folder):
    for figure in ("bound", "clustering_floor", "codes_used", "perplexity"):
        assert re.search(rf"^ *{figure} ", said, re.MULTILINE), figure
    assert (folder / "runs" / "one" / "pictures").is_dir()
    assert (folder / "reconstructions.png").exists()


def quantizer(said, folder):
    assert "exact_ties" in said.splitlines()[-2]


def colour(said, folder):
    for words in ("60 pictures resized to 32x32", "1 skipped, broken", "patches_nmse"):
        assert words in said
    for name in ("samples.png", "reconstructions.png"):
        with Image.open(folder / name) as sheet:
            assert sheet.mode == "RGB"
    assert list((folder / "runs" / "pictures-default" / "pictures").glob("*-reconstructions.png"))


def archive(said, folder):
    assert "60 (60, 64) uint8" in said
    assert len(list((folder / "tokens").glob("*.parquet"))) == 2
    assert len(np.load(folder / "decoded.npz")["reconstructions"]) == 60


def serve(said, folder):
    assert "64 tokens" in said
    assert (folder / "page" / "index.html").exists()
    assert (folder / "models" / "tokenizer" / "config.pbtxt").exists()


def vqgan(said, folder):
    assert "sha256" in said
    assert "(3, 8, 8) (4, 4) 64" in said


GROUPS = {
    "grey": {
        "README.md": Walk("readme", readme, FIRST),
        "docs/quickstart.md": Walk("quickstart", quickstart, FIRST),
        "docs/how-agreement-works.md": Walk("how", how_agreement_works),
        "docs/tutorials/characters.md": Walk(
            "characters", characters, {"vqtrain": GREY}, {"glyphs(7000)": "glyphs(200)"}
        ),
        "docs/tutorials/quantizer.md": Walk("quantizer", quantizer),
    },
    "colour": {
        "docs/tutorials/colour.md": Walk(
            "colour", colour, {"vqtrain": COLOUR, "vqtrain prior": PRIOR}
        ),
        "docs/tutorials/archive.md": Walk("colour", archive),
        "docs/tutorials/serve.md": Walk("colour", serve, {"vqdeploy page": "--runtime runtime"}),
        "docs/tutorials/vqgan.md": Walk("vqgan", vqgan, {"vqdeploy import": "--image-size 8"}),
    },
}
"""Documents that are followed in one process, in this order: some use what an earlier one made."""


def follow(walks, folder):
    """Runs walks, and returns the process."""
    command = [sys.executable, str(ROOT / "tests" / "walk.py"), json.dumps(walks)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def furnish(place, images):
    """Makes what readers have before they begin."""
    for folder in {walk.folder for walks in GROUPS.values() for walk in walks.values()}:
        (place / folder).mkdir()
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


@pytest.mark.parametrize("group", GROUPS)
def test_documents_run_as_they_stand(group, tmp_path, many_images):
    furnish(tmp_path, many_images)
    done = follow(
        [
            {
                "document": str(ROOT / name),
                "folder": str(tmp_path / walk.folder),
                "words": walk.words,
                "text": walk.text,
            }
            for name, walk in GROUPS[group].items()
        ],
        tmp_path,
    )
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr)
    served = '"POST / HTTP/1.1" 200'
    assert [line for line in done.stderr.splitlines() if served not in line] == []
    parts = re.split(r"^=== .*\n", done.stdout, flags=re.MULTILINE)[1:]
    for walk, said in zip(GROUPS[group].values(), parts, strict=True):
        walk.check(said, tmp_path / walk.folder)


def test_every_tutorial_is_followed():
    followed = {name for walks in GROUPS.values() for name in walks}
    tutorials = {f"docs/tutorials/{path.name}" for path in (ROOT / "docs/tutorials").glob("*.md")}
    assert tutorials < followed


def test_readme_is_short_and_keeps_the_commands_of_the_gate():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 120
    assert "pip install -e '.[test]' && python -m pytest -n 2" in text
    (use,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len([line for line in use.splitlines() if line]) == 6


ENTRY = re.compile(r"^::: ([\w.]+)(?:\n    options:\n      members: (.*))?$", re.MULTILINE)
"""What a page of the API documents: an object, or a module and which of its members."""


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
