"""Tells which ``pip install`` brings a missing library. Standard library only."""

from __future__ import annotations

from vqref.errors import MachineError

PACKAGE = "portable-vqvae"
"""The name under which the three packages are installed."""

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
"""The extra of ``pyproject.toml`` that brings each library. The others come with every install."""


def missing(error: ModuleNotFoundError) -> MachineError | None:
    """Returns the one-line error for a library that is not installed.

    Returns None for a module of ours, or one that no extra brings: then its absence is a bug.
    """
    library = (error.name or "").partition(".")[0]
    if library not in EXTRAS:
        return None
    extra = f"[{EXTRAS[library]}]'"
    return MachineError(
        f"{library} is not installed: pip install '{PACKAGE}{extra}, or '.{extra} in a clone"
    )
