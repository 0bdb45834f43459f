"""Pictures become the images of a reference reader, and what was done or left out is said."""

import hashlib
import io
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mixed_pictures import MAKERS, colour, make, on_white, plainly, png, saved, scene, upright
from PIL import Image, PngImagePlugin
from support import ROOT

from vqref.errors import InputError, UsageError
from vqref.host.listing import ENDINGS
from vqref.host.pictures import Reading, is_picture, load_any, prepare
from vqref.host.pillow import pillow
from vqref.host.pixels import FORMATS
from vqref.preprocessing import Preprocessing

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 5), np.uint8)
COLOUR = RNG.integers(0, 256, (6, 5, 3), np.uint8)
ALPHA = np.array([[0, 1, 127, 128, 254]] * 5 + [[255] * 5], np.uint8)
RED = (200, 30, 10)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else saved(content, "PNG"))
    return path


def read(path, **options):
    """Returns the only image in a file as (H, W, C), and what was said."""
    found = load_any(path, Reading(**options))
    (image,) = found.train
    return image.transpose(1, 2, 0), found.said


def luma(pixels):
    """Returns grey levels by ITU-R 601, in the integers of Pillow's documentation of mode L."""
    red, green, blue = pixels.astype(np.int64).transpose(2, 0, 1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).astype(np.uint8)


def laid(pixels, alpha, ground):
    """Returns pixels (H, W, 3) laid on a ground by their alpha, rounded to the nearest level."""
    part = alpha[..., None] / 255
    return np.round(part * pixels + (1 - part) * np.array(ground)).astype(np.uint8)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    return folder, make(folder, 2 * len(MAKERS))


@pytest.mark.parametrize("kind", MAKERS)
def test_every_kind_of_file_has_the_pixels_of_a_reference_reader(tmp_path, kind):
    rng = np.random.default_rng(1)
    made = MAKERS[kind](rng, scene(rng, 23, 31))
    path = write(tmp_path / f"x{made.ending}", made.content)
    image, _ = read(path, channels=3)
    np.testing.assert_array_equal(image, made.pixels)
    image, _ = read(path)
    assert image.shape[2] == (1 if "grey" in made.notes else 3)
    np.testing.assert_array_equal(read(path, channels=1)[0][..., 0], luma(made.pixels))


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_picture_in_memory_gives_the_pixels_of_its_file(tmp_path, kind, channels):
    rng = np.random.default_rng(2)
    made = MAKERS[kind](rng, scene(rng, 23, 31))
    path = write(tmp_path / f"x{made.ending}", made.content)
    done = Preprocessing(channels, (12, 13), True, RED)
    from_file = prepare(path, (channels, 12, 13), done)
    for load_before in (False, True):
        with Image.open(path) as picture:
            if load_before:
                picture.load()
            found = prepare([picture, picture], (channels, 12, 13), done)
        assert (found.shape, found.dtype) == ((2, channels, 12, 13), np.uint8)
        np.testing.assert_array_equal(found, np.repeat(from_file, 2, 0))
    reading = Reading.of(done, (channels, 12, 13))
    np.testing.assert_array_equal(load_any(path, reading).train, from_file)


def test_all_that_is_done_to_a_folder_is_said(mixed):
    folder, pictures = mixed
    found = load_any(folder, Reading(size=(40, 50), recursive=True, skip_bad=True))
    noted = [note for one in pictures for note in one.notes]
    count = len(pictures)
    stretched = sum(5 * one.pixels.shape[0] != 4 * one.pixels.shape[1] for one in pictures)
    assert found.said == (
        f"{count} of {count} pictures resized to 40x50, {stretched} of them stretched",
        f"{noted.count('laid')} laid on #ffffff where transparent",
        f"{noted.count('turned')} turned as the EXIF data say",
        f"{noted.count('first')} animated or of several pages: the first of each",
        f"{noted.count('deep')} of 16 bits: their upper 8 (the brightest level is at most 65535 of "
        "65535)",
        f"{noted.count('grey')} grey spread to colour",
        f"{noted.count('CMYK')} of CMYK made RGB",
        "1 skipped, broken: broken.jpg: not a readable image: Truncated File Read",
        "4 other files left out (hidden, .txt, .pdf)",
    )
    assert found.names == tuple(one.name for one in pictures)
    for image, one in zip(found.train, pictures, strict=True):
        expected = in_two_steps(one.pixels, (40, 50), (0, 0, *one.pixels.shape[1::-1]))
        np.testing.assert_array_equal(image.transpose(1, 2, 0), expected)


