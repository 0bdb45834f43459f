"""Turns one picture into the pixels of an image, and reports what was done to it.

This is Pillow's side of ``vqref.preprocessing``.
"""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqref.errors import InputError
from vqref.host.files import parsed
from vqref.host.pillow import pillow
from vqref.preprocessing import Colour
from vqref.validation import Array

FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
"""The formats that are read, by Pillow's names.

Pillow knows others, which start programs or in which nobody keeps images."""

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's modes of 8 bits, by their number of channels."""

_DEEP = re.compile(";16[BLN]")  # in the name of a layout: samples of 16 bits
_NATIVE = {"L;2": 85, "L;4": 17}  # from samples of 2 and 4 bits to levels
_PLAIN = {"1": "L", "L": "L", "LA": "LA", "La": "LA", "RGBA": "RGBA", "RGBa": "RGBA"}
_SAME = ("RGB", "RGBX", "P", "PA", *_PLAIN)  # modes that become 8 bits without a change of colours
_ORIENTATION = 0x0112

_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""How to turn a picture upright, by the orientation in its EXIF data."""


@dataclass(frozen=True)
class Done:
    """What was done to one picture.

    first: only the first of several frames was taken.
    turned: the picture was turned upright.
    deep: the highest of its 16-bit levels; only the upper 8 bits were kept. None if it has 8 bits.
    made: the mode that became RGB.
    laid: it was laid on the background, because part of it is transparent.
    grey: it was grey before it got its channels.
    resized, reshaped: it got another size, or also other proportions, by stretching or cropping.
    """

    first: bool
    turned: bool
    deep: int | None
    made: str | None
    laid: bool
    grey: bool
    resized: bool
    reshaped: bool


def pixels(
    source: Any,
    channels: int | None,
    size: tuple[int, int] | None,
    crop: bool,
    background: Colour,
) -> tuple[NDArray[np.uint8], Done]:
    """Returns a picture's pixels, (H, W) if it is grey, else (H, W, C), and what was done to it.

    source: the bytes of a file, or a Pillow image.
    channels: 1, 3 or 4. None means those of the picture itself, without its alpha.
    size, crop, background: as in ``vqref.preprocessing.Preprocessing``.

    Raises InputError, and MachineError if Pillow is not installed.
    """
    with parsed("not a readable image"):
        if not isinstance(source, bytes):
            return _pixels(source, channels, size, crop, background)
        image = pillow()
        warnings.simplefilter("error", image.DecompressionBombWarning)
        try:
            opened = image.open(io.BytesIO(source), formats=FORMATS)
        except image.UnidentifiedImageError:
            raise InputError("not a readable image: none of the formats that are read") from None
        with opened as picture:
            return _pixels(picture, channels, size, crop, background)


def _pixels(
    picture: Any,
    channels: int | None,
    size: tuple[int, int] | None,
    crop: bool,
    background: Colour,
) -> tuple[NDArray[np.uint8], Done]:
    first = picture.tell() == 0 and getattr(picture, "is_animated", False)
    layout, orientation = _layout(picture), _orientation(picture)
    picture.load()  # turns a TIFF upright
    found, deep = _eight_bits(picture, layout)
    laid = False
    if channels != 4:
        found, laid = _opaque(found, background)
    grey = found.mode in ("L", "LA")
    if channels is not None:
        found = found.convert(MODES[channels])
    remaining = _TURNS.get(_orientation(picture))
    if remaining:
        found = found.transpose(getattr(pillow().Transpose, remaining))
    found, resized, reshaped = _resized(found, size, crop)
    made = None if picture.mode in _SAME or deep is not None else picture.mode
    turned = orientation in _TURNS
    done = Done(first, turned, deep, made, laid, grey, resized, reshaped)
    return np.asarray(found), done


def _layout(picture: Any) -> str:
    """Pillow's name for the layout of a picture's samples in its file; "" if it is loaded."""
    for decoder, _, _, arguments in getattr(picture, "tile", ()):
        if decoder.startswith("ppm") and arguments[-1] > 255:
            return ";16B"
        name = arguments if isinstance(arguments, str) else (arguments or ("",))[0]
        return name if isinstance(name, str) else ""
    return ""


def _orientation(picture: Any) -> int:
    """The orientation in the EXIF data; 1, upright, if they are damaged or missing."""
    try:
        return int(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # the parser can raise anything; the picture itself can be fine
        return 1


def _eight_bits(picture: Any, layout: str) -> tuple[Any, int | None]:
    """The picture as L, LA, RGB or RGBA, and its highest level if it has 16 bits, else None.

    Raises InputError if the range of its levels is unknown.
    """
    mode, key = picture.mode, picture.info.get("transparency")
    if mode.startswith("I;16") or (mode == "I" and picture.format in ("PPM", "PNG")):
        levels = np.asarray(picture).astype(np.uint16)
        return _keyed((levels >> 8).astype(np.uint8), levels, key), int(levels.max())
    if mode in ("I", "F"):
        kind = {"I": "32-bit integers", "F": "floating numbers"}[mode]
        raise InputError(f"its levels are {kind} of no known range; write 8 or 16 bits")
    if mode in ("P", "PA"):
        return _looked_up(picture), None
    found = picture.convert("LA" if layout == "LA;16B" else _PLAIN.get(mode, "RGB"))
    if key is not None and found.mode in ("L", "RGB"):
        levels = np.asarray(found)
        found = _keyed(levels, levels, _scaled(key, layout))
    if not _DEEP.search(layout):
        return found, None
    brightest = np.max(found.convert(found.mode.removesuffix("A")).getextrema())
    return found, int(brightest) << 8 | 255


def _looked_up(picture: Any) -> Any:
    """The colours of a picture with a palette. It is grey if its whole palette is grey."""
    found = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    red, green, blue = np.reshape(picture.getpalette("RGB"), (-1, 3)).T
    grey = (red == green).all() and (green == blue).all()
    return found.convert(found.mode.replace("RGB", "L")) if grey else found


def _scaled(key: Any, layout: str) -> Any:
    """The transparent colour in levels of 8 bits.

    key: that colour in the file's own levels.
    """
    if isinstance(key, int):
        return key * _NATIVE.get(layout, 1)
    if isinstance(key, tuple) and (_DEEP.search(layout) or max(key) > 255):
        return tuple(level >> 8 for level in key)
    return key


def _keyed(shown: Array, levels: Array, key: Any) -> Any:
    """A picture of ``shown``, transparent where ``levels`` equal ``key``, if there is a key."""
    image = pillow()
    found = image.fromarray(shown)
    if key is None:
        return found
    hidden = levels == np.asarray(key)
    hidden = hidden if hidden.ndim == 2 else hidden.all(2)
    found.putalpha(image.fromarray(np.where(hidden, 0, 255).astype(np.uint8)))
    return found


def _opaque(picture: Any, background: Colour) -> tuple[Any, bool]:
    """The picture without its alpha, on the background, and whether any of the background shows."""
    if picture.mode not in ("LA", "RGBA"):
        return picture, False
    alpha = picture.getchannel("A")
    shown = picture.convert(picture.mode.removesuffix("A"))
    if alpha.getextrema()[0] == 255:
        return shown, False
    level, *others = background
    if shown.mode == "L" and others != [level, level]:
        shown = shown.convert("RGB")
    ground = pillow().new(shown.mode, shown.size, level if shown.mode == "L" else background)
    ground.paste(shown, mask=alpha)
    return ground, True


def _resized(picture: Any, size: tuple[int, int] | None, crop: bool) -> tuple[Any, bool, bool]:
    """The picture in the given size, whether its size changed, and whether its proportions changed.

    Resizes across, then down, in two steps. If Pillow did both, the order, and so the levels, would
    depend on its version.
    """
    width, height = picture.size
    if size is None or size == (height, width):
        return picture, False, False
    left, top, right, bottom = _middle(width, height, size) if crop else (0, 0, width, height)
    lanczos, mode = pillow().Resampling.LANCZOS, picture.mode
    weighed = picture.convert("RGBa") if mode == "RGBA" else picture
    across = weighed.resize((size[1], height), lanczos, (left, 0, right, height))
    found = across.resize((size[1], size[0]), lanczos, (0, top, size[1], bottom))
    return found.convert(mode), True, width * size[0] != height * size[1]


def _middle(width: int, height: int, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest box (left, top, right, bottom) in the middle of a picture with given proportions.

    size: the proportions, (H, W).
    """
    high, wide = size
    if width * high <= height * wide:
        part = width * high / wide
        return 0, (height - part) / 2, width, (height + part) / 2
    part = height * wide / high
    return (width - part) / 2, 0, (width + part) / 2, height
