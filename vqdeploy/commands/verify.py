"""``vqdeploy verify``: holds a bundle to the oracle that it carries."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqdeploy.commands.shared import BundleOptions
from vqref.errors import ExitCode
from vqref.host.commandline import Command, count, option, positive
from vqref.validation import Array

if TYPE_CHECKING:
    from vqdeploy.bundle import Bundle
    from vqdeploy.verify import Verified


MOST_IMAGES, SECONDS = 1000, 60.0
"""Of further images, unless told how many: at most so many, and what the oracle may take."""


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(BundleOptions):
    """What to compare beside the golden batch, and where to write what was proved."""

    data: Path | None = option(
        "--data",
        default=None,
        type=Path,
        metavar="PATH",
        help="further images to compare on: a file or a folder (default: none)",
    )
    limit: int | None = option(
        "--limit",
        default=None,
        type=positive,
        metavar="N",
        help="take at most N images of --data (default: as many as the oracle does in a minute, "
        "at most 1000)",
    )
    samples: int = option(
        "--samples",
        default=0,
        type=count,
        metavar="N",
        help="feed the quantizer N latents, drawn from the model and around its bisectors, and "
        "write a certificate",
    )
    certificate: Path | None = option(
        "--certificate",
        default=None,
        type=Path,
        metavar="FILE",
        help="where to write what was proved, and on what (default: certificate.json in the "
        "bundle, with --samples)",
    )
    manifest_sha256: str | None = option(
        "--manifest-sha256",
        default=None,
        metavar="HEX",
        help="what export printed, from a place that you trust: refuse any other bundle",
    )
    public_key: str | None = option(
        "--public-key",
        default=None,
        metavar="KEY",
        help="of minisign, the key or its file: refuse a bundle without a manifest.json.minisig by "
        "it",
    )
    json: bool = option("--json", default=False, action="store_true", help="print JSON")


def run(options: VerifyOptions) -> int:
    from vqdeploy.bundle import Bundle
    from vqdeploy.proof.certificate import CERTIFICATE, write_certificate
    from vqdeploy.proof.signature import require_signature
    from vqdeploy.runtime.sessions import quiet
    from vqdeploy.verify import verify
    from vqref.host.files import require_writable

    bundle = Bundle.open(options.bundle, options.manifest_sha256)
    if options.public_key is not None:
        require_signature(bundle, options.public_key)
    certificate = options.certificate or (bundle.path / CERTIFICATE if options.samples else None)
    if certificate:
        require_writable(certificate)
    images, compared = _images(options, bundle)
    quiet()
    found = verify(bundle, options.device, images, options.samples)
    if certificate:
        write_certificate(certificate, bundle, found, compared)
    if options.json:
        said = {
            "bundle": str(options.bundle),
            "manifest_sha256": bundle.sha256,
            "device": found.device,
            "placement": found.placement,
            **found.report.to_dict(),
        }
        print(json.dumps(said, indent=2))
    else:
        _tell(options, bundle, found, compared)
        if certificate:
            print(f"wrote {certificate}")
    return ExitCode.DONE if found.report.passed else ExitCode.PARITY


def _images(options: VerifyOptions, bundle: Bundle) -> tuple[Array | None, dict[str, Any]]:
    """Further images, and what a certificate says about all that is compared."""
    from vqref.agreement.budget import images_within
    from vqref.host.images import as_batch
    from vqref.host.pictures import load_any

    compared = {"golden_batch": True, "images": 0, "latents": options.samples}
    if not options.data:
        return None, compared
    data, spec = load_any(options.data), bundle.spec
    limit = options.limit or images_within(spec, MOST_IMAGES, SECONDS)
    images = as_batch(data.train[:limit], spec.image_shape)
    return images, {**compared, "images": len(images), "images_sha256": data.sha256}


def _tell(
    options: VerifyOptions, bundle: Bundle, found: Verified, compared: Mapping[str, Any]
) -> None:
    """Prints what was compared, the report, on CUDA each graph's placement, and the verdict."""
    also = [f"{compared[what]} {what}" for what in ("images", "latents") if compared[what]]
    print(f"{options.bundle} on {found.device}, {' and '.join(['golden batch', *also])}")
    print(f"manifest sha256 {bundle.sha256}")
    print(found.report)
    print(
        f"{found.report.codes} of {bundle.spec.num_codes} codes are tokens of the compared images"
    )
    if found.device == "cuda":
        for stage, providers in found.placement.items():
            print(f"{stage:<12}{'; '.join(_placed(*each) for each in providers.items())}")
    if found.report.passed:
        print("verified: what runs is what was trained")
    else:
        print("NOT verified: see the lines above")


def _placed(provider: str, operators: Mapping[str, int]) -> str:
    """A provider's nodes of one graph: "CUDA 3: 2 Conv, 1 Relu"."""
    nodes = ", ".join(f"{count} {operator}" for operator, count in operators.items())
    return f"{provider.removesuffix('ExecutionProvider')} {sum(operators.values())}: {nodes}"


COMMAND = Command(
    "verify", "hold a bundle to the oracle that it carries, on this machine", VerifyOptions, run
)
