"""``python -m benchmarks.hostile.readers [--count N]``: gives each reader N damaged inputs.

Readers are those of files from outside; inputs are random or damaged. Each input must be read, or
be refused with InputError, within SLOW seconds and ROOM bytes of memory, with nothing on stderr.
Half of the damage is done to the content that a format wraps; the content is then wrapped again,
with right checksums. Each reader works in a process of its own.
"""

from __future__ import annotations

import copy
import faulthandler
import gzip
import hashlib
import io
import json
import math
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import ROOT, Record, parser
from vqref.errors import InputError

SLOW, STUCK = 5.0, 60.0
"""Seconds after which an input took too long, and after which a reader is stopped."""

ROOM = 2**30
"""Bytes by which a reader's memory may grow; inputs here are small."""

Rng = np.random.Generator


@dataclass(frozen=True)
class Reader:
    """What reads a file, and what such a file looks like.

    name: of the file. read: takes its path. samples: contents of good files. wrap: makes a file
    from an inner content, ``inner``, with right checksums. make: makes a random file that is well
    formed, with arbitrary content.
    """

    name: str
    read: Callable[[Path], object]
    samples: Callable[[], Sequence[bytes]]
    inner: Callable[[], Sequence[bytes]] | None = None
    wrap: Callable[[bytes], bytes] = bytes
    make: Callable[[Rng], bytes] | None = None


@dataclass
class Findings:
    """What the campaign found.

    inputs, refused: how many inputs there were, and how many were refused. past: a line on each
    that ended in another way.
    """

    inputs: int = 0
    refused: int = 0
    slowest: float = 0.0
    grown: int = 0
    past: list[str] = field(default_factory=list)


def campaign(count: int, seed: int = 0, names: Sequence[str] | None = None) -> dict[str, Findings]:
    """Returns each reader's findings, for ``count`` inputs. names: None takes all of READERS."""
    return {name: _in_a_process(name, count, seed) for name in names or READERS}


def _in_a_process(name: str, count: int, seed: int) -> Findings:
    code = f"from benchmarks.hostile.readers import child; child({name!r}, {count}, {seed})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    lines = done.stdout.splitlines()
    found = Findings(**json.loads(lines[-1])) if done.returncode == 0 else Findings(count)
    if done.returncode != 0:
        found.past.append(f"exit status {done.returncode}")
    if done.stderr:
        found.past.append(f"on stderr: {done.stderr[-2000:]}")
    return found


def child(name: str, count: int, seed: int) -> None:
    """Does the work of one process: prints its findings as JSON."""
    reader, found = READERS[name], Findings()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / reader.name
        damaged = _Damaged(reader, np.random.default_rng([seed, zlib.crc32(name.encode())]))
        for content in damaged.samples:
            path.write_bytes(content)
            reader.read(path)  # a good file is read, and what it needs is imported
        before = _memory()
        warnings.simplefilter("error")
        for i in range(count):
            path.write_bytes(damaged.next())
            faulthandler.dump_traceback_later(STUCK, exit=True)
            start = time.perf_counter()
            _read(reader, path, i, found)
            seconds = time.perf_counter() - start
            faulthandler.cancel_dump_traceback_later()
            found.slowest = max(found.slowest, seconds)
            if seconds > SLOW:
                found.past.append(f"input {i}: {seconds:.1f} s")
        found.grown = _memory() - before
        if found.grown > ROOM:
            found.past.append(f"memory grew by {found.grown / 2**20:.0f} MiB")
    print(json.dumps(asdict(found)))


def _read(reader: Reader, path: Path, i: int, found: Findings) -> None:
    found.inputs += 1
    try:
        reader.read(path)
    except InputError as error:
        found.refused += 1
        if "\n" in str(error) or not str(error):
            found.past.append(f"input {i}: refused with {str(error)!r:.200}")
    except BaseException as error:  # any other error is what the campaign looks for
        found.past.append(f"input {i}: {type(error).__name__}: {error}"[:300])


