"""The arrows between the packages, and what an import costs: held by reading every import statement."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

STDLIB = set(sys.stdlib_module_names)
CONVENIENCES = {"tqdm", "pooch", "requests", "filelock", "tomli_w", "PIL", "matplotlib"}
ALLOWED = {
    "vqref": {"numpy"},
    "vqtrain": {"vqref", "numpy", "torch", "scipy", *CONVENIENCES},
    "vqdeploy": {"vqref", "numpy", "onnx", "onnxruntime"},
}


EXCEPTIONS = {
    "vqdeploy/export.py": {"torch", "safetensors"},  # reads what is exported
    "vqdeploy/bench.py": {"torch", "vqtrain"},  # the peer beside which it measures, where that is installed
    "vqdeploy/tokens.py": {"pyarrow"},  # writes parquet
    "vqref/pictures.py": {"PIL"},  # what no computation needs
}
"""Imported where they are used, and nowhere else."""


def imported(path) -> set[str]:
    """Top-level packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_the_architecture_allows(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        extra = EXCEPTIONS.get(f"{package}/{path.name}", set())
        foreign = imported(path) - STDLIB - {package} - ALLOWED[package] - extra
        assert not foreign, f"{path.relative_to(ROOT)} imports {', '.join(sorted(foreign))}"


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import vqref, vqref.parity, vqref.agreement", ["torch", "onnx", "onnxruntime", "scipy"]),
        ("from vqdeploy import Codec", ["torch", "onnx", "scipy", "vqtrain"]),
        ("from vqdeploy.__main__ import build_parser; build_parser()", ["torch", "onnx", "onnxruntime", "scipy"]),
        ("from vqtrain.__main__ import build_parser; build_parser()", ["torch", "onnx", "onnxruntime", "scipy"]),
    ],
)
def test_an_import_brings_no_heavy_package_with_it(statement, absent):
    code = f"{statement}\nimport sys\nprint(*(m for m in {absent!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""


def test_names_exported_by_each_package_exist():
    import vqdeploy
    import vqref
    import vqtrain

    for package in (vqref, vqtrain, vqdeploy):
        for name in package.__all__:
            assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vqtrain.nothing
