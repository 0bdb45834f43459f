"""A certificate: what was compared, on what machine and with what settings, what was found, and what would refute it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vqdeploy.bundle import MANIFEST, Bundle
from vqdeploy.sessions import PROVIDERS
from vqref.files import write_file
from vqref.machine import describe_machine
from vqref.report import Report

CERTIFICATE = "certificate.json"
"""Its name in a bundle; the manifest does not list it, for it speaks of the manifest."""

FORMAT, FORMAT_VERSION = "vqdeploy-certificate", 1


def write_certificate(path: Path, bundle: Bundle, report: Report, device: str, compared: Mapping[str, Any]) -> None:
    """Writes the certificate of a ``verify`` of ``bundle`` on ``device``. Raises OSError."""
    digest = hashlib.sha256((bundle.path / MANIFEST).read_bytes()).hexdigest()
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "manifest_sha256": digest,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(("portable-vqvae", "numpy", "onnxruntime-gpu", "onnxruntime")),
        "device": device,
        "providers": PROVIDERS[device],
        "precision": {"graphs": bundle.manifest["precision"], "distances": "float32, direct form", "tf32": False},
        "compared": dict(compared),
        "verdict": "verified" if report.passed else "refuted",
        "refuted_by": (
            "one latent whose certified index (docs/agreement.md) this provider answers otherwise, or one value beyond its "
            "tolerance, on files of these digests, with this machine and these versions; other machines are not spoken of"
        ),
        "report": report.to_dict(),
    }
    write_file(path, (json.dumps(content, indent=2) + "\n").encode())
