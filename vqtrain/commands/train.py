"""``python -m vqtrain``: images, a run folder, a trainer."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqref import families
from vqref.dialects import DIALECTS
from vqref.errors import ExitCode, InputError, MachineError, UsageError
from vqref.families import FAMILIES
from vqref.host.commandline import option, positive
from vqref.host.files import require_writable
from vqref.host.images import OFFICIAL_NAMES, ImageSet
from vqref.likelihoods import LIKELIHOODS
from vqref.spec import ModelSpec
from vqtrain.commands.shared import SourceOptions
from vqtrain.data.sources import load_source
from vqtrain.options import DEFAULT_RECIPE, RECIPES, TRAINED, TrainingOptions

if TYPE_CHECKING:
    import torch

    from vqtrain.run.folder import RunFolder

AUTO = "auto"


def _by_family(values: Mapping[str, Any]) -> str:
    """A default that each family has its own of, for ``--help``."""
    if len({*values.values()}) == 1:
        return f"(default: {next(iter(values.values()))})"
    return f"(default: {', '.join(f'{family} {value}' for family, value in values.items())})"


def _recipe(flag: str, help: str, **how: Any) -> Any:
    """An option of training that is the recipe's unless it is given."""
    name = flag.removeprefix("--").replace("-", "_")
    defaults = {f: getattr(RECIPES[DEFAULT_RECIPE](make()), name) for f, make in FAMILIES.items()}
    return option(flag, default=None, help=f"{help} {_by_family(defaults)}", **how)


def _plain_name(text: str) -> str:
    """The type of ``--name``: what names a folder in that of the runs, and nothing outside it."""
    if text in ("", ".", "..") or "/" in text or "\\" in text or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a folder")
    return text


def _switch(flag: str, help: str) -> Any:
    return _recipe(flag, help, action=argparse.BooleanOptionalAction)


def _size(flag: str, help: str) -> Any:
    """A size of the network that is its family's unless it is given."""
    name = flag.removeprefix("--").replace("-", "_")
    defaults = {f: families.sizes(f)[name] for f in FAMILIES if name in families.sizes(f)}
    text = f"{help} {_by_family(defaults)}"
    if len(defaults) < len(FAMILIES):
        text = f"{', '.join(defaults)}: {text}"
    return option(flag, default=None, type=int, metavar="N", help=text)


@dataclass(frozen=True, kw_only=True)
class RunOptions(SourceOptions):
    """What is trained on, where, and what is left of it."""

    recipe: str = option(
        "--recipe",
        default=DEFAULT_RECIPE,
        choices=tuple(RECIPES),
        help="named set of training options",
    )
    config: Path | None = option(
        "--config",
        default=None,
        type=Path,
        metavar="FILE",
        help="options from a run's options.toml; the command line has the last word",
    )
    device: str = option(
        "--device", default=AUTO, choices=(AUTO, "cpu", "cuda"), help="where to train"
    )
    deterministic: bool = option(
        "--deterministic",
        default=False,
        action="store_true",
        help="refuse operations that vary from run to run",
    )


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    output: Path = option(
        "--output",
        default=Path("model.pt"),
        type=Path,
        metavar="FILE",
        help="where a copy of the model goes",
    )
    runs: Path = option(
        "--runs",
        default=Path("runs"),
        type=Path,
        metavar="FOLDER",
        help="where the folders of runs are",
    )
    name: str | None = option(
        "--name",
        default=None,
        type=_plain_name,
        metavar="NAME",
        help="the run's folder (default: data and recipe)",
    )
    resume: str = option(
        "--resume",
        default=AUTO,
        metavar="auto|never|PATH",
        help="go on from a run's last snapshot",
    )
    snapshot_steps: int = option(
        "--snapshot-steps",
        default=500,
        type=positive,
        metavar="N",
        help="steps between snapshots",
    )
    tensorboard: bool = option(
        "--tensorboard", default=False, action="store_true", help="write event files, too"
    )
    json: bool = option(
        "--json",
        default=False,
        action="store_true",
        help="print the final metrics as the last line",
    )


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    check_images: int | None = option(
        "--check-images",
        default=None,
        type=positive,
        metavar="N",
        help="images of each check (default: as many as take about two seconds, 4 to 64)",
    )
    check_every: int = option(
        "--check-every",
        default=1,
        type=positive,
        metavar="N",
        help="epochs between checks; there is one before the first step and at the end in any case",
    )


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    network: str = option(
        "--network",
        default=AUTO,
        choices=(AUTO, *FAMILIES),
        help="family of networks; auto takes post for one channel up to "
        f"{families.LARGEST_POST}x{families.LARGEST_POST}, else residual",
    )
    likelihood: str | None = option(
        "--likelihood",
        default=None,
        choices=tuple(LIKELIHOODS),
        help="of images given the decoder's outputs "
        + _by_family({name: make().likelihood for name, make in FAMILIES.items()}),
    )


