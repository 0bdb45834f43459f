"""``vqdeploy import``: turns a checkpoint of another library into a model.pt."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vqref.errors import ExitCode, UsageError
from vqref.host.commandline import Command, option, positive

if TYPE_CHECKING:
    from vqdeploy.importers import Imported

RANGES = {"-1,1": (-1.0, 1.0), "0,1": (0.0, 1.0)}


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What to import, and facts that its files do not state."""

    source: Path = option(type=Path, help="the checkpoint file, or its folder")
    output: Path = option(
        "--output", default=Path("model.pt"), type=Path, metavar="FILE", help="file to write"
    )
    config: Path | None = option(
        "--config",
        default=None,
        type=Path,
        metavar="FILE",
        help="configuration of the checkpoint (default: the .yaml or .json next to it)",
    )
    mapping: Path | None = option(
        "--mapping",
        default=None,
        type=Path,
        metavar="FILE",
        help="TOML file that describes the network of a state dict, and maps its names to ours",
    )
    model: Path | None = option(
        "--model",
        default=None,
        type=Path,
        metavar="FILE",
        help="the model.pt that receives a codebook of vector-quantize-pytorch",
    )
    image_size: int | None = option(
        "--image-size",
        default=None,
        type=positive,
        metavar="N",
        help="side of the images in pixels (default: from the configuration)",
    )
    range: str | None = option(
        "--range",
        default=None,
        choices=tuple(RANGES),
        help="value range of the images, for a model of diffusers (default: -1,1)",
    )
    weights: str | None = option(
        "--weights",
        default=None,
        choices=("ema", "model"),
        help="which weights of a LlamaGen checkpoint (default: ema if present, as in LlamaGen)",
    )
    digest: str | None = option(
        "--digest",
        default=None,
        metavar="SHA256",
        help="sha256 that the checkpoint must have; without it, a changed number goes unnoticed",
    )


def run(options: ImportOptions) -> int:
    from vqdeploy.importers import import_model
    from vqdeploy.importers.plan import Choices
    from vqdeploy.sources import write_model
    from vqref.host.files import require_writable

    if options.digest is not None and not re.fullmatch("[0-9a-fA-F]{64}", options.digest):
        raise UsageError(f"--digest is {options.digest!r:.80}, expected 64 hexadecimal digits")
    for path in (options.source, options.model):
        if path is not None and options.output.exists() and options.output.samefile(path):
            raise UsageError(f"--output {options.output} is a file to import; name another file")
    require_writable(options.output)
    choices = Choices(
        config=options.config,
        mapping=options.mapping,
        model=options.model,
        image_size=options.image_size,
        value_range=RANGES[options.range] if options.range else None,
        weights=options.weights,
    )
    found = import_model(options.source, choices, options.digest)
    write_model(options.output, found.model)
    print(_told(found))
    print(f"wrote {options.output}; next: python -m vqdeploy export {options.output}")
    return ExitCode.DONE


def _told(found: Imported) -> str:
    """Returns lines that say what was imported."""
    spec, params = found.model.spec, found.model.params
    numbers = sum(params[name].size for row in spec.layers for name, _ in row.parameters)
    grid = "×".join(map(str, spec.latent_shape))
    lines = [
        f"imported    {found.importer.what}: {found.checkpoint.path}",
        f"sha256      {found.checkpoint.sha256}",
        f"network     {spec.family}, images {spec.image_shape}",
        f"tokens      {grid} of {spec.num_codes} codes of {spec.code_size} numbers",
        f"parameters  {numbers:,} in {len(params) - 3} tensors, and the codebook",
        *(f"            {line}" for line in found.said),
    ]
    return "\n".join(lines)


COMMAND = Command(
    "import",
    "turn another library's checkpoint into a model.pt; every tensor is accounted for",
    ImportOptions,
    run,
)
