"""One training step: eager, or recorded once and played again, as a CUDA graph is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vqref.spec import ModelSpec
from vqtrain.arithmetic import arithmetic
from vqtrain.losses import Losses, compute_losses
from vqtrain.model import VQVAE
from vqtrain.nearest import takes_products
from vqtrain.options import ADAM_EPSILON, FIRST_MOMENT, TrainingOptions
from vqtrain.quantizer import draw
from vqtrain.rules import Choices, Rules

Taken = tuple[Losses, Tensor]
"""The losses before a step, and the indices (N, S)."""

WARM_UP = 3
"""Steps of a kind that are taken one operation at a time before it is recorded: libraries choose their kernels in them."""


def make_optimizer(model: VQVAE, options: TrainingOptions) -> torch.optim.Optimizer:
    """Adam on encoder and decoder; the codebook has no gradient. On a card its learning rate and its count of steps live
    there, so that a CUDA graph can hold it."""
    learned = [*model.encoder.parameters(), *model.decoder.parameters()]
    on_card = learned[0].device.type == "cuda"
    rate = torch.tensor(options.learning_rate, device=learned[0].device) if on_card else options.learning_rate
    moments = (FIRST_MOMENT, options.second_moment)
    return torch.optim.Adam(learned, lr=rate, betas=moments, eps=ADAM_EPSILON, fused=True, capturable=on_card)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Of the next steps; a rate that lives on a card keeps its place."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def training_step(
    model: VQVAE, optimizer: torch.optim.Optimizer, images: Tensor, options: TrainingOptions, rules: Rules, step: int
) -> Taken:
    """One step on images (N, C, H, W): gradients to encoder and decoder, then the codebook's moving averages on this
    step's latents, as the rules of ``step`` (counted from 0) have it. Returns the losses before the step and the indices
    (N, S)."""
    set_learning_rate(optimizer, rules.learning_rate(step))
    return take(model, optimizer, images, options, rules.choices(step, model.spec, len(images)).to(images.device))


def take(model: VQVAE, optimizer: torch.optim.Optimizer, images: Tensor, options: TrainingOptions, choices: Choices) -> Taken:
    """The step itself, all on one device. It never waits for that device, and all that differs between two steps of a kind is
    in tensors: ``images``, ``choices``, the learning rate."""
    with arithmetic(options.precision, one_size=True):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=options.precision == "bfloat16", cache_enabled=False):
            out = model.plain(images) if choices.plain else model(images, *_rule(choices))
        losses = compute_losses(model.spec, images, out.logits, out.latents, out.quantized, options.beta)
        optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        optimizer.step()
    if not choices.plain:
        latents = out.latents.detach()
        model.quantizer.update(latents, out.indices, options.decay, options.epsilon)
        if choices.order is not None:
            model.quantizer.revive(latents, choices.order, options.revive_below, options.epsilon)
    return Losses(*(value.detach() for value in losses)), out.indices


def _rule(choices: Choices) -> tuple[Callable[[Tensor, Tensor], Tensor], ...]:
    """How indices are chosen where it is not the nearest code."""
    gumbel, temperature = choices.gumbel, choices.temperature
    if gumbel is None or temperature is None:
        return ()
    return (lambda latents, codebook: draw(latents, codebook, gumbel, temperature),)


def can_be_recorded(spec: ModelSpec, options: TrainingOptions) -> bool:
    """Whether a step never waits for its device: a large codebook's search does, and so may deterministic sums."""
    latents = torch.empty(options.batch_size * spec.latent_size, spec.code_size, device="meta")
    large = takes_products(latents, torch.empty(spec.num_codes, spec.code_size, device="meta"))
    return not large and not torch.are_deterministic_algorithms_enabled()


Record = Callable[[Callable[[], Taken]], Callable[[], Taken]]
"""Makes, of a body that works on tensors in fixed places, a function that does the same again."""


def record_graph(body: Callable[[], Taken]) -> Callable[[], Taken]:
    """Records ``body``, without running it, as a CUDA graph. Raises RuntimeError where it does what a graph cannot hold."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        taken = body()

    def replay() -> Taken:
        graph.replay()
        return taken

    return replay


@dataclass
class _Kind:
    """The tensors in which steps of a kind find their images and choices, how many were taken, and the recording, if any."""

    images: Tensor
    choices: Choices
    taken: int = 0
    replay: Callable[[], Taken] | None = None


class RecordedSteps:
    """``training_step`` with its model, optimizer, options and rules, each kind of step recorded after its first few.

    record: ``record_graph``. say: takes the line that says why a kind could not be recorded; its steps are then taken one
    operation at a time, as the first ones are. What a call returns holds until the next.
    """

    def __init__(
        self,
        model: VQVAE,
        optimizer: torch.optim.Optimizer,
        options: TrainingOptions,
        rules: Rules,
        record: Record = record_graph,
        say: Callable[[str], None] = print,
    ) -> None:
        self.model, self.optimizer, self.options, self.rules = model, optimizer, options, rules
        self._record: Record | None = record
        self._say = say
        self._kinds: dict[tuple[bool, ...], _Kind] = {}

    def __call__(self, images: Tensor, step: int) -> Taken:
        set_learning_rate(self.optimizer, self.rules.learning_rate(step))
        choices = self.rules.choices(step, self.model.spec, len(images))
        kind = self._kinds.get(choices.kind)
        if kind is None:
            kind = self._kinds[choices.kind] = _Kind(images.clone(), choices.to(images.device, copy=True))
        else:
            kind.images.copy_(images)
            kind.choices.fill(choices)
        if kind.replay is None and kind.taken >= WARM_UP and self._record is not None:
            try:
                kind.replay = self._record(lambda: self._take(kind))
            except RuntimeError as error:
                self._say(f"steps are not recorded, but taken one operation at a time: {str(error).splitlines()[0]}")
                self._record = None
        if kind.replay is not None:
            return kind.replay()
        kind.taken += 1
        return _aside(lambda: self._take(kind), images.device)

    def _take(self, kind: _Kind) -> Taken:
        return take(self.model, self.optimizer, kind.images, self.options, kind.choices)


def _aside(body: Callable[[], Taken], device: torch.device) -> Taken:
    """On a card, runs ``body`` on a stream of its own, as what is recorded later wants its first runs to be."""
    if device.type != "cuda":
        return body()
    stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        losses, indices = body()
    current.wait_stream(stream)
    for tensor in (*losses, indices):
        tensor.record_stream(current)
    return losses, indices
