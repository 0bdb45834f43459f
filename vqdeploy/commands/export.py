"""``vqdeploy export``: turns a trained model into a bundle."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vqdeploy.commands.shared import PicturesOptions, limit_option
from vqref.errors import ExitCode, UsageError
from vqref.host.commandline import Command, option, whole
from vqref.precisions import PRECISIONS
from vqref.validation import Array

if TYPE_CHECKING:
    from vqdeploy.graphs.build import GraphOptions
    from vqref.modelfile import Model

LARGEST_BATCH = 2**16
"""The largest ``--static-batch``. Every input is padded to that size, however small it is."""

EXPORTED = tuple(row.option for row in PRECISIONS.values() if row.exports)


@dataclass(frozen=True, kw_only=True)
class ExportOptions(PicturesOptions):
    """What to export, how to write its graphs, and what to measure them on."""

    model: Path | None = option(default=None, type=Path, help="the file that vqtrain wrote")
    from_params: Path | None = option(
        "--from-params",
        default=None,
        type=Path,
        metavar="FILE",
        help="export parameters under the spec's names instead: .npz or .safetensors",
    )
    output: Path | None = option(
        "--output",
        default=None,
        type=Path,
        metavar="FOLDER",
        help="the bundle to write (default: MODEL-onnx)",
    )
    replace: bool = option(
        "--replace", default=False, action="store_true", help="replace the bundle if there is one"
    )
    opset: int = option("--opset", default=18, type=int, metavar="N", help="ONNX opset, 18 to 20")
    precision: str = option(
        "--precision", default="fp32", choices=EXPORTED, help="precision of the networks"
    )
    target: str = option(
        "--target",
        default="any",
        choices=("any", "cpu"),
        help="provider that the graphs are written for; every provider runs both kinds",
    )
    index_type: str = option(
        "--index-type",
        default="int64",
        choices=("int64", "int32"),
        help="dtype of indices in the graphs; int32 is for JavaScript and TensorRT",
    )
    static_batch: int | None = option(
        "--static-batch",
        default=None,
        type=whole(1, LARGEST_BATCH),
        metavar="N",
        help=f"write graphs that take only batches of N, at most {LARGEST_BATCH}",
    )
    fold: bool | None = option(
        "--fold",
        default=None,
        action=argparse.BooleanOptionalAction,
        help="write the detokenizer as a table (default: if it has at most 65,536 entries and "
        "64 MiB)",
    )
    data: Path | None = option(
        "--data",
        default=None,
        type=Path,
        metavar="PATH",
        help="images to measure on, and to take the int8 ranges from (default: drawn from the "
        "model)",
    )
    limit: int | None = limit_option("what the oracle can do in a minute, at most 256")


def run(options: ExportOptions) -> int:
    from vqdeploy.bundle import Bundle
    from vqdeploy.export import export

    source = _source(options)
    output = options.output or source.parent / f"{source.stem or 'model'}-onnx"
    report = export(
        source,
        output,
        options=_graph_options(options),
        images=_images(options),
        replace=options.replace,
    )
    bundle = Bundle.open(output)
    print(report)
    if bundle.manifest["provenance"]["model_digest"] == "none":
        print(f"{source}: no digest: it was written elsewhere, so damage would go unnoticed")
    print(f"manifest sha256 {bundle.sha256}")
    print(f"wrote {output}; next: python -m vqdeploy verify {output}")
    return ExitCode.DONE


def _images(options: ExportOptions) -> Callable[[Model], Array] | None:
    """Returns a function that reads the images of --data for a model, or None without --data.

    The function prints what was done to the images.
    """
    from vqdeploy.proof.measure import measured_images

    data = options.data
    if data is None:
        options.require_unused()
        return None

    def read(model: Model) -> Array:
        most = measured_images(model.spec)
        found = options.read(data, model.spec, model.preprocessing, most)
        for line in found.said:
            print(line)
        return found.images

    return read


def _source(options: ExportOptions) -> Path:
    """Returns the one file to export. Raises UsageError."""
    from vqdeploy.sources import PARAMETER_FORMATS
    from vqdeploy.tokens import require_format

    named = [path for path in (options.model, options.from_params) if path]
    if len(named) != 1:
        raise UsageError("export needs either a model.pt or --from-params FILE")
    if options.from_params:
        require_format(options.from_params, PARAMETER_FORMATS)
    return named[0]


def _graph_options(options: ExportOptions) -> GraphOptions:
    """Returns how to write the graphs. Raises UsageError for values that no graph can have."""
    from vqdeploy.graphs.build import GraphOptions

    try:
        return GraphOptions(
            opset=options.opset,
            precision=options.precision,
            batch=options.static_batch,
            fold=options.fold,
            target=options.target,
            index_type=options.index_type,
        )
    except ValueError as error:
        raise UsageError(str(error)) from None


COMMAND = Command(
    "export",
    "turn a model.pt into a bundle of five graphs, verified before they are written",
    ExportOptions,
    run,
)
