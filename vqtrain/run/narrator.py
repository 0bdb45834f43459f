"""Reports a run in lines, pictures and event files. Nothing here changes the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqref.agreement.report import Report
from vqref.host.colours import code_colours
from vqref.host.sheets import save_pairs, save_square
from vqref.spec import ModelSpec
from vqref.validation import Array, Int64
from vqtrain.likelihoods import mean
from vqtrain.model import VQVAE
from vqtrain.run import pictures
from vqtrain.run.folder import MODEL, OPTIONS, RunFolder
from vqtrain.run.metrics import MEASURED
from vqtrain.run.webreport import Story, line_of, write_report

SHOWN_IMAGES, SHOWN_SAMPLES, SHOWN_CODES = 32, 64, 1024
"""The most images of each kind that a picture shows."""

SHOWN_VALUES = 2**22
"""The most values of images in a picture. If images are large, it shows fewer of them."""

COLUMNS = {"held_out": "held out", "training_sample": "sample"}
"""Names of the measured images in a report: separate images, or some training images."""

Line = Mapping[str, Any]
"""An epoch of ``metrics.jsonl``."""


def say(line: str) -> None:
    """Prints a line at once, so that a log has it even if the process is killed."""
    print(line, flush=True)


def kind_of_set(line: Line) -> str:
    """Returns what an epoch's measured images are: "held_out" or "training_sample"."""
    return "held_out" if "held_out" in line else "training_sample"


@dataclass(frozen=True)
class Standing:
    """The state of a run, for its report.

    verdict: a sentence. good: True if the run is finished, False if it failed.
    output: where the copy of a finished run's model is, or None. ranks: how many train.
    origin: data and machine, tables by captions. disagreement: the check that ended the run.
    """

    verdict: str
    good: bool | None
    output: Path | None
    ranks: int
    origin: Mapping[str, Mapping[str, Any]]
    disagreement: Report | None = None


