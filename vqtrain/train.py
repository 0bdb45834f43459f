"""The training run: steps, epochs, the checks between them, and what is left when a signal ends it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

import vqref
from vqref.checkpoint import Model
from vqref.commandline import CommandError, InputError
from vqref.images import ImageSet, to_unit_interval
from vqref.pictures import save_pairs, save_square
from vqref.report import ParityError, Report
from vqref.spec import ModelSpec
from vqtrain import pictures
from vqtrain.agreement import check_against_oracle
from vqtrain.arithmetic import arithmetic
from vqtrain.checkpoint import read_model, write_model
from vqtrain.data import Batches
from vqtrain.interrupts import Interrupted, Interrupts
from vqtrain.losses import compute_losses
from vqtrain.metrics import Meter, Metrics
from vqtrain.model import VQVAE
from vqtrain.options import TrainingOptions
from vqtrain.rules import Rules
from vqtrain.runs import MODEL, RunFolder
from vqtrain.state import save_state
from vqtrain.step import RecordedSteps, Taken, can_be_recorded, make_optimizer, training_step

CHECKED_IMAGES = 64
"""How many real images each check against the oracle sees, whatever the batch size."""

SHOWN_IMAGES, SHOWN_CODES = 32, 1024
"""How many images a picture shows beside their reconstructions, and at most how many codes a sheet."""


def prepare(model: VQVAE, device: torch.device) -> VQVAE:
    """The model on its device, its kernels laid out with channels last, as fast convolutions want them."""
    return model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def mean_logit(images: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    """The logit of the mean grey level of each channel (C,) of images (N, C, H, W), kept off the ends."""
    unit = 255 if images.dtype == np.uint8 else 1
    mean = np.clip(images.mean(axis=(0, 2, 3), dtype=np.float64) / unit, 1e-3, 1 - 1e-3)
    return np.asarray(np.log(mean) - np.log1p(-mean), np.float32)


def require_one_batch(images: ImageSet, options: TrainingOptions) -> None:
    """Raises InputError where the training images do not fill one batch."""
    if len(images.train) < options.batch_size:
        raise InputError(f"{images.source}: {len(images.train)} images, fewer than one batch of {options.batch_size}")


@torch.no_grad()
def evaluate(model: VQVAE, batches: Batches, options: TrainingOptions) -> Metrics:
    """The losses and the use of the codebook over every image, without a step."""
    meter = Meter(model.spec, model.quantizer.codebook.device)
    with arithmetic("float32"):
        for images in batches.in_order():
            out = model(images)
            losses = compute_losses(model.spec, images, out.logits, out.latents, out.quantized, options.beta)
            meter.add(losses, out.indices)
    return meter.read()


def say(line: str) -> None:
    """A line on stdout, at once: a log that is followed, or whose process is killed, has it."""
    print(line, flush=True)


@dataclass(frozen=True)
class Work:
    """Where and how a run works: nothing here changes what it computes on a given device.

    folder: the run's. output: where a copy of the model goes. checkpoint_steps: steps between checkpoints within an epoch.
    say: takes each line of the report. writer: a TensorBoard SummaryWriter, or None. record: whether steps on a card are
    recorded as CUDA graphs, where they can be.
    """

    device: torch.device
    folder: RunFolder
    output: Path
    interrupts: Interrupts
    checkpoint_steps: int = 500
    say: Callable[[str], None] = say
    writer: Any = None
    record: bool = True


class Trainer:
    """One run: owns the model, the optimizer and the order of the images.

    state: a checkpoint to go on from. Raises InputError where the images do not fill one batch; ``run`` raises ParityError
    where the module and the oracle disagree, CommandError where the loss is no longer finite, and Interrupted, with the
    state saved, where a signal came.
    """

    def __init__(
        self,
        spec: ModelSpec,
        options: TrainingOptions,
        images: ImageSet,
        work: Work,
        provenance: dict[str, Any],
        state: dict[str, Any] | None = None,
    ) -> None:
        require_one_batch(images, options)
        self.spec, self.options, self.work, self.provenance = spec, options, work, provenance
        self.course = {**options.to_dict(), **spec.to_dict(), "data_sha256": images.sha256}
        self.batches = Batches(images.train, options.batch_size, work.device)
        held_out = images.held_out if images.held_out is not None and len(images.held_out) else None
        self.held_out = None if held_out is None else Batches(held_out, options.batch_size, work.device)
        self.sample = to_unit_interval(images.train[:CHECKED_IMAGES])
        self.held_out_sample = self.sample if held_out is None else to_unit_interval(held_out[:CHECKED_IMAGES])

        params = vqref.init_params(spec, np.random.default_rng(options.seed))
        if options.center:
            params[spec.decoder[-1].parameters[1].name] = mean_logit(images.train)
        self.model = prepare(VQVAE(spec, params), work.device)
        self.optimizer = make_optimizer(self.model, options)
        self.rules = Rules(options, len(self.batches) * options.epochs)
        self.recorded: RecordedSteps | None = None
        if work.device.type == "cuda" and work.record and can_be_recorded(spec, options):
            self.recorded = RecordedSteps(self.model, self.optimizer, options, self.rules, say=work.say)
        self.generator = torch.Generator().manual_seed(options.seed)
        self.order = self.generator.get_state()  # as it was when the epoch began
        self.epoch, self.step, self.seconds = 0, 0, 0.0  # whole epochs; steps and seconds spent within the next one
        self.meter = Meter(spec, work.device)
        self.history: list[dict[str, Any]] = []
        self.finished = False  # the last epoch is done and ``output`` written
        if state is not None:
            self._load(state)

    def run(self) -> Model:
        """Trains until ``options.epochs`` epochs are done; returns what ``output`` holds."""
        total = len(self.batches) * self.options.epochs
        self.work.say(f"{len(self.batches.images)} images, {total} steps of {self.options.batch_size} on {self.work.device}")
        try:
            report = self._require_agreement(self.sample, "before the first step")
            self.work.say(f"oracle: {_agreement(report)}, before the first step")
            self.work.say("epoch    bound  held out  commitment  perplexity  codes  images/s  oracle")
            while self.epoch < self.options.epochs:
                self._epoch()
            return self._finish()
        except Interrupted as stop:
            self._save()
            raise Interrupted(
                stop.signum,
                f"interrupted in epoch {self.epoch + 1}, step {self.step}, and saved; the same command goes on",
            ) from None

    def _epoch(self) -> None:
        """The rest of the epoch that ``step`` is in, then its line, its pictures and its checkpoint."""
        for images in self._with_progress():
            start = time.perf_counter()
            with self.work.interrupts.hold():
                step = self.epoch * len(self.batches) + self.step
                if self.rules.starts(step):
                    self._start_codebook()
                self.meter.add(*self._take(images, step))
                self.step += 1
                self.seconds += time.perf_counter() - start
                if self.step % self.work.checkpoint_steps == 0:
                    self._save()
        start = time.perf_counter()
        metrics = self.meter.read()
        self.seconds += time.perf_counter() - start  # a card was still at work
        if not metrics.finite:
            raise CommandError(f"the loss is {metrics.total} in epoch {self.epoch + 1}; {self._kept()}")
        report = self._require_agreement(self.sample, f"after epoch {self.epoch + 1}")
        line = {
            "epoch": self.epoch + 1,
            **metrics.to_dict(self.spec),
            "images_per_second": self.step * self.options.batch_size / self.seconds,
            "oracle": report.to_dict(),
            "oracle_error_over_allowed": report.worst_error_over_allowed,
            "data": self.provenance.get("data", {}).get("source"),
        }
        if self.held_out is not None:
            line["held_out"] = evaluate(self.model, self.held_out, self.options).to_dict(self.spec)
        use = self.meter.hits
        with self.work.interrupts.hold():
            self.history.append(line)
            self.epoch, self.step, self.seconds = self.epoch + 1, 0, 0.0
            self.order, self.meter = self.generator.get_state(), Meter(self.spec, self.work.device)
            self._publish()
        self._say_line(line)
        self._draw(use)

    def _take(self, images: Tensor, step: int) -> Taken:
        if self.recorded is not None:
            return self.recorded(images, step)
        return training_step(self.model, self.optimizer, images, self.options, self.rules, step)

    def _start_codebook(self) -> None:
        try:
            self.rules.start(self.model, self.batches)
        except ValueError as error:  # latents that are no longer finite
            raise CommandError(f"the run diverged before the codebook's start: {error}; {self._kept()}") from None

    def _with_progress(self) -> Iterator[Tensor]:
        """The rest of one shuffled pass behind a bar that is drawn on a terminal only; the losses are read as often as it
        is drawn, every half second."""
        self.generator.set_state(self.order)
        bar = tqdm(
            self.batches.shuffled(self.generator, skip=self.step),
            desc=f"epoch {self.epoch + 1}/{self.options.epochs}",
            initial=self.step,
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
                now = self.meter.read()
                bar.set_postfix_str(f"bound {now.bound:.1f}, commitment {now.commitment:.3f}", refresh=False)
                drawn = time.monotonic()

    def _say_line(self, line: dict[str, Any]) -> None:
        held_out = f"{line['held_out']['bound']:.2f}" if "held_out" in line else "-"
        self.work.say(
            f"{line['epoch']:>5}{line['bound']:>9.2f}{held_out:>10}{line['commitment']:>12.4f}{line['perplexity']:>12.1f}"
            f"{line['codes_used']:>7}{line['images_per_second']:>10.0f}  agrees"
        )
        if self.work.writer is not None:
            for name in ("bound", "reconstruction", "commitment", "perplexity", "codes_used", "images_per_second"):
                self.work.writer.add_scalar(f"training/{name}", line[name], line["epoch"])
            for name, value in line.get("held_out", {}).items():
                self.work.writer.add_scalar(f"held_out/{name}", value, line["epoch"])
            self.work.writer.flush()

    @torch.no_grad()
    def _draw(self, use: Tensor) -> None:
        """Reconstructions, samples of the uniform prior, the codebook sorted by ``use`` (K,), and the curves so far."""
        folder, epoch, quantizer = self.work.folder, self.epoch, self.model.quantizer

        def decoded(indices: Tensor) -> npt.NDArray[np.float32]:
            logits = self.model.decoder(quantizer.codebook[indices.to(self.work.device)])
            return np.asarray(logits.sigmoid().cpu().numpy())

        images = torch.from_numpy(self.held_out_sample[:SHOWN_IMAGES]).to(self.work.device)
        shown = decoded(quantizer(self.model.encoder(images))[0])
        save_pairs(folder.picture(epoch, "reconstructions"), images.cpu().numpy(), shown)
        shape = (64, self.spec.latent_size)
        drawn = torch.randint(self.spec.num_codes, shape, generator=torch.Generator().manual_seed(self.options.seed))
        save_square(folder.picture(epoch, "samples"), decoded(drawn))
        by_use = use.cpu().argsort(descending=True, stable=True)[:SHOWN_CODES]
        save_square(folder.picture(epoch, "codebook"), decoded(by_use[:, None].expand(-1, self.spec.latent_size)))
        pictures.save_curves(folder.path / "curves.png", self.history, self.spec.num_codes)

    def _finish(self) -> Model:
        """Reads the file back, and holds what it says to the oracle on images that the run was not checked on before."""
        model = read_model(self.work.folder.path / MODEL)
        self.model = VQVAE(model.spec, model.params).to(self.work.device)
        report = self._require_agreement(self.held_out_sample, f"in {MODEL} read back")
        self.work.say(f"oracle: {_agreement(report)}, {MODEL} read back")
        with self.work.interrupts.hold():
            write_model(self.work.output, model)
            self.finished = True
            self._save()
        return model

    def _publish(self) -> None:
        """The model, the metrics and a checkpoint after a full epoch."""
        model = Model(self.spec, self.model.params(), self.options.to_dict(), self._metrics(), self.provenance)
        write_model(self.work.folder.path / MODEL, model)
        self.work.folder.write_metrics(self.history)
        self._save()

    def _metrics(self) -> dict[str, Any]:
        return {**self.history[-1], "history": self.history}

    def _save(self) -> None:
        state = {
            "course": self.course,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "order": self.order,
            "choices": self.rules.generator.get_state(),
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "meter": self.meter.state(),
            "history": self.history,
            "finished": self.finished,
        }
        with self.work.interrupts.hold():
            save_state(self.work.folder.checkpoints, self.epoch * len(self.batches) + self.step, state)

    def _load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self._load_optimizer(state["optimizer"])
        self.order = state["order"]
        self.rules.generator.set_state(state["choices"])
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        self.meter.load(state["meter"])
        self.history = state["history"]

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """Moments and counts of steps; where those live and how they are moved is this device's, not the checkpoint's."""
        own = [{name: group[name] for name in ("lr", "fused", "capturable")} for group in self.optimizer.param_groups]
        groups = [group | mine for group, mine in zip(state["param_groups"], own, strict=True)]
        self.optimizer.load_state_dict({**state, "param_groups": groups})

    def _require_agreement(self, images: npt.NDArray[np.float32], when: str) -> Report:
        try:
            report = check_against_oracle(self.model, images, self.options)
        except ValueError as error:  # a weight or a stage that is no longer finite
            raise CommandError(f"the run diverged {when}: {error}; {self._kept()}") from None
        if not report.passed:
            raise ParityError(f"the model disagrees with the oracle {when}: {report.failures[0]}; {self._kept()}", report)
        return report

    def _kept(self) -> str:
        if not self.history:
            return "nothing was written"
        return f"{self.work.folder.path / MODEL} holds epoch {self.history[-1]['epoch']}"


def _agreement(report: Report) -> str:
    return f"agrees (largest error {report.worst_error_over_allowed:.0%} of what is allowed)"
