"""``python -m benchmarks.install BUNDLE``: measures what an application has to install.

Makes new virtual environments with only numpy and onnxruntime. Measures their size, whether pip
finds them sound, and how long a new process takes to the first token of a bundle. Needs the package
index.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
import venv
from pathlib import Path

import numpy as np

from benchmarks.measure import ROOT, Record, parser, summary

FIRST_TOKEN = """
import sys, time
start = time.perf_counter()
import numpy as np
from vqdeploy import Codec
codec = Codec.load(sys.argv[1], "cpu")
codec.encode(np.zeros(codec.spec.image_shape, np.uint8))
print(time.perf_counter() - start)
"""

WAYS = {
    "pip install .": [["--quiet", str(ROOT)]],
    "pip install numpy onnxruntime && pip install --no-deps .": [
        ["--quiet", "numpy", "onnxruntime"],
        ["--quiet", "--no-deps", str(ROOT)],
    ],
}
"""The ways in which README says to install this project, and what pip gets."""


def main() -> None:
    options = parser(__doc__)
    options.add_argument("bundle", type=Path)
    options.add_argument("--runs", type=int, default=15)
    arguments = options.parse_args()
    record = Record(arguments)
    for way, calls in WAYS.items():
        with tempfile.TemporaryDirectory() as folder:
            python = _installed(Path(folder), calls)
            size = _size(Path(folder)) / 2**20
            check = _output(python, "-m", "pip", "check", check=False)
            whole, inside = _first_token(python, arguments.bundle.resolve(), arguments.runs)
        record.figures[way] = {
            "mib": size,
            "pip check": check,
            "process": summary(whole),
            "from import to token": summary(inside),
        }
        record.say(f"{way}: {size:.0f} MiB, {check}")
        record.say(
            f"  first token after {np.median(whole):.2f} s of a new process "
            f"({min(whole):.2f} to {max(whole):.2f}), {np.median(inside):.2f} s of them from the "
            f"first import, medians of {len(whole)}"
        )
    record.write()


def _installed(folder: Path, calls: list[list[str]]) -> str:
    """Returns the Python of a new virtual environment, after pip has run."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    for call in calls:
        _output(python, "-m", "pip", "install", *call)
    return python


def _first_token(python: str, bundle: Path, runs: int) -> tuple[list[float], list[float]]:
    """Returns the seconds of whole processes, and from their first import to the token.

    The first run in an environment compiles modules and is left out.
    """
    whole, inside = [], []
    for run in range(runs + 1):
        start = time.perf_counter()
        said = _output(python, "-c", FIRST_TOKEN, str(bundle))
        if run:
            whole.append(time.perf_counter() - start)
            inside.append(float(said))
    return whole, inside


def _size(folder: Path) -> int:
    """Returns the bytes of all files below a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def _output(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, check=check, capture_output=True, text=True, cwd="/")
    return done.stdout.strip()


if __name__ == "__main__":
    main()
