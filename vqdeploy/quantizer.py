"""The quantizer as ONNX nodes: the twin of ``vqref.quantizer``.

The direct form (x - c)^2 has no matrix product that TF32 could round, and no cancellation; see ``vqref.parity`` for what
its rounding can and cannot do to an index.
"""

from __future__ import annotations

from vqdeploy.network import GraphBuilder
from vqref.spec import CODEBOOK


def nearest(builder: GraphBuilder, latents: str, indices: str) -> str:
    """latents (N, S, D) to indices (N, S): argmin over K of the sum over D of (latents - codebook)^2, the first on a tie."""
    codebook = builder.parameter(CODEBOOK)
    column = builder.node("Unsqueeze", [latents, builder.integers("quantizer.code_axis", [2])], "quantizer.column")
    difference = builder.node("Sub", [column, codebook], "quantizer.difference")  # (N, S, K, D)
    square = builder.node("Mul", [difference, difference], "quantizer.square")
    axis = builder.integers("quantizer.element_axis", [3])
    distances = builder.node("ReduceSum", [square, axis], "quantizer.distances", keepdims=0)  # (N, S, K)
    return builder.node("ArgMin", [distances], indices, axis=2, keepdims=0, select_last_index=0)


def lookup(builder: GraphBuilder, indices: str, quantized: str) -> str:
    """indices (N, S) to quantized (N, S, D): rows of the codebook."""
    return builder.node("Gather", [builder.parameter(CODEBOOK), indices], quantized, axis=0)