@dataclass(frozen=True, kw_only=True)
class SizeOptions:
    num_codes: int | None = _size("--num-codes", "rows of the codebook")
    code_size: int | None = _size("--code-size", "elements of a codebook row")
    base_depth: int | None = _size("--base-depth", "channels of the outer convolutions")
    latent_size: int | None = _size("--latent-size", "latents, and so indices, per image")
    hidden: int | None = _size("--hidden", "channels")
    blocks: int | None = _size("--blocks", "residual blocks of encoder and of decoder")
    block_hidden: int | None = _size("--block-hidden", "channels within a block")
    downsample: int | None = _size("--downsample", "pixels to a side of a latent, a power of two")
    depth: int | None = _size("--depth", "latents at each place of the grid")


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """The fields of ``TrainingOptions``, each None unless it is given."""

    epochs: int | None = _recipe("--epochs", "passes over the images", type=int, metavar="N")
    batch_size: int | None = _recipe("--batch-size", "images per step", type=int, metavar="N")
    learning_rate: float | None = _recipe(
        "--learning-rate", "learning rate of Adam", type=float, metavar="X"
    )
    second_moment: float | None = _recipe(
        "--second-moment",
        "decay of Adam's mean of squared gradients (beta2)",
        type=float,
        metavar="X",
    )
    adam_epsilon: float | None = _recipe(
        "--adam-epsilon", "epsilon of Adam", type=float, metavar="X"
    )
    beta: float | None = _recipe("--beta", "weight of the commitment loss", type=float, metavar="X")
    dialect: str | None = _recipe(
        "--dialect",
        "whose rule the codebook's moving averages follow",
        choices=tuple(DIALECTS),
    )
    decay: float | None = _recipe(
        "--decay", "decay of the codebook's moving averages", type=float, metavar="X"
    )
    epsilon: float | None = _recipe(
        "--epsilon", "added to a code's count before it divides", type=float, metavar="X"
    )
    seed: int | None = _recipe(
        "--seed", "of the initial parameters and the order of the images", type=int, metavar="N"
    )
    center: bool | None = _switch(
        "--center", "start the last bias so that the first reconstructions are the mean pixel"
    )
    plain_steps: int | None = _recipe(
        "--plain-steps", "steps at the start without the codebook", type=int, metavar="N"
    )
    kmeans_start: bool | None = _switch(
        "--kmeans-start", "then set the codebook by k-means on the latents"
    )
    temperature: float | None = _recipe(
        "--temperature",
        "then draw codes near a latent, ever nearer; 0: the nearest",
        type=float,
        metavar="X",
    )
    anneal_until: float | None = _recipe(
        "--anneal-until",
        "share of all steps after which the nearest is taken",
        type=float,
        metavar="X",
    )
    revive_below: float | None = _recipe(
        "--revive-below",
        "reset codes used less than this share of the mean; 0: never",
        type=float,
        metavar="X",
    )
    cosine: bool | None = _switch("--cosine", "let the learning rate fall along half a cosine")
    precision: str | None = _recipe(
        "--precision",
        "of the products in training; auto takes bfloat16 if the device multiplies it",
        choices=(*TRAINED, AUTO),
    )


@dataclass(frozen=True, kw_only=True)
class TrainOptions(
    RecipeOptions, SizeOptions, NetworkOptions, CheckOptions, FileOptions, RunOptions
):
    """Everything that the command line says."""


GROUPS: Mapping[str, type[Any]] = {
    "": RunOptions,
    "files": FileOptions,
    "checks against the oracle": CheckOptions,
    "the network": NetworkOptions,
    "sizes of the network": SizeOptions,
    f"training (defaults of recipe {DEFAULT_RECIPE}; residual's for 3x32x32)": RecipeOptions,
}
"""The options by their titles in ``--help``."""


def train(options: TrainOptions) -> int:
    """Trains as the options say. Raises CommandError, and Interrupted if a signal came."""
    from vqtrain.device import choose_device, keep_freed_memory, refuse_variation
    from vqtrain.run.folder import open_run
    from vqtrain.run.narrator import say
    from vqtrain.run.snapshot import course_of
    from vqtrain.run.trainer import Trainer, Work, require_one_batch

    device = choose_device(options.device)
    changes = _changes(options, device)
    require_writable(options.output)
    if device.type == "cpu":
        keep_freed_memory()
    if options.deterministic:
        refuse_variation()
    images = load_source(options.data, say, options.resize)
    spec, sizes = build_spec(options, images)
    training = _replace(RECIPES[options.recipe](spec), changes)
    require_one_batch(images, training)
    say(f"network {_described(spec)}")
    if options.precision == AUTO:
        what = "card" if device.type == "cuda" else "processor"
        say(f"precision {training.precision}: what this {what} multiplies fastest")
    course = course_of(spec, training, sizes, images.sha256)
    default_name = f"{_short_name(images.source)}-{options.recipe}"
    folder, state = open_run(
        options.runs, options.name, default_name, options.resume, course, say, spec
    )
    try:
        folder.write_options(_resolved(options, training, spec, sizes))
        work = Work(
            device,
            folder,
            options.output,
            options.snapshot_steps,
            options.check_images,
            options.check_every,
            writer=_writer(folder) if options.tensorboard else None,
        )
        provenance = {
            "data": {
                "source": images.source,
                "sha256": images.sha256,
                "images": len(images.train),
            },
            "recipe": options.recipe,
            "seed": training.seed,
            "device": str(device),
            "versions": _versions(),
        }
        model = Trainer(spec, training, images, work, provenance, course, state).run()
    finally:
        folder.release()
    say(f"wrote {options.output}; pictures and metrics are in {folder.path}")
    say(f"next: python -m vqdeploy export {options.output}")
    if options.json:
        say(json.dumps({k: v for k, v in model.metrics.items() if k not in ("history", "oracle")}))
    return ExitCode.DONE


