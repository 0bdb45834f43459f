"""Training on images, as ``python -m vqtrain`` and ``vqtrain.train`` share it."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import platform
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch

from vqref import families
from vqref.errors import InputError, UsageError
from vqref.families import FAMILIES, Size
from vqref.host.files import require_writable
from vqref.host.images import OFFICIAL_NAMES, ImageSet, as_images
from vqref.host.interrupts import Interrupted
from vqref.likelihoods import LIKELIHOODS
from vqref.modelfile import Model
from vqref.spec import ModelSpec
from vqtrain.data import holdout
from vqtrain.data.streams import Stream, StreamSet
from vqtrain.device import choose_device, choose_precision, kept_memory, threads, without_variation
from vqtrain.options import (
    DEFAULT_RECIPE,
    RECIPES,
    TRAINED,
    TrainingOptions,
    recipe_sizes,
    require_still,
)
from vqtrain.run.fitting import require_fitting
from vqtrain.run.folder import RunFolder, State, open_run
from vqtrain.run.metrics import LEAST_ERROR, variance_of
from vqtrain.run.ranks import ALONE, Ranks
from vqtrain.run.snapshot import Course, course_of
from vqtrain.run.step import Split
from vqtrain.run.trainer import Trainer, Work, require_one_batch

AUTO = "auto"

CHOICES = {
    "recipe": tuple(RECIPES),
    "network": (AUTO, *FAMILIES),
    "likelihood": tuple(LIKELIHOODS),
    "device": (AUTO, "cpu", "cuda"),
    "precision": (*TRAINED, AUTO),
}
"""Options whose value is one of a few words."""

COUNTS = (
    *("threads", "snapshot_steps", "check_images", "check_every", "pictures_every", "accumulate"),
)
"""Options that are integers of at least 1."""

LEFT_OUT = ("config", "name", "resume", "json")
"""Options that a run's folder does not keep: they do not help to begin the same run again."""

Say = Callable[[str], None]


class OptionError(UsageError, ValueError):
    """An option has a value that it cannot have.

    named: whether the message begins with the option's name and a colon or a space.
    """

    def __init__(self, message: str, *, named: bool = False) -> None:
        super().__init__(message)
        self.named = named


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run is to do, by the names of the command line.

    recipe: a name of ``RECIPES``. network: a family, or "auto", which chooses by the images.
    likelihood: None takes the family's. sizes: sizes of the network that differ from the family's.
    changes: fields of ``TrainingOptions`` that differ from the recipe's.
    device: where it trains. chosen: whether the precision is what this device multiplies fastest.
    deterministic: refuse operations that vary. threads: for PyTorch; None leaves it the choice.
    runs, name, resume: as in ``open_run``. output: where to write a copy of the model, or None.
    snapshot_steps, check_images, check_every, pictures_every, pictures, bar: as in ``Work``.
    tensorboard: write event files.
    ranks: those that train together. accumulate: passes that each rank makes for its part of a
    batch.
    """

    recipe: str = DEFAULT_RECIPE
    network: str = AUTO
    likelihood: str | None = None
    sizes: Mapping[str, Size] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    device: torch.device
    chosen: bool
    deterministic: bool = False
    threads: int | None = None
    runs: Path
    name: str | None = None
    resume: str = AUTO
    output: Path | None = None
    snapshot_steps: int = 500
    check_images: int | None = None
    check_every: int | None = None
    pictures_every: int | None = None
    tensorboard: bool = False
    pictures: bool = True
    bar: bool = False
    ranks: Ranks = ALONE
    accumulate: int = 1


OPTIONS = (
    {each.name for each in dataclasses.fields(Plan)}
    - {"sizes", "changes", "chosen", "runs", "name", "output", "pictures", "bar", "ranks"}
    | {name for family in FAMILIES for name in families.sizes(family)}
    | {each.name for each in dataclasses.fields(TrainingOptions)}
)
"""Names of the options of ``train`` with the command line's meaning and defaults."""


