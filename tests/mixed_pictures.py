"""A folder of pictures of every kind, and what a reader should find in each.

The right pixels are known from how a picture was made, or, for lossy formats, from Pillow's plain
decoding.
"""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

PLACES = ("", "by day", "by day/été", "by day/été/写真", "夜")
NAMES = ("one {}", "zwölf-{}", "写真{}", "emoji 🙂 {}", "{}.final")


class Mixed(NamedTuple):
    """A picture of the folder: its path in the folder, its pixels, and what should be said of it.

    The path has "/" between its parts. The pixels (H, W, 3) uint8 are what a reader should find
    before resizing. What should be said: "grey", "laid", "turned", "first" of several frames,
    "deep" (16 bits), "CMYK".
    """

    name: str
    pixels: np.ndarray
    notes: frozenset[str]


class Made(NamedTuple):
    """The content of a file, the ending of its name, and the rest as in ``Mixed``."""

    content: bytes
    ending: str
    pixels: np.ndarray
    notes: tuple[str, ...] = ()


def scene(rng, height, width):
    """Returns a smooth picture (H, W, 3) in [0, 1]: a slope and a few soft spots."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    found = rng.random(3) + (x[..., None] - 0.5) * rng.normal(0, 0.6, 3)
    for _ in range(4):
        far = (x - rng.random()) ** 2 + (y - rng.random()) ** 2
        spot = np.exp(-far / rng.uniform(0.01, 0.1))
        found = found + spot[..., None] * rng.normal(0, 0.6, 3)
    return np.clip(found, 0, 1)


def levels(found, most=255):
    return np.round(found * most).astype(np.uint8 if most == 255 else np.uint16)


def colour(grey):
    """Returns grey levels as red, green and blue, on a new last axis."""
    return np.repeat(grey[..., None], 3, -1)


def on_white(pixels, alpha):
    """Returns pixels (H, W, 3) uint8 laid on white by their alpha (H, W) uint8."""
    a = alpha[..., None].astype(np.int64)
    return ((2 * (a * pixels + (255 - a) * 255) + 255) // 510).astype(np.uint8)


def upright(pixels, orientation):
    """Returns what a picture with this EXIF orientation shows.

    For orientations 1 to 8, the first row and column are at the top and left, top right, bottom
    right, bottom left, left top, right top, right bottom, left bottom.
    """
    return {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.swapaxes(0, 1),
        6: lambda p: p[::-1].swapaxes(0, 1),
        7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
        8: lambda p: p.swapaxes(0, 1)[::-1],
    }[orientation](pixels)


def saved(picture, kind, **options):
    """Returns the file of an array or a picture."""
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def plainly(content):
    """Returns Pillow's decoding, (H, W, 3)."""
    with Image.open(io.BytesIO(content)) as picture:
        return np.asarray(picture.convert("RGB"))


def png(samples, kind, key=b""):
    """Returns a PNG of samples (H, W, C) uint16 of a colour type; Pillow cannot write these.

    key: the content of its chunk tRNS.
    """
    height, width = samples.shape[:2]
    rows = samples.astype(">u2").reshape(height, -1).view(np.uint8)
    parts = {
        b"IHDR": struct.pack(">2I5B", width, height, 16, kind, 0, 0, 0),
        b"tRNS": key,
        b"IDAT": zlib.compress(np.hstack([np.zeros((height, 1), np.uint8), rows]).tobytes()),
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in parts.items()
        if body or name == b"IEND"
    )


def turned_jpeg(rng, found):
    orientation = int(rng.integers(2, 9))
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(levels(found), "JPEG", quality=90, exif=exif)
    return Made(content, ".JPG", upright(plainly(content), orientation), ("turned",))


def turned_tiff(rng, found):
    orientation = int(rng.integers(2, 9))
    content = saved(levels(found), "TIFF", tiffinfo={0x0112: orientation})
    return Made(content, ".tif", upright(levels(found), orientation), ("turned",))


def alpha_of(rng, found):
    """Returns alpha (H, W) uint8 from opaque to transparent; both occur."""
    alpha = levels(scene(rng, *found.shape[:2])[..., 0])
    alpha[0], alpha[1] = 0, 255
    return alpha