def test_nothing_is_said_of_pictures_to_which_nothing_was_done(tmp_path):
    write(tmp_path / "a.png", COLOUR)
    write(tmp_path / "b.png", np.dstack([COLOUR, np.full((6, 5), 255, np.uint8)]))
    found = load_any(tmp_path, Reading(size=(6, 5), crop=True))
    assert found.said == ()
    np.testing.assert_array_equal(found.train, np.stack([COLOUR.transpose(2, 0, 1)] * 2))


def in_modes():
    """Pictures as programs write them, with the colours and the alpha that they stand for."""
    rgb, grey, alpha = map(Image.fromarray, (COLOUR, GREY, ALPHA))
    rgba, la = rgb.copy(), grey.copy()
    rgba.putalpha(alpha)
    la.putalpha(alpha)
    indices = Image.fromarray(GREY % 4)
    indices.putpalette(COLOUR[0].tobytes())
    seen = COLOUR[0][GREY % 4]
    clear = indices.copy()
    clear.info["transparency"] = bytes([0, 100, 255])
    of_four = np.array([0, 100, 255, 255], np.uint8)[GREY % 4]
    whole = np.full((6, 5), 255, np.uint8)
    pa = Image.merge("PA", (indices, alpha))
    pa.putpalette(COLOUR[0].tobytes())
    ycc, hsv, lab = rgb.convert("YCbCr"), rgb.convert("HSV"), rgb.convert("LAB")
    return {
        "P": (indices, seen, whole),
        "P with alpha": (clear, seen, of_four),
        "PA": (pa, seen, ALPHA),
        "La": (la.convert("La"), colour(np.asarray(la.convert("La").convert("LA"))[..., 0]), ALPHA),
        "RGBa": (
            rgba.convert("RGBa"),
            np.asarray(rgba.convert("RGBa").convert("RGBA"))[..., :3],
            ALPHA,
        ),
        "RGBX": (rgb.convert("RGBX"), COLOUR, whole),
        "YCbCr": (ycc, np.asarray(ycc.convert("RGB")), whole),
        "HSV": (hsv, np.asarray(hsv.convert("RGB")), whole),
        "LAB": (lab, np.asarray(lab.convert("RGB")), whole),
        "CMYK": (rgb.convert("CMYK"), np.asarray(rgb.convert("CMYK").convert("RGB")), whole),
        "I;16B": (deep("I;16B", ">u2"), colour(GREY), whole),
        "I;16L": (deep("I;16L", "<u2"), colour(GREY), whole),
        "I;16": (deep("I;16", "<u2"), colour(GREY), whole),
    }


def deep(mode, dtype):
    """Returns a picture of 16 bits, whose upper 8 are GREY."""
    samples = (GREY.astype(np.uint16) << 8 | 77).astype(dtype)
    return Image.frombytes(mode, (5, 6), samples.tobytes())


@pytest.mark.parametrize("mode", in_modes())
def test_every_mode_of_pillow_has_the_pixels_that_it_stands_for(mode):
    picture, pixels, alpha = in_modes()[mode]
    (found,) = prepare(picture, (3, 6, 5), Preprocessing(3, background=RED))
    np.testing.assert_array_equal(found.transpose(1, 2, 0), laid(pixels, alpha, RED))
    (found,) = prepare(picture, (4, 6, 5), Preprocessing(4))
    np.testing.assert_array_equal(found.transpose(1, 2, 0), np.dstack([pixels, alpha]))


def test_other_colour_spaces_become_rgb_and_are_said(tmp_path):
    for mode in ("CMYK", "YCbCr", "LAB"):
        picture = Image.fromarray(COLOUR).convert(mode)
        image, said = read(write(tmp_path / "x.tif", saved(picture, "TIFF")))
        np.testing.assert_array_equal(image, picture.convert("RGB"))
        assert said == (f"1 of {mode} made RGB",)


