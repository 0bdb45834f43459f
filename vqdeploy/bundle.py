"""The bundle: the folder that export makes, and everything that reads one. Needs numpy alone."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vqdeploy.sealed import SEAL, parsed, require_seal
from vqdeploy.stages import INDEX_TYPES, STAGES, ports
from vqref.errors import InputError
from vqref.host.files import read_bytes
from vqref.host.images import read_npz
from vqref.precisions import PRECISIONS
from vqref.preprocessing import Preprocessing
from vqref.spec import ModelSpec
from vqref.validation import Array, check_params

FORMAT = "vqdeploy-bundle"
FORMAT_VERSION = 2
MANIFEST = "manifest.json"
ORACLE = "oracle.npz"
CARD = "README.md"
FILES = (*(f"{name}.onnx" for name in STAGES), ORACLE, CARD)
"""Every file of a bundle but the manifest, which holds their sizes and digests."""

FILE_BYTES = 2 * 2**30
"""The largest file that is read, protobuf's own limit."""

MANIFEST_BYTES = 2**26
"""The largest manifest that is read: a history of thousands of epochs is a few MiB."""

GOLDEN = {
    "images": np.float32,
    "latents": np.float64,
    "indices": np.int64,
    "gap": np.float64,
    "quantized": np.float64,
    "outputs": np.float64,
    "reconstructions": np.float64,
}
"""The arrays of a golden batch."""


@dataclass(frozen=True)
class Bundle:
    """A bundle's place and its manifest, which is checked here; files are checked as they are read.

    manifest: the parsed ``manifest.json``, without its seal. spec: the model's specification, from
    the manifest. preprocessing: what is to be done to pictures. content: the manifest's bytes.
    """

    path: Path
    manifest: Mapping[str, Any]
    spec: ModelSpec
    preprocessing: Preprocessing
    content: bytes

    @classmethod
    def open(cls, path: str | Path, manifest_sha256: str | None = None) -> Bundle:
        """The bundle at ``path``.

        manifest_sha256: what its ``sha256`` must be, if that is known from elsewhere.
        Raises InputError for a folder that is not a bundle, a damaged one, one of another format
        version, and another one than was asked for.
        """
        path = Path(path)
        where, content = path / MANIFEST, _manifest_bytes(path)
        if manifest_sha256 is not None:
            sha256 = hashlib.sha256(content).hexdigest()
            if sha256 != manifest_sha256.strip().lower():
                raise InputError(f"{where}: its sha256 is {sha256}, not {manifest_sha256}")
        manifest = _parsed(where, content)
        _require_version(where, manifest.get("format_version"))
        try:
            require_seal(content)
        except ValueError as error:
            advice = "copy it anew, or export its model.pt again, with --replace"
            raise InputError(f"{where}: {error}; {advice}") from None
        try:
            del manifest[SEAL]
            spec = ModelSpec.from_dict(manifest["spec"])
            prepared = Preprocessing.from_dict(manifest.get("preprocessing"), spec.image_shape)
            _require_files(manifest["files"])
            _require_form(manifest, spec)
            _require_facts(manifest)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(f"{where}: damaged: {reason}") from None
        return cls(path, manifest, spec, prepared, content)

    @property
    def sha256(self) -> str:
        """The digest of the manifest, which says what bundle this is: it holds the others'."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def precision(self) -> str:
        """The precision of the networks, a name of ``vqref.precisions.PRECISIONS``."""
        return str(self.manifest["precision"])

    @property
    def batch(self) -> int | None:
        """The one batch size that every graph takes, None if they take any."""
        batch: int | None = self.manifest["batch"]
        return batch

    @property
    def index_type(self) -> str:
        """The dtype of ``indices`` in the graphs, one of ``INDEX_TYPES``."""
        return str(self.manifest["graphs"]["tokenizer"]["outputs"][0]["dtype"])

    @property
    def folded(self) -> bool:
        """Whether the detokenizer is a table."""
        return bool(self.manifest["detokenizer"] == "table")

    def read(self, name: str) -> bytes:
        """The bytes of one of FILES, after a check of size and sha256 against the manifest.

        Raises InputError.
        """
        entry, path = self.manifest["files"][name], self.path / name
        content = read_bytes(path, FILE_BYTES)
        if len(content) != entry["bytes"]:
            raise InputError(
                f"{path}: damaged: its size is not the {entry['bytes']} bytes of the manifest"
            )
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise InputError(f"{path}: damaged: its sha256 is not the manifest's")
        return content

    def graph(self, name: str) -> bytes:
        """The ONNX file of one of STAGES. Raises InputError."""
        return self.read(f"{name}.onnx")

    def oracle(self) -> Oracle:
        """The parameters and the golden batch, which fit ``spec``. Raises InputError."""
        found = Oracle.from_bytes(self.read(ORACLE), str(self.path / ORACLE))
        try:
            found.require(self.spec)
        except ValueError as error:
            raise InputError(
                f"{self.path / ORACLE}: the oracle file does not fit the manifest: {error}"
            ) from None
        return found


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the bundle at ``path``, of whatever version, sealed or not.

    Raises InputError.
    """
    return _parsed(path / MANIFEST, _manifest_bytes(path))


