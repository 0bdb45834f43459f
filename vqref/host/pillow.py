"""Pillow, which the rest of the folder asks for here."""

from __future__ import annotations

import ctypes
import logging
from contextlib import suppress
from functools import cache
from typing import Any

from vqref.host.extras import missing


@cache
def pillow() -> Any:
    """Pillow's Image module, whose remarks on damaged pictures go nowhere. Raises MachineError if
    it is not installed."""
    try:
        from PIL import Image, _imaging
    except ModuleNotFoundError as error:
        raise missing(error) or error from None
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    with suppress(
        OSError, AttributeError
    ):  # libtiff, if it can be reached, writes to stderr itself
        libraries = ctypes.CDLL(_imaging.__file__)
        libraries.TIFFSetErrorHandler(None)
        libraries.TIFFSetWarningHandler(None)
    return Image
