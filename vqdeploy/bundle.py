"""Reads bundles, the folders that export writes. Needs only numpy."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vqdeploy.sealed import SEAL, parsed, require_seal
from vqdeploy.stages import INDEX_TYPES, PRIOR_STAGES, STAGES, ports, prior_ports, stage_of
from vqref.errors import InputError
from vqref.host.files import read_bytes
from vqref.host.images import read_npz
from vqref.precisions import PRECISIONS
from vqref.preprocessing import Preprocessing
from vqref.prior import PriorSpec
from vqref.spec import ModelSpec
from vqref.validation import Array, check_params

FORMAT = "vqdeploy-bundle"
FORMAT_VERSION = 2
MANIFEST = "manifest.json"
ORACLE = "oracle.npz"
CARD = "README.md"
FILES = (*(f"{name}.onnx" for name in STAGES), ORACLE, CARD)
"""Every file of a bundle except the manifest, which holds their sizes and digests."""

PRIOR_FILES = tuple(f"{name}.onnx" for name in PRIOR_STAGES)
"""The additional files of a bundle with a prior."""

FILE_BYTES = 2 * 2**30
"""The largest file that is read, in bytes. It is protobuf's own limit."""

MANIFEST_BYTES = 2**26
"""The largest manifest that is read, in bytes. A history of thousands of epochs is a few MiB."""

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

GOLDEN_PRIOR = {"indices": np.int64, "log_probabilities": np.float64}
"""The arrays of a prior's golden batch: tokens, and log p of each token given those before it."""


@dataclass(frozen=True)
class Bundle:
    """A bundle's path and its manifest.

    ``open`` checks the manifest; the other files are checked when they are read.

    manifest: the parsed ``manifest.json``, without its seal. spec: the model's specification, from
    the manifest. preprocessing: how to prepare pictures. content: the manifest's bytes. prior: the
    specification of the learned prior, None if there is none.
    """

    path: Path
    manifest: Mapping[str, Any]
    spec: ModelSpec
    preprocessing: Preprocessing
    content: bytes
    prior: PriorSpec | None = None

    @classmethod
    def open(cls, path: str | Path, manifest_sha256: str | None = None) -> Bundle:
        """Opens the bundle at ``path`` and checks its manifest.

        manifest_sha256: the ``sha256`` that the bundle must have, if the caller knows it.

        Raises InputError if the folder is not a bundle, the bundle is damaged or of another format
        version, or its ``sha256`` is another one.
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
            advice = "copy it again, or export its model.pt again, with --replace"
            raise InputError(f"{where}: {error}; {advice}") from None
        try:
            del manifest[SEAL]
            spec = ModelSpec.from_dict(manifest["spec"])
            prepared = Preprocessing.from_dict(manifest.get("preprocessing"), spec.image_shape)
            prior = _prior(manifest, spec)
            _require_files(manifest["files"], FILES if prior is None else FILES + PRIOR_FILES)
            _require_form(manifest, spec, prior)
            _require_facts(manifest)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(f"{where}: damaged: {reason}") from None
        return cls(path, manifest, spec, prepared, content, prior)

    @property
    def sha256(self) -> str:
        """The digest of the manifest. It identifies the bundle: the manifest holds all digests."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def precision(self) -> str:
        """The precision of the networks, a name of ``vqref.precisions.PRECISIONS``."""
        return str(self.manifest["precision"])

    @property
    def batch(self) -> int | None:
        """The only batch size that the graphs take, or None if they take any."""
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
        """Returns the bytes of one of FILES, after checking size and sha256 against the manifest.

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
        """Returns the ONNX file of one of STAGES or PRIOR_STAGES. Raises InputError."""
        return self.read(f"{name}.onnx")

    def oracle(self) -> Oracle:
        """Returns the parameters and the golden batch. Raises InputError if they do not fit."""
        found = Oracle.from_bytes(self.read(ORACLE), str(self.path / ORACLE))
        try:
            found.require(self.spec, self.prior)
        except ValueError as error:
            raise InputError(
                f"{self.path / ORACLE}: the oracle file does not fit the manifest: {error}"
            ) from None
        return found


def read_manifest(path: Path) -> dict[str, Any]:
    """Returns the manifest of the bundle at ``path``, of any version, sealed or not.

    Raises InputError.
    """
    return _parsed(path / MANIFEST, _manifest_bytes(path))


def describe_files(files: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    """Returns the manifest's entry for each file: size in bytes and sha256."""
    return {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files.items()
    }