def train(
    images: npt.ArrayLike | ImageSet | Stream,
    *,
    held_out: npt.ArrayLike | ImageSet | float | None = None,
    folder: str | PathLike[str] | None = None,
    output: str | PathLike[str] | None = None,
    say: Say | None = None,
    **options: Any,
) -> Model:
    """Trains a model on images, and returns it.

    ``python -m vqtrain`` with the same options gives the same model.

    images: shape (N, H, W), (N, H, W, C) or (N, C, H, W), where C is 1, 3 or 4; uint8, or floating
    in [0, 1]. Or the result of ``vqref.host.pictures.load_any`` or of
    ``vqtrain.data.sources.load_source``.
    held_out: other images to measure on, or the fraction of ``images`` to hold out, chosen by the
    hash of each; 0 holds none out. None takes the held-out images of an ImageSet, else a tenth.
    folder: where the run keeps its snapshots, metrics and pictures, and from where an interrupted
    run continues. None keeps only the model. output: a file to write the model to.
    say: takes each line of the report; None is silent.
    options: the command line's, with underscores: ``recipe``, ``network``, ``num_codes``,
    ``epochs``, ``batch_size``, ``seed``, ``device``, ``precision``, ``threads``, …;
    ``python -m vqtrain --help`` lists them all (``OPTIONS`` has the names).

    Ctrl-C raises KeyboardInterrupt. May be called in any thread.

    Raises TypeError for an unknown option, ValueError for a value that the option cannot have and
    for images that cannot be trained on, and otherwise the errors of ``vqref.errors``.
    """
    _require_known(options)
    whole = images if isinstance(images, Stream) else _image_set(images, "images")
    wanted = _wanted(held_out)
    with ExitStack() as stack:
        if folder is None:
            if options.get("resume", AUTO) != AUTO or options.get("tensorboard"):
                raise OptionError("resume and tensorboard need a folder")
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vqtrain-")), "run")
        else:
            place = Path(folder)
        plan = make_plan(
            options,
            runs=place.parent,
            name=place.name,
            output=None if output is None else Path(output),
            pictures=folder is not None,
        )
        chosen = holdout.hold_out(whole, wanted)
        try:
            share = (chosen.held_out_as or {}).get("fraction")
            return run(chosen, plan, say or _ignore, {**options, "held_out": share})
        except Interrupted as stop:
            if folder is not None:
                raise
            what = "interrupted; with a folder, a run is saved and goes on"
            raise Interrupted(stop.signum, what) from None


def _require_known(options: Mapping[str, Any]) -> None:
    """Raises TypeError for an unknown option, and names the nearest known one."""
    for name in sorted(options.keys() - OPTIONS):
        close = difflib.get_close_matches(name, sorted(OPTIONS), n=1, cutoff=0.5)
        near = f"; did you mean {close[0]}?" if close else ""
        raise TypeError(f"train() has no option {name}{near}")


def _image_set(images: Any, what: str) -> ImageSet:
    """Returns images of any shape as an ImageSet. Raises InputError."""
    if isinstance(images, ImageSet):
        return images
    if isinstance(images, str | PathLike):
        raise InputError(f"{what}: a path; vqref.host.pictures.load_any reads {images}")
    found = as_images(images)
    if not found.flags.writeable:  # PyTorch would warn
        found = found.copy()
    return ImageSet(found, None, "an array", hashlib.sha256(found.data).hexdigest())


def _wanted(held_out: Any) -> float | ImageSet | None:
    """Returns ``held_out`` as ``hold_out`` takes it. Raises ValueError."""
    if held_out is None:
        return None
    if isinstance(held_out, int | float):
        try:
            return holdout.require_fraction(float(held_out))
        except ValueError as error:
            raise OptionError(f"held_out: {error}", named=True) from None
    return _image_set(held_out, "held_out")


def _ignore(line: str) -> None:
    """Says nothing."""


