"""The ONNX interpreter of the rows: the same kinds under the same names as ``vqref.network``.

Each function appends the nodes that compute a row and returns the name of its value. Weights become
tensors under the spec's parameter names.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vqdeploy.runtime.protobuf import DTYPE_NUMBERS, Node, Tensor, attributes_of
from vqdeploy.stages import INDEX_TYPES
from vqref.network import (
    GROUP_EPSILON,
    LEAST_LENGTH,
    NORM_EPSILON,
    bounds_of,
    upsample_factor,
)
from vqref.spec import Layer, plan
from vqref.validation import Array, Params

GRAPH_BYTES = 2**31 - 2**20
"""The most bytes that weights may take: protobuf's 2 GiB, less what the nodes need."""


class GraphBuilder:
    """Collects nodes and tensors in order. Values and nodes get the names of their rows.

    half: compute rows in float16, between casts; everything else stays float32.
    for_processor: choose nodes that onnxruntime computes faster on a CPU than the usual ones.
    index_type: the dtype of the graph's ``indices``.
    """

    def __init__(
        self,
        params: Params,
        *,
        half: bool = False,
        for_processor: bool = False,
        index_type: str = INDEX_TYPES[0],
    ) -> None:
        self.params = params
        self.half, self.for_processor, self.index_type = half, for_processor, index_type
        self.nodes: list[Node] = []
        self.tensors: dict[str, Tensor] = {}
        self.bytes = 0

    def parameter(self, name: str) -> str:
        """Adds a parameter as a float32 tensor and returns its name."""
        return self.constant(name, np.asarray(self.params[name], np.float32))

    def weights(self, layer: Layer) -> list[str]:
        """Adds weight and bias of a row, in the precision of rows, and returns their names.

        Raises ValueError if float16 cannot hold a value.
        """
        return [
            self.constant(name, self.rounded(name, self.params[name]))
            for name, _ in layer.parameters
        ]

    def rounded(self, name: str, array: npt.ArrayLike) -> Array:
        """Returns an array in the precision of rows.

        Raises ValueError if float16 cannot hold a value.
        """
        values = np.asarray(array, np.float32)
        if self.half:
            with np.errstate(over="ignore"):
                values = values.astype(np.float16)
            if not np.isfinite(values).all():
                raise ValueError(f"{name}: holds values beyond float16's 65504")
        return values

    def constant(self, name: str, array: npt.ArrayLike) -> str:
        """Adds a tensor, unless there is one of this name, and returns the name.

        Raises ValueError if the graph would be too large for protobuf.
        """
        if name not in self.tensors:
            values = np.asarray(array, order="C")
            if sys.byteorder == "big":
                values = values.byteswap()
            self.bytes += values.nbytes
            if self.bytes > GRAPH_BYTES:
                raise ValueError(
                    f"{name}: its graph would hold {self.bytes / 2**30:.2f} GiB of weights, more "
                    f"than the 2 GiB that an ONNX file can hold"
                )
            content = values.reshape(-1).view(np.uint8).data
            self.tensors[name] = Tensor(values.dtype.name, values.shape, content)
        return name

    def integers(self, name: str, values: Sequence[int]) -> str:
        """Adds a tensor of int64 values (axes, shapes, bounds) and returns its name."""
        return self.constant(name, np.array(values, np.int64))

    def node(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Adds a node with one output, which also names the node, and returns the output."""
        self.nodes.append(Node(output, op, tuple(inputs), (output,), attributes_of(attributes)))
        return output

    def cast(self, x: str, output: str, dtype: str) -> str:
        """Adds a cast of value ``x`` and returns the output."""
        return self.node("Cast", [x], output, to=DTYPE_NUMBERS[dtype])

    def run(self, layers: Sequence[Layer], x: str, output: str) -> str:
        """Adds the rows of one network, from value ``x`` to value ``output``."""
        last = f"{output}.half" if self.half else output
        if self.half:
            x = self.cast(x, f"{layers[0].name}.half", "float16")
        values = [x]
        for step in plan(layers):
            name = last if step.layer is layers[-1] else step.layer.name
            values.append(self._row(step.layer, name, [values[i] for i in step.sources]))
        return self.cast(last, output, "float32") if self.half else last

    def _row(self, layer: Layer, output: str, inputs: list[str]) -> str:
        if layer.activation == "linear":
            return KINDS[layer.kind](self, layer, output, *inputs)
        before = KINDS[layer.kind](self, layer, f"{output}.linear", *inputs)
        return ACTIVATIONS[layer.activation](self, output, before)


def affine(builder: GraphBuilder, layer: Layer, output: str, x: str) -> str:
    scale, shift = (builder.rounded(layer.name, value) for value in (layer.scale, layer.shift))
    return scaled(builder, output, x, scale, shift)


def scaled(builder: GraphBuilder, output: str, x: str, scale: Array, shift: Array) -> str:
    """Adds scale * x + shift. The constants have the precision of ``x``."""
    x = builder.node("Mul", [x, builder.constant(f"{output}.scale", scale)], f"{output}.scaled")
    return builder.node("Add", [x, builder.constant(f"{output}.shift", shift)], output)


def conv(builder: GraphBuilder, layer: Layer, output: str, x: str) -> str:
    """Adds a convolution with equal pads at both ends of an axis.

    cuDNN may have no engine for unequal pads. If the row's pads are unequal, this takes the
    smallest equal pads whose windows include the row's, and a Slice of the result. The windows hold
    the same products in the same order, so the bits are the same.
    """
    equal, starts = zip(*(_equal_pads(*pads, layer.stride) for pads in layer.pads), strict=True)
    spans = [n + 2 * p - k for n, p, k in zip(layer.in_shape[1:], equal, layer.kernel, strict=True)]
    exact = tuple(span // layer.stride + 1 for span in spans) == layer.out_shape[1:]
    full = output if exact else f"{output}.full"
    builder.node(
        "Conv",
        [x, *builder.weights(layer)],
        full,
        kernel_shape=layer.kernel,
        strides=[layer.stride, layer.stride],
        pads=[*equal, *equal],
    )
    return output if exact else _window(builder, layer, output, full, starts)


def _equal_pads(begin: int, end: int, stride: int) -> tuple[int, int]:
    """Returns the smallest pad >= both that equals ``begin`` modulo the stride.

    Also returns how many windows it adds before those of ``begin``.
    """
    windows = max(0, -(-(end - begin) // stride))
    return begin + windows * stride, windows


def conv_transpose(builder: GraphBuilder, layer: Layer, output: str, x: str) -> str:
    """Adds a transposed convolution that crops both ends of an axis equally.

    onnxruntime's CUDA provider takes no others. If the row's amounts differ, both ends are cropped
    by the smaller one, and a Slice crops the rest.
    """
    equal = [min(pads) for pads in layer.pads]
    starts = [begin - pad for (begin, _), pad in zip(layer.pads, equal, strict=True)]
    exact = all(begin == end for begin, end in layer.pads)
    full = output if exact else f"{output}.full"
    builder.node(
        "ConvTranspose",
        [x, *builder.weights(layer)],
        full,
        kernel_shape=layer.kernel,
        strides=[layer.stride, layer.stride],
        pads=[*equal, *equal],
    )
    return output if exact else _window(builder, layer, output, full, starts)


def _window(builder: GraphBuilder, layer: Layer, output: str, x: str, starts: Sequence[int]) -> str:
    """Adds a Slice of the row's height and width, from ``starts`` on."""
    ends = [start + size for start, size in zip(starts, layer.out_shape[1:], strict=True)]
    bounds = [
        builder.integers(f"{layer.name}.starts", starts),
        builder.integers(f"{layer.name}.ends", ends),
        builder.integers("spatial_axes", [2, 3]),
    ]
    return builder.node("Slice", [x, *bounds], output)


def dense(builder: GraphBuilder, layer: Layer, output: str, x: str) -> str:
    """Adds a Gemm, or for several vectors a MatMul, which takes any number of axes."""
    if len(layer.in_shape) == 1:
        return builder.node("Gemm", [x, *builder.weights(layer)], output, transB=1)
    (weight, _), (bias, _) = layer.parameters
    values = builder.rounded(weight, builder.params[weight])
    turned = builder.constant(f"{weight}.transposed", values.T)
    x = builder.node("MatMul", [x, turned], f"{output}.products")
    rounded = builder.rounded(bias, builder.params[bias])
    return builder.node("Add", [x, builder.constant(bias, rounded)], output)


def reshape(builder: GraphBuilder, layer: Layer, output: str, x: str) -> str:
    return _reshaped(builder, f"{layer.name}.shape", output, x, layer.out_shape)


def to_vectors(builder: GraphBuilder, layer: Layer, output: str, x: str) -> str:
    """Reshapes (N, g*D, h, w) to (N, g, D, h*w), transposes to (N, h*w, g, D), then (N, S, D)."""
    code_size = layer.out_shape[1]
    groups = layer.in_shape[0] // code_size
    grid = (groups, code_size, layer.in_shape[1] * layer.in_shape[2])
    x = _reshaped(builder, f"{layer.name}.groups_shape", f"{output}.groups", x, grid)
    x = builder.node("Transpose", [x], f"{output}.places", perm=[0, 3, 1, 2])
    return reshape(builder, layer, output, x)


def to_grid(builder: GraphBuilder, layer: Layer, output: str, x: str) -> str:
    """Reshapes (N, S, D) to (N, h*w, g, D), transposes to (N, g, D, h*w), then (N, g*D, h, w)."""
    code_size = layer.in_shape[1]
    groups = layer.out_shape[0] // code_size
    places = (layer.out_shape[1] * layer.out_shape[2], groups, code_size)
    x = _reshaped(builder, f"{layer.name}.places_shape", f"{output}.places", x, places)
    x = builder.node("Transpose", [x], f"{output}.groups", perm=[0, 2, 3, 1])
    return reshape(builder, layer, output, x)


def _reshaped(builder: GraphBuilder, name: str, output: str, x: str, shape: Sequence[int]) -> str:
    """Adds a Reshape. 0 keeps the batch axis even if it is empty, where -1 would fail."""
    return builder.node("Reshape", [x, builder.integers(name, [0, *shape])], output)


def add(builder: GraphBuilder, layer: Layer, output: str, x: str, y: str) -> str:
    return builder.node("Add", [x, y], output)


def activation(builder: GraphBuilder, layer: Layer, output: str, x: str) -> str:
    """Adds nothing before the row's activation; an Identity if that is linear."""
    return x if layer.activation != "linear" else builder.node("Identity", [x], output)


def embedding(builder: GraphBuilder, layer: Layer, output: str, x: str) -> str:
    """Adds the vectors of all indices but the last, moved by one place, with zeros in the first."""
    weight, bias = builder.weights(layer)
    bounds = [
        builder.integers(f"{layer.name}.{name}", [value])
        for name, value in (("first", 0), ("last", -1), ("places", 1))
    ]
    x = builder.node("Slice", [x, *bounds], f"{output}.earlier")
    x = builder.node("Gather", [weight, x], f"{output}.vectors")
    pads = builder.integers(f"{layer.name}.pads", [0, 1, 0, 0, 0, 0])
    x = builder.node("Pad", [x, pads], f"{output}.moved")
    return builder.node("Add", [x, bias], output)


def layer_norm(builder: GraphBuilder, layer: Layer, output: str, x: str) -> str:
    inputs = [x, *builder.weights(layer)]
    return builder.node("LayerNormalization", inputs, output, axis=-1, epsilon=NORM_EPSILON)


def group_norm(builder: GraphBuilder, layer: Layer, output: str, x: str) -> str:
    """Adds a group norm that always computes in float32.

    Subtracts each group's mean, then divides by the root of the mean square. On a flat image that
    root is 1e-3, so an error of the mean counts a thousandfold. The mean of what is left is
    therefore subtracted too, and means are taken over rows first, whose sums are short.

    InstanceNormalization and GroupNormalization do not say how they add. Besides, the sums of the
    former on CUDA are cuDNN's own, and the latter has a weight per group before opset 21.
    """
    channels = (layer.groups, layer.in_shape[0] // layer.groups)
    x = builder.cast(x, f"{output}.full", "float32") if builder.half else x
    grid = (*channels, *layer.in_shape[1:])
    x = _reshaped(builder, f"{layer.name}.groups_shape", f"{output}.groups", x, grid)
    for name in ("shifted", "centred"):
        x = builder.node("Sub", [x, _group_mean(builder, x)], f"{output}.{name}")
    square = _group_mean(builder, builder.node("Mul", [x, x], f"{output}.square"))
    least = builder.constant("group_epsilon", np.float32(GROUP_EPSILON))
    square = builder.node("Add", [square, least], f"{output}.variance")
    deviation = builder.node("Sqrt", [square], f"{output}.deviation")
    shape = builder.integers(f"{layer.name}.channels_shape", [*channels, 1, 1])
    weight, bias = (
        builder.node("Reshape", [builder.parameter(name), shape], f"{name}.of_groups")
        for name, _ in layer.parameters
    )
    scale = builder.node("Div", [weight, deviation], f"{output}.scale")
    x = builder.node("Mul", [x, scale], f"{output}.scaled")
    x = builder.node("Add", [x, bias], f"{output}.normalised")
    if builder.half:
        x = builder.cast(x, f"{output}.rounded", "float16")
    return reshape(builder, layer, output, x)


def _group_mean(builder: GraphBuilder, x: str) -> str:
    """Adds the means (N, groups, 1, 1, 1) of (N, groups, C / groups, H, W)."""
    rows = [x, builder.integers("row_axes", [4])]
    x = builder.node("ReduceMean", rows, f"{x}.of_rows", keepdims=1)
    groups = [x, builder.integers("group_axes", [2, 3])]
    return builder.node("ReduceMean", groups, f"{x}.of_groups", keepdims=1)


def unit_norm(builder: GraphBuilder, layer: Layer, output: str, x: str) -> str:
    """Adds a division by the length, in float32: float16 cannot hold LEAST_LENGTH squared."""
    x = builder.cast(x, f"{output}.full", "float32") if builder.half else x
    axes = builder.integers("vector_axes", [2])
    length = builder.node("ReduceL2", [x, axes], f"{output}.length", keepdims=1)
    least = builder.constant("least_length", np.float32(LEAST_LENGTH))
    length = builder.node("Clip", [length, least], f"{output}.divisor")
    x = builder.node("Div", [x, length], f"{output}.unit" if builder.half else output)
    return builder.cast(x, output, "float16") if builder.half else x


def bounded(builder: GraphBuilder, layer: Layer, output: str, x: str) -> str:
    """Adds a tanh into the range of the row's levels, always in float32."""
    x = builder.cast(x, f"{output}.full", "float32") if builder.half else x
    shift, scale, middle = (
        builder.constant(f"{layer.name}.{name}", value.astype(np.float32))
        for name, value in zip(("shift", "scale", "middle"), bounds_of(layer), strict=True)
    )
    x = builder.node("Add", [x, shift], f"{output}.shifted")
    x = builder.node("Tanh", [x], f"{output}.tanh")
    x = builder.node("Mul", [x, scale], f"{output}.scaled")
    x = builder.node("Sub", [x, middle], f"{output}.bounded" if builder.half else output)
    return builder.cast(x, output, "float16") if builder.half else x


def upsample(builder: GraphBuilder, layer: Layer, output: str, x: str) -> str:
    """Repeats each column, then each row, f times."""
    factor, (_, height, width) = upsample_factor(layer), layer.in_shape
    for axis, name, side in ((3, f"{output}.wide", width), (2, output, height)):
        taken = builder.integers(f"each{side}x{factor}", np.repeat(range(side), factor).tolist())
        x = builder.node("Gather", [x, taken], name, axis=axis)
    return x


def attention(builder: GraphBuilder, layer: Layer, output: str, q: str, k: str, v: str) -> str:
    later = None
    if layer.causal:
        both = numbers_of_places(builder, layer.in_shape[0])
        later = builder.node("Greater", both, f"{output}.later")
    return attended(builder, layer, output, (q, k, v), layer.in_shape[0], later)


def numbers_of_places(builder: GraphBuilder, count: int) -> tuple[str, str]:
    """Adds the numbers of places as a row (S,) and as a column (S, 1)."""
    row = builder.integers(f"places{count}", range(count))
    return row, builder.constant(f"{row}.column", np.arange(count, dtype=np.int64)[:, None])


def attended(
    builder: GraphBuilder,
    layer: Layer,
    output: str,
    inputs: Sequence[str],
    queries: int,
    later: str | None,
) -> str:
    """Adds the attention of queries (N, Q, F) to keys and values (N, S, F).

    later: the places that a query must not see, (Q, S) or (S,). Their scores are so far below all
    others that their weight is exactly 0.
    """
    places, size = layer.in_shape
    q, k, v = (
        _in_heads(builder, layer, f"{output}.{name}", each, count, perm)
        for name, each, count, perm in zip(
            ("queries", "keys", "values"),
            inputs,
            (queries, places, places),
            ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]),
            strict=True,
        )
    )
    part = size // layer.heads
    scale = builder.constant(f"{layer.name}.scale", builder.rounded(layer.name, part**-0.5))
    if builder.half:  # scaling first, because a product of many terms may overflow float16
        q = builder.node("Mul", [q, scale], f"{output}.scaled")
        x = builder.node("MatMul", [q, k], f"{output}.scores")
    else:
        x = builder.node("MatMul", [q, k], f"{output}.products")
        x = builder.node("Mul", [x, scale], f"{output}.scores")
    if later is not None:
        low = builder.constant("lowest", builder.rounded("lowest", -6e4 if builder.half else -3e38))
        x = builder.node("Where", [later, low, x], f"{output}.seen")
    x = builder.node("Softmax", [x], f"{output}.weights", axis=-1)
    x = builder.node("MatMul", [x, v], f"{output}.heads")
    x = builder.node("Transpose", [x], f"{output}.places", perm=[0, 2, 1, 3])
    return _reshaped(builder, f"{layer.name}.shape", output, x, (queries, size))


