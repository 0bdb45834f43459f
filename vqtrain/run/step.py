"""One training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from vqtrain.data.batches import portion
from vqtrain.device import arithmetic
from vqtrain.losses import Losses, compute_losses
from vqtrain.model import VQVAE, Forward
from vqtrain.options import FIRST_MOMENT, TrainingOptions
from vqtrain.quantizer import assigned, draw, mean_error
from vqtrain.run.ranks import ALONE, Ranks
from vqtrain.run.rules import Choices, Rules

Taken = tuple[Losses, Tensor]
"""The losses before a step, and the indices (N, S), both of this rank's images."""

Choose = Callable[[Tensor, Tensor], Tensor]
"""Gives the indices for latents and codebook."""


@dataclass(frozen=True)
class Split:
    """How the images of a step are split: over ranks, and on each into passes, one after another.

    What a step does to the model does not depend on it, but for the order of sums.
    """

    ranks: Ranks = ALONE
    passes: int = 1

    def parts(self, images: int, batch_size: int) -> list[Part]:
        """The passes over this rank's images of a batch, none of them without an image.

        images: how many are at hand: one rank alone takes any batch, several those of batch_size.
        """
        count = images if self.ranks.count == 1 else batch_size
        first, last = self.ranks.part(count)
        cuts = (portion(last - first, self.passes, i) for i in range(self.passes))
        return [Part(first, a, b, count) for a, b in cuts if b > a]


@dataclass(frozen=True)
class Part:
    """Images ``start`` to ``end`` of a rank's, whose own begin at ``first`` of ``count`` in all."""

    first: int
    start: int
    end: int
    count: int

    @property
    def share(self) -> float:
        """Of all images of the step."""
        return (self.end - self.start) / self.count

    def of(self, images: Tensor) -> Tensor:
        """These of the rank's images."""
        return images[self.start : self.end]

    def of_all(self, values: Tensor) -> Tensor:
        """What is these images', of values for all of the step."""
        return values[self.first + self.start : self.first + self.end]


WHOLE = Split()


def make_optimizer(model: VQVAE, options: TrainingOptions) -> torch.optim.Optimizer:
    """Adam on encoder and decoder; the codebook has no gradient.

    On a card the learning rate and the count of steps live there, so that a CUDA graph can hold
    them.
    """
    learned = _learned(model)
    on_card = learned[0].device.type == "cuda"
    rate = (
        torch.tensor(options.learning_rate, device=learned[0].device)
        if on_card
        else options.learning_rate
    )
    moments = (FIRST_MOMENT, options.second_moment)
    return torch.optim.Adam(
        learned, lr=rate, betas=moments, eps=options.adam_epsilon, fused=True, capturable=on_card
    )


def _learned(model: VQVAE) -> list[Parameter]:
    return [*model.encoder.parameters(), *model.decoder.parameters()]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the rate of the next steps; one that lives on a card keeps its place."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def training_step(
    model: VQVAE,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    options: TrainingOptions,
    rules: Rules,
    step: int,
    split: Split = WHOLE,
) -> Taken:
    """Takes step ``step`` (counted from 0) on images (N, C, H, W), of several ranks this one's.

    Gradients go to encoder and decoder; then this step's latents move the codebook's averages, as
    the rules have it. Returns the losses before the step and the indices (N, S).
    """
    set_learning_rate(optimizer, rules.learning_rate(step))
    count = len(images) if split.ranks.count == 1 else options.batch_size
    choices = rules.choices(step, model.spec, count).to(images.device)
    return take(model, optimizer, images, options, choices, split)


def take(
    model: VQVAE,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    options: TrainingOptions,
    choices: Choices,
    split: Split = WHOLE,
) -> Taken:
    """The step itself, all on one device.

    choices: for the images of all ranks. Alone, it never waits for that device, and all that
    differs between two steps of a kind is in tensors: ``images``, ``choices``, the learning rate.
    """
    ranks, spec = split.ranks, model.spec
    parts = split.parts(len(images), options.batch_size)
    with arithmetic(options.precision, one_size=True):
        losses, latents, indices = _passes(model, images, options, choices, split, parts)
        added = []
        if not choices.plain:
            added = [*assigned(latents, indices, spec.num_codes)]
            if choices.order is not None:
                added.append(_in_order(latents, choices.order, spec.num_codes, ranks))
        if ranks.count > 1:
            ranks.add_up([*_gradients(model), *added])
        optimizer.step()
    if not choices.plain:
        hits, sums = added[:2]
        model.quantizer.update(hits, sums, options.decay, options.epsilon)
        if choices.order is not None:
            mean = len(choices.order) / spec.num_codes
            how = options.revive_below, options.decay, options.epsilon
            model.quantizer.revive(added[2], mean, *how)
    return losses, indices


