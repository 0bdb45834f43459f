"""Files of tokens: what they say about their bundle, and what a reader accepts.

Also the folder of PNGs that they become.
"""

import dataclasses
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import ROOT, small_model

from vqdeploy import Codec
from vqdeploy.pictures import file_names, require_free, write_pictures
from vqdeploy.tokens import Tokens, read_images, read_tokens, write_tokens
from vqref import families
from vqref.errors import InputError, MachineError
from vqref.preprocessing import Preprocessing

FORMS = (".npz", ".npy", ".parquet")
TOLD = (".npz", ".parquet")
"""Formats with room for what made the tokens."""

SPEC = families.post((1, 28, 28), base_depth=4, latent_size=4, num_codes=300, code_size=8)
CODEC: Any = SimpleNamespace(spec=SPEC, manifest_sha256="ab" * 32)
"""The part of a Codec that a file of tokens is checked against."""

INDICES = np.random.default_rng(0).integers(0, 300, (5, 4))
NAMES = ("a.png", "sub/é ü.jpg", "c", "d" * 300, "e.webp")


def written(path, names=None, **changes):
    write_tokens(path, dataclasses.replace(Tokens.of(CODEC, INDICES, names), **changes))
    return path


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("names", [None, NAMES])
def test_tokens_come_back_with_their_names_and_what_made_them(tmp_path, form, names):
    found = read_tokens(written(tmp_path / f"t{form}", names))
    assert found.indices.dtype == np.uint16  # the smallest dtype that holds an index
    np.testing.assert_array_equal(found.indices, INDICES)
    told = (found.names, found.manifest_sha256, found.latent_shape, found.num_codes)
    assert told == ((names, "ab" * 32, (4,), 300) if form in TOLD else (None,) * 4)


@pytest.mark.parametrize("form", TOLD)
def test_no_tokens_and_no_names_come_back_too(tmp_path, form):
    write_tokens(tmp_path / f"t{form}", Tokens.of(CODEC, INDICES[:0], ()))
    found = read_tokens(tmp_path / f"t{form}")
    assert (found.indices.shape, found.names) == ((0, 4), ())


@pytest.mark.parametrize("form", TOLD)
def test_tokens_of_another_bundle_are_refused_unless_forced(tmp_path, form):
    found = read_tokens(written(tmp_path / f"t{form}"))
    assert found.require(CODEC) is None
    other: Any = SimpleNamespace(spec=SPEC, manifest_sha256="cd" * 32)
    with pytest.raises(
        InputError, match="tokens of bundle abababababab…, this one is cdcdcdcdcdcd"
    ):
        found.require(other)
    assert "bundle abababababab…, decoded by cdcdcdcdcdcd…" in found.require(other, force=True)


def test_a_file_that_does_not_say_what_made_it_is_remarked_on(tmp_path):
    np.savez(tmp_path / "t.npz", indices=INDICES)
    for path in (tmp_path / "t.npz", written(tmp_path / "t.npy")):
        assert read_tokens(path).require(CODEC) == "it does not say which bundle made it"


@pytest.mark.parametrize("form", TOLD)
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"latent_shape": (2, 2)}, r"its latent_shape is \(2, 2\), this bundle has \(4,\)"),
        ({"num_codes": 512}, "its num_codes is 512, this bundle has 300"),
    ],
)
def test_tokens_of_another_grid_or_codebook_are_refused_even_if_forced(
    tmp_path, form, changes, said
):
    found = read_tokens(written(tmp_path / f"t{form}", manifest_sha256="0" * 64, **changes))
    with pytest.raises(InputError, match=said):
        found.require(CODEC, force=True)


