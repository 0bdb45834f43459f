"""``python -m vqtrain``: trains a model on images and writes it to a file."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vqref.commandline import InputError, MachineError, Parser, UsageError, run
from vqref.spec import ModelSpec
from vqtrain.options import RECIPES, TrainingOptions

if TYPE_CHECKING:
    import torch

Options = TypeVar("Options", TrainingOptions, ModelSpec)

OPTION_HELP = {
    "epochs": "passes over the images",
    "batch_size": "images a step",
    "learning_rate": "learning rate of Adam",
    "beta": "weight of the commitment loss",
    "decay": "decay of the codebook's moving averages",
    "epsilon": "added to a code's count before it divides",
    "seed": "of the initial parameters and the order of the images",
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
    arguments = build_parser().parse(argv)
    options = _build(RECIPES[arguments.recipe], arguments, OPTION_HELP)
    sizes = _build(ModelSpec(), arguments, SPEC_HELP)

    from vqref.files import require_writable
    from vqref.images import load  # the heavy imports come after the options are known to be right
    from vqtrain.train import Trainer

    device = _device(arguments.device)
    require_writable(arguments.output)
    images = load(arguments.data)
    try:
        spec = dataclasses.replace(sizes, image_shape=images.train.shape[1:])
    except ValueError as error:
        raise InputError(f"{images.source}: {error}") from None
    provenance = {
        "data": {"source": images.source, "sha256": images.sha256, "images": len(images.train)},
        "recipe": arguments.recipe,
        "seed": options.seed,
        "device": str(device),
        "versions": _versions(),
    }
    Trainer(spec, options, images, device, arguments.output, provenance).run()
    print(f"wrote {arguments.output}; next: python -m vqdeploy export {arguments.output}")
    return 0


def build_parser() -> Parser:
    parser = Parser(prog="vqtrain", description="Train a VQ-VAE on images, held to the NumPy oracle as it goes.")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        default=argparse.SUPPRESS,
        metavar="PATH",
        help="images: an .npz, .npy or IDX file, or a folder that holds the official KMNIST files",
    )
    parser.add_argument("--output", type=Path, default=Path("model.pt"), metavar="FILE", help="where the model goes")
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="seed", help="named set of the options below")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train")
    training = parser.add_argument_group("training", "defaults are the recipe's; those of seed are shown")
    _add(training, RECIPES["seed"], OPTION_HELP)
    _add(parser.add_argument_group("the model"), ModelSpec(), SPEC_HELP)
    return parser


def _add(group: argparse._ArgumentGroup, defaults: TrainingOptions | ModelSpec, described: dict[str, str]) -> None:
    """An option for each described field; absent from the result where it was not given, so that a recipe can fill it."""
    for name, what in described.items():
        default = getattr(defaults, name)
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(default),
            default=argparse.SUPPRESS,
            metavar="N" if isinstance(default, int) else "X",
            help=f"{what} (default: {default})",
        )


def _build(defaults: Options, arguments: argparse.Namespace, described: dict[str, str]) -> Options:
    given: dict[str, Any] = {name: getattr(arguments, name) for name in described if hasattr(arguments, name)}
    try:
        return dataclasses.replace(defaults, **given)
    except ValueError as error:
        raise UsageError(str(error).replace("_", "-")) from None


def _device(name: str) -> torch.device:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise MachineError("--device cuda: PyTorch finds no CUDA device here; use --device cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _versions() -> dict[str, str]:
    import platform
    from importlib.metadata import version

    return {"python": platform.python_version()} | {name: version(name) for name in ("portable-vqvae", "numpy", "torch")}


if __name__ == "__main__":
    sys.exit(main())
