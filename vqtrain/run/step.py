"""One training step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from vqtrain.device import arithmetic
from vqtrain.losses import Losses, compute_losses
from vqtrain.model import VQVAE, Forward
from vqtrain.options import FIRST_MOMENT, TrainingOptions
from vqtrain.quantizer import draw
from vqtrain.run.rules import Choices, Rules

Taken = tuple[Losses, Tensor]
"""The losses before a step, and the indices (N, S)."""


def make_optimizer(model: VQVAE, options: TrainingOptions) -> torch.optim.Optimizer:
    """Adam on encoder and decoder; the codebook has no gradient.

    On a card the learning rate and the count of steps live there, so that a CUDA graph can hold
    them.
    """
    learned = [*model.encoder.parameters(), *model.decoder.parameters()]
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
) -> Taken:
    """Takes step ``step`` (counted from 0) on images (N, C, H, W).

    Gradients go to encoder and decoder; then this step's latents move the codebook's averages, as
    the rules have it. Returns the losses before the step and the indices (N, S).
    """
    set_learning_rate(optimizer, rules.learning_rate(step))
    choices = rules.choices(step, model.spec, len(images)).to(images.device)
    return take(model, optimizer, images, options, choices)


def take(
    model: VQVAE,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    options: TrainingOptions,
    choices: Choices,
) -> Taken:
    """The step itself, all on one device.

    It never waits for that device, and all that differs between two steps of a kind is in tensors:
    ``images``, ``choices``, the learning rate.
    """
    with arithmetic(options.precision, one_size=True):
        out, losses = forward_and_back(model, images, options, choices)
        optimizer.step()
    if not choices.plain:
        latents = out.latents.detach()
        model.quantizer.update(latents, out.indices, options.decay, options.epsilon)
        if choices.order is not None:
            how = options.revive_below, options.decay, options.epsilon
            model.quantizer.revive(latents, choices.order, *how)
    return Losses(*(value.detach() for value in losses)), out.indices


def forward_and_back(
    model: VQVAE, images: Tensor, options: TrainingOptions, choices: Choices
) -> tuple[Forward, Losses]:
    """One pass and its losses; leaves their gradients in the parameters, which had none to add
    to."""
    half = model.in_half() if options.precision == "bfloat16" else None
    with half.in_place() if half else nullcontext():
        out = model.plain(images) if choices.plain else model(images, *_rule(choices))
    losses = compute_losses(
        model.spec, images, out.outputs, out.latents, out.quantized, options.beta
    )
    model.zero_grad(set_to_none=True)
    losses.total.backward()
    if half:
        half.hand_gradients_back()
    return out, losses


def _rule(choices: Choices) -> tuple[Callable[[Tensor, Tensor], Tensor], ...]:
    """How indices are chosen if not as the nearest code."""
    gumbel, temperature = choices.gumbel, choices.temperature
    if gumbel is None or temperature is None:
        return ()
    return (lambda latents, codebook: draw(latents, codebook, gumbel, temperature),)
