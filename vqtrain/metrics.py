"""What is measured over an epoch or a set of images, added up on the device and read once."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vqref.spec import ModelSpec
from vqtrain.losses import Losses


@dataclass(frozen=True)
class Metrics:
    """Means over images, in nats an image (commitment: a mean of squares), and the use of the codebook.

    bound: reconstruction + prior. perplexity: exp of the entropy of the indices' frequencies, 1 to num_codes.
    codes_used: how many codes were chosen at all.
    """

    reconstruction: float
    commitment: float
    prior: float
    total: float
    bound: float
    perplexity: float
    codes_used: int

    @property
    def finite(self) -> bool:
        return math.isfinite(self.total)

    def to_dict(self, spec: ModelSpec) -> dict[str, float]:
        """The fields, with ``bits_per_dimension``: the bound in bits a pixel and channel."""
        bits = self.bound / (math.log(2) * math.prod(spec.image_shape))
        return {**dataclasses.asdict(self), "bits_per_dimension": bits}


class Meter:
    """Adds up batches; reading a value waits for the device, adding does not."""

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        self.count = 0
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)
        self.hits = torch.zeros(spec.num_codes, dtype=torch.int64, device=device)

    def add(self, losses: Losses, indices: Tensor) -> None:
        """Losses of one batch and its indices (N, S)."""
        self.count += len(indices)
        self.sums += torch.stack(losses).detach().double() * len(indices)
        index = indices.reshape(-1)
        self.hits.index_add_(0, index, torch.ones_like(index))

    def state(self) -> dict[str, Any]:
        """What ``load`` needs to go on counting."""
        return {"count": self.count, "sums": self.sums, "hits": self.hits}

    def load(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        self.sums.copy_(state["sums"])
        self.hits.copy_(state["hits"])

    def read(self) -> Metrics:
        """Means over the images added so far (at least one)."""
        reconstruction, commitment, prior, total = (self.sums / self.count).tolist()
        share = self.hits.double() / self.hits.sum()
        entropy = -torch.special.xlogy(share, share).sum().item()
        return Metrics(
            reconstruction,
            commitment,
            prior,
            total,
            bound=reconstruction + prior,
            perplexity=math.exp(entropy),
            codes_used=int((self.hits > 0).sum()),
        )
