"""Where images come from: the cache, folders, and a network that may lie, break or be missing."""

import argparse
import gzip
import hashlib
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vqref.errors import InputError, MachineError
from vqref.host.images import ImageSet
from vqref.host.pictures import Reading
from vqref.preprocessing import Preprocessing
from vqtrain.data import sources
from vqtrain.data.sources import load_kmnist, load_source

RNG = np.random.default_rng(0)


def loaded(source: str, *how) -> ImageSet:
    """Returns what ``load_source`` returns, which must not be a stream."""
    found = load_source(source, *how)
    assert isinstance(found, ImageSet)
    return found


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(">HBB3I", 0, 8, 3, *array.shape)
    return gzip.compress(header + array.tobytes(), mtime=0)


TRAIN, HELD_OUT = (
    RNG.integers(0, 256, (20, 28, 28), np.uint8),
    RNG.integers(0, 256, (5, 28, 28), np.uint8),
)
FILES = dict(zip(sources.KMNIST_FILES, (idx(TRAIN), idx(HELD_OUT)), strict=True))
PAGE = b"<html>This site has moved</html>"


@pytest.fixture(autouse=True)
def small_kmnist(monkeypatch):
    """Two small files in place of the official ones; their digests count as the official ones."""
    monkeypatch.setattr(
        sources,
        "KMNIST_FILES",
        {name: hashlib.sha256(body).hexdigest() for name, body in FILES.items()},
    )
    monkeypatch.setattr(sources, "RETRIES", 0)
    monkeypatch.setattr(sources, "PROBE_SECONDS", 2.0)


class Server:
    """A place on this machine. ``answer(name)`` gives (status, body, how many bytes are sent)."""

    def __init__(self, answer) -> None:
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path.rsplit("/", 1)[1]
                outer.asked.append(f"{self.command} {name}")
                status, body, sent = answer(name)
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body[:sent])
                self.close_connection = True

            do_HEAD = do_GET  # noqa: N815, the name that the base class calls

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.place = f"http://127.0.0.1:{self.http.server_port}/kmnist/"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def serve():
    started = []

    def start(answer) -> Server:
        started.append(Server(answer))
        return started[-1]

    yield start
    for server in started:
        server.http.shutdown()
        server.http.server_close()


def honest(name):
    return 200, FILES[name], None


def silent(line):
    pass


def test_kmnist_is_downloaded_once_and_hashed_again_when_it_is_read(tmp_path, serve):
    server = serve(honest)
    found = load_kmnist(tmp_path, silent, [server.place])
    np.testing.assert_array_equal(found.train[:, 0], TRAIN)
    np.testing.assert_array_equal(found.held_out[:, 0], HELD_OUT)
    asked = len(server.asked)
    load_kmnist(tmp_path, silent, [server.place])
    assert len(server.asked) == asked
    damaged = tmp_path / "kmnist" / "t10k-images-idx3-ubyte.gz"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    np.testing.assert_array_equal(
        load_kmnist(tmp_path, silent, [server.place]).held_out[:, 0], HELD_OUT
    )
    assert server.asked[asked:] == [
        "HEAD t10k-images-idx3-ubyte.gz",
        "GET t10k-images-idx3-ubyte.gz",
    ]


LIARS = {
    "an HTML page": (lambda name: (200, PAGE, None), "sent other bytes than the official file"),
    "other bytes": (
        lambda name: (200, FILES[name][:-4] + b"abcd", None),
        "sent other bytes than the official file",
    ),
    "half a file": (
        lambda name: (200, FILES[name], 100),
        "ChunkedEncodingError|ConnectionError|sent other bytes",
    ),
    "not found": (lambda name: (404, PAGE, None), "answered 404"),
}


@pytest.mark.parametrize("kind", LIARS)
def test_a_place_that_sends_something_else_is_named_and_leaves_nothing(tmp_path, serve, kind):
    answer, reason = LIARS[kind]
    with pytest.raises(MachineError, match=rf"cannot be downloaded: 127\.0\.0\.1 .*({reason})"):
        load_kmnist(tmp_path, silent, [serve(answer).place])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("kind", LIARS)
def test_the_mirror_serves_where_the_publisher_does_not(tmp_path, serve, kind):
    answer, _ = LIARS[kind]
    places = [serve(answer).place, serve(honest).place]
    np.testing.assert_array_equal(load_kmnist(tmp_path, silent, places).train[:, 0], TRAIN)


