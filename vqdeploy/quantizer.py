"""The quantizer as ONNX nodes: the twin of ``vqref.quantizer``.

Small codebooks take the direct form (x - c)^2, which has no matrix product that TF32 could round, and no cancellation; see
``vqref.parity`` for what its rounding can and cannot do to an index. Large ones take a product to find the few groups of
codes that may hold the nearest, and the direct form among those.
"""

from __future__ import annotations

import numpy as np

from vqdeploy.network import GraphBuilder
from vqref.bounds import distance_error
from vqref.spec import CODEBOOK, ModelSpec

PRODUCT_ELEMENTS = 2**13
"""Elements of a codebook, K*D, from which products are faster in onnxruntime: measured by ``python -m benchmarks.codec``."""

GROUP = 16
"""Codes of which only the best score is kept."""


def nearest(builder: GraphBuilder, spec: ModelSpec, latents: str, indices: str) -> str:
    """latents (N, S, D) to indices (N, S): argmin over K of the sum over D of (latents - codebook)^2, the first on a tie."""
    if takes_products(spec):
        return by_products(builder, spec, latents, indices)
    codebook = builder.parameter(CODEBOOK)
    column = builder.node("Unsqueeze", [latents, builder.integers("quantizer.code_axis", [2])], "quantizer.column")
    difference = builder.node("Sub", [column, codebook], "quantizer.difference")  # (N, S, K, D)
    distances = _squared(builder, difference, 3, "quantizer.distances")  # (N, S, K)
    return builder.node("ArgMin", [distances], indices, axis=2, keepdims=0, select_last_index=0)


def takes_products(spec: ModelSpec) -> bool:
    """Whether the codebook of a model of ``spec`` is a large one."""
    return spec.num_codes * spec.code_size >= PRODUCT_ELEMENTS and spec.num_codes >= 2 * GROUP


