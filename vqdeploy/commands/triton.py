"""``vqdeploy triton``: writes a bundle as a model repository of Triton."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from vqref.errors import ExitCode
from vqref.host.commandline import Command, option, positive, whole

MOST_INSTANCES = 1024


def _prefix(text: str) -> str:
    """Parses --prefix."""
    if not re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9_.-]{0,100})?", text, re.ASCII):
        raise argparse.ArgumentTypeError(
            f"{text!r} must consist of letters, digits, '_', '.' and '-'"
        )
    return text


@dataclass(frozen=True, kw_only=True)
class TritonOptions:
    """Which bundle to take, and the repository to write."""

    bundle: Path = option(type=Path, help="the folder that export wrote")
    repository: Path = option(type=Path, help="the model repository (a folder) to write")
    prefix: str = option(
        "--prefix",
        default="",
        type=_prefix,
        metavar="TEXT",
        help="prefix of the models' names (default: nothing)",
    )
    instances: int = option(
        "--instances",
        default=1,
        type=whole(1, MOST_INSTANCES),
        metavar="N",
        help="instances of each model, per GPU or on the CPU",
    )
    max_batch: int | None = option(
        "--max-batch",
        default=None,
        type=positive,
        metavar="N",
        help="the largest batch (default: the same as for a Codec)",
    )
    replace: bool = option(
        "--replace", default=False, action="store_true", help="replace the folder if there is one"
    )


def run(options: TritonOptions) -> int:
    from vqdeploy.bundle import Bundle
    from vqdeploy.triton import write_repository

    names = write_repository(
        Bundle.open(options.bundle),
        options.repository,
        prefix=options.prefix,
        instances=options.instances,
        most=options.max_batch,
        replace=options.replace,
    )
    print(f"{len(names)} models, {', '.join(names)}; wrote {options.repository}")
    return ExitCode.DONE


COMMAND = Command(
    "triton",
    "write a bundle as a model repository of the Triton Inference Server",
    TritonOptions,
    run,
)
