"""Sources of images: Kuzushiji-MNIST from cache or network, the generated set, the user's files."""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from vqref.errors import InputError, MachineError
from vqref.host.files import read_bytes, write_file
from vqref.host.images import OFFICIAL_NAMES, ImageSet, load
from vqref.host.pictures import Reading, asked_of_pictures, load_any
from vqref.preprocessing import WHITE, Colour, parse_colour
from vqtrain.data.streams import AS_USUAL, Stream, Streaming, is_stream, open_stream

KMNIST_FILES = dict(
    zip(
        OFFICIAL_NAMES[1],
        (
            "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
            "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5",
        ),
        strict=True,
    )
)
"""The official image files and their sha256. The sha256 decides, whoever serves the files."""

KMNIST_PLACES = (
    "http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
    "https://huggingface.co/datasets/tanganke/kmnist/resolve/756d43e894032ce8838db8b32e7500c9c3b5d050/raw/",
)
"""The publisher, and a mirror of the same files."""

PLACE_VARIABLE = "PORTABLE_VQVAE_KMNIST_URL"
"""The environment variable that names another place, such as a mirror in the user's network."""

CACHE_VARIABLE = "PORTABLE_VQVAE_CACHE"
"""The environment variable that names another folder for downloads and generated images."""

PROBE_SECONDS = 5.0
"""The longest wait for an answer from the network."""

RETRIES = 2
"""How often an interrupted download starts again."""

LARGEST_SEAL = 1024
"""The most bytes in a file with a digest."""

GLYPHS_TRAIN, GLYPHS_HELD_OUT = 12_000, 2_000

PLAIN = Reading()
"""Pictures read as they are."""

COLOURS = {"white": WHITE, "black": (0, 0, 0)}
"""Backgrounds with a name."""

Say = Callable[[str], None]


def load_source(
    source: str, say: Say, reading: Reading = PLAIN, streaming: Streaming = AS_USUAL
) -> ImageSet | Stream:
    """Loads the images that ``--data`` names: "auto", "kmnist", "glyphs", or a path.

    "auto" is KMNIST from the cache, else from the network, else the generated set; ``say`` then
    gets a line that says so.

    reading: how pictures are read. Its options are refused for sources without pictures.
    streaming: how shards are read. Its options are refused for sources that fit in memory.

    Raises InputError for refused options and for files without images, and MachineError if KMNIST
    is wanted and not available.
    """
    named = source in ("auto", "kmnist", "glyphs")
    if not named and is_stream(Path(source), reading.recursive):
        return open_stream(Path(source), reading, streaming)
    if option := streaming.asked():
        raise InputError(
            f"{option} is for shards, which are read in pieces, not for --data {source}"
        )
    if named:
        if flag := asked_of_pictures(reading):
            raise InputError(f"{flag} is for a folder of pictures, not for --data {source}")
        if source == "glyphs":
            return load_glyphs(cache_folder())
        try:
            return load_kmnist(cache_folder(), say)
        except MachineError as error:
            if source == "kmnist":
                raise
            say(f"GENERATED IMAGES, not Kuzushiji-MNIST: {error}")
            return load_glyphs(cache_folder())
    return load_any(Path(source), reading)


