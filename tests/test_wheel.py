"""The wheel: it holds every module of the three packages, and each can be imported from it."""

import importlib.util
import shutil
import subprocess
import sys
import zipfile

import pytest
from support import ROOT

PACKAGES = ("vqref", "vqtrain", "vqdeploy")
SOURCES = ("pyproject.toml", "README.md", "LICENSE")

IMPORTED = """
import importlib, pathlib, sys
folder = pathlib.Path(sys.argv[1])
sys.path.insert(0, str(folder))
for name in sys.argv[2:]:
    module = importlib.import_module(name)
    assert folder in pathlib.Path(module.__file__).parents, f"{name} is {module.__file__}"
print(len(sys.argv) - 2)
"""


def setuptools_is_new_enough():
    if importlib.util.find_spec("setuptools") is None:
        return False
    import setuptools

    return int(setuptools.__version__.split(".")[0]) >= 77


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built of a copy so that nothing is written into the working tree."""
    if not setuptools_is_new_enough():
        pytest.skip("needs setuptools 77 or later, of the extra test")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        shutil.copy(ROOT / name, source / name)
    for package in PACKAGES:
        unwanted = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, source / package, ignore=unwanted)
    alone = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    command = [sys.executable, "-m", "pip", "wheel", *alone, "--wheel-dir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return path


def modules():
    """Dotted names of every module of the packages."""
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
