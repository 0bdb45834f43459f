"""The same networks in PyTorch's own modules, trained as others would train them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqref.spec import Layer, ModelSpec, plan

COMMITMENT = 0.25
DECAY, EPSILON = 0.99, 1e-5


class Rows(nn.Module):
    """The rows of a network, each in PyTorch's own modules."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.steps = plan(layers)
        self.rows = nn.ModuleList(nn.Sequential(*_modules(layer)) for layer in layers)

    def forward(self, x: Tensor) -> Tensor:
        values = {0: x}
        for number, (step, row) in enumerate(zip(self.steps, self.rows, strict=True), 1):
            taken = [values[source] for source in step.sources]
            for spent in step.spent:
                del values[spent]
            values[number] = row(taken[0] if len(taken) == 1 else taken[0] + taken[1])
        return values[len(self.steps)]


class Function(nn.Module):
    """A function of one tensor, as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _modules(layer: Layer) -> list[nn.Module]:
    """Returns what a row does with its input, or with the sum of its two inputs."""
    activations: dict[str, list[nn.Module]] = {"linear": [], "elu": [nn.ELU()], "relu": [nn.ReLU()]}
    products = PRODUCTS[layer.kind](layer) if layer.kind in PRODUCTS else []
    return [*products, *activations[layer.activation]]


def _conv(layer: Layer) -> list[nn.Module]:
    (top, bottom), (left, right) = layer.pads
    channels = layer.in_shape[0], layer.out_shape[0]
    if (top, left) == (bottom, right):
        return [nn.Conv2d(*channels, layer.kernel, layer.stride, padding=(top, left))]
    pad = nn.ZeroPad2d((left, right, top, bottom))
    return [pad, nn.Conv2d(*channels, layer.kernel, layer.stride)]


def _conv_transpose(layer: Layer) -> list[nn.Module]:
    """Handles unequal pads in the simplest way: the result is a pixel further, at the same cost."""
    (top, bottom), (left, right) = layer.pads
    channels, more = (layer.in_shape[0], layer.out_shape[0]), (bottom - top, right - left)
    pads = (bottom, right)
    return [nn.ConvTranspose2d(*channels, layer.kernel, layer.stride, pads, more)]


def _reshape(layer: Layer) -> list[nn.Module]:
    return [Function(lambda x: x.reshape(len(x), *layer.out_shape))]


def _to_vectors(layer: Layer) -> list[nn.Module]:
    return [Function(lambda x: x.permute(0, 2, 3, 1).reshape(len(x), *layer.out_shape))]


def _to_grid(layer: Layer) -> list[nn.Module]:
    channels, height, width = layer.out_shape
    shape = height, width, channels
    return [Function(lambda x: x.reshape(len(x), *shape).permute(0, 3, 1, 2))]


PRODUCTS: dict[str, Callable[[Layer], list[nn.Module]]] = {
    "affine": lambda layer: [Function(lambda x: layer.scale * x + layer.shift)],
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "dense": lambda layer: [nn.Linear(layer.in_shape[0], layer.out_shape[0])],
    "reshape": _reshape,
    "to_vectors": _to_vectors,
    "to_grid": _to_grid,
}
"""The modules of each kind of row, without its activation; add and activation need none."""


class Answer(NamedTuple):
    """Outputs (N, P, H, W) and indices (N, S) for images, and the weighted commitment loss."""

    outputs: Tensor
    indices: Tensor
    commitment: Tensor


class Peer(ABC):
    """A model of ``spec`` with someone else's quantizer, and its training step.

    The loss is binary cross-entropy per image for a Bernoulli, else the mean squared error divided
    by ``spec.variance``. half: whether under autocast to bfloat16. channels_last: the layout of the
    kernels.
    """

    def __init__(
        self,
        spec: ModelSpec,
        learning_rate: float = 1e-3,
        *,
        half: bool = False,
        channels_last: bool = False,
    ) -> None:
        self.spec, self.half = spec, half
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.encoder = Rows(spec.encoder).to(memory_format=layout)  # type: ignore[call-overload]
        self.decoder = Rows(spec.decoder).to(memory_format=layout)  # type: ignore[call-overload]
        learned = [*self.encoder.parameters(), *self.decoder.parameters()]
        self.optimizer = torch.optim.Adam(learned, lr=learning_rate)

    @abstractmethod
    def forward(self, images: Tensor) -> Answer:
        """Returns the answer to images (N, C, H, W)."""

    def loss(self, images: Tensor, outputs: Tensor) -> Tensor:
        """Returns the loss of outputs (N, P, H, W) for images (N, C, H, W)."""
        if self.spec.likelihood == "bernoulli":
            cost = F.binary_cross_entropy_with_logits(outputs, images, reduction="sum")
            return cost / len(images)
        low, high = self.spec.value_range
        return F.mse_loss((outputs - low) / (high - low), images) / self.spec.variance

    def step(self, images: Tensor) -> None:
        """Takes one training step."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.half):
            answer = self.forward(images)
        loss = self.loss(images, answer.outputs.float()) + answer.commitment
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class Library(Peer):
    """vector-quantize-pytorch between encoder and decoder, trained as in its README.

    options: of its VectorQuantize.
    """

    def __init__(
        self,
        spec: ModelSpec,
        learning_rate: float = 1e-3,
        *,
        half: bool = False,
        channels_last: bool = False,
        **options: Any,
    ) -> None:
        from vector_quantize_pytorch import VectorQuantize

        super().__init__(spec, learning_rate, half=half, channels_last=channels_last)
        self.quantizer = VectorQuantize(
            dim=spec.code_size,
            codebook_size=spec.num_codes,
            commitment_weight=COMMITMENT,
            **options,
        )

    def forward(self, images: Tensor) -> Answer:
        latents = self.encoder(images).float()
        with torch.autocast(latents.device.type, enabled=False):  # it would round averages
            quantized, indices, commitment = self.quantizer(latents)
        return Answer(self.decoder(quantized), indices, commitment.sum())

    @torch.no_grad()
    def answers(self, images: Tensor) -> Iterator[tuple[Tensor, Answer]]:
        """Yields parts of images (N, C, H, W) and their answers, float32, in evaluation mode."""
        self.quantizer.eval()
        for part in images.split(256):
            yield part, self.forward(part)
        self.quantizer.train()