def parse_size(text: str) -> tuple[int, int]:
    """Parses ``--resize``: HxW as (H, W), each at least 1."""
    height, cross, width = text.partition("x")
    if not (cross and height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 28x28")
    return int(height), int(width)


def parse_background(text: str) -> Colour:
    """Parses ``--background``: #rrggbb, white or black, as red, green and blue."""
    try:
        return COLOURS.get(text) or parse_colour(text.lower())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like #ffffff, white or black") from None


def cache_folder() -> Path:
    """Returns the folder that keeps downloads and generated images between runs."""
    import pooch

    return Path(os.environ.get(CACHE_VARIABLE) or pooch.os_cache("portable-vqvae"))


def load_kmnist(cache: Path, say: Say, places: Sequence[str] | None = None) -> ImageSet:
    """Returns KMNIST's training and held-out images.

    Hashes cached files again, and downloads those whose digests are wrong. Raises MachineError that
    says what each place answered.
    """
    folder = cache / "kmnist"
    missing = [name for name, digest in KMNIST_FILES.items() if not _holds(folder / name, digest)]
    if missing:
        override = os.environ.get(PLACE_VARIABLE)
        _download(folder, missing, places or ([override] if override else KMNIST_PLACES), say)
    return load(folder)


def load_glyphs(cache: Path) -> ImageSet:
    """Returns the generated set. Draws it once and keeps it; draws a damaged file again."""
    from vqtrain.data.glyphs import glyphs

    path = cache / f"glyphs-{GLYPHS_TRAIN}-{GLYPHS_HELD_OUT}.npz"
    seal = path.with_suffix(".sha256")
    digest = read_bytes(seal, LARGEST_SEAL).decode(errors="replace") if seal.exists() else ""
    if not _holds(path, digest.strip()):
        images, labels = glyphs(GLYPHS_TRAIN + GLYPHS_HELD_OUT)
        content = io.BytesIO()
        np.savez_compressed(content, images=images, labels=labels)
        cache.mkdir(parents=True, exist_ok=True)
        write_file(path, content.getvalue())
        write_file(seal, hashlib.sha256(content.getvalue()).hexdigest().encode())
    whole = load(path)
    return ImageSet(
        whole.train[:GLYPHS_TRAIN], whole.train[GLYPHS_TRAIN:], "glyphs (generated)", whole.sha256
    )


def _holds(path: Path, digest: str) -> bool:
    """Whether there is a file with this sha256. Raises InputError if it is not a regular file."""
    return path.exists() and hashlib.sha256(read_bytes(path)).hexdigest() == digest


def _download(folder: Path, names: Sequence[str], places: Sequence[str], say: Say) -> None:
    """Fetches ``names`` from the first place that has them. Raises MachineError.

    Checks each file against its sha256 before the file gets its name.
    """
    import pooch

    pooch.get_logger().setLevel("ERROR")
    answers = _probe([place + names[0] for place in places])
    reasons = [
        f"{_host(place)} {answer}" for place, answer in zip(places, answers, strict=True) if answer
    ]
    for place, answer in zip(places, answers, strict=True):
        if answer:
            continue
        registry = {name: f"sha256:{KMNIST_FILES[name]}" for name in names}
        shelf = pooch.create(
            path=folder, base_url=place, registry=registry, retry_if_failed=RETRIES
        )
        try:
            for name in names:
                say(f"downloading {place}{name}")
                shelf.fetch(
                    name,
                    downloader=pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=30),
                )
            return
        except OSError as error:  # includes the errors of requests
            reasons.append(f"{_host(place)} {_first_line(error)}")
        except ValueError:  # a wrong digest
            reasons.append(f"{_host(place)} sent other bytes than the official file")
    raise MachineError(
        f"Kuzushiji-MNIST is not in {folder} and cannot be downloaded: {'; '.join(reasons)}"
    )


def _probe(urls: Sequence[str]) -> list[str | None]:
    """Returns None for each address that answers, and for others why they do not.

    Asks all at once, and waits at most PROBE_SECONDS for each.
    """
    import requests

    found: list[str | None] = ["did not answer"] * len(urls)

    def ask(i: int, url: str) -> None:
        try:
            status = requests.head(url, timeout=PROBE_SECONDS, allow_redirects=True).status_code
            found[i] = None if status < 400 else f"answered {status}"
        except requests.RequestException as error:
            found[i] = f"cannot be reached ({type(error).__name__})"

    threads = [threading.Thread(target=ask, args=pair, daemon=True) for pair in enumerate(urls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PROBE_SECONDS)
    return list(found)


def _host(place: str) -> str:
    return urlsplit(place).hostname or place


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