class Narrator:
    """Reports the progress of a run.

    say: takes each line. folder: the run's folder, for pictures. writer: a TensorBoard
    SummaryWriter, or None. seed: of the codes in pictures of samples.
    """

    def __init__(
        self, spec: ModelSpec, folder: RunFolder, say: Callable[[str], None], writer: Any, seed: int
    ) -> None:
        self.spec, self.folder, self.say, self.writer, self.seed = spec, folder, say, writer, seed
        self.shown_images = self._at_most(SHOWN_IMAGES)

    def agrees(self, report: Report, count: int, when: str) -> None:
        """Reports that a check against the oracle on ``count`` images passed, and by how much."""
        worst = f"{report.worst_error_over_allowed:.0%} of allowed"
        self.say(f"oracle: agrees on {count} images, {when} (worst error {worst})")

    def least(self, measured_as: str, nats: float, prior: float) -> None:
        """Reports the lowest possible score of a reconstruction of the measured images."""
        perfect = f"{nats:.1f} nats + {prior:.1f} of prior"
        self.say(f"{COLUMNS[measured_as]}: a perfect reconstruction would score {perfect}")

    def proved(self, line: Line) -> None:
        """Reports the share of measured tokens that is proved in advance, if it is known."""
        found = line[kind_of_set(line)]
        if "proved" in found:
            self.say(
                f"proved in advance, of {found['proved_images']} images' tokens: "
                f"{found['proved']:.1%} in any order, {found['proved_in_lanes']:.1%} in lanes"
            )

    def heading(self, measured_as: str) -> None:
        """Prints the heading of the columns of ``epoch``."""
        self.say(
            f"epoch     bound{COLUMNS[measured_as]:>10}  PSNR  commitment  perplexity  codes"
            "  images/s  oracle"
        )

    def epoch(self, line: Line) -> None:
        """Reports an epoch in one line, and in the event files."""
        measured = line[kind_of_set(line)]
        bounds = f"{_nats(line['bound']):>10}{_nats(measured['bound']):>10}"
        self.say(
            f"{line['epoch']:>5}{bounds}{measured['psnr']:>6.2f}"
            f"{line['commitment']:>12.4f}{line['perplexity']:>12.1f}{line['codes_used']:>7}"
            f"{line['images_per_second']:>10.0f}{'agrees' if 'oracle' in line else '-':>8}"
        )
        if self.writer is not None:
            self._write_events(line)

    def _write_events(self, line: Line) -> None:
        groups = {"training": line, kind_of_set(line): line[kind_of_set(line)]}
        for group, values in groups.items():
            for name, value in values.items():
                if isinstance(value, int | float) and name != "epoch":
                    self.writer.add_scalar(f"{group}/{name}", value, line["epoch"])
        self.writer.flush()

    @torch.no_grad()
    def draw(self, model: VQVAE, images: Array, hits: Int64, epoch: int) -> None:
        """Draws the pictures of an epoch, and keeps its use of codes.

        images (N, C, H, W): shown beside their reconstructions. hits (K,): how often the epoch
        chose each code.
        """
        quantizer = model.quantizer
        on_device = torch.from_numpy(images).to(quantizer.codebook.device)
        indices = quantizer(model.encoder(on_device))[0].cpu()
        path, decoded = self.folder.picture(epoch, "reconstructions"), self._decoded(model, indices)
        if len(self.spec.latent_shape) == 1:
            save_pairs(path, images, decoded)
            self._draw_codes(model, hits, epoch)
        else:
            colours = code_colours(quantizer.codebook.cpu().numpy(), hits)
            pictures.save_tokens(path, self.spec, images, decoded, indices.numpy(), colours)
        self.folder.write_use(epoch, pictures.use_of_codes(hits))

    def _draw_codes(self, model: VQVAE, hits: Int64, epoch: int) -> None:
        """Draws samples of the uniform prior, and each code at all places, most used first."""
        size, count = self.spec.latent_size, self._at_most(SHOWN_SAMPLES)
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randint(self.spec.num_codes, (count, size), generator=generator)
        save_square(self.folder.picture(epoch, "samples"), self._decoded(model, drawn))
        by_use = np.argsort(-hits, kind="stable")[: self._at_most(SHOWN_CODES)]
        codes = torch.from_numpy(by_use)[:, None].expand(-1, size)
        save_square(self.folder.picture(epoch, "codebook"), self._decoded(model, codes))

    def report(self, history: Sequence[Line], standing: Standing) -> None:
        """Writes ``report.html``: the epochs so far, at least one, and the state of the run."""
        measured_as = kind_of_set(history[-1])
        checked = [line for line in history if "oracle" in line][-1:]
        oracle = checked[0]["oracle"] if checked else None
        when = f"After epoch {checked[0]['epoch']}" if checked else ""
        if standing.disagreement is not None:
            oracle, when = standing.disagreement.to_dict(), "The check that failed"
        story = Story(
            name=self.folder.path.name,
            verdict=standing.verdict,
            good=standing.good,
            history=[{**line, "measured": line[measured_as]} for line in history],
            measured_as=MEASURED[measured_as],
            oracle=oracle,
            checked=f"{when}: the trainer's stages beside the oracle's",
            settings=standing.origin,
            following=self._following(standing),
        )
        write_report(self.folder, story, self.say)

    def _following(self, standing: Standing) -> dict[str, str]:
        """Returns what to run next."""
        run, model = self.folder.path, standing.output or self.folder.path / MODEL
        if standing.good:
            bundle = model.parent / f"{model.stem}-onnx"
            return {
                "Export the model, once its graphs agree with the oracle:": line_of(
                    "python -m vqdeploy export", model
                ),
                "Verify the bundle, on any machine that runs it:": line_of(
                    "python -m vqdeploy verify", bundle
                ),
                "Measure the model, and say what each figure means:": line_of(
                    "python -m vqtrain evaluate", model
                ),
            }
        ranks = f"torchrun --nproc-per-node {standing.ranks}" if standing.ranks > 1 else "python"
        return {
            "Go on with the run, if it has ended:": line_of(
                f"{ranks} -m vqtrain --config", run / OPTIONS, "--resume", run
            ),
            "Export the model of the last full epoch:": line_of(
                "python -m vqdeploy export", run / MODEL
            ),
        }

    def _decoded(self, model: VQVAE, indices: Tensor) -> Array:
        """Returns reconstructions (N, C, H, W) of indices (N, S), decoded a few at a time."""
        codebook = model.quantizer.codebook
        parts = [
            mean(self.spec, model.decoder(codebook[part.to(codebook.device)])).cpu().numpy()
            for part in indices.split(SHOWN_IMAGES)
        ]
        return np.concatenate(parts)

    def _at_most(self, count: int) -> int:
        return max(1, min(count, SHOWN_VALUES // math.prod(self.spec.image_shape)))


def _nats(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 1e5 else f"{value:.0f}"
