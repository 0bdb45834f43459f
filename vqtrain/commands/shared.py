"""What the commands that read images have in common."""

from __future__ import annotations

from dataclasses import dataclass

from vqref.host.commandline import option
from vqtrain.data.sources import parse_size


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Where images come from."""

    data: str = option(
        "--data",
        default="auto",
        metavar="SOURCE",
        help="kmnist; glyphs, a generated set; auto, kmnist if it can be had, else glyphs; or a "
        "path: .npz, .npy, IDX, a folder of images or of the official files",
    )
    resize: tuple[int, int] | None = option(
        "--resize",
        default=None,
        type=parse_size,
        metavar="HxW",
        help="bring the images of a folder to this size",
    )
