"""``python -m vqref vectors`` writes conformance vectors for implementations in any language."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vqref.errors import ExitCode
from vqref.host.commandline import Command, count, option
from vqref.host.files import write_file


@dataclass(frozen=True, kw_only=True)
class VectorsOptions:
    """Options of the command: where to write the vectors, and the seed to draw them with."""

    folder: Path = option(
        type=Path, metavar="DIR", help="folder to write to; replaces files of the same names"
    )
    seed: int = option("--seed", default=0, type=count, metavar="N", help="seed for random cases")


def run(options: VectorsOptions) -> int:
    """Writes the conformance vectors. Raises OSError if the folder cannot be written."""
    from vqref.checks.vectors import conformance_vectors

    files = conformance_vectors(options.seed)
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_file(options.folder / name, content)
    print(f"wrote {', '.join(files)} to {options.folder}")
    return ExitCode.DONE


COMMAND = Command("vectors", "write conformance vectors as JSON and npz", VectorsOptions, run)