def _memory() -> int:
    """Returns the most bytes that this process has had in memory."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class _Damaged:
    """Makes random and damaged inputs of a reader, one after the other."""

    def __init__(self, reader: Reader, rng: Rng) -> None:
        self.reader, self.rng = reader, rng
        self.samples = list(reader.samples())
        self.inner = list(reader.inner()) if reader.inner else []

    def next(self) -> bytes:
        choice = self.rng.random()
        if self.reader.make and choice < 0.3:
            made = self.reader.make(self.rng)
            return _damage(made, self.samples, self.rng) if choice < 0.05 else made
        if self.inner and choice < 0.65:
            return self.reader.wrap(self._some(self.inner))
        return self._some(self.samples)

    def _some(self, samples: list[bytes]) -> bytes:
        content = samples[self.rng.integers(len(samples))]
        if self.rng.random() < 0.05:
            content = content[: self.rng.integers(1, 17)] + self.rng.bytes(
                int(self.rng.integers(4000))
            )
        for _ in range(self.rng.integers(1, 4)):
            content = _damage(content, samples, self.rng)
        return content


def _damage(content: bytes, others: Sequence[bytes], rng: Rng) -> bytes:
    return DAMAGES[rng.integers(len(DAMAGES))](bytearray(content or b"\0"), others, rng)


def _flip(content: bytearray, others: Sequence[bytes], rng: Rng) -> bytes:
    for _ in range(rng.integers(1, 9)):
        content[_place(content, rng)] ^= 1 << rng.integers(8)
    return bytes(content)


def _cut(content: bytearray, _: Sequence[bytes], rng: Rng) -> bytes:
    return bytes(content[: rng.integers(len(content))])


def _splice(content: bytearray, others: Sequence[bytes], rng: Rng) -> bytes:
    other = others[int(rng.integers(len(others)))]
    return bytes(content[: rng.integers(len(content))] + other[rng.integers(len(other) + 1) :])


def _set(content: bytearray, _: Sequence[bytes], rng: Rng) -> bytes:
    """Sets a field to an extreme value."""
    size, at = int(rng.choice([1, 2, 4, 8])), _place(content, rng)
    values = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, len(content), 10**6, 255]
    value = values[rng.integers(len(values))] % 2 ** (8 * size)
    content[at : at + size] = value.to_bytes(size, "little" if rng.random() < 0.5 else "big")
    return bytes(content)


def _stutter(content: bytearray, _: Sequence[bytes], rng: Rng) -> bytes:
    at = _place(content, rng)
    size = rng.integers(1, 65)
    return bytes(content[:at] + content[at : at + size] * rng.integers(0, 6) + content[at + size :])


def _nest(content: bytearray, _: Sequence[bytes], rng: Rng) -> bytes:
    """Puts very many brackets or digits at some place."""
    text = (b"[", b"{", b"(", b'{"a":', b"9", b"-", b"[[", b"a.")[rng.integers(8)]
    at = _place(content, rng)
    return bytes(content[:at] + text * int(rng.choice([40, 3000, 5000])) + content[at:])


DAMAGES = (_flip, _flip, _cut, _splice, _set, _set, _set, _stutter, _nest)


def _place(content: bytearray, rng: Rng) -> int:
    """Returns a place in a content, often near its beginning or its end, where headers are."""
    near, size = min(len(content), 200), len(content)
    at = (rng.integers(size), rng.integers(near), size - 1 - rng.integers(near))
    return int(at[rng.integers(3)])


def _twisted(plain: Any, rng: Rng, values: Sequence[Any]) -> Any:
    """Returns a copy of nested data with one to three entries removed, added or replaced."""
    plain = copy.deepcopy(plain)
    for _ in range(rng.integers(1, 4)):
        holders = [node for node in _nodes(plain) if node]
        holder = holders[rng.integers(len(holders))] if holders else {"a": 1}
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key, choice = keys[rng.integers(len(keys))], rng.random()
        if choice < 0.25:
            del holder[key]
        elif choice < 0.35 and isinstance(holder, dict):
            holder[("x", 7, "\x1b[31m", "", "a\nb")[rng.integers(5)]] = holder[key]
        else:
            holder[key] = values[int(rng.integers(len(values)))]
    return plain


def _nodes(plain: Any) -> list[Any]:
    """Returns the dictionaries and lists in nested data, each once."""
    found: dict[int, Any] = {}
    waiting = [plain]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict | list) and id(node) not in found:
            found[id(node)] = node
            waiting += node.values() if isinstance(node, dict) else node
    return list(found.values())


def _nested(depth: int, wide: int = 1) -> list[Any]:
    """Returns nested lists; with ``wide``, each occurs several times, so few bytes mean much."""
    found: list[Any] = []
    for _ in range(depth):
        found = [found] * wide
    return found


VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2**31,
        2**63,
        -(2**70),
        10**4000,
        0.5,
        math.nan,
        math.inf,
        "",
        "x",
    ),
    *("x" * 5000, "\x1b[31m", "a\nb", "\ud800", "float64", [], {}, [0], [[]], {"a": {}}, [1, 1, 1]),
    *([10**9] * 3, _nested(200), [-1] * 4, "post", {"bytes": -1, "sha256": "00"}),
)


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _zipped(name: str) -> Callable[[bytes], bytes]:
    """Makes an archive with one member."""

    def zipped(content: bytes) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, content)
        return buffer.getvalue()

    return zipped


DTYPES: Sequence[Any] = (
    *("|u1", "<f4", ">f8", "<f2", "<f16", "<c16", "<i8", ">u4", "|b1", "<U0", "<U7", "|S3", "|V4"),
    *("|O", "<M8[s]", "<m8", [("a", "<f4")], ("<f4", (2,)), "", "<f3", "u1" * 40, None, 7, "f4,f4"),
)
SHAPES: Sequence[Any] = (
    *(
        (),
        (0,),
        (3,),
        (2, 4, 4),
        (2, 4, 4, 3),
        (0, 4, 4),
        (2, 0, 4),
        (-1, 4, 4),
        (-2, -4, 4),
        (1,) * 70,
    ),
    *(
        (10**9, 10**9),
        (0, 10**30),
        (2**63,),
        (True, 4, 4),
        (1.5, 2),
        "x",
        None,
        [2, 4, 4],
        (10**400,),
    ),
)


def _any_npy(rng: Rng) -> bytes:
    """Makes an ``.npy`` with an arbitrary header of the right length."""
    descr, shape = DTYPES[int(rng.integers(len(DTYPES)))], SHAPES[int(rng.integers(len(SHAPES)))]
    header = {"descr": descr, "fortran_order": bool(rng.integers(2)), "shape": shape}
    text = repr(_twisted(header, rng, VALUES[:9]) if rng.random() < 0.2 else header)
    try:
        size = max(0, min(10**5, math.prod(shape) * np.dtype(descr).itemsize))
    except (TypeError, ValueError, OverflowError, SyntaxError):
        size = int(rng.integers(200))
    version = int(rng.integers(1, 5))
    encoded = text.encode("utf-8", "replace")[: 2**14 - 1]
    length = struct.pack("<H" if version == 1 else "<I", len(encoded))
    return b"\x93NUMPY" + bytes([version, 0]) + length + encoded + rng.bytes(size)


def _images() -> list[np.ndarray]:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    return [pixels[..., 0], pixels, (pixels[..., 0] / 255).astype(np.float32)]


def _idx() -> list[bytes]:
    pixels = _images()[0]
    return [struct.pack(">HBB3I", 0, 8, 3, *pixels.shape) + pixels.tobytes()]


def _packed(content: bytes) -> bytes:
    return gzip.compress(content, 1)


def _pictures(kind: str, *ways: dict[str, Any], modes: str = "") -> Callable[[], list[bytes]]:
    """Makes pictures in colour, in grey and in other modes of Pillow, each saved in each way.

    All are turned by their EXIF data. In some, alpha, a colour or a second frame is hidden.
    """

    def made() -> list[bytes]:
        from PIL import Image

        exif = Image.Exif()
        exif[0x0112] = 6
        colour = Image.fromarray(_images()[1][0]).resize((24, 20))
        found = []
        for way in ways or ({},):
            for mode in ("RGB", "L", *modes.split()):
                picture = (colour.convert("L") if "16" in mode else colour).convert(mode)
                if mode.endswith("A"):
                    picture.putalpha(colour.getchannel("R"))
                elif mode == "P":
                    picture.info["transparency"] = 0
                frames = {"append_images": [picture.rotate(180)]} if "save_all" in way else {}
                buffer = io.BytesIO()
                picture.save(buffer, kind, exif=exif, **way, **frames)
                found.append(buffer.getvalue())
        return found

    return made


def _png_mended(content: bytes) -> bytes:
    """Returns the same chunks with right checksums."""
    found, at = content[:8], 8
    while at + 12 <= len(content):
        size = min(int.from_bytes(content[at : at + 4], "big"), len(content) - at - 12)
        body = content[at + 4 : at + 8 + size]
        found += size.to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
        at += 12 + size
    return found + content[at:]


def _load(path: Path) -> object:
    from vqref.host.images import load

    return load(path)


def _load_folder(path: Path) -> object:
    from vqref.host.pictures import Reading, load_any

    return load_any(path.parent, Reading(size=(9, 7), crop=True))


def _indices(path: Path) -> object:
    from vqdeploy.tokens import read_tokens

    return read_tokens(path)


def _tokens(suffix: str) -> Callable[[], list[bytes]]:
    def made() -> list[bytes]:
        from vqdeploy.tokens import Tokens, write_tokens

        indices, found = np.zeros((2, 2), np.int64), []
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"tokens{suffix}"
            for tokens in (
                Tokens(indices),
                Tokens(indices, ("a.png", "b.png"), "0" * 64, (2,), 4),
            ):
                write_tokens(path, tokens)
                found.append(path.read_bytes())
        return found

    return made


def _model() -> Any:
    import vqref
    from vqref import families
    from vqref.modelfile import Model

    spec = families.post((1, 8, 8), base_depth=1, latent_size=2, num_codes=4, code_size=2)
    params = vqref.init_params(spec, np.random.default_rng(0))
    return Model(spec, params, {"epochs": 1}, {"epoch": 1, "history": [{"epoch": 1}]}, {"data": {}})


def _source(path: Path) -> object:
    from vqdeploy.sources import read_source

    return read_source(path)


def _parameters() -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in _model().params.items()}


def _parameters_npz() -> list[bytes]:
    spec = np.array(json.dumps(_model().spec.to_dict()))
    return [_npz(**_parameters()), _npz(**_parameters(), spec=spec)]


def _any_parameters(rng: Rng) -> bytes:
    """Makes parameters, some of them wrong, and a spec with arbitrary content."""
    spec = json.dumps(_twisted(_model().spec.to_dict(), rng, VALUES))
    arrays = _parameters()
    if rng.random() < 0.5:
        name = list(arrays)[rng.integers(len(arrays))]
        others: list[np.ndarray] = [
            np.zeros(()),
            np.ones(3, np.complex64),
            np.array("x"),
            np.full((2, 2), 1e300),
        ]
        arrays[name] = others[rng.integers(len(others))]
    return _npz(**arrays, **({"spec": np.array(spec)} if rng.random() < 0.5 else {}))


def _safetensors() -> list[bytes]:
    from safetensors.numpy import save

    spec = json.dumps(_model().spec.to_dict())
    return [save(_parameters()), save(_parameters(), {"spec": spec})]


def _safetensors_mended(content: bytes) -> bytes:
    """Corrects the header's length."""
    end = content.find(b"}}") + 2
    return (end - 8).to_bytes(8, "little", signed=False) + content[8:] if end >= 10 else content


