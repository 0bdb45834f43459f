"""The trainer held to the oracle as it runs: its module as a ``vqref.agreement.Backend``."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from vqref.agreement import Backend, compare
from vqref.report import Report
from vqtrain.arithmetic import arithmetic
from vqtrain.losses import compute_losses
from vqtrain.model import VQVAE
from vqtrain.options import TrainingOptions
from vqtrain.quantizer import draw, reset_codes, update_ema

Array = npt.NDArray[Any]


def check_against_oracle(model: VQVAE, images: Array, options: TrainingOptions) -> Report:
    """Every stage, the losses and one EMA step of ``model`` on real images (N, C, H, W) in [0, 1], beside the oracle.

    The model is left as it is. The report says; a violation is the caller's to act on.
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
        )


def _backend(model: VQVAE, options: TrainingOptions) -> Backend:
    codebook = model.quantizer.codebook

    def tensor(array: Array) -> Tensor:
        return torch.from_numpy(array).to(codebook.device)

    def decoder(quantized: Array) -> tuple[Array, Array]:
        logits = model.decoder(tensor(quantized))
        return logits.cpu().numpy(), logits.sigmoid().cpu().numpy()

    def quantizer(latents: Array) -> tuple[Array, Array]:
        indices, quantized = model.quantizer(tensor(latents))
        return indices.cpu().numpy(), quantized.cpu().numpy()

    def losses(*arrays: Array) -> Array:
        images, logits, latents, quantized = map(tensor, arrays)
        return torch.stack(compute_losses(model.spec, images, logits, latents, quantized, options.beta)).cpu().numpy()

    def ema(latents: Array, indices: Array) -> tuple[Array, Array, Array]:
        state = (model.quantizer.ema_count, model.quantizer.ema_means)
        found = update_ema(*state, tensor(latents), tensor(indices), options.decay, options.epsilon)
        return tuple(value.cpu().numpy() for value in found)  # type: ignore[return-value]

    def reset(codes: Array, rows: Array, counts: Array) -> tuple[Array, Array, Array]:
        quantizer = model.quantizer
        state = (quantizer.codebook, quantizer.ema_count, quantizer.ema_means)
        found = reset_codes(*state, tensor(codes), tensor(rows), tensor(counts), options.epsilon)
        return tuple(value.cpu().numpy() for value in found)  # type: ignore[return-value]

    return Backend(
        precision=str(codebook.dtype).removeprefix("torch."),
        encoder=lambda images: model.encoder(tensor(images)).cpu().numpy(),
        quantizer=quantizer,
        decoder=decoder,
        tokenizer=lambda images: model.quantizer(model.encoder(tensor(images)))[0].cpu().numpy(),
        losses=losses,
        ema=ema,
        draw=lambda latents, gumbel, t: draw(tensor(latents), codebook, tensor(gumbel), t).cpu().numpy(),
        reset=reset,
    )
