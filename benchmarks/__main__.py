"""``python -m benchmarks``: runs every benchmark, stores its figures in ``benchmarks/results/`` and writes the tables of
``benchmarks/README.md`` from them. Takes about an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import ROOT

RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "benchmarks" / "README.md"
BLOCK = re.compile(r"(<!-- results: (\w+) -->\n)```\n.*?```\n", re.DOTALL)
"""A table in README: the comment that names its benchmark, and what that printed."""


def commands(arguments: argparse.Namespace, bundles: list[Path]) -> dict[str, list[str]]:
    """What each benchmark is given. {name: arguments}."""
    model, data = str(arguments.model), [] if arguments.data is None else ["--data", str(arguments.data)]
    tensorflow = [] if arguments.tensorflow is None else ["--tensorflow", arguments.tensorflow]
    found = {
        "training": tensorflow,
        "inference": [model],
        "codec": [str(bundle) for bundle in bundles],
        "nearest": ["--plot", str(RESULTS / "nearest.png")],
        "epochs": ["--images", "6400", "--epochs", "2"] if arguments.short else [],
        "oracle": [],
        "glyphs": [],
        "tolerances": [],
        "agreement": ["--model", model, *(["--latents", "500000", "--drawn", "500000"] if arguments.short else [])],
        "kills": ["--kills", "20"] if arguments.short else ["--epochs", "320"],
    }
    return found | ({"quality": data} if data else {})


def tables(text: str) -> str:
    """README with each table as its benchmark's last stored run printed it; one that was never stored stays."""

    def block(found: re.Match[str]) -> str:
        path = RESULTS / f"{found[2]}.json"
        if not path.exists():
            return found[0]
        content = json.loads(path.read_text())
        return found[1] + "```\n" + "\n".join([f"$ {content['command']}", *content["printed"]]) + "\n```\n"

    return BLOCK.sub(block, text)


def prepare(arguments: argparse.Namespace, folder: Path) -> list[Path]:
    """A model, trained for two epochs where none was given, and its bundles in three precisions."""
    vqdeploy = [sys.executable, "-m", "vqdeploy", "export"]
    if arguments.model is None:
        arguments.model = folder / "model.pt"
        data = "glyphs" if arguments.data is None else str(arguments.data)
        options = ["--data", data, "--epochs", "2", "--runs", str(folder), "--output", str(arguments.model)]
        subprocess.run([sys.executable, "-m", "vqtrain", *options], check=True, cwd=ROOT)
    bundles = [folder / precision for precision in ("fp32", "fp16", "int8")]
    for bundle in bundles:
        command = [*vqdeploy, str(arguments.model), "--output", str(bundle), "--precision", bundle.name]
        if arguments.data is not None:
            command += ["--data", str(arguments.data)]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return bundles


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these alone")
    parser.add_argument("--model", type=Path, help="a model.pt; without one, a model is trained for two epochs")
    parser.add_argument("--data", type=Path, help="images to train on, for the time to a bound; skipped without")
    parser.add_argument("--tensorflow", metavar="PYTHON", help="an interpreter of an environment with TensorFlow")
    parser.add_argument("--short", action="store_true", help="fewer kills, latents and images")
    parser.add_argument("--tables", action="store_true", help="runs nothing: writes README's tables from what is stored")
    arguments = parser.parse_args()
    failed = []
    if not arguments.tables:
        with tempfile.TemporaryDirectory() as folder:
            wanted = commands(arguments, prepare(arguments, Path(folder)))
            if unknown := set(arguments.only or wanted) - set(wanted):
                parser.error(f"--only: {', '.join(sorted(unknown))}: not one of {', '.join(wanted)}")
            for name in arguments.only or wanted:
                start = time.perf_counter()
                print(f"== {name}", flush=True)
                command = [sys.executable, "-m", f"benchmarks.{name}", *wanted[name], "--json", str(RESULTS / f"{name}.json")]
                if subprocess.run(command, check=False, cwd=ROOT).returncode:
                    failed.append(name)
                print(f"== {name}: {time.perf_counter() - start:.0f} s\n", flush=True)
    README.write_text(tables(README.read_text()))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
