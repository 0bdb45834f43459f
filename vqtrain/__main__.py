"""``python -m vqtrain``: trains a model on images, or measures one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vqref.commandline import ExitCode, InputError, Parser, positive, run
from vqref.spec import ModelSpec
from vqtrain.options import DEFAULT_RECIPE, PRECISIONS, RECIPES, TrainingOptions

OPTION_HELP = {
    "epochs": "passes over the images",
    "batch_size": "images a step",
    "learning_rate": "learning rate of Adam",
    "second_moment": "decay of Adam's mean of squared gradients (beta2)",
    "beta": "weight of the commitment loss",
    "decay": "decay of the codebook's moving averages",
    "epsilon": "added to a code's count before it divides",
    "seed": "of the initial parameters and the order of the images",
    "center": "start the last bias at the logit of the mean pixel",
    "plain_steps": "steps at the start without the codebook",
    "kmeans_start": "then set the codebook by k-means on the latents",
    "temperature": "then draw codes near a latent, ever nearer; 0: the nearest",
    "anneal_until": "share of all steps after which the nearest is taken",
    "revive_below": "reset codes used less than this share of the mean; 0: never",
    "cosine": "let the learning rate fall along half a cosine",
    "precision": f"of the products in training: {', '.join(PRECISIONS)}, or auto, bfloat16 where the device multiplies it",
}
SPEC_HELP = {
    "base_depth": "channels of the outer convolutions",
    "latent_size": "latents, and so indices, an image",
    "num_codes": "rows of the codebook",
    "code_size": "elements of a codebook row",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the process's exit status."""
    return run("vqtrain", command, argv)


def command(argv: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["evaluate"]:
        arguments = build_evaluate_parser().parse(words[1:])
        from vqtrain.evaluation import evaluate_command

        return evaluate_command(arguments)
    arguments = parse_with_config(build_parser(), words)
    from vqtrain.command import train_command

    train_command(arguments)
    return ExitCode.DONE


def build_parser() -> Parser:
    parser = Parser(
        prog="vqtrain",
        description="Train a VQ-VAE on images, held to the NumPy oracle as it goes.",
        epilog="python -m vqtrain evaluate model.pt measures a model: see vqtrain evaluate --help.",
    )
    _add_data(parser)
    parser.add_argument("--recipe", choices=sorted(RECIPES), default=DEFAULT_RECIPE, help="named set of training options")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", default=argparse.SUPPRESS, help="options from a run's options.toml"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train")
    parser.add_argument("--deterministic", action="store_true", help="refuse operations that vary from run to run")
    files = parser.add_argument_group("files")
    files.add_argument("--output", type=Path, default=Path("model.pt"), metavar="FILE", help="where a copy of the model goes")
    files.add_argument("--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="where the folders of runs are")
    files.add_argument("--name", metavar="NAME", default=argparse.SUPPRESS, help="the run's folder (default: data and recipe)")
    files.add_argument("--resume", metavar="auto|never|PATH", default="auto", help="go on from a run's last checkpoint")
    files.add_argument("--checkpoint-steps", type=positive, default=500, metavar="N", help="steps between checkpoints")
    files.add_argument("--tensorboard", action="store_true", help="write event files, too")
    files.add_argument("--json", action="store_true", help="print the final metrics as the last line")
    training = parser.add_argument_group("training", f"defaults are the recipe's; those of {DEFAULT_RECIPE} are shown")
    _add(training, RECIPES[DEFAULT_RECIPE], OPTION_HELP)
    _add(parser.add_argument_group("the model"), ModelSpec(), SPEC_HELP)
    return parser


def build_evaluate_parser() -> Parser:
    parser = Parser(prog="vqtrain evaluate", description="Measure a model on images: the held-out ones where there are any.")
    parser.add_argument("model", type=Path, help="the file that vqtrain wrote")
    _add_data(parser)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    parser.add_argument("--binarize", action="store_true", help="draw each pixel black or white by its grey level")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of --binarize and of the clustering floor")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser


def parse_with_config(parser: Parser, words: list[str]) -> argparse.Namespace:
    """The arguments, those of ``--config`` first, so that the command line has the last word.

    Raises InputError for a file that is not TOML or names an unknown option.
    """
    arguments = parser.parse(words)
    if not hasattr(arguments, "config"):
        return arguments
    from vqtrain.runs import read_options

    known = {action.dest: action for action in parser._actions}
    from_file: list[str] = []
    for key, value in read_options(arguments.config).items():
        if key not in known:
            raise InputError(f"{arguments.config}: unknown option {key}{parser.nearest('--' + key.replace('_', '-'))}")
        options = known[key].option_strings  # of a switch: the one that sets it, then perhaps the one that clears it
        if isinstance(value, bool):
            from_file += options[:1] if value else options[1:2]
        else:
            from_file += [options[0], str(value)]
    return parser.parse(from_file + words)


def _add_data(parser: Parser) -> None:
    parser.add_argument(
        "--data",
        default="auto",
        metavar="SOURCE",
        help="kmnist; glyphs, a generated set; auto, kmnist where it can be had, else glyphs; or a path: .npz, .npy, IDX, "
        "a folder of images or of the official files",
    )
    parser.add_argument("--resize", metavar="HxW", default=argparse.SUPPRESS, help="bring the images of a folder to this size")


def _add(group: argparse._ArgumentGroup, defaults: TrainingOptions | ModelSpec, described: dict[str, str]) -> None:
    """An option for each described field; absent from the result where it was not given, so that a recipe can fill it."""
    for name, what in described.items():
        default, option = getattr(defaults, name), f"--{name.replace('_', '-')}"
        if isinstance(default, bool):
            flag = argparse.BooleanOptionalAction
            group.add_argument(option, action=flag, default=argparse.SUPPRESS, help=f"{what} (default: {default})")
            continue
        group.add_argument(
            option,
            type=type(default),
            default=argparse.SUPPRESS,
            metavar={int: "N", float: "X", str: "NAME"}[type(default)],
            help=f"{what} (default: {default})",
        )


if __name__ == "__main__":
    sys.exit(main())
