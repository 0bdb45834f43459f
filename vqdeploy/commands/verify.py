"""``vqdeploy verify``: checks a bundle against the oracle that it carries."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from vqdeploy.commands.shared import BundleOptions, PicturesOptions, limit_option
from vqref.errors import ExitCode
from vqref.host.commandline import Command, count, option
from vqref.validation import Array

if TYPE_CHECKING:
    from vqdeploy.bundle import Bundle
    from vqdeploy.verify import Verified


MOST_IMAGES, SECONDS = 1000, 60.0
"""The limits on further images without ``--limit``: their number, and the seconds that the oracle
may take."""


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(PicturesOptions, BundleOptions):
    """What to compare besides the golden batch, and where to write what was proved."""

    data: Path | None = option(
        "--data",
        default=None,
        type=Path,
        metavar="PATH",
        help="more images to compare on: a file or a folder of pictures (default: none)",
    )
    limit: int | None = limit_option(f"what the oracle can do in a minute, at most {MOST_IMAGES}")
    samples: int = option(
        "--samples",
        default=0,
        type=count,
        metavar="N",
        help="feed the quantizer N latents, drawn from the model and near its bisectors, and write "
        "a certificate",
    )
    certificate: Path | None = option(
        "--certificate",
        default=None,
        type=Path,
        metavar="FILE",
        help="file that says what was proved, and on what (default: with --samples, "
        "certificate.json in the bundle)",
    )
    html: Path | None = option(
        "--html",
        default=None,
        type=Path,
        metavar="FILE",
        help="file for a web page with what the certificate says",
    )
    manifest_sha256: str | None = option(
        "--manifest-sha256",
        default=None,
        metavar="HEX",
        help="digest that export printed, from a source you trust: refuse any other bundle",
    )
    public_key: str | None = option(
        "--public-key",
        default=None,
        metavar="KEY",
        help="minisign key, or its file: refuse a bundle without a manifest.json.minisig signed "
        "with that key",
    )
    json: bool = option("--json", default=False, action="store_true", help="print JSON")


def run(options: VerifyOptions) -> int:
    from vqdeploy.bundle import Bundle
    from vqdeploy.proof.certificate import CERTIFICATE, certify, write_certificate
    from vqdeploy.proof.signature import require_signature
    from vqdeploy.proof.webcertificate import write_page
    from vqdeploy.runtime.sessions import quiet
    from vqdeploy.verify import verify
    from vqref.host.files import require_writable

    bundle = Bundle.open(options.bundle, options.manifest_sha256)
    if options.public_key is not None:
        require_signature(bundle, options.public_key)
    certificate = options.certificate or (bundle.path / CERTIFICATE if options.samples else None)
    wanted = [path for path in (certificate, options.html) if path is not None]
    for path in wanted:
        require_writable(path)
    images, compared, said = _images(options, bundle)
    quiet()
    found = verify(bundle, options.device, images, options.samples, options.threads)
    if certificate:
        write_certificate(certificate, bundle, found, compared)
    if options.html:
        write_page(options.html, bundle, certify(bundle, found, compared))
    if options.json:
        told = {
            "bundle": str(options.bundle),
            "manifest_sha256": bundle.sha256,
            "device": found.device,
            "placement": found.placement,
            "proved": found.proved,
            "said": said,
            **found.report.to_dict(),
        }
        print(json.dumps(told, indent=2))
    else:
        for line in said:
            print(line)
        _tell(options, bundle, found, compared)
        for path in wanted:
            print(f"wrote {path}")
    return ExitCode.DONE if found.report.passed else ExitCode.PARITY


def _images(
    options: VerifyOptions, bundle: Bundle
) -> tuple[Array | None, dict[str, Any], tuple[str, ...]]:
    """Returns further images, the certificate's entries on what is compared, and remarks.

    The remarks say what was done to pictures.
    """
    from vqref.agreement.budget import images_within

    compared: dict[str, Any] = {"golden_batch": True, "images": 0, "latents": options.samples}
    if not options.data:
        options.require_unused()
        return None, compared, ()
    most = images_within(bundle.spec, MOST_IMAGES, SECONDS)
    found = options.read(options.data, bundle.spec, bundle.preprocessing, most)
    compared |= {"images": len(found.images), "images_sha256": found.sha256}
    return found.images, compared, found.said


def _tell(
    options: VerifyOptions, bundle: Bundle, found: Verified, compared: Mapping[str, Any]
) -> None:
    """Prints what was compared, the report, the verdict, and on CUDA each graph's placement."""
    also = [f"{compared[what]} {what}" for what in ("images", "latents") if compared[what]]
    print(f"{options.bundle} on {found.device}, {' and '.join(['golden batch', *also])}")
    print(f"manifest sha256 {bundle.sha256}")
    print(found.report)
    print(
        f"{found.report.codes} of {bundle.spec.num_codes} codes are tokens of the compared images"
    )
    if found.proved is not None:
        from vqref.agreement.advance import tell_proved

        print(fill(f"{found.proved['of']}: {tell_proved(found.proved)}", 80))
    if found.device == "cuda":
        for stage, providers in found.placement.items():
            print(f"{stage:<12}{'; '.join(_placed(*each) for each in providers.items())}")
    if found.report.passed:
        print("verified: what runs is what was trained")
    else:
        print("NOT verified: see the lines above")


def _placed(provider: str, operators: Mapping[str, int]) -> str:
    """Returns one provider's nodes of one graph, such as "CUDA 3: 2 Conv, 1 Relu"."""
    nodes = ", ".join(f"{count} {operator}" for operator, count in operators.items())
    return f"{provider.removesuffix('ExecutionProvider')} {sum(operators.values())}: {nodes}"


COMMAND = Command(
    "verify", "check a bundle on this machine against the oracle it carries", VerifyOptions, run
)
