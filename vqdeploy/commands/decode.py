"""``vqdeploy decode``: tokens to images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vqdeploy.commands.shared import BundleOptions, draw, opened
from vqref.errors import ExitCode, InputError
from vqref.host.commandline import Command, option


@dataclass(frozen=True, kw_only=True)
class DecodeOptions(BundleOptions):
    """The tokens, and the file for their reconstructions."""

    tokens: Path = option(type=Path, help="what encode wrote")
    output: Path = option(
        "--output", default=Path("images.npz"), type=Path, metavar="FILE", help="where to"
    )


def run(options: DecodeOptions) -> int:
    from vqdeploy.tokens import read_indices, require_format, write_reconstructions

    require_format(options.output, (".npz", ".npy", ".png"))
    with opened(options, options.output) as codec:
        indices = read_indices(options.tokens)
        try:
            reconstructions = codec.decode(indices)
        except ValueError as error:
            raise InputError(f"{options.tokens}: {error}") from None
        write = draw if options.output.suffix == ".png" else write_reconstructions
        write(options.output, reconstructions)
        print(f"{len(indices)} images on {codec.device}; wrote {options.output}")
    return ExitCode.DONE


COMMAND = Command(
    "decode",
    "tokens to images: .npz, .npy or .parquet to .npz, .npy or a sheet, .png",
    DecodeOptions,
    run,
)
