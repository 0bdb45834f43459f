"""Images that memory does not hold: shards of them, decoded by worker processes piece by piece.

What needs many images at once (the variance of the data, the mean pixel, the start of a codebook,
what is measured after an epoch) takes a bounded sample that is decoded once and kept.
docs/streams.md says what that changes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqref.errors import InputError, UsageError
from vqref.host.archives import ARCHIVES, Shard, counted, list_shards
from vqref.host.files import is_folder
from vqref.host.images import OFFICIAL_NAMES, ImageSet, as_images
from vqref.host.listing import ENDINGS, list_folder
from vqref.host.pictures import Reading, asked_of_pictures, in_words, read_pixels
from vqref.host.pixels import Done
from vqref.host.streams import plain
from vqref.preprocessing import Preprocessing
from vqref.validation import Array
from vqtrain.data.decoding import Decoder, Piece, decoded, records
from vqtrain.torchrun import local_world

PIECE = 128
"""Images of a shard that are read, decoded and shuffled together, where it can be cut."""

BUFFER, LARGEST_BUFFER = 8192, 2**27
"""Images that are shuffled at once, and the most bytes that they have."""

SAMPLED, SAMPLED_PIECES = 10_000, 64
"""Images of a sample, of at least so many pieces; it has at most LARGEST_BUFFER bytes, too."""

LOOKED_AT = 256
"""Pictures by which size and channels are decided where no option does."""

MAPPED = 2**30
"""Bytes of an ``.npy`` beyond which it is a stream."""

MOST_WORKERS = 8
"""Processes that decode unless an option says how many."""

ENDS = 2**16
"""Bytes at both ends of a file that its digest is of."""

_SPLIT = re.compile(r"(?:.*/)?(train|validation|valid|val|dev|test)[-._]")
_HELD_OUT = ("validation", "valid", "val", "dev", "test")


@dataclass(frozen=True)
class Streaming:
    """How shards are read.

    workers: processes that decode; 0: none but this one, None: one for each core of this rank but
    one, at most MOST_WORKERS. buffer: images that are shuffled at once, None: BUFFER. max_broken:
    how many images may be broken before a run stops, None: 0.
    """

    workers: int | None = None
    buffer: int | None = None
    max_broken: int | None = None

    def asked(self) -> str | None:
        """The first option that was given; None if there is none."""
        given = {f"--{each.name}": getattr(self, each.name) for each in dataclasses.fields(self)}
        return next((k.replace("_", "-") for k, value in given.items() if value is not None), None)

    def processes(self) -> int:
        """How many decode for this process, which shares its machine with other ranks."""
        if self.workers is not None:
            return self.workers
        usable = getattr(os, "sched_getaffinity", None)
        cores = len(usable(0)) if usable else os.cpu_count() or 1
        return max(1, min(MOST_WORKERS, cores // local_world() - 1))


AS_USUAL = Streaming()
"""No option was given."""


@dataclass(frozen=True)
class Stream:
    """A source of shards before it is known which images are held out.

    source: its name. pieces: all its images. own: those that it holds out itself, None if it does
    not. sha256: of the names, sizes and both ends of its files. reading, streaming: how it is read.
    said: lines on what was left out.
    """

    source: str
    pieces: tuple[Piece, ...]
    own: tuple[Piece, ...] | None
    sha256: str
    reading: Reading
    streaming: Streaming
    said: tuple[str, ...] = ()


@dataclass(frozen=True)
class StreamSet(ImageSet):
    """A stream whose held-out images are chosen: ``train`` and ``held_out`` are samples of both.

    pieces: the images to train on. decoder: how they are read. broken: the images that the samples
    lack, with the reasons. buffer: images that are shuffled at once.
    """

    pieces: tuple[Piece, ...] = field(kw_only=True)
    decoder: Decoder = field(kw_only=True)
    streaming: Streaming = field(kw_only=True)
    broken: tuple[str, ...] = field(kw_only=True)
    buffer: int = field(kw_only=True)

    @property
    def count(self) -> int:
        """How many images there are to train on."""
        return sum(len(piece.rows) for piece in self.pieces)


def is_stream(path: Path, recursive: bool = False) -> bool:
    """Whether the images there are read as they are needed: a parquet file, a tar, a large
    ``.npy``, or a folder of such files and of no pictures."""
    name = path.name.lower()
    if not is_folder(path):
        return name.endswith(tuple(e for e in ARCHIVES if e != ".npy" or _is_large(path)))
    if any((path / train).is_file() for train, _ in OFFICIAL_NAMES):
        return False
    return (
        bool(list_folder(path, recursive, ARCHIVES).files)
        and not list_folder(path, recursive, ENDINGS).files
    )


def _is_large(path: Path) -> bool:
    """Whether a file is beyond MAPPED; False, too, for a name that the system cannot look up."""
    try:
        return path.is_file() and path.stat().st_size > MAPPED
    except OSError:
        return False


def open_stream(path: Path, reading: Reading, streaming: Streaming) -> Stream:
    """The shards of a file or a folder; nothing is decoded.

    Raises InputError for files that are damaged or hold no images, and for options that they do not
    take; UsageError for options without sense; MachineError if pyarrow is not installed.
    """
    if reading.skip_bad:
        raise InputError("--skip-bad is for a folder of pictures; of shards, use --max-broken N")
    if reading.crop and reading.size is None:
        raise UsageError("--crop needs the size to crop to: --resize HxW")
    listed = list_shards(path, recursive=reading.recursive, images=PIECE)
    shards = [piece for shard in listed for piece in counted(shard, PIECE)]
    if not any(shard.images for shard in shards):
        raise InputError(f"{path}: its shards hold no images")
    option = asked_of_pictures(dataclasses.replace(reading, recursive=False))
    if option and all(shard.form == "npy" for shard in shards):
        raise InputError(f"{option} is for pictures; {path} holds arrays")
    train, own, said = _own_split(shards)
    pieces, held = _whole(train), _whole(own) or None
    return Stream(plain(path.name), pieces, held, _digest(shards), reading, streaming, said)


def _whole(shards: Sequence[Shard]) -> tuple[Piece, ...]:
    return tuple(Piece(shard, np.arange(shard.images or 0, dtype=np.int32)) for shard in shards)


def _own_split(shards: list[Shard]) -> tuple[list[Shard], list[Shard], tuple[str, ...]]:
    """The shards to train on and those that are held out, by the names that ``datasets`` gives
    them ("train-00000-of-00002.parquet"), and what is left out."""
    parts: dict[str, list[Shard]] = {}
    for shard in shards:
        found = _SPLIT.match(shard.name)
        parts.setdefault(found[1] if found else "", []).append(shard)
    own = next((name for name in _HELD_OUT if name in parts), None)
    if "train" not in parts or "" in parts or own is None:
        return shards, [], ()
    others = [name for name in parts if name not in ("train", own)]
    said = (f"left out: the shards of {', '.join(others)}",) if others else ()
    return parts["train"], parts[own], said


def _digest(shards: Sequence[Shard]) -> str:
    """Of the names, numbers of images, sizes and both ends of the files."""
    digest = hashlib.sha256()
    for path, parts in groupby(shards, key=lambda shard: shard.path):
        some = list(parts)
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(repr((some[0].name, sum(s.images or 0 for s in some), size)).encode())
            for start in (0, max(0, size - ENDS)):
                file.seek(start)
                digest.update(file.read(ENDS))
    return digest.hexdigest()


def apart(stream: Stream, fraction: float) -> StreamSet:
    """The stream with a share of its images held out: those for which the first 8 bytes of the
    sha256 of "FILE/NUMBER", read as a big-endian integer, are below ``fraction`` of 2**64.

    Raises what ``settle`` raises.
    """
    train, held = [], []
    for piece, chosen in zip(stream.pieces, _chosen(stream.pieces, fraction), strict=True):
        train.append(Piece(piece.shard, piece.rows[~chosen]))
        held.append(Piece(piece.shard, piece.rows[chosen]))
    return settle(stream, train, held, {"fraction": fraction})


def _chosen(pieces: Sequence[Piece], fraction: float) -> Iterator[NDArray[np.bool_]]:
    """Which images of each piece the hash chooses; they are numbered within their file."""
    before: Counter[str] = Counter()
    for shard, rows in pieces:
        numbers = range(before[shard.name], before[shard.name] + len(rows))
        before[shard.name] += len(rows)
        places = (
            int.from_bytes(hashlib.sha256(f"{shard.name}/{n}".encode()).digest()[:8], "big")
            for n in numbers
        )
        yield np.fromiter((place < fraction * 2**64 for place in places), np.bool_, len(rows))


def settle(
    stream: Stream,
    train: Iterable[Piece],
    held: Iterable[Piece],
    how: dict[str, Any] | None,
) -> StreamSet:
    """The stream with what is held out, its samples decoded.

    how: as ``ImageSet.held_out_as``, but for how many images are held out.

    Raises InputError if more images are broken than may be, or if they are of no one size;
    MachineError if Pillow is not installed.
    """
    train = tuple(piece for piece in train if len(piece.rows))
    held = tuple(piece for piece in held if len(piece.rows))
    decoder, preprocessing, said = _look(stream, train or held)
    workers = stream.streaming.processes()
    bytes_each = math.prod(decoder.shape) * decoder.dtype.itemsize
    most = max(1, min(SAMPLED, LARGEST_BUFFER // bytes_each))
    count, others = (sum(len(piece.rows) for piece in pieces) for pieces in (train, held))
    samples, broken = [], []
    for pieces in (train, held):
        sample, bad = _sample(decoder, pieces, most, workers)
        samples.append(sample)
        broken += bad
    counter = Broken(stream.streaming.max_broken or 0)
    said = [*stream.said, *said, *filter(None, map(counter.add, broken))]
    for what, number, sample in (("training", count, samples[0]), ("held-out", others, samples[1])):
        if len(sample) < number:
            said.append(f"{len(sample)} of the {number} {what} images are kept as their sample")
    wanted = stream.streaming.buffer or BUFFER
    return StreamSet(
        samples[0],
        samples[1] if others else None,
        stream.source,
        stream.sha256,
        preprocessing,
        said=tuple(said),
        held_out_as={"images": others, **how} if how is not None else None,
        pieces=train,
        decoder=decoder,
        streaming=stream.streaming,
        broken=tuple(broken),
        buffer=max(1, min(wanted, LARGEST_BUFFER // bytes_each)),
    )


def _look(
    stream: Stream, pieces: Sequence[Piece]
) -> tuple[Decoder, Preprocessing | None, list[str]]:
    """How the images are decoded, by some of them: their commonest size and dtype; colour if one
    has any. Raises InputError, MachineError."""
    reading, shapes, done, broken = stream.reading, Counter[Any](), list[Done](), list[str]()
    for name, record in (each for piece in _drawn(pieces, LOOKED_AT) for each in records(piece)):
        try:
            if record.content is None:
                raise InputError(record.broken)
            if isinstance(record.content, bytes):
                array, did = read_pixels(record.content, reading)
                done.append(did)
                channels = reading.channels or (1 if did.grey else 3)
                shapes[channels, *array.shape[:2], np.dtype(np.uint8)] += 1
            else:
                image = as_images(record.content[None])[0]
                shapes[*image.shape, image.dtype] += 1
        except InputError as error:
            broken.append(f"{name}: {error}")
    if not shapes:
        raise InputError(f"{stream.source}: {broken[0]}; none of {len(broken)} can be read")
    _, *size, dtype = max(shapes, key=lambda one: shapes[one])
    shape = (max(channels for channels, *_ in shapes), *(reading.expected or size))
    if not done:
        return Decoder(shape, dtype, reading), None, []
    how = Preprocessing(shape[0], reading.size, reading.crop, reading.background)
    said = [f"looked at: {line}" for line in in_words(done, how, (len(done), *shape))]
    if reading.channels is None and shape[0] == 1:
        said.append("looked at: all are grey, and so all become; --channels 3 keeps colour")
    reading = dataclasses.replace(reading, channels=shape[0], expected=None)
    return Decoder(shape, dtype, reading), how, said


def _drawn(pieces: Sequence[Piece], most: int) -> Iterator[Piece]:
    """At most ``most`` images of pieces, drawn at random but always the same: about as many of each
    of SAMPLED_PIECES."""
    total = sum(len(piece.rows) for piece in pieces)
    each = most if total <= most else -(-most // min(SAMPLED_PIECES, len(pieces)))
    rng = np.random.default_rng(0)
    for i in rng.permutation(len(pieces)):
        shard, rows = pieces[i]
        chosen = rng.choice(rows, min(each, most, len(rows)), replace=False)
        yield Piece(shard, np.sort(chosen))
        most -= len(chosen)
        if not most:
            return


def _sample(
    decoder: Decoder, pieces: Sequence[Piece], most: int, workers: int
) -> tuple[Array, list[str]]:
    """At most ``most`` images of pieces in a random order, and which were broken."""
    drawn = list(_drawn(pieces, most))
    images = np.empty((sum(len(piece.rows) for piece in drawn), *decoder.shape), decoder.dtype)
    places = np.random.default_rng(1).permutation(len(images))
    sound, broken, start = np.ones(len(images), np.bool_), list[str](), 0
    for found in decoded(decoder, drawn, workers):
        part = places[start : start + len(found.images)]
        images[part] = found.images
        sound[part[list(found.broken)]] = False
        broken += found.broken.values()
        start += len(part)
    return images if sound.all() else images[sound], broken


class Broken:
    """Counts broken images.

    most: how many there may be. known: those that were counted before.
    """

    def __init__(self, most: int, known: Iterable[str] = ()) -> None:
        self.most, self.known = most, set(known)

    def add(self, image: str) -> str | None:
        """A line on a broken image, "NAME: REASON"; None if it is known.

        Raises InputError if there are more than may be.
        """
        if image in self.known:
            return None
        self.known.add(image)
        if not self.most:
            raise InputError(f"{image}; --max-broken N lets N broken images pass")
        if len(self.known) > self.most:
            raise InputError(
                f"{len(self.known)} broken images, more than --max-broken {self.most}: {image}"
            )
        return f"broken, left out ({len(self.known)} of at most {self.most}): {image}"