@torch.no_grad()
def without_one_hot(codebook: Any, latents: Tensor, **_: Any) -> tuple[Tensor, Tensor, None]:
    """The forward pass of the library's Codebook on latents (N, S, D), without one-hot matrices.

    Returns quantized and indices, but no distances. The library's own start, averages and dead
    codes are used. Only the nearest code and the sums are found without matrices of N*S*K elements,
    which would take twenty times as long at 16,384 codes.
    """
    from vqtrain.nearest import nearest

    rows = latents.float().reshape(1, -1, latents.shape[-1])
    codebook.init_embed_(rows)
    before = codebook.embed[0].clone()
    indices = nearest(latents.float(), before)
    if codebook.training:
        flat, decay = indices.flatten(), codebook.decay
        hits = torch.zeros_like(codebook.cluster_size[0])
        hits.index_add_(0, flat, torch.ones_like(flat, dtype=hits.dtype))
        sums = torch.zeros_like(before).index_add_(0, flat, rows[0])
        codebook.cluster_size.lerp_(hits[None], 1 - decay)
        codebook.embed_avg.lerp_(sums[None], 1 - decay)
        codebook.update_ema()
        codebook.expire_codes_(rows)
    return before[indices], indices, None


class Plain(Peer):
    """The step as it is usually written: cdist, and one-hot products for the averages."""

    def __init__(self, spec: ModelSpec, learning_rate: float = 1e-3, **how: bool) -> None:
        super().__init__(spec, learning_rate, **how)
        self.codebook = torch.randn(spec.num_codes, spec.code_size)
        self.count, self.means = torch.ones(spec.num_codes), self.codebook.clone()

    def to(self, device: str) -> Plain:
        """Moves the model to another device."""
        for network in (self.encoder, self.decoder):
            network.to(device)
        self.codebook, self.count, self.means = (
            array.to(device) for array in (self.codebook, self.count, self.means)
        )
        return self

    def forward(self, images: Tensor) -> Answer:
        latents = self.encoder(images).float()
        with torch.autocast(images.device.type, enabled=False):
            indices, quantized = self._quantize(latents)
        outputs = self.decoder(latents + (quantized - latents).detach())
        return Answer(outputs, indices, COMMITMENT * F.mse_loss(latents, quantized))

    @torch.no_grad()
    def _quantize(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Returns indices and quantized; then moves the averages."""
        flat = latents.reshape(-1, self.spec.code_size)
        indices = torch.cdist(flat, self.codebook).argmin(-1)
        quantized = self.codebook[indices].reshape(latents.shape)
        hits = F.one_hot(indices, self.spec.num_codes).float()
        self.count.mul_(DECAY).add_(hits.sum(0), alpha=1 - DECAY)
        self.means.mul_(DECAY).add_(hits.T @ flat, alpha=1 - DECAY)
        self.codebook.copy_(self.means / (self.count + EPSILON)[:, None])
        return indices.reshape(latents.shape[:2]), quantized
