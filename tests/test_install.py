"""What is installed, and the messages if something is not: extras, versions, command names."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from support import ROOT

from vqref.host.extras import EXTRAS, missing

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PROGRAMS = ("vqref", "vqtrain", "vqdeploy")

ABSENT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""
"""A sitecustomize that makes some libraries look as if they were not installed."""

IMPORTED_AS = {"PIL": "pillow", "yaml": "pyyaml"}
"""Libraries that are imported under another name than they are installed."""


def installed_by(extra):
    """Returns the names under which an extra's libraries are imported."""
    names = [
        re.match(r"[\w-]+", line)[0].replace("-", "_")
        for line in PROJECT["optional-dependencies"][extra]
    ]
    return {next((k for k, v in IMPORTED_AS.items() if v == name), name) for name in names}


def test_each_library_is_looked_for_in_the_extra_that_brings_it():
    for library, extra in EXTRAS.items():
        assert library in installed_by(extra), library


def test_an_application_needs_numpy_and_onnxruntime_alone():
    names = {re.match(r"[\w-]+", line)[0] for line in PROJECT["dependencies"]}
    assert names == {"numpy", "onnxruntime", "onnxruntime-gpu"}


def test_a_library_of_no_extra_is_no_users_matter():
    assert (
        missing(ModuleNotFoundError("No module named 'vqref.nothing'", name="vqref.nothing"))
        is None
    )
    assert missing(ModuleNotFoundError("no name")) is None


@pytest.fixture
def without(tmp_path):
    """Returns the environment of a process in which some libraries are not installed."""

    def environment(*names):
        folder = tmp_path / "site"
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(ABSENT.format(names=set(names)))
        return {"PYTHONPATH": str(folder)}

    return environment


@pytest.mark.parametrize(
    ("library", "extra", "command"),
    [
        ("torch", "train", ["vqtrain", "--data", "images.npy"]),
        ("torch", "train", ["vqtrain", "evaluate", "model.pt"]),
        ("torch", "train", ["vqdeploy", "export", "MODEL"]),
        ("onnx", "train", ["vqdeploy", "export", "MODEL"]),
        ("pooch", "train", ["vqtrain", "--epochs", "1"]),
        ("filelock", "train", ["vqtrain", "--data", "images.npy", "--epochs", "1"]),
        ("PIL", "pictures", ["vqdeploy", "encode", "BUNDLE", "pictures"]),
        ("PIL", "pictures", ["vqdeploy", "sample", "BUNDLE"]),
        ("PIL", "pictures", ["vqdeploy", "reconstruct", "BUNDLE", "images.npy"]),
        ("pyarrow", "parquet",
         ["vqdeploy", "encode", "BUNDLE", "images.npy", "--output", "t.parquet"]),
        ("safetensors", "safetensors", ["vqdeploy", "export", "--from-params", "p.safetensors"]),
        ("tensorboard", "tensorboard", ["vqtrain", "--data", "images.npy", "--tensorboard"]),
    ],
)  # fmt: skip
def test_a_command_says_in_one_line_which_install_brings_what_it_lacks(
    library, extra, command, refused, without, tmp_path, model_file, bundle, real_images
):
    from PIL import Image

    np.save(tmp_path / "images.npy", np.repeat(real_images, 3, axis=0))
    (tmp_path / "pictures").mkdir()
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "p.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    named = {"MODEL": model_file, "BUNDLE": bundle}
    words = [named.get(word, word) for word in command]
    line = refused(5, "-m", *words, **without(library))
    assert f"{library} is not installed: pip install 'portable-vqvae[{extra}]'" in line
    assert line.startswith(f"{command[0]}: ")


def test_bundles_run_and_verify_where_no_extra_is_installed(
    run, without, tmp_path, bundle, real_images
):
    np.save(tmp_path / "images.npy", real_images)
    environment = without(*EXTRAS)
    for command in (
        ["vqdeploy", "encode", bundle, "images.npy"],
        ["vqdeploy", "decode", bundle, "tokens.npz"],
        ["vqdeploy", "verify", bundle, "--data", "images.npy", "--samples", "100"],
        ["vqdeploy", "inspect", bundle],
        ["vqdeploy", "bench", bundle, "--batch", "1", "--seconds", "0"],
        ["vqdeploy", "doctor"],
        ["vqref", "vectors", "vectors"],
    ):
        done = run("-m", *command, **environment)
        assert done.returncode == 0, (command, done.stderr)
        assert done.stderr == ""


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_says_its_version(program, run):
    done = run("-m", program, "--version")
    assert done.returncode == 0
    assert done.stdout == f"{program} of portable-vqvae {version('portable-vqvae')}\n"


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_is_a_command_as_well(program):
    command = Path(sys.executable).with_name(program)
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
    assert done.stdout.startswith(f"{program} of portable-vqvae"), done.stderr
