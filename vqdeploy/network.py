"""The ONNX interpreter of the layer table: the same kinds under the same names as ``vqref.network``.

Each kind appends the nodes that compute a row; weights become initializers under the spec's parameter names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, TensorProto, helper, numpy_helper

from vqref.spec import Layer
from vqref.validation import Params


class GraphBuilder:
    """Nodes and initializers in the order in which they were asked for. Values and nodes are named after their rows.

    half: rows of the table compute in float16, between casts; everything else stays float32.
    symmetric_pads: convolutions with unequal pads take a kernel with zeros before it instead.
    for_processor: what onnxruntime's CPU provider computes faster takes the place of what its CUDA provider does.
    """

    def __init__(
        self, params: Params, *, half: bool = False, symmetric_pads: bool = False, for_processor: bool = False
    ) -> None:
        self.params = params
        self.half, self.symmetric_pads, self.for_processor = half, symmetric_pads, for_processor
        self.nodes: list[NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}

    def parameter(self, name: str) -> str:
        """The initializer of a parameter, as float32; returns its name."""
        return self._initializer(name, np.asarray(self.params[name], np.float32))

    def weight(self, name: str, before: tuple[int, int] = (0, 0)) -> str:
        """The initializer of a row's parameter in the precision of rows, its kernel extended by rows and columns of zeros
        ``before``; returns its name. Raises ValueError where float16 cannot hold it."""
        array = np.asarray(self.params[name], np.float32)
        if any(before):
            array = np.pad(array, [(0, 0)] * (array.ndim - 2) + [(count, 0) for count in before])
        if self.half:
            with np.errstate(over="ignore"):
                array = array.astype(np.float16)
            if not np.isfinite(array).all():
                raise ValueError(f"{name}: holds values beyond float16's 65504")
        return self._initializer(name, array)

    def constant(self, name: str, array: npt.ArrayLike) -> str:
        """An initializer of a value that is not a parameter; returns its name."""
        return self._initializer(name, np.asarray(array))

    def integers(self, name: str, values: Sequence[int]) -> str:
        """An initializer of int64 values: axes, shapes, bounds; returns its name."""
        return self._initializer(name, np.array(values, np.int64))

    def node(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """One node with one output, which names it; returns the output."""
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=output, **attributes))
        return output

    def run(self, layers: Sequence[Layer], x: str, output: str) -> str:
        """The rows in order from value ``x`` to value ``output``."""
        last = f"{output}.half" if self.half else output
        if self.half:
            x = self.node("Cast", [x], f"{layers[0].name}.half", to=TensorProto.FLOAT16)
        for layer in layers:
            name = last if layer is layers[-1] else layer.name
            parameters = [parameter.name for parameter in layer.parameters]
            if layer.activation == "linear":
                x = KINDS[layer.kind](self, layer, name, x, *parameters)
            else:
                before = KINDS[layer.kind](self, layer, f"{name}.linear", x, *parameters)
                x = ACTIVATIONS[layer.activation](self, name, before)
        return self.node("Cast", [x], output, to=TensorProto.FLOAT) if self.half else x

    def _initializer(self, name: str, array: npt.NDArray[Any]) -> str:
        self.initializers.setdefault(name, numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name


def conv(builder: GraphBuilder, layer: Layer, output: str, x: str, weight: str, bias: str) -> str:
    (top, bottom), (left, right) = layer.pads
    (height, width), strides, before = layer.kernel, [layer.stride, layer.stride], (0, 0)
    if builder.symmetric_pads:  # a zero before the kernel and one more pad before the image: the same windows
        before = (bottom - top, right - left)
        top, left = bottom, right
    return builder.node(
        "Conv",
        [x, builder.weight(weight, before), builder.weight(bias)],
        output,
        kernel_shape=[height + before[0], width + before[1]],
        strides=strides,
        pads=[top, left, bottom, right],
    )


def conv_transpose(builder: GraphBuilder, layer: Layer, output: str, x: str, weight: str, bias: str) -> str:
    """Symmetric pads of the smaller amount, then a Slice to the row's size where "same" crops more at the end: CUDA's
    ConvTranspose takes symmetric pads only, and would leave others to the CPU."""
    (top, bottom), (left, right) = layer.pads
    strides = [layer.stride, layer.stride]
    symmetric = (top, left) == (bottom, right)
    full = output if symmetric else f"{output}.full"
    inputs = [x, builder.weight(weight), builder.weight(bias)]
    builder.node("ConvTranspose", inputs, full, kernel_shape=layer.kernel, strides=strides, pads=[top, left, top, left])
    if symmetric:
        return full
    bounds = [
        builder.integers("slice.starts", [0, 0]),
        builder.integers(f"{layer.name}.ends", layer.out_shape[1:]),
        builder.integers("slice.axes", [2, 3]),
    ]
    return builder.node("Slice", [full, *bounds], output)


def dense(builder: GraphBuilder, layer: Layer, output: str, x: str, weight: str, bias: str) -> str:
    return builder.node("Gemm", [x, builder.weight(weight), builder.weight(bias)], output, transB=1)


def reshape(builder: GraphBuilder, layer: Layer, output: str, x: str) -> str:
    """0 keeps the batch axis, empty or not, where -1 could not be told from an empty batch."""
    return builder.node("Reshape", [x, builder.integers(f"{layer.name}.shape", [0, *layer.out_shape])], output)


KINDS: dict[str, Callable[..., str]] = {
    "conv": conv,
    "conv_transpose": conv_transpose,
    "dense": dense,
    "reshape": reshape,
}


def elu(builder: GraphBuilder, output: str, x: str) -> str:
    """One node; or, where the graph is for a processor, r + (exp(x - r) - 1) with r = max(x, 0): the same roundings as
    onnxruntime's Elu, whose exponential takes three times as long as these five nodes."""
    if not builder.for_processor:
        return builder.node("Elu", [x], output)
    one = builder.constant("one", np.ones((), np.float16 if builder.half else np.float32))
    positive = builder.node("Relu", [x], f"{output}.positive")
    negative = builder.node("Sub", [x, positive], f"{output}.negative")
    power = builder.node("Exp", [negative], f"{output}.power")
    return builder.node("Add", [positive, builder.node("Sub", [power, one], f"{output}.below")], output)


ACTIVATIONS: dict[str, Callable[..., str]] = {"elu": elu}
