"""What the commands that run a bundle have in common."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vqdeploy.codec import Codec
from vqdeploy.runtime.sessions import DEVICES, quiet
from vqref.errors import InputError, UsageError
from vqref.host.commandline import option
from vqref.host.files import require_writable
from vqref.spec import ModelSpec
from vqref.validation import Array

MOST_VALUES = 2**26
"""The most values, N·C·H·W, of the images that a picture or a batch to measure holds."""


@dataclass(frozen=True, kw_only=True)
class BundleOptions:
    """A bundle and the device on which it runs."""

    bundle: Path = option(type=Path, help="the folder that export wrote")
    device: str = option(
        "--device", default="auto", choices=DEVICES, help="where to run the graphs"
    )


def require_room(option: str, count: int, spec: ModelSpec) -> None:
    """Raises UsageError that names the option if ``count`` images are more than MOST_VALUES."""
    most = MOST_VALUES // math.prod(spec.image_shape)
    if count > most:
        raise UsageError(f"{option} is {count}; of images {spec.image_shape} at most {most} fit")


@contextmanager
def opened(options: BundleOptions, output: Path) -> Iterator[Codec]:
    """Opens the bundle's Codec, once it is known that ``output`` can be written."""
    require_writable(output)
    quiet()
    codec = Codec.load(options.bundle, options.device)
    with codec:
        yield codec


def draw(path: Path, images: Array) -> None:
    """Writes a sheet of images (N, C, H, W). Raises InputError if there are none, or too many."""
    from vqref.host.pictures import save_square

    if not len(images):
        raise InputError(f"{path}: no images to draw")
    if images.size > MOST_VALUES:
        raise InputError(f"{path}: {len(images)} images are too many for a picture; write .npz")
    save_square(path, images)
