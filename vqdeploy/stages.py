"""The five graphs of a bundle and the arrays that enter and leave them.

Exporter, runtime and manifest all read this table.
"""

from __future__ import annotations

from dataclasses import dataclass

from vqref.prior import PriorSpec
from vqref.spec import ModelSpec

INDICES, INDEX_TYPES = "indices", ("int64", "int32")
"""The one port that graphs may have in several types. JavaScript has no arrays of int64 that it
counts with, and TensorRT computes in int32."""

PREVIOUS, POSITION = "previous", "position"
"""Ports of one step of a prior: indices, and the one that has no row per image."""


@dataclass(frozen=True)
class Port:
    """An input or output: its name in the vocabulary, dtype, and shape with "N" for the batch."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Stage:
    """One graph: the names of the arrays that it takes and gives."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


STAGES = {
    "encoder": Stage(("images",), ("latents",)),
    "quantizer": Stage(("latents",), ("indices", "quantized")),
    "decoder": Stage(("quantized",), ("outputs", "reconstructions")),
    "tokenizer": Stage(("images",), ("indices",)),
    "detokenizer": Stage(("indices",), ("reconstructions",)),
}
"""encoder, quantizer and decoder are one stage each; applications run tokenizer and detokenizer."""


PRIOR_STAGES = {
    "prior": Stage(("indices",), ("log_probabilities",)),
    "prior_step": Stage(
        (PREVIOUS, POSITION, "keys", "values"),
        ("log_probabilities", "next_keys", "next_values"),
    ),
}
"""Of a bundle with a prior: all positions at once, and one position after another."""


def ports(
    spec: ModelSpec, batch: int | None = None, index_type: str = INDEX_TYPES[0]
) -> dict[str, Port]:
    """Every array that enters or leaves a graph, by name.

    batch: the size of the first axis if graphs take one size alone, None if they take any.
    index_type: one of ``INDEX_TYPES``.
    """
    n: int | str = "N" if batch is None else batch
    latents = (n, spec.latent_size, spec.code_size)
    found = (
        Port("images", "float32", (n, *spec.image_shape)),
        Port("latents", "float32", latents),
        Port(INDICES, index_type, latents[:2]),
        Port("quantized", "float32", latents),
        Port("outputs", "float32", (n, *spec.output_shape)),
        Port("reconstructions", "float32", (n, *spec.image_shape)),
    )
    return {port.name: port for port in found}


def prior_ports(
    spec: PriorSpec, batch: int | None = None, index_type: str = INDEX_TYPES[0]
) -> dict[str, dict[str, Port]]:
    """Every array that enters or leaves each of ``PRIOR_STAGES``, by name. batch, index_type: as of
    ``ports``."""
    n: int | str = "N" if batch is None else batch
    places, width = spec.attention[0].in_shape if spec.rows else (spec.latent_size, 1)
    kept = (n, max(1, len(spec.attention)), places, width)
    whole = (
        Port(INDICES, index_type, (n, spec.latent_size)),
        Port("log_probabilities", "float32", (n, spec.latent_size, spec.num_codes)),
    )
    step = (
        Port(PREVIOUS, index_type, (n,)),
        Port(POSITION, "int64", (1,)),
        *(Port(name, "float32", kept) for name in ("keys", "values", "next_keys", "next_values")),
        Port("log_probabilities", "float32", (n, spec.num_codes)),
    )
    return {
        stage: {port.name: port for port in found}
        for stage, found in (("prior", whole), ("prior_step", step))
    }


def stage_of(name: str) -> Stage:
    """One of STAGES or PRIOR_STAGES."""
    return {**STAGES, **PRIOR_STAGES}[name]


def ports_of(
    stage: str, spec: ModelSpec | PriorSpec, batch: int | None, index_type: str
) -> dict[str, Port]:
    """The arrays of a stage, by name; spec: of the prior for one of PRIOR_STAGES."""
    if isinstance(spec, PriorSpec):
        return prior_ports(spec, batch, index_type)[stage]
    return ports(spec, batch, index_type)
