"""``vqdeploy encode``: images to tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vqdeploy.commands.shared import BundleOptions, PicturesOptions, opened
from vqref.errors import ExitCode
from vqref.host.commandline import Command, option


@dataclass(frozen=True, kw_only=True)
class EncodeOptions(PicturesOptions, BundleOptions):
    """The images, and the file for their tokens."""

    images: Path = option(type=Path, help="a picture, a folder of them, .npz, .npy or IDX")
    output: Path = option(
        "--output", default=Path("tokens.npz"), type=Path, metavar="FILE", help="where to"
    )


def run(options: EncodeOptions) -> int:
    from vqdeploy.tokens import TOKEN_FORMATS, Tokens, require_format, write_tokens

    require_format(options.output, TOKEN_FORMATS)
    with opened(options, options.output) as codec:
        found = options.read(options.images, codec.spec, codec.preprocessing)
        indices = codec.encode(found.images)
        write_tokens(options.output, Tokens.of(codec, indices, found.names))
        for line in found.said:
            print(line)
        used = len(set(indices.ravel().tolist()))
        tokens = f"{indices.size} tokens, {used} different"
        print(f"{len(indices)} images on {codec.device}: {tokens}; wrote {options.output}")
    return ExitCode.DONE


COMMAND = Command(
    "encode",
    "images to tokens: a folder or a file to .npz, .npy or .parquet",
    EncodeOptions,
    run,
)
