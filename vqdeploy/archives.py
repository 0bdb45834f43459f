"""Encodes more images than memory can hold.

The tokens go to a folder of parquet files with a ``manifest.json``.

A job is split into parts, one per shard of the source. A part is a file of tokens that is written
as a whole. Its bytes depend only on the bundle and the shard, so it does not matter which process
writes it, when, or how often. If a job was killed, running it again writes only the parts that are
missing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vqdeploy.codec import Codec
from vqdeploy.sealed import sealed, unsealed
from vqdeploy.tokens import Tokens, parquet_bytes, parquet_metadata, read_tokens
from vqref.errors import InputError, MachineError
from vqref.host.archives import Shard, read_shard, to_image
from vqref.host.files import LONGEST_REASON, about, parsed, read_bytes, sweep, write_file
from vqref.host.images import LARGEST_ARRAY
from vqref.host.listing import MOST_NAMED, many
from vqref.host.pictures import Reading
from vqref.host.streams import plain
from vqref.spec import ModelSpec
from vqref.validation import Array, Int64

FORMAT, FORMAT_VERSION = "vqdeploy-tokens", 1
MANIFEST = "manifest.json"

IMAGES_BYTES = 2**26
"""Roughly how many bytes the images that wait to be encoded may take, as float32."""

SECONDS_BETWEEN_LINES = 5
"""The least time between two lines on progress."""

_FILE = re.compile(r"tokens-\d{5,}-of-\d{5,}\.parquet", re.ASCII)


@dataclass(frozen=True)
class Job:
    """What all workers on a folder of tokens share.

    bundle: the folder that export wrote. manifest_sha256: its digest. output: the folder for the
    tokens, the same for all workers. device, threads: as for ``Codec.load``. most_broken: how many
    unreadable images may be left out.
    """

    bundle: Path
    manifest_sha256: str
    output: Path
    device: str = "auto"
    threads: int | None = None
    most_broken: int = 0


@dataclass(frozen=True)
class Part:
    """A file of the output, and the shard of the source whose tokens it holds."""

    file: str
    shard: Shard

    @cached_property
    def source(self) -> str:
        """The digest of the shard's description without its path."""
        said = dataclasses.asdict(self.shard)
        del said["path"]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Outcome:
    """The result for one part.

    images: how many images it holds. broken: how many images were left out. named: the first of
    these, with the reasons. sha256: the file's digest. kept: whether the file was there
    already.
    """

    part: Part
    images: int
    broken: int
    named: tuple[str, ...]
    sha256: str
    kept: bool


def parts_of(shards: Sequence[Shard]) -> tuple[Part, ...]:
    """Returns the parts of a job, one per shard, in the same order."""
    count = len(shards)
    return tuple(
        Part(f"tokens-{number:05}-of-{count:05}.parquet", shard)
        for number, shard in enumerate(shards)
    )


class PartEncoder:
    """Writes the parts of a job, one at a time, with one Codec.

    Raises what ``Codec.load`` raises.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.codec = Codec.load(
            job.bundle,
            job.device,
            intra_op_num_threads=job.threads,
            manifest_sha256=job.manifest_sha256,
        )
        spec = self.codec.spec
        self.reading = Reading.of(self.codec.preprocessing, spec.image_shape)
        self.at_once = max(1, IMAGES_BYTES // (4 * math.prod(spec.image_shape)))

    def __call__(self, part: Part) -> Outcome:
        """Writes the part unless it is there already, and returns what it holds.

        Raises InputError if the shard is damaged, if it has more broken images than the job allows,
        and if the file comes from another bundle or another source. Raises OSError if the file
        cannot be written.
        """
        path = self.job.output / part.file
        if path.exists():
            return self._kept(path, part)
        broken: list[str] = []
        keys: list[str] = []
        found: list[Int64] = [np.empty((0, self.codec.spec.latent_size), np.int64)]
        for names, images in self._batches(part.shard, broken):
            keys += names
            found.append(self.codec.encode(images))
        tokens = Tokens.of(self.codec, np.concatenate(found), tuple(keys))
        named = broken[:MOST_NAMED]
        more = {"source": part.source, "broken": str(len(broken)), "named": json.dumps(named)}
        content = parquet_bytes(tokens, more)
        write_file(path, content)
        digest = hashlib.sha256(content).hexdigest()
        return Outcome(part, len(keys), len(broken), tuple(named), digest, kept=False)

    def _batches(self, shard: Shard, broken: list[str]) -> Iterator[tuple[list[str], Array]]:
        """Yields the names and images (N, C, H, W) of a shard, a few at a time.

        Adds unreadable images to ``broken``. Raises InputError.
        """
        shape = self.codec.spec.image_shape
        keys: list[str] = []
        images: list[Array] = []
        for record in read_shard(shard):
            try:
                image = to_image(record, shape, self.reading)
            except InputError as error:
                reason = plain(str(error))[:LONGEST_REASON]
                broken.append(f"{plain(shard.name)}: {record.key}: {reason}")
                require_few(broken, len(broken), self.job.most_broken)
                continue
            if images and (len(images) == self.at_once or image.dtype != images[0].dtype):
                yield keys, np.stack(images)
                keys, images = [], []
            keys.append(record.key)
            images.append(image)
        if images:
            yield keys, np.stack(images)

    def _kept(self, path: Path, part: Part) -> Outcome:
        """Returns what a part's file holds. Raises InputError if another job wrote it."""
        content = read_bytes(path)
        with about(path):
            said = parquet_metadata(content)
            if said.get("manifest_sha256") != self.job.manifest_sha256:
                raise InputError(
                    f"tokens of bundle {said.get('manifest_sha256', 'unknown'):.12}…, this one is "
                    f"{self.job.manifest_sha256:.12}…; name a new folder"
                )
            if said.get("source") != part.source:
                raise InputError("tokens of another source; name a new folder")
        images = len(read_tokens(path).indices)
        with about(path), parsed("its metadata are damaged"):
            broken, named = int(said["broken"]), tuple(map(str, json.loads(said["named"])))
        digest = hashlib.sha256(content).hexdigest()
        return Outcome(part, images, broken, named, digest, kept=True)