def test_tokens_that_lie_the_other_way_are_refused():
    with pytest.raises(InputError, match=r"shape is \(4, 5\), \(S, N\), expected \(N, 4\)"):
        Tokens(INDICES.T).require(CODEC)
    Tokens(INDICES[:4].T).require(CODEC)  # nobody can see that it lies the other way


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"manifest_sha256": np.array("AB" * 32)}, "its manifest_sha256 is 'ABAB"),
        ({"manifest_sha256": np.array(7)}, "its manifest_sha256 is 7"),
        ({"manifest_sha256": np.array(["ab" * 32] * 9)}, r"its manifest_sha256 is <U64 \(9,\)"),
        ({"latent_shape": np.array(4)}, "its latent_shape is 4"),
        ({"latent_shape": np.array([1, 2, 2, 1])}, r"its latent_shape is \(1, 2, 2, 1\)"),
        ({"latent_shape": np.array([0, 4])}, r"its latent_shape is \(0, 4\)"),
        ({"latent_shape": np.array([4.0])}, r"its latent_shape is \(4.0,\)"),
        ({"num_codes": np.array(True)}, "its num_codes is True"),
        ({"num_codes": np.array([[300]])}, r"its num_codes is \(\[300\],\)"),
        ({"names": np.array(["a"] * 4)}, "holds 4 names for 5 rows"),
        ({"names": np.arange(5)}, r"its names are int64 \(5,\), expected \(N,\) of text"),
    ],
)
def test_an_archive_that_says_what_cannot_be_is_refused(tmp_path, entry, said):
    np.savez(tmp_path / "t.npz", **{"indices": INDICES, **entry})
    with pytest.raises(InputError, match=rf"t\.npz: {said}"):
        read_tokens(tmp_path / "t.npz")


def parquet(path, key=None, **said):
    pyarrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    from pyarrow import parquet

    rows = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(INDICES.ravel()), 4)
    columns = {} if key is None else {"key": key}
    table = pyarrow.table({**columns, "indices": rows}).replace_schema_metadata(said)
    parquet.write_table(table, path)
    return path


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ({"manifest_sha256": "ab"}, "its manifest_sha256 is 'ab'"),
        ({"manifest_sha256": b"\xff"}, "holds no tokens: 'utf-8' codec"),
        ({"latent_shape": "4"}, "its latent_shape is 4"),
        ({"latent_shape": "[" * 999}, "holds no tokens"),
        ({"latent_shape": "[4]" + " " * 1000}, "its latent_shape has 1003 bytes"),
        ({"num_codes": "true"}, "its num_codes is True"),
        ({"num_codes": "x"}, "holds no tokens: Expecting value"),
    ],
)
def test_a_parquet_file_that_says_what_cannot_be_is_refused(tmp_path, said, line):
    with pytest.raises(InputError, match=rf"t\.parquet: {line}"):
        read_tokens(parquet(tmp_path / "t.parquet", **said))


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ([1, 2, 3, 4, 5], "key is int64, expected text"),
        (["a", None, "b", "c", "d"], "key has gaps"),
    ],
)
def test_keys_that_are_no_names_are_refused(tmp_path, key, line):
    with pytest.raises(InputError, match=rf"t\.parquet: {line}"):
        read_tokens(parquet(tmp_path / "t.parquet", key))


def test_a_long_name_that_many_rows_share_takes_no_room_before_it_is_refused(tmp_path, monkeypatch):
    path = parquet(tmp_path / "t.parquet", ["x" * 1000] * 5)
    assert read_tokens(path).names == ("x" * 1000,) * 5
    monkeypatch.setattr("vqdeploy.tokens.LARGEST_ARRAY", 4 * 1000 * 5 - 1)
    with pytest.raises(InputError, match="the longest of its 5 names has 1000 characters"):
        read_tokens(path)
    monkeypatch.setattr("vqdeploy.tokens.MOST_NAMES", 4)
    with pytest.raises(InputError, match="holds 5 names, more than 4"):
        read_tokens(path)


