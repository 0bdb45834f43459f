"""Which ``pip install`` brings a library that is not there. Standard library only."""

from __future__ import annotations

from vqref.errors import MachineError

PACKAGE = "portable-vqvae"
"""What the three packages are installed as."""

EXTRAS = {
    "torch": "train",
    "scipy": "train",
    "onnx": "train",
    "tqdm": "train",
    "pooch": "train",
    "requests": "train",
    "filelock": "train",
    "tomli_w": "train",
    "bokeh": "train",
    "PIL": "pictures",
    "pyarrow": "parquet",
    "ray": "ray",
    "safetensors": "safetensors",
    "yaml": "import",
    "cryptography": "sign",
    "tensorboard": "tensorboard",
}
"""The extra of ``pyproject.toml`` that brings a library; the others come with every install."""


def missing(error: ModuleNotFoundError) -> MachineError | None:
    """The one line on a library that is not installed; None for a module of ours, or of no extra,
    whose absence is a bug."""
    library = (error.name or "").partition(".")[0]
    if library not in EXTRAS:
        return None
    extra = f"[{EXTRAS[library]}]'"
    return MachineError(
        f"{library} is not installed: pip install '{PACKAGE}{extra}, or '.{extra} in a clone"
    )