def describe_files(files: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    """The manifest's entry for each file: size in bytes and sha256."""
    return {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files.items()
    }


def describe_graphs(
    spec: ModelSpec, batch: int | None, index_type: str = INDEX_TYPES[0]
) -> dict[str, dict[str, Any]]:
    """The manifest's entry for each graph: its file, and name, dtype and shape of each port."""
    arrays = {
        name: {"name": name, "dtype": port.dtype, "shape": list(port.shape)}
        for name, port in ports(spec, batch, index_type).items()
    }
    return {
        name: {
            "file": f"{name}.onnx",
            "inputs": [arrays[port] for port in stage.inputs],
            "outputs": [arrays[port] for port in stage.outputs],
        }
        for name, stage in STAGES.items()
    }


def _manifest_bytes(path: Path) -> bytes:
    try:
        return read_bytes(path / MANIFEST, MANIFEST_BYTES)
    except InputError as error:
        raise InputError(f"{path}: not a bundle: {error}") from None


def _parsed(where: Path, content: bytes) -> dict[str, Any]:
    """The entries of a manifest. Raises InputError."""
    try:
        manifest = parsed(content)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
    if manifest.get("format") != FORMAT:
        raise InputError(f"{where}: not the manifest of a bundle")
    return manifest


def _require_version(where: Path, version: Any) -> None:
    """Raises InputError that says what to do about another format version."""
    if type(version) is not int or version < 1:
        raise InputError(f"{where}: format version is {version!r}, expected {FORMAT_VERSION}")
    if version < FORMAT_VERSION:
        raise InputError(
            f"{where}: format version {version} is no longer read; export its model.pt again, "
            "with --replace"
        )
    if version > FORMAT_VERSION:
        raise InputError(
            f"{where}: format version {version} is newer than {FORMAT_VERSION}, the newest known; "
            "upgrade portable-vqvae"
        )


def _require_files(files: Any) -> None:
    """Raises ValueError, KeyError or TypeError unless exactly FILES are described, each whole."""
    for name in FILES:
        size, digest = files[name]["bytes"], files[name]["sha256"]
        sized = type(size) is int and 0 <= size <= FILE_BYTES
        if not sized or len(bytes.fromhex(digest)) != 32:
            raise ValueError(f"size or sha256 of {name} is malformed")
    if foreign := sorted(set(files) - set(FILES)):
        raise ValueError(f"names files that no bundle has: {', '.join(foreign)}")


def _require_form(manifest: Mapping[str, Any], spec: ModelSpec) -> None:
    """Raises ValueError or KeyError for graphs that are described as no export writes them."""
    known = {
        "precision": [name for name, precision in PRECISIONS.items() if precision.exports],
        "detokenizer": ["table", "network"],
    }
    for entry, names in known.items():
        if manifest[entry] not in names:
            found, expected = manifest[entry], ", ".join(names)
            raise ValueError(f"{entry} is {found!r}, expected one of {expected}")
    batch = manifest["batch"]
    if batch is not None and (type(batch) is not int or batch < 1):
        raise ValueError(f"batch is {batch!r}, expected a size or null")
    if manifest["graphs"] not in [describe_graphs(spec, batch, dtype) for dtype in INDEX_TYPES]:
        raise ValueError("inputs and outputs of the graphs are not those of the spec")


FACTS: Mapping[str, type | tuple[type, ...]] = {
    "opset": int,
    "graphs_version": int,
    "target": str,
    "metrics": dict,
    "training": dict,
    "provenance": dict,
    "provenance.model_sha256": str,
    "provenance.model_digest": str,
    "agreement": dict,
    "agreement.images": int,
    "agreement.provider": str,
    "agreement.checks": list,
    "measured": dict,
    "measured.images": int,
    "measured.equal_tokens": (int, float),
    "measured.nats_lost": (int, float),
    "measured.psnr_lost": (int, float),
    "kept": dict,
    "kept.tokens": int,
    "kept.equal": int,
}
"""What a manifest tells beside, a dotted name for an entry of an entry."""

PROVED: Mapping[str, type | tuple[type, ...]] = {
    "proved": dict,
    "proved.of": str,
    "proved.images": int,
    "proved.tokens": int,
    "proved.float32": int,
    "proved.lanes": int,
}
"""The same of a manifest that tells what is proved in advance; earlier ones do not."""


def _require_facts(manifest: Mapping[str, Any]) -> None:
    """Raises KeyError for one of FACTS that is missing, ValueError for one of another type."""
    require_entries(manifest, {**FACTS, **PROVED} if "proved" in manifest else FACTS)
    for check in manifest["agreement"]["checks"]:
        if not isinstance(check, dict) or type(check.get("violations")) is not int:
            raise ValueError("agreement.checks holds what is no check")


def require_entries(
    content: Mapping[str, Any], kinds: Mapping[str, type | tuple[type, ...]]
) -> None:
    """Raises KeyError for an entry that is missing, ValueError for one of another type.

    kinds: as those of FACTS.
    """
    for name, kind in kinds.items():
        value: Any = content
        for part in name.split("."):
            value = value[part]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{name} is {type(value).__name__}")


@dataclass(frozen=True)
class Oracle:
    """What a bundle proves itself with: parameters, and a golden batch with the oracle's answers.

    golden: arrays by the names and dtypes of GOLDEN.
    """

    params: dict[str, Array]
    golden: dict[str, Array]

    def to_bytes(self) -> bytes:
        """An ``.npz`` whose bytes depend on the arrays alone: NumPy gives entries a fixed date."""
        buffer = io.BytesIO()
        named = {f"param/{name}": array for name, array in self.params.items()}
        named |= {f"golden/{name}": array for name, array in self.golden.items()}
        np.savez(buffer, allow_pickle=False, **named)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes, name: str) -> Oracle:
        """The inverse of ``to_bytes``; ``name`` is the file's, for the error.

        Raises InputError.
        """
        groups: dict[str, dict[str, Array]] = {"param": {}, "golden": {}}
        try:
            for key, array in read_npz(content).items():
                group, _, own = key.partition("/")
                groups[group][own] = array
        except (ValueError, KeyError) as error:
            raise InputError(f"{name}: not an oracle file: {error}") from None
        return cls(groups["param"], groups["golden"])

    def require(self, spec: ModelSpec) -> None:
        """Raises ValueError unless these are the parameters and a golden batch of ``spec``."""
        check_params(spec, self.params)
        if set(self.golden) != set(GOLDEN):
            raise ValueError(f"its golden arrays are {', '.join(self.golden) or '(none)'}")
        shapes = {name: port.shape[1:] for name, port in ports(spec).items()}
        shapes["gap"] = shapes["indices"]
        count = len(self.golden["images"]) if self.golden["images"].ndim else 0
        for name, dtype in GOLDEN.items():
            array, shape = self.golden[name], (count, *shapes[name])
            if array.dtype != dtype or array.shape != shape:
                found = f"{array.dtype} {array.shape}"
                raise ValueError(f"golden/{name} is {found}, expected {np.dtype(dtype)} {shape}")
        for name, array in self.params.items():
            if array.dtype != np.float32:
                raise ValueError(f"param/{name} is {array.dtype}, expected float32")
