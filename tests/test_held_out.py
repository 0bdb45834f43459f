"""Which images are held out: chosen by hash, so that sets may grow, or a separate set."""

import argparse
import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vqref.errors import InputError
from vqref.host.images import ImageSet
from vqref.host.pictures import Reading, load_any
from vqref.preprocessing import Preprocessing
from vqtrain.data.holdout import described, hold_out, parse, record, split

FRACTIONS = st.floats(0, 1, exclude_max=True)
SEEDS = st.integers(0, 2**32 - 1)


def drawn(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 1, 3, 4), np.uint8)


def source(images: np.ndarray, held_out: np.ndarray | None = None) -> ImageSet:
    return ImageSet(images, held_out, "x.npz", "0" * 64)


def test_an_image_is_held_out_by_the_first_eight_bytes_of_its_sha256():
    images = drawn(0, 200)
    places = [int(hashlib.sha256(image.tobytes()).hexdigest()[:16], 16) / 2**64 for image in images]
    found = split(images, 0.3)
    assert (found.shape, found.dtype) == ((200,), np.bool_)
    np.testing.assert_array_equal(found, np.array(places) < 0.3)


def test_the_layout_in_memory_does_not_matter_and_floats_have_their_own_hash():
    images = np.random.default_rng(0).random((100, 3, 4, 5), np.float32)
    last = np.ascontiguousarray(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    assert not last.flags.c_contiguous
    np.testing.assert_array_equal(split(last, 0.5), split(images, 0.5))
    expected = [hashlib.sha256(i.tobytes()).digest()[0] < 128 for i in images]
    np.testing.assert_array_equal(split(images, 0.5), expected)


@given(seed=SEEDS, fraction=FRACTIONS, count=st.integers(0, 60), more=st.integers(0, 60))
@settings(deadline=None)
def test_a_longer_set_keeps_its_split(seed, fraction, count, more):
    images = drawn(seed, count + more)
    whole = split(images, fraction)
    np.testing.assert_array_equal(split(images[:count], fraction), whole[:count])
    np.testing.assert_array_equal(split(images[count:], fraction), whole[count:])


@given(seed=SEEDS, fraction=FRACTIONS, count=st.integers(1, 60))
@settings(deadline=None)
def test_the_order_does_not_matter_and_copies_stay_together(seed, fraction, count):
    images, rng = drawn(seed, count), np.random.default_rng(seed)
    order = rng.integers(0, count, 2 * count)  # some images twice, some not at all
    np.testing.assert_array_equal(split(images[order], fraction), split(images, fraction)[order])


@given(seed=SEEDS, low=FRACTIONS, high=FRACTIONS)
@settings(deadline=None)
def test_a_larger_fraction_holds_out_the_same_and_more(seed, low, high):
    low, high = sorted((low, high))
    images = drawn(seed, 100)
    assert not (split(images, low) & ~split(images, high)).any()


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.1, 0.5, 0.9])
def test_about_the_fraction_is_held_out(fraction):
    count = 5000
    out = int(split(drawn(1, count), fraction).sum())
    deviation = np.sqrt(count * fraction * (1 - fraction))
    assert abs(out - count * fraction) <= 4 * deviation


def test_a_source_is_divided_and_says_how():
    images = drawn(0, 300)
    images[:, 0, 0, 0] = np.arange(300) % 256
    names = tuple(f"{i}.png" for i in range(300))
    whole = ImageSet(images, None, "x", "0" * 64, names=names, said=("a line",))
    found = hold_out(whole, None)
    out = split(images, 0.1)
    np.testing.assert_array_equal(found.train, images[~out])
    np.testing.assert_array_equal(found.held_out, images[out])
    assert found.names == tuple(name for name, apart in zip(names, out, strict=True) if not apart)
    assert (found.source, found.sha256, found.said) == ("x", "0" * 64, ("a line",))
    assert record(found) == {"fraction": 0.1, "images": int(out.sum())}
    kept, apart = len(found.train), len(found.held_out)
    assert described(found) == (f"{kept} images train, {apart} are held out (a tenth, by hash)")
    quarter = hold_out(whole, 0.25)
    assert described(quarter).endswith("are held out (0.25, by hash)")


