"""What all benchmarks share: records, runs in turns, worker processes, the machine's limits."""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vqref.host.machine import describe_machine

ROOT = Path(__file__).parent.parent

PACKAGES = (
    "numpy",
    "scipy",
    "torch",
    "onnx",
    "onnxruntime-gpu",
    "onnxruntime",
    "vector-quantize-pytorch",
    "faiss-cpu",
)


def parser(documentation: str | None) -> argparse.ArgumentParser:
    """Returns a parser with ``--json`` and the module's documentation."""
    made = argparse.ArgumentParser(
        description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="where to store the figures, with machine, versions and date",
    )
    return made


class Record:
    """What one benchmark prints and stores: ``--json`` gets ``figures`` and the lines."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.path: Path | None = arguments.json
        self.lines: list[str] = []
        self.figures: dict[str, Any] = {}
        self.machine = describe_machine(PACKAGES)
        self.date = f"{datetime.now(UTC):%Y-%m-%d}"
        names = ("python", "numpy", "torch", "onnxruntime-gpu", "onnxruntime")
        versions = ", ".join(
            f"{name} {self.machine[name]}" for name in names if name in self.machine
        )
        self.say(
            f"{self.date}, {self.machine['processor']}, {self.machine['cores']} cores, {versions}"
        )

    def say(self, line: str) -> None:
        print(line, flush=True)
        self.lines.append(line)

    def write(self) -> None:
        if self.path is None:
            return
        module = ".".join(Path(sys.argv[0]).resolve().relative_to(ROOT).with_suffix("").parts)
        kept = [
            Path(word).name for word in sys.argv[1:] if word not in ("--json", str(self.path))
        ]  # only names, since paths are one machine's
        content = {
            "command": " ".join(["python -m", module, *kept]),
            "date": self.date,
            "machine": self.machine,
            "printed": self.lines,
            "figures": self.figures,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def summary(times: Sequence[float]) -> dict[str, float]:
    """Returns the median, the 10th and 90th percentile of seconds, and how many there were."""
    low, median, high = (float(q) for q in np.quantile(times, (0.1, 0.5, 0.9)))
    return {"median": median, "low": low, "high": high, "runs": len(times)}


def timed(run: Callable[[], Any]) -> float:
    """Returns the seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def in_turns(
    runs: Mapping[str, Callable[[], float]],
    *,
    rounds: int = 5,
    seconds: float = 0.0,
    warm_up: int = 1,
    pause: float = 0.0,
) -> dict[str, list[float]]:
    """Returns the seconds of each run, call by call in turns.

    There are at least ``rounds`` calls of each, for at least ``seconds``.

    runs: each returns its own seconds: ``lambda: timed(call)``, or a Worker. pause: seconds before
    each call, so that threads of other processes no longer wait for work.
    """
    for run in runs.values():
        for _ in range(warm_up):
            run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    while min(map(len, found.values())) < rounds or time.perf_counter() < end:
        for name, run in runs.items():
            time.sleep(pause)
            found[name].append(run())
    return found


class Spent(NamedTuple):
    """The seconds of a process, its seconds of CPU time, its peak in MiB, and what it printed."""

    seconds: float
    busy: float
    peak: float
    printed: str


def spent(command: Sequence[str]) -> Spent:
    """Runs Python with these words. Exits if it fails.

    A child's peak is at least what its parent held when it was made: this process must stay small,
    without PyTorch and without images.
    """
    begun = time.perf_counter()
    with tempfile.TemporaryFile("w+") as answer:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=answer)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
        answer.seek(0)
        seconds, busy = time.perf_counter() - begun, usage.ru_utime + usage.ru_stime
        return Spent(seconds, busy, _mebibytes(usage.ru_maxrss), answer.read())


class Worker:
    """A process that does one thing whenever it is told to, and says how long that took.

    So peers with their own environments and settings can take turns with us.

    module: run by ``python``; it must call ``serve``. Raises RuntimeError with the last line of its
    error if it does not start.
    """

    def __init__(self, module: str, *arguments: str, python: str = sys.executable) -> None:
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
        self.process = subprocess.Popen(
            [python, "-m", module, *arguments],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.said: dict[str, Any] = self._read()
        self.grown = 0.0  # the most MiB since it was ready
        self.computed: list[float] = []  # CPU seconds of each call, of its own threads only

    def __call__(self) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write("again\n")
        self.process.stdin.flush()
        answer = self._read()
        self.grown = float(answer["grown"])
        self.computed.append(float(answer["computed"]))
        return float(answer["seconds"])

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            complaint = self.process.communicate()[1].strip().splitlines()
            raise RuntimeError(complaint[-1] if complaint else f"exit code {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self.process.communicate()


def serve(run: Callable[[], Any], **said: Any) -> None:
    """The Worker's side: says that it is ready, then answers every line of its input.

    An answer has the seconds that ``run`` took, its CPU seconds, and the most MiB by which the
    process has grown since it was ready.
    """
    before = peak()
    print(json.dumps(said), flush=True)
    for _ in sys.stdin:
        start = time.process_time()
        answer = {"seconds": timed(run), "grown": peak() - before}
        print(json.dumps({**answer, "computed": time.process_time() - start}), flush=True)


def peak() -> float:
    """Returns the most MiB that this process has held."""
    return _mebibytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _mebibytes(resident: int) -> float:
    """Returns MiB for a figure in the system's own unit."""
    return resident / (2**20 if sys.platform == "darwin" else 2**10)


def product_rates() -> dict[str, float]:
    """Returns the best rate of a product of square matrices, in floating-point operations/s."""
    import torch

    rates = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        best = 0.0
        for n in (1024, 2048, 4096):
            a, b = (torch.rand(n, n).to(dtype) for _ in range(2))
            result = a @ b
            best = max(
                best,
                *(2 * n**3 / timed(partial(torch.mm, a, b, out=result)) for _ in range(5)),
            )
        rates[name] = best
    return rates


def copy_rate() -> float:
    """Returns the best rate of copying an array larger than the caches, in bytes per second.

    Counts bytes read and bytes written.
    """
    source = np.ones(2**26, np.float32)
    target = np.empty_like(source)
    return float(
        2 * source.nbytes / min(timed(lambda: np.copyto(target, source)) for _ in range(5))
    )