def make_plan(options: Mapping[str, Any], **where: Any) -> Plan:
    """Returns the plan that the options ask for. Options that are None are ignored.

    options: by the names of the command line, OPTIONS among them. where: fields of ``Plan``.

    Raises OptionError for values that no run can have, MachineError for a device that this machine
    lacks and for a file that cannot be written.
    """
    given = {name: value for name, value in options.items() if value is not None}
    _require_possible(given)
    device = choose_device(given.pop("device", AUTO))
    recipe = given.get("recipe", DEFAULT_RECIPE)
    precision = given.pop("precision", AUTO if recipe == DEFAULT_RECIPE else None)
    if precision == "tf32" and device.type == "cpu":
        message = "precision tf32: only a CUDA device has it; use float32, bfloat16 or auto"
        raise OptionError(message, named=True)
    if precision is not None:
        given["precision"] = choose_precision(device) if precision == AUTO else precision
    changes = {
        each.name: given.pop(each.name)
        for each in dataclasses.fields(TrainingOptions)
        if each.name in given
    }
    _replace(TrainingOptions(), changes)
    names = {name for family in FAMILIES for name in families.sizes(family)}
    sizes = {name: given.pop(name) for name in names & given.keys()}
    known = {"device": device, "chosen": precision == AUTO, "sizes": sizes, "changes": changes}
    plan = Plan(**known, **given, **where)
    if plan.output is not None:
        require_writable(plan.output)
    return plan


def _require_possible(given: Mapping[str, Any]) -> None:
    """Raises OptionError for values that the command line would refuse."""
    for name, words in CHOICES.items():
        if name in given and given[name] not in words:
            raise OptionError(f"{name} is {given[name]!r}; it must be one of {', '.join(words)}")
    for name in COUNTS:
        value = given.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**63:
            raise OptionError(f"{name} is {value!r}; it must be an integer of at least 1")


def run(images: ImageSet, plan: Plan, say: Say, asked: Mapping[str, Any]) -> Model:
    """Trains on images whose held-out part is already chosen.

    say: takes each line of the report. asked: the options as given, by name. The run's folder keeps
    them for ``--config``.

    Raises CommandError, or Interrupted after a signal.
    """
    with ExitStack() as stack:
        stack.enter_context(threads(plan.threads))
        if plan.deterministic:
            stack.enter_context(without_variation())
        if plan.device.type == "cpu":
            stack.enter_context(kept_memory())
        return _run(images, plan, say, asked)


def _run(images: ImageSet, plan: Plan, say: Say, asked: Mapping[str, Any]) -> Model:
    for line in (*images.said, holdout.described(images)):
        say(line)
    spec, sizes = build_spec(plan, images)
    training = _replace(RECIPES[plan.recipe](spec), plan.changes)
    try:
        require_still(spec, training)
    except ValueError as error:
        raise OptionError(str(error)) from None
    require_one_batch(images, training)
    say(f"network {_described(spec)}")
    if plan.chosen:
        what = "card" if plan.device.type == "cuda" else "processor"
        say(f"precision {training.precision}: what this {what} multiplies fastest")
    chosen = images.held_out_as or {}
    held_out = chosen.get("fraction", chosen.get("sha256"))
    buffer = images.buffer if isinstance(images, StreamSet) else None
    course = course_of(spec, training, sizes, images.sha256, held_out, images.preprocessing, buffer)
    _require_same_course(course, plan.ranks)
    default_name = f"{_short_name(images.source)}-{plan.recipe}"
    fits = partial(require_fitting, spec=spec, optimizer=training.optimizer)
    folder, state = _opened(
        plan, lambda: open_run(plan.runs, plan.name, default_name, plan.resume, course, say, fits)
    )
    try:
        if plan.ranks.first:
            folder.write_options(_resolved(asked, training, spec, sizes))
        work = Work(
            plan.device,
            folder,
            plan.output,
            plan.snapshot_steps,
            plan.check_images,
            plan.check_every,
            plan.pictures_every,
            say,
            _writer(folder) if plan.tensorboard and plan.ranks.first else None,
            pictures=plan.pictures,
            bar=plan.bar,
            split=Split(plan.ranks, plan.accumulate),
        )
        about = _provenance(images, plan, training)
        model = Trainer(spec, training, images, work, about, course, state).run()
    finally:
        folder.release()
    written = [f"wrote {plan.output}"] if plan.output else []
    kept = [f"pictures and metrics are in {folder.path}"] if plan.pictures else []
    if written or kept:
        say("; ".join(written + kept))
    return model