@pytest.mark.parametrize(("mode", "kind"), [("I", "32-bit integers"), ("F", "floating numbers")])
def test_levels_of_no_known_range_are_refused_by_name(tmp_path, mode, kind):
    write(tmp_path / "a.png", GREY)
    said = f"its levels are {kind} of no known range; write 8 or 16 bits"
    picture = Image.fromarray(GREY).convert(mode)
    write(tmp_path / "b.tif", saved(picture, "TIFF"))
    with pytest.raises(InputError, match=rf"b\.tif: {said}; --skip-bad leaves out what is broken"):
        load_any(tmp_path)
    with pytest.raises(InputError, match=f"^picture 1: {said}$"):
        prepare([Image.fromarray(GREY), picture], (1, 6, 5), Preprocessing(1))
    assert load_any(tmp_path, Reading(skip_bad=True)).said == (f"1 skipped, broken: b.tif: {said}",)


def test_a_float_pixmap_is_refused(tmp_path):
    write(tmp_path / "a.pfm", b"Pf 5 6 -1.0\n" + GREY.astype("<f4").tobytes())
    with pytest.raises(InputError, match="floating numbers"):
        load_any(tmp_path)


@pytest.mark.parametrize("most", [4095, 65535])
def test_sixteen_bits_keep_their_upper_eight_and_the_brightest_level_is_said(tmp_path, most):
    level = np.linspace(0, most, 30).astype(np.uint16).reshape(6, 5)
    for ending, content in {
        "png": saved(level, "PNG"),
        "tif": saved(level, "TIFF"),
        "jp2": saved(level, "JPEG2000"),
        "pgm": b"P5 5 6 65535\n" + level.astype(">u2").tobytes(),
        "ppm": b"P2 5 6 65535\n" + " ".join(map(str, level.ravel())).encode(),
    }.items():
        image, said = read(write(tmp_path / f"x.{ending}", content))
        np.testing.assert_array_equal(image[..., 0], level >> 8)
        assert said == (
            f"1 of 16 bits: their upper 8 (the brightest level is at most {most} of 65535)",
        )


def test_a_pixmap_of_another_greatest_level_is_scaled_by_it(tmp_path):
    level = np.arange(30, dtype=np.uint16).reshape(6, 5) * 4095 // 29
    content = b"P5 5 6 4095\n" + level.astype(">u2").tobytes()
    image, _ = read(write(tmp_path / "x.pgm", content))
    np.testing.assert_array_equal(image[..., 0], np.round(level / 4095 * 65535).astype(int) >> 8)
    content = b"P6 5 6 4095\n" + np.repeat(level, 3).astype(">u2").tobytes()
    image, said = read(write(tmp_path / "x.ppm", content))
    np.testing.assert_array_equal(image, colour(np.round(level / 4095 * 255)))
    assert said[0].startswith("1 of 16 bits")