def build_spec(options: TrainOptions, images: ImageSet) -> tuple[ModelSpec, dict[str, int]]:
    """The network for these images, and all sizes of its family.

    Raises UsageError for a size that the family lacks or cannot have, InputError for images that it
    cannot take.
    """
    from vqtrain.run.metrics import LEAST_ERROR, variance_of

    shape = images.train.shape[1:]
    family = families.choose(shape) if options.network == AUTO else options.network
    known, given = families.sizes(family), _given(options, SizeOptions)
    for name in given:
        if name not in known:
            raise UsageError(f"--{_dashed(name)}: network {family} has no such size")
    sizes = {**known, **given}
    likelihood = {} if options.likelihood is None else {"likelihood": options.likelihood}
    variance = max(variance_of(images.train), LEAST_ERROR) if len(images.train) else 1.0
    try:
        return FAMILIES[family](shape, variance=variance, **sizes, **likelihood), sizes
    except ValueError as error:
        if str(error).startswith("image_shape"):
            raise InputError(f"{images.source}: {error}") from None
        raise UsageError(_dashed(str(error))) from None


def _changes(options: TrainOptions, device: torch.device) -> dict[str, Any]:
    """What the command line changes in a recipe. Raises UsageError for what no recipe can have."""
    from vqtrain.device import choose_precision

    changes = _given(options, RecipeOptions)
    if options.precision == AUTO:
        changes["precision"] = choose_precision(device)
    if options.precision == "tf32" and device.type == "cpu":
        raise UsageError(
            "--precision tf32: only a CUDA device has it; use float32, bfloat16 or auto"
        )
    _replace(TrainingOptions(), changes)
    return changes


def _given(options: TrainOptions, part: type[Any]) -> dict[str, Any]:
    """The options of a group that stand on the command line."""
    names = [field.name for field in dataclasses.fields(part)]
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def _replace(recipe: TrainingOptions, changes: Mapping[str, Any]) -> TrainingOptions:
    try:
        return dataclasses.replace(recipe, **changes)
    except ValueError as error:
        raise UsageError(_dashed(str(error))) from None


def _dashed(text: str) -> str:
    return text.replace("_", "-")


def _described(spec: ModelSpec) -> str:
    """The network in a few words: "post: 1x28x28 images, 1 latents, 64 codes, bernoulli"."""
    image, latents = ("x".join(map(str, shape)) for shape in (spec.image_shape, spec.latent_shape))
    return (
        f"{spec.family}: {image} images, {latents} latent{'s' if spec.latent_size > 1 else ''}, "
        f"{spec.num_codes} codes, {spec.likelihood}"
    )


def _resolved(
    options: TrainOptions, training: TrainingOptions, spec: ModelSpec, sizes: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
    """What ``--config`` needs to begin the same run: paths as given, the recipe spelt out."""
    fields = (*dataclasses.fields(RunOptions), *dataclasses.fields(FileOptions))
    names = [field.name for field in (*fields, *dataclasses.fields(CheckOptions))]
    left_out = ("config", "name", "resume", "json")
    given = {name: getattr(options, name) for name in names if name not in left_out}
    if options.resize:
        given["resize"] = "x".join(map(str, options.resize))
    return {
        "run": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in given.items()
            if value is not None
        },
        "training": training.to_dict(),
        "model": {"network": spec.family, "likelihood": spec.likelihood, **sizes},
    }


def _short_name(source: str) -> str:
    """What a run on these images is called: kmnist, glyphs, or the file without its ending."""
    official = any(source == train for train, _ in OFFICIAL_NAMES)
    return "kmnist" if official else Path(source).stem.split(" ")[0]


def _writer(folder: RunFolder) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MachineError(
            "--tensorboard: not installed; pip install 'portable-vqvae[tensorboard]'"
        ) from None
    return SummaryWriter(folder.path / "tensorboard")


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {
        name: version(name) for name in ("portable-vqvae", "numpy", "torch")
    }
