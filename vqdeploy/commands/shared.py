"""What the commands that run a bundle have in common."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqdeploy.codec import Codec
from vqdeploy.runtime.sessions import DEVICES, quiet
from vqdeploy.tokens import PARTS, Images, read_images
from vqref.errors import InputError, UsageError
from vqref.host.commandline import option, positive, whole
from vqref.host.files import require_writable
from vqref.preprocessing import Preprocessing
from vqref.spec import ModelSpec
from vqref.validation import Array

MOST_VALUES = 2**26
"""The most values, N·C·H·W, that the images of one picture or one measured batch may have."""

MOST_THREADS = 1024
"""The most threads that ``--threads`` takes."""


@dataclass(frozen=True, kw_only=True)
class BundleOptions:
    """Which bundle to run, and on what."""

    bundle: Path = option(type=Path, help="the folder that export wrote")
    device: str = option(
        "--device", default="auto", choices=DEVICES, help="where to run the graphs"
    )
    threads: int | None = option(
        "--threads",
        default=None,
        type=whole(1, MOST_THREADS),
        metavar="N",
        help="CPU threads per operator (default: onnxruntime's choice)",
    )


def limit_option(default: str) -> Any:
    """Returns the option --limit. default: says what the command takes without it."""
    return option(
        "--limit",
        default=None,
        type=positive,
        metavar="N",
        help=f"take at most the first N images (default: {default})",
    )


@dataclass(frozen=True, kw_only=True)
class PicturesOptions:
    """Which images to take from a file or a folder."""

    part: str = option(
        "--part",
        default=PARTS[0],
        choices=PARTS,
        help="which images to take from a folder of the official files",
    )
    recursive: bool = option(
        "--recursive",
        default=False,
        action="store_true",
        help="also read the pictures in subfolders",
    )
    skip_bad: bool = option(
        "--skip-bad",
        default=False,
        action="store_true",
        help="skip pictures that cannot be read, and name them",
    )
    limit: int | None = limit_option("all")

    def read(
        self,
        path: Path,
        spec: ModelSpec,
        preprocessing: Preprocessing | None,
        limit: int | None = None,
    ) -> Images:
        """Returns the images for a model, at most ``limit`` unless the user gave --limit.

        Raises InputError, MachineError.
        """
        return read_images(
            path,
            spec,
            preprocessing,
            part=self.part,
            recursive=self.recursive,
            skip_bad=self.skip_bad,
            limit=self.limit or limit,
        )

    def require_unused(self) -> None:
        """Raises UsageError if one of these options was given without --data."""
        for field in dataclasses.fields(PicturesOptions):
            if getattr(self, field.name) != field.default:
                flag = "--" + field.name.replace("_", "-")
                raise UsageError(f"{flag} says how to read --data, but there is no --data")


def require_room(option: str, count: int, spec: ModelSpec) -> None:
    """Raises UsageError that names the option if ``count`` images exceed MOST_VALUES."""
    most = MOST_VALUES // math.prod(spec.image_shape)
    if count > most:
        raise UsageError(
            f"{option} is {count}; for images {spec.image_shape} it must be at most {most}"
        )


@contextmanager
def opened(
    options: BundleOptions, output: Path, require: Callable[[Path], None] = require_writable
) -> Iterator[Codec]:
    """Opens the bundle's Codec after ``require`` has checked that ``output`` can be written."""
    require(output)
    quiet()
    codec = Codec.load(options.bundle, options.device, intra_op_num_threads=options.threads)
    with codec:
        yield codec


def draw(path: Path, images: Array) -> None:
    """Writes a sheet of images (N, C, H, W). Raises InputError if there are none, or too many."""
    from vqref.host.sheets import save_square

    if not len(images):
        raise InputError(f"{path}: no images to draw")
    if images.size > MOST_VALUES:
        raise InputError(f"{path}: {len(images)} images are too many for a picture; write .npz")
    save_square(path, images)
