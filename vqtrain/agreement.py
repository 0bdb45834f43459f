"""The trainer held to the oracle as it runs: its module as a ``vqref.agreement.Backend``."""

from __future__ import annotations

import torch
from torch import Tensor

from vqref.agreement import Backend, Report, compare
from vqref.validation import Array
from vqtrain.device import arithmetic
from vqtrain.likelihoods import mean
from vqtrain.losses import compute_losses
from vqtrain.model import VQVAE
from vqtrain.options import TrainingOptions
from vqtrain.quantizer import draw, reset_codes, update_ema


def check_against_oracle(model: VQVAE, images: Array, options: TrainingOptions) -> Report:
    """Every stage, the losses, one step of the averages and every rule for the codebook, on real
    images (N, C, H, W) in [0, 1], beside the oracle.

    The model is left as it is. The report says; the caller acts on a violation.
    """
    with torch.no_grad(), arithmetic("float32"):
        return compare(
            model.spec,
            model.params(),
            images,
            _backend(model, options),
            beta=options.beta,
            decay=options.decay,
            epsilon=options.epsilon,
            dialect=model.quantizer.dialect,
            steps=int(model.quantizer.steps),
        )


def _backend(model: VQVAE, options: TrainingOptions) -> Backend:
    quantizer = model.quantizer
    codebook, count, means = quantizer.codebook, quantizer.ema_count, quantizer.ema_means
    how = options.decay, options.epsilon, quantizer.dialect, quantizer.steps

    def tensor(array: Array) -> Tensor:
        return torch.from_numpy(array).to(codebook.device)

    def decoder(quantized: Array) -> tuple[Array, Array]:
        outputs = model.decoder(tensor(quantized))
        return _array(outputs), _array(mean(model.spec, outputs))

    def quantize(latents: Array) -> tuple[Array, Array]:
        indices, quantized = quantizer(tensor(latents))
        return _array(indices), _array(quantized)

    def losses(*arrays: Array) -> Array:
        images, outputs, latents, quantized = map(tensor, arrays)
        found = compute_losses(model.spec, images, outputs, latents, quantized, options.beta)
        return _array(torch.stack(found))

    def ema(latents: Array, indices: Array) -> tuple[Array, Array, Array]:
        return _arrays(update_ema(count, means, tensor(latents), tensor(indices), *how))

    def reset(*arrays: Array) -> tuple[Array, Array, Array]:
        codes, rows, counts = map(tensor, arrays)
        return _arrays(reset_codes(codebook, count, means, codes, rows, counts, *how))

    return Backend(
        precision=str(codebook.dtype).removeprefix("torch."),
        encoder=lambda images: _array(model.encoder(tensor(images))),
        quantizer=quantize,
        decoder=decoder,
        tokenizer=lambda images: _array(quantizer(model.encoder(tensor(images)))[0]),
        losses=losses,
        ema=ema,
        draw=lambda latents, gumbel, t: _array(draw(tensor(latents), codebook, tensor(gumbel), t)),
        reset=reset,
    )


def _arrays(state: tuple[Tensor, Tensor, Tensor]) -> tuple[Array, Array, Array]:
    codebook, count, means = map(_array, state)
    return codebook, count, means


def _array(tensor: Tensor) -> Array:
    found: Array = tensor.cpu().numpy()
    return found
