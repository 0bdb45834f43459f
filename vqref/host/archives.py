"""Images that memory cannot hold, read shard by shard.

Sources are folders of pictures, ``.npy`` files, parquet files as Hugging Face's ``datasets`` writes
them, and tars as WebDataset writes them.

    for shard in list_shards(Path("data")):
        for record in read_shard(shard):
            image = to_image(record, (3, 32, 32), reading)    # (C, H, W)

Any process can read a shard on its own. A shard always gives the same records in the same order. If
one image is bad, its record says so. If a shard is damaged as a whole, reading it raises.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from vqref.errors import InputError
from vqref.host.arrow import FOOTER, parquet
from vqref.host.files import about, is_folder, parsed, read_bytes
from vqref.host.images import LONGEST_HEADER, OFFICIAL_NAMES, in_layout, load
from vqref.host.listing import ENDINGS, list_folder, many
from vqref.host.pictures import LARGEST_PICTURE, Reading, read_picture
from vqref.host.streams import plain
from vqref.validation import Array

SHARD_IMAGES = 8192
"""About how many images a shard has, if a source can be cut.

A source can be cut at rows of a ``.npy``, row groups of a parquet file, or pictures of a folder."""

ROWS_AT_ONCE = 64
"""How many rows of a parquet file are in memory at a time."""

COLUMN, KEYS = "image", ("key", "__key__")
"""Names of parquet columns: that of the images, and those that may hold the images' names."""


@dataclass(frozen=True)
class Shard:
    """A part of a source that can be read on its own.

    form: one of FORMS.
    name: the file's name within the source, with "/" between the parts, or the folder's name.
    path: the path of the file or the folder.
    start, stop: the range of images, of row groups of a parquet file, or of bytes of a tar. A stop
        of None means all.
    images: how many images, or None if only reading tells.
    bytes: the size of a file that does not tell its number of images.
    members: the names of the pictures, if this is a folder.
    """

    form: str
    name: str
    path: Path
    start: int = 0
    stop: int | None = None
    images: int | None = None
    bytes: int = 0
    members: tuple[str, ...] = ()

    @property
    def weight(self) -> int:
        """Returns the shard's share of a job: its images if they are known, else its bytes."""
        return self.bytes if self.images is None else self.images


class Record(NamedTuple):
    """One image of a shard.

    key: its name in the shard: the path of a picture within its folder, the name of a tar's member,
        the ``key`` or path of a parquet row. Otherwise its number in the file.
    content: the bytes of a picture, or an array (H, W), (H, W, C) or (C, H, W). None if it cannot
        be read.
    broken: the reason why it cannot be read.
    """

    key: str
    content: bytes | Array | None
    broken: str = ""


def list_shards(
    source: Path, *, recursive: bool = False, images: int = SHARD_IMAGES
) -> tuple[Shard, ...]:
    """Returns the shards of a file or a folder, in the order of their names.

    source: a file, or a folder of parquet files, of tars, of ``.npy`` files, of the official files
        or of pictures.
    recursive: whether files in subfolders count.
    images: about how many images a shard has, if the source can be cut.

    Raises InputError if there are none, or if a folder holds files of several forms. Raises
    MachineError if pyarrow is needed and not installed.
    """
    if not is_folder(source):
        return tuple(_list_file(source, source.name, images))
    if any((source / train).is_file() for train, _ in OFFICIAL_NAMES):
        return tuple(_cut("array", source.name, source, _count(source), images))
    files = list_folder(source, recursive, ARCHIVES).files
    forms = {_form_of(path) for _, path in files}
    if len(forms) > 1:
        raise InputError(f"{source}: holds files of several forms, {', '.join(sorted(forms))}")
    if files:
        return tuple(shard for name, path in files for shard in _list_file(path, name, images))
    return tuple(_list_pictures(source, recursive, images))


def read_shard(shard: Shard) -> Iterator[Record]:
    """Yields the records of a shard.

    Raises InputError that names the file if the file is damaged as a whole or has changed since it
    was listed. Raises MachineError if pyarrow is needed and not installed.
    """
    records = FORMS[shard.form].read(shard)
    while True:
        with about(shard.path), parsed("cannot be read"):
            record = next(records, None)
        if record is None:
            return
        yield record


def counted(shard: Shard, images: int) -> Iterator[Shard]:
    """Yields parts of a shard with at most ``images`` images each.

    If the shard already tells its number of images, yields the shard itself. Raises InputError that
    names the file.
    """
    if shard.images is not None:
        yield shard
        return
    with about(shard.path), parsed("cannot be read"):
        yield from _cut_tar(shard, images)


def to_image(record: Record, image_shape: tuple[int, int, int], reading: Reading) -> Array:
    """Returns the image (C, H, W) of a record. It is uint8, or floating in [0, 1] if the array is.

    reading: what ``Reading.of`` returns for a model of that shape.

    Raises InputError with the reason if the record is broken or gives no such image. Raises
    MachineError if Pillow is not installed.
    """
    if record.content is None:
        raise InputError(record.broken)
    if isinstance(record.content, bytes):
        return read_picture(record.content, reading)
    image: Array = in_layout(record.content, image_shape)[0]
    return image


