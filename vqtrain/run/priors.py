"""Trains a prior on tokens: steps, epochs, early stopping, and the state saved at a signal."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vqref
from vqref import prior
from vqref.agreement.parity import check
from vqref.agreement.report import Report
from vqref.errors import CommandError, InputError, ParityError
from vqref.host.interrupts import Interrupted, hold, watched
from vqref.host.sheets import save_square
from vqref.modelfile import Model, require_plain
from vqref.prior import Prior, PriorSpec
from vqref.validation import Array, Int64
from vqtrain import prior as modules
from vqtrain.data.batches import Batches
from vqtrain.likelihoods import mean
from vqtrain.model import VQVAE
from vqtrain.run.fitting import require_like
from vqtrain.run.folder import RunFolder
from vqtrain.run.progress import Due, duration
from vqtrain.run.snapshot import Course, save_state
from vqtrain.run.webreport import Story, line_of, write_report

MOMENTS = 0.9, 0.95
"""The betas of AdamW, as usual for transformers."""

WEIGHT_DECAY = 0.1
"""The weight decay of matrices; biases and norms have none."""

WARM_UP = 0.05
"""The share of all steps in which the learning rate rises from 0."""

LARGEST_GRADIENT = 1.0
"""The largest length of a step's gradient; a longer one is clipped to it."""

TEMPERATURES, SHOWN = (1.0, 0.8), 64
"""Temperatures of the samples drawn after an epoch, and how many of each."""

MEASURED_AT_ONCE, LINE_SECONDS, SNAPSHOT_STEPS = 256, 30.0, 500

CHECKED = 16
"""Rows of tokens on which the module is checked against the oracle."""


@dataclass(frozen=True)
class PriorOptions:
    """How to train a prior. Raises ValueError.

    epochs, batch_size: the most passes over the tokens, and rows of tokens per step.
    learning_rate: the largest. dropout: the share of values that it drops. patience: epochs without
    improvement on held-out tokens before training stops. precision: of products.
    """

    epochs: int = 60
    batch_size: int = 32
    learning_rate: float = 1e-3
    dropout: float = 0.1
    patience: int = 5
    seed: int = 0
    precision: str = "float32"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate is {self.learning_rate}, expected a positive number")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, expected a share below 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}, expected 0 to 2^63 - 1")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision is {self.precision}, expected float32 or bfloat16")


def course_of_prior(spec: PriorSpec, options: PriorOptions, model: str, tokens: str) -> Course:
    """Returns all that determines the steps. model, tokens: their digests."""
    rows = json.dumps(spec.to_dict(), sort_keys=True).encode()
    return {
        **dataclasses.asdict(options),
        "prior": spec.kind,
        "model": model,
        "tokens": tokens,
        "rows": hashlib.sha256(rows).hexdigest()[:12],
    }


@dataclass(frozen=True)
class PriorWork:
    """Where a prior is trained. It does not change what is computed on a given device.

    output: the file for the model with its prior, or None.
    """

    device: torch.device
    folder: RunFolder
    say: Callable[[str], None]
    pictures: bool = True
    output: Path | None = None


