"""The rules of a recipe: what happens to the codebook beside its averages, and the learning rate, step by step.

Every rule that touches the codebook has its twin in ``vqref.quantizer``, with the random choice passed in; here the choice
is made, by one generator that a checkpoint holds.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vqref.spec import ModelSpec
from vqtrain.data import Batches
from vqtrain.model import VQVAE
from vqtrain.options import TrainingOptions

RISING_STEPS = 100
"""Steps in which a cosine schedule first rises to the learning rate."""

SHORTEST_RUN = 10
"""Plain steps take at most this part of a run, so that a short one has a codebook, too."""

LAST_SHARE = 0.01
"""The share of the learning rate at which a cosine schedule ends."""

REVIVE_UNTIL = 0.9
"""The share of all steps after which no code is revived any more: the last ones settle."""

KMEANS_LATENTS = 20_000
"""At most so many latents of the training images are clustered."""


@dataclass(frozen=True)
class Choices:
    """What the rules chose for one step, in tensors where steps of one kind differ.

    plain: the decoder is fed the latents themselves. gumbel (N, S, K) and temperature (): of the draw of indices, None where
    the nearest code is taken. order (N*S,): in which latents of the batch take the places of dead codes, None where none does.
    """

    plain: bool
    gumbel: Tensor | None
    temperature: Tensor | None
    order: Tensor | None

    @property
    def kind(self) -> tuple[bool, ...]:
        """Steps of one kind do the same operations."""
        return self.plain, self.gumbel is not None, self.order is not None

    def to(self, device: torch.device, *, copy: bool = False) -> Choices:
        """The same on a device; with ``copy``, in tensors of its own."""
        moved = [
            None if tensor is None else tensor.to(device, copy=copy) for tensor in (self.gumbel, self.temperature, self.order)
        ]
        return Choices(self.plain, *moved)

    def fill(self, other: Choices) -> None:
        """Takes over the choices of another step of the same kind, in place."""
        for mine, others in ((self.gumbel, other.gumbel), (self.temperature, other.temperature), (self.order, other.order)):
            if mine is not None and others is not None:
                mine.copy_(others)


class Rules:
    """The rules of ``options`` over ``steps`` steps. ``generator`` makes every random choice; its state is the only state."""

    def __init__(self, options: TrainingOptions, steps: int) -> None:
        self.options, self.steps = options, steps
        self.plain_steps = min(options.plain_steps, steps // SHORTEST_RUN)
        self.generator = torch.Generator().manual_seed(options.seed + 1)

    def plain(self, step: int) -> bool:
        """Whether the decoder is fed the latents themselves in this step (counted from 0)."""
        return step < self.plain_steps

    def starts(self, step: int) -> bool:
        """Whether the codebook is set by k-means before this step."""
        return self.options.kmeans_start and step == self.plain_steps

    def learning_rate(self, step: int) -> float:
        """Of this step."""
        if not self.options.cosine:
            return self.options.learning_rate
        fall = LAST_SHARE + (1 - LAST_SHARE) * (1 + math.cos(math.pi * step / self.steps)) / 2
        return self.options.learning_rate * min(1.0, (step + 1) / RISING_STEPS) * fall

    def temperature(self, step: int) -> float:
        """Of the draw of indices in this step; 0 where the nearest code is taken."""
        end = self.options.anneal_until * self.steps
        return self.options.temperature * max(0.0, 1 - step / end) if end else 0.0

    def revives(self, step: int) -> bool:
        """Whether dead codes are reset after this step."""
        return self.options.revive_below > 0 and not self.plain(step) and step < REVIVE_UNTIL * self.steps

    def choices(self, step: int, spec: ModelSpec, count: int) -> Choices:
        """What this step needs on ``count`` images, its random choices made."""
        temperature = 0.0 if self.plain(step) else self.temperature(step)
        gumbel = order = None
        if temperature > 0:
            exponential = torch.empty(count, spec.latent_size, spec.num_codes).exponential_(generator=self.generator)
            gumbel = -exponential.log()  # the negative logarithm of an exponential variable is Gumbel distributed
        if self.revives(step):
            order = torch.randperm(count * spec.latent_size, generator=self.generator)
        return Choices(self.plain(step), gumbel, None if gumbel is None else torch.tensor(temperature), order)

    def start(self, model: VQVAE, batches: Batches) -> None:
        """Sets the codebook by k-means on the latents of the training images (one pass without gradient)."""
        from scipy.cluster.vq import kmeans2

        with torch.no_grad():
            latents = torch.cat([model.encoder(images).reshape(-1, model.spec.code_size) for images in batches.in_order()])
        order = torch.randperm(len(latents), generator=self.generator)[:KMEANS_LATENTS]
        chosen = latents.cpu()[order].double().numpy()
        seed = int(torch.randint(2**31, (), generator=self.generator))
        k = model.spec.num_codes
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a cluster that came out empty keeps its place, and is revived if it dies
            if len(chosen) >= k:
                rows, labels = kmeans2(chosen, k, iter=30, minit="++", rng=np.random.default_rng(seed))
            else:  # fewer latents than codes: some codes begin at the same place
                rows, labels = chosen[np.arange(k) % len(chosen)], np.arange(len(chosen))
        share = np.bincount(labels, minlength=k) / len(labels)
        counts = torch.from_numpy(share * self.options.batch_size * model.spec.latent_size)
        codebook = model.quantizer.codebook
        codes = torch.arange(k, device=codebook.device)
        model.quantizer.reset(codes, torch.from_numpy(rows).to(codebook), counts.to(codebook), self.options.epsilon)