def _in_heads(
    builder: GraphBuilder, layer: Layer, output: str, x: str, places: int, perm: Sequence[int]
) -> str:
    """Reshapes (N, places, F) to (N, places, heads, F / heads), and transposes by ``perm``."""
    shape = (places, layer.heads, layer.in_shape[1] // layer.heads)
    x = _reshaped(builder, f"{layer.name}.{places}_in_heads", f"{output}.split", x, shape)
    return builder.node("Transpose", [x], output, perm=list(perm))


KINDS: dict[str, Callable[..., str]] = {
    "affine": affine,
    "conv": conv,
    "conv_transpose": conv_transpose,
    "dense": dense,
    "reshape": reshape,
    "to_vectors": to_vectors,
    "to_grid": to_grid,
    "add": add,
    "activation": activation,
    "embedding": embedding,
    "layer_norm": layer_norm,
    "group_norm": group_norm,
    "unit_norm": unit_norm,
    "bounded": bounded,
    "upsample": upsample,
    "attention": attention,
}


def elu(builder: GraphBuilder, output: str, x: str) -> str:
    """Adds an Elu; for a CPU, r + (exp(x - r) - 1) with r = max(x, 0).

    These five nodes round as onnxruntime's Elu does, which takes three times as long.
    """
    if not builder.for_processor:
        return builder.node("Elu", [x], output)
    one = builder.constant("one", builder.rounded("one", 1.0))
    positive = builder.node("Relu", [x], f"{output}.positive")
    negative = builder.node("Sub", [x, positive], f"{output}.negative")
    power = builder.node("Exp", [negative], f"{output}.power")
    below = builder.node("Sub", [power, one], f"{output}.below")
    return builder.node("Add", [positive, below], output)


def relu(builder: GraphBuilder, output: str, x: str) -> str:
    return builder.node("Relu", [x], output)


def silu(builder: GraphBuilder, output: str, x: str) -> str:
    return builder.node("Mul", [x, builder.node("Sigmoid", [x], f"{output}.gate")], output)


def gelu(builder: GraphBuilder, output: str, x: str) -> str:
    """Adds x * (1/2 + tanh(sqrt(2 / pi) x (1 + 0.044715 x^2)) / 2): opset 18 has no Gelu."""
    half, one, cube, scale = (
        builder.constant(f"gelu.{name}", builder.rounded(name, value))
        for name, value in (
            ("half", 0.5),
            ("one", 1.0),
            ("cube", 0.044715),
            ("scale", math.sqrt(2 / math.pi)),
        )
    )
    square = builder.node("Mul", [x, x], f"{output}.square")
    bent = builder.node("Mul", [square, cube], f"{output}.cubic")
    bent = builder.node("Add", [bent, one], f"{output}.bent")
    inner = builder.node("Mul", [x, scale], f"{output}.scaled")
    inner = builder.node("Mul", [inner, bent], f"{output}.inner")
    gate = builder.node("Tanh", [inner], f"{output}.tanh")
    gate = builder.node("Mul", [gate, half], f"{output}.halved")
    gate = builder.node("Add", [gate, half], f"{output}.gate")
    return builder.node("Mul", [x, gate], output)


ACTIVATIONS: dict[str, Callable[..., str]] = {"elu": elu, "relu": relu, "silu": silu, "gelu": gelu}
