"""Records training steps once and replays them, as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vqref.spec import ModelSpec
from vqtrain.model import VQVAE
from vqtrain.nearest import takes_products
from vqtrain.options import TrainingOptions
from vqtrain.run.rules import Choices, Rules, fits_an_array
from vqtrain.run.step import WHOLE, Split, Taken, set_learning_rate, take

WARM_UP = 3
"""Steps of a kind that run one operation at a time before it is recorded. Libraries choose their
kernels in these steps."""


def can_be_recorded(spec: ModelSpec, options: TrainingOptions) -> bool:
    """Whether a step never waits for its device.

    The search of a large codebook waits, and deterministic sums may.
    """
    latents = torch.empty(options.batch_size * spec.latent_size, spec.code_size, device="meta")
    large = takes_products(latents, torch.empty(spec.num_codes, spec.code_size, device="meta"))
    fits = fits_an_array(spec, options.batch_size)  # else its noise is made piece by piece
    return not large and fits and not torch.are_deterministic_algorithms_enabled()


Record = Callable[[Callable[[], Taken]], Callable[[], Taken]]
"""Takes a body that works on tensors in fixed places, and returns a function that repeats it."""


def record_graph(body: Callable[[], Taken]) -> Callable[[], Taken]:
    """Records ``body``, without running it, as a CUDA graph.

    Raises RuntimeError if it does something that a graph cannot hold.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        taken = body()

    def replay() -> Taken:
        graph.replay()
        return taken

    return replay


@dataclass
class _Kind:
    """A kind of step: its tensors, how many were taken, and its recording, if there is one."""

    images: Tensor
    choices: Choices
    taken: int = 0
    replay: Callable[[], Taken] | None = None


class RecordedSteps:
    """``training_step`` that records each kind of step after its first few.

    record: how to record a step. say: takes a line with the reason if a step could not be recorded.
    Steps without a recording run one operation at a time, like the first ones. split: into passes,
    on a single rank. The result of a call is valid until the next call.
    """

    def __init__(
        self,
        model: VQVAE,
        optimizer: torch.optim.Optimizer,
        options: TrainingOptions,
        rules: Rules,
        record: Record = record_graph,
        say: Callable[[str], None] = print,
        split: Split = WHOLE,
    ) -> None:
        self.model, self.optimizer, self.options, self.rules = model, optimizer, options, rules
        self.split = split
        self._record: Record | None = record
        self._say = say
        self._kinds: dict[tuple[bool, ...], _Kind] = {}

    def __call__(self, images: Tensor, step: int) -> Taken:
        set_learning_rate(self.optimizer, self.rules.learning_rate(step))
        kind = self._kind(images, self.rules.choices(step, self.model.spec, len(images)))
        if kind.replay is None and kind.taken >= WARM_UP and self._record is not None:
            try:
                kind.replay = self._record(lambda: self._take(kind))
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                self._say(f"steps are not recorded, but taken one operation at a time: {reason}")
                self._record = None
        if kind.replay is not None:
            return kind.replay()
        kind.taken += 1
        return _aside(lambda: self._take(kind), images.device)

    def _kind(self, images: Tensor, choices: Choices) -> _Kind:
        """Returns the kind of this step, filled with its images and choices."""
        kind = self._kinds.get(choices.kind)
        if kind is None:
            kind = _Kind(images.clone(), choices.to(images.device, copy=True))
            self._kinds[choices.kind] = kind
        else:
            kind.images.copy_(images)
            kind.choices.fill(choices)
        return kind

    def _take(self, kind: _Kind) -> Taken:
        how = self.options, kind.choices, self.split
        return take(self.model, self.optimizer, kind.images, *how)


def _aside(body: Callable[[], Taken], device: torch.device) -> Taken:
    """Runs ``body``; on a card in a separate stream, which steps before a recording need."""
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