class PriorTrainer:
    """One run on tokens (N, S), measured on other tokens.

    state: the state of a snapshot to continue from.

    Raises InputError if the tokens do not fill one batch. ``run`` raises CommandError if the loss
    is no longer finite, ParityError if module and oracle disagree, and Interrupted after a signal,
    once the state is saved.
    """

    def __init__(
        self,
        spec: PriorSpec,
        options: PriorOptions,
        model: Model,
        tokens: Int64,
        measured: Int64,
        work: PriorWork,
        course: Course,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        if len(tokens) < options.batch_size:
            raise InputError(
                f"{len(tokens)} images to train on, fewer than one batch of {options.batch_size}"
            )
        self.spec, self.options, self.model = spec, options, model
        self.work, self.course = work, course
        self.tokens = torch.from_numpy(tokens).to(work.device)
        self.measured = torch.from_numpy(measured).to(work.device)
        params = vqref.init_params(spec, np.random.default_rng(options.seed))
        self.module = modules.Prior(spec, params, options.dropout).to(work.device)
        self.optimizer = _optimizer(self.module, options)
        self.steps_each = len(tokens) // options.batch_size
        self.epoch = self.step = self.waited = 0
        self.sum, self.seconds, self.finished = 0.0, 0.0, False
        self.history: list[dict[str, Any]] = []
        self.best = self.module.params()
        self.checked: Report | None = None
        if state is not None:
            self._load(state)

    def run(self) -> Prior:
        """Trains until the held-out tokens no longer get cheaper. Returns the best prior."""
        uniform = self.spec.latent_size * math.log(self.spec.num_codes)
        self.work.say(
            f"{len(self.tokens)} images of {self.spec.latent_size} tokens train, "
            f"{len(self.measured)} are held out; uniform prior: {uniform:.1f} nats"
        )
        try:
            with watched():
                self._check()
                self.work.say("epoch     nats  held out    rate  tokens/s")
                while self.epoch < self.options.epochs and self.waited < self.options.patience:
                    self._epoch()
                return self._finish()
        except Interrupted as stop:
            if not self.finished:
                self._save()
                self._report(f"Interrupted in epoch {self.epoch + 1}, and saved.")
            done = f"interrupted in epoch {self.epoch + 1}, step {self.step}, and saved"
            raise Interrupted(stop.signum, f"{done}; the same command goes on") from None

    def _epoch(self) -> None:
        order = np.random.default_rng((self.options.seed, self.epoch)).permutation(len(self.tokens))
        due, batch = Due(LINE_SECONDS), self.options.batch_size
        while self.step < self.steps_each:
            start = time.perf_counter()
            with hold():
                rows = torch.from_numpy(order[self.step * batch : (self.step + 1) * batch])
                self.sum += self._take(self.tokens[rows.to(self.tokens.device)])
                self.step += 1
                self.seconds += time.perf_counter() - start
                if self.step % SNAPSHOT_STEPS == 0:
                    self._save()
            if due():
                self._tell()
        self._measure()

    def _take(self, tokens: Tensor) -> float:
        """Takes one step, and returns the mean nats.

        Its randomness depends only on its number, so a resumed run equals an uninterrupted one.
        """
        number = self.epoch * self.steps_each + self.step
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate * self._rate(number)
        self.module.train()
        with torch.random.fork_rng(devices=[tokens.device] if tokens.is_cuda else []):
            torch.manual_seed(_seed(self.options.seed, number))
            with torch.autocast(
                tokens.device.type, torch.bfloat16, enabled=self.options.precision == "bfloat16"
            ):
                loss = self.module.nats(tokens).mean()
            self.optimizer.zero_grad()
            (loss / self.spec.latent_size).backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), LARGEST_GRADIENT)
        self.optimizer.step()
        nats = float(loss.detach())
        if not math.isfinite(nats):
            raise CommandError(f"the loss is {nats} in epoch {self.epoch + 1}")
        return nats

    def _rate(self, step: int) -> float:
        """Returns the learning rate's factor: a linear rise, then half a cosine down to 0.1."""
        total = self.options.epochs * self.steps_each
        warm = max(1, round(WARM_UP * total))
        if step < warm:
            return (step + 1) / warm
        done = (step - warm) / max(1, total - warm)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * done))

    def _tell(self) -> None:
        each = self.seconds / self.step
        left = duration(each * (self.steps_each - self.step))
        self.work.say(
            f"epoch {self.epoch + 1}/{self.options.epochs}: step {self.step} of {self.steps_each}, "
            f"{self.sum / self.step:.1f} nats, about {left} left in it"
        )

    def _measure(self) -> None:
        """Measures the held-out tokens, keeps the best, publishes and reports the epoch."""
        measured = measure(self.module, self.measured)
        rate = self.step * self.options.batch_size * self.spec.latent_size / self.seconds
        line = {
            "epoch": self.epoch + 1,
            "nats": self.sum / self.steps_each,
            "held_out": measured,
            "rate": self.optimizer.param_groups[0]["lr"],
            "tokens_per_second": rate,
        }
        with hold():
            better = not self.history or measured < min(each["held_out"] for each in self.history)
            self.waited = 0 if better else self.waited + 1
            if better:
                self.best = self.module.params()
            self.history.append(line)
            self.epoch, self.step, self.sum, self.seconds = self.epoch + 1, 0, 0.0, 0.0
            self.work.folder.write_metrics(self.history)
            self._save()
        self.work.say(
            f"{line['epoch']:>5}{line['nats']:>9.2f}{measured:>10.2f}{line['rate']:>8.1e}{rate:>10.0f}"
            + "  best" * better
        )
        if self.work.pictures:
            self._draw(line["epoch"])
        self._report(f"{line['epoch']} of at most {self.options.epochs} epochs are done.")

    def _finish(self) -> Prior:
        self.module = modules.Prior(self.spec, self.best).to(self.work.device)
        self._check()
        best = min(self.history, key=lambda line: line["held_out"])
        self.work.say(
            f"best after epoch {best['epoch']}: {best['held_out']:.2f} nats; the oracle agrees"
        )
        with hold():
            self.finished = True
            self._save()
        self._report(f"Finished: the prior of epoch {best['epoch']} is kept.", good=True)
        metrics = {**best, "history": self.history}
        training = {**dataclasses.asdict(self.options), "epochs_trained": self.epoch}
        return Prior(self.spec, self.best, self.course["model"], training, metrics)

    def _check(self) -> None:
        """Checks the module against the oracle on held-out tokens. Raises ParityError."""
        rows = self.measured[:CHECKED]
        expected = prior.log_probabilities(self.spec, self.module.params(), rows.cpu().numpy())
        self.module.eval()
        with torch.no_grad():
            found = self.module(rows).cpu().numpy()
        judged = check("log_probabilities", found, expected, precision="float32")
        self.checked = Report((judged,))
        if not judged.passed:
            raise ParityError(f"the prior disagrees with the oracle: {judged}", self.checked)

    def _report(self, verdict: str, *, good: bool | None = None) -> None:
        """Writes the report of the epochs so far, if pictures are wanted and there are any."""
        if not (self.work.pictures and self.history):
            return
        output, following = self.work.output, dict[str, str]()
        if good and output is not None:
            following = {
                "Export the model with its prior:": line_of("python -m vqdeploy export", output),
                "Measure what tokens cost under it:": line_of("python -m vqtrain evaluate", output),
            }
        sizes = {"latents": self.spec.latent_size, "codes": self.spec.num_codes}
        story = Story(
            name=self.work.folder.path.name,
            verdict=verdict,
            good=good,
            history=[{**line, "measured": {"nats": line["held_out"]}} for line in self.history],
            measured_as="held out",
            oracle=None if self.checked is None else self.checked.to_dict(),
            checked="The last check: the prior beside the oracle's",
            settings={
                "Training": dataclasses.asdict(self.options),
                "Prior": {"kind": self.spec.kind, "rows": len(self.spec.rows), **sizes},
                "Tokens": {"trained on": len(self.tokens), "held out": len(self.measured)},
            },
            following=following,
        )
        write_report(self.work.folder, story, self.work.say)

    @torch.no_grad()
    def _draw(self, epoch: int) -> None:
        """Draws samples of the prior at each temperature, always from the same noise."""
        module = VQVAE(self.model.spec, self.model.params).to(self.work.device).eval()
        noise = prior.gumbel(self.options.seed, self.spec, SHOWN)
        for temperature in TEMPERATURES:
            indices = draw_samples(self.module, noise, temperature)
            codes = module.quantizer.codebook[torch.from_numpy(indices).to(self.work.device)]
            pixels = mean(self.model.spec, module.decoder(codes)).cpu().numpy()
            save_square(self.work.folder.picture(epoch, f"samples-{temperature:g}"), pixels)

    def _save(self) -> None:
        state = {
            "course": dict(self.course),
            "finished": self.finished,
            "module": self.module.state_dict(),
            "best": {name: torch.from_numpy(array) for name, array in self.best.items()},
            "optimizer": self.optimizer.state_dict()["state"],
            **{name: getattr(self, name) for name in _COUNTS},
            "history": self.history,
        }
        number = self.epoch * self.steps_each + self.step
        with hold():
            save_state(self.work.folder.snapshots, number, state)

    def _load(self, state: Mapping[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self.best = {name: tensor.numpy() for name, tensor in state["best"].items()}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        for name in (*_COUNTS, "history"):
            setattr(self, name, state[name])


def _seed(*numbers: int) -> int:
    """Combines several numbers into a seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


_COUNTS = ("epoch", "step", "waited", "sum", "seconds")


def require_prior_state(state: Mapping[str, Any], spec: PriorSpec) -> None:
    """Raises InputError that names the first entry of a snapshot that does not fit ``spec``."""
    shapes = {p.name: torch.empty(p.shape, device="meta") for p in spec.parameters}
    moments = {
        i: {"step": torch.empty((), device="meta"), "exp_avg": like, "exp_avg_sq": like}
        for i, like in enumerate(_in_groups(shapes))
    }
    expected = {"module": shapes, "best": shapes, "optimizer": moments}
    expected |= {"epoch": 0, "step": 0, "waited": 0, "sum": 0.0, "seconds": 0.0, "finished": False}
    if state.get("epoch") == state.get("step") == 0:
        expected["optimizer"] = {}
    entries = {name: value for name, value in state.items() if name not in ("course", "history")}
    require_like("", entries, expected)
    history = state.get("history")
    if not isinstance(history, list) or len(history) != state["epoch"]:
        raise InputError("its entry history has no line for each epoch")
    require_plain("history", history)
    for i, line in enumerate(history):
        if not isinstance(line, dict) or type(line.get("held_out")) is not float:
            raise InputError(f"its entry history.{i}.held_out is missing or not a number")


def _in_groups(parameters: Mapping[str, Tensor]) -> list[Tensor]:
    """Returns the parameters in the optimizer's order: matrices first."""
    return [
        each for flat in (False, True) for each in parameters.values() if (each.ndim < 2) == flat
    ]


def _optimizer(module: modules.Prior, options: PriorOptions) -> torch.optim.Optimizer:
    ordered = _in_groups(dict(module.named_parameters()))
    matrices = [each for each in ordered if each.ndim >= 2]
    others = [each for each in ordered if each.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=MOMENTS, fused=True)


@torch.no_grad()
def measure(module: modules.Prior, tokens: Tensor) -> float:
    """Returns the mean nats of tokens (N, S), at least one row, summed in float64."""
    module.eval()
    parts = (module.nats(part).double().sum() for part in tokens.split(MEASURED_AT_ONCE))
    return float(sum(parts) / len(tokens))


def draw_samples(module: modules.Prior, noise: Array, temperature: float = 1.0) -> Int64:
    """Samples indices (N, S) from noise (N, S, K), as ``vqref.prior.sample``, on the device."""
    module.eval()
    device = next(module.parameters()).device
    indices = np.zeros(noise.shape[:2], np.int64)
    cache = module.begin(len(indices))
    for s in range(noise.shape[1]):
        before = torch.from_numpy(indices[:, s - 1]).to(device)
        log_p = module.step(before, s, cache).cpu().numpy()
        indices[:, s] = prior.choose(log_p, noise[:, s], temperature)
    return indices


@torch.no_grad()
def tokenise(
    model: VQVAE, batches: Batches, count: Callable[[int], None] = lambda done: None
) -> Int64:
    """Returns the indices (N, S) of all images of ``batches``, in order.

    count: takes how many are done.
    """
    parts: list[Int64] = []
    for images in batches.in_order():
        parts.append(model.quantizer(model.encoder(images))[0].cpu().numpy())
        count(sum(map(len, parts)))
    found: Int64 = np.concatenate(parts)
    return found