class Form(NamedTuple):
    """How one kind of file is listed and read.

    list_: turns (path, name, images per shard) into shards.
    read: turns a shard into records.
    """

    endings: tuple[str, ...]
    list_: Callable[[Path, str, int], Iterator[Shard]]
    read: Callable[[Shard], Iterator[Record]]


def _form_of(path: Path) -> str:
    """Returns the form of a file by the end of its name: "array" for what ``images.load`` reads."""
    lower = path.name.lower()
    return next((n for n, form in FORMS.items() if lower.endswith(form.endings)), "array")


def _list_file(path: Path, name: str, images: int) -> Iterator[Shard]:
    """Yields the shards of one file. Raises InputError that names it."""
    with about(path), parsed("cannot be read"):
        if path.exists() and not path.is_file():
            raise InputError("is not a regular file")  # opening a FIFO could block for ever
        yield from FORMS[_form_of(path)].list_(path, name, images)


def _cut(form: str, name: str, path: Path, count: int, images: int) -> Iterator[Shard]:
    for start in range(0, count, images):
        stop = min(start + images, count)
        yield Shard(form, name, path, start, stop, stop - start)


# Folders of pictures


def _list_pictures(folder: Path, recursive: bool, images: int) -> Iterator[Shard]:
    found = list_folder(folder, recursive)
    names = [name for name, _ in found.files]
    if not names:
        within = ", nor do its subfolders" if recursive else "; --recursive reads its subfolders"
        raise InputError(f"{folder}: holds no pictures and no archives{within}")
    for shard in _cut("pictures", folder.name, folder, len(names), images):
        yield Shard(
            *(shard.form, shard.name, folder, shard.start, shard.stop, shard.images),
            members=tuple(names[shard.start : shard.stop]),
        )


def _list_picture(path: Path, name: str, images: int) -> Iterator[Shard]:
    yield Shard("pictures", name, path.parent, 0, 1, 1, members=(path.name,))


def _read_pictures(shard: Shard) -> Iterator[Record]:
    for name in shard.members:
        path = shard.path / name
        try:
            yield Record(name, read_bytes(path, LARGEST_PICTURE))
        except InputError as error:
            yield Record(name, None, str(error).removeprefix(f"{path}: "))


# Arrays


def _list_npy(path: Path, name: str, images: int) -> Iterator[Shard]:
    return _cut("npy", name, path, len(_mapped(path)), images)


def _read_npy(shard: Shard) -> Iterator[Record]:
    array = _mapped(shard.path)
    if shard.stop is None or shard.stop > len(array):
        raise InputError(f"holds {len(array)} images, fewer than were listed")
    for number in range(shard.start, shard.stop):
        yield Record(str(number), np.array(array[number]))


def _mapped(path: Path) -> Array:
    """Maps the array of an ``.npy`` file, so that only the parts used are read.

    Raises InputError, and what NumPy raises.
    """
    with path.open("rb") as file:
        if not file.read(6).startswith(b"\x93NUMPY"):
            raise InputError("not a readable array")
    array = np.lib.format.open_memmap(path, mode="r", max_header_size=LONGEST_HEADER)
    if array.dtype.kind not in "uf" or array.ndim not in (3, 4):
        raise InputError(f"its array is {array.dtype} {array.shape}, expected images")
    return array


def _list_array(path: Path, name: str, images: int) -> Iterator[Shard]:
    return _cut("array", name, path, _count(path), images)


def _count(path: Path) -> int:
    return len(_loaded(path))


def _read_array(shard: Shard) -> Iterator[Record]:
    for number in range(shard.start, shard.stop or 0):
        yield Record(str(number), _loaded(shard.path)[number])


@lru_cache(1)
def _loaded(path: Path) -> Array:
    """Returns the images of a file that must be read whole, cached for the next shard.

    Raises InputError.
    """
    return load(path).train


# Parquet


def _list_parquet(path: Path, name: str, images: int) -> Iterator[Shard]:
    with _opened(path) as file:
        _columns(file.schema_arrow)
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    start = held = 0
    for number, size in enumerate(sizes):
        if held and held + size > images:
            yield Shard("parquet", name, path, start, number, held)
            start, held = number, 0
        held += size
    if held:
        yield Shard("parquet", name, path, start, len(sizes), held)


def _read_parquet(shard: Shard) -> Iterator[Record]:
    with _opened(shard.path) as file:
        column, key = _columns(file.schema_arrow)
        before = (file.metadata.row_group(i).num_rows for i in range(shard.start))
        number = sum(before)
        batches = file.iter_batches(
            batch_size=ROWS_AT_ONCE,
            row_groups=list(range(shard.start, shard.stop or 0)),
            columns=[column] if key is None else [column, key],
            use_threads=False,
        )
        for batch in batches:
            images = batch.column(column).to_pylist()
            keys = [None] * len(images) if key is None else batch.column(key).to_pylist()
            for image, name in zip(images, keys, strict=True):
                yield _parquet_record(image, name, number)
                number += 1