def test_nothing_is_held_out_where_that_is_asked_for():
    found = hold_out(source(drawn(0, 30), drawn(1, 5)), 0.0)
    assert (len(found.train), found.held_out) == (30, None)
    assert record(found) == {"fraction": 0.0, "images": 0}
    assert described(found) == "30 images train, none are held out"


def test_what_a_source_holds_out_of_its_own_stays_unless_it_is_said_otherwise():
    given_ = source(drawn(0, 300), drawn(1, 5))
    assert hold_out(given_, None) is given_
    assert record(given_) == {"images": 5}
    assert described(given_) == "300 images train, 5 are held out (the source's own)"
    divided = hold_out(given_, 0.1)
    np.testing.assert_array_equal(divided.held_out, given_.train[split(given_.train, 0.1)])


def test_held_out_images_may_be_others(tmp_path):
    np.save(tmp_path / "test.npy", drawn(1, 7)[:, 0])
    found = hold_out(source(drawn(0, 30), drawn(2, 5)), tmp_path / "test.npy")
    np.testing.assert_array_equal(found.train, drawn(0, 30))
    np.testing.assert_array_equal(found.held_out, drawn(1, 7))
    digest = hashlib.sha256((tmp_path / "test.npy").read_bytes()).hexdigest()
    assert record(found) == {"source": "test.npy", "sha256": digest, "images": 7}
    assert described(found) == "30 images train, 7 are held out (test.npy)"


@pytest.fixture
def folders(tmp_path):
    """Two folders of colour pictures.

    The second also has one of another size, a grey one in a subfolder, and a broken one.
    """
    rng = np.random.default_rng(0)
    for name, sizes in (("train", [(8, 12)] * 3), ("test", [(8, 12), (24, 20)])):
        (tmp_path / name).mkdir()
        for i, size in enumerate(sizes):
            pixels = rng.integers(0, 256, (*size, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    (tmp_path / "test" / "below").mkdir()
    Image.new("L", (9, 9), 50).save(tmp_path / "test" / "below" / "grey.png")
    (tmp_path / "test" / "broken.png").write_bytes(b"\x89PNG")
    return tmp_path


def test_pictures_are_held_out_as_those_to_train_on_were_read(folders):
    train = load_any(folders / "train", Reading(size=(8, 8), crop=True))
    reading = Reading(recursive=True, skip_bad=True)
    found = hold_out(train, folders / "test", reading)
    expected = load_any(
        folders / "test",
        Reading.of(Preprocessing(3, (8, 8), crop=True), (3, 8, 8), recursive=True, skip_bad=True),
    )
    assert found.held_out.shape == (3, 3, 8, 8)
    np.testing.assert_array_equal(found.held_out, expected.train)
    assert found.said == (*train.said, *(f"held out: {line}" for line in expected.said))
    assert any("broken.png" in line for line in found.said)


def test_pictures_beside_arrays_must_have_their_size(folders):
    arrays = ImageSet(np.zeros((4, 3, 8, 12), np.uint8), None, "x.npz", "0" * 64)
    with pytest.raises(InputError, match="24x20"):
        hold_out(arrays, folders / "test", Reading(skip_bad=True))


def test_held_out_images_that_do_not_fit_are_named(tmp_path):
    whole = source(drawn(0, 30))
    np.save(tmp_path / "other.npy", np.zeros((5, 8, 8), np.uint8))
    with pytest.raises(InputError, match=r"other\.npy: images of \(1, 8, 8\), those to train on"):
        hold_out(whole, tmp_path / "other.npy")
    np.save(tmp_path / "empty.npy", np.zeros((0, 3, 4), np.uint8))
    with pytest.raises(InputError, match=r"empty\.npy: no images to hold out"):
        hold_out(whole, tmp_path / "empty.npy")
    with pytest.raises(InputError, match=r"nowhere\.npy: No such file"):
        hold_out(whole, tmp_path / "nowhere.npy")


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("0", 0.0),
        ("0.2", 0.2),
        ("1e-3", 1e-3),
        ("test.npz", Path("test.npz")),
        ("./0.2", Path("0.2")),
        ("0.2.npz", Path("0.2.npz")),
    ],
)
def test_the_option_is_a_fraction_or_a_path(text, meaning):
    assert parse(text) == meaning


@pytest.mark.parametrize("text", ["1", "-0.1", "nan", "inf", "10", ""])
def test_what_is_neither_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"a fraction from 0|neither a fraction"):
        parse(text)