def rgba(kind, ending, **options):
    def make(rng, found):
        pixels, alpha = levels(found), alpha_of(rng, found)
        content = saved(np.dstack([pixels, alpha]), kind, **options)
        return Made(content, ending, on_white(pixels, alpha), ("laid",))

    return make


def opaque_rgba(rng, found):
    pixels = levels(found)
    content = saved(np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)]), "PNG")
    return Made(content, ".png", pixels)


def grey_alpha(rng, found):
    grey, alpha = levels(found[..., 0]), alpha_of(rng, found)
    picture = Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))
    pixels = on_white(colour(grey), alpha)
    return Made(saved(picture, "PNG"), ".png", pixels, ("laid", "grey"))


def grey(kind, ending, **options):
    def make(rng, found):
        level = levels(found[..., 1])
        return Made(saved(level, kind, **options), ending, colour(level), ("grey",))

    return make


def grey_jpeg(rng, found):
    content = saved(levels(found[..., 1]), "JPEG")
    return Made(content, ".jpeg", plainly(content), ("grey",))


def grey16(kind, most):
    def make(rng, found):
        level = levels(found[..., 0], most)
        pixels = colour((level >> 8).astype(np.uint8))
        return Made(saved(level, kind), f".{kind.lower()}", pixels, ("deep", "grey"))

    return make


def colour16(rng, found):
    deep = levels(found, 65535)
    return Made(png(deep, 2), ".png", (deep >> 8).astype(np.uint8), ("deep",))


def pgm16(rng, found):
    level = levels(found[..., 0], 65535)
    content = b"P5 %d %d 65535\n" % level.shape[::-1] + level.astype(">u2").tobytes()
    pixels = colour((level >> 8).astype(np.uint8))
    return Made(content, ".pgm", pixels, ("deep", "grey"))


def palette(rng, found):
    """Returns indices (H, W) and the colours (16, 3) uint8 that they stand for."""
    indices = (found[..., 0] * 15.99).astype(np.uint8)
    return indices, rng.integers(0, 256, (16, 3), np.uint8)


def indexed(indices, colours):
    picture = Image.fromarray(indices, "L").copy()
    picture.putpalette(colours.tobytes())
    return picture


def palette_png(rng, found):
    indices, colours = palette(rng, found)
    return Made(saved(indexed(indices, colours), "PNG"), ".png", colours[indices])


def grey_palette_png(rng, found):
    indices, colours = palette(rng, found)
    colours = colour(colours[:, 0])
    content = saved(indexed(indices, colours), "PNG")
    return Made(content, ".png", colours[indices], ("grey",))


def clear_palette_png(rng, found):
    indices, colours = palette(rng, found)
    alpha = rng.integers(0, 255, 16, np.uint8)
    content = saved(indexed(indices, colours), "PNG", transparency=alpha.tobytes())
    return Made(content, ".png", on_white(colours[indices], alpha[indices]), ("laid",))


def clear_gif(rng, found):
    indices, colours = palette(rng, found)
    hidden = int(indices[0, 0])
    content = saved(indexed(indices, colours), "GIF", transparency=hidden)
    pixels = on_white(colours[indices], np.where(indices == hidden, 0, 255).astype(np.uint8))
    return Made(content, ".gif", pixels, ("laid",))


def key_png(rng, found):
    pixels = levels(found)
    key = pixels[0, 0].copy()
    content = saved(pixels, "PNG", transparency=tuple(int(n) for n in key))
    alpha = np.where((pixels == key).all(2), 0, 255).astype(np.uint8)
    return Made(content, ".png", on_white(pixels, alpha), ("laid",))


def animated_gif(rng, found):
    indices, colours = palette(rng, found)
    other = indexed(15 - indices, colours)
    content = saved(indexed(indices, colours), "GIF", save_all=True, append_images=[other])
    return Made(content, ".gif", colours[indices], ("first",))


def animated(kind, ending, **options):
    def make(rng, found):
        pixels, other = levels(found), Image.fromarray(levels(1 - found))
        content = saved(pixels, kind, save_all=True, append_images=[other], **options)
        return Made(content, ending, pixels, ("first",))

    return make


def lossy(kind, ending, **options):
    def make(rng, found):
        content = saved(levels(found), kind, **options)
        return Made(content, ending, plainly(content))

    return make