def _any_safetensors(rng: Rng) -> bytes:
    content = _safetensors()[rng.integers(2)]
    size = int.from_bytes(content[:8], "little")
    header = _twisted(json.loads(content[8 : 8 + size]), rng, VALUES)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def _options(path: Path) -> object:
    from vqtrain.run.folder import read_options

    return read_options(path)


TOML = b"""
# options of a run
seed = 0
[training]
epochs = 20
learning_rate = 1e-3
recipe = "post"
deterministic = true
[model]
num_codes = 64
"""


def _any_toml(rng: Rng) -> bytes:
    values = (
        *(
            b"[" * 3000,
            b"9" * 5000,
            b"nan",
            b"-inf",
            b"1979-05-27T07:32:00Z",
            b"07:32:00",
            b"[1, 2]",
        ),
        *(
            b"{a = {b = 1}}",
            b'"""x',
            b"'\xff'",
            b"0x" + b"f" * 5000,
            b"1e999999",
            b'"\\ud800"',
            b"1_0",
        ),
    )
    return TOML + b"value = " + values[rng.integers(len(values))]


def _models() -> list[bytes]:
    from vqtrain.modelfile import write_model

    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "model.pt", _model())
        return [(Path(folder) / "model.pt").read_bytes()]


def _saved(plain: Any) -> bytes:
    import torch

    content = io.BytesIO()
    try:
        torch.save(plain, content)
    except (RecursionError, UnicodeEncodeError):  # this cannot be encoded
        return b""
    return content.getvalue()


