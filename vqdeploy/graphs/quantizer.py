"""Builds the quantizer from ONNX nodes: the twin of ``vqref.quantizer``.

Small codebooks use the direct form (x - c)^2. It has no matrix product that TF32 could round, and
no cancellation; see ``vqref.agreement.bounds`` for what its rounding can do to an index. Large
codebooks first use a product, to find the few groups of codes that may hold the nearest code, and
then the direct form on those groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vqdeploy.graphs.network import GraphBuilder
from vqdeploy.search import group_size, tile_size
from vqref.agreement.bounds import score_slack
from vqref.spec import CODEBOOK, ModelSpec
from vqref.validation import Array

PRODUCT_ELEMENTS = 2**13
"""From this many elements K*D of a codebook on, products are faster in onnxruntime. Measured by
``python -m benchmarks.codec``."""

DIRECT_ELEMENTS = 2**24
"""Up to this many elements S*K*D, the direct form's arrays are small: 64 MiB per image."""

FEWEST_CODES = 32
"""Fewer codes take the direct form."""

SHORT_CODE, CHEAP_ELEMENTS, SPLIT = 16, 2**16, 2.0**13 + 1
"""Codes of up to SHORT_CODE elements, and codebooks of up to CHEAP_ELEMENTS elements, have their
numbers split in two for the product, so that TF32 tells nearly as many codes apart as float32. In
few dimensions, many codes are near; for few codes, three products cost less than the groups that
TF32 leaves. SPLIT is the factor that splits a float32."""

WIDE = "int64"
"""The dtype of indices from ArgMin and for GatherND. Gather takes int32 too."""


def takes_products(spec: ModelSpec) -> bool:
    """Returns whether the codebook of a model of ``spec`` counts as large."""
    elements = spec.num_codes * spec.code_size
    large = elements >= PRODUCT_ELEMENTS or spec.latent_size * elements > DIRECT_ELEMENTS
    return large and spec.num_codes >= FEWEST_CODES


def takes_parts(spec: ModelSpec) -> bool:
    """Returns whether the numbers of a large codebook are split in two for the product."""
    return spec.code_size <= SHORT_CODE or spec.num_codes * spec.code_size <= CHEAP_ELEMENTS


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


def nearest(builder: GraphBuilder, spec: ModelSpec, latents: str, indices: str) -> str:
    """Adds nodes from latents (N, S, D) to indices (N, S).

    An index is the argmin over K of the sum over D of (latents - codebook)^2, the first on a tie.
    """
    search = by_products if takes_products(spec) else directly
    if builder.index_type == WIDE:
        return search(builder, spec, latents, indices)
    return builder.cast(
        search(builder, spec, latents, f"{indices}.wide"), indices, builder.index_type
    )


def directly(builder: GraphBuilder, spec: ModelSpec, latents: str, indices: str) -> str:
    """Adds the same with int64 indices, by the direct form."""
    node = Nodes(builder)
    column = node("Unsqueeze", [latents, node.axis(2)], "column")
    difference = node("Sub", [column, builder.parameter(CODEBOOK)], "difference")  # (N, S, K, D)
    square = node("Mul", [difference, difference], "square")
    distances = node("ReduceSum", [square, node.axis(3)], "distances", keepdims=0)  # (N, S, K)
    return builder.node("ArgMin", [distances], indices, axis=2, keepdims=0, select_last_index=0)


