"""How a picture becomes an image for a model.

Users of a model must treat pictures as training did. The rules are plain data in ``model.pt`` and
in the manifest of a bundle. ``vqref.host.pictures`` applies them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from vqref.spec import require_sizes

WHITE = (255, 255, 255)

CHANNELS = {1: "grey", 3: "colour", 4: "colour with alpha"}
"""The names of pictures by number of channels."""

_COLOUR = re.compile("#[0-9a-f]{6}", re.ASCII)
_FIELDS = ("size", "crop", "channels", "background")

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Preprocessing:
    """The steps from a picture to an image.

    They are, in this order: take the first frame, convert it to 8 bits, lay it on the background if
    it is transparent and alpha is not a channel, make it grey or colour, turn it as its EXIF data
    say, and resize it by Lanczos' filter.

    channels: the number of channels of images; 1, 3 or 4 for images made from pictures.
    size: (H, W) to resize pictures to. None means that pictures must have the size of images.
    crop: whether to crop the middle of a picture with other proportions. If not, it is stretched.
    background: red, green and blue from 0 to 255.

    Raises ValueError that names the field, what it was and what it must be.
    """

    channels: int
    size: tuple[int, int] | None = None
    crop: bool = False
    background: Colour = WHITE

    def __post_init__(self) -> None:
        require_sizes("channels", (self.channels,))
        if self.size is not None:
            require_sizes("size", self.size)
            if len(self.size) != 2:
                raise ValueError(f"size is {self.size}, expected (H, W)")
        if type(self.crop) is not bool:
            raise ValueError(f"crop is {self.crop!r:.80}, expected true or false")
        if self.crop and self.size is None:
            raise ValueError("crop is true without a size to crop to")
        levels = self.background
        if len(levels) != 3 or not all(type(n) is int and 0 <= n < 256 for n in levels):
            raise ValueError(f"background is {levels!r}, expected three levels from 0 to 255")

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain data: size [H, W] or null, background "#rrggbb"."""
        return {
            "size": None if self.size is None else list(self.size),
            "crop": self.crop,
            "channels": self.channels,
            "background": "#" + bytes(self.background).hex(),
        }

    @classmethod
    def from_dict(cls, data: Any, image_shape: tuple[int, int, int]) -> Preprocessing:
        """Inverts ``to_dict`` for images (C, H, W). None is for images not made from pictures.

        Raises ValueError for anything else, and for data that give images of another shape.
        """
        if data is None:
            return cls(image_shape[0])
        if not isinstance(data, dict) or set(data) != set(_FIELDS):
            raise ValueError(f"preprocessing is {data!r:.80}, expected {', '.join(_FIELDS)}")
        size, background = data["size"], data["background"]
        if not isinstance(size, list | None):
            raise ValueError(f"size is {size!r:.80}, expected [H, W] or null")
        if not isinstance(background, str):
            raise ValueError(f"background is {background!r:.80}, expected a text like #ffffff")
        found = cls(
            data["channels"],
            None if size is None else (*size,),
            data["crop"],
            parse_colour(background),
        )
        found.require(image_shape)
        return found

    def require(self, image_shape: tuple[int, int, int]) -> None:
        """Raises ValueError unless this gives images of that shape."""
        channels, *size = image_shape
        if self.channels != channels or (self.size is not None and self.size != (*size,)):
            raise ValueError(f"preprocessing {self.to_dict()} does not give images {image_shape}")


def parse_colour(text: str) -> Colour:
    """Returns the levels of "#rrggbb". Raises ValueError for any other text."""
    if not _COLOUR.fullmatch(text):
        raise ValueError(f"background is {text!r:.80}, expected a text like #ffffff")
    red, green, blue = bytes.fromhex(text[1:])
    return red, green, blue
