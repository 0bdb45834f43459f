"""The rules of a recipe: the learning rate of each step, and changes to the codebook.

Each rule that changes the codebook has a twin in ``vqref.quantizer``, which takes the random choice
as an argument. Here a single generator makes the choice, and snapshots hold its state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vqref.spec import ModelSpec
from vqtrain.data.batches import Batches
from vqtrain.model import VQVAE
from vqtrain.nearest import nearest
from vqtrain.options import TrainingOptions
from vqtrain.quantizer import placed
from vqtrain.run.ranks import ALONE, Ranks

RISING_STEPS = 100
"""Steps in which a cosine schedule first rises to the learning rate."""

SHORTEST_RUN = 10
"""Plain steps take at most 1 / SHORTEST_RUN of a run, so that short runs also get a codebook."""

LAST_SHARE = 0.01
"""The share of the learning rate at which a cosine schedule ends."""

REVIVE_UNTIL = 0.9
"""The share of all steps after which no codes are revived, so that the codebook settles."""

KMEANS_LATENTS, LATENTS_PER_CODE = 20_000, 4
"""The most latents of training images that are clustered, in all or per code, whichever is
more."""

SPREAD_WORK = 2**31
"""Up to so many differences, M*K*D, k-means starts with k-means++, which computes them all."""

KMEANS_STEPS, LARGE_STEPS = 30, 10
"""Rounds of k-means, up to SPREAD_WORK and beyond it."""

CHOICE_ELEMENTS = 2**24
"""Elements of the largest array of random choices that a rule makes, 64 MiB."""


@dataclass(frozen=True)
class Choices:
    """What the rules chose for one step, as tensors; steps of one kind differ only in these.

    plain: the decoder gets the latents themselves.
    gumbel (N, S, K), or a seed if that is too large; temperature (): for the draw of indices; None
        if the nearest code is taken.
    order (N*S,): the order in which latents of the batch replace dead codes; None if none do.
    """

    plain: bool
    gumbel: Tensor | int | None
    temperature: Tensor | None
    order: Tensor | None

    @property
    def kind(self) -> tuple[bool, ...]:
        """The kind of the step. Steps of one kind do the same operations."""
        return self.plain, self.gumbel is not None, self.order is not None

    def to(self, device: torch.device, *, copy: bool = False) -> Choices:
        """Returns the same choices on a device; with ``copy``, in new tensors."""

        def moved(value: Tensor | int | None) -> Tensor | int | None:
            return value.to(device, copy=copy) if isinstance(value, Tensor) else value

        chosen = map(moved, (self.gumbel, self.temperature, self.order))
        return Choices(self.plain, *chosen)  # type: ignore[arg-type]

    def fill(self, other: Choices) -> None:
        """Copies the choices of another step of the same kind, in place."""
        for name in ("gumbel", "temperature", "order"):
            mine, others = getattr(self, name), getattr(other, name)
            if isinstance(mine, Tensor):
                mine.copy_(others)


def fits_an_array(spec: ModelSpec, count: int) -> bool:
    """Whether the random choices of a draw for ``count`` images may be one array."""
    return count * spec.latent_size * spec.num_codes <= CHOICE_ELEMENTS


NEAREST = Choices(plain=False, gumbel=None, temperature=None, order=None)
"""A step without rules: it takes the nearest codes, and resets none."""


class Rules:
    """The rules of ``options`` over ``steps`` steps.

    generator: makes every random choice; its state is the only state.
    """

    def __init__(self, options: TrainingOptions, steps: int) -> None:
        self.options, self.steps = options, steps
        self.plain_steps = min(options.plain_steps, steps // SHORTEST_RUN)
        self.generator = torch.Generator().manual_seed(options.seed + 1)

    def plain(self, step: int) -> bool:
        """Whether the decoder gets the latents themselves in this step (counted from 0)."""
        return step < self.plain_steps

    def starts(self, step: int) -> bool:
        """Whether k-means sets the codebook before this step."""
        return self.options.kmeans_start and step == self.plain_steps

    def learning_rate(self, step: int) -> float:
        """The learning rate of this step."""
        if not self.options.cosine:
            return self.options.learning_rate
        fall = LAST_SHARE + (1 - LAST_SHARE) * (1 + math.cos(math.pi * step / self.steps)) / 2
        return self.options.learning_rate * min(1.0, (step + 1) / RISING_STEPS) * fall

    def temperature(self, step: int) -> float:
        """The temperature of this step's draw of indices; 0 if the nearest code is taken."""
        end = self.options.anneal_until * self.steps
        return self.options.temperature * max(0.0, 1 - step / end) if end else 0.0

    def revives(self, step: int) -> bool:
        """Whether dead codes are reset after this step."""
        early = step < REVIVE_UNTIL * self.steps
        return self.options.revive_below > 0 and not self.plain(step) and early

    def choices(self, step: int, spec: ModelSpec, count: int) -> Choices:
        """Makes the choices of this step for ``count`` images."""
        temperature = 0.0 if self.plain(step) else self.temperature(step)
        gumbel = self._gumbel(spec, count) if temperature > 0 else None
        order = None
        if self.revives(step):
            order = torch.randperm(count * spec.latent_size, generator=self.generator)
        held = None if gumbel is None else torch.tensor(temperature)
        return Choices(self.plain(step), gumbel, held, order)

    def _gumbel(self, spec: ModelSpec, count: int) -> Tensor | int:
        """Returns noise for every latent and code, or its seed.

        Minus the logarithm of an exponential variable is Gumbel distributed.
        """
        if not fits_an_array(spec, count):
            return self._seed()
        noise = torch.empty(count, spec.latent_size, spec.num_codes)
        return -noise.exponential_(generator=self.generator).log()

    def _seed(self) -> int:
        return int(torch.randint(2**31, (), generator=self.generator))

    def start(self, model: VQVAE, batches: Batches, ranks: Ranks = ALONE) -> None:
        """Sets the codebook by k-means on latents of the training images, without gradient.

        Rank 0 does it for all ranks.
        """
        state = self.generator.get_state()
        if ranks.first:
            self._start(model, batches)
            state = self.generator.get_state()
        ranks.hand_out([*model.quantizer.buffers(), state])
        self.generator.set_state(state)

    def _start(self, model: VQVAE, batches: Batches) -> None:
        latents = self._some_latents(model, batches)
        codes = model.spec.num_codes
        normalized = model.spec.normalized
        rows, labels = kmeans(latents, codes, self._seed(), normalized=normalized)
        share = torch.bincount(labels, minlength=codes) / len(labels)
        counts = share * self.options.batch_size * model.spec.latent_size
        codebook, options = model.quantizer.codebook, self.options
        arrays = rows.to(codebook), counts.to(codebook)
        model.quantizer.start(*arrays, options.decay, options.epsilon)

    @torch.no_grad()
    def _some_latents(self, model: VQVAE, batches: Batches) -> Tensor:
        """Returns latents (M, D) of as many images as k-means needs, in random order."""
        spec = model.spec
        wanted = max(KMEANS_LATENTS, LATENTS_PER_CODE * spec.num_codes)
        images = -(-wanted // spec.latent_size)
        found = [model.encoder(part) for part in batches.some(images, self.generator)]
        latents = torch.cat(found).reshape(-1, spec.code_size)
        order = torch.randperm(len(latents), generator=self.generator)[:wanted]
        return latents[order.to(latents.device)].float()


def kmeans(
    latents: Tensor, codes: int, seed: int, *, normalized: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns rows (codes, D) of k-means on latents (M, D), and the row of each latent, (M,).

    This is Lloyd's algorithm with ``nearest``, which needs no array of all distances. SciPy's makes
    one, and its k-means++ recomputes every distance for each further row.

    normalized: latents are unit vectors, and each round puts rows back on the sphere.

    Raises ValueError for latents that are not finite.
    """
    if not latents.isfinite().all():
        raise ValueError("latents are not finite")
    generator = torch.Generator().manual_seed(seed)
    large = latents.numel() * codes > SPREAD_WORK
    rows = (_different_rows if large else _spread_rows)(latents, codes, generator)
    for _ in range(LARGE_STEPS if large else KMEANS_STEPS):
        labels = nearest(latents, rows)
        counts = torch.bincount(labels, minlength=codes)[:, None]
        sums = torch.zeros_like(rows).index_add_(0, labels, latents)
        moved = torch.where(counts > 0, sums / counts.clamp(min=1), rows)
        rows = placed(moved, rows, normalized)
    return rows, nearest(latents, rows)


def _spread_rows(latents: Tensor, codes: int, generator: torch.Generator) -> Tensor:
    """Draws rows by k-means++ (Arthur and Vassilvitskii 2007).

    Each row is a latent, drawn in proportion to its squared distance to the nearest earlier row.
    """
    rows = latents.new_empty(codes, latents.shape[1])
    closest = torch.ones_like(latents[:, 0], dtype=torch.float64)
    for k in range(codes):
        reached = closest.cumsum(0)
        drawn = torch.rand((), generator=generator, dtype=torch.float64).to(reached)
        place = torch.searchsorted(reached, drawn * reached[-1]).clamp(max=len(latents) - 1)
        rows[k] = latents[place]
        distances = (latents - rows[k]).square().sum(dim=1).double()
        closest = distances if k == 0 else torch.minimum(closest, distances)
    return rows


def _different_rows(latents: Tensor, codes: int, generator: torch.Generator) -> Tensor:
    """Draws latents at random, all different if there are enough.

    Equal rows would be near ties, which the search cannot skip.
    """
    places = latents.unique(dim=0)
    drawn = torch.randperm(len(places), generator=generator)[torch.arange(codes) % len(places)]
    rows: Tensor = places[drawn.to(latents.device)]
    return rows
