"""The quantizer as ONNX nodes: the twin of ``vqref.quantizer``.

Small codebooks take the direct form (x - c)^2, in which there is no matrix product that TF32 could
round and no cancellation; see ``vqref.agreement.bounds`` for what its rounding can do to an index.
Large ones take a product to find the few groups of codes that may hold the nearest, and the direct
form among those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vqdeploy.graphs.network import GraphBuilder
from vqref.agreement.bounds import distance_error
from vqref.spec import CODEBOOK, ModelSpec
from vqref.validation import Array

PRODUCT_ELEMENTS = 2**13
"""Elements of a codebook, K*D, from which products are faster in onnxruntime: measured by
``python -m benchmarks.codec``."""

DIRECT_ELEMENTS = 2**24
"""Elements, S*K*D, up to which the direct form's arrays, 64 MiB per image, are still small."""

GROUP = 16
"""Codes of which only the best score is kept."""

WIDE = "int64"
"""The type in which ArgMin gives places and GatherND takes them; Gather takes int32, too."""


def takes_products(spec: ModelSpec) -> bool:
    """Returns whether the codebook of a model of ``spec`` is a large one."""
    elements = spec.num_codes * spec.code_size
    large = elements >= PRODUCT_ELEMENTS or spec.latent_size * elements > DIRECT_ELEMENTS
    return large and spec.num_codes >= 2 * GROUP