def _odd_tensors() -> tuple[Any, ...]:
    import torch

    return (
        *(
            torch.zeros(()),
            torch.zeros(3),
            torch.zeros(3, dtype=torch.int64),
            torch.zeros(0, 2**40),
        ),
        *(torch.zeros(2, 2).to_sparse(), torch.zeros(2, dtype=torch.bfloat16), torch.zeros(1, 1).T),
        *(torch.zeros(1).expand(2**20), torch.zeros(2, device="meta"), torch.full((4,), math.nan)),
        *(_nested(30, 2), _nested(12, 9), {1: 2}, {"a": torch.zeros(1)}, b"bytes", 1j, {1}, (1, 2)),
        torch.zeros(5056, dtype=torch.uint8),
    )


def _any_model(rng: Rng) -> bytes:
    import torch

    from vqref.modelfile import seal

    plain = _model().to_plain()
    plain["parameters"] = {k: torch.from_numpy(v.copy()) for k, v in plain["parameters"].items()}
    content = _saved(_twisted(plain, rng, (*VALUES, *_odd_tensors())))
    return seal(content) if content and rng.random() < 0.5 else content


def _bundle() -> Any:
    """Makes the manifest and the oracle's file of a bundle."""
    from vqdeploy.export import export

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "model.pt").write_bytes(_models()[0])
        export(path / "model.pt", path / "b")
        return [(path / "b" / name).read_bytes() for name in ("manifest.json", "oracle.npz")]


