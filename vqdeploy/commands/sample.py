"""``vqdeploy sample``: draws a sheet of samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vqdeploy.commands.shared import BundleOptions, draw, opened, require_room
from vqref.errors import ExitCode, UsageError
from vqref.host.commandline import Command, count, option, positive
from vqref.validation import Array

if TYPE_CHECKING:
    from vqdeploy.codec import Codec


@dataclass(frozen=True, kw_only=True)
class SampleOptions(BundleOptions):
    """How many samples to draw, and the picture to write."""

    output: Path = option(
        "--output", default=Path("samples.png"), type=Path, metavar="FILE", help="PNG to write"
    )
    number: int = option(
        "--number", default=64, type=positive, metavar="N", help="number of samples"
    )
    seed: int = option("--seed", default=0, type=count, metavar="N", help="seed of the draw")
    temperature: float = option(
        "--temperature",
        default=1.0,
        type=float,
        metavar="X",
        help="for a learned prior: values below 1 give likelier images (default: 1)",
    )
    top_k: int | None = option(
        "--top-k",
        default=None,
        type=positive,
        metavar="N",
        help="for a learned prior: draw only from the N likeliest codes at each position",
    )


def run(options: SampleOptions) -> int:
    from vqdeploy.tokens import require_format

    require_format(options.output, (".png", ".PNG"))
    with opened(options, options.output) as codec:
        require_room("--number", options.number, codec.spec)
        of = "uniform" if codec.prior is None else codec.prior.kind
        images, told = _drawn(codec, options)
        draw(options.output, images)
        done = f"{options.number} samples of the {of} prior on {codec.device}{told}"
        print(f"{done}; wrote {options.output}")
    return ExitCode.DONE


def _drawn(codec: Codec, options: SampleOptions) -> tuple[Array, str]:
    """Returns the images, and a remark on how many are the same on every machine.

    Raises UsageError.
    """
    if codec.prior is None:
        if options.temperature != 1.0 or options.top_k is not None:
            raise UsageError("--temperature and --top-k need a bundle with a learned prior")
        return codec.sample(options.number, seed=options.seed), ""
    try:
        images, sure = codec.sample(
            options.number,
            seed=options.seed,
            temperature=options.temperature,
            top_k=options.top_k,
            certify=True,
        )
    except ValueError as error:
        raise UsageError(f"--{error}") from None
    return images, f", {sure.sum()} certified"


COMMAND = Command("sample", "draw a sheet of images from the prior", SampleOptions, run)