def by_products(builder: GraphBuilder, spec: ModelSpec, latents: str, indices: str) -> str:
    """Adds the same with int64 indices, in three steps.

    There are M = N*S latents and B groups of ``group_size`` consecutive codes.

    1. Find the least score ||c||^2 / 2 - x.c of each group, (M, B). The scores are products of the
       latents, extended by a one, and a tile of codes, which holds -c above ||c||^2 / 2.
    2. Find the P pairs of a latent and a group with a score within a margin of the latent's least.
    3. Use the direct form on those pairs, and take the first of the nearest codes.

    The margin allows for factors that the product rounds to TF32, so that a program that leaves
    TF32 on gets the same tokens. If a latent's score is not a number or its margin overflows, it is
    paired with every group, and the direct form alone decides.

    The graph holds at a time the scores of a tile, a few arrays (M, B), and two arrays of a group's
    codes per pair.
    """
    node, group = Nodes(builder), group_size(spec)
    codebook = np.asarray(builder.params[CODEBOOK], np.float32)
    count = -(-len(codebook) // group)
    copies = codebook[-1:].repeat(group * count - len(codebook), axis=0)  # fill the last group
    if len(copies):
        codes = node.constant("codes", np.concatenate([codebook, copies]))
    else:
        codes = builder.parameter(CODEBOOK)
    rows = node.reshaped(latents, "rows", -1, spec.code_size)  # (M, D)
    best, near = _near(node, spec, rows, np.concatenate([codebook, copies]), group)  # (M, B)
    groups = node.reshaped(codes, "groups", count, group, spec.code_size)
    least = _least(node, rows, groups, best, near, count)
    winner = node("ArgMin", [least], "winner", axis=1, keepdims=0, select_last_index=0)  # (M,)
    place = node("ArgMin", [_distances(node, rows, groups, winner, "own_")], "place", axis=1)
    start = node("Mul", [winner, node.constant("group_size", np.int64(group))], "winner_start")
    index = node("Add", [node.reshaped(start, "start", -1, 1), place], "index")
    if len(copies):  # rounding depends on the place, so a copy may come out nearer than its row
        index = node("Min", [index, node.constant("last", np.int64(len(codebook) - 1))], "bounded")
    shape = builder.integers("quantizer.indices_shape", [-1, spec.latent_size])
    return builder.node("Reshape", [index, shape], indices)


def _near(node: Nodes, spec: ModelSpec, rows: str, codebook: Array, group: int) -> tuple[str, str]:
    """Adds the least score of each group, and whether it may hold the nearest code, both (M, B).

    In a tile, the columns of the i-th codes of all groups lie side by side. So one ReduceMin takes
    the least of all its groups.
    """
    half_norms = np.square(codebook.astype(np.float64)).sum(axis=1, keepdims=True) / 2
    with np.errstate(over="ignore"):  # then the margin is infinite too
        wide = np.concatenate([-codebook, half_norms], axis=1).astype(np.float32)
    factors, ones, parts = rows, 1, takes_parts(spec)
    if parts:
        factors, ones, first = _in_parts(node, rows), 2, _first_part(wide)
        codes, half = np.split(first, [-1], axis=1)
        second, rest = np.split(wide - first, [-1], axis=1)
        wide = np.concatenate([codes, second, codes, half, rest], axis=1)
    ends = node.builder.integers("quantizer.ones", [0, 0, 0, ones])
    factors = node("Pad", [factors, ends, node.constant("one", np.float32(1))], "padded")
    bests: list[str] = []
    for tile in np.split(wide, range(tile_size(spec), len(wide), tile_size(spec))):
        number, beside = f"_{len(bests)}", len(tile) // group
        columns = tile.reshape(beside, group, -1).transpose(2, 1, 0).reshape(-1, len(tile))
        scores = node(
            "MatMul", [factors, node.constant(f"codes{number}", columns)], f"scores{number}"
        )
        shape = node.builder.integers(f"quantizer.tile_{len(tile)}", [-1, group, beside])
        grouped = node("Reshape", [scores, shape], f"grouped{number}")
        bests.append(node("ReduceMin", [grouped, node.axis(1)], f"best{number}", keepdims=0))
    best = bests[0] if len(bests) == 1 else node("Concat", bests, "best", axis=1)  # (M, B)
    least = node("ReduceMin", [best, node.axis(1)], "least", keepdims=1)  # (M, 1)
    margin = _margin(node, spec, rows, float(np.sqrt(2 * half_norms.max())), parts)
    far = node("Greater", [best, node("Add", [least, margin], "limit")], "far")
    return best, node("Not", [far], "near")  # a score that is not a number counts as near


def _first_part(numbers: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Returns the first 11 bits of each number, by the rule of ``_in_parts`` (Veltkamp 1968)."""
    with np.errstate(over="ignore", invalid="ignore"):
        moved = np.float32(SPLIT) * numbers
        return moved - (moved - numbers)


def _in_parts(node: Nodes, rows: str) -> str:
    """Adds the parts of numbers (M, D) for the product: first, first and second, (M, 3*D).

    They are multiplied by the first, the second and again the first parts of the codes.
    """
    moved = node("Mul", [rows, node.constant("split", np.float32(SPLIT))], "moved")
    first = node("Sub", [moved, node("Sub", [moved, rows], "moved_less")], "first_part")
    second = node("Sub", [rows, first], "second_part")
    return node("Concat", [first, first, second], "parts", axis=1)


def _margin(node: Nodes, spec: ModelSpec, rows: str, longest: float, parts: bool) -> str:
    """Adds the score margin (M, 1), by ``vqref.agreement.bounds.score_slack`` in TF32.

    The rounding of the margin itself, at most 8 units, is less than a thousandth of it.
    """
    slack = score_slack(spec.code_size, "tf32", parts=parts)
    longest *= 1.001
    numbers = {
        "longest": longest,
        "squares": 1.001 * slack.squares,
        "products": 1.001 * slack.products,
        "floor": 1.001 * (slack.floor + slack.products * longest**2 / 2),
    }
    with np.errstate(over="ignore"):
        values = {name: np.float32(value) for name, value in numbers.items()}
    constants = {name: node.constant(name, value) for name, value in values.items()}
    norm = node("ReduceL2", [rows, node.axis(1)], "norm", keepdims=1)
    both = node("Add", [norm, constants["longest"]], "norms")
    square = node("Mul", [both, both], "norms_squared")
    square = node("Mul", [square, constants["squares"]], "squares_margin")
    product = node("Mul", [norm, constants["longest"]], "norms_product")
    product = node("Mul", [product, constants["products"]], "products_margin")
    return node("Add", [node("Add", [square, product], "slopes"), constants["floor"]], "margin")


def _least(node: Nodes, rows: str, groups: str, best: str, near: str, count: int) -> str:
    """Adds the least distance of each latent in each near group, (M, B).

    Other groups get the largest number. That is safe: if a distance is infinite, so is the margin,
    and all groups are near. Pairs are (latent, group). The array to fill is made from the scores,
    which have its shape; a Shape node would run on the CPU.
    """
    pairs = node("NonZero", [near], "pairs")  # (2, P)
    row, group = (
        node("Gather", [pairs, node.constant(f"row_{i}", np.int64(i))], f"pair_{name}", axis=0)
        for i, name in enumerate(("row", "group"))
    )
    x = node("Gather", [rows, row], "pair_rows", axis=0)
    distances = _distances(node, x, groups, group, "pair_")
    least = node("ReduceMin", [distances, node.axis(1)], "pair_least", keepdims=0)
    largest = node.constant("largest", np.finfo(np.float32).max)
    empty = node.reshaped(node("Clip", [best, largest], "no_least"), "empty", -1)
    start = node("Mul", [row, node.constant("count", np.int64(count))], "pair_start")
    where = node("Add", [start, group], "places")  # in (M, B), of each pair
    filled = node("ScatterElements", [empty, where, least], "filled", axis=0)
    return node.reshaped(filled, "least_distances", -1, count)


def _distances(node: Nodes, rows: str, groups: str, chosen: str, name: str) -> str:
    """Adds the squared distances (P, group) of rows (P, D) to the codes of their groups.

    chosen: (P,), the number of each row's group.
    """
    x = node("Unsqueeze", [rows, node.axis(1)], f"{name}latents")  # (P, 1, D)
    codes = node("Gather", [groups, chosen], f"{name}codes", axis=0)  # (P, group, D)
    difference = node("Sub", [x, codes], f"{name}difference")
    square = node("Mul", [difference, difference], f"{name}square")
    return node("ReduceSum", [square, node.axis(2)], f"{name}distances", keepdims=0)


def lookup(builder: GraphBuilder, indices: str, quantized: str) -> str:
    """Adds nodes from indices (N, S) to quantized (N, S, D), rows of the codebook."""
    return builder.node("Gather", [builder.parameter(CODEBOOK), indices], quantized, axis=0)


def table(builder: GraphBuilder, entries: npt.NDArray[np.float32]) -> str:
    """Adds nodes from indices (N, S) to reconstructions (N, C, H, W).

    entries: the table of reconstructions, (K, ..., K, C, H, W).
    """
    indices = "indices"
    if builder.index_type != WIDE:
        indices = builder.cast(indices, "indices.wide", WIDE)
    return builder.node(
        "GatherND", [builder.constant("table", entries), indices], "reconstructions"
    )