def _manifest(path: Path) -> object:
    from vqdeploy.bundle import Bundle

    return Bundle.open(path.parent)


_kept: dict[str, Any] = {}


def _any_manifest(rng: Rng) -> bytes:
    """Makes a manifest with arbitrary content under a right seal."""
    from vqdeploy.sealed import sealed, unsealed

    if "manifest" not in _kept:
        _kept["manifest"] = unsealed(_bundle()[0])
    try:
        return sealed(_twisted(_kept["manifest"], rng, VALUES))
    except (ValueError, RecursionError):  # JSON cannot encode this
        return b"{"


def _oracle(path: Path) -> object:
    from vqdeploy.bundle import Oracle
    from vqref.host.files import read_bytes

    return Oracle.from_bytes(read_bytes(path), str(path))


def _state() -> dict[str, Any]:
    """Makes the content of a snapshot after the first step."""
    import torch

    from vqtrain.options import TrainingOptions
    from vqtrain.run.metrics import Meter
    from vqtrain.run.snapshot import RunState, course_of
    from vqtrain.run.start import start_model
    from vqtrain.run.step import make_optimizer

    spec, options, cpu = _model().spec, TrainingOptions(), torch.device("cpu")
    model = start_model(spec, options, np.zeros((4, *spec.image_shape), np.uint8), cpu)
    optimizer = make_optimizer(model, options)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    generator, meter = torch.Generator(), Meter(spec, cpu)
    meter.count, meter.hits[0] = 4, 4 * spec.latent_size
    state = RunState(model, optimizer, generator, meter, generator.get_state(), step=1)
    return {"course": course_of(spec, options, {}, "0" * 64), **state.to_plain()}


def _sealed(payload: bytes) -> bytes:
    from vqtrain.run.snapshot import MAGIC

    return MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload


def _payloads() -> list[bytes]:
    return [_saved(_state())]


def _snapshots() -> list[bytes]:
    return [_sealed(payload) for payload in _payloads()]


def _any_snapshot(rng: Rng) -> bytes:
    if "state" not in _kept:
        _kept["state"] = _state()
    return _sealed(_saved(_twisted(_kept["state"], rng, (*VALUES, *_odd_tensors()))))


def _snapshot(path: Path) -> None:
    from vqtrain.run.fitting import require_course, require_fitting
    from vqtrain.run.snapshot import load_state

    state = load_state(path)
    require_course(state)
    require_fitting(state, _model().spec, "adam")


def _npys() -> list[bytes]:
    return [_npy(array) for array in _images()]


def _npzs() -> list[bytes]:
    return [_npz(images=array) for array in _images()]


def _any_npz(name: str) -> Callable[[Rng], bytes]:
    return lambda rng: _zipped(name)(_any_npy(rng))


