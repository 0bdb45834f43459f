"""Decodes images of shards in processes of PyTorch's DataLoader.

The processes are forks of a server, not of the training process. The training process has threads
(its pulse, gloo). A fork made while a thread holds a lock would wait for the lock forever.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing import connection
from multiprocessing.context import BaseContext
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vqref.errors import CommandError, InputError, MachineError
from vqref.host.archives import Record, Shard, read_shard, to_image
from vqref.host.interrupts import SIGNALS
from vqref.host.pictures import Reading
from vqref.validation import Array


class Piece(NamedTuple):
    """Some images of a shard: their numbers in it, in rising order."""

    shard: Shard
    rows: NDArray[np.int32]


class Decoded(NamedTuple):
    """Images (n, C, H, W) of a piece.

    broken: images that could not be decoded, with names and reasons; their values mean nothing.
    """

    images: Array
    broken: dict[int, str]


@dataclass(frozen=True)
class Decoder:
    """Decodes the images of pieces, all of one shape (C, H, W), uint8 or float32 in [0, 1].

    reading: how pictures are read; its channels are those of the shape.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    reading: Reading

    def __getitem__(self, piece: Piece) -> Decoded | CommandError:
        """Returns errors that stop a run; raised errors would lose their type between processes."""
        try:
            return self.decode(piece)
        except CommandError as error:
            return error

    def decode(self, piece: Piece) -> Decoded:
        """Raises InputError if the whole shard is damaged, MachineError if a library is missing."""
        images = np.zeros((len(piece.rows), *self.shape), self.dtype)
        broken: dict[int, str] = {}
        for i, (name, record) in enumerate(records(piece)):
            try:
                images[i] = self._image(record)
            except InputError as error:
                broken[i] = f"{name}: {error}"
        return Decoded(images, broken)

    def _image(self, record: Record) -> Array:
        """Raises InputError for an image of another size or dtype."""
        channels, height, width = self.shape
        image = to_image(record, (channels, height, width), self.reading)
        if image.shape != self.shape:
            size, usual = ("x".join(map(str, each)) for each in (image.shape[1:], self.shape[1:]))
            raise InputError(f"{size} pixels, others have {usual}; use --resize HxW")
        if (image.dtype == np.uint8) != (self.dtype == np.uint8):
            raise InputError(f"its dtype is {image.dtype}, others have {self.dtype}")
        return image


def records(piece: Piece) -> Iterator[tuple[str, Record]]:
    """Yields the records of a piece, each with a name that says where it is.

    Raises InputError if the whole shard is damaged.
    """
    wanted = iter(piece.rows.tolist())
    row = next(wanted, None)
    for number, record in enumerate(read_shard(piece.shard) if row is not None else ()):
        if number == row:
            yield f"{piece.shard.name}: {record.key}", record
            row = next(wanted, None)
            if row is None:
                return
    if row is not None:
        raise InputError(f"{piece.shard.path}: changed since it was listed")


def decoded(
    decoder: Decoder, pieces: Iterable[Piece], workers: int, ahead: int = 2
) -> Iterator[Decoded]:
    """Yields the decoded images of each piece, in order.

    workers: how many processes decode; 0 decodes in this one. ahead: how many pieces all workers
    together decode in advance.

    Raises what ``Decoder.decode`` raises, and MachineError if a process ends.
    """
    for found in (
        _loaded(decoder, pieces, workers, ahead) if workers else map(decoder.__getitem__, pieces)
    ):
        if isinstance(found, CommandError):
            raise found
        yield found


def _loaded(
    decoder: Decoder, pieces: Iterable[Piece], workers: int, ahead: int
) -> Iterator[Decoded | CommandError]:
    import torch
    from torch.utils.data import DataLoader

    with _quietly_started():
        loader = iter(
            DataLoader(
                decoder,  # type: ignore[arg-type]
                batch_size=None,
                sampler=pieces,
                num_workers=workers,
                prefetch_factor=max(2, -(-ahead // workers)),
                multiprocessing_context=_context(),
                collate_fn=_as_it_is,  # sends arrays through pipes, as shared memory may be small
                worker_init_fn=_begin,
                generator=torch.Generator(),
            )
        )
    try:
        yield from loader
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise MachineError(f"a process that decodes images ended: {reason}") from None


@cache
def _context() -> BaseContext:
    """Returns how to start processes: if possible, from a server that has their imports."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.utils.data", __name__])
    return context


@contextmanager
def _quietly_started() -> Iterator[None]:
    """A context to start processes in; signals wait until the processes ignore them.

    Afterwards removes PyTorch's handler for the end of a process, which could raise anywhere in the
    program.
    """
    masked = hasattr(signal, "pthread_sigmask")
    former = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS) if masked else ()
    ended = signal.getsignal(signal.SIGCHLD) if masked else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a warning of more processes than cores
            yield
    finally:
        if masked:
            if signal.getsignal(signal.SIGCHLD) != ended:
                signal.signal(signal.SIGCHLD, ended)
            signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _begin(worker: int) -> None:
    """Makes a worker ignore signals, which its parent gets, and end with the parent.

    PyTorch itself watches the server instead of the parent. A worker that ended in the usual way
    would wait until its output is read.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _end_with(parent: int) -> None:
    connection.wait([parent])
    os._exit(1)


def _as_it_is(found: Any) -> Any:
    return found
