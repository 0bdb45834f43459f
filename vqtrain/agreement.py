"""Checks the trainer against the oracle: its module as a ``vqref.agreement.Backend``."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from vqref.agreement import Backend, Report, compare
from vqref.agreement.advance import CLAIM, NARROW, count_proved
from vqref.agreement.budget import FEWEST, images_within, seconds_per_proof
from vqref.agreement.stages import PROBED_TOKENS
from vqref.spec import ModelSpec
from vqref.validation import Array, Params
from vqtrain.device import arithmetic
from vqtrain.likelihoods import mean
from vqtrain.losses import compute_losses
from vqtrain.model import VQVAE
from vqtrain.options import TrainingOptions
from vqtrain.quantizer import draw, reset_codes, update_ema
from vqtrain.run.rules import NEAREST
from vqtrain.run.step import forward_and_back

PROOF_SECONDS, FEWEST_PROVED, MOST_PROVED, TRAINED_PER_PROOF = 1.0, 8, 64, 150
"""Limits of the proofs after the last epoch: the most seconds, roughly; the fewest and the most
images; images trained on per image proved. A proof takes about three training steps' time per
image."""

TRAINED_PER_CHECK = 1600
"""Images trained on per image checked after an epoch. A check takes about sixteen training steps'
time per image."""


def check_against_oracle(
    model: VQVAE, images: Array, options: TrainingOptions, *, probed: int = PROBED_TOKENS
) -> Report:
    """Compares the model with the oracle on real images (N, C, H, W) in [0, 1].

    Compares every stage, the losses, one step of the averages and every rule for the codebook.
    Does not change the model. A violation is in the report, and the caller must act on it.

    probed: as in ``compare``.
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
            probed=probed,
        )


def images_to_check(spec: ModelSpec, trained: int) -> int:
    """Returns how many images to check in a run on ``trained`` images, before it and in it.

    A check takes about a hundredth of an epoch's time on a processor. There are at least FEWEST
    images, if so many fit one check.
    """
    return min(images_within(spec), max(FEWEST, trained // TRAINED_PER_CHECK))


def images_to_prove(spec: ModelSpec, trained: int) -> int:
    """Returns for how many images to prove the tokens after a run on ``trained`` images.

    The proofs take about a fiftieth of an epoch's time on a processor, and at most PROOF_SECONDS.
    Returns 0 for fewer than FEWEST_PROVED images, which would say too little.
    """
    within = int(PROOF_SECONDS / seconds_per_proof(spec))
    count = min(MOST_PROVED, trained // TRAINED_PER_PROOF, within)
    return count if count >= FEWEST_PROVED else 0


def share_proved(spec: ModelSpec, params: Params, images: Array) -> dict[str, float]:
    """Returns the shares of proved tokens of images (N, C, H, W) in [0, 1]; {} for no images.

    ``proved`` is the share proved in advance for float32 in any order, ``proved_in_lanes`` the
    share proved in 16 lanes or more, ``proved_images`` is N.
    """
    if not len(images):
        return {}
    counts = count_proved(spec, params, images)
    return {
        "proved": counts[CLAIM] / counts["tokens"],
        "proved_in_lanes": counts[NARROW] / counts["tokens"],
        "proved_images": len(images),
    }


def _backend(model: VQVAE, options: TrainingOptions) -> Backend:
    quantizer = model.quantizer
    codebook, count, means = quantizer.codebook, quantizer.ema_count, quantizer.ema_means
    how = quantizer.how(options.decay, options.epsilon)

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
        return _arrays(update_ema(codebook, count, means, tensor(latents), tensor(indices), *how))

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
    """Returns the training step's forward and backward pass in that precision, on a model's copy.

    float64 shows whether a gradient is right; the run's precision shows its value in the run.
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