def _index_npy() -> list[bytes]:
    return [_npy(np.zeros((2, 2), np.uint8))]


ARRAY, INDICES = "images.npy", "indices.npy"

READERS = {
    "npy": Reader("x.npy", _load, _npys, make=_any_npy),
    "npz": Reader("x.npz", _load, _npzs, _npys, _zipped(ARRAY), _any_npz(ARRAY)),
    "idx": Reader("x", _load, _idx),
    "idx.gz": Reader("x.gz", _load, lambda: [_packed(_idx()[0])], _idx, _packed),
    "png": Reader(
        "x.png",
        _load_folder,
        _pictures("PNG", modes="I;16 RGBA LA P 1"),
        _pictures("PNG", {"dpi": (9, 9)}, {"save_all": True}, modes="I;16 RGBA LA P 1"),
        _png_mended,
    ),
    "jpeg": Reader(
        "x.jpg", _load_folder, _pictures("JPEG", {}, {"progressive": True}, modes="CMYK")
    ),
    "gif": Reader("x.gif", _load_folder, _pictures("GIF", {}, {"save_all": True}, modes="P")),
    "webp": Reader(
        "x.webp",
        _load_folder,
        _pictures("WEBP", {}, {"lossless": True}, {"save_all": True}, modes="RGBA"),
    ),
    "tiff": Reader(
        "x.tif",
        _load_folder,
        _pictures(
            "TIFF",
            {},
            {"save_all": True},
            *({"compression": c} for c in ("tiff_lzw", "tiff_deflate", "packbits")),
            modes="I;16 RGBA LA P 1 CMYK",
        ),
    ),
    "tiff of jpeg": Reader("x.tif", _load_folder, _pictures("TIFF", {"compression": "jpeg"})),
    "bmp": Reader("x.bmp", _load_folder, _pictures("BMP", modes="P 1")),
    "ppm": Reader("x.ppm", _load_folder, _pictures("PPM", modes="I;16 1")),
    "tga": Reader(
        "x.tga", _load_folder, _pictures("TGA", {}, {"compression": "tga_rle"}, modes="RGBA LA P")
    ),
    "jpeg2000": Reader("x.jp2", _load_folder, _pictures("JPEG2000", modes="I;16 RGBA LA")),
    "tokens npy": Reader("t.npy", _indices, _tokens(".npy"), make=_any_npy),
    "tokens npz": Reader(
        "t.npz", _indices, _tokens(".npz"), _index_npy, _zipped(INDICES), _any_npz(INDICES)
    ),
    "tokens parquet": Reader("t.parquet", _indices, _tokens(".parquet")),
    "parameters npz": Reader("p.npz", _source, _parameters_npz, make=_any_parameters),
    "safetensors": Reader(
        "p.safetensors", _source, _safetensors, _safetensors, _safetensors_mended, _any_safetensors
    ),
    "options": Reader("o.toml", _options, lambda: [TOML], make=_any_toml),
    "model": Reader("m.pt", _source, _models, make=_any_model),
    "manifest": Reader("manifest.json", _manifest, lambda: _bundle()[:1], make=_any_manifest),
    "oracle": Reader("o.npz", _oracle, lambda: _bundle()[1:], _npys, _zipped("golden/images.npy")),
    "snapshot": Reader("s.state", _snapshot, _snapshots, _payloads, _sealed, _any_snapshot),
}
"""Every reader of files from outside, by what it reads."""


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--count", type=int, default=5000, help="inputs per reader (%(default)s)")
    options.add_argument("--seed", type=int, default=0, help="of the inputs (%(default)s)")
    options.add_argument("--readers", nargs="+", choices=list(READERS), help="not all of them")
    arguments = options.parse_args()
    record = Record(arguments)
    past = 0
    for name in arguments.readers or READERS:
        found = _in_a_process(name, arguments.count, arguments.seed)
        record.say(
            f"{name}: {found.inputs} inputs, {found.refused} refused, slowest "
            f"{found.slowest:.2f} s, {found.grown / 2**20:.0f} MiB more, {len(found.past)} got past"
        )
        for line in found.past[:10]:
            record.say(f"  {line}")
        record.figures[name] = asdict(found)
        past += len(found.past)
    record.write()
    return 1 if past else 0


if __name__ == "__main__":
    sys.exit(main())