def test_colour_of_sixteen_bits_is_read_and_said_alike(tmp_path):
    level = RNG.integers(0, 4096, (6, 5, 3))
    level[0, 0, 0] = 4095
    image, said = read(write(tmp_path / "x.png", png(level, 2)))
    np.testing.assert_array_equal(image, level >> 8)
    assert said == ("1 of 16 bits: their upper 8 (the brightest level is at most 4095 of 65535)",)
    with_alpha = np.dstack([level[..., :1], ALPHA.astype(int) * 257])
    image, said = read(write(tmp_path / "x.png", png(with_alpha, 4)))
    expected = on_white(colour((level[..., 0] >> 8).astype(np.uint8)), ALPHA)
    np.testing.assert_array_equal(image, expected[..., :1])
    assert len(said) == 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_picture_is_turned_as_its_exif_data_say(tmp_path, orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(COLOUR, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    image, said = read(write(tmp_path / f"x.{kind.lower()}", content))
    stored = plainly(content) if kind == "JPEG" else COLOUR
    np.testing.assert_array_equal(image, upright(stored, orientation))
    assert said == (("1 turned as the EXIF data say",) if orientation > 1 else ())


def test_a_picture_is_turned_before_it_is_cropped(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = write(tmp_path / "x.png", saved(COLOUR, "PNG", exif=exif))
    image, _ = read(path, size=(6, 6), crop=True)
    other, _ = read(write(tmp_path / "y.png", upright(COLOUR, 6)), size=(6, 6), crop=True)
    np.testing.assert_array_equal(image, other)


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"x" * 99])
def test_damaged_exif_data_turn_nothing(tmp_path, exif):
    image, said = read(write(tmp_path / "x.png", saved(COLOUR, "PNG", exif=exif)))
    np.testing.assert_array_equal(image, COLOUR)
    assert said == ()


def test_exif_data_that_cannot_be_parsed_turn_nothing(tmp_path):
    damaged = PngImagePlugin.PngInfo()
    damaged.add_text("Raw profile type exif", "\nexif\n 4\nzz")
    image, said = read(write(tmp_path / "x.png", saved(COLOUR, "PNG", pnginfo=damaged)))
    np.testing.assert_array_equal(image, COLOUR)
    assert said == ()


def test_an_orientation_that_there_is_not_turns_nothing(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 9
    image, said = read(write(tmp_path / "x.png", saved(COLOUR, "PNG", exif=exif)))
    np.testing.assert_array_equal(image, COLOUR)
    assert said == ()


def test_the_colour_that_alpha_hides_shows_nowhere(tmp_path):
    """There is red under full transparency, next to opaque blue. Resizing mixes neither in."""
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[:, :8], pixels[:, 8:] = (255, 0, 0, 0), (0, 0, 255, 255)
    image, said = read(write(tmp_path / "x.png", pixels), size=(7, 7))
    assert said[1] == "1 laid on #ffffff where transparent"
    red, green, blue = image.transpose(2, 0, 1)
    np.testing.assert_array_equal(red, green)
    assert (blue >= 255 - 1).all()
    (kept,) = load_any(tmp_path, Reading(channels=4, size=(7, 7))).train
    assert kept[0].max() == 0  # no red where blue begins


def test_transparency_is_laid_on_the_background_that_is_asked_for(tmp_path):
    path = write(tmp_path / "x.png", np.dstack([COLOUR, ALPHA]))
    image, said = read(path, background=RED)
    np.testing.assert_array_equal(image, laid(COLOUR, ALPHA, RED))
    assert said == ("1 laid on #c81e0a where transparent",)
    grey, _ = read(path, background=RED, channels=1)
    np.testing.assert_array_equal(grey[..., 0], luma(laid(COLOUR, ALPHA, RED)))


def test_a_grey_picture_on_a_coloured_ground_is_no_longer_grey(tmp_path):
    picture = Image.fromarray(GREY)
    picture.putalpha(Image.fromarray(ALPHA))
    path = write(tmp_path / "x.png", saved(picture, "PNG"))
    np.testing.assert_array_equal(read(path, background=RED)[0], laid(colour(GREY), ALPHA, RED))
    np.testing.assert_array_equal(
        read(path, background=(9, 9, 9))[0], laid(colour(GREY), ALPHA, (9, 9, 9))[..., :1]
    )


@pytest.mark.parametrize(
    ("bits", "key"), [(1, 1), (1, 0), (2, 3), (2, 1), (4, 15), (4, 6), (8, 200), (16, 0xC8C9)]
)
def test_a_grey_level_that_stands_for_transparent_is(tmp_path, bits, key):
    """A PNG's chunk tRNS names the level as a sample with the file's number of bits."""
    most = 2**bits - 1
    samples = RNG.integers(0, most + 1, (4, 8))
    samples[0] = key
    path = write(tmp_path / "x.png", png_of_bits(samples, bits, struct.pack(">H", key)))
    level = (samples >> 8 if bits == 16 else samples * 255 // most).astype(np.uint8)
    expected = np.where(samples == key, 255, level)
    np.testing.assert_array_equal(read(path)[0][..., 0], expected)
    alpha = np.where(samples == key, 0, 255)
    np.testing.assert_array_equal(read(path, channels=4)[0], np.dstack([colour(level), alpha]))


def test_a_level_that_there_is_not_hides_nothing(tmp_path):
    samples = RNG.integers(0, 256, (4, 8))
    path = write(tmp_path / "x.png", png_of_bits(samples, 8, struct.pack(">H", 300)))
    np.testing.assert_array_equal(read(path)[0][..., 0], samples)


def png_of_bits(samples, bits, key):
    """Returns a grey PNG of samples (H, W) with this number of bits and a chunk tRNS."""
    if bits == 16:
        return png(samples[..., None], 0, key)
    shifts = np.arange(bits - 1, -1, -1)
    rows = np.packbits((samples[..., None] >> shifts & 1).reshape(len(samples), -1), axis=1)
    head = struct.pack(">2I5B", *samples.shape[::-1], bits, 0, 0, 0, 0)
    body = zlib.compress(np.hstack([np.zeros((len(rows), 1), np.uint8), rows]).tobytes())
    chunks = ((b"IHDR", head), (b"tRNS", key), (b"IDAT", body), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part))
        for name, part in chunks
    )


def test_a_colour_of_sixteen_bits_that_stands_for_transparent_is(tmp_path):
    samples = RNG.integers(0, 65536, (6, 5, 3))
    key = struct.pack(">3H", *(int(n) for n in samples[2, 3]))
    image, _ = read(write(tmp_path / "x.png", png(samples, 2, key)))
    expected = samples >> 8
    expected[2, 3] = 255
    np.testing.assert_array_equal(image, expected)


def lanczos(pixels, size, box):
    """Pillow's Lanczos filter with support 3, in float64.

    It goes along each row, rounds to levels, and then goes along each column.
    """

    def along(values, count, start, stop):
        scale = (stop - start) / count
        support = 3 * max(scale, 1)
        found = []
        for i in range(count):
            centre = start + (i + 0.5) * scale
            low, high = int(max(centre - support + 0.5, 0)), int(centre + support + 0.5)
            at = (np.arange(low, min(high, len(values))) - centre + 0.5) / max(scale, 1)
            weights = np.where(abs(at) < 3, np.sinc(at) * np.sinc(at / 3), 0)
            near = values[low : low + len(at)]
            found.append(np.tensordot(weights / weights.sum(), near, 1))
        return np.clip(np.round(found), 0, 255)

    left, top, right, bottom = box
    rows = along(pixels.astype(float).swapaxes(0, 1), size[1], left, right).swapaxes(0, 1)
    return along(rows, size[0], top, bottom)


def middle(height, width, size):
    """Returns the largest box in the middle with the proportions of ``size``."""
    scale = min(height / size[0], width / size[1])
    high, wide = size[0] * scale, size[1] * scale
    return (width - wide) / 2, (height - high) / 2, (width + wide) / 2, (height + high) / 2


@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize(
    ("source", "size"),
    [((61, 40), (16, 16)), ((40, 61), (16, 16)), ((30, 70), (21, 13)), ((7, 9), (32, 20))],
)
def test_a_picture_is_resized_by_lanczos_filter(tmp_path, source, size, crop):
    pixels = np.round(255 * scene(np.random.default_rng(3), *source)).astype(np.uint8)
    path = write(tmp_path / "x.png", pixels)
    image, said = read(path, size=size, crop=crop)
    height, width = source
    box = middle(height, width, size) if crop else (0, 0, width, height)
    assert np.abs(image - lanczos(pixels, size, box)).max() <= 1
    how = "cropped to the middle" if crop else "stretched"
    assert said == (f"1 of 1 picture resized to {size[0]}x{size[1]}, 1 of them {how}",)


def in_two_steps(pixels, size, box):
    """Returns a box of a picture resized across, then down.

    In one step, Pillow's version would decide which comes first.
    """
    picture, (left, top, right, bottom) = Image.fromarray(pixels), box
    kind, height = Image.Resampling.LANCZOS, len(pixels)
    across = picture.resize((size[1], height), kind, (left, 0, right, height))
    return np.asarray(across.resize((size[1], size[0]), kind, (0, top, size[1], bottom)))


@given(*[st.integers(1, 60)] * 4)
def test_a_crop_takes_the_largest_box_of_the_middle(height, width, high, wide):
    pixels = np.arange(height * width, dtype=np.uint8).reshape(height, width)
    done = Preprocessing(1, (high, wide), True)
    (found,) = prepare(Image.fromarray(pixels), (1, high, wide), done)
    expected = pixels
    if (height, width) != (high, wide):
        left, top, right, bottom = middle(height, width, (high, wide))
        box = (max(left, 0), max(top, 0), min(right, width), min(bottom, height))
        expected = in_two_steps(pixels, (high, wide), box)
    np.testing.assert_array_equal(found[0], expected)


def test_pictures_of_the_right_proportions_are_neither_stretched_nor_cropped(tmp_path):
    write(tmp_path / "a.png", np.zeros((12, 10), np.uint8))
    write(tmp_path / "b.png", GREY)
    for crop in (True, False):
        found = load_any(tmp_path, Reading(size=(6, 5), crop=crop))
        assert found.said == ("1 of 2 pictures resized to 6x5",)


@pytest.mark.parametrize(
    ("channels", "said"),
    [
        (None, ["1 grey spread to colour"]),
        (3, ["1 grey spread to colour"]),
        (4, ["1 grey spread to colour"]),
        (1, ["1 in colour made grey"]),
    ],
)
def test_grey_and_colour_become_one(tmp_path, channels, said):
    write(tmp_path / "a.png", GREY)
    write(tmp_path / "b.png", COLOUR)
    found = load_any(tmp_path, Reading(channels=channels))
    assert list(found.said) == said
    assert found.train.shape == (2, channels or 3, 6, 5)
    assert found.preprocessing == Preprocessing(channels or 3)
    grey, coloured = found.train.transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(grey[..., :3], colour(GREY)[..., : channels or 3])
    np.testing.assert_array_equal(
        coloured[..., :3], luma(COLOUR)[..., None] if channels == 1 else COLOUR
    )


def test_other_numbers_of_channels_are_for_arrays(tmp_path):
    path = write(tmp_path / "x.png", GREY)
    with pytest.raises(InputError, match="pictures give images of 1, 3 or 4 channels, not 2"):
        load_any(path, Reading(channels=2))
    with pytest.raises(InputError, match="pictures give images of 1, 3 or 4 channels, not 5"):
        prepare(path, (5, 6, 5), Preprocessing(5))


def test_a_set_remembers_its_pictures_and_what_was_done_to_them(tmp_path):
    write(tmp_path / "dir" / "b.png", COLOUR)
    write(tmp_path / "dir" / "a.png", COLOUR[::-1])
    found = load_any(tmp_path / "dir", Reading(size=(4, 4), crop=True, background=RED))
    assert found.preprocessing == Preprocessing(3, (4, 4), True, RED)
    assert found.names == ("a.png", "b.png")
    assert found.source == "dir"
    assert found.sha256 == hashlib.sha256(found.train.tobytes()).hexdigest()
    again = load_any(tmp_path / "dir", Reading.of(found.preprocessing, (3, 4, 4)))
    np.testing.assert_array_equal(again.train, found.train)
    assert again.preprocessing == found.preprocessing


def test_one_picture_is_one_image(tmp_path):
    path = write(tmp_path / "x.PNG", GREY)
    found = load_any(path)
    assert (found.names, found.source, found.said) == (("x.PNG",), "x.PNG", ())
    np.testing.assert_array_equal(found.train, GREY[None, None])
    path.write_bytes(b"x")
    with pytest.raises(
        InputError, match=r"x\.PNG: not a readable image: none of the formats that are read$"
    ):
        load_any(path)


def test_only_pictures_that_are_not_hidden_are_read(tmp_path):
    write(tmp_path / "a.png", GREY)
    for name in ("._a.png", ".x.png", "b.pdf", "c.txt", "d.TXT", "e", ".git/x.png"):
        write(tmp_path / name, b"x")
    found = load_any(tmp_path, Reading(recursive=True))
    assert found.names == ("a.png",)
    assert found.said == ("7 other files left out (hidden, .txt, .pdf, no ending)",)


def test_a_line_names_few_endings(tmp_path):
    write(tmp_path / "a.png", GREY)
    for i in range(9):
        write(tmp_path / f"x.{i}", b"")
    assert load_any(tmp_path).said == ("9 other files left out (.0, .1, .2, .3, .4, ...)",)


def test_every_ending_that_pillow_knows_of_its_formats_is_read():
    known = {ending for ending, kind in pillow().registered_extensions().items() if kind in FORMATS}
    assert set(ENDINGS) == known


def test_subfolders_are_read_if_asked_and_said_if_not(tmp_path):
    names = ["a/b/c/é.png", "a/b.png", "a-b.png", "z.png", "b/写.png"]
    for i, name in enumerate(names):
        write(tmp_path / name, np.full((2, 2), i, np.uint8))
    found = load_any(tmp_path, Reading(recursive=True))
    assert found.names == ("a/b/c/é.png", "a/b.png", "a-b.png", "b/写.png", "z.png")
    assert found.train[:, 0, 0, 0].tolist() == [0, 1, 2, 4, 3]
    assert found.said == ()
    found = load_any(tmp_path)
    assert found.names == ("a-b.png", "z.png")
    assert found.said == ("2 subfolders left out without --recursive",)


def test_a_folder_of_subfolders_says_how_they_are_read(tmp_path):
    write(tmp_path / "a" / "b" / "x.txt", b"")
    with pytest.raises(InputError, match="no image files itself; --recursive reads its 1 subfold"):
        load_any(tmp_path)
    with pytest.raises(InputError, match="no image files and no official KMNIST files, nor do its"):
        load_any(tmp_path, Reading(recursive=True))
    with pytest.raises(InputError, match=r"holds no image files and no official KMNIST files$"):
        load_any(tmp_path / "a" / "b")


def test_links_make_no_loop_and_are_followed_out_of_the_folder(tmp_path):
    top = tmp_path / "top"
    write(top / "a" / "x.png", GREY)
    write(tmp_path / "other" / "y.png", GREY)
    (top / "a" / "up").symlink_to(top)
    (top / "a" / "itself").symlink_to("itself")
    (top / "0").symlink_to(top / "a")
    (top / "out").symlink_to(tmp_path / "other")
    (top / "out again").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "back").symlink_to(top / "a")
    (tmp_path / "other" / "round").symlink_to(tmp_path)
    found = load_any(top, Reading(recursive=True))
    assert len(found.names) == 2
    assert found.names[0] == "a/x.png"
    assert found.names[1] in ("out/y.png", "out again/y.png")