class Nodes:
    """Adds nodes and tensors whose names begin with "quantizer."."""

    def __init__(self, builder: GraphBuilder) -> None:
        self.builder = builder

    def __call__(self, op: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        return self.builder.node(op, inputs, f"quantizer.{name}", **attributes)

    def constant(self, name: str, value: npt.ArrayLike) -> str:
        return self.builder.constant(f"quantizer.{name}", value)

    def axis(self, number: int) -> str:
        return self.builder.integers(f"quantizer.axis_{number}", [number])

    def reshaped(self, x: str, name: str, *shape: int) -> str:
        return self("Reshape", [x, self.builder.integers(f"quantizer.{name}_shape", shape)], name)

    def squared(self, difference: str, axis: int) -> str:
        """The sum of squares along the last axis, which is ``axis``."""
        square = self("Mul", [difference, difference], "square")
        return self("ReduceSum", [square, self.axis(axis)], "distances", keepdims=0)


def nearest(builder: GraphBuilder, spec: ModelSpec, latents: str, indices: str) -> str:
    """Adds what maps latents (N, S, D) to indices (N, S), the argmin over K of the sum over D of
    (latents - codebook)^2, the first on a tie."""
    search = by_products if takes_products(spec) else directly
    if builder.index_type == WIDE:
        return search(builder, spec, latents, indices)
    return builder.cast(
        search(builder, spec, latents, f"{indices}.wide"), indices, builder.index_type
    )


def directly(builder: GraphBuilder, spec: ModelSpec, latents: str, indices: str) -> str:
    """Adds the same, in int64, by the direct form."""
    node = Nodes(builder)
    column = node("Unsqueeze", [latents, node.axis(2)], "column")
    difference = node("Sub", [column, builder.parameter(CODEBOOK)], "difference")  # (N, S, K, D)
    distances = node.squared(difference, 3)  # (N, S, K)
    return builder.node("ArgMin", [distances], indices, axis=2, keepdims=0, select_last_index=0)


def by_products(builder: GraphBuilder, spec: ModelSpec, latents: str, indices: str) -> str:
    """Adds the same, in int64, in three steps. M = N*S latents, B groups of ``GROUP`` consecutive
    codes.

    1. The least score ||c||^2 / 2 - x.c of each group, (M, B).
    2. The P pairs of a latent and a group whose score is within a margin of the latent's least.
    3. The direct form on those pairs, and the first of the nearest.

    The margin allows for factors of the product that are rounded to TF32, so that a program that
    leaves TF32 on gets the same tokens. Latents whose scores are not a number or whose margin
    overflows have every group as a pair: the direct form decides alone.

    The graph holds M*K scores and, at a time, two arrays of GROUP*D numbers per pair.
    """
    node = Nodes(builder)
    codebook = np.asarray(builder.params[CODEBOOK], np.float32)
    count = -(-len(codebook) // GROUP)
    copies = codebook[-1:].repeat(GROUP * count - len(codebook), axis=0)  # fill the last group
    if len(copies):
        codes = node.constant("codes", np.concatenate([codebook, copies]))
    else:
        codes = builder.parameter(CODEBOOK)
    rows = node.reshaped(latents, "rows", -1, spec.code_size)  # (M, D)
    near = _near(node, spec, rows, codes, np.concatenate([codebook, copies]))  # (M, B)
    flat = node.reshaped(near, "flat_near", -1)
    pairs = node("Squeeze", [node("NonZero", [flat], "where"), node.axis(0)], "pairs")  # (P,)
    groups = node.reshaped(codes, "groups", count, GROUP, spec.code_size)
    distance, place = _compared(node, rows, groups, pairs, count)
    decided = _scattered(node, near, pairs, distance, np.float32(np.inf), count)
    within = _scattered(node, near, pairs, place, np.int64(0), count)
    winner = node("ArgMin", [decided], "winner", axis=1, keepdims=1, select_last_index=0)  # (M, 1)
    start = node("Mul", [winner, node.constant("group_size", np.int64(GROUP))], "winner_start")
    place = node("GatherElements", [within, winner], "winner_place", axis=1)
    index = node("Add", [start, place], "index")
    if len(copies):  # sums are rounded by their place: a copy may come out below its row
        index = node("Min", [index, node.constant("last", np.int64(len(codebook) - 1))], "bounded")
    shape = builder.integers("quantizer.indices_shape", [-1, spec.latent_size])
    return builder.node("Reshape", [index, shape], indices)


def _near(node: Nodes, spec: ModelSpec, rows: str, codes: str, codebook: Array) -> str:
    """Whether a group may hold the nearest code of a latent, (M, B)."""
    half_norms = np.square(codebook.astype(np.float64)).sum(axis=1) / 2
    with np.errstate(over="ignore"):  # then the margin is infinite, too
        halves = node.constant("half_norms", half_norms.astype(np.float32))
    scores = node("Gemm", [rows, codes, halves], "scores", alpha=-1.0, transB=1)
    grouped = node.reshaped(scores, "grouped", -1, len(codebook) // GROUP, GROUP)
    best = node("ReduceMin", [grouped, node.axis(2)], "best", keepdims=0)  # (M, B)
    least = node("ReduceMin", [best, node.axis(1)], "least", keepdims=1)  # (M, 1)
    margin = _margin(node, spec, rows, float(np.sqrt(2 * half_norms.max())))
    far = node("Greater", [best, node("Add", [least, margin], "limit")], "far")
    return node("Not", [far], "near")  # so is what is not a number


def _margin(node: Nodes, spec: ModelSpec, rows: str, longest: float) -> str:
    """The score margin, (M, 1): a code whose score is further from the least cannot win.

    Scores are half distances and two of them err, so the margin is the error of a direct distance
    in float32 and that of an expanded one in TF32, as ``vqref.agreement.bounds`` has them, for the
    longest code: at most squares * (||x|| + ||c||)^2 + products * ||x|| * ||c|| + floor, where
    products is what the rounding of factors adds. The rounding of the margin itself and of the half
    norms, at most D + 8 units, is less than a thousandth of it.
    """

    def bound(distance: float, latent_norm: float, code_norm: float) -> float:
        args = np.full((1, 1), distance), np.full((1, 1), latent_norm), np.full(1, code_norm)
        direct = distance_error(*args, spec.code_size, precision="float32", form="direct")
        expanded = distance_error(*args, spec.code_size, precision="tf32", form="expanded")
        return float((direct + expanded)[0, 0])

    squares = bound(1, 0, 1)
    numbers = {
        "longest": 1.001 * longest,
        "squares": 1.001 * squares,
        "products": 1.001 * 4 * (bound(1, 0.5, 0.5) - squares),
        "floor": bound(0, 0, 0),
    }
    constants = {name: node.constant(name, np.float32(value)) for name, value in numbers.items()}
    norm = node("ReduceL2", [rows, node.axis(1)], "norm", keepdims=1)
    both = node("Add", [norm, constants["longest"]], "norms")
    square = node("Mul", [both, both], "norms_squared")
    square = node("Mul", [square, constants["squares"]], "squares_margin")
    product = node("Mul", [norm, constants["longest"]], "norms_product")
    product = node("Mul", [product, constants["products"]], "products_margin")
    return node("Add", [node("Add", [square, product], "slopes"), constants["floor"]], "margin")


def _compared(node: Nodes, rows: str, groups: str, pairs: str, count: int) -> tuple[str, str]:
    """For each pair the least distance in its group and the place of the code there, (P,) both."""
    groups_per_row = node.constant("group_count", np.int64(count))
    row = node("Div", [pairs, groups_per_row], "row")
    group = node("Mod", [pairs, groups_per_row], "group")
    x = node("Gather", [rows, row], "pair_rows", axis=0)
    x = node("Unsqueeze", [x, node.axis(1)], "pair_latents")  # (P, 1, D)
    candidates = node("Gather", [groups, group], "candidates", axis=0)  # (P, GROUP, D)
    distances = node.squared(node("Sub", [x, candidates], "difference"), 2)  # (P, GROUP)
    least = node("ReduceMin", [distances, node.axis(1)], "pair_distance", keepdims=0)
    place = node("ArgMin", [distances], "pair_place", axis=1, keepdims=0, select_last_index=0)
    return least, place


def _scattered(
    node: Nodes, near: str, pairs: str, values: str, other: np.generic, count: int
) -> str:
    """``values`` (P,) at their pairs in (M, B), ``other`` elsewhere. Where knows that shape without
    a Shape node, which would run on the CPU."""
    name = values.removeprefix("quantizer.")
    default = node.constant(f"no_{name}", other)
    empty = node("Where", [near, default, default], f"{name}_defaults")
    empty = node.reshaped(empty, f"{name}_empty", -1)
    filled = node("ScatterElements", [empty, pairs, values], f"{name}_filled", axis=0)
    return node.reshaped(filled, f"{name}_by_group", -1, count)


def lookup(builder: GraphBuilder, indices: str, quantized: str) -> str:
    """Adds what maps indices (N, S) to quantized (N, S, D): rows of the codebook."""
    return builder.node("Gather", [builder.parameter(CODEBOOK), indices], quantized, axis=0)


def table(builder: GraphBuilder, entries: npt.NDArray[np.float32]) -> str:
    """Adds what maps indices (N, S) to reconstructions (N, C, H, W), which are the entries
    (K, ..., K, C, H, W) of a table."""
    indices = "indices"
    if builder.index_type != WIDE:
        indices = builder.cast(indices, "indices.wide", WIDE)
    return builder.node(
        "GatherND", [builder.constant("table", entries), indices], "reconstructions"
    )