def _parquet_record(image: Any, key: Any, number: int) -> Record:
    """Returns the record of a row, whose ``image`` is bytes or {bytes, path}."""
    said = image if isinstance(image, dict) else {"bytes": image}
    content = said.get("bytes")
    name = plain(str(key or said.get("path") or number))
    if content is None:
        return Record(name, None, "the row holds no bytes")
    return Record(name, content)


def _opened(path: Path) -> Any:
    """Opens a parquet file that is then read page by page. Raises what pyarrow raises."""
    _, module = parquet()
    return module.ParquetFile(path, buffer_size=2**20, pre_buffer=False, **FOOTER)


def _columns(schema: Any) -> tuple[str, str | None]:
    """Returns the names of the column of images and of the column of their keys, None without keys.

    The images are in COLUMN, or in the only column that can hold them. Raises InputError.
    """
    fitting = [field.name for field in schema if _holds_pictures(field.type)]
    column = COLUMN if COLUMN in fitting else fitting[0] if len(fitting) == 1 else None
    if column is None:
        found = plain(", ".join(schema.names)[:80])
        raise InputError(
            f"its columns are {found}; expected {COLUMN!r}, of bytes or of {{bytes, path}}"
        )
    return column, next((name for name in KEYS if name in schema.names), None)


def _holds_pictures(kind: Any) -> bool:
    types = parquet()[0].types
    if types.is_struct(kind):
        names = [kind.field(i).name for i in range(kind.num_fields)]
        return "bytes" in names and _holds_pictures(kind.field(names.index("bytes")).type)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


# Tars


def _list_tar(path: Path, name: str, images: int) -> Iterator[Shard]:
    yield Shard("tar", name, path, bytes=path.stat().st_size)


def _read_tar(shard: Shard) -> Iterator[Record]:
    with shard.path.open("rb") as file:
        file.seek(shard.start)
        how = "r|*" if shard.stop is None else "r:"
        with tarfile.open(fileobj=file, mode=how, tarinfo=_Member) as archive:  # type: ignore[call-overload]
            for member in archive:
                if shard.stop is not None and member.offset >= shard.stop:
                    return
                if _is_picture(member):
                    yield _tar_record(archive, member)
            while shard.stop is None and (rest := archive.fileobj.read(2**20)):
                if any(rest):
                    raise tarfile.ReadError("damaged: more data follow what looks like its end")


class _Member(tarfile.TarInfo):
    """A header of a tar that ends only where its end is marked.

    tarfile itself takes any header that it cannot read for the end.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"cut off or damaged: {error}") from None


def _tar_record(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Record:
    key, size = plain(member.name), member.size
    if size > LARGEST_PICTURE:
        return Record(key, None, f"{size} bytes, more than the {LARGEST_PICTURE} read")
    file = archive.extractfile(member)
    content = b"" if file is None else file.read()
    if len(content) != size:
        raise InputError(f"{key}: cut off after {len(content)} of {size} bytes")
    return Record(key, content)


def _cut_tar(shard: Shard, images: int) -> Iterator[Shard]:
    """Cuts an uncompressed tar by reading its headers alone. A compressed tar stays whole.

    Raises what tarfile raises.
    """
    try:
        archive = tarfile.open(shard.path, "r:")  # noqa: SIM115
    except tarfile.ReadError:
        yield replace(shard, images=sum(1 for _ in _read_tar(shard)))
        return
    with archive:
        start = held = 0
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # else tarfile keeps them all
            if held == images:
                yield replace(shard, start=start, stop=member.offset, images=held)
                start, held = member.offset, 0
            held += _is_picture(member)
        if held:
            yield replace(shard, start=start, stop=archive.offset, images=held)
        _require_end(shard.path, archive.offset)


def _require_end(path: Path, offset: int) -> None:
    """Raises InputError unless the tar ends at ``offset``: in zeros, or with the file.

    To tarfile, a damaged header looks like an end.
    """
    with path.open("rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
    if any(block):
        raise InputError(f"cut off or damaged at byte {offset}")


def _is_picture(member: tarfile.TarInfo) -> bool:
    name = PurePosixPath(member.name)
    return member.isreg() and name.suffix.lower() in ENDINGS and not _is_hidden(name)


def _is_hidden(name: PurePosixPath) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in name.parts)


FORMS = {
    "parquet": Form((".parquet",), _list_parquet, _read_parquet),
    "tar": Form((".tar", ".tar.gz", ".tgz"), _list_tar, _read_tar),
    "npy": Form((".npy",), _list_npy, _read_npy),
    "array": Form((), _list_array, _read_array),
    "pictures": Form(ENDINGS, _list_picture, _read_pictures),
}
"""The forms of sources. Each row has one function that lists and one that reads."""

ARCHIVES = tuple(e for name, form in FORMS.items() if name != "pictures" for e in form.endings)
"""The endings of the names of files that hold many images each."""


def describe(shards: Sequence[Shard]) -> str:
    """Says how many images there are in how many shards, as part of a line."""
    known = [shard.images for shard in shards if shard.images is not None]
    images = f"{sum(known):,} images in " if len(known) == len(shards) else ""
    return f"{images}{many(len(shards), 'shard')}"
