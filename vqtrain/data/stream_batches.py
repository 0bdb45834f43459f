"""Batches of images that do not fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import tee
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vqref.host.images import ImageSet
from vqref.validation import Array, Int64
from vqtrain.data.batches import Batches, Collected
from vqtrain.data.decoding import Piece, decoded
from vqtrain.data.order import windows
from vqtrain.data.streams import Broken, StreamSet

Say = Callable[[str], None]


class StreamBatches(Batches):
    """``Batches`` of a stream: a pass takes every image, all else uses the sample.

    say: takes a line on each broken image; an image of the sample replaces it.
    part, at_once: as in ``Batches``; images of other parts are not decoded.
    """

    def __init__(
        self,
        images: StreamSet,
        batch_size: int,
        device: torch.device,
        say: Say,
        part: tuple[int, int] | None = None,
        at_once: int | None = None,
    ) -> None:
        super().__init__(images.train, batch_size, device, part, at_once)
        self.source, self.sample, self.count = images, images.train, images.count
        self.device, self.say = device, say
        self.workers = images.streaming.processes()
        self.broken = Broken(images.streaming.max_broken or 0, images.broken)

    def shuffled(self, generator: torch.Generator, skip: int = 0) -> Iterator[Tensor]:
        """Yields a pass like ``Batches``. Shuffles pieces, then the images of a buffer of pieces.

        Raises InputError if too many images are broken, or a shard is damaged.
        """
        seed = int(torch.randint(2**63 - 1, (), generator=generator))
        size, held = self.part[1] - self.part[0], self.sample[:0]
        for images in self._windows(seed, skip) if size else ():
            held = np.concatenate([held, images])
            whole = len(held) // size * size
            for start in range(0, whole, size):
                yield self._unit(torch.from_numpy(held[start : start + size]).to(self.device))
            held = held[whole:].copy()
        if not size:
            yield from (self.images[:0].float() for _ in range(skip, len(self)))

    def join(self, collected: Collected) -> None:
        """Counts and reports the broken images that other ranks found.

        Raises InputError on every rank if there are too many in total.
        """
        for image in collected(sorted(self.broken.known)):
            if line := self.broken.add(image):
                self.say(line)

    def _windows(self, seed: int, skip: int) -> Iterator[Array]:
        """Yields this rank's images of the epoch in order, one shuffled window at a time."""
        shares, again = tee(self._shares(seed, skip))
        mean = max(1, self.count // len(self.source.pieces))
        ahead = -(-self.source.buffer // mean)
        pieces = (piece for share in again for piece, _ in share.parts)
        results = decoded(self.source.decoder, pieces, self.workers, ahead)
        for share in shares:
            images = np.empty((len(share.positions), *self.sample.shape[1:]), self.sample.dtype)
            for (_, places), found in zip(share.parts, results, strict=False):
                images[places] = found.images
                for i, why in found.broken.items():
                    if line := self.broken.add(why):
                        self.say(line)
                    instead = share.positions[places[i]] % len(self.sample)
                    images[places[i]] = self.sample[instead]
            yield images

    def _shares(self, seed: int, skip: int) -> Iterator[_Share]:
        first, size, pieces = skip * self.batch_size, self.batch_size, self.source.pieces
        sizes = [len(piece.rows) for piece in pieces]
        for window in windows(sizes, self.source.buffer, seed, first):
            at = window.start + np.arange(len(window))
            mine = (at >= first) & (at < len(self) * size)
            mine &= (at % size >= self.part[0]) & (at % size < self.part[1])
            numbers, places = window.pieces[mine], window.places[mine]
            order = np.lexsort((places, numbers))
            cuts = np.flatnonzero(np.diff(numbers[order])) + 1
            parts = []
            for part in np.split(order, cuts) if len(order) else ():
                shard, rows = pieces[numbers[part[0]]]
                parts.append((Piece(shard, rows[places[part]]), part))
            yield _Share(at[mine], parts)


class _Share(NamedTuple):
    """One rank's images of a window: their positions (n,) in the epoch, and their pieces.

    Each piece comes with the places (m,) of its images among the n.
    """

    positions: Int64
    parts: list[tuple[Piece, Int64]]


def batches_of(
    images: ImageSet,
    batch_size: int,
    device: torch.device,
    say: Say,
    part: tuple[int, int] | None = None,
    at_once: int | None = None,
) -> Batches:
    """Returns the batches to train on, from a stream or from images in memory."""
    if isinstance(images, StreamSet):
        return StreamBatches(images, batch_size, device, say, part, at_once)
    return Batches(images.train, batch_size, device, part, at_once)
