"""The three import rules, checked in every import statement, and what an import costs.

1. vqtrain and vqdeploy import vqref, never each other.
2. Equations and judge import only numpy, the standard library and each other.
3. A heavy library has one home, and only a package's ``__main__`` imports its commands.
"""

import ast
import subprocess
import sys
from pathlib import PurePosixPath

import pytest
from support import ROOT

PACKAGES = ("vqref", "vqtrain", "vqdeploy")
STDLIB = set(sys.stdlib_module_names)

FOREIGN = {"vqref": ("vqtrain", "vqdeploy"), "vqtrain": ("vqdeploy",), "vqdeploy": ("vqtrain",)}
"""What each package must not import. vqref imports neither of the packages that import it."""

EQUATIONS = ("vqref/*.py", "vqref/agreement/*.py", "vqref/checks/*.py")
NOT_EQUATIONS = {"vqref/__main__.py", "vqref/modelfile.py"}
"""Modules for a command line, and for a file format."""

OUTSIDE_EQUATIONS = ("vqref.host", "argparse", "sys", "subprocess")
"""What equations must not import: command lines, users' files and processes."""

HOMES = {
    "numpy": PACKAGES,
    "torch": ("vqtrain", "vqdeploy/sources.py"),
    "onnx": ("vqdeploy/graphs",),
    "onnxruntime": ("vqdeploy/runtime",),
    "scipy": ("vqtrain",),
    "bokeh": ("vqtrain/run",),
    "tqdm": ("vqtrain/run",),
    "filelock": ("vqtrain/run",),
    "tomli_w": ("vqtrain/run",),
    "pooch": ("vqtrain/data",),
    "requests": ("vqtrain/data",),
    "PIL": ("vqref/host",),
    "safetensors": ("vqdeploy/sources.py",),
    "yaml": ("vqdeploy/importers/configuration.py",),
    "pyarrow": ("vqref/host/arrow.py",),
    "ray": ("vqdeploy/cluster.py",),
    "cryptography": ("vqdeploy/proof/signature.py",),
}
"""Where each library may be imported. A library that is not named here may not be imported."""

EXCEPTIONS = {
    ("vqdeploy/commands/bench.py", "vqtrain"): "the peer beside which it measures, if installed",
    ("vqdeploy/commands/bench.py", "torch"): "the same",
    ("vqdeploy/graphs/int8.py", "onnxruntime"): "its quantization writes graphs, runs nothing",
}


