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
        help="kmnist; glyphs, a generated set; auto, kmnist if it can be had, else glyphs; or a "
        "path: .npz, .npy, IDX, a picture, a folder of pictures or of the official files; read as "
        "they are needed: parquet files and tars, a folder of them, a folder of .npy files",
    )
    held_out: float | Path | None = option(
        "--held-out",
        default=None,
        type=holdout.parse,
        metavar="PATH|FRACTION",
        help="images that are measured and not trained on: others, or a share of these by the hash "
        f"of each; 0: none (default: the source's own, else {holdout.FRACTION:g})",
    )
    recursive: bool = option(
        "--recursive",
        default=False,
        action="store_true",
        help="read the pictures of subfolders, too",
    )
    skip_bad: bool = option(
        "--skip-bad",
        default=False,
        action="store_true",
        help="leave out pictures that cannot be read, and say which",
    )


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """How shards are read, if the images are in such."""

    workers: int | None = option(
        "--workers",
        default=None,
        type=count,
        metavar="N",
        help="processes that decode images; 0: none but this one (default: one for each core but "
        "one)",
    )
    buffer: int | None = option(
        "--buffer",
        default=None,
        type=positive,
        metavar="N",
        help="images that are shuffled at once (default: 8192)",
    )
    max_broken: int | None = option(
        "--max-broken",
        default=None,
        type=count,
        metavar="N",
        help="broken images that are left out, and said, before a run stops (default: 0)",
    )

    def streaming(self) -> Streaming:
        """These options as ``load_source`` takes them."""
        return Streaming(self.workers, self.buffer, self.max_broken)


@dataclass(frozen=True, kw_only=True)
class ThreadOptions:
    """How many threads compute."""

    threads: int | None = option(
        "--threads",
        default=None,
        type=positive,
        metavar="N",
        help="threads that PyTorch computes with (default: its own choice)",
    )
