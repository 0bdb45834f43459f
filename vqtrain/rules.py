"""The rules of a recipe: what happens to the codebook beside its averages, and the learning rate, step by step.

Every rule that touches the codebook has its twin in ``vqref.quantizer``, with the random choice passed in; here the choice
is made, by one generator that a checkpoint holds.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from vqtrain.data import Batches
from vqtrain.model import VQVAE
from vqtrain.nearest import nearest
from vqtrain.options import TrainingOptions
from vqtrain.quantizer import draw

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

    def choose(self, step: int) -> Callable[[Tensor, Tensor], Tensor]:
        """How latents (N, S, D) and the codebook (K, D) give indices (N, S) in this step."""
        temperature = self.temperature(step)
        if temperature <= 0:
            return nearest

        def choose(latents: Tensor, codebook: Tensor) -> Tensor:
            exponential = torch.empty(*latents.shape[:2], len(codebook)).exponential_(generator=self.generator)
            gumbel = -exponential.log()  # the negative logarithm of an exponential variable is Gumbel distributed
            return draw(latents, codebook, gumbel.to(latents.device), temperature)

        return choose

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

    def revive(self, step: int, model: VQVAE, latents: Tensor) -> int:
        """Resets codes whose count fell below ``revive_below`` of the mean to latents (N, S, D) of this step, each with the
        mean count; at most as many as there are latents. Returns how many."""
        if not self.options.revive_below or step >= REVIVE_UNTIL * self.steps:
            return 0
        count = model.quantizer.ema_count
        mean = self.options.batch_size * model.spec.latent_size / model.spec.num_codes
        dead = (count < self.options.revive_below * mean).nonzero()[:, 0]
        if not len(dead):
            return 0
        rows = latents.reshape(-1, latents.shape[-1])
        chosen = torch.randperm(len(rows), generator=self.generator)[: len(dead)].to(rows.device)
        dead = dead[: len(chosen)]
        model.quantizer.reset(dead, rows[chosen], torch.full_like(count[dead], mean), self.options.epsilon)
        return len(dead)
