"""Images in memory and batches of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class Batches:
    """Batches of images (N, C, H, W), held as they came (uint8 or float32) and given out as float32
    in [0, 1].

    count: how many images one pass takes them of.
    """

    def __init__(
        self, images: npt.NDArray[np.generic], batch_size: int, device: torch.device
    ) -> None:
        self.images = torch.from_numpy(images).to(device)
        self.batch_size, self.count = batch_size, len(images)

    def __len__(self) -> int:
        """Whole batches in one pass."""
        return self.count // self.batch_size

    def shuffled(self, generator: torch.Generator, skip: int = 0) -> Iterator[Tensor]:
        """One pass in an order drawn from ``generator``, without the remainder and the first
        ``skip`` batches. The generator is a CPU's, so the order is the same on every device."""
        order = torch.randperm(len(self.images), generator=generator).to(self.images.device)
        for batch in range(skip, len(self)):
            yield self._unit(
                self.images[order[batch * self.batch_size : (batch + 1) * self.batch_size]]
            )

    def in_order(self) -> Iterator[Tensor]:
        """Every image once, as stored; the last batch may be smaller."""
        for images in self.images.split(self.batch_size):
            yield self._unit(images)

    def some(self, count: int, generator: torch.Generator) -> Iterator[Tensor]:
        """At most ``count`` images, drawn without repeats, a batch at a time."""
        order = torch.randperm(len(self.images), generator=generator)[:count]
        for part in order.to(self.images.device).split(self.batch_size):
            yield self._unit(self.images[part])

    @staticmethod
    def _unit(images: Tensor) -> Tensor:
        return images.float() / 255 if images.dtype == torch.uint8 else images
