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
from vqtrain.optimizers import FIRST_MOMENT, MAKERS
from vqtrain.options import TrainingOptions
from vqtrain.quantizer import assigned, draw, mean_error
from vqtrain.run.ranks import ALONE, Ranks
from vqtrain.run.rules import Choices, Rules

Taken = tuple[Losses, Tensor]
"""The losses before a step and the indices (N, S), both for this rank's images."""

Choose = Callable[[Tensor, Tensor], Tensor]
"""Takes latents and codebook, and returns the indices."""


@dataclass(frozen=True)
class Split:
    """How the images of a step are split: over ranks, and on each rank into successive passes.

    It changes nothing of what a step does to the model, except the order of sums.
    """

    ranks: Ranks = ALONE
    passes: int = 1

    def parts(self, images: int, batch_size: int) -> list[Part]:
        """Returns the passes over this rank's images of a batch; each pass has images.

        images: how many there are. A single rank takes a batch of any size, several ranks take
        batches of batch_size.
        """
        count = images if self.ranks.count == 1 else batch_size
        first, last = self.ranks.part(count)
        cuts = (portion(last - first, self.passes, i) for i in range(self.passes))
        return [Part(first, a, b, count) for a, b in cuts if b > a]


@dataclass(frozen=True)
class Part:
    """Images ``start`` to ``end`` of a rank, whose images begin at ``first`` of all ``count``."""

    first: int
    start: int
    end: int
    count: int

    @property
    def share(self) -> float:
        """The share of these images among all of the step."""
        return (self.end - self.start) / self.count

    def of(self, images: Tensor) -> Tensor:
        """Returns this part of the rank's images."""
        return images[self.start : self.end]

    def of_all(self, values: Tensor) -> Tensor:
        """Returns this part of values for all images of the step."""
        return values[self.first + self.start : self.first + self.end]


WHOLE = Split()


def make_optimizer(model: VQVAE, options: TrainingOptions) -> torch.optim.Optimizer:
    """Returns the optimizer of encoder and decoder; the codebook has no gradient.

    On a card, the learning rate and the count of steps are kept on the card, so that a CUDA graph
    can hold them.
    """
    learned = _learned(model)
    on_card = learned[0].device.type == "cuda"
    rate = (
        torch.tensor(options.learning_rate, device=learned[0].device)
        if on_card
        else options.learning_rate
    )
    moments = (FIRST_MOMENT, options.second_moment)
    make = MAKERS[options.optimizer]
    return make(learned, rate, moments, options.adam_epsilon, on_card)


def _learned(model: VQVAE) -> list[Parameter]:
    return [*model.encoder.parameters(), *model.decoder.parameters()]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of the next steps, in place if it is kept on a card."""
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
    """Takes step ``step`` (counted from 0) on this rank's images (N, C, H, W).

    The gradients move encoder and decoder. Then the latents of this step move the codebook's
    averages as the rules say. Returns the losses before the step and the indices (N, S).
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
    """Takes the step itself, all on one device.

    choices: for the images of all ranks. With a single rank, this never waits for the device. Two
    steps of a kind then differ only in tensors: ``images``, ``choices``, the learning rate.
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
    """Returns the losses of images (N, C, H, W), their latents (N, S, D) and indices (N, S).

    Works pass by pass. The gradients that it leaves are this rank's share of the whole step's.
    """
    spec, variance = model.spec, None
    drawn = choices.temperature is not None
    if drawn and len(parts) != 1:  # known before the first pass; other ranks wait for it
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
    """Returns ``mean_error`` () of all images of the step; encodes each once more for that."""
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
    """Returns how the indices of a part are chosen; None for the nearest code.

    variance: ``mean_error`` () of all images of the step; None computes it in this only pass.
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
    """Returns rows (M, D): the first latents of all ranks in this order, at most ``most``.

    Rows that are not among this rank's latents (N, S, D) are zeros.
    """
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
    """Returns the gradients of all learned parameters; zeros if this rank has none."""
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
    """Runs one pass, computes its losses, and leaves their gradients in the parameters.

    choose: how indices are chosen; None takes the nearest code. share: a factor for the gradients.
    add: whether to add to the gradients of an earlier pass; else it replaces them.
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
