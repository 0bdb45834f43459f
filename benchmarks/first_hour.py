"""``python -m benchmarks.first_hour FOLDER``: measures a user's first hour.

Counts the minutes from the start of a clone to the first picture of one's own images, and to a
verified bundle, without the installs. Uses the commands of docs/pictures.md with default options.
FOLDER holds pictures of any size, or a file *-train.npz of images; ``--count`` of them are written
anew at 64x64.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measure import ROOT, Record, parser

TRAIN = ("vqtrain", "--data", "pictures", "--output", "model.pt")
THEN = {
    "export": ("vqdeploy", "export", "model.pt"),
    "reconstruct": ("vqdeploy", "reconstruct", "model-onnx", "pictures"),
    "verify": ("vqdeploy", "verify", "model-onnx", "--data", "pictures"),
}
FIRST = "runs/pictures-default/pictures/epoch-001-reconstructions.png"
"""The first picture that training draws."""


def main() -> None:
    options = parser(__doc__)
    options.add_argument("folder", type=Path)
    options.add_argument("--count", type=int, default=2000)
    options.add_argument("--side", type=int, default=64)
    arguments = options.parse_args()
    record = Record(arguments)
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        _write(arguments.folder, work / "pictures", arguments.count, arguments.side)
        clone = [*("git", "clone", "--quiet"), str(ROOT), str(work / "clone")]
        for what, seconds in _timed(work, clone):
            record.figures[what] = seconds
            record.say(f"{what:<40}{seconds / 60:>6.2f} min from the start of the clone")
    record.write()


def _write(source: Path, target: Path, count: int, side: int) -> None:
    """Writes ``count`` different colour pictures from ``source``, an .npz file or a folder."""
    import numpy as np
    from PIL import Image

    from vqref.host.pictures import Reading, load_any

    target.mkdir()
    source = next(iter(sorted(source.glob("*-train.npz"))), source)
    reading = Reading(size=(side, side), channels=3) if source.is_dir() else Reading()
    images = load_any(source, reading).train[:count]
    if len(images) < count:
        raise SystemExit(f"{source}: {len(images)} pictures, fewer than {count}")
    for i, image in enumerate(images):
        picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
        picture.resize((side, side), Image.Resampling.LANCZOS).save(target / f"{i:05d}.png")


def _timed(work: Path, clone: list[str]) -> Iterator[tuple[str, float]]:
    """Yields what was reached, and the seconds from the start."""
    start = time.perf_counter()
    subprocess.run(clone, check=True)
    training = subprocess.Popen([sys.executable, "-m", *TRAIN], cwd=work, stdout=subprocess.DEVNULL)
    while training.poll() is None and not (work / FIRST).exists():
        time.sleep(0.1)
    yield "first reconstructions, of epoch 1", time.perf_counter() - start
    if training.wait():
        raise SystemExit("training failed")
    yield "trained", time.perf_counter() - start
    for what, command in THEN.items():
        subprocess.run(
            [sys.executable, "-m", *command], cwd=work, check=True, stdout=subprocess.DEVNULL
        )
        yield what, time.perf_counter() - start


if __name__ == "__main__":
    main()
