"""The trainer held to the oracle as it runs: its module as a ``vqref.agreement.Backend``."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

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
from vqtrain.run.rules import NEAREST
from vqtrain.run.step import forward_and_back


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

    own = options.precision
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
        gradients={each: _gradients(model, options, each) for each in ("float64", own)},
    )


def _gradients(
    model: VQVAE, options: TrainingOptions, precision: str
) -> Callable[[Array], tuple[Array, dict[str, Array]]]:
    """The training step's own pass forward and back in that precision, on a copy of the model.

    float64 shows whether a gradient is right, the run's precision what it is there.
    """
    dtype = torch.float64 if precision == "float64" else torch.float32
    options = dataclasses.replace(
        options, precision="float32" if precision == "float64" else precision
    )

    def pulled(images: Array) -> tuple[Array, dict[str, Array]]:
        copied = copy.deepcopy(model).to(dtype)
        x = torch.from_numpy(images).to(copied.quantizer.codebook)
        with torch.enable_grad(), arithmetic(options.precision):
            out, _ = forward_and_back(copied, x, options, NEAREST)
        found = {
            name: _array(torch.zeros_like(p) if p.grad is None else p.grad)
            for name, p in copied.named_parameters()
        }
        return _array(out.indices), found

    return pulled


def _arrays(state: tuple[Tensor, Tensor, Tensor]) -> tuple[Array, Array, Array]:
    codebook, count, means = map(_array, state)
    return codebook, count, means


def _array(tensor: Tensor) -> Array:
    found: Array = tensor.cpu().numpy()
    return found