def describe_graphs(
    spec: ModelSpec,
    batch: int | None,
    index_type: str = INDEX_TYPES[0],
    prior: PriorSpec | None = None,
) -> dict[str, dict[str, Any]]:
    """Returns the manifest's entry per graph: its file, and name, dtype and shape of each port."""
    known = {name: ports(spec, batch, index_type) for name in STAGES}
    if prior is not None:
        known |= prior_ports(prior, batch, index_type)

    def described(name: str, port: str) -> dict[str, Any]:
        found = known[name][port]
        return {"name": port, "dtype": found.dtype, "shape": list(found.shape)}

    return {
        name: {
            "file": f"{name}.onnx",
            "inputs": [described(name, port) for port in stage_of(name).inputs],
            "outputs": [described(name, port) for port in stage_of(name).outputs],
        }
        for name in known
    }


def _manifest_bytes(path: Path) -> bytes:
    try:
        return read_bytes(path / MANIFEST, MANIFEST_BYTES)
    except InputError as error:
        raise InputError(f"{path}: not a bundle: {error}") from None


def _parsed(where: Path, content: bytes) -> dict[str, Any]:
    """Returns the entries of a manifest. Raises InputError."""
    try:
        manifest = parsed(content)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
    if manifest.get("format") != FORMAT:
        raise InputError(f"{where}: not the manifest of a bundle")
    return manifest


def _require_version(where: Path, version: Any) -> None:
    """Raises InputError with advice if the format version is another one."""
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


def _prior(manifest: Mapping[str, Any], spec: ModelSpec) -> PriorSpec | None:
    """Returns the prior that a manifest describes, if any. Raises ValueError, KeyError."""
    if "prior" not in manifest:
        return None
    require_entries(manifest, PRIOR)
    found = PriorSpec.from_dict(manifest["prior"]["spec"])
    if (found.latent_size, found.num_codes) != (spec.latent_size, spec.num_codes):
        raise ValueError("the prior's latent_size or num_codes is not the model's")
    return found


def _require_files(files: Any, names: tuple[str, ...]) -> None:
    """Raises an error unless the manifest fully describes exactly these files.

    Raises ValueError, KeyError or TypeError.
    """
    for name in names:
        size, digest = files[name]["bytes"], files[name]["sha256"]
        sized = type(size) is int and 0 <= size <= FILE_BYTES
        if not sized or len(bytes.fromhex(digest)) != 32:
            raise ValueError(f"size or sha256 of {name} is malformed")
    if foreign := sorted(set(files) - set(names)):
        raise ValueError(f"names files that no bundle has: {', '.join(foreign)}")


def _require_form(manifest: Mapping[str, Any], spec: ModelSpec, prior: PriorSpec | None) -> None:
    """Raises ValueError or KeyError if no export writes graphs of this description."""
    allowed = {
        "precision": [name for name, precision in PRECISIONS.items() if precision.exports],
        "detokenizer": ["table", "network"],
    }
    for entry, names in allowed.items():
        if manifest[entry] not in names:
            found, expected = manifest[entry], ", ".join(names)
            raise ValueError(f"{entry} is {found!r}, expected one of {expected}")
    batch = manifest["batch"]
    if batch is not None and (type(batch) is not int or batch < 1):
        raise ValueError(f"batch is {batch!r}, expected a size or null")
    known = [describe_graphs(spec, batch, dtype, prior) for dtype in INDEX_TYPES]
    if manifest["graphs"] not in known:
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
"""Other entries of a manifest and their types. A dotted name is an entry of an entry."""