def test_without_a_network_kmnist_is_an_error_and_auto_says_loudly_what_it_takes(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("PORTABLE_VQVAE_CACHE", str(tmp_path))
    monkeypatch.setenv("PORTABLE_VQVAE_KMNIST_URL", "http://127.0.0.1:9/")
    monkeypatch.setattr(sources, "GLYPHS_TRAIN", 30)
    monkeypatch.setattr(sources, "GLYPHS_HELD_OUT", 10)
    with pytest.raises(
        MachineError,
        match=r"Kuzushiji-MNIST is not in .* cannot be downloaded: 127\.0\.0\.1 cannot be reached",
    ):
        load_source("kmnist", silent)
    said: list[str] = []
    found = loaded("auto", said.append)
    assert said[0].startswith("GENERATED IMAGES, not Kuzushiji-MNIST: ")
    assert found.source == "glyphs (generated)"
    assert (len(found.train), len(found.held_out)) == (30, 10)


def test_generated_images_are_kept_and_drawn_again_where_the_copy_is_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "GLYPHS_TRAIN", 30)
    monkeypatch.setattr(sources, "GLYPHS_HELD_OUT", 10)
    first = sources.load_glyphs(tmp_path)
    (kept,) = tmp_path.glob("*.npz")
    stamp = kept.stat().st_mtime_ns
    sources.load_glyphs(tmp_path)
    assert kept.stat().st_mtime_ns == stamp
    kept.write_bytes(kept.read_bytes()[:-1])
    np.testing.assert_array_equal(sources.load_glyphs(tmp_path).train, first.train)


def picture(path, size=(12, 8), mode="L", level=100):
    Image.new(mode, size, level if mode == "L" else (level, 0, 0)).save(path)


def test_a_folder_of_pictures_is_read_in_the_order_of_names(tmp_path):
    for name, level in (("b.png", 50), ("a.png", 200), ("c.jpg", 90)):
        picture(tmp_path / name, level=level)
    (tmp_path / "notes.txt").write_text("not a picture")
    found = loaded(str(tmp_path), silent)
    assert (found.train.shape, found.train.dtype) == ((3, 1, 8, 12), np.uint8)
    assert [int(image.mean()) for image in found.train] == [200, 50, 90]
    picture(tmp_path / "d.png", mode="RGB")
    assert loaded(str(tmp_path), silent).train.shape == (4, 3, 8, 12)


def test_pictures_of_different_sizes_are_resized_only_when_asked(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", size=(8, 8))
    with pytest.raises(InputError, match=r"b\.png: 8x8 pixels, a\.png has 8x12; use --resize HxW"):
        load_source(str(tmp_path), silent)
    assert loaded(str(tmp_path), silent, Reading(size=(16, 20))).train.shape == (2, 1, 16, 20)


def test_folders_without_pictures_and_broken_pictures_are_named(tmp_path):
    with pytest.raises(InputError, match="holds no image files and no official KMNIST files"):
        load_source(str(tmp_path), silent)
    (tmp_path / "a.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(InputError, match=r"a\.png: not a readable image"):
        load_source(str(tmp_path), silent)


OF_PICTURES: dict[str, dict[str, Any]] = {
    "--resize": {"size": (8, 8)},
    "--crop": {"crop": True},
    "--background": {"background": (0, 0, 0)},
    "--channels": {"channels": 1},
    "--recursive": {"recursive": True},
    "--skip-bad": {"skip_bad": True},
}


@pytest.mark.parametrize("option", OF_PICTURES)
def test_options_of_pictures_are_for_folders_of_pictures_alone(tmp_path, option):
    np.save(tmp_path / "x.npy", TRAIN)
    for source in ("glyphs", "kmnist", "auto", str(tmp_path / "x.npy")):
        with pytest.raises(InputError, match=f"{option} is for a folder of pictures"):
            load_source(source, silent, Reading(**OF_PICTURES[option]))


def test_what_a_model_says_of_its_pictures_is_no_option(tmp_path):
    np.save(tmp_path / "x.npy", TRAIN)
    preprocessing = Preprocessing(1, (28, 28), crop=True, background=(0, 0, 0))
    found = loaded(str(tmp_path / "x.npy"), silent, Reading.of(preprocessing, (1, 28, 28)))
    assert found.train.shape == (20, 1, 28, 28)


@pytest.mark.parametrize(
    ("text", "colour"),
    [("white", (255, 255, 255)), ("black", (0, 0, 0)), ("#0a0B0c", (10, 11, 12))],
)
def test_a_background_is_a_colour_or_its_name(text, colour):
    assert sources.parse_background(text) == colour


@pytest.mark.parametrize("text", ["", "red", "#fff", "#ffffff0", "ffffff", "#gggggg", "snow"])
def test_what_is_no_background_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not like #ffffff, white or black"):
        sources.parse_background(text)
