"""``python -m vqdeploy``: bundles from trained models, and what one does with them."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from vqref.commandline import ExitCode, Parser, count, positive, run


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the process's exit status."""
    return run("vqdeploy", command, argv)


def command(argv: Sequence[str] | None) -> int:
    arguments = build_parser().parse(argv)
    return int(arguments.run(arguments))


def build_parser() -> Parser:
    parser = Parser(prog="vqdeploy", description="Export trained VQ-VAEs to ONNX bundles, and verify and run them.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    export = commands.add_parser("export", help="model.pt to a bundle: the five graphs, verified before they are written")
    export.add_argument("model", type=Path, help="the file that vqtrain wrote")
    export.add_argument(
        "--output", type=Path, metavar="FOLDER", help="the bundle; MODEL-onnx if not given", default=argparse.SUPPRESS
    )
    export.add_argument("--replace", action="store_true", help="replace the bundle if there is one")
    export.set_defaults(run=_export)

    verify = commands.add_parser("verify", help="hold a bundle to the oracle that it carries, on this machine")
    verify.add_argument("bundle", type=Path)
    verify.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run the graphs")
    verify.add_argument(
        "--data",
        type=Path,
        metavar="PATH",
        help="further images to compare on: a file or a folder (default: none)",
        default=argparse.SUPPRESS,
    )
    verify.add_argument("--limit", type=positive, metavar="N", default=1000, help="take at most N images of --data")
    verify.add_argument(
        "--samples",
        type=count,
        metavar="N",
        default=0,
        help="feed the quantizer N latents, drawn from the model and around its bisectors, and write a certificate",
    )
    verify.add_argument(
        "--certificate",
        type=Path,
        metavar="FILE",
        help="where to write what was proved, and on what (default: certificate.json in the bundle, with --samples)",
        default=argparse.SUPPRESS,
    )
    verify.add_argument("--json", action="store_true", help="print the report as JSON")
    verify.set_defaults(run=_verify)
    return parser


def _export(arguments: argparse.Namespace) -> int:
    from vqdeploy.export import export

    model: Path = arguments.model
    output: Path = getattr(arguments, "output", model.parent / f"{model.stem or 'model'}-onnx")
    report = export(model, output, replace=arguments.replace)
    print(f"{report}\nwrote {output}; next: python -m vqdeploy verify {output}")
    return ExitCode.DONE


def _verify(arguments: argparse.Namespace) -> int:
    from vqdeploy.bundle import Bundle
    from vqdeploy.certificate import CERTIFICATE, write_certificate
    from vqdeploy.verify import verify
    from vqref.files import require_writable
    from vqref.images import as_batch, load

    bundle = Bundle.open(arguments.bundle)
    certificate: Path | None = getattr(arguments, "certificate", bundle.path / CERTIFICATE if arguments.samples else None)
    if certificate:
        require_writable(certificate)
    images, compared = None, {"golden_batch": True, "images": 0, "latents": arguments.samples}
    if hasattr(arguments, "data"):
        data = load(arguments.data)
        images = as_batch(data.train[: arguments.limit], bundle.spec.image_shape)
        compared |= {"images": len(images), "images_sha256": data.sha256}
    with warnings.catch_warnings(record=True) as remarks:
        report, device = verify(bundle, arguments.device, images, arguments.samples)
    for remark in remarks:
        print(f"vqdeploy: {remark.message}", file=sys.stderr)
    if certificate:
        write_certificate(certificate, bundle, report, device, compared)
    if arguments.json:
        print(json.dumps({"bundle": str(arguments.bundle), "device": device, **report.to_dict()}, indent=2))
    else:
        also = [f"{compared[what]} {what}" for what in ("images", "latents") if compared[what]]
        print(f"{arguments.bundle} on {device}, {' and '.join(['golden batch', *also])}")
        print(report)
        print("verified: what runs is what was trained" if report.passed else "NOT verified: see the lines above")
        if certificate:
            print(f"wrote {certificate}")
    return ExitCode.DONE if report.passed else ExitCode.PARITY


if __name__ == "__main__":
    sys.exit(main())