def test_a_broken_picture_is_named_and_can_be_left_out(tmp_path):
    write(tmp_path / "a.png", GREY)
    for i in range(7):
        write(tmp_path / "in" / f"{i}.png", b"x")
    with pytest.raises(InputError, match=r"in/0\.png: not a readable image: .*; --skip-bad leaves"):
        load_any(tmp_path, Reading(recursive=True))
    found = load_any(tmp_path, Reading(recursive=True, skip_bad=True))
    assert found.names == ("a.png",)
    (line,) = found.said
    assert line.startswith("7 skipped, broken: in/0.png: not a readable image: none of")
    assert "in/4.png: " in line
    assert "in/5.png" not in line
    assert line.endswith("; and 2 more")


def test_a_folder_of_broken_pictures_alone_is_refused(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.png", b"x")
    with pytest.raises(InputError, match=r"2 image files, of which none can be read; a\.png: not"):
        load_any(tmp_path, Reading(skip_bad=True))


def test_a_file_that_cannot_be_read_is_named_once(tmp_path):
    write(tmp_path / "a.png", GREY)
    (tmp_path / "b.png").symlink_to("nowhere")
    (line,) = load_any(tmp_path, Reading(skip_bad=True)).said
    assert line == "1 skipped, broken: b.png: No such file or directory"


def test_pictures_of_several_sizes_are_refused_with_both(tmp_path):
    write(tmp_path / "a.png", GREY)
    write(tmp_path / "b.png", GREY.T)
    said = r"b\.png: 5x6 pixels, a\.png has 6x5; use --resize HxW"
    with pytest.raises(InputError, match=said):
        load_any(tmp_path, Reading(skip_bad=True))


def test_pictures_for_a_model_must_have_its_size_or_its_resizing(tmp_path):
    path = write(tmp_path / "a.png", GREY)
    shape = (1, 5, 6)
    for done in (Preprocessing(1), None):
        said = r"6x5 pixels; this model was trained on images of 5x6 without resizing"
        with pytest.raises(InputError, match=rf"a\.png: {said}"):
            load_any(tmp_path, Reading.of(done, shape))
    with pytest.raises(InputError, match=rf"a\.png: {said}"):
        prepare([path], shape, Preprocessing(1))
    with pytest.raises(InputError, match=rf"^picture 0: {said}"):
        prepare(Image.fromarray(GREY), shape, Preprocessing(1))
    assert load_any(tmp_path, Reading.of(Preprocessing(1, (5, 6)), shape)).train.shape[1:] == shape


@pytest.mark.parametrize("done", [Preprocessing(3), Preprocessing(1, (5, 6))])
def test_a_model_gets_no_other_images_than_its_own(done):
    with pytest.raises(ValueError, match="does not give images"):
        prepare([], (1, 6, 5), done)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"size": (2, 2)}, "--resize"),
        ({"size": (2, 2), "crop": True}, "--resize"),
        ({"crop": True}, "--crop"),
        ({"background": RED}, "--background"),
        ({"channels": 1}, "--channels"),
        ({"recursive": True}, "--recursive"),
        ({"skip_bad": True}, "--skip-bad"),
    ],
)
def test_options_of_pictures_are_refused_for_arrays(tmp_path, options, name):
    np.save(tmp_path / "x.npy", GREY[None])
    with pytest.raises(InputError, match=f"{name} is for a folder of pictures; .*x.npy is not one"):
        load_any(tmp_path / "x.npy", Reading(**options))