def _require_same_course(course: Course, ranks: Ranks) -> None:
    """Raises InputError unless all ranks train the same run."""
    content = json.dumps(course, sort_keys=True).encode()
    if (rank := ranks.different(content)) is not None:
        raise InputError(f"rank {rank} has other images or options than rank 0")


def _opened(
    plan: Plan, opened: Callable[[], tuple[RunFolder, State | None]]
) -> tuple[RunFolder, State | None]:
    """Opens the run's folder, which only rank 0 holds, and the state where all ranks continue."""
    if plan.ranks.count == 1:
        return opened()
    folder, state = opened() if plan.ranks.first else (None, None)
    try:
        path, state = plan.ranks.hand_out_plain((folder and str(folder.path), state))
    except BaseException:
        if folder is not None:
            folder.release()
        raise
    return folder or RunFolder(Path(path), held=False), state


def _resolved(
    asked: Mapping[str, Any], training: TrainingOptions, spec: ModelSpec, sizes: Mapping[str, Size]
) -> dict[str, dict[str, Any]]:
    """Returns what ``--config`` needs to begin the same run: the options, the recipe spelt out."""
    tables = {
        "training": training.to_dict(),
        "model": {"network": spec.family, "likelihood": spec.likelihood}
        | {name: families.spelt(size) for name, size in sizes.items()},
    }
    spelt_out = {name for table in tables.values() for name in table}
    given = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in asked.items()
        if value is not None and name not in {*LEFT_OUT, *spelt_out}
    }
    return {"run": given, **tables}


def _provenance(images: ImageSet, plan: Plan, training: TrainingOptions) -> dict[str, Any]:
    """Returns where a model comes from, as plain data."""
    return {
        "data": {
            "source": images.source,
            "sha256": images.sha256,
            "images": images.count,
            "held_out": holdout.record(images),
        },
        "recipe": plan.recipe,
        "seed": training.seed,
        "device": str(plan.device),
        **({"ranks": plan.ranks.count} if plan.ranks.count > 1 else {}),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("portable-vqvae", "numpy", "torch")},
    }


def build_spec(plan: Plan, images: ImageSet) -> tuple[ModelSpec, dict[str, Size]]:
    """Returns the network for these images, and all sizes of its family.

    Raises OptionError for a size that the family lacks or that it cannot have, InputError for
    images that the network cannot take.
    """
    shape = images.train.shape[1:]
    family = families.choose(shape) if plan.network == AUTO else plan.network
    known = families.sizes(family)
    for name in plan.sizes:
        if name not in known:
            raise OptionError(f"{name}: network {family} has no such size", named=True)
    asked = families.implied(plan.sizes)
    sizes = {**known, **recipe_sizes(plan.recipe, family, asked)}
    likelihood = {} if plan.likelihood is None else {"likelihood": plan.likelihood}
    variance = max(variance_of(images.train), LEAST_ERROR) if len(images.train) else 1.0
    try:
        return families.make(family, shape, sizes, variance=variance, **likelihood), sizes
    except ValueError as error:
        if str(error).startswith("image_shape"):
            raise InputError(f"{images.source}: {error}") from None
        raise OptionError(str(error)) from None


def _replace(recipe: TrainingOptions, changes: Mapping[str, Any]) -> TrainingOptions:
    try:
        return dataclasses.replace(recipe, **changes)
    except ValueError as error:
        raise OptionError(str(error)) from None


def _described(spec: ModelSpec) -> str:
    """Describes the network: "post: 1x28x28 images, 1 latents, 64 codes, bernoulli"."""
    image, latents = ("x".join(map(str, shape)) for shape in (spec.image_shape, spec.latent_shape))
    return (
        f"{spec.family}: {image} images, {latents} latent{'s' if spec.latent_size > 1 else ''}, "
        f"{spec.num_codes} codes, {spec.likelihood}"
    )


def _short_name(source: str) -> str:
    """Names a run on these images: kmnist, glyphs, or the file's name without its ending."""
    official = any(source == train for train, _ in OFFICIAL_NAMES)
    return "kmnist" if official else Path(source).stem.split(" ")[0]


def _writer(folder: RunFolder) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder.path / "tensorboard")
