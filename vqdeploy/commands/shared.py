"""What the commands that run a bundle have in common."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vqdeploy.codec import Codec
from vqdeploy.runtime.sessions import DEVICES, quiet
from vqref.errors import InputError
from vqref.host.commandline import option
from vqref.host.files import require_writable
from vqref.validation import Array


@dataclass(frozen=True, kw_only=True)
class BundleOptions:
    """A bundle and the device on which it runs."""

    bundle: Path = option(type=Path, help="the folder that export wrote")
    device: str = option(
        "--device", default="auto", choices=DEVICES, help="where to run the graphs"
    )


@contextmanager
def remarks() -> Iterator[None]:
    """Prints warnings as lines on stderr, and nothing that onnxruntime would write there itself."""
    quiet()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        yield
    for remark in caught:
        print(f"vqdeploy: {remark.message}", file=sys.stderr)


@contextmanager
def opened(options: BundleOptions, output: Path) -> Iterator[Codec]:
    """Opens the bundle's Codec, once it is known that ``output`` can be written."""
    require_writable(output)
    with remarks():
        codec = Codec.load(options.bundle, options.device)
    with codec:
        yield codec


def draw(path: Path, images: Array) -> None:
    """Writes a sheet of images (N, C, H, W). Raises InputError if there are none."""
    from vqref.host.pictures import save_square

    if not len(images):
        raise InputError(f"{path}: no images to draw")
    save_square(path, images)
