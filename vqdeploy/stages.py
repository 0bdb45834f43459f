"""The five graphs of a bundle and what enters and leaves them. Needs nothing: the exporter, the runtime and the manifest
all read it."""

from __future__ import annotations

from dataclasses import dataclass

from vqref.spec import ModelSpec


@dataclass(frozen=True)
class Port:
    """An input or output: its name in the vocabulary, dtype, and shape with "N" for the batch."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Stage:
    """One graph: the arrays that it takes and gives, by name."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


STAGES = {
    "encoder": Stage(("images",), ("latents",)),
    "quantizer": Stage(("latents",), ("indices", "quantized")),
    "decoder": Stage(("quantized",), ("logits", "probabilities")),
    "tokenizer": Stage(("images",), ("indices",)),
    "detokenizer": Stage(("indices",), ("probabilities",)),
}
"""encoder, quantizer and decoder are one stage each; tokenizer and detokenizer are what applications run."""


def ports(spec: ModelSpec, batch: int | None = None) -> dict[str, Port]:
    """Every array that enters or leaves a graph, by name; ``batch`` is the one size of the first axis, None: any."""
    n: int | str = "N" if batch is None else batch
    latents = (n, spec.latent_size, spec.code_size)
    images = (n, *spec.image_shape)
    found = (
        Port("images", "float32", images),
        Port("latents", "float32", latents),
        Port("indices", "int64", latents[:2]),
        Port("quantized", "float32", latents),
        Port("logits", "float32", images),
        Port("probabilities", "float32", images),
    )
    return {port.name: port for port in found}
