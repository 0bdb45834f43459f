"""The same network as others would train it: PyTorch's own modules, eager, float32, without our trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vqref
from vqref.spec import Layer
from vqtrain.options import RECIPES

LEARNING_RATE = RECIPES["seed"].learning_rate


def usual(layers: Sequence[Layer]) -> nn.Sequential:
    """The rows of the table as PyTorch's own modules."""
    modules: list[nn.Module] = []
    for layer in layers:
        inputs, outputs = layer.in_shape[0], layer.out_shape[0]
        if layer.kind == "reshape":
            modules.append(nn.Flatten())
            if len(layer.out_shape) > 1:
                modules.append(nn.Unflatten(1, layer.out_shape))
            continue
        if layer.kind == "dense":
            modules.append(nn.Linear(inputs, outputs))
        else:
            (top, bottom), (left, right) = layer.pads
            if layer.kind == "conv":
                modules.append(nn.ZeroPad2d((left, right, top, bottom)))
                modules.append(nn.Conv2d(inputs, outputs, layer.kernel, layer.stride))
            else:
                more = layer.stride - 1  # the size that stride 2 leaves open
                modules.append(
                    nn.ConvTranspose2d(inputs, outputs, layer.kernel, layer.stride, padding=bottom, output_padding=more)
                )
        if layer.activation == "elu":
            modules.append(nn.ELU())
    return nn.Sequential(*modules)


class Library:
    """vector-quantize-pytorch between encoder and decoder, as its README trains an autoencoder; ``options`` reach its
    VectorQuantize."""

    def __init__(self, **options: Any) -> None:
        from vector_quantize_pytorch import VectorQuantize

        spec = vqref.ModelSpec()
        self.encoder, self.decoder = usual(spec.encoder), usual(spec.decoder)
        self.quantizer = VectorQuantize(
            dim=spec.code_size, codebook_size=spec.num_codes, decay=0.99, commitment_weight=0.25, **options
        )
        self.optimizer = torch.optim.Adam([*self.encoder.parameters(), *self.decoder.parameters()], lr=LEARNING_RATE)

    def step(self, images: Tensor) -> None:
        quantized, _, commitment = self.quantizer(self.encoder(images))
        logits = self.decoder(quantized)
        loss = F.binary_cross_entropy_with_logits(logits, images, reduction="sum") / len(images) + commitment.sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def reconstruction(self, images: Tensor) -> float:
        """Nats an image, the quantizer as it is in evaluation."""
        for module in (self.encoder, self.quantizer, self.decoder):
            module.eval()
        total = 0.0
        for part in images.split(256):
            logits = self.decoder(self.quantizer(self.encoder(part))[0])
            total += float(F.binary_cross_entropy_with_logits(logits, part, reduction="sum"))
        for module in (self.encoder, self.quantizer, self.decoder):
            module.train()
        return total / len(images)


class Plain:
    """The post's step, written out: one-hot sums for the averages."""

    def __init__(self) -> None:
        self.spec = vqref.ModelSpec()
        self.encoder, self.decoder = usual(self.spec.encoder), usual(self.spec.decoder)
        self.codebook = torch.randn(self.spec.num_codes, self.spec.code_size)
        self.count, self.means = torch.ones(self.spec.num_codes), self.codebook.clone()
        self.optimizer = torch.optim.Adam([*self.encoder.parameters(), *self.decoder.parameters()], lr=LEARNING_RATE)

    def to(self, device: str) -> Plain:
        """The same on another device."""
        self.encoder, self.decoder = self.encoder.to(device), self.decoder.to(device)
        self.codebook, self.count, self.means = (array.to(device) for array in (self.codebook, self.count, self.means))
        self.optimizer = torch.optim.Adam([*self.encoder.parameters(), *self.decoder.parameters()], lr=LEARNING_RATE)
        return self

    def step(self, images: Tensor) -> None:
        latents = self.encoder(images)
        indices = torch.cdist(latents.reshape(-1, self.spec.code_size), self.codebook).argmin(-1)
        quantized = self.codebook[indices].reshape(latents.shape)
        logits = self.decoder(latents + (quantized - latents).detach())
        commitment = F.mse_loss(latents, quantized)
        loss = F.binary_cross_entropy_with_logits(logits, images, reduction="sum") / len(images) + 0.25 * commitment
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        hits = F.one_hot(indices, self.spec.num_codes).float()
        with torch.no_grad():
            self.count.mul_(0.99).add_(hits.sum(0), alpha=0.01)
            self.means.mul_(0.99).add_(hits.T @ latents.reshape(-1, self.spec.code_size), alpha=0.01)
            self.codebook.copy_(self.means / (self.count + 1e-5)[:, None])
