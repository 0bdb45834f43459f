"""The bundle: the folder that export makes, and everything that reads one. Needs numpy alone."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vqdeploy.stages import STAGES
from vqref.errors import InputError
from vqref.host.images import read_npz
from vqref.precisions import PRECISIONS
from vqref.spec import ModelSpec
from vqref.validation import Array

FORMAT = "vqdeploy-bundle"
FORMAT_VERSION = 2
MANIFEST = "manifest.json"
ORACLE = "oracle.npz"
CARD = "README.md"
FILES = (*(f"{name}.onnx" for name in STAGES), ORACLE, CARD)
"""Every file of a bundle but the manifest, which holds their sizes and digests."""

FILE_BYTES = 2 * 2**30
"""The largest file that is read, protobuf's own limit."""


@dataclass(frozen=True)
class Bundle:
    """A bundle's place and its manifest, which is checked here; files are checked as they are read.

    manifest: the parsed ``manifest.json``. spec: the model's specification, from the manifest.
    """

    path: Path
    manifest: Mapping[str, Any]
    spec: ModelSpec

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Raises InputError for a folder that is not a bundle, or one of another format version."""
        path = Path(path)
        where = path / MANIFEST
        manifest = read_manifest(path)
        _require_version(where, manifest.get("format_version"))
        try:
            _require_files(manifest["files"])
            _require_form(manifest)
            return cls(path, manifest, ModelSpec.from_dict(manifest["spec"]))
        except (KeyError, TypeError, ValueError) as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(f"{where}: damaged: {reason}") from None

    @property
    def precision(self) -> str:
        """The precision of the networks, a name of ``vqref.precisions.PRECISIONS``."""
        return str(self.manifest["precision"])

    @property
    def batch(self) -> int | None:
        """The one batch size that every graph takes, None if they take any."""
        batch: int | None = self.manifest.get("batch")
        return batch

    @property
    def folded(self) -> bool:
        """Whether the detokenizer is a table."""
        return self.manifest.get("detokenizer") == "table"

    def read(self, name: str) -> bytes:
        """The bytes of one of FILES, after a check of size and sha256 against the manifest.

        Raises InputError.
        """
        entry, path = self.manifest["files"][name], self.path / name
        try:
            with path.open("rb") as file:
                content = file.read(entry["bytes"] + 1)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from None
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
        """The parameters and the golden batch. Raises InputError."""
        return Oracle.from_bytes(self.read(ORACLE), str(self.path / ORACLE))


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the bundle at ``path``, of whatever version. Raises InputError."""
    where = path / MANIFEST
    try:
        manifest = json.loads(where.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: not a bundle: {where.name}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
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


def _require_form(manifest: Mapping[str, Any]) -> None:
    """Raises ValueError or KeyError for a precision or a batch that no bundle has."""
    known = [name for name, precision in PRECISIONS.items() if precision.exports]
    if manifest["precision"] not in known:
        raise ValueError(
            f"precision is {manifest['precision']!r}, expected one of {', '.join(known)}"
        )
    batch = manifest.get("batch")
    if batch is not None and (type(batch) is not int or batch < 1):
        raise ValueError(f"batch is {batch!r}, expected a size or null")


@dataclass(frozen=True)
class Oracle:
    """What a bundle proves itself with: parameters, and a golden batch with the oracle's answers.

    golden: images (float32), and in float64 latents, indices (int64), gap, quantized, outputs and
    reconstructions.
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


def describe_files(files: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    """The manifest's entry for each file: size in bytes and sha256."""
    return {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files.items()
    }