@pytest.mark.parametrize(
    ("library", "arguments"),
    [
        ("pyarrow", ("encode", "x.npy", "--output", "t.parquet")),
        ("pyarrow", ("decode", "t.parquet")),
        ("PIL", ("decode", "t.npz", "--output", "out")),
        ("PIL", ("decode", "t.npz", "--output", "out.png")),
        ("PIL", ("reconstruct", "x.npy")),
        ("PIL", ("encode", "x.png")),
    ],
)
def test_a_library_that_is_missing_is_said_in_one_line_before_the_work(
    bundle, many_images, tmp_path, run, library, arguments
):
    np.save(tmp_path / "x.npy", many_images[:2])
    Image.fromarray(many_images[0]).save(tmp_path / "x.png")
    np.savez(tmp_path / "t.npz", indices=np.zeros((1, 4), int))
    (tmp_path / "t.parquet").touch()
    program = f"""
import sys
sys.modules[{library!r}] = None
from vqdeploy.codec import Codec
Codec.encode = Codec.decode = None  # nobody comes so far
from vqdeploy.__main__ import main
command, *more = sys.argv[1:]
sys.exit(main([command, {str(bundle)!r}, *more]))
"""
    done = run("-c", program, *arguments, PYTHONPATH=str(ROOT))
    assert done.returncode == 5, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "pip install" in done.stderr


def test_names_of_pictures_become_names_of_files():
    expected = {
        "a.png": "a",
        "a.jpg": "a-2",
        "A.webp": "A-3",
        "sub/a.png": "sub-a",
        "sub-a.gif": "sub-a-2",
        "a-2.png": "a-2-2",
        "x-2.png": "x-2",
        "X.png": "X",
        "X.gif": "X-3",  # on some systems, X-2 and x-2 are the same name
        "é ü.JPG": "é ü",
        "v1.2": "v1.2",
        "": "image",
    }
    assert file_names([*expected]) == [f"{name}.png" for name in expected.values()]


@pytest.mark.parametrize(
    "name",
    [
        *(
            "../../x.png",
            "/etc/passwd",
            "..",
            ".",
            ".hidden",
            "a\\..\\b",
            "a\0b",
            "\x1b[31m",
            "C:x",
        ),
        *("x" * 5000, "é" * 300, "\udcff", "a\nb", " ", "con?*.png"),
    ],
)
def test_no_name_leaves_the_folder(tmp_path, name):
    folder = tmp_path / "within" / "out"
    folder.parent.mkdir()
    write_pictures(folder, np.zeros((2, 1, 4, 4), np.uint8), (name, name))
    assert len(list(folder.iterdir())) == 2
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    for path in folder.iterdir():
        assert path.name.isprintable()
        assert not path.name.startswith(".")


def test_many_equal_names_take_no_time_that_grows_with_their_square():
    start = time.perf_counter()
    assert file_names(["a", "A"] * 5000)[-1] == "A-10000.png"
    assert time.perf_counter() - start < 1  # comparing each name with all others would take ten


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_folder_holds_the_levels_of_each_image(tmp_path, channels):
    images = np.random.default_rng(0).integers(0, 256, (11, channels, 5, 6), np.uint8)
    write_pictures(tmp_path / "out", images)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"{i:02}.png" for i in range(11)]
    for i, image in enumerate(images):
        with Image.open(tmp_path / "out" / f"{i:02}.png") as picture:
            found = np.asarray(picture).reshape(5, 6, channels)
        np.testing.assert_array_equal(found.transpose(2, 0, 1), image)


def test_a_folder_that_holds_something_stays_as_it_is(tmp_path, monkeypatch):
    images = np.zeros((1, 1, 4, 4), np.uint8)
    mine = tmp_path / "mine"
    mine.mkdir()
    require_free(mine)  # an empty folder may be used
    write_pictures(mine, images)
    (mine / "0.png").write_text("mine")
    for check in (lambda: require_free(mine), lambda: write_pictures(mine, images)):
        with pytest.raises((InputError, OSError)):
            check()
    assert (mine / "0.png").read_text() == "mine"
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: is not a folder"):
        require_free(tmp_path / "file")
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "other")
    monkeypatch.chdir(empty)
    for path in (empty, tmp_path / "link"):
        with pytest.raises(InputError, match="there is a folder already; name a new one"):
            require_free(path)
    with pytest.raises(MachineError, match="cannot be written"):
        require_free(tmp_path / "none" / "out")


