"""``python -m vqdeploy``: bundles from trained models, and what one does with them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from vqref.commandline import Parser, count, positive, run

DEVICES = ("auto", "cpu", "cuda")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the process's exit status."""
    return run("vqdeploy", command, argv)


def command(argv: Sequence[str] | None) -> int:
    from vqdeploy import commands

    arguments = build_parser().parse(argv)
    chosen: Callable[[argparse.Namespace], int] = getattr(commands, arguments.command)
    return int(chosen(arguments))


def build_parser() -> Parser:
    parser = Parser(prog="vqdeploy", description="Export trained VQ-VAEs to ONNX bundles, and verify and run them.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")

    _add_export(commands)
    _add_verify(commands)

    inspect = commands.add_parser("inspect", help="what a bundle holds, its hashes checked")
    inspect.add_argument("bundle", type=Path)
    inspect.add_argument("--json", action="store_true", help="print the manifest")

    bench = _on_bundle(commands, "bench", "images and tokens a second, beside PyTorch where it is installed")
    bench.add_argument(
        "--batch", type=positive, action="append", metavar="N", help="a batch size, as often as wanted (default: 1, 16, 256)"
    )
    bench.add_argument("--seconds", type=float, default=2.0, metavar="X", help="for each direction, batch and implementation")
    bench.add_argument("--json", action="store_true", help="print the figures as JSON")

    encode = _on_bundle(commands, "encode", "images to tokens: a folder or a file to .npz, .npy or .parquet")
    encode.add_argument("images", type=Path, help="a folder of pictures, .npz, .npy or IDX")
    encode.add_argument("--output", type=Path, default=Path("tokens.npz"), metavar="FILE", help="where to")

    decode = _on_bundle(commands, "decode", "tokens to images: .npz, .npy or .parquet to .npz, .npy or a sheet, .png")
    decode.add_argument("tokens", type=Path, help="what encode wrote")
    decode.add_argument("--output", type=Path, default=Path("images.npz"), metavar="FILE", help="where to")

    reconstruct = _on_bundle(commands, "reconstruct", "a picture of images above their reconstructions")
    reconstruct.add_argument("images", type=Path, help="a folder of pictures, .npz, .npy or IDX")
    reconstruct.add_argument("--output", type=Path, default=Path("reconstructions.png"), metavar="FILE", help="where to")
    reconstruct.add_argument("--limit", type=positive, default=32, metavar="N", help="at most N images")

    sample = _on_bundle(commands, "sample", "a sheet of images of the uniform prior")
    sample.add_argument("--output", type=Path, default=Path("samples.png"), metavar="FILE", help="where to")
    sample.add_argument("--number", type=positive, default=64, metavar="N", help="how many")
    sample.add_argument("--seed", type=count, default=0, metavar="N", help="of the draw")

    doctor = commands.add_parser("doctor", help="what this machine has, and what to do about what it lacks")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    return parser


def _add_export(commands: argparse._SubParsersAction[Parser]) -> None:
    export = commands.add_parser("export", help="model.pt to a bundle: the five graphs, verified before they are written")
    export.add_argument("model", nargs="?", default=argparse.SUPPRESS, help="the file that vqtrain wrote")
    export.add_argument(
        "--from-params",
        type=Path,
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="parameters under the spec's names instead: .npz or .safetensors",
    )
    export.add_argument(
        "--output", type=Path, metavar="FOLDER", help="the bundle; MODEL-onnx if not given", default=argparse.SUPPRESS
    )
    export.add_argument("--replace", action="store_true", help="replace the bundle if there is one")
    export.add_argument("--opset", type=int, default=18, metavar="N", help="18 to 20")
    export.add_argument("--precision", choices=("fp32", "fp16", "int8"), default="fp32", help="of the networks")
    export.add_argument(
        "--symmetric-pads", action="store_true", help="kernels with zeros before them, for providers that need equal pads"
    )
    export.add_argument(
        "--target", choices=("any", "cpu"), default="any", help="provider that the graphs are written for; any runs all of them"
    )
    export.add_argument(
        "--static-batch", type=positive, metavar="N", default=argparse.SUPPRESS, help="graphs that take batches of N alone"
    )
    export.add_argument(
        "--fold",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="the detokenizer as a table (default: where it has at most 65,536 entries and 64 MiB)",
    )
    _add_images(export, "images to take int8's ranges from and to measure on (default: drawn by the model)")


def _add_verify(commands: argparse._SubParsersAction[Parser]) -> None:
    verify = _on_bundle(commands, "verify", "hold a bundle to the oracle that it carries, on this machine")
    _add_images(verify, "further images to compare on: a file or a folder (default: none)")
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


def _on_bundle(commands: argparse._SubParsersAction[Parser], name: str, what: str) -> Parser:
    """A command that runs a bundle on a device."""
    parser = commands.add_parser(name, help=what, description=what)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--device", choices=DEVICES, default="auto", help="where to run the graphs")
    return parser


def _add_images(parser: Parser, what: str) -> None:
    parser.add_argument("--data", type=Path, metavar="PATH", default=argparse.SUPPRESS, help=what)
    parser.add_argument("--limit", type=positive, metavar="N", default=1000, help="take at most N images of --data")


if __name__ == "__main__":
    sys.exit(main())
