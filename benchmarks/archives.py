"""``python -m benchmarks.archives BUNDLE [--images 50000] [--kills 5]``: turns generated
pictures in parquet files into tokens, in three ways: Ray Data on all cores, one process with a
loop, and a script that writes one file per image. Also kills Ray's job at random moments and
continues it.

Images per second count from the first part to the last, so the start of Python and of Ray is not
included; the whole time is given too. Each way uses one thread per core.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.measure import ROOT, Record, parser
from benchmarks.pictures import fields
from vqdeploy import Codec
from vqdeploy.bundle import Bundle
from vqref.host.archives import list_shards, read_shard
from vqref.host.arrow import parquet

SHARD_IMAGES = 500
"""50,000 images make a hundred parts, so no core waits long for others at the end."""

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def write_source(folder: Path, count: int, image_shape: tuple[int, int, int]) -> None:
    """Writes parquet files of PNGs as ``datasets`` writes them, with row groups of 100."""
    pyarrow, module = parquet()
    folder.mkdir()
    for number, start in enumerate(range(0, count, 10_000)):
        images = fields(min(10_000, count - start), image_shape, seed=number)
        rows = [{"bytes": png(image), "path": f"{start + i}.png"} for i, image in enumerate(images)]
        table = pyarrow.table({"image": rows})
        module.write_table(table, folder / f"train-{number:05}.parquet", row_group_size=100)


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def job(bundle: Path, source: Path, output: Path, *more: str) -> list[str]:
    """Returns the command that writes a folder of tokens."""
    words = ["encode", str(bundle), str(source), "--output", str(output), "--device", "cpu"]
    options = ["--threads", "1", "--shard-images", str(SHARD_IMAGES), *more]
    return [sys.executable, "-m", "vqdeploy", *words, *options]


def run(words: Sequence[str], place: Path) -> float:
    """Runs a command, which must succeed; returns its seconds."""
    start = time.perf_counter()
    subprocess.run(words, check=True, cwd=place, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def speed(folder: Path) -> float:
    """Returns the images per second of a finished job, from its first part to its last."""
    _, module = parquet()
    parts = sorted(folder.glob("*.parquet"), key=lambda path: path.stat().st_mtime_ns)
    times = [path.stat().st_mtime_ns / 1e9 for path in parts]
    images = sum(module.read_metadata(path).num_rows for path in parts[1:])
    return float(images / (times[-1] - times[0]))


def one_file_an_image(bundle: Path, source: Path, output: Path) -> None:
    """What people write first: a loop that encodes and saves one image at a time.

    Prints the loop's images per second.
    """
    codec = Codec.load(bundle, "cpu", intra_op_num_threads=1)
    output.mkdir()
    start, count = time.perf_counter(), 0
    for shard in list_shards(source):
        for record in read_shard(shard):
            assert isinstance(record.content, bytes)
            with Image.open(io.BytesIO(record.content)) as picture:
                np.save(output / f"{record.key}.npy", codec.encode(picture)[0])
            count += 1
    print(count / (time.perf_counter() - start))


def killed(words: Sequence[str], output: Path, place: Path, kills: int, whole: float) -> int:
    """Kills a job at random moments, and continues it to the end.

    Returns how many of the kills found it running.
    """
    rng, found = np.random.default_rng(0), 0
    for _ in range(kills):
        process = subprocess.Popen(words, cwd=place, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.1, 0.6) * whole)
        found += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    run(words, place)
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("bundle", type=Path)
    options.add_argument("--images", type=int, default=50_000)
    options.add_argument("--kills", type=int, default=5)
    options.add_argument("--one-file-an-image", nargs=2, type=Path, help="work alone, as that one")
    arguments = options.parse_args()
    bundle = arguments.bundle.absolute()
    if arguments.one_file_an_image:
        one_file_an_image(bundle, *arguments.one_file_an_image)
        return
    record, cores = Record(arguments), os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        source = place / "source"
        write_source(source, arguments.images, Bundle.open(bundle).spec.image_shape)
        compare(record, bundle, source, place, cores)
        ray = job(bundle, source, place / "killed", "--engine", "ray")
        whole = record.figures["Ray Data"]["seconds"]
        running = killed(ray, place / "killed", place, arguments.kills, whole)
        same = content(place / "killed") == content(place / "process")
        record.say(
            f"{arguments.kills} kills of Ray's job, {running} while it ran: "
            f"{'the same bytes' if same else 'OTHER BYTES'} as of one process that nobody killed"
        )
        record.figures["kills"] = {"kills": arguments.kills, "running": running, "same": same}
    record.write()


def compare(record: Record, bundle: Path, source: Path, place: Path, cores: int) -> None:
    """Runs the three ways, one after the other."""
    alone = [sys.executable, "-m", "benchmarks.archives", str(bundle), "--one-file-an-image"]

    def by_files() -> tuple[float, float]:
        start = time.perf_counter()
        words = [*alone, str(source), str(place / "files")]
        done = subprocess.run(words, check=True, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE)
        return time.perf_counter() - start, float(done.stdout)

    def by_job(name: str, *more: str) -> tuple[float, float]:
        seconds = run(job(bundle, source, place / name, *more), place)
        return seconds, speed(place / name)

    ways: dict[str, Callable[[], tuple[float, float]]] = {
        "one process, a loop": lambda: by_job("process"),
        "Ray Data": lambda: by_job("ray", "--engine", "ray"),
        "one file an image": by_files,
    }
    record.say(f"{'':<22}images/s   over the loop   whole seconds")
    for way, work in ways.items():
        seconds, rate = work()
        record.figures[way] = {"images per second": rate, "seconds": seconds}
        loop = record.figures["one process, a loop"]["images per second"]
        record.say(f"{way:<22}{rate:>8,.0f}{rate / loop:>15.2f}x{seconds:>16.1f}")
    share = record.figures["Ray Data"]["images per second"] / loop / cores
    same = content(place / "process") == content(place / "ray")
    record.say(f"Ray Data: {share:.2f} of the loop times {cores} cores; the same bytes: {same}")
    record.figures["share of cores"] = share


if __name__ == "__main__":
    main()
