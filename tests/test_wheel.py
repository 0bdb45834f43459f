"""What is published: the wheel holds all modules of the three packages and needs no source.

The sdist builds the same wheel.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
from support import ROOT

PACKAGES = ("vqref", "vqtrain", "vqdeploy")
SOURCES = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff")

IMPORTED = """
import importlib, pathlib, sys
folder = pathlib.Path(sys.argv[1])
sys.path.insert(0, str(folder))
for name in sys.argv[2:]:
    module = importlib.import_module(name)
    assert folder in pathlib.Path(module.__file__).parents, f"{name} is {module.__file__}"
print(len(sys.argv) - 2)
"""

BUILD = (
    "import sys\nfrom setuptools import build_meta\ngetattr(build_meta, sys.argv[1])(sys.argv[2])"
)
"""Calls ``build_sdist`` or ``build_wheel`` in the folder of a source, as an installer does."""


def setuptools_is_new_enough():
    if importlib.util.find_spec("setuptools") is None:
        return False
    import setuptools

    return int(setuptools.__version__.split(".")[0]) >= 77


def build(what, source, out):
    """Builds a wheel or an sdist of the source in the folder ``out``."""
    command = [sys.executable, "-c", BUILD, f"build_{what}", str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the source, so that nothing is written into the working tree."""
    if not setuptools_is_new_enough():
        pytest.skip("needs setuptools 77 or later, of the extra test")
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        shutil.copy(ROOT / name, source / name)
    for package in PACKAGES:
        unwanted = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, source / package, ignore=unwanted)
    (source / "tests").mkdir()
    shutil.copy(__file__, source / "tests" / "test_wheel.py")
    return source


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory):
    return build("sdist", source, tmp_path_factory.mktemp("sdist"))


def modules():
    """Returns the dotted names of all modules of the packages."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_the_wheel_holds_the_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as content:
        names = {name for name in content.namelist() if ".dist-info/" not in name}
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == expected
    assert {f"{package}/py.typed" for package in PACKAGES} <= names


def test_every_module_can_be_imported_from_the_wheel_alone(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as content:
        content.extractall(tmp_path / "unpacked")
    names = list(modules())
    command = [sys.executable, "-P", "-c", IMPORTED, str(tmp_path / "unpacked"), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(names)


def test_the_sdist_holds_sources_licence_and_changes_and_builds_the_same_wheel(
    sdist, wheel, tmp_path
):
    with tarfile.open(sdist) as content:
        content.extractall(tmp_path / "unpacked", filter="data")
    (folder,) = (tmp_path / "unpacked").iterdir()
    made = {"PKG-INFO", "setup.cfg", "portable_vqvae.egg-info"}
    assert {path.name for path in folder.iterdir()} == {*SOURCES, *PACKAGES, *made}
    (tmp_path / "wheel").mkdir()
    again = build("wheel", folder, tmp_path / "wheel")
    assert again.name == wheel.name
    with zipfile.ZipFile(wheel) as ours, zipfile.ZipFile(again) as theirs:
        assert sorted(ours.namelist()) == sorted(theirs.namelist())
        assert [name for name in ours.namelist() if ours.read(name) != theirs.read(name)] == []


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder of programs of an environment with the wheel and this environment's libraries."""
    place = tmp_path_factory.mktemp("installed")
    venv.create(place, symlinks=True)
    python = place / "bin" / "python"
    alone = ["--no-deps", "--no-index", "--quiet", "--no-compile"]
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", *alone, str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (site,) = place.glob("lib/python*/site-packages")
    # a path in a .pth comes after the environment's own; .pth files in that path are not read
    (site / "libraries.pth").write_text(str(Path(np.__file__).parent.parent))
    return python.parent


def test_the_installed_wheel_works_without_the_source(installed, bundle, real_images, tmp_path):
    np.save(tmp_path / "images.npy", real_images)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(program, *words):
        command = [installed / program, *words]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout

    code = (
        f"import {', '.join(PACKAGES)}\nprint(vqref.__file__, vqtrain.__file__, vqdeploy.__file__)"
    )
    places = run("python", "-c", code).split()
    assert all(installed.parent in Path(place).parents for place in places)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for program in PACKAGES:
        assert run(program, "--version") == f"{program} of portable-vqvae {version}\n"
    assert f"portable-vqvae {version}" in " ".join(run("vqdeploy", "doctor").split())
    run("vqdeploy", "encode", bundle, "images.npy")
    with np.load(tmp_path / "tokens.npz") as tokens:
        assert tokens["indices"].shape == (16, 4)
