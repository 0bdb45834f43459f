"""``python -m vqtrain``: images, a run folder, a trainer."""

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
from vqtrain.options import DEFAULT_RECIPE, LARGE_CODEBOOK, RECIPES, SHORT_ROWS, TRAINED

if TYPE_CHECKING:
    from vqtrain.run.ranks import Ranks

AUTO = "auto"

EXACT = tuple(name for name in RECIPES if name != DEFAULT_RECIPE)
"""Recipes that are somebody's exactly, their arithmetic too."""


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


def integers(text: str) -> tuple[int, ...]:
    """The type of options like ``--multipliers``: integers with commas between them, or none."""
    return () if text == "none" else tuple(map(int, text.split(",")))


def _size(flag: str, help: str) -> Any:
    """A size of the network that is its family's unless it is given."""
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
    accumulate: int = option(
        "--accumulate",
        default=1,
        type=positive,
        metavar="N",
        help="passes, one after another, in which a step takes a batch that memory does not hold",
    )
    deterministic: bool = option(
        "--deterministic",
        default=False,
        action="store_true",
        help="refuse operations that vary from run to run",
    )


@dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """How pictures become images."""

    resize: tuple[int, int] | None = option(
        "--resize",
        default=None,
        type=parse_size,
        metavar="HxW",
        help="bring pictures to this size",
    )
    crop: bool = option(
        "--crop",
        default=False,
        action="store_true",
        help="of pictures of other proportions resize the middle, instead of stretching them",
    )
    background: Colour | None = option(
        "--background",
        default=None,
        type=parse_background,
        metavar="COLOUR",
        help="what transparent pictures are laid on: #rrggbb, white or black (default: white)",
    )
    channels: int | None = option(
        "--channels",
        default=None,
        type=int,
        choices=tuple(CHANNELS),
        help="1 makes pictures grey, 3 colour, 4 keeps their transparency (default: 1 if all are "
        "grey, else 3)",
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
        help="images of each check (default: as many as take about two seconds, 4 to 64, before "
        "the first step and at the end; after an epoch, one for each 800 trained on, at least 4)",
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
    code_size: int | None = _size(
        "--code-size",
        f"elements of a codebook row; recipe {DEFAULT_RECIPE} gives the rows of grids {SHORT_ROWS} "
        f"from {LARGE_CODEBOOK} codes up",
    )
    levels: tuple[int, ...] | None = _size(
        "--levels",
        "values of each element of a code, if the codebook is the grid of all of them: 8,8,8 has "
        "512 codes of 3",
    )
    normalized: bool | None = _size("--normalized", "codes and latents are unit vectors")
    base_depth: int | None = _size("--base-depth", "channels of the outer convolutions")
    latent_size: int | None = _size("--latent-size", "latents, and so indices, per image")
    hidden: int | None = _size("--hidden", "channels")
    blocks: int | None = _size(
        "--blocks", "residual blocks of encoder and of decoder, or of each level of the encoder"
    )
    block_hidden: int | None = _size("--block-hidden", "channels within a block")
    downsample: int | None = _size("--downsample", "pixels to a side of a latent, a power of two")
    depth: int | None = _size("--depth", "latents at each place of the grid")
    base_channels: int | None = _size("--base-channels", "channels that levels have a multiple of")
    multipliers: tuple[int, ...] | None = _size("--multipliers", "of each level, the finest first")
    attention: tuple[int, ...] | None = _size(
        "--attention", "sides of the levels with attention after each block, or none"
    )
    middle_attention: bool | None = _size(
        "--middle-attention", "attention between the two blocks next to the latents"
    )
    groups: int | None = _size("--groups", "of channels in every norm")
    latent_channels: int | None = _size("--latent-channels", "next to the 1x1 convolutions")


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
    precision: str | None = option(
        "--precision",
        default=None,
        choices=(*TRAINED, AUTO),
        help="of the products in training; auto takes bfloat16 if the device multiplies it "
        f"(default: auto; float32 for recipes {' and '.join(EXACT)}, which are exact)",
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
    """Everything that the command line says."""


GROUPS: Mapping[str, type[Any]] = {
    "": RunOptions,
    "pictures": PictureOptions,
    "shards that memory does not hold": StreamOptions,
    "files": FileOptions,
    "checks against the oracle": CheckOptions,
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
