"""What the commands that read images have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vqref.host.commandline import count, option, positive
from vqtrain.data import holdout
from vqtrain.data.streams import Streaming


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Where images come from, and which of them are held out."""

    data: str = option(
        "--data",
        default="auto",
        metavar="SOURCE",
        help="kmnist; glyphs (a generated set); auto (kmnist if available, else glyphs); or a "
        "path: .npz, .npy, IDX, a picture, a folder of pictures or of the official files. Read in "
        "pieces, as needed: parquet files, tars, a folder of these, a folder of .npy files",
    )
    held_out: float | Path | None = option(
        "--held-out",
        default=None,
        type=holdout.parse,
        metavar="PATH|FRACTION",
        help="images to measure on, not to train on: a path to other images, or the fraction of "
        "these to hold out, chosen by hash; 0: none (default: the source's own, else "
        f"{holdout.FRACTION:g})",
    )
    recursive: bool = option(
        "--recursive",
        default=False,
        action="store_true",
        help="also read the pictures in subfolders",
    )
    skip_bad: bool = option(
        "--skip-bad",
        default=False,
        action="store_true",
        help="skip pictures that cannot be read, and name them",
    )


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """How shards are read, if the images are in shards."""

    workers: int | None = option(
        "--workers",
        default=None,
        type=count,
        metavar="N",
        help="processes that decode images; 0: this process decodes them (default: one per core, "
        "less one)",
    )
    buffer: int | None = option(
        "--buffer",
        default=None,
        type=positive,
        metavar="N",
        help="images that are shuffled together (default: 8192)",
    )
    max_broken: int | None = option(
        "--max-broken",
        default=None,
        type=count,
        metavar="N",
        help="skip up to N broken images, with a message; stop if there are more (default: 0)",
    )

    def streaming(self) -> Streaming:
        """Returns these options as ``load_source`` takes them."""
        return Streaming(self.workers, self.buffer, self.max_broken)


@dataclass(frozen=True, kw_only=True)
class ThreadOptions:
    """How many threads compute."""

    threads: int | None = option(
        "--threads",
        default=None,
        type=positive,
        metavar="N",
        help="threads that PyTorch uses (default: PyTorch's choice)",
    )