def require_few(named: Sequence[str], count: int, most: int) -> None:
    """Raises InputError if there are more than ``most`` broken images.

    count: how many there are. named: a line for each; the error lists the first of them.
    """
    if count > most:
        what = "1 broken image" if count == 1 else f"{count} broken images"
        raise InputError(f"{what}, and --max-broken is {most}: {'; '.join(named[:MOST_NAMED])}")


def begin(job: Job, spec: ModelSpec, source: str, parts: Sequence[Part]) -> None:
    """Makes the folder of a job, or checks that an existing folder is of the same job.

    source: the source's name. Raises InputError if the folder is of another job or holds other
    files, MachineError if it cannot be written to.
    """
    path = job.output / MANIFEST
    told = _told(job, spec, source, parts)
    try:
        job.output.mkdir(parents=True, exist_ok=True)
        left = [each for each in job.output.iterdir() if not each.name.startswith(".")]
        if not left:
            write_file(path, sealed({**told, "complete": False}))
    except OSError as error:
        raise MachineError(f"{job.output}: cannot be written: {error.strerror}") from None
    if left and not path.exists():
        raise InputError(f"{job.output}: holds other files; name a new folder")
    found = _read_manifest(path)
    for name in ("manifest_sha256", "source_sha256"):
        if found.get(name) != told[name]:
            what = {"manifest_sha256": "bundle", "source_sha256": "source, or other shards"}[name]
            raise InputError(f"{path}: tokens of another {what}; name a new folder")


def finish(job: Job, spec: ModelSpec, source: str, outcomes: Sequence[Outcome]) -> None:
    """Writes the manifest of a complete job, and removes files that killed workers left.

    outcomes: those of all parts, in order. Raises OSError.
    """
    sweep(job.output, r"tokens-.*")
    parts = [outcome.part for outcome in outcomes]
    done = {
        "complete": True,
        "images": sum(outcome.images for outcome in outcomes),
        "broken": sum(outcome.broken for outcome in outcomes),
        "parts": [
            {
                "file": outcome.part.file,
                "shard": outcome.part.shard.name,
                "images": outcome.images,
                "broken": outcome.broken,
                "sha256": outcome.sha256,
            }
            for outcome in outcomes
        ],
    }
    write_file(job.output / MANIFEST, sealed({**_told(job, spec, source, parts), **done}))


def _told(job: Job, spec: ModelSpec, source: str, parts: Sequence[Part]) -> dict[str, Any]:
    """Returns what a manifest says before there are tokens."""
    digests = "".join(part.source for part in parts)
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "manifest_sha256": job.manifest_sha256,
        "latent_shape": list(spec.latent_shape),
        "num_codes": spec.num_codes,
        "source": plain(source),
        "source_sha256": hashlib.sha256(digests.encode()).hexdigest(),
    }


def _read_manifest(path: Path) -> dict[str, Any]:
    """Returns the entries of a manifest. Raises InputError."""
    content = read_bytes(path)
    with about(path), parsed("not the manifest of a folder of tokens"):
        found = unsealed(content)
        if found.get("format") != FORMAT:
            raise InputError(f"its format is {found.get('format')!r:.80}, expected {FORMAT!r}")
        if found.get("format_version") != FORMAT_VERSION:
            version = found.get("format_version")
            raise InputError(
                f"its format version is {version!r:.80}, but this program reads only version "
                f"{FORMAT_VERSION}"
            )
        return found