def _passes(
    model: VQVAE,
    images: Tensor,
    options: TrainingOptions,
    choices: Choices,
    split: Split,
    parts: Sequence[Part],
) -> tuple[Losses, Tensor, Tensor]:
    """The losses of images (N, C, H, W), their latents (N, S, D) and indices (N, S), pass by pass.

    The parameters' gradients are this rank's share of those of the whole step.
    """
    spec, variance = model.spec, None
    drawn = choices.temperature is not None
    if drawn and len(parts) != 1:  # it must be known before the first pass; others wait for it
        variance = _variance_ahead(model, images, options, split, parts)
    found: list[tuple[Losses, Tensor, Tensor]] = []
    for part in parts:
        choose = _rule(choices, part, split.ranks, variance)
        more = bool(found)
        out, losses = forward_and_back(
            model, part.of(images), options, choices, choose, part.share, add=more
        )
        detached = Losses(*(value.detach() for value in losses))
        found.append((detached, out.latents.detach(), out.indices))
    if len(found) == 1:
        return found[0]
    if not found:
        model.zero_grad(set_to_none=True)
        zero = model.quantizer.codebook.new_zeros
        indices = zero(0, spec.latent_size, dtype=torch.int64)
        return Losses(*zero(4)), zero(0, spec.latent_size, spec.code_size), indices
    weights = [(part.end - part.start) / len(images) for part in parts]
    each = torch.stack(
        [w * torch.stack(losses) for w, (losses, _, _) in zip(weights, found, strict=True)]
    )
    latents = torch.cat([latents for _, latents, _ in found])
    return Losses(*each.sum(0)), latents, torch.cat([indices for _, _, indices in found])


def _variance_ahead(
    model: VQVAE, images: Tensor, options: TrainingOptions, split: Split, parts: Sequence[Part]
) -> Tensor:
    """``mean_error`` () of all images of the step, for which each is encoded once more."""
    codebook = model.quantizer.codebook
    total = codebook.new_zeros(())
    half = model.in_half() if options.precision == "bfloat16" else None
    with torch.no_grad(), half.in_place() if half else nullcontext():
        for part in parts:
            latents = model.encoder(part.of(images)).to(codebook.dtype)
            total += mean_error(latents, codebook) * part.share
    split.ranks.add_up([total])
    return total


def _rule(choices: Choices, part: Part, ranks: Ranks, variance: Tensor | None) -> Choose | None:
    """How the indices of a part are chosen if not as the nearest code.

    variance: ``mean_error`` () of all images of the step, None to find it out in this only pass.
    """
    gumbel, temperature = choices.gumbel, choices.temperature
    if gumbel is None or temperature is None:
        return None

    def choose(latents: Tensor, codebook: Tensor) -> Tensor:
        known = variance
        if known is None and ranks.count > 1:
            known = mean_error(latents, codebook) * part.share
            ranks.add_up([known])
        size = latents.shape[1]
        noise = part.of_all(gumbel) if isinstance(gumbel, Tensor) else gumbel
        place = (part.first + part.start) * size, part.count * size
        return draw(latents, codebook, noise, temperature, known, place)

    return choose


def _in_order(latents: Tensor, order: Tensor, most: int, ranks: Ranks) -> Tensor:
    """Rows (M, D): the first of all ranks' latents in an order of them, ``most`` if there are so
    many; zeros for those that are not among this rank's latents (N, S, D)."""
    rows, wanted = latents.reshape(-1, latents.shape[-1]), order[:most]
    if ranks.count == 1:
        return rows[wanted]
    if not len(rows):
        return rows.new_zeros(len(wanted), rows.shape[1])
    size = latents.shape[1]
    place = wanted - size * ranks.part(len(order) // size)[0]
    own = (place >= 0) & (place < len(rows))
    return torch.where(own[:, None], rows[place.clamp(0, len(rows) - 1)], 0)


def _gradients(model: VQVAE) -> list[Tensor]:
    """Of all parameters that are learned; zeros where this rank has none."""
    for parameter in _learned(model):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in _learned(model) if parameter.grad is not None]


def forward_and_back(
    model: VQVAE,
    images: Tensor,
    options: TrainingOptions,
    choices: Choices,
    choose: Choose | None = None,
    share: float = 1.0,
    *,
    add: bool = False,
) -> tuple[Forward, Losses]:
    """One pass and its losses; leaves their gradients in the parameters, which had none to add to.

    choose: how indices are chosen, None for the nearest code. share: what the gradients are
    multiplied by. add: whether to the gradients of an earlier pass.
    """
    half = model.in_half() if options.precision == "bfloat16" else None
    with half.in_place() if half else nullcontext():
        rule = () if choose is None else (choose,)
        out = model.plain(images) if choices.plain else model(images, *rule)
    losses = compute_losses(
        model.spec, images, out.outputs, out.latents, out.quantized, options.beta
    )
    if not add:
        model.zero_grad(set_to_none=True)
    losses.total.backward(torch.full_like(losses.total, share))
    if half:
        half.hand_gradients_back(add=add)
    return out, losses
