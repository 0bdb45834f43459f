"""The one place from which the modules of this folder get Pillow."""

from __future__ import annotations

import ctypes
import logging
from contextlib import suppress
from functools import cache
from typing import Any

from vqref.host.extras import missing


@cache
def pillow() -> Any:
    """Returns Pillow's Image module and silences its remarks on damaged pictures.

    Raises MachineError if Pillow is not installed.
    """
    try:
        from PIL import Image, _imaging
    except ModuleNotFoundError as error:
        raise missing(error) or error from None
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    # libtiff writes to stderr itself; it cannot always be reached
    with suppress(OSError, AttributeError):
        libraries = ctypes.CDLL(_imaging.__file__)
        libraries.TIFFSetErrorHandler(None)
        libraries.TIFFSetWarningHandler(None)
    return Image
