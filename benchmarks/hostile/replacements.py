"""``python -m benchmarks.hostile.replacements [--kills N]``: kills processes that replace a bundle.

Most publish in a loop, so that the signal comes during a publication. The others are real exports,
killed at any moment after the start of the interpreter. After each kill, the place must hold a
whole bundle; after one more undisturbed publication, it must hold nothing else.
"""

from __future__ import annotations

import os
import signal as signals
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.measure import ROOT, Record, parser
from vqdeploy.bundle import CARD, FILES, MANIFEST, Bundle

PUBLISH = """
import sys
from pathlib import Path
from vqref.errors import CommandError
from vqref.host import renames
from vqref.host.files import publish_folder
from vqref.host.interrupts import guarded

place, way, times = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
if way == "linked":
    renames.exchange = lambda first, second: False
files = {path.name: path.read_bytes() for path in Path(sys.argv[4]).iterdir()}

def work():
    print("ready", flush=True)
    for _ in range(times):
        publish_folder(place, files, replace=True)
    return 0

sys.exit(guarded("publish", work))
"""
"""Publishes a bundle this many times."""

WAYS = ("exchanged", "linked")
"""Ways to publish: with a file system that exchanges names, and as with one that cannot."""


@dataclass
class Findings:
    """What the campaign found.

    kills: how many processes were killed. replaced: after how many kills the place held another
    folder than before. past: what was wrong, a line each.
    """

    kills: int = 0
    replaced: int = 0
    past: list[str] = field(default_factory=list)


def campaign(
    kills: int, seed: int = 0, signal: str = "SIGKILL", exports: int | None = None
) -> Findings:
    """Kills ``kills`` processes, ``exports`` of them real exports; None takes every tenth."""
    rng = np.random.default_rng(seed)
    exports = kills // 10 if exports is None else exports
    found = Findings()
    with tempfile.TemporaryDirectory() as folder:
        start = _Start(Path(folder), real=exports > 0)
        for i in range(kills):
            real = i < exports
            way = WAYS[i % 2] if not real else WAYS[0]
            place = start.place(way)
            before = place.resolve(), place.stat().st_ino
            status = _killed(start.export(place) if real else start.publish(way), signal, rng, real)
            found.kills += 1
            found.replaced += (place.resolve(), place.stat().st_ino) != before
            what = f"{signal} {i}, {'export' if real else way}"
            if status not in (-signals.SIGKILL, 128 + signals.Signals[signal], 0):
                found.past.append(f"{what}: exit status {status}")
            found.past += [f"{what}: {line}" for line in _wrong(place)]
            if i % 5 == 4 or i == kills - 1:
                found.past += [f"{what}: {line}" for line in start.left_over(way)]
    return found


class _Start:
    """Where bundles are published, and the processes that publish them.

    real: whether the bundle is a real one, of a small model. Otherwise, it only has a bundle's
    files.
    """

    def __init__(self, folder: Path, *, real: bool) -> None:
        self.folder, self.model, self.source = folder, folder / "model.pt", folder / "source"
        if real:
            _make_bundle(self.model, self.source)
        else:
            self.source.mkdir()
            for name in (*FILES, MANIFEST):
                (self.source / name).write_bytes(name.encode() * 5000)
        for way in WAYS:
            self._finish(self.publish(way, 2))

    def place(self, way: str) -> Path:
        """Returns the place of this way. Each way has its own folder, so that left-overs show."""
        (self.folder / way).mkdir(exist_ok=True)
        return self.folder / way / "bundle"

    def publish(self, way: str, times: int = 10**6) -> subprocess.Popen[bytes]:
        return _python("-c", PUBLISH, str(self.place(way)), way, str(times), str(self.source))

    def export(self, place: Path) -> subprocess.Popen[bytes]:
        command = ("-m", "vqdeploy", "export", str(self.model), "--replace", "--output")
        return _python(*command, str(place))

    def left_over(self, way: str) -> list[str]:
        """Returns what is next to a place, or wrong with it, after one more publication."""
        self._finish(self.publish(way, 1))
        place = self.place(way)
        expected = {place.name} | ({place.readlink().name} if place.is_symlink() else set())
        left = {path.name for path in place.parent.iterdir()} - expected
        return [f"left over: {name}" for name in sorted(left)] + _wrong(place)

    @staticmethod
    def _finish(process: subprocess.Popen[bytes]) -> None:
        process.communicate()
        if process.returncode != 0:
            raise RuntimeError("an undisturbed publication failed")


def _make_bundle(model: Path, bundle: Path) -> None:
    """Makes a small model of random parameters, and its bundle."""
    import vqref
    from vqdeploy.export import export
    from vqref import families
    from vqref.modelfile import Model
    from vqtrain.modelfile import write_model

    spec = families.post((1, 28, 28), base_depth=2, latent_size=1, num_codes=8, code_size=4)
    params = vqref.init_params(spec, np.random.default_rng(0))
    write_model(model, Model(spec, params))
    export(model, bundle)


def _python(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def _killed(
    process: subprocess.Popen[bytes], signal: str, rng: np.random.Generator, real: bool
) -> int:
    """Sends the signal at a random moment. Returns the exit status."""
    if real:
        time.sleep(rng.uniform(0.1, 8.0))
    else:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.2))
    process.send_signal(signals.Signals[signal])
    process.communicate(timeout=120)
    return process.returncode


def _wrong(place: Path) -> list[str]:
    """Returns what keeps the place from being a whole bundle."""
    expected = {*FILES, MANIFEST}
    try:
        names = {path.name for path in place.iterdir()}
        if names != expected:
            return [f"holds {', '.join(sorted(names ^ expected))} or lacks it"]
        if (place / CARD).read_bytes().startswith(CARD.encode()):  # not a real one
            torn = [n for n in names if (place / n).read_bytes() != n.encode() * 5000]
            return [f"{name} is not whole" for name in torn]
        bundle = Bundle.open(place)
        for name in FILES:
            bundle.read(name)
    except (OSError, ValueError) as error:
        return [str(error)]
    return []


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--kills", type=int, default=200, help="of each signal (%(default)s)")
    options.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    arguments = options.parse_args()
    record = Record(arguments)
    past = 0
    for signal in ("SIGKILL", "SIGTERM"):
        found = campaign(arguments.kills, arguments.seed, signal)
        record.say(
            f"{found.kills} {signal}s, {found.replaced} after a new folder had its place: "
            f"{len(found.past)} left no whole bundle, or something over"
        )
        for line in found.past[:20]:
            record.say(line)
        record.figures[signal] = asdict(found)
        past += len(found.past)
    record.write()
    return 1 if past else 0


if __name__ == "__main__":
    sys.exit(main())