@pytest.mark.parametrize(
    ("shape", "said"), [((0, 1), "no images to write"), ((1, 2), "expected 1, 3 or 4 for a PNG")]
)
def test_what_no_folder_of_pictures_can_hold_is_refused(tmp_path, shape, said):
    with pytest.raises(InputError, match=rf"out: .*{said}"):
        write_pictures(tmp_path / "out", np.zeros((*shape, 4, 4), np.uint8))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def official(tmp_path, many_images):
    np.savez(tmp_path / "kmnist-train-imgs.npz", many_images[:7])
    np.savez(tmp_path / "kmnist-test-imgs.npz", many_images[7:10].astype(np.float32) / 255)
    return tmp_path


def test_a_part_of_the_official_files_is_what_it_is_called(official, many_images):
    expected = many_images[:10, None] / np.float32(255)
    parts = {"train": expected[:7], "held-out": expected[7:], "all": expected}
    digests = set()
    for part, images in parts.items():
        found = read_images(official, SPEC, part=part)
        np.testing.assert_array_equal(found.images, images)
        assert found.images.dtype == np.float32
        assert found.names is None
        (line,) = found.said
        assert f"{len(images)} " in line
        digests.add(found.sha256)
    assert len(digests) == 3
    assert "the 7 training images" in read_images(official, SPEC).said[0]
    np.testing.assert_array_equal(
        read_images(official, SPEC, part="all", limit=8).images, expected[:8]
    )


def test_a_source_without_parts_has_no_held_out_images_and_nothing_to_say(tmp_path, many_images):
    np.save(tmp_path / "x.npy", many_images[:4])
    for part in ("train", "all"):
        found = read_images(tmp_path / "x.npy", SPEC, part=part, limit=3)
        assert (found.images.shape, found.said) == ((3, 1, 28, 28), ())
    with pytest.raises(InputError, match=r"x\.npy: holds no held-out images"):
        read_images(tmp_path / "x.npy", SPEC, part="held-out")


def test_pictures_are_prepared_for_the_model_and_what_was_done_is_said(tmp_path, many_images):
    (tmp_path / "sub").mkdir()
    Image.fromarray(many_images[0]).save(tmp_path / "a.png")
    Image.fromarray(np.stack([*many_images[1:4]], -1)[:20]).save(tmp_path / "sub" / "b.png")
    (tmp_path / "c.png").write_bytes(b"no picture")
    done = Preprocessing(1, (28, 28))
    with pytest.raises(InputError, match=r"c\.png: not a readable image"):
        read_images(tmp_path, SPEC, done)
    found = read_images(tmp_path, SPEC, done, recursive=True, skip_bad=True)
    assert (found.images.shape, found.names) == ((2, 1, 28, 28), ("a.png", "sub/b.png"))
    told = "\n".join(found.said)
    for said in ("1 of 2 pictures resized to 28x28", "colour made grey", "c.png"):
        assert said in told
    first = read_images(tmp_path, SPEC, done, recursive=True, skip_bad=True, limit=1)
    assert (first.images.shape, first.names) == ((1, 1, 28, 28), ("a.png",))
    with pytest.raises(InputError, match=r"b\.png: 20x28 pixels; this model was trained on"):
        read_images(tmp_path / "sub", SPEC)
    two = small_model(families.residual((2, 16, 16), hidden=8, blocks=1, block_hidden=4)).spec
    with pytest.raises(InputError, match="pictures give images of 1, 3 or 4 channels, not 2"):
        read_images(tmp_path, two, skip_bad=True)


def test_a_codec_decodes_what_its_tokens_say(bundle, many_images, tmp_path):
    codec = Codec.load(bundle, "cpu")
    indices = codec.encode(many_images[:5])
    write_tokens(tmp_path / "t.npz", Tokens.of(codec, indices, None))
    found = read_tokens(tmp_path / "t.npz")
    assert found.require(codec) is None
    np.testing.assert_array_equal(codec.decode(found.indices), codec.decode(indices))
