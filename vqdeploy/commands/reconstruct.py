"""``vqdeploy reconstruct``: draws images above their reconstructions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vqdeploy.commands.shared import BundleOptions, PicturesOptions, limit_option, opened
from vqref.errors import ExitCode, InputError
from vqref.host.commandline import Command, option

SHOWN = 32
"""How many images a picture of pairs shows by default."""


@dataclass(frozen=True, kw_only=True)
class ReconstructOptions(PicturesOptions, BundleOptions):
    """Which images to reconstruct, and the picture to draw."""

    images: Path = option(type=Path, help="a picture, a folder of pictures, .npz, .npy or IDX")
    output: Path = option(
        "--output",
        default=Path("reconstructions.png"),
        type=Path,
        metavar="FILE",
        help="PNG to write",
    )
    limit: int | None = limit_option(str(SHOWN))


def run(options: ReconstructOptions) -> int:
    from vqdeploy.tokens import require_format
    from vqref.host.sheets import save_pairs

    require_format(options.output, (".png", ".PNG"))
    with opened(options, options.output) as codec:
        images, _, said, _ = options.read(options.images, codec.spec, codec.preprocessing, SHOWN)
        if not len(images):
            raise InputError(f"{options.images}: holds no images")
        save_pairs(options.output, images, codec.reconstruct(images))
        for line in said:
            print(line)
        done = f"{len(images)} images on {codec.device}, each above its reconstruction"
        print(f"{done}; wrote {options.output}")
    return ExitCode.DONE


COMMAND = Command("reconstruct", "draw images above their reconstructions", ReconstructOptions, run)
