"""Writes and reads certificates.

A certificate says what was compared, on which machine and with which settings, what was found, and
what would refute it.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vqdeploy.bundle import PROVED, Bundle, require_entries
from vqdeploy.proof import advance
from vqdeploy.runtime.sessions import PROVIDERS
from vqdeploy.sealed import sealed, unsealed
from vqdeploy.verify import Verified
from vqref.errors import InputError
from vqref.host.files import read_bytes, write_file
from vqref.host.machine import describe_machine

CERTIFICATE = "certificate.json"
"""The certificate's name in a bundle. It holds the manifest's digest, so the manifest cannot list
it."""

CERTIFICATE_BYTES = 2**24
"""The largest certificate that is read, in bytes."""

FORMAT, FORMAT_VERSION = "vqdeploy-certificate", 2

REFUTED_BY = (
    "one latent for which this provider does not give the certified index (docs/agreement.md), or "
    "one value beyond its tolerance, on files of these digests, with this machine and these "
    "versions; the certificate says nothing about other machines"
)


def certify(bundle: Bundle, found: Verified, compared: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of a certificate as plain data.

    found: the result of ``verify`` on ``bundle``. compared: what it was verified on, plain data.
    """
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "manifest_sha256": bundle.sha256,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(("portable-vqvae", "numpy", "onnxruntime-gpu", "onnxruntime")),
        "device": found.device,
        "providers": list(PROVIDERS.get(found.device, ())),
        "placement": found.placement,
        "precision": {
            "graphs": bundle.precision,
            "distances": "float32, direct form",
            "tf32": found.device == "cuda" and bundle.precision == "float16",
        },
        "compared": dict(compared),
        "verdict": "verified" if found.report.passed else "refuted",
        "refuted_by": REFUTED_BY,
        "proved": found.proved and {**found.proved, "refuted_by": advance.REFUTED_BY},
        "report": found.report.to_dict(),
    }


def write_certificate(
    path: Path, bundle: Bundle, found: Verified, compared: Mapping[str, Any]
) -> None:
    """Writes what ``certify`` returns, sealed. Raises OSError."""
    write_file(path, sealed(certify(bundle, found, compared)))


def read_certificate(path: Path) -> dict[str, Any]:
    """Returns the content of a certificate. Raises InputError if it is damaged or another file."""
    try:
        content = unsealed(read_bytes(path, CERTIFICATE_BYTES))
        if (content.get("format"), content.get("format_version")) != (FORMAT, FORMAT_VERSION):
            raise ValueError(f"not a certificate of version {FORMAT_VERSION}")
        _ = content["verdict"], content["date"], content["manifest_sha256"]
        if content.get("proved") is not None:
            require_entries(content, PROVED)
    except KeyError as error:
        raise InputError(f"{path}: lacks {error}") from None
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    return content
