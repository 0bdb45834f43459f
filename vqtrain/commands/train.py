"""``python -m vqtrain``: reads images, opens a run folder, and trains."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqref import families
from vqref.dialects import DIALECTS
from vqref.errors import ExitCode, UsageError
from vqref.families import FAMILIES
from vqref.host.commandline import option, positive
from vqref.host.pictures import Reading
from vqref.likelihoods import LIKELIHOODS
from vqref.preprocessing import CHANNELS, WHITE, Colour
from vqtrain.commands.shared import SourceOptions, StreamOptions, ThreadOptions
from vqtrain.data.holdout import hold_out
from vqtrain.data.sources import load_source, parse_background, parse_size
from vqtrain.options import (
    DEFAULT_RECIPE,
    LARGE_CODEBOOK,
    OPTIMIZERS,
    RECIPES,
    SHORT_ROWS,
    TRAINED,
)

if TYPE_CHECKING:
    from vqtrain.run.ranks import Ranks

AUTO = "auto"

EXACT = tuple(name for name in RECIPES if name != DEFAULT_RECIPE)
"""Recipes that copy someone else's exactly, with its arithmetic."""


def _by_family(values: Mapping[str, Any]) -> str:
    """Describes the defaults of the families for ``--help``."""
    if len({*values.values()}) == 1:
        return f"(default: {next(iter(values.values()))})"
    return f"(default: {', '.join(f'{family} {value}' for family, value in values.items())})"


def _recipe(flag: str, help: str, **how: Any) -> Any:
    """Makes a training option whose default is the recipe's."""
    name = flag.removeprefix("--").replace("-", "_")
    defaults = {f: getattr(RECIPES[DEFAULT_RECIPE](make()), name) for f, make in FAMILIES.items()}
    return option(flag, default=None, help=f"{help} {_by_family(defaults)}", **how)


def _plain_name(text: str) -> str:
    """Parses ``--name``: the name of a folder inside the folder of runs."""
    if text in ("", ".", "..") or "/" in text or "\\" in text or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a folder")
    return text


def _switch(flag: str, help: str) -> Any:
    return _recipe(flag, help, action=argparse.BooleanOptionalAction)


def integers(text: str) -> tuple[int, ...]:
    """Parses options like ``--multipliers``: integers separated by commas, or none."""
    return () if text == "none" else tuple(map(int, text.split(",")))


def _size(flag: str, help: str) -> Any:
    """Makes an option for a size of the network whose default is its family's."""
    name = flag.removeprefix("--").replace("-", "_")
    defaults = {f: families.sizes(f)[name] for f in FAMILIES if name in families.sizes(f)}
    text = f"{help} {_by_family({f: families.spelt(size) for f, size in defaults.items()})}"
    if len(defaults) < len(FAMILIES):
        text = f"{', '.join(defaults)}: {text}"
    default, how = next(iter(defaults.values())), dict[str, Any](type=int, metavar="N")
    if isinstance(default, bool):
        how = {"action": argparse.BooleanOptionalAction}
    elif isinstance(default, tuple):
        how = {"type": integers, "metavar": "N,N,…"}
    return option(flag, default=None, help=text, **how)


@dataclass(frozen=True, kw_only=True)
class RunOptions(ThreadOptions, SourceOptions):
    """The recipe, the images, the device, and how each step runs."""

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
        help="read options from a run's options.toml; the command line overrides them",
    )
    device: str = option(
        "--device", default=AUTO, choices=(AUTO, "cpu", "cuda"), help="device to train on"
    )
    accumulate: int = option(
        "--accumulate",
        default=1,
        type=positive,
        metavar="N",
        help="split each batch into N passes, for batches that do not fit in memory",
    )
    deterministic: bool = option(
        "--deterministic",
        default=False,
        action="store_true",
        help="refuse operations whose results vary from run to run",
    )


@dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """How pictures become images."""

    resize: tuple[int, int] | None = option(
        "--resize",
        default=None,
        type=parse_size,
        metavar="HxW",
        help="resize pictures to this size",
    )
    crop: bool = option(
        "--crop",
        default=False,
        action="store_true",
        help="with --resize: cut out the middle in the right proportions, instead of stretching",
    )
    background: Colour | None = option(
        "--background",
        default=None,
        type=parse_background,
        metavar="COLOUR",
        help="colour behind transparent pictures: #rrggbb, white or black (default: white)",
    )
    channels: int | None = option(
        "--channels",
        default=None,
        type=int,
        choices=tuple(CHANNELS),
        help="1: grey; 3: colour; 4: colour with transparency (default: 1 if all are grey, else 3)",
    )


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    output: Path = option(
        "--output",
        default=Path("model.pt"),
        type=Path,
        metavar="FILE",
        help="where to write a copy of the model",
    )
    runs: Path = option(
        "--runs",
        default=Path("runs"),
        type=Path,
        metavar="FOLDER",
        help="folder of all runs",
    )
    name: str | None = option(
        "--name",
        default=None,
        type=_plain_name,
        metavar="NAME",
        help="name of the run's folder (default: DATA-RECIPE)",
    )
    resume: str = option(
        "--resume",
        default=AUTO,
        metavar="auto|never|PATH",
        help="auto: continue the last unfinished run with these options; PATH: continue that run",
    )
    snapshot_steps: int = option(
        "--snapshot-steps",
        default=500,
        type=positive,
        metavar="N",
        help="steps between snapshots",
    )
    tensorboard: bool = option(
        "--tensorboard", default=False, action="store_true", help="also write event files"
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
        help="images per check (default: one per 1600 images trained on, at least 4; at the end, "
        "4 to 64, about two seconds' work)",
    )
    check_every: int | None = option(
        "--check-every",
        default=None,
        type=positive,
        metavar="N",
        help="epochs between checks; there is always one before the first step and one at the end "
        "(default: a tenth of all epochs)",
    )
    pictures_every: int | None = option(
        "--pictures-every",
        default=None,
        type=positive,
        metavar="N",
        help="epochs between pictures in the run's folder; the last epoch always has some "
        "(default: a tenth of all epochs)",
    )


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    network: str = option(
        "--network",
        default=AUTO,
        choices=(AUTO, *FAMILIES),
        help="family of networks; auto: post for one channel up to "
        f"{families.LARGEST_POST}x{families.LARGEST_POST}, else residual",
    )
    likelihood: str | None = option(
        "--likelihood",
        default=None,
        choices=tuple(LIKELIHOODS),
        help="distribution of images given the decoder's outputs "
        + _by_family({name: make().likelihood for name, make in FAMILIES.items()}),
    )