def by_products(builder: GraphBuilder, spec: ModelSpec, latents: str, indices: str) -> str:
    """The same. For M = N*S latents and B groups of codes in a row: the least score ||c||^2 / 2 - x.c of each group (M, B);
    the P pairs of a latent and a group whose score is within the margin of the latent's least; the direct form on those.

    The margin is twice what rounding can do, the factors of the product rounded to TF32, so that a program which leaves TF32
    on gets the same tokens. Scores that are not a number make every group a pair: then it is all direct.
    """

    def node(op: str, inputs: list[str], name: str, **attributes: object) -> str:
        return builder.node(op, inputs, f"quantizer.{name}", **attributes)

    def numbers(name: str, *values: int) -> str:
        return builder.integers(f"quantizer.{name}", values)

    first, second, third = numbers("axis_0", 0), numbers("axis_1", 1), numbers("axis_2", 2)
    infinity, nothing = (
        builder.constant("quantizer.infinity", np.float32(np.inf)),
        builder.constant("quantizer.zero", np.int64(0)),
    )

    codebook = np.asarray(builder.params[CODEBOOK], np.float32)
    count = -(-len(codebook) // GROUP)
    filled = np.concatenate([codebook, codebook[-1:].repeat(GROUP * count - len(codebook), axis=0)])  # the last row's copies
    half_norms = np.square(filled.astype(np.float64)).sum(axis=1) / 2
    codes = builder.constant("quantizer.codes", filled)
    groups = builder.constant("quantizer.groups", filled.reshape(count, GROUP, -1))

    rows = node("Reshape", [latents, numbers("rows_shape", -1, spec.code_size)], "rows")  # (M, D)
    with np.errstate(over="ignore"):  # then every margin is infinite, too, and it is all direct
        halves = builder.constant("quantizer.half_norms", half_norms.astype(np.float32))
    scores = node("Gemm", [rows, codes, halves], "scores", alpha=-1.0, transB=1)  # (M, B * GROUP)
    grouped = node("Reshape", [scores, numbers("groups_shape", -1, count, GROUP)], "grouped")
    best = node("ReduceMin", [grouped, third], "best", keepdims=0)  # (M, B)
    least = node("ReduceMin", [best, second], "least", keepdims=1)  # (M, 1)
    limit = node("Add", [least, _margin(builder, spec, rows, float(np.sqrt(2 * half_norms.max())))], "limit")
    far = node("Greater", [best, limit], "far")
    pairs = node("NonZero", [node("Not", [far], "near")], "pairs")  # (2, P)
    row = node("Squeeze", [node("Slice", [pairs, first, second, first], "pair_rows"), first], "row")  # (P,)
    group = node("Squeeze", [node("Slice", [pairs, second, numbers("two", 2), first], "pair_groups"), first], "group")

    x = node("Unsqueeze", [node("Gather", [rows, row], "pair_latents", axis=0), second], "pair_latent")  # (P, 1, D)
    candidates = node("Gather", [groups, group], "candidates", axis=0)  # (P, GROUP, D)
    distances = _squared(builder, node("Sub", [x, candidates], "difference"), 2, "quantizer.distances")  # (P, GROUP)
    nearest_distance = node("ReduceMin", [distances, second], "group_distance", keepdims=0)  # (P,)
    nearest_within = node("ArgMin", [distances], "group_within", axis=1, keepdims=0, select_last_index=0)

    where = node("Transpose", [pairs], "where", perm=[1, 0])  # (P, 2)
    infinities = node("Where", [far, infinity, infinity], "infinities")  # (M, B), without a Shape, which runs on the CPU
    zeros = node("Where", [far, nothing, nothing], "zeros")
    decided = node("ScatterND", [infinities, where, nearest_distance], "decided")
    within = node("ScatterND", [zeros, where, nearest_within], "within")
    winner = node("ArgMin", [decided], "winner", axis=1, keepdims=1, select_last_index=0)  # (M, 1)
    start = node("Mul", [winner, numbers("group_size", GROUP)], "winner_start")
    index = node("Add", [start, node("GatherElements", [within, winner], "winner_within", axis=1)], "index")
    if len(filled) > len(codebook):  # a copy may come out below its row: sums are rounded by their place
        index = node("Min", [index, numbers("last", len(codebook) - 1)], "index_of_a_row")
    return builder.node("Reshape", [index, numbers("indices_shape", -1, spec.latent_size)], indices)


def _margin(builder: GraphBuilder, spec: ModelSpec, rows: str, longest: float) -> str:
    """(M, 1): by how much the score of a code may exceed the least and the code be the nearest all the same, as
    ``vqref.bounds`` has it at ||x|| + ||c|| = 1, times the square of (||x|| + the longest ||c||). Its own rounding and that of
    the half norms, at most D + 8 units, is less than a thousandth of it."""

    def bound(distance: float, norm: float) -> float:
        norms = np.full((1, 1), norm), np.full(1, norm)
        forms = (("direct", "float32"), ("expanded", "tf32"))
        shape = np.full((1, 1), distance)
        return sum(
            float(distance_error(shape, *norms, spec.code_size, precision=precision, form=form)[0, 0])
            for form, precision in forms
        )

    slope, floor = (
        builder.constant(f"quantizer.{n}", np.float32(v)) for n, v in (("slope", 1.001 * bound(1, 0.5)), ("floor", bound(0, 0)))
    )
    norm = builder.node("ReduceL2", [rows, builder.integers("quantizer.axis_1", [1])], "quantizer.norm", keepdims=1)
    both = builder.node("Add", [norm, builder.constant("quantizer.longest", np.float32(1.001 * longest))], "quantizer.norms")
    square = builder.node("Mul", [both, both], "quantizer.norms_squared")
    return builder.node("Add", [builder.node("Mul", [square, slope], "quantizer.sloped"), floor], "quantizer.margin")


def _squared(builder: GraphBuilder, difference: str, axis: int, output: str) -> str:
    """The sum of squares along the last axis, which is ``axis``."""
    square = builder.node("Mul", [difference, difference], "quantizer.square")
    return builder.node("ReduceSum", [square, builder.integers(f"quantizer.axis_{axis}", [axis])], output, keepdims=0)


def lookup(builder: GraphBuilder, indices: str, quantized: str) -> str:
    """indices (N, S) to quantized (N, S, D): rows of the codebook."""
    return builder.node("Gather", [builder.parameter(CODEBOOK), indices], quantized, axis=0)