PRIOR: Mapping[str, type | tuple[type, ...]] = {
    "prior": dict,
    "prior.spec": dict,
    "prior.training": dict,
    "prior.nats": (int, float),
}
"""The entries on a prior. nats: what the tokens of a held-out image cost, measured in training."""

PROVED: Mapping[str, type | tuple[type, ...]] = {
    "proved": dict,
    "proved.of": str,
    "proved.images": int,
    "proved.tokens": int,
    "proved.float32": int,
    "proved.lanes": int,
}
"""The entries on what is proved in advance. Earlier manifests lack them."""


def _require_facts(manifest: Mapping[str, Any]) -> None:
    """Raises KeyError if one of FACTS is missing, ValueError if one has another type."""
    require_entries(manifest, {**FACTS, **PROVED} if "proved" in manifest else FACTS)
    for check in manifest["agreement"]["checks"]:
        if not isinstance(check, dict) or type(check.get("violations")) is not int:
            raise ValueError("agreement.checks holds an entry that is not a check")


def require_entries(
    content: Mapping[str, Any], kinds: Mapping[str, type | tuple[type, ...]]
) -> None:
    """Raises KeyError if an entry is missing, ValueError if one has another type.

    kinds: types by dotted name, as in FACTS.
    """
    for name, kind in kinds.items():
        value: Any = content
        for part in name.split("."):
            value = value[part]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{name} is {type(value).__name__}")


GROUPS = ("param", "golden", "prior", "golden_prior")
"""The prefixes of array names in an oracle file, in the order of Oracle's fields."""


@dataclass(frozen=True)
class Oracle:
    """The content of an oracle file: parameters, and a golden batch with the oracle's answers.

    golden: arrays with the names and dtypes of GOLDEN. prior, golden_prior: the same for a prior.
    They are empty without one.
    """

    params: dict[str, Array]
    golden: dict[str, Array]
    prior: dict[str, Array] = field(default_factory=dict)
    golden_prior: dict[str, Array] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Returns an ``.npz`` whose bytes depend only on the arrays.

        NumPy gives the entries a fixed date.
        """
        buffer = io.BytesIO()
        whole = (self.params, self.golden, self.prior, self.golden_prior)
        groups = dict(zip(GROUPS, whole, strict=True))
        named = {
            f"{group}/{name}": array
            for group, arrays in groups.items()
            for name, array in arrays.items()
        }
        np.savez(buffer, allow_pickle=False, **named)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes, name: str) -> Oracle:
        """Inverts ``to_bytes``. ``name`` is the file's name, for the error message.

        Raises InputError.
        """
        groups: dict[str, dict[str, Array]] = {group: {} for group in GROUPS}
        try:
            for key, array in read_npz(content).items():
                group, _, own = key.partition("/")
                groups[group][own] = array
        except (ValueError, KeyError) as error:
            raise InputError(f"{name}: not an oracle file: {error}") from None
        return cls(*groups.values())

    def require(self, spec: ModelSpec, prior: PriorSpec | None) -> None:
        """Raises ValueError unless parameters and golden batches fit ``spec`` and the prior."""
        check_params(spec, self.params)
        self._require_prior(prior)
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
        for name, array in (*self.params.items(), *self.prior.items()):
            if array.dtype != np.float32:
                raise ValueError(f"param/{name} is {array.dtype}, expected float32")

    def _require_prior(self, spec: PriorSpec | None) -> None:
        if spec is None:
            if self.prior or self.golden_prior:
                raise ValueError("it holds a prior, but the manifest describes none")
            return
        check_params(spec, self.prior)
        indices = self.golden_prior.get("indices", np.empty(0))
        shape = (len(indices) if indices.ndim else 0, spec.latent_size)
        for name, dtype in GOLDEN_PRIOR.items():
            array = self.golden_prior.get(name)
            if array is None or array.dtype != dtype or array.shape != shape or not len(array):
                raise ValueError(f"its golden_prior/{name} is missing or not of shape {shape}")
