"""Images that do not fit in memory: shards, which worker processes decode piece by piece.

Some work needs many images at once: the variance of the data, the mean pixel, the start of a
codebook, the measures after an epoch. This work uses a sample of limited size, decoded once and
kept. docs/streams.md says what that changes.
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
"""Images of a shard that are read, decoded and shuffled together, if the shard can be cut."""

BUFFER, LARGEST_BUFFER = 8192, 2**27
"""Images that are shuffled together, and the most bytes that they may take."""

SAMPLED, SAMPLED_PIECES = 10_000, 64
"""Images of a sample, and the fewest pieces that they come from. A sample also has at most
LARGEST_BUFFER bytes."""

LOOKED_AT = 256
"""How many pictures decide size and channels, if no option does."""

MAPPED = 2**30
"""An ``.npy`` file with more bytes is read as a stream."""

MOST_WORKERS = 8
"""The most processes that decode, unless an option says how many."""

ENDS = 2**16
"""Bytes at each end of a file that go into its digest."""

_SPLIT = re.compile(r"(?:.*/)?(train|validation|valid|val|dev|test)[-._]")
_HELD_OUT = ("validation", "valid", "val", "dev", "test")


@dataclass(frozen=True)
class Streaming:
    """How shards are read.

    workers: processes that decode. 0: this process decodes. None: one per core of this rank, less
    one, at most MOST_WORKERS. buffer: images that are shuffled together; None: BUFFER. max_broken:
    how many broken images are skipped before a run stops; None: 0.
    """

    workers: int | None = None
    buffer: int | None = None
    max_broken: int | None = None

    def asked(self) -> str | None:
        """Returns the first option that was given, or None."""
        given = {f"--{each.name}": getattr(self, each.name) for each in dataclasses.fields(self)}
        return next((k.replace("_", "-") for k, value in given.items() if value is not None), None)

    def processes(self) -> int:
        """Returns how many processes decode for this one; ranks share the machine's cores."""
        if self.workers is not None:
            return self.workers
        usable = getattr(os, "sched_getaffinity", None)
        cores = len(usable(0)) if usable else os.cpu_count() or 1
        return max(1, min(MOST_WORKERS, cores // local_world() - 1))


AS_USUAL = Streaming()
"""All options at their defaults."""


@dataclass(frozen=True)
class Stream:
    """A source of shards whose held-out images are not chosen yet.

    source: its name. pieces: its images, without ``own``. own: the images that it holds out itself,
    or None. sha256: of the names, sizes and both ends of its files. reading, streaming: how it is
    read. said: lines on what was left out.
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
    """A stream whose held-out images are chosen; ``train`` and ``held_out`` are samples.

    pieces: the images to train on. decoder: how they are read. broken: images missing from the
    samples, with the reasons. buffer: images that are shuffled together.
    """

    pieces: tuple[Piece, ...] = field(kw_only=True)
    decoder: Decoder = field(kw_only=True)
    streaming: Streaming = field(kw_only=True)
    broken: tuple[str, ...] = field(kw_only=True)
    buffer: int = field(kw_only=True)

    @property
    def count(self) -> int:
        """The number of images to train on."""
        return sum(len(piece.rows) for piece in self.pieces)


def is_stream(path: Path, recursive: bool = False) -> bool:
    """Whether the images at ``path`` are read in pieces, as needed.

    True for a parquet file, a tar, a large ``.npy``, or a folder of such files without pictures.
    """
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
    """Whether a file is larger than MAPPED; False if the system cannot look up the name."""
    try:
        return path.is_file() and path.stat().st_size > MAPPED
    except OSError:
        return False


def open_stream(path: Path, reading: Reading, streaming: Streaming) -> Stream:
    """Opens the shards of a file or a folder, without decoding them.

    Raises InputError for files that are damaged or hold no images, and for options that do not
    apply to them; UsageError for options that make no sense; MachineError if pyarrow is not
    installed.
    """
    if reading.skip_bad:
        raise InputError("--skip-bad is for a folder of pictures; for shards, use --max-broken N")
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
    """Returns the shards to train on, the held-out shards, and lines on what is left out.

    Decides by the names that ``datasets`` gives shards ("train-00000-of-00002.parquet").
    """
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
    """Returns a digest of each file's name, number of images, size, first and last bytes."""
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
    """Returns the stream with a share of its images held out.

    Holds an image out if the first 8 bytes of the sha256 of "FILE/NUMBER", read as a big-endian
    integer, are less than ``fraction`` times 2**64.

    Raises what ``settle`` raises.
    """
    train, held = [], []
    for piece, chosen in zip(stream.pieces, _chosen(stream.pieces, fraction), strict=True):
        train.append(Piece(piece.shard, piece.rows[~chosen]))
        held.append(Piece(piece.shard, piece.rows[chosen]))
    return settle(stream, train, held, {"fraction": fraction})


def _chosen(pieces: Sequence[Piece], fraction: float) -> Iterator[NDArray[np.bool_]]:
    """Yields which images of each piece the hash chooses. Numbers count within a file."""
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
    """Returns the stream with ``held`` held out, and decodes its samples.

    how: as ``ImageSet.held_out_as``, without the number of held-out images.

    Raises InputError if too many images are broken, or if their sizes differ; MachineError if
    Pillow is not installed.
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
            said.append(f"{len(sample)} of the {number} {what} images are kept as a sample")
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
    """Looks at some images to decide how to decode all.

    Takes the most common size and dtype, and colour if any image has colour. Raises InputError,
    MachineError.
    """
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
        said.append("looked at: all are grey, so all are read as grey; --channels 3 keeps colour")
    reading = dataclasses.replace(reading, channels=shape[0], expected=None)
    return Decoder(shape, dtype, reading), how, said


def _drawn(pieces: Sequence[Piece], most: int) -> Iterator[Piece]:
    """Yields at most ``most`` images of pieces, drawn at random with a fixed seed.

    Takes about the same number from each of SAMPLED_PIECES pieces.
    """
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
    """Returns at most ``most`` images of pieces in random order, and which were broken."""
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

    most: how many are allowed. known: those that are counted already.
    """

    def __init__(self, most: int, known: Iterable[str] = ()) -> None:
        self.most, self.known = most, set(known)

    def add(self, image: str) -> str | None:
        """Returns a line on a broken image, "NAME: REASON"; None if it is known.

        Raises InputError if there are more than allowed.
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