def cmyk_jpeg(rng, found):
    content = saved(Image.fromarray(levels(found)).convert("CMYK"), "JPEG")
    return Made(content, ".jpg", plainly(content), ("CMYK",))


def lossless(kind, ending, **options):
    def make(rng, found):
        pixels = levels(found)
        return Made(saved(pixels, kind, **options), ending, pixels)

    return make


def one_bit(kind, ending):
    def make(rng, found):
        bits = found[..., 0] > 0.5
        pixels = colour(np.where(bits, 255, 0).astype(np.uint8))
        return Made(saved(bits, kind), ending, pixels, ("grey",))

    return make


MAKERS: dict[str, Callable[[np.random.Generator, np.ndarray], Made]] = {
    "colour PNG": lossless("PNG", ".png"),
    "colour JPEG": lossy("JPEG", ".jpg", quality=85),
    "turned JPEG": turned_jpeg,
    "grey PNG": grey("PNG", ".PNG"),
    "16 bits, PNG": grey16("PNG", 65535),
    "12 bits in 16, PNG": grey16("PNG", 4095),
    "16 bits of colour, PNG": colour16,
    "RGBA PNG": rgba("PNG", ".png"),
    "opaque RGBA": opaque_rgba,
    "LA PNG": grey_alpha,
    "palette": palette_png,
    "grey palette": grey_palette_png,
    "palette with alpha": clear_palette_png,
    "colour key": key_png,
    "GIF": clear_gif,
    "animated GIF": animated_gif,
    "animated PNG": animated("PNG", ".apng"),
    "lossy WebP": lossy("WEBP", ".webp", quality=80, method=1),
    "lossless WebP": lossless("WEBP", ".webp", lossless=True, quality=0, method=0),
    "RGBA WebP": rgba("WEBP", ".webp", lossless=True, exact=True, quality=0, method=0),
    "animated WebP": animated("WEBP", ".webp", lossless=True, quality=0, method=0),
    "CMYK JPEG": cmyk_jpeg,
    "grey JPEG": grey_jpeg,
    "TIFF": lossless("TIFF", ".tif"),
    "LZW TIFF": lossless("TIFF", ".tiff", compression="tiff_lzw"),
    "turned TIFF": turned_tiff,
    "16 bits, TIFF": grey16("TIFF", 65535),
    "pages": animated("TIFF", ".tiff"),
    "BMP": lossless("BMP", ".bmp"),
    "grey BMP": grey("BMP", ".bmp"),
    "TGA": lossless("TGA", ".tga"),
    "JPEG 2000": lossless("JPEG2000", ".jp2"),
    "PPM": lossless("PPM", ".ppm"),
    "16 bits, PPM": pgm16,
    "1 bit, PNG": one_bit("PNG", ".png"),
    "1 bit, PPM": one_bit("PPM", ".pbm"),
}
"""How each kind of picture is made of a scene."""


def make(folder: Path, count: int = 500, seed: int = 0) -> list[Mixed]:
    """Writes ``count`` pictures of all kinds into a folder and its subfolders, three deep.

    Also writes a broken picture ("broken.jpg"), a PDF, a text and two hidden files. Returns what a
    reader should find, sorted by path.
    """
    rng, found = np.random.default_rng(seed), []
    makers = list(MAKERS.values())
    for i in range(count):
        height, width = rng.integers(40, 131, 2)
        made = makers[i % len(makers)](rng, scene(rng, height, width))
        place = PLACES[i % len(PLACES)]
        name = f"{place}/{NAMES[i % 7 % len(NAMES)].format(i)}{made.ending}".removeprefix("/")
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(made.content)
        found.append(Mixed(name, np.ascontiguousarray(made.pixels), frozenset(made.notes)))
    whole = saved(levels(scene(rng, 64, 64)), "JPEG")
    (folder / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "read me.pdf").write_bytes(b"%PDF-1.4\n%%EOF\n")
    (folder / "notes.txt").write_text("nothing to see")
    (folder / "._one 0.png").write_bytes(b"\0\5\x16\7")
    (folder / ".hidden.png").write_bytes(saved(levels(scene(rng, 8, 8)), "PNG"))
    return sorted(found, key=lambda one: one.name.split("/"))
