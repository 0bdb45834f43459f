"""A certificate: what was compared, on what machine and with what settings, what was found, and
what would refute it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vqdeploy.bundle import MANIFEST, Bundle
from vqdeploy.runtime.sessions import PROVIDERS
from vqdeploy.verify import Verified
from vqref.host.files import write_file
from vqref.host.machine import describe_machine

CERTIFICATE = "certificate.json"
"""Its name in a bundle; the manifest does not list it, for it speaks of the manifest."""

FORMAT, FORMAT_VERSION = "vqdeploy-certificate", 1

REFUTED_BY = (
    "one latent whose certified index (docs/agreement.md) this provider answers otherwise, or one "
    "value beyond its tolerance, on files of these digests, with this machine and these versions; "
    "other machines are not spoken of"
)


def write_certificate(
    path: Path, bundle: Bundle, found: Verified, compared: Mapping[str, Any]
) -> None:
    """Writes the certificate of a ``verify`` of ``bundle``. Raises OSError.

    compared: what it was verified on, plain data.
    """
    digest = hashlib.sha256((bundle.path / MANIFEST).read_bytes()).hexdigest()
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "manifest_sha256": digest,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(("portable-vqvae", "numpy", "onnxruntime-gpu", "onnxruntime")),
        "device": found.device,
        "providers": list(PROVIDERS[found.device]),
        "placement": found.placement,
        "precision": {
            "graphs": bundle.precision,
            "distances": "float32, direct form",
            "tf32": found.device == "cuda" and bundle.precision == "float16",
        },
        "compared": dict(compared),
        "verdict": "verified" if found.report.passed else "refuted",
        "refuted_by": REFUTED_BY,
        "report": found.report.to_dict(),
    }
    write_file(path, (json.dumps(content, indent=2) + "\n").encode())
