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
import numpy.typing as npt

from vqdeploy.stages import STAGES
from vqref.commandline import InputError
from vqref.images import read_npz
from vqref.spec import ModelSpec

FORMAT = "vqdeploy-bundle"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
ORACLE = "oracle.npz"
CARD = "README.md"
FILES = (*(f"{name}.onnx" for name in STAGES), ORACLE, CARD)
"""Every file of a bundle beside the manifest, which holds their sizes and digests."""

PRECISIONS = ("float32", "float16", "int8")
"""That the networks of a bundle may have."""

FILE_BYTES = 2 * 2**30
"""The largest file that is read, protobuf's own limit."""


@dataclass(frozen=True)
class Bundle:
    """A bundle's place and its manifest, checked as far as the manifest goes; files are checked as they are read.

    manifest: the parsed ``manifest.json``. spec: the model's sizes, from it.
    """

    path: Path
    manifest: Mapping[str, Any]
    spec: ModelSpec

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Raises InputError for a folder that is not a bundle, or one of a newer format."""
        path = Path(path)
        where = path / MANIFEST
        try:
            manifest = json.loads(where.read_bytes())
        except OSError as error:
            raise InputError(f"{path}: not a bundle: {where.name}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON: {error}") from None
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise InputError(f"{where}: not the manifest of a bundle")
        version = manifest.get("format_version")
        if type(version) is not int or version < 1:
            raise InputError(f"{where}: format version is {version!r}, expected {FORMAT_VERSION}")
        if version > FORMAT_VERSION:
            raise InputError(
                f"{where}: format version {version} is newer than {FORMAT_VERSION}, the newest known; upgrade portable-vqvae"
            )
        try:
            spec = ModelSpec.from_dict(manifest["spec"])
            for name in FILES:
                size, digest = manifest["files"][name]["bytes"], manifest["files"][name]["sha256"]
                if type(size) is not int or not 0 <= size <= FILE_BYTES or len(bytes.fromhex(digest)) != 32:
                    raise ValueError(f"size or sha256 of {name} is malformed")
            if manifest["precision"] not in PRECISIONS:
                raise ValueError(f"precision is {manifest['precision']!r}, expected one of {', '.join(PRECISIONS)}")
            batch = manifest.get("batch")
            if batch is not None and (type(batch) is not int or batch < 1):
                raise ValueError(f"batch is {batch!r}, expected a size or null")
            if foreign := sorted(set(manifest["files"]) - set(FILES)):
                raise ValueError(f"names files that no bundle has: {', '.join(foreign)}")
        except (KeyError, TypeError, ValueError) as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(f"{where}: damaged: {reason}") from None
        return cls(path, manifest, spec)

    @property
    def precision(self) -> str:
        """Of the networks: one of PRECISIONS."""
        return str(self.manifest["precision"])

    @property
    def batch(self) -> int | None:
        """The one batch size that every graph takes, None where any will do."""
        batch: int | None = self.manifest.get("batch")
        return batch

    @property
    def folded(self) -> bool:
        """Whether the detokenizer is a table."""
        return self.manifest.get("detokenizer") == "table"

    def read(self, name: str) -> bytes:
        """The bytes of one of FILES, after a check of size and sha256 against the manifest. Raises InputError."""
        entry, path = self.manifest["files"][name], self.path / name
        try:
            with path.open("rb") as file:
                content = file.read(entry["bytes"] + 1)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from None
        if len(content) != entry["bytes"]:
            raise InputError(f"{path}: damaged: its size is not the {entry['bytes']} bytes of the manifest")
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise InputError(f"{path}: damaged: its sha256 is not the manifest's")
        return content

    def graph(self, name: str) -> bytes:
        """The ONNX file of one of STAGES. Raises InputError."""
        return self.read(f"{name}.onnx")

    def oracle(self) -> Oracle:
        """The parameters and the golden batch. Raises InputError."""
        return Oracle.from_bytes(self.read(ORACLE), str(self.path / ORACLE))


@dataclass(frozen=True)
class Oracle:
    """What a bundle proves itself with: the parameters, and a golden batch with the float64 oracle's answers.

    golden: images (float32), latents, indices, gap, quantized, logits, probabilities.
    """

    params: dict[str, npt.NDArray[Any]]
    golden: dict[str, npt.NDArray[Any]]

    def to_bytes(self) -> bytes:
        """An ``.npz`` whose bytes depend on the arrays alone: NumPy stamps its entries with a fixed date."""
        buffer = io.BytesIO()
        named = {f"param/{name}": array for name, array in self.params.items()}
        named |= {f"golden/{name}": array for name, array in self.golden.items()}
        np.savez(buffer, allow_pickle=False, **named)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes, name: str) -> Oracle:
        groups: dict[str, dict[str, npt.NDArray[Any]]] = {"param": {}, "golden": {}}
        try:
            for key, array in read_npz(content).items():
                group, _, own = key.partition("/")
                groups[group][own] = array
        except (ValueError, KeyError) as error:
            raise InputError(f"{name}: not an oracle file: {error}") from None
        return cls(groups["param"], groups["golden"])


def describe_files(files: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    """The manifest's entry for each file: size in bytes and sha256."""
    return {name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()}
