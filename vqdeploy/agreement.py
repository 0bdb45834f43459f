"""Compares the graphs of a bundle with the oracle: runs them, and ``vqref.agreement`` judges."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vqref.agreement.report import Report
from vqref.agreement.stages import Backend, compare
from vqref.model import Forward
from vqref.spec import ModelSpec
from vqref.validation import Array, Params

Sessions = Mapping[str, Callable[[Array], list[Array]]]
"""A function for each of STAGES, which takes its one input and returns its outputs."""


def check_graphs(
    spec: ModelSpec,
    params: Params,
    images: Array,
    sessions: Sessions,
    *,
    precision: str = "float32",
    folded: bool = False,
    known: Forward | None = None,
) -> Report:
    """Checks the five graphs on images (N, C, H, W) in [0, 1]; each takes the oracle's input.

    precision: the networks' precision, a name of ``vqref.agreement.TOLERANCES``. folded: whether
    the detokenizer is a table; a table is always float32. known: ``vqref.forward`` of the images,
    if the caller has it.
    """

    def quantizer(latents: Array) -> tuple[Array, Array]:
        indices, quantized = sessions["quantizer"](latents)
        return indices, quantized

    def decoder(quantized: Array) -> tuple[Array, Array]:
        outputs, reconstructions = sessions["decoder"](quantized)
        return outputs, reconstructions

    backend = Backend(
        precision=precision,
        quantizer_precision="float32",
        detokenizer_precision="float32" if folded else None,
        encoder=lambda images: sessions["encoder"](images)[0],
        quantizer=quantizer,
        decoder=decoder,
        tokenizer=lambda images: sessions["tokenizer"](images)[0],
        detokenizer=lambda indices: sessions["detokenizer"](indices)[0],
    )
    return compare(spec, params, images, backend, known=known)
