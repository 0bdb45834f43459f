"""Images in memory and batches of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Collected = Callable[[Sequence[str]], list[str]]


def portion(count: int, parts: int, part: int) -> tuple[int, int]:
    """Returns where part ``part`` of ``count`` things begins, and where it ends.

    Sizes of the ``parts`` parts differ by at most one; larger parts come first.
    """
    size, larger = divmod(count, parts)
    first, last = (size * each + min(each, larger) for each in (part, part + 1))
    return first, last


class Batches:
    """Batches of images (N, C, H, W), stored as uint8 or float32, yielded as float32 in [0, 1].

    part: which images of each shuffled batch to yield, as a start and an end; None yields all.
    at_once: how many images ``in_order`` and ``some`` yield at a time; None yields batches.
    count: images in one pass.
    """

    def __init__(
        self,
        images: npt.NDArray[np.generic],
        batch_size: int,
        device: torch.device,
        part: tuple[int, int] | None = None,
        at_once: int | None = None,
    ) -> None:
        self.images = torch.from_numpy(images).to(device)
        self.batch_size, self.count = batch_size, len(images)
        self.part = part or (0, batch_size)
        self.at_once = at_once or batch_size

    def __len__(self) -> int:
        """The number of whole batches in one pass."""
        return self.count // self.batch_size

    def shuffled(self, generator: torch.Generator, skip: int = 0) -> Iterator[Tensor]:
        """Yields one pass in an order drawn from ``generator``.

        Leaves out the remainder and the first ``skip`` batches. The generator is on the CPU, so the
        order is the same on every device.
        """
        order = torch.randperm(len(self.images), generator=generator).to(self.images.device)
        first, last = self.part
        for start in range(skip * self.batch_size, len(self) * self.batch_size, self.batch_size):
            yield self._unit(self.images[order[start + first : start + last]])

    def join(self, collected: Collected) -> None:
        """Shares between ranks what they learned about the images in a pass.

        collected: turns one rank's lines into all ranks' lines; all ranks must call it.
        """

    def in_order(self) -> Iterator[Tensor]:
        """Yields every image once, in stored order; the last batch may be smaller."""
        for images in self.images.split(self.at_once):
            if len(images):  # if there are no images, there is one empty part
                yield self._unit(images)

    def some(self, count: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Yields at most ``count`` images, drawn without repeats, a few at a time."""
        order = torch.randperm(len(self.images), generator=generator)[:count]
        for part in order.to(self.images.device).split(self.at_once):
            yield self._unit(self.images[part])

    @staticmethod
    def _unit(images: Tensor) -> Tensor:
        return images.float() / 255 if images.dtype == torch.uint8 else images
