"""``python -m benchmarks``: runs every benchmark. Takes a few hours on two cores.

Stores the figures in ``benchmarks/results/`` and writes the tables of ``benchmarks/README.md`` from
them.
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

from benchmarks import grids
from benchmarks.measure import ROOT

RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "benchmarks" / "README.md"
BLOCK = re.compile(r"(<!-- results: ([\w.]+) -->\n)```\n.*?```\n", re.DOTALL)
"""A table in README: the comment that names its benchmark, and what the benchmark printed."""


def commands(arguments: argparse.Namespace, bundles: list[Path]) -> dict[str, list[str]]:
    """Returns {name: arguments} of benchmarks; leaves out those whose images are missing."""
    tensorflow = [] if arguments.tensorflow is None else ["--tensorflow", arguments.tensorflow]
    alone = [str(bundle) for bundle in bundles[:1]]
    found = {
        "training": tensorflow,
        "training_residual": [],
        "inference": [str(arguments.model)],
        "codec": [str(bundle) for bundle in bundles],
        "install": alone,
        "many_codes": [],
        "vqgan": [],
        "ranks": ["--kills", "5"] if arguments.short else [],
        "streams": ["--images", "20000", "--turn", "4096"] if arguments.short else [],
        "archives": [*alone, *(["--images", "5000"] if arguments.short else [])],
        "nearest": ["--plot", str(RESULTS / "nearest.png")],
        "epochs": ["--images", "6400", "--epochs", "2"] if arguments.short else [],
        "oracle": [],
        "large": [],
        "glyphs": [],
        "tolerances": [],
        "agreement": agreement(arguments),
        "kills": ["--kills", "20"] if arguments.short else ["--epochs", "320"],
        **hostile(arguments),
    }
    tokens = ["--tokens", "20000", "--count", "40"] if arguments.short else []
    if arguments.triton is not None:
        found["triton"] = [*alone, arguments.triton]
    if arguments.data is not None:
        found["quality"] = ["--data", str(arguments.data)]
        found["advance"] = [str(arguments.model), str(arguments.data), *tokens]
    if arguments.colour is not None:
        seeds = ["--seeds", "0"] if arguments.short else []
        found["grids"] = ["--data", str(arguments.colour), *seeds]
        found["first_hour"] = [str(arguments.colour)]
        if arguments.grid is not None:
            train, test = grids.files(arguments.colour)
            found["advance_grid"] = [str(arguments.grid), str(test), "--large", *tokens]
            samples = ["--samples", "1000"] if arguments.short else []
            found["prior"] = [str(arguments.grid), str(train), *samples]
    return found


def hostile(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Returns the campaigns, each with the option for its size; with --short, a tenth of it."""
    amounts = {
        "flips": ("--count", 2000),
        "inspection": ("--mutations", 100_000),
        "readers": ("--count", 5000),
        "commandlines": ("--count", 1000),
        "signals": ("--count", 200),
        "replacements": ("--kills", 200),
    }
    few = {
        f"hostile.{name}": [option, str(amount // 10)] if arguments.short else []
        for name, (option, amount) in amounts.items()
    }
    return {**few, "hostile.kit": ["--count", "20"] if arguments.short else []}


def agreement(arguments: argparse.Namespace) -> list[str]:
    """Returns arguments: the models, a grid's with its images if any, and the number of latents."""
    models = [str(model) for model in (arguments.model, arguments.grid) if model is not None]
    data = []
    if arguments.grid is not None and arguments.colour is not None:
        data = ["--data", str(grids.files(arguments.colour)[0])]
    counts = ["--latents", "500000", "--drawn", "500000"] if arguments.short else []
    return ["--model", *models, *data, *counts]


def tables(text: str) -> str:
    """README with each table as its benchmark's last stored run printed it; one that was never
    stored stays."""

    def block(found: re.Match[str]) -> str:
        path = RESULTS / f"{found[2]}.json"
        if not path.exists():
            return found[0]
        content = json.loads(path.read_text())
        lines = [f"$ {content['command']}", *content["printed"]]
        return found[1] + "\n".join(["```", *lines, "```"]) + "\n"

    return BLOCK.sub(block, text)


def prepare(arguments: argparse.Namespace, folder: Path) -> list[Path]:
    """A model, trained for two epochs if none was given, and its bundles in three precisions."""

    def run(*words: object) -> None:
        subprocess.run([sys.executable, "-m", *map(str, words)], check=True, cwd=ROOT)

    data = [] if arguments.data is None else ["--data", arguments.data]
    if arguments.model is None:
        arguments.model = folder / "model.pt"
        where = ["--runs", folder, "--output", arguments.model]
        run("vqtrain", *(data or ["--data", "glyphs"]), "--epochs", 2, *where)
    bundles = [folder / precision for precision in ("fp32", "fp16", "int8")]
    for bundle in bundles:
        how = ["--output", bundle, "--precision", bundle.name]
        run("vqdeploy", "export", arguments.model, *how, *data)
    return bundles


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these alone")
    parser.add_argument(
        "--model", type=Path, help="a model.pt; without one, a model is trained for two epochs"
    )
    parser.add_argument(
        "--grid",
        type=Path,
        help="a model.pt of family residual with a prior, for agreement, advance_grid and prior",
    )
    parser.add_argument(
        "--data", type=Path, help="images to train on, for the time to a bound; skipped without"
    )
    parser.add_argument(
        "--colour", type=Path, help="a folder of colour images for grids; skipped without"
    )
    parser.add_argument(
        "--tensorflow", metavar="PYTHON", help="an interpreter of an environment with TensorFlow"
    )
    parser.add_argument(
        "--triton", metavar="FOLDER", help="that nvidia-pytriton is installed to; skipped without"
    )
    parser.add_argument(
        "--short", action="store_true", help="fewer kills, latents, images and seeds"
    )
    parser.add_argument(
        "--tables",
        action="store_true",
        help="runs nothing: writes README's tables from what is stored",
    )
    arguments = parser.parse_args()
    failed = []
    if not arguments.tables:
        with tempfile.TemporaryDirectory() as folder:
            wanted = commands(arguments, prepare(arguments, Path(folder)))
            if unknown := set(arguments.only or wanted) - set(wanted):
                parser.error(
                    f"--only: {', '.join(sorted(unknown))}: not one of {', '.join(wanted)}"
                )
            for name in arguments.only or wanted:
                start = time.perf_counter()
                print(f"== {name}", flush=True)
                stored = ["--json", str(RESULTS / f"{name}.json")]
                command = [sys.executable, "-m", f"benchmarks.{name}", *wanted[name], *stored]
                if subprocess.run(command, check=False, cwd=ROOT).returncode:
                    failed.append(name)
                print(f"== {name}: {time.perf_counter() - start:.0f} s\n", flush=True)
    README.write_text(tables(README.read_text()))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