def test_arrays_are_read_for_a_model_that_resizes_pictures(tmp_path):
    np.save(tmp_path / "x.npy", GREY[None])
    reading = Reading.of(Preprocessing(1, (6, 5), True, RED), (1, 6, 5))
    found = load_any(tmp_path / "x.npy", reading)
    assert (found.preprocessing, found.names, found.said) == (None, None, ())
    with pytest.raises(InputError, match="--recursive is for"):
        load_any(tmp_path / "x.npy", Reading.of(None, (1, 6, 5), recursive=True))


def test_a_crop_needs_a_size(tmp_path):
    write(tmp_path / "a.png", GREY)
    with pytest.raises(UsageError, match="--crop needs the size"):
        load_any(tmp_path, Reading(crop=True))


def test_pictures_for_programs_are_paths_and_images_one_or_many(tmp_path):
    path = write(tmp_path / "a.png", GREY)
    shape, done = (1, 6, 5), Preprocessing(1)
    for given_ in (path, str(path), [str(path)], (Image.fromarray(GREY),), iter([path])):
        np.testing.assert_array_equal(prepare(given_, shape, done), GREY[None, None])
    assert prepare([], shape, done).shape == (0, *shape)
    with pytest.raises(InputError, match="picture 1 is a int, expected a path or a PIL image"):
        prepare([path, 3], shape, done)
    with pytest.raises(InputError, match=f"^{tmp_path}/b.png: No such file or directory$"):
        prepare([path, tmp_path / "b.png"], shape, done)
    with pytest.raises(InputError, match="Is a directory"):
        prepare(tmp_path, shape, done)
    content = saved(GREY, "PNG")
    with Image.open(io.BytesIO(content[: len(content) // 2])) as picture:
        for _ in range(2):
            with pytest.raises(InputError, match=r"^picture 0: not a readable image: "):
                prepare(picture, shape, done)


def test_a_picture_of_a_program_stays_as_it_is():
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(io.BytesIO(saved(COLOUR, "PNG", exif=exif))) as picture:
        prepare(picture, (1, 2, 2), Preprocessing(1, (2, 2)))
        assert (picture.size, picture.mode) == ((5, 6), "RGB")
        assert picture.getexif()[0x0112] == 6
        np.testing.assert_array_equal(picture, COLOUR)


@pytest.mark.parametrize(
    ("thing", "expected"),
    [("x.png", True), (Path("x"), True), (GREY, False), (3, False), (None, False), ([], False)],
)
def test_a_path_or_an_image_is_a_picture(thing, expected):
    assert is_picture(thing) is expected
    assert is_picture(Image.fromarray(GREY)) is True


def test_pillow_remarks_on_no_picture(mixed, tmp_path):
    folder, _ = mixed
    clear = Image.fromarray(GREY % 4)
    clear.putpalette(COLOUR[0].tobytes())
    path = write(tmp_path / "x.png", saved(clear, "PNG", transparency=bytes([0, 100, 255])))
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        for channels in (None, 1, 3, 4):
            load_any(folder, Reading(channels, (8, 8), recursive=True, skip_bad=True))
            read(path, channels=channels)
        with Image.open(path) as picture:
            prepare(picture, (1, 6, 5), Preprocessing(1))
    assert not remarks


def test_arrays_are_read_without_pillow_and_pictures_say_what_they_need(tmp_path):
    np.save(tmp_path / "x.npy", GREY[None])
    write(tmp_path / "a.png", GREY)
    code = """
import sys
from pathlib import Path
sys.modules["PIL"] = None
from vqref.host.pictures import Reading, load_any
folder = Path(sys.argv[1])
print(load_any(folder / "x.npy").train.shape)
try:
    load_any(folder, Reading(skip_bad=True))
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.splitlines() == [
        "(1, 1, 6, 5)",
        "MachineError PIL is not installed: pip install 'portable-vqvae[pictures]', or "
        "'.[pictures]' in a clone",
    ]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(InputError, match=f"{tmp_path.name}: Permission denied"):
        load_any(tmp_path)
