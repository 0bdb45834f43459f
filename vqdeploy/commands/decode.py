"""``vqdeploy decode``: turns tokens into images."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vqdeploy.commands.shared import BundleOptions, draw, opened
from vqref.errors import ExitCode, InputError
from vqref.host.commandline import Command, option
from vqref.host.files import about, is_folder, require_writable
from vqref.validation import Array

if TYPE_CHECKING:
    from vqdeploy.codec import Codec
    from vqdeploy.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class DecodeOptions(BundleOptions):
    """Which tokens to decode, and the file or folder for the images."""

    tokens: Path = option(
        type=Path, help="the file (.npz, .npy, .parquet) or the folder that encode wrote"
    )
    output: str = option(
        "--output",
        default="images.npz",
        metavar="PATH",
        help="file or folder to write: .npz, .npy, .png for one sheet, or a folder of PNGs",
    )
    force: bool = option(
        "--force",
        default=False,
        action="store_true",
        help="also decode tokens of another bundle",
    )


def run(options: DecodeOptions) -> int:
    from vqdeploy.archives import read_archive
    from vqdeploy.pictures import require_free, write_pictures, write_reconstructions
    from vqdeploy.tokens import read_tokens, require_format

    output = Path(options.output)
    folder = options.output.endswith(("/", os.sep)) or is_folder(output) or not output.suffix
    if not folder:
        require_format(output, (".npz", ".npy", ".png"))
    with opened(options, output, require_free if folder else require_writable) as codec:
        read = read_archive if is_folder(options.tokens) else read_tokens
        tokens = read(options.tokens)
        with about(options.tokens):
            remark = tokens.require(codec, force=options.force)
        if remark:
            print(f"{options.tokens}: {remark}")
        images = _decoded(options.tokens, codec, tokens, uint8=folder)
        if folder:
            write_pictures(output, images, tokens.names)
        elif output.suffix == ".png":
            draw(output, images)
        else:
            write_reconstructions(output, images, tokens.names)
        print(f"{len(images)} images on {codec.device}; wrote {options.output}")
    return ExitCode.DONE


def _decoded(path: Path, codec: Codec, tokens: Tokens, *, uint8: bool) -> Array:
    """Returns reconstructions (N, C, H, W). Raises InputError that names the file."""
    try:
        return codec.decode(tokens.indices, uint8=uint8)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


COMMAND = Command(
    "decode",
    "turn tokens into images: .npz, .npy, one sheet or a folder of PNGs",
    DecodeOptions,
    run,
)