def imported(source):
    """Returns the dotted names that a source imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def within(name, package):
    return name == package or name.startswith(f"{package}.")


def violations(path, source):
    """Returns what is wrong with the imports of the file at ``path``, relative to the root."""
    found, place = [], PurePosixPath(path)
    package = place.parts[0]
    for name in sorted(imported(source)):
        top = name.split(".")[0]
        if not top:
            found.append(f"{path} imports {name}: relative")
        elif (path, top) in EXCEPTIONS:
            continue
        elif any(within(name, other) for other in FOREIGN[package]):
            found.append(f"{path} imports {name}: the arrows point at vqref")
        elif top not in {*STDLIB, *PACKAGES} and not at_home(path, top):
            found.append(f"{path} imports {name}: its home is elsewhere")
        elif is_equation(path) and any(within(name, other) for other in OUTSIDE_EQUATIONS):
            found.append(f"{path} imports {name}: an equation needs none")
        elif imports_command(place, name):
            found.append(f"{path} imports {name}: a command is for its __main__")
    return found


def at_home(path, library):
    homes = HOMES.get(library, ())
    return any(path == home or path.startswith(f"{home}/") for home in homes)


def is_equation(path):
    place = PurePosixPath(path)
    fits = any(place.match(pattern) and len(place.parts) == pattern.count("/") + 1
               for pattern in EQUATIONS)  # fmt: skip
    return fits and path not in NOT_EQUATIONS


def imports_command(place, name):
    """Returns whether the file imports a command and is neither a ``__main__`` nor a command."""
    package = place.parts[0]
    private = place.parts[1:] == ("__main__.py",) or place.parts[1] == "commands"
    others = [other for other in PACKAGES if other != package or not private]
    return any(within(name, f"{other}.commands") for other in others)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_the_architecture_allows(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    found = []
    for path in files:
        found += violations(path.relative_to(ROOT).as_posix(), path.read_text())
    assert not found, "\n".join(found)


def test_no_exception_outlives_its_reason():
    for path, library in EXCEPTIONS:
        names = imported((ROOT / path).read_text())
        assert any(within(name, library) for name in names), f"{path} no longer imports {library}"


MADE_UP = [
    ("vqref/network.py", "import torch", "its home is elsewhere"),
    ("vqref/losses.py", "from vqtrain.losses import Losses", "the arrows point at vqref"),
    ("vqref/agreement/parity.py", "from vqref.host import files", "an equation needs none"),
    ("vqref/agreement/new.py", "from vqref.host.files import write_file", "an equation needs no"),
    ("vqref/checks/checks.py", "import argparse", "an equation needs none"),
    ("vqref/host/images.py", "import scipy.ndimage", "its home is elsewhere"),
    ("vqtrain/model.py", "import vqdeploy.codec", "the arrows point at vqref"),
    ("vqtrain/model.py", "import onnx", "its home is elsewhere"),
    ("vqtrain/run/trainer.py", "from vqtrain.commands.train import train", "for its __main__"),
    ("vqtrain/run/trainer.py", "from vqtrain import commands", "a command is for its __main__"),
    ("vqtrain/commands/train.py", "import vqdeploy", "the arrows point at vqref"),
    ("vqdeploy/codec.py", "def f():\n    import torch", "its home is elsewhere"),
    ("vqdeploy/codec.py", "import onnxruntime as ort", "its home is elsewhere"),
    ("vqdeploy/runtime/sessions.py", "from onnx import helper", "its home is elsewhere"),
    ("vqdeploy/graphs/build.py", "import onnxruntime", "its home is elsewhere"),
    ("vqdeploy/sources.py", "from vqtrain.model import VQVAE", "the arrows point at vqref"),
    ("vqdeploy/verify.py", "import vqdeploy.commands.verify", "a command is for its __main__"),
    ("vqdeploy/verify.py", "import pandas", "its home is elsewhere"),
    ("vqdeploy/verify.py", "from . import bundle", "relative"),
]


@pytest.mark.parametrize(("path", "source", "reason"), MADE_UP)
def test_an_import_against_the_rules_is_found(path, source, reason):
    (found,) = {violation.split(": ")[1] for violation in violations(path, source)}
    assert reason in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("vqref/__main__.py", "from vqref.host.commandline import run"),
        ("vqref/host/pictures.py", "from PIL import Image"),
        ("vqref/agreement/stages.py", "import numpy as np\nfrom vqref.errors import ParityError"),
        ("vqtrain/__main__.py", "from vqtrain.commands.train import train"),
        ("vqtrain/commands/evaluate.py", "from vqtrain.commands.train import choose"),
        ("vqdeploy/sources.py", "import torch"),
        ("vqdeploy/graphs/network.py", "from onnx import helper\nfrom vqref.spec import Layer"),
        ("vqdeploy/runtime/sessions.py", "import onnxruntime as ort"),
    ],
)
def test_an_import_within_the_rules_is_let_be(path, source):
    assert violations(path, source) == []


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        (
            "import vqref, vqref.agreement.parity, vqref.agreement, vqref.checks",
            ["torch", "onnx", "onnxruntime", "scipy", "argparse", "vqref.host"],
        ),
        ("from vqdeploy import Codec", ["torch", "onnx", "scipy", "vqtrain"]),
        (
            "import vqref.__main__, vqtrain.__main__, vqdeploy.__main__",
            ["numpy", "argparse", "typing", "logging"],
        ),
        (
            "from vqtrain.__main__ import build_parser; build_parser()",
            ["torch", "onnx", "onnxruntime", "scipy"],
        ),
    ],
)
def test_an_import_brings_no_heavy_package_with_it(statement, absent):
    code = f"{statement}\nimport sys\nprint(*(m for m in {absent!r} if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == ""


def test_names_exported_by_each_package_exist():
    import vqdeploy
    import vqref
    import vqtrain

    for package in (vqref, vqtrain, vqdeploy):
        for name in package.__all__:
            assert getattr(package, name) is not None
        assert set(dir(package)) >= {*package.__all__, "__doc__"}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vqtrain.nothing


def test_modules_of_a_package_need_no_import_of_their_own():
    code = "import vqref, vqdeploy; vqref.agreement.check, vqref.spec.Layer, vqdeploy.bundle.Bundle"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_no_test_imports_a_test():
    for path in sorted((ROOT / "tests").rglob("*.py")):
        tops = {name.split(".")[0] for name in imported(path.read_text())}
        assert not {top for top in tops if top.startswith("test_") or top == "conftest"}, path.name