@dataclass(frozen=True, kw_only=True)
class SizeOptions:
    num_codes: int | None = _size("--num-codes", "rows of the codebook")
    code_size: int | None = _size(
        "--code-size",
        f"elements per codebook row; recipe {DEFAULT_RECIPE} uses {SHORT_ROWS} for grids of "
        f"{LARGE_CODEBOOK} codes or more",
    )
    levels: tuple[int, ...] | None = _size(
        "--levels",
        "number of values of each element; the codebook is then the grid of all combinations: "
        "8,8,8 has 512 codes of 3 elements",
    )
    normalized: bool | None = _size("--normalized", "make codes and latents unit vectors")
    base_depth: int | None = _size("--base-depth", "channels of the outer convolutions")
    latent_size: int | None = _size("--latent-size", "latents per image; each gives one index")
    hidden: int | None = _size("--hidden", "channels")
    blocks: int | None = _size(
        "--blocks",
        "residual blocks in the encoder and the decoder, or in each level of the encoder",
    )
    block_hidden: int | None = _size("--block-hidden", "channels within a block")
    downsample: int | None = _size(
        "--downsample", "pixels per latent along each side, a power of two"
    )
    depth: int | None = _size("--depth", "latents at each place of the grid")
    base_channels: int | None = _size(
        "--base-channels", "channels of a level, before its multiplier"
    )
    multipliers: tuple[int, ...] | None = _size(
        "--multipliers", "multiplier of each level, finest first"
    )
    attention: tuple[int, ...] | None = _size(
        "--attention", "side lengths of levels that have attention after each block, or none"
    )
    middle_attention: bool | None = _size(
        "--middle-attention", "attention between the two blocks next to the latents"
    )
    groups: int | None = _size("--groups", "groups of channels in each norm")
    latent_channels: int | None = _size(
        "--latent-channels", "channels between the 3x3 and 1x1 convolutions at the latents"
    )


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """The fields of ``TrainingOptions``, each None unless it is given."""

    epochs: int | None = _recipe("--epochs", "passes over the images", type=int, metavar="N")
    batch_size: int | None = _recipe("--batch-size", "images per step", type=int, metavar="N")
    optimizer: str | None = _recipe(
        "--optimizer",
        "what moves the networks; muon: the convolutions, beside Adam for the rest",
        choices=OPTIMIZERS,
    )
    learning_rate: float | None = _recipe(
        "--learning-rate", "learning rate", type=float, metavar="X"
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
        "rule of the codebook's moving averages",
        choices=tuple(DIALECTS),
    )
    decay: float | None = _recipe(
        "--decay", "decay of the codebook's moving averages", type=float, metavar="X"
    )
    epsilon: float | None = _recipe(
        "--epsilon", "added to a code's count before dividing by it", type=float, metavar="X"
    )
    seed: int | None = _recipe(
        "--seed", "seed of the initial parameters and the order of images", type=int, metavar="N"
    )
    center: bool | None = _switch(
        "--center", "start the last bias so that the first reconstructions are the mean pixel"
    )
    plain_steps: int | None = _recipe(
        "--plain-steps", "steps at the start without the codebook", type=int, metavar="N"
    )
    kmeans_start: bool | None = _switch(
        "--kmeans-start", "after --plain-steps, set the codebook by k-means on the latents"
    )
    temperature: float | None = _recipe(
        "--temperature",
        "after --plain-steps, draw codes near each latent, ever nearer; 0: always the nearest",
        type=float,
        metavar="X",
    )
    anneal_until: float | None = _recipe(
        "--anneal-until",
        "share of all steps after which the nearest code is taken",
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
    precision: str | None = option(
        "--precision",
        default=None,
        choices=(*TRAINED, AUTO),
        help="precision of products in training; auto: bfloat16 if the device supports it, else "
        "float32 "
        f"(default: auto; float32 for the exact recipes {' and '.join(EXACT)})",
    )


@dataclass(frozen=True, kw_only=True)
class TrainOptions(
    RecipeOptions,
    SizeOptions,
    NetworkOptions,
    CheckOptions,
    FileOptions,
    PictureOptions,
    StreamOptions,
    RunOptions,
):
    """All options of the command line."""


GROUPS: Mapping[str, type[Any]] = {
    "": RunOptions,
    "pictures": PictureOptions,
    "shards that do not fit in memory": StreamOptions,
    "files": FileOptions,
    "checks and pictures": CheckOptions,
    "the network": NetworkOptions,
    "sizes of the network": SizeOptions,
    f"training (defaults of recipe {DEFAULT_RECIPE}; residual's for 3x32x32, "
    "vqgan's for 3x256x256)": RecipeOptions,
}
"""The options by their titles in ``--help``."""


def train(options: TrainOptions) -> int:
    """Trains as the options say, with the other ranks that torchrun started, if there are some.
    Raises CommandError, and Interrupted if a signal came."""
    from vqtrain.run.ranks import joined

    with joined(options.device) as ranks:
        return _train(options, ranks)


def _train(options: TrainOptions, ranks: Ranks) -> int:
    from vqtrain.run import narrator
    from vqtrain.training import OPTIONS, OptionError, make_plan, run

    say = narrator.say if ranks.first else _ignore
    reading = _reading(options)
    given = {each.name: getattr(options, each.name) for each in dataclasses.fields(options)}
    place = {name: given[name] for name in ("runs", "name", "output")}
    if not ranks.first:
        place["output"] = None
    here = {"bar": ranks.first, "pictures": ranks.first, "ranks": ranks}
    try:
        plan = make_plan({name: given[name] for name in OPTIONS}, **place, **here)
        with ranks.local_first():
            source = load_source(options.data, say, reading, options.streaming())
        images = hold_out(source, options.held_out, reading)
        model = run(images, plan, say, {**given, **_as_text(options)})
    except OptionError as error:
        raise UsageError(_dashed(f"--{error}" if error.named else str(error))) from None
    say(f"next: python -m vqdeploy export {options.output}")
    if options.json:
        say(json.dumps({k: v for k, v in model.metrics.items() if k not in ("history", "oracle")}))
    return ExitCode.DONE


def _ignore(line: str) -> None:
    """Says nothing."""


def _reading(options: TrainOptions) -> Reading:
    """How pictures are to be read. Raises UsageError for options that exclude each other."""
    if options.channels == 4 and options.background is not None:
        raise UsageError("--background: --channels 4 keeps what is transparent")
    return Reading(
        options.channels,
        options.resize,
        options.crop,
        options.background or WHITE,
        options.recursive,
        options.skip_bad,
    )


def _as_text(options: TrainOptions) -> dict[str, str]:
    """The options whose values TOML has no kind for, as the command line has them."""
    found = {}
    if options.resize is not None:
        found["resize"] = "x".join(map(str, options.resize))
    if options.background is not None:
        found["background"] = "#" + bytes(options.background).hex()
    return found


def _dashed(text: str) -> str:
    return text.replace("_", "-")
