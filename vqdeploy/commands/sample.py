"""``vqdeploy sample``: draws a sheet of samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vqdeploy.commands.shared import BundleOptions, draw, opened, require_room
from vqref.errors import ExitCode
from vqref.host.commandline import Command, count, option, positive


@dataclass(frozen=True, kw_only=True)
class SampleOptions(BundleOptions):
    """How many samples, and the picture to draw."""

    output: Path = option(
        "--output", default=Path("samples.png"), type=Path, metavar="FILE", help="where to"
    )
    number: int = option("--number", default=64, type=positive, metavar="N", help="how many")
    seed: int = option("--seed", default=0, type=count, metavar="N", help="of the draw")


def run(options: SampleOptions) -> int:
    from vqdeploy.tokens import require_format

    require_format(options.output, (".png", ".PNG"))
    with opened(options, options.output) as codec:
        require_room("--number", options.number, codec.spec)
        draw(options.output, codec.sample(options.number, seed=options.seed))
        done = f"{options.number} samples of the uniform prior on {codec.device}"
        print(f"{done}; wrote {options.output}")
    return ExitCode.DONE


COMMAND = Command("sample", "a sheet of images of the uniform prior", SampleOptions, run)
