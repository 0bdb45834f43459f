"""``vqdeploy reconstruct``: draws images above their reconstructions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vqdeploy.commands.shared import BundleOptions, opened
from vqref.errors import ExitCode, InputError
from vqref.host.commandline import Command, option, positive


@dataclass(frozen=True, kw_only=True)
class ReconstructOptions(BundleOptions):
    """The images, and the picture to draw."""

    images: Path = option(type=Path, help="a folder of pictures, .npz, .npy or IDX")
    output: Path = option(
        "--output", default=Path("reconstructions.png"), type=Path, metavar="FILE", help="where to"
    )
    limit: int = option("--limit", default=32, type=positive, metavar="N", help="at most N images")


def run(options: ReconstructOptions) -> int:
    from vqdeploy.tokens import read_images, require_format
    from vqref.host.pictures import save_pairs

    require_format(options.output, (".png", ".PNG"))
    with opened(options, options.output) as codec:
        images = read_images(options.images, codec.spec)[0][: options.limit]
        if not len(images):
            raise InputError(f"{options.images}: holds no images")
        save_pairs(options.output, images, codec.reconstruct(images))
        done = f"{len(images)} images on {codec.device}, each above its reconstruction"
        print(f"{done}; wrote {options.output}")
    return ExitCode.DONE


COMMAND = Command(
    "reconstruct", "a picture of images above their reconstructions", ReconstructOptions, run
)
