"""The training run: steps, epochs, and the checks between them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import vqref
from vqref.checkpoint import Model
from vqref.commandline import CommandError, InputError
from vqref.images import ImageSet, to_unit_interval
from vqref.parity import ParityError, Report
from vqref.spec import ModelSpec
from vqtrain.agreement import check_against_oracle
from vqtrain.checkpoint import read_model, write_model
from vqtrain.data import Batches
from vqtrain.losses import Losses, compute_losses
from vqtrain.metrics import Meter, Metrics
from vqtrain.model import VQVAE
from vqtrain.options import ADAM_BETAS, ADAM_EPSILON, TrainingOptions

CHECKED_IMAGES = 64
"""How many real images each check against the oracle sees, whatever the batch size."""


def training_step(
    model: VQVAE, optimizer: torch.optim.Optimizer, images: Tensor, options: TrainingOptions
) -> tuple[Losses, Tensor]:
    """One step on images (N, C, H, W): gradients to encoder and decoder, then the codebook's moving averages on this
    step's latents. Returns the losses before the step and the indices (N, S)."""
    out = model(images)
    losses = compute_losses(model.spec, images, out.logits, out.latents, out.quantized, options.beta)
    optimizer.zero_grad(set_to_none=True)
    losses.total.backward()
    optimizer.step()
    model.quantizer.update(out.latents.detach(), out.indices, options.decay, options.epsilon)
    return losses, out.indices


@torch.no_grad()
def evaluate(model: VQVAE, batches: Batches, options: TrainingOptions) -> Metrics:
    """The losses and the use of the codebook over every image, without a step."""
    meter = Meter(model.spec, model.quantizer.codebook.device)
    for images in batches.in_order():
        out = model(images)
        meter.add(compute_losses(model.spec, images, out.logits, out.latents, out.quantized, options.beta), out.indices)
    return meter.read()


class Trainer:
    """One run: owns the model, the optimizer and the order of the images, and publishes ``output`` after each epoch.

    Raises InputError where the images do not fill one batch or do not fit the spec; ``run`` raises ParityError where the
    module and the oracle disagree, and CommandError where the loss is no longer finite.
    """

    def __init__(
        self,
        spec: ModelSpec,
        options: TrainingOptions,
        images: ImageSet,
        device: torch.device,
        output: Path,
        provenance: dict[str, Any],
        say: Callable[[str], None] = print,
    ) -> None:
        if len(images.train) < options.batch_size:
            raise InputError(f"{images.source}: {len(images.train)} images, fewer than one batch of {options.batch_size}")
        self.spec, self.options, self.device, self.output, self.say = spec, options, device, output, say
        self.provenance = provenance
        params = vqref.init_params(spec, np.random.default_rng(options.seed))
        self.model = VQVAE(spec, params).to(device)
        learned = [*self.model.encoder.parameters(), *self.model.decoder.parameters()]
        self.optimizer = torch.optim.Adam(learned, lr=options.learning_rate, betas=ADAM_BETAS, eps=ADAM_EPSILON)
        self.generator = torch.Generator().manual_seed(options.seed)
        self.batches = Batches(images.train, options.batch_size, device)
        held_out = images.held_out if images.held_out is not None and len(images.held_out) else None
        self.held_out = None if held_out is None else Batches(held_out, options.batch_size, device)
        self.sample = to_unit_interval(images.train[:CHECKED_IMAGES])
        self.held_out_sample = self.sample if held_out is None else to_unit_interval(held_out[:CHECKED_IMAGES])
        self.history: list[dict[str, Any]] = []

    def run(self) -> Model:
        """Trains for ``options.epochs`` epochs; returns what ``output`` holds."""
        steps = len(self.batches) * self.options.epochs
        self.say(f"{len(self.batches.images)} images, {steps} steps of {self.options.batch_size} on {self.device}")
        report = self._require_agreement(self.sample, "before the first step")
        self.say(f"oracle: {_agreement(report)}, before the first step")
        self.say("epoch    bound  reconstruction  commitment  perplexity  codes  images/s  oracle")
        for epoch in range(1, self.options.epochs + 1):
            self._epoch(epoch)
        return self._finish()

    def _epoch(self, epoch: int) -> None:
        meter = Meter(self.spec, self.device)
        start = time.perf_counter()
        for images in self._with_progress(epoch, meter):
            meter.add(*training_step(self.model, self.optimizer, images, self.options))
        metrics = meter.read()
        rate = meter.count / (time.perf_counter() - start)
        if not metrics.finite:
            raise CommandError(f"the loss is {metrics.total} in epoch {epoch}; {self._kept()}")
        report = self._require_agreement(self.sample, f"after epoch {epoch}")
        line = {"epoch": epoch, **dataclasses.asdict(metrics), "images_per_second": rate, "oracle": report.to_dict()}
        self.history.append(line)
        write_model(self.output, self._snapshot())
        self.say(
            f"{epoch:>5}{metrics.bound:>9.2f}{metrics.reconstruction:>16.2f}{metrics.commitment:>12.4f}"
            f"{metrics.perplexity:>12.1f}{metrics.codes_used:>7}{rate:>10.0f}  agrees"
        )

    def _with_progress(self, epoch: int, meter: Meter) -> Iterator[Tensor]:
        """One shuffled pass behind a bar that is drawn on a terminal only; the losses are read as often as it is drawn."""
        bar = tqdm(
            self.batches.shuffled(self.generator),
            desc=f"epoch {epoch}/{self.options.epochs}",
            total=len(self.batches),
            unit="step",
            leave=False,
            disable=None,
            dynamic_ncols=True,
        )
        drawn = 0.0
        for images in bar:
            yield images
            if not bar.disable and time.monotonic() - drawn > 0.5:
                now = meter.read()
                bar.set_postfix_str(f"bound {now.bound:.1f}, commitment {now.commitment:.3f}", refresh=False)
                drawn = time.monotonic()

    def _finish(self) -> Model:
        """Reads the file back, and holds what it says to the oracle on images that the run was not checked on before."""
        model = read_model(self.output)
        self.model = VQVAE(model.spec, model.params).to(self.device)
        report = self._require_agreement(self.held_out_sample, f"in {self.output} read back")
        self.say(f"oracle: {_agreement(report)}, {self.output} read back")
        if self.held_out is not None:
            found = evaluate(self.model, self.held_out, self.options)
            self.say(
                f"held out: bound {found.bound:.2f} nats an image, perplexity {found.perplexity:.1f}, "
                f"{found.codes_used} of {self.spec.num_codes} codes used"
            )
            model = dataclasses.replace(model, metrics={**model.metrics, "held_out": dataclasses.asdict(found)})
            write_model(self.output, model)
        return model

    def _snapshot(self) -> Model:
        metrics = {**self.history[-1], "history": self.history}
        return Model(self.spec, self.model.params(), self.options.to_dict(), metrics, self.provenance)

    def _require_agreement(self, images: np.ndarray[Any, Any], when: str) -> Report:
        report = check_against_oracle(self.model, images, self.options)
        if not report.passed:
            raise ParityError(f"the model disagrees with the oracle {when}: {report.failures[0]}; {self._kept()}", report)
        return report

    def _kept(self) -> str:
        return f"{self.output} holds epoch {self.history[-1]['epoch']}" if self.history else "nothing was written"


def _agreement(report: Report) -> str:
    return f"agrees (largest error {report.worst_error_over_allowed:.0%} of what is allowed)"
