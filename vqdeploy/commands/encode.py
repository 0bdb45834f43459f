"""``vqdeploy encode``: images to tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vqdeploy.commands.shared import BundleOptions, opened
from vqref.errors import ExitCode
from vqref.host.commandline import Command, option


@dataclass(frozen=True, kw_only=True)
class EncodeOptions(BundleOptions):
    """The images, and the file for their tokens."""

    images: Path = option(type=Path, help="a folder of pictures, .npz, .npy or IDX")
    output: Path = option(
        "--output", default=Path("tokens.npz"), type=Path, metavar="FILE", help="where to"
    )


def run(options: EncodeOptions) -> int:
    from vqdeploy.tokens import TOKEN_FORMATS, read_images, require_format, write_indices

    require_format(options.output, TOKEN_FORMATS)
    with opened(options, options.output) as codec:
        images, names = read_images(options.images, codec.spec)
        indices = codec.encode(images)
        write_indices(options.output, indices, names, codec.spec)
        used = len(set(indices.ravel().tolist()))
        tokens = f"{indices.size} tokens, {used} different"
        print(f"{len(images)} images on {codec.device}: {tokens}; wrote {options.output}")
    return ExitCode.DONE


COMMAND = Command(
    "encode",
    "images to tokens: a folder or a file to .npz, .npy or .parquet",
    EncodeOptions,
    run,
)