def read_archive(folder: Path) -> Tokens:
    """Returns all tokens of a folder that ``finish`` completed.

    Raises InputError if the folder is not complete, if a part differs from what the manifest says,
    and if there are more tokens than may be held in memory. Raises MachineError if pyarrow is not
    installed.
    """
    path = folder / MANIFEST
    found = _read_manifest(path)
    with about(path), parsed("not the manifest of a folder of tokens"):
        if found["complete"] is not True:
            raise InputError("the job is not complete; the same encode command continues it")
        said = [(str(part["file"]), str(part["sha256"])) for part in found["parts"]]
        size = int(found["images"]) * math.prod(map(int, found["latent_shape"])) * 8
        if size > LARGEST_ARRAY:
            raise InputError(
                f"{found['images']} images are too many to be held in memory; decode its parts, "
                f"such as {folder / said[0][0]}"
            )
        if not all(_FILE.fullmatch(file) for file, _ in said):
            raise InputError("names files that are not parts")
    tokens = [_read_part(folder / file, sha256, found) for file, sha256 in said]
    names = [name for each in tokens for name in each.names or ()]
    indices = np.concatenate([each.indices for each in tokens])
    return dataclasses.replace(tokens[0], indices=indices, names=tuple(names))


def _read_part(path: Path, sha256: str, said: dict[str, Any]) -> Tokens:
    """Returns the tokens of a part. Raises InputError if its file has another digest."""
    if hashlib.sha256(read_bytes(path)).hexdigest() != sha256:
        raise InputError(f"{path}: damaged: its sha256 is not the one in {MANIFEST}")
    tokens = read_tokens(path)
    if tokens.manifest_sha256 != said["manifest_sha256"]:
        raise InputError(f"{path}: its tokens are not of the bundle that {MANIFEST} names")
    return tokens


@dataclass
class Progress:
    """The progress of a job, and the time it still needs.

    total: the weight of all shards. clock: returns seconds since any fixed moment.
    """

    parts: int
    total: int
    clock: Callable[[], float] = time.monotonic
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._start = self._said = self.clock()
        self._first: float | None = None
        self._before = self._encoded = self._kept = 0

    def add(self, outcome: Outcome) -> str | None:
        """Counts a part. Returns a line if the last line is SECONDS_BETWEEN_LINES old."""
        self.outcomes[outcome.part.file] = outcome
        now, weight = self.clock(), outcome.part.shard.weight
        if outcome.kept:
            self._kept += weight
        else:
            self._encoded += weight
            if self._first is None:
                self._first, self._before = now, self._encoded
        if now - self._said < SECONDS_BETWEEN_LINES:
            return None
        self._said = now
        done = f"{len(self.outcomes)} of {many(self.parts, 'shard')}"
        return f"{done}, {self.speed()}{self._left()}"

    def speed(self) -> str:
        """Returns how many images were encoded, and how many per second."""
        images = sum(each.images for each in self.outcomes.values() if not each.kept)
        seconds = max(self.clock() - self._start, 1e-9)
        return f"{images:,} images encoded, {images / seconds:,.0f} images/s"

    def summary(self) -> str:
        """Returns what the job has done. Call it when the job is complete."""
        found = self.outcomes.values()
        images, broken = sum(each.images for each in found), sum(each.broken for each in found)
        kept = sum(each.images for each in found if each.kept)
        left_out = f", {broken} left out" if broken else ""
        before = f", {kept:,} of them before" if kept else ""
        return f"{images:,} images{before}{left_out}; {self.speed()}"

    def _left(self) -> str:
        """Returns the time that the remaining shards will take.

        It takes the speed since the first shard was encoded: before that, the workers started.
        """
        since = self._encoded - self._before
        if self._first is None or not since:
            return ""
        left = self.total - self._encoded - self._kept
        return f", {duration((self.clock() - self._first) * left / since)} left"


def duration(seconds: float) -> str:
    """Returns a time in its two largest units: "2 h 05 min", "3 min 20 s", "4 s"."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 60} min {whole % 60:02} s" if whole >= 60 else f"{whole} s"


Engine = Callable[[Job, Sequence[Part]], Iterator[Outcome]]
"""A function that has parts written and yields their outcomes as they arrive."""


def in_process(job: Job, parts: Sequence[Part]) -> Iterator[Outcome]:
    """The engine that writes the parts in this process, one after another."""
    yield from map(PartEncoder(job), parts)


def encode_archive(
    job: Job,
    spec: ModelSpec,
    source: str,
    shards: Sequence[Shard],
    engine: Engine = in_process,
    say: Callable[[str], None] = print,
) -> Progress:
    """Writes the tokens of all shards, one part per shard, and the manifest.

    say: receives lines on progress during the work. Raises what ``begin`` and ``PartEncoder``
    raise. The same call then continues the job.
    """
    parts = parts_of(shards)
    begin(job, spec, source, parts)
    progress = Progress(len(parts), sum(shard.weight for shard in shards))
    broken = 0
    for outcome in engine(job, parts):
        line = progress.add(outcome)
        if line:
            say(line)
        for named in outcome.named:
            say(f"left out: {named}")
        broken += outcome.broken
        require_few(outcome.named, broken, job.most_broken)
    finish(job, spec, source, [progress.outcomes[part.file] for part in parts])
    return progress
