"""Images as users have them: every form gives the same pixels, and every misfit is named."""

import gzip
import io
import struct
import zipfile

import numpy as np
import pytest

from vqref.errors import InputError
from vqref.host.images import as_batch, load

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (5, 8, 12), np.uint8)
COLOUR = RNG.integers(0, 256, (5, 8, 12, 3), np.uint8)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write(path, array, form: str):
    if form == "npy":
        np.save(path, array)
    elif form == "npz":
        np.savez_compressed(path, array)
    elif form == "named npz":
        np.savez(path, images=array, labels=np.arange(5))
    else:
        path.write_bytes(idx(array) if form == "idx" else gzip.compress(idx(array)))


@pytest.mark.parametrize(
    ("form", "suffix"),
    [("npy", ".npy"), ("npz", ".npz"), ("named npz", ".npz"), ("idx", ""), ("gz", ".gz")],
)
def test_every_file_form_gives_the_same_images(tmp_path, form, suffix):
    path = tmp_path / f"images{suffix}"
    write(path, GREY, form)
    found = load(path)
    assert (found.train.shape, found.train.dtype) == ((5, 1, 8, 12), np.uint8)
    np.testing.assert_array_equal(found.train[:, 0], GREY)
    assert found.held_out is None
    assert found.source == path.name
    assert len(found.sha256) == 64


@pytest.mark.parametrize("array", [COLOUR, COLOUR.transpose(0, 3, 1, 2)])
def test_colour_images_come_channels_first(tmp_path, array):
    np.save(tmp_path / "x.npy", array)
    np.testing.assert_array_equal(load(tmp_path / "x.npy").train, COLOUR.transpose(0, 3, 1, 2))


def test_floating_images_stay_floating(tmp_path):
    np.save(tmp_path / "x.npy", GREY / 255)
    found = load(tmp_path / "x.npy").train
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[:, 0], (GREY / 255).astype(np.float32))


@pytest.mark.parametrize(
    ("train", "held_out", "form"),
    [
        ("kmnist-train-imgs.npz", "kmnist-test-imgs.npz", "npz"),
        ("train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz", "gz"),
    ],
)
def test_a_folder_is_known_by_its_official_names(tmp_path, train, held_out, form):
    write(tmp_path / train, GREY, form)
    assert load(tmp_path).held_out is None
    write(tmp_path / held_out, GREY[:2], form)
    found = load(tmp_path)
    assert found.source == train
    np.testing.assert_array_equal(found.held_out[:, 0], GREY[:2])


