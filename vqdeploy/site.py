"""Writes the page: a static site that runs a bundle in a browser, with onnxruntime-web."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import vqref
from vqdeploy.bundle import MANIFEST, Bundle, Oracle
from vqdeploy.card import tell_pictures
from vqdeploy.proof.elsewhere import golden_checks, prior_check
from vqdeploy.stages import STAGES
from vqref.agreement.parity import tolerance
from vqref.errors import InputError, MachineError
from vqref.host.colours import code_colours
from vqref.host.files import publish_folder, read_bytes, require_new_folder
from vqref.host.streams import plain
from vqref.preprocessing import CHANNELS
from vqref.spec import CODEBOOK, EMA_COUNT, ModelSpec
from vqref.validation import Array, Params

SOURCE = Path(__file__).parent / "page"
"""The page's own files. ``package.json`` says which onnxruntime-web they were tested with."""

SHOWN = (".html", ".css", ".js", ".svg")
"""The endings of the files in SOURCE that a browser loads."""

LIBRARY = "onnxruntime-web"

RUNTIME = {"ort.js": "ort.wasm.bundle.min.mjs", "ort.wasm": "ort-wasm-simd-threaded.wasm"}
"""The files of LIBRARY's folder ``dist`` that the page needs, under names that every web server
sends with the right type."""

FACTS, FORMAT = "data/page.json", "vqdeploy-page"
"""The file of facts that are not in the manifest, and its ``format``, which marks a folder as a
page."""


def write_page(bundle: Bundle, output: Path, runtime: Path | None, *, replace: bool) -> int:
    """Writes the page of a bundle to the folder ``output``, and returns its size in bytes.

    runtime: the folder of LIBRARY, or its ``dist``; None to fetch LIBRARY with npm. replace:
    whether to replace an ``output`` that is a page or an empty folder.

    Raises InputError for a damaged bundle, a ``runtime`` that lacks the files, and an ``output``
    that exists and may not be replaced. Raises MachineError if npm fails, and OSError.
    """
    require_new_folder(output, replace=replace)
    if output.exists() and any(output.iterdir()) and not is_page(output):
        raise InputError(f"{output}: not replaced: it is not a page")
    files = {path.name: read_bytes(path) for path in SOURCE.iterdir() if path.suffix in SHOWN}
    files |= _model(bundle) | _data(bundle)
    files |= {f"runtime/{name}": content for name, content in _runtime(runtime).items()}
    publish_folder(output, files, replace=replace)
    return sum(map(len, files.values()))


def is_page(folder: Path) -> bool:
    """Returns whether a folder holds a page."""
    try:
        return bool(json.loads(read_bytes(folder / FACTS)).get("format") == FORMAT)
    except (InputError, ValueError, AttributeError):
        return False


def _model(bundle: Bundle) -> dict[str, bytes]:
    """Returns the manifest and the graphs that the page runs, unchanged, by file name."""
    stages = (*STAGES, *(["prior_step"] if bundle.prior else []))
    graphs = {f"model/{stage}.onnx": bundle.graph(stage) for stage in stages}
    return {f"model/{MANIFEST}": bundle.content, **graphs}


def _data(bundle: Bundle) -> dict[str, bytes]:
    """Returns the page's arrays, facts and checks, by file name.

    The facts say in words how pictures are prepared, and give each code a colour. The checks say
    which answers to the golden batch are right.
    """
    spec, oracle = bundle.spec, bundle.oracle()
    checks = golden_checks(spec, oracle, bundle.precision, folded=bundle.folded)
    arrays = _arrays(spec, oracle)
    if bundle.prior is not None:
        check, walked = prior_check(bundle.prior, oracle)
        checks.append(check)
        arrays |= walked
    likely = tolerance("log_probabilities", "float32")
    facts = {
        "format": FORMAT,
        "bundle": bundle.sha256,
        "pictures": tell_pictures(bundle.preprocessing, spec.image_shape),
        "drawable": spec.image_shape[0] in CHANNELS,
        "colours": _colours(oracle.params),
        "log_probabilities": {"relative": likely.relative, "floor": likely.floor},
    }
    files = {f"data/{name}.npy": _npy(array) for name, array in arrays.items()}
    return {**files, FACTS: _json(facts), "data/checks.json": _json(checks)}


def _arrays(spec: ModelSpec, oracle: Oracle) -> dict[str, Array]:
    """Returns the codebook, the golden batch, and ``start``, the image that the page shows first.

    ``start`` is uint8 (C, H, W). The learned prior draws it if there is one.
    """
    names = ("images", "latents", "indices", "outputs", "reconstructions")
    golden, codebook = {name: oracle.golden[name] for name in names}, oracle.params[CODEBOOK]
    start = golden["images"][0]
    if oracle.golden_prior:
        drawn = codebook[oracle.golden_prior["indices"][:1]]
        start = vqref.reconstruct(spec, vqref.decode(spec, oracle.params, drawn))[0]
    levels = np.rint(255 * start).astype(np.uint8)
    return {"codebook": codebook, **golden, "start": levels}


def _colours(params: Params) -> list[str]:
    """Returns the colour of each code, as "#rrggbb"."""
    hits = np.round(np.asarray(params[EMA_COUNT], np.float64), 2)
    colours = code_colours(np.asarray(params[CODEBOOK]), hits if hits.any() else hits + 1)
    levels = np.rint(255 * colours).astype(np.uint8)
    return ["#" + bytes(row).hex() for row in levels]


def _json(content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


def _npy(array: Array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def _runtime(folder: Path | None) -> dict[str, bytes]:
    """Returns the files of RUNTIME. Raises InputError, MachineError."""
    if folder is None:
        return _fetched()
    inner = folder / "dist"
    place = inner if inner.is_dir() else folder
    return {name: read_bytes(place / own) for name, own in RUNTIME.items()}


def _fetched() -> dict[str, bytes]:
    """Fetches the files of RUNTIME with npm, in the version that ``package.json`` names.

    npm checks what it downloads. Raises MachineError.
    """
    wanted: Mapping[str, str] = json.loads((SOURCE / "package.json").read_bytes())["dependencies"]
    advice = f"or name a folder with it: --runtime node_modules/{LIBRARY}"
    with tempfile.TemporaryDirectory() as place:
        words = ["npm", "pack", f"{LIBRARY}@{wanted[LIBRARY]}", "--pack-destination", place]
        try:
            done = subprocess.run(words, capture_output=True, text=True, check=False)
        except OSError:
            raise MachineError(
                f"npm, which fetches {LIBRARY}, is not installed; {advice}"
            ) from None
        packed = [*Path(place).glob("*.tgz")]
        if done.returncode != 0 or not packed:
            reason = plain((done.stderr.strip().splitlines() or ["no reason given"])[0])
            raise MachineError(f"npm cannot fetch {LIBRARY}: {reason}; {advice}")
        with tarfile.open(packed[0]) as package:
            return {name: _member(package, f"package/dist/{own}") for name, own in RUNTIME.items()}


def _member(package: tarfile.TarFile, name: str) -> bytes:
    file = package.extractfile(name)
    assert file is not None
    return file.read()
