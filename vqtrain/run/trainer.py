"""The training loop: steps, epochs, the checks between them, and the state saved at a signal."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vqref.agreement.budget import images_within
from vqref.agreement.report import Report
from vqref.agreement.stages import PROBED_TOKENS
from vqref.dialects import DIALECTS
from vqref.errors import CommandError, InputError, ParityError
from vqref.host.files import write_file
from vqref.host.images import ImageSet, to_unit_interval
from vqref.host.interrupts import Interrupted, hold, watched
from vqref.modelfile import Model
from vqref.spec import ModelSpec
from vqtrain.agreement import check_against_oracle, images_to_check, images_to_prove, share_proved
from vqtrain.data.batches import Batches
from vqtrain.data.holdout import record
from vqtrain.data.stream_batches import batches_of
from vqtrain.model import VQVAE
from vqtrain.modelfile import read_model, write_model
from vqtrain.options import TrainingOptions
from vqtrain.run.folder import MODEL, RunFolder
from vqtrain.run.metrics import Meter, evaluate, least_reconstruction
from vqtrain.run.narrator import Narrator, Standing, say
from vqtrain.run.progress import Progress
from vqtrain.run.ranks import digest_of
from vqtrain.run.recording import RecordedSteps, can_be_recorded
from vqtrain.run.rules import Rules
from vqtrain.run.snapshot import Course, RunState, save_state
from vqtrain.run.start import prepare, start_model
from vqtrain.run.step import WHOLE, Split, Taken, make_optimizer, training_step

TIMES_PER_RUN = 10
"""How often in a long run the model is checked, and pictures are drawn, unless the run is told
otherwise."""

SAMPLED_IMAGES = 1000
"""If no images are held out, at most so many training images are measured after an epoch."""


def require_one_batch(images: ImageSet, options: TrainingOptions) -> None:
    """Raises InputError if the training images do not fill one batch."""
    count, batch = images.count, options.batch_size
    if count >= batch:
        return
    whole = count
    if images.held_out is not None and "fraction" in (images.held_out_as or {}):
        whole += record(images)["images"]
    if whole < batch:
        raise InputError(f"{images.source}: {whole} images, fewer than one batch of {batch}")
    raise InputError(
        f"{images.source}: {count} images are left to train on, fewer than one batch of {batch}; "
        f"--held-out 0 trains on all {whole}"
    )


@dataclass(frozen=True)
class Work:
    """Where and how a run works. It does not change what the run computes on a given device.

    folder: the run's folder. output: where to write a copy of the model, or None.
    snapshot_steps: steps between snapshots within an epoch.
    check_images: images per check against the oracle. None takes as many as a check does in a
    hundredth of an epoch's time on a processor; at the end, as many as in about two seconds.
    check_every, pictures_every: epochs between checks, and between pictures. None is a tenth of all
    epochs. The last epoch of a run always has pictures.
    say: takes each line of the report. writer: a TensorBoard SummaryWriter, or None.
    record: whether to record steps on a card as CUDA graphs, if possible.
    pictures: whether to draw pictures and to write the report. bar: whether to show the progress of
    an epoch as a bar on a terminal; without a bar, ``say`` gets a line every half minute.
    split: how each batch is split over ranks and passes. Only the first rank checks, draws and
    writes.
    """

    device: torch.device
    folder: RunFolder
    output: Path | None
    snapshot_steps: int = 500
    check_images: int | None = None
    check_every: int | None = None
    pictures_every: int | None = None
    say: Callable[[str], None] = say
    writer: Any = None
    record: bool = True
    pictures: bool = True
    bar: bool = True
    split: Split = WHOLE


class Trainer:
    """One training run.

    provenance: where the model comes from, as plain data. course: what ``course_of`` returned for
    the run. state: the state of a snapshot to continue from.

    Raises InputError if the images do not fill one batch.

    ``run`` raises ParityError if the module disagrees with the oracle, or a rank with another;
    CommandError if the loss is no longer finite; MachineError if another rank is lost; and
    Interrupted after a signal, once the state is saved.
    """

    def __init__(
        self,
        spec: ModelSpec,
        options: TrainingOptions,
        images: ImageSet,
        work: Work,
        provenance: dict[str, Any],
        course: Course,
        state: dict[str, Any] | None = None,
    ) -> None:
        require_one_batch(images, options)
        self.spec, self.options, self.work = spec, options, work
        self.ranks = work.split.ranks
        self.provenance, self.course = provenance, course
        self.preprocessing = images.preprocessing
        self.narrator = Narrator(spec, work.folder, work.say, work.writer, options.seed)
        self._take_images(images)

        self.model = start_model(spec, options, images.train, work.device)
        self.optimizer = make_optimizer(self.model, options)
        self.total = len(self.batches) * options.epochs
        self.rules = Rules(options, self.total)
        self.recorded: RecordedSteps | None = None
        recorded = work.device.type == "cuda" and work.record and self.ranks.count == 1
        if recorded and can_be_recorded(spec, options):
            self.recorded = RecordedSteps(
                self.model, self.optimizer, options, self.rules, say=work.say, split=work.split
            )
        self.generator = torch.Generator().manual_seed(options.seed)
        self.state = RunState(
            self.model,
            self.optimizer,
            self.rules.generator,
            Meter(spec, work.device),
            self.generator.get_state(),
        )
        if state is not None:
            self.state.load(state)
        if not self.ranks.first:
            self.state.meter.clear()  # rank 0 has what all have counted
        self.ranks.hand_out(list(self.model.state_dict().values()))  # processors may differ
        self.progress = Progress(self.state, options, len(self.batches), work.say, bar=work.bar)

    def _take_images(self, images: ImageSet) -> None:
        """Chooses the images to train on, to measure after an epoch, and to check with."""
        batch_size, device = self.options.batch_size, self.work.device
        if images.held_out is not None and len(images.held_out):
            self.measured_as, measured = "held_out", images.held_out
        else:
            apart = -(-len(images.train) // SAMPLED_IMAGES)
            self.measured_as, measured = "training_sample", images.train[::apart]
        count = self.work.check_images or images_within(self.spec)
        part, (first, last) = self.ranks.part(batch_size), self.ranks.part(len(measured))
        at_once = -(-batch_size // (self.ranks.count * self.work.split.passes))
        self.batches = batches_of(images, batch_size, device, self.work.say, part, at_once)
        self.measured = Batches(measured[first:last], batch_size, device, at_once=at_once)
        checked = self.work.check_images or images_to_check(self.spec, len(images.train))
        self.sample = to_unit_interval(images.train[:checked])
        proved = images_to_prove(self.spec, len(images.train))
        self.proved_sample = to_unit_interval(measured[:proved])
        self.measured_sample = to_unit_interval(measured[:count])
        self.shown = to_unit_interval(measured[: self.narrator.shown_images])

    def run(self) -> Model:
        """Trains until ``options.epochs`` epochs are done. Returns the final model."""
        count = self.ranks.count
        self.work.say(
            f"{self.batches.count} images, {self.total} steps of {self.options.batch_size} "
            f"on {self.work.device}{f', {count} ranks' if count > 1 else ''}"
        )
        try:
            with watched():
                return self._run()
        except Interrupted as stop:
            self.ranks.stop(stop.signum)
            if self.state.finished:
                written = self.work.output or self.work.folder.path / MODEL
                done = f"interrupted at its end; {written} is written"
                self._report(self._finished(), good=True)
                raise Interrupted(stop.signum, done) from None
            self._save()
            self.ranks.wait()  # none ends before it is saved
            where = (
                f"interrupted in epoch {self.state.epoch + 1}, step {self.state.step}, and saved"
            )
            self._report(f"{where.capitalize()}.")
            raise Interrupted(stop.signum, f"{where}; the same command goes on") from None
        except CommandError as error:
            self._report(f"Failed: {error}", good=False, error=error)
            raise

    def _run(self) -> Model:
        """Checks the model, trains the rest of the epochs, and finishes."""
        if self.ranks.first:
            self._require_agreement(self.model, self.sample, "before the first step", aloud=True)
        self._tell_least()
        self.narrator.heading(self.measured_as)
        while self.state.epoch < self.options.epochs:
            self._epoch()
        return self._finish()

    def _tell_least(self) -> None:
        """Reports the score of a perfect reconstruction, if the likelihood has such a limit."""
        least = least_reconstruction(self.spec, self.measured, self.ranks)
        if least is not None:
            prior = self.spec.latent_size * math.log(self.spec.num_codes)
            self.narrator.least(self.measured_as, least, prior)

    def _epoch(self) -> None:
        """Trains the rest of the epoch, then measures, checks, publishes and reports."""
        state = self.state
        self._steps()
        with self.ranks.together():
            self._require_equal_ranks()
            self.batches.join(self.ranks.collected)
            state.meter.join(self.ranks)
        start = time.perf_counter()
        metrics = state.meter.read()
        state.seconds += time.perf_counter() - start  # a card was still at work
        self._require_finite(metrics.total)
        epoch = state.epoch + 1
        line = {
            "epoch": epoch,
            **metrics.to_dict(self.spec),
            "images_per_second": state.step * self.options.batch_size / state.seconds,
            "data": self.provenance.get("data", {}).get("source"),
        }
        usual = max(1, self.options.epochs // TIMES_PER_RUN)
        if epoch % (self.work.check_every or usual) == 0 and self.ranks.first:
            when, probed = f"after epoch {epoch}", len(self.sample)
            report = self._require_agreement(self.model, self.sample, when, probed=probed)
            line["oracle"] = report.to_dict()
            line["oracle_error_over_allowed"] = report.worst_error_over_allowed
        measured = evaluate(
            self.model,
            self.measured,
            self.options,
            self.spec.variance,
            self.progress.measuring(len(self.measured.images)),
            self.ranks,
        )
        self._require_finite(measured.total)
        line[self.measured_as] = measured.to_dict(self.spec)
        last = epoch == self.options.epochs
        if last and self.ranks.first:
            line[self.measured_as] |= share_proved(
                self.spec, self.model.params(), self.proved_sample
            )
        with hold(), self.ranks.together():
            state.history.append(line)
            state.epoch, state.step, state.seconds = epoch, 0, 0.0
            state.order, state.meter = (
                self.generator.get_state(),
                Meter(self.spec, self.work.device),
            )
            self._publish()
        self.narrator.epoch(line)
        drawn = last or epoch % (self.work.pictures_every or usual) == 0
        if drawn and self.work.pictures and self.ranks.first:
            self.narrator.draw(self.model, self.shown, metrics.hits, epoch)
        self._report(f"{epoch} of {self.options.epochs} epochs are done.")
        self.progress.ended()

    def _steps(self) -> None:
        """Takes the rest of the epoch's steps."""
        state = self.state
        self.generator.set_state(state.order)
        batches = self.batches.shuffled(self.generator, skip=state.step)
        with self.ranks.together():
            end = time.perf_counter()
            for images in self.progress.steps(batches):
                self.ranks.another_step()
                self._step(images, time.perf_counter() - end)
                end = time.perf_counter()

    def _step(self, images: Tensor, waited: float) -> None:
        """Takes the next step of the epoch on this rank's images of a batch.

        waited: seconds that it took until the images came.
        """
        state, start = self.state, time.perf_counter()
        with hold():
            step = self._steps_taken()
            if self.rules.starts(step):
                self._start_codebook()
            state.meter.add(*self._take(images, step))
            state.step += 1
            state.seconds += waited + time.perf_counter() - start
            if state.step % self.work.snapshot_steps == 0:
                self._save()

    def _take(self, images: Tensor, step: int) -> Taken:
        if self.recorded is not None:
            return self.recorded(images, step)
        how = self.options, self.rules, step, self.work.split
        return training_step(self.model, self.optimizer, images, *how)

    def _start_codebook(self) -> None:
        try:
            self.rules.start(self.model, self.batches, self.ranks)
        except ValueError as error:  # latents that are no longer finite
            raise CommandError(
                f"the run diverged before the codebook's start: {error}; {self._kept()}"
            ) from None
        self.progress.restart()

    def _finish(self) -> Model:
        """Writes the file to ``output``, and the last snapshot."""
        path = self.work.folder.path / MODEL
        model = self._read_back(path) if self.ranks.first else self._model()
        with hold(), self.ranks.together():
            if self.work.output is not None:
                write_file(self.work.output, path.read_bytes())
            self.state.finished = True
            self._save()
        self._report(self._finished(), good=True)
        return model

    def _read_back(self, path: Path) -> Model:
        """Reads the file and checks its model against the oracle, if possible on new images."""
        model = read_model(path)
        dialect = DIALECTS[self.options.dialect]
        module = prepare(VQVAE(model.spec, model.params, dialect), self.work.device)
        module.quantizer.steps.copy_(self.model.quantizer.steps)
        self._require_agreement(module, self.measured_sample, f"{MODEL} read back", aloud=True)
        self.narrator.proved(self.state.history[-1])
        return model

    def _model(self) -> Model:
        """Returns the model after a full epoch."""
        history = self.state.history
        return Model(
            self.spec,
            self.model.params(),
            self.options.to_dict(),
            {**history[-1], "history": history},
            self.provenance,
            preprocessing=self.preprocessing,
        )

    def _publish(self) -> None:
        """Writes the model, the metrics and a snapshot after a full epoch."""
        if self.ranks.first:
            write_model(self.work.folder.path / MODEL, self._model())
            self.work.folder.write_metrics(self.state.history)
        self._save()

    def _save(self) -> None:
        with hold(), self.ranks.together():
            self.state.meter.join(self.ranks)
            if not self.ranks.first:
                self.state.meter.clear()
                return
            state = {"course": self.course, **self.state.to_plain()}
            save_state(self.work.folder.snapshots, self._steps_taken(), state)

    def _finished(self) -> str:
        return f"Finished: {self.options.epochs} epochs."

    def _report(
        self, verdict: str, *, good: bool | None = None, error: CommandError | None = None
    ) -> None:
        """Writes the report of the epochs so far, if pictures are wanted and there are any."""
        if not (self.work.pictures and self.ranks.first and self.state.history):
            return
        about = {**self.provenance}
        origin = {"Data": about.pop("data", {}), "Machine": {**about.pop("versions", {}), **about}}
        report = error.report if isinstance(error, ParityError) else None
        standing = Standing(verdict, good, self.work.output, self.ranks.count, origin, report)
        self.narrator.report(self.state.history, standing)

    def _require_equal_ranks(self) -> None:
        """Raises ParityError unless every rank holds the same parameters, bit for bit."""
        if (rank := self.ranks.different(digest_of(self.model.params()))) is not None:
            when = f"in epoch {self.state.epoch + 1}"
            raise ParityError(f"rank {rank} disagrees with rank 0 {when}; {self._kept()}")

    def _steps_taken(self) -> int:
        return self.state.epoch * len(self.batches) + self.state.step

    def _require_agreement(
        self,
        model: VQVAE,
        images: npt.NDArray[np.float32],
        when: str,
        *,
        probed: int = PROBED_TOKENS,
        aloud: bool = False,
    ) -> Report:
        """Checks ``model`` against the oracle on images (N, C, H, W).

        probed: as in ``compare``. Raises ParityError, CommandError.
        """
        try:
            report = check_against_oracle(model, images, self.options, probed=probed)
        except ValueError as error:  # a weight or a stage that is no longer finite
            raise CommandError(f"the run diverged {when}: {error}; {self._kept()}") from None
        if not report.passed:
            raise ParityError(
                f"the model disagrees with the oracle {when}: {report.failures[0]}; {self._kept()}",
                report,
            )
        if aloud:
            self.narrator.agrees(report, len(images), when)
        return report

    def _require_finite(self, loss: float) -> None:
        if not np.isfinite(loss):
            raise CommandError(
                f"the loss is {loss} in epoch {self.state.epoch + 1}; {self._kept()}"
            )

    def _kept(self) -> str:
        if not self.state.history:
            return "nothing was written"
        epoch = self.state.history[-1]["epoch"]
        return f"{self.work.folder.path / MODEL} holds epoch {epoch}"