def promising(shape: tuple[int, ...]) -> bytes:
    """A .npy file whose header promises far more than the 64 bytes that follow."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    return buffer.getvalue() + bytes(64)


def bomb(path):
    """An archive whose directory and header both say 9 GiB."""
    header = promising((9, 2**30))[:-64]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", header)
    content = bytearray(path.read_bytes())
    directory = content.index(b"PK\x01\x02")
    content[directory + 24 : directory + 28] = struct.pack(
        "<I", 0xFFFFFFFF
    )  # the size is in a zip64 field instead
    extra = struct.pack("<HHQ", 1, 8, len(header) + 9 * 2**30)
    content[directory + 30 : directory + 32] = struct.pack("<H", len(extra))
    name_end = directory + 46 + len("arr_0.npy")
    content[name_end:name_end] = extra
    end = content.index(b"PK\x05\x06")
    content[end + 12 : end + 16] = struct.pack("<I", end - directory)
    path.write_bytes(content)


def code_in_npz(path):
    np.save(path, np.array([print], dtype=object), allow_pickle=True)


BAD_FILES = {
    "text": (lambda p: p.write_text("hello"), "neither .npz, .npy nor IDX"),
    "empty": (lambda p: p.write_bytes(b""), "neither .npz, .npy nor IDX"),
    "cut npy": (lambda p: p.write_bytes(b"\x93NUMPY\x01\x00"), "not a readable image file"),
    "cut zip": (lambda p: p.write_bytes(b"PK\x03\x04"), "not a readable image file"),
    "cut gzip": (
        lambda p: p.write_bytes(gzip.compress(idx(GREY))[:60]),
        "not a readable image file",
    ),
    "cut idx": (lambda p: p.write_bytes(idx(GREY)[:-1]), "but 479 bytes follow"),
    "labels": (lambda p: p.write_bytes(idx(np.zeros(5, np.uint8))), "neither .npz, .npy nor IDX"),
    "objects": (code_in_npz, "dtype is object"),
    "npz bomb": (bomb, "holds 9.0 GiB of images, more than the 8 GiB"),
    "npy that promises": (
        lambda p: p.write_bytes(promising((9, 2**30))),
        "header declares 9663676416 bytes, 64 are there",
    ),
    "empty archive": (lambda p: zipfile.ZipFile(p, "w").close(), r"holds arrays \(none\)"),
    "integers": (lambda p: np.save(p, GREY.astype(np.int32)), "dtype is int32, expected uint8"),
    "range": (lambda p: np.save(p, GREY.astype(float)), r"values from 0 to 255, expected \[0, 1\]"),
    "nan": (lambda p: np.save(p, np.full((1, 8, 8), np.nan)), r"nan at \(0, 0, 0\)"),
    "one axis": (
        lambda p: np.save(p, np.zeros(4, np.uint8)),
        r"shape is \(4,\), expected \(N, H, W\)",
    ),
    "two layouts": (
        lambda p: np.save(p, np.zeros((1, 4, 8, 4), np.uint8)),
        r"could be \(N, C, H, W\) or \(N, H, W, C\)",
    ),
    "two channels": (
        lambda p: np.save(p, np.zeros((1, 8, 8, 2), np.uint8)),
        r"shape is \(1, 8, 8, 2\)",
    ),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_that_holds_no_images_is_named_with_what_was_found(tmp_path, kind):
    make, message = BAD_FILES[kind]
    path = tmp_path / "x.npy"
    make(path)
    with pytest.raises(InputError, match=message) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_an_archive_of_several_arrays_must_name_the_images(tmp_path):
    np.savez(tmp_path / "x.npz", a=GREY, b=GREY)
    with pytest.raises(
        InputError, match=r"holds arrays a, b; expected one, or one named arr_0 or images"
    ):
        load(tmp_path / "x.npz")


def test_missing_files_and_folders_without_images_are_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.npz: No such file"):
        load(tmp_path / "nowhere.npz")
    with pytest.raises(
        InputError, match=r"the folder holds no kmnist-train-imgs\.npz or train-images"
    ):
        load(tmp_path)


def test_held_out_images_of_another_size_are_refused(tmp_path):
    write(tmp_path / "kmnist-train-imgs.npz", GREY, "npz")
    write(tmp_path / "kmnist-test-imgs.npz", GREY[:, :4], "npz")
    with pytest.raises(
        InputError,
        match=r"images of \(1, 4, 12\), those of kmnist-train-imgs\.npz are \(1, 8, 12\)",
    ):
        load(tmp_path)


def test_every_layout_of_a_batch_gives_the_same_pixels():
    expected = (GREY[:, None] / np.float32(255)).astype(np.float32)
    for images in (GREY, GREY[:, None], GREY[..., None], GREY / np.float32(255)):
        found = as_batch(images, (1, 8, 12))
        assert (found.shape, found.dtype) == ((5, 1, 8, 12), np.float32)
        np.testing.assert_array_equal(found, expected)
    for image in (GREY[0], GREY[0][None], GREY[0][..., None]):
        np.testing.assert_array_equal(as_batch(image, (1, 8, 12)), expected[:1])
    colour = as_batch(COLOUR, (3, 8, 12))
    np.testing.assert_array_equal(as_batch(COLOUR[0], (3, 8, 12)), colour[:1])
    np.testing.assert_array_equal(as_batch(COLOUR[0].transpose(2, 0, 1), (3, 8, 12)), colour[:1])
    np.testing.assert_array_equal(colour, as_batch(COLOUR.transpose(0, 3, 1, 2), (3, 8, 12)))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            GREY[0, :, 1:],
            r"shape is \(8, 11\), expected \(N, 8, 12\), \(N, 1, 8, 12\) or \(N, 8, 12, 1\)",
        ),
        (GREY[:, :4], r"shape is \(5, 4, 12\)"),
        (COLOUR, r"shape is \(5, 8, 12, 3\)"),
        (GREY.astype(np.int64), "dtype is int64"),
        (GREY.astype(np.float32), "values from 0 to 255"),
        (np.full((1, 8, 12), np.inf), "inf at"),
    ],
)
def test_a_batch_that_does_not_fit_is_named(images, message):
    with pytest.raises(InputError, match=message):
        as_batch(images, (1, 8, 12))
