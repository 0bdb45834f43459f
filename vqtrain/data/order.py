"""The order of images in an epoch if they do not fit in memory.

First the pieces of shards are shuffled, then the images of as many pieces as a buffer holds. The
order depends only on sizes and a seed. So a run can continue at any step, and the batches are the
same for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vqref.validation import Int64

FIRST = 512
"""Images of an epoch's first window. Each later window is twice as large as the one before, up to
the buffer. So an epoch begins before a whole buffer is decoded."""


@dataclass(frozen=True)
class Window:
    """The images that are held and shuffled together.

    start: how many images of the epoch come before it. pieces (n,): the piece of each image, in
    order. places (n,): where the image is in its piece.
    """

    start: int
    pieces: Int64
    places: Int64

    def __len__(self) -> int:
        return len(self.pieces)


def windows(sizes: Sequence[int], buffer: int, seed: int, first: int = 0) -> Iterator[Window]:
    """Yields the windows of one epoch, from the window with position ``first`` on.

    sizes: images in each piece. buffer: a window takes shuffled pieces until it holds this many
    images. seed: the epoch's.
    """
    order = np.random.default_rng(seed).permutation(len(sizes))
    counts = np.asarray(sizes, np.int64)[order]
    begin = start = 0
    for end in _ends(counts, buffer):
        size = int(counts[begin:end].sum())
        if start + size > first:
            pieces = np.repeat(order[begin:end], counts[begin:end])
            places = np.concatenate([np.arange(count) for count in counts[begin:end]])
            mixed = np.random.default_rng((seed, begin)).permutation(size)
            yield Window(start, pieces[mixed], places[mixed])
        begin, start = end, start + size


def _ends(counts: Int64, buffer: int) -> Iterator[int]:
    """Yields after how many pieces each window ends."""
    held, wanted = 0, min(FIRST, buffer)
    for i, count in enumerate(counts, 1):
        held += int(count)
        if held >= wanted or (held and i == len(counts)):
            yield i
            held, wanted = 0, min(2 * wanted, buffer)
