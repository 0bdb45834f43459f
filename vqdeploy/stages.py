"""The five graphs of a bundle and the arrays that enter and leave them.

Exporter, runtime and manifest all read this table.
"""

from __future__ import annotations

from dataclasses import dataclass

from vqref.prior import PriorSpec
from vqref.spec import ModelSpec

INDICES, INDEX_TYPES = "indices", ("int64", "int32")
"""The only port whose dtype may be chosen. JavaScript cannot compute with arrays of int64 as with
other numbers, and TensorRT computes in int32."""

PREVIOUS, POSITION = "previous", "position"
"""Ports of one step of a prior: the indices of the previous position, one per image, and the
position, which all images share."""


@dataclass(frozen=True)
class Port:
    """An input or output: its name, dtype, and shape with "N" for the batch."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Stage:
    """One graph: the names of its inputs and outputs."""

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
"""The graphs of a prior: one takes all positions at once, the other one position per call."""


def ports(
    spec: ModelSpec, batch: int | None = None, index_type: str = INDEX_TYPES[0]
) -> dict[str, Port]:
    """Returns every array that enters or leaves a graph, by name.

    batch: the only size of the first axis that graphs take, or None if they take any size.
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
    """Returns the arrays that enter or leave each of ``PRIOR_STAGES``, by stage and name.

    batch, index_type: as for ``ports``.
    """
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
    """Returns the stage of this name in STAGES or PRIOR_STAGES."""
    return {**STAGES, **PRIOR_STAGES}[name]


def ports_of(
    stage: str, spec: ModelSpec | PriorSpec, batch: int | None, index_type: str
) -> dict[str, Port]:
    """Returns the arrays of a stage, by name.

    spec: the prior's for one of PRIOR_STAGES, the model's for the others.
    """
    if isinstance(spec, PriorSpec):
        return prior_ports(spec, batch, index_type)[stage]
    return ports(spec, batch, index_type)
