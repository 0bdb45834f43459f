"""Pictures of a run are right: each pixel is at the place of its image, token or code."""

import numpy as np
import pytest
from PIL import Image

from vqref import families
from vqref.host.colours import code_colours
from vqref.host.sheets import GAP, SHEET_PIXELS, save_pairs, save_sheet, save_square
from vqtrain.run.pictures import save_tokens

RNG = np.random.default_rng(0)


def tiles(path, size, columns):
    """Returns the images of a sheet, row by row, as (n, height, width, 3) uint8."""
    with Image.open(path) as picture:
        factor = max(1, round(SHEET_PIXELS / (columns * (size + GAP) + GAP)))
        small = picture.convert("RGB").resize(
            (picture.width // factor, picture.height // factor), Image.Resampling.NEAREST
        )
    pixels = np.asarray(small)
    step = size + GAP
    assert pixels.shape[1] == columns * step + GAP
    return np.stack(
        [
            pixels[GAP + row * step :, GAP + column * step :][:size, :size]
            for row in range(pixels.shape[0] // step)
            for column in range(columns)
        ]
    )


def levels(images):
    """Returns images (N, C, H, W) in [0, 1] as ``tiles`` gives them."""
    pixels = np.round(255 * images).astype(np.uint8).transpose(0, 2, 3, 1)
    return np.broadcast_to(pixels, (*pixels.shape[:3], 3))


@pytest.mark.parametrize(("channels", "shown"), [(1, 1), (2, 1), (3, 3), (4, 3), (7, 1)])
def test_a_sheet_holds_every_image_in_order(tmp_path, channels, shown):
    images = RNG.random((5, channels, 8, 8))
    save_sheet(tmp_path / "x.png", images, 3)
    found = tiles(tmp_path / "x.png", 8, 3)
    np.testing.assert_array_equal(found[:5], levels(images[:, :shown]))
    assert (found[5] == 128).all()
    save_square(tmp_path / "y.png", images)
    np.testing.assert_array_equal(tiles(tmp_path / "y.png", 8, 3), found)


@pytest.mark.parametrize("count", [3, 16, 21])
def test_every_image_stands_above_its_reconstruction(tmp_path, count):
    images, others = RNG.random((2, count, 3, 8, 8))
    save_pairs(tmp_path / "x.png", images, others)
    columns = min(16, count)
    found = tiles(tmp_path / "x.png", 8, columns)
    for i in range(count):
        at = 2 * columns * (i // columns) + i % columns
        np.testing.assert_array_equal(found[at], levels(images)[i])
        np.testing.assert_array_equal(found[at + columns], levels(others)[i])


def test_large_images_stand_in_short_rows(tmp_path):
    save_pairs(tmp_path / "x.png", *RNG.random((2, 4, 3, 256, 256)))
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (3 * 258 + 2, 4 * 258 + 2)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_map_has_a_cell_for_every_token_in_the_colour_of_its_code(tmp_path, depth, channels):
    spec = families.residual((channels, 8, 16), 8, 1, 4, depth=depth, num_codes=9, code_size=4)
    images, others = RNG.random((2, 3, *spec.image_shape))
    indices = RNG.integers(0, 9, (3, spec.latent_size))
    colours = RNG.random((9, 3))
    save_tokens(tmp_path / "x.png", spec, images, others, indices, colours)
    with Image.open(tmp_path / "x.png") as picture:
        factor = round(SHEET_PIXELS / (3 * (16 + GAP) + GAP))
        pixels = np.asarray(picture)[::factor, ::factor]
    expected = np.round(255 * colours).astype(np.uint8)
    for n in range(3):
        for m in range(depth):
            top, left = GAP + (2 + m) * (8 + GAP), GAP + n * (16 + GAP)
            for i in range(2):  # a latent covers 4x4 pixels
                for j in range(4):
                    index = indices[n, (i * 4 + j) * depth + m]
                    cell = pixels[top + 4 * i : top + 4 * i + 4, left + 4 * j : left + 4 * j + 4]
                    assert (cell == expected[index]).all()


def test_like_codes_have_like_colours_whatever_lies_astray():
    codebook = RNG.normal(0, 1, (64, 8)) * np.linspace(3, 0.1, 8)
    hits = RNG.integers(1, 100, 64)
    near = np.vstack([codebook, codebook + 1e-4])
    astray, unused = 1e5 * RNG.normal(0, 1, (64, 8)), np.zeros(64, np.int64)
    found = code_colours(near, np.hstack([hits, hits]))
    assert (found >= 0).all()
    assert (found <= 1).all()
    assert np.abs(found[:64] - found[64:]).max() < 0.05
    assert len(np.unique(found[:64].round(3), axis=0)) == 64
    apart = np.linalg.norm(codebook[:, None] - codebook, axis=-1)
    colours = np.linalg.norm(found[:64, None] - found[:64], axis=-1)
    assert np.corrcoef(apart.ravel(), colours.ravel())[0, 1] > 0.5
    with_astray = code_colours(np.vstack([codebook, astray]), np.hstack([hits, unused]))
    np.testing.assert_allclose(with_astray[:64], code_colours(codebook, hits), atol=1e-9)


@pytest.mark.parametrize(("codes", "size"), [(1, 4), (2, 1), (5, 2)])
def test_few_codes_of_few_elements_have_colours(codes, size):
    found = code_colours(RNG.normal(0, 1, (codes, size)), np.ones(codes, np.int64))
    assert found.shape == (codes, 3)
    assert np.isfinite(found).all()
