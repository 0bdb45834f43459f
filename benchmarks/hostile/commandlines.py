"""``python -m benchmarks.hostile.commandlines [--count N]``: runs N command lines drawn at random.

They are of all commands of the three programs. The campaign reports those that did not end as the
README says. Options come from the commands' own tables; their values are extreme, of another kind
or nonsense. Files are sound, damaged, missing or not files at all. Streams are closed, full or read
by nobody, and the environment is poor. Every command must end, with an exit code that has a
meaning, without a traceback, and with at most one line on stderr.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import vqref
from benchmarks.measure import ROOT, Record, parser
from vqdeploy.export import export
from vqref import families
from vqref.errors import ExitCode
from vqref.modelfile import Model
from vqtrain.commands.train import TrainOptions
from vqtrain.modelfile import write_model

LONGEST = 120.0
"""Seconds after which a command counts as hanging. The slowest one takes a tenth of that."""

MOST_MEMORY = 8 * 2**30
"""Bytes of address space. A command that asks for more does not get it, so the machine is safe."""

NUMBERS = (
    *("0", "1", "2", "3", "-1", "007", "1.5", "1e-300", "1e999", "nan", "inf", "-inf", "1_0"),
    *("", " ", "x", "0x10", "٣", "½", "9" * 5000, str(10**20), str(2**63), str(2**63 - 1)),
    *(str(2**31), str(-(2**63)), "1000000", "--", "-", "\x1b[31m", "28x28", "0x0", "1e3"),
)
SIZES = ("28x28", "0x0", "1x1", "99999x99999", "x", "28", "9" * 500 + "x1", "٣x٣", "-1x2", "28x")
WORDS = ("auto", "never", "a/b", "..", "/", "", "-", "--", "é", "\x1b[2J", "a\nb", "x" * 300)

FILES = (
    *("model.pt", "flipped.pt", "short.pt", "bundle", "flipped", "images.npz", "images.npy"),
    *("float.npy", "flat.npy", "pictures", "tokens.npz", "params.npz", "scalar.npz", "config.toml"),
    *("huge.toml", "nested.toml", "array.toml", "empty", "text", "folder", "missing", "pipe"),
    *(
        "loop",
        "/dev/null",
        "/dev/zero",
        "/proc/self/mem",
        "/",
        "",
        "a\nb",
        "\x1b[31mred",
        "x" * 300,
    ),
    *("é.npz", os.fsdecode(b"\xff\xfe.npz"), "images.npz/x", "-", "--"),
)
FITTING = {
    "model": ("model.pt",),
    "from_params": ("params.npz",),
    "bundle": ("bundle",),
    "images": ("images.npz", "pictures"),
    "tokens": ("tokens.npz",),
    "data": ("images.npz", "pictures"),
    "config": ("config.toml", "huge.toml", "nested.toml", "array.toml", "nul.toml", "hex.toml"),
}
"""Values that an option of this name can work with."""

INPUTS = {name for names in FITTING.values() for name in names}

OUTPUTS = ("out.npz", "out.png", "out.npy", "out.parquet", "out-{}", "out.pt", "bundle", "model.pt")

ENVIRONMENTS: Mapping[str, Mapping[str, str | None]] = {
    "plain": {"PYTHONUNBUFFERED": None},
    "no HOME": {"HOME": None, "XDG_CACHE_HOME": None},
    "LANG=C": {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "ascii": {"PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": None},
}
STREAMS = (
    *("plain", "plain", "plain", ">&-", "2>&-", "<&-", ">&- 2>&- <&-", ">/dev/full"),
    *("2>/dev/full", "unread", "both unread"),
)
"""What is done to streams: they are redirected by a shell, or nobody reads them."""

PLACES = ("work", "work", "work", "/proc")
"""Where commands run: a folder, and a folder in which nobody can write."""


@dataclass
class Findings:
    """What the campaign found.

    codes: how many commands ended with each exit code. wrong: a line for each command that did not
    end as it should.
    """

    codes: dict[int, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Line:
    """A command line, and the conditions in which it runs."""

    words: tuple[str, ...]
    streams: str
    environment: str
    place: str

    def __str__(self) -> str:
        words = shlex.join(word if len(word) < 100 else f"{word[:9]}…" for word in self.words)
        return ascii(f"{words} [{self.streams}, {self.environment}, {self.place}]")


def campaign(count: int, seed: int = 0, jobs: int = 1) -> Findings:
    """Runs ``count`` command lines, ``jobs`` at a time."""
    found = Findings()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        prepare(place)
        lines = draw(count, seed, place)
        with ThreadPoolExecutor(jobs) as pool:
            ends = list(pool.map(lambda line: run(line, place), lines))
    found.codes = dict(sorted(collections.Counter(code for code, _ in ends).items()))
    for line, (code, said) in zip(lines, ends, strict=True):
        if reason := what_is_wrong(line, code, said):
            found.wrong.append(f"{line}: {reason}: {code} {said[-600:]!r}")
    return found


def commands() -> dict[tuple[str, ...], Sequence[Any]]:
    """Returns {the words of a command: the fields of its options}."""
    found: dict[tuple[str, ...], Sequence[Any]] = {("vqtrain",): dataclasses.fields(TrainOptions)}
    for package in ("vqref", "vqtrain", "vqdeploy"):
        for path in sorted((ROOT / package / "commands").glob("*.py")):
            command = getattr(import_module(f"{package}.commands.{path.stem}"), "COMMAND", None)
            if command:
                found[package, command.name] = dataclasses.fields(command.options)
    return found


def draw(count: int, seed: int, place: Path) -> list[Line]:
    """Returns random command lines, all different, and none that trains for long."""
    rng, table = np.random.default_rng(seed), commands()
    kinds = list(table)
    return [_line(rng, kinds[rng.integers(len(kinds))], table, i, place) for i in range(count)]


def _line(
    rng: np.random.Generator,
    kind: tuple[str, ...],
    table: Mapping[tuple[str, ...], Sequence[Any]],
    number: int,
    place: Path,
) -> Line:
    fields = table[kind]
    options = [each for each in fields if each.metadata["flags"]]
    arguments = [each for each in fields if not each.metadata["flags"] and rng.random() < 0.97]
    words = [*kind, *(_value(rng, each, number, fits=rng.random() < 0.8) for each in arguments)]
    if kind == ("vqtrain",):  # a short run, unless an option that comes later says otherwise
        words += ["--data", "images.npz", "--epochs", "1", "--batch-size", "16"]
        words += ["--base-depth", "2", "--name", f"run-{number}", "--output", f"run-{number}.pt"]
    for index in rng.permutation(len(options))[: rng.integers(4)]:
        words += _option(rng, options[index], number)
    if rng.random() < 0.05:
        odd = ("--help", "--", "--nonsense", "-x", "--output=--", "", "--json=1", "\x1b", "a", "é")
        words.insert(int(rng.integers(1, len(words) + 1)), odd[rng.integers(len(odd))])
    streams, environments = STREAMS[rng.integers(len(STREAMS))], list(ENVIRONMENTS)
    inside = PLACES[rng.integers(len(PLACES))]
    if inside != "work":
        words = [str(place / word) if word in INPUTS else word for word in words]
    return Line(tuple(words), streams, environments[rng.integers(len(environments))], inside)


def _option(rng: np.random.Generator, option: Any, number: int) -> list[str]:
    """Returns a flag, with a value if it takes one."""
    flag = option.metadata["flags"][0]
    if "action" in option.metadata and "type" not in option.metadata:
        negative = flag.replace("--", "--no-", 1)
        return [negative if rng.random() < 0.3 else flag]
    value = _value(rng, option, number, fits=rng.random() < 0.7)
    return [f"{flag}={value}"] if rng.random() < 0.7 else [flag, value]


def _value(rng: np.random.Generator, option: Any, number: int, *, fits: bool) -> str:
    """Returns a value for an option. fits: whether it is of the kind that the option names."""
    name, kind = option.name, option.metadata.get("type")
    if choices := option.metadata.get("choices"):
        pool: Sequence[str] = choices if fits else WORDS
    elif name in ("output", "certificate", "folder", "runs"):
        pool = OUTPUTS if fits else [path for path in FILES if path != "/"]
    elif kind is Path or name in FITTING:
        pool = FITTING.get(name, FILES) if fits else FILES
    elif name == "resize":
        pool = SIZES
    elif kind is None:
        pool = WORDS
    else:
        pool = ("1", "2", "3") if fits else NUMBERS
    return pool[int(rng.integers(len(pool)))].replace("{}", str(number))


def run(line: Line, place: Path) -> tuple[int, str]:
    """Runs a command line; returns its exit code, and its stderr if that can be read.

    The exit code is -1000 if the command hung.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["PORTABLE_VQVAE_KMNIST_URL"] = "http://127.0.0.1:9/"  # nobody answers there
    for name, value in ENVIRONMENTS[line.environment].items():
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    unread = line.streams.endswith("unread")
    redirections = "" if line.streams == "plain" or unread else line.streams
    script = f'ulimit -v {MOST_MEMORY // 2**10}; exec "$@" {redirections}'
    process = subprocess.Popen(
        ["sh", "-c", script, "sh", sys.executable, "-m", *line.words],
        cwd=place if line.place == "work" else line.place,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    if unread and process.stdout:
        process.stdout.close()
        process.stdout = None
    if line.streams == "both unread" and process.stderr:
        process.stderr.close()
        process.stderr = None
    try:
        _, said = process.communicate(timeout=LONGEST)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return -1000, ""
    return process.returncode, (said or b"").decode(errors="backslashreplace")


def what_is_wrong(line: Line, code: int, said: str) -> str | None:
    """Returns why a command did not end as it should, or None."""
    if code == -1000:
        return "hangs"
    if code not in {*ExitCode} - {ExitCode.INTERRUPTED, ExitCode.TERMINATED}:
        return "an exit code without a meaning"
    if len(said.splitlines()) > 1:
        return "more than one line"
    if said and not (said.startswith("vq") and said[:-1].isprintable()):
        return "not a line of the program's"
    silent = line.streams != "plain" or code in (ExitCode.DONE, ExitCode.PARITY)
    if not said and not silent:
        return "fails without a word"
    return None


def prepare(place: Path) -> None:
    """Writes FILES, sound and damaged."""
    rng = np.random.default_rng(0)
    spec = families.post((1, 28, 28), base_depth=2, latent_size=1, num_codes=8, code_size=4)
    params = vqref.init_params(spec, rng)
    write_model(place / "model.pt", Model(spec, params, {"epochs": 1}))
    export(place / "model.pt", place / "bundle")
    np.savez(place / "params.npz", allow_pickle=False, **params)
    images = rng.integers(0, 256, (48, 28, 28), np.uint8)
    for name in ("images.npz", "é.npz", os.fsdecode(b"\xff\xfe.npz")):
        np.savez(place / name, images)
    np.save(place / "images.npy", images)
    np.save(place / "float.npy", rng.normal(size=(4, 28, 28)))
    np.save(place / "flat.npy", images.reshape(48, 784))
    np.savez(place / "scalar.npz", np.float32(1), codebook=np.float32(1))
    np.savez(place / "tokens.npz", indices=rng.integers(0, 8, (20, 1), np.uint8))
    (place / "pictures").mkdir()
    for i, image in enumerate(images[:20]):
        Image.fromarray(image).save(place / "pictures" / f"{i}.png")
    (place / "config.toml").write_text('[run]\ndevice = "cpu"\n[training]\nepochs = 1\n')
    (place / "huge.toml").write_text(f"epochs = {'9' * 5000}\n")
    (place / "nested.toml").write_text(f"epochs = {'[' * 3000}{']' * 3000}\n")
    (place / "array.toml").write_text("beta = [1]\n")
    (place / "nul.toml").write_text('data = "a\\u0000b"\n')
    (place / "hex.toml").write_text(f"epochs = 0x{'f' * 9000}\n")
    (place / "empty").write_bytes(b"")
    (place / "text").write_text("hello\n")
    (place / "folder").mkdir()
    os.mkfifo(place / "pipe")
    (place / "loop").symlink_to("loop")
    (place / "flipped").mkdir()
    for path in (place / "bundle").iterdir():
        (place / "flipped" / path.name).write_bytes(_flipped(path, rng))
    (place / "flipped.pt").write_bytes(_flipped(place / "model.pt", rng))
    content = (place / "model.pt").read_bytes()
    (place / "short.pt").write_bytes(content[: len(content) // 2])


def _flipped(path: Path, rng: np.random.Generator) -> bytes:
    content = bytearray(path.read_bytes())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    return bytes(content)


def main() -> int:
    options = parser(__doc__)
    options.add_argument(
        "--count", type=int, default=1000, help="command lines (default: %(default)s)"
    )
    options.add_argument("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    options.add_argument("--jobs", type=int, default=2, help="at a time (default: %(default)s)")
    arguments = options.parse_args()
    record = Record(arguments)
    found = campaign(arguments.count, arguments.seed, arguments.jobs)
    codes = ", ".join(f"{times} with {code}" for code, times in found.codes.items())
    record.say(f"{arguments.count} command lines ended: {codes}")
    record.say(f"{len(found.wrong)} of them with a traceback, more than one line, or not at all")
    for line in found.wrong:
        record.say(line)
    record.figures = dataclasses.asdict(found)
    record.write()
    return 1 if found.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
