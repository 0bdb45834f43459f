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
    """Nodes and initializers in the order in which they were asked for. Values and nodes are named after their rows."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self.nodes: list[NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}

    def parameter(self, name: str) -> str:
        """The initializer of a parameter, as float32; returns its name."""
        return self._initializer(name, np.asarray(self.params[name], np.float32))

    def integers(self, name: str, values: Sequence[int]) -> str:
        """An initializer of int64 values: axes, shapes, bounds; returns its name."""
        return self._initializer(name, np.array(values, np.int64))

    def node(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """One node with one output, which names it; returns the output."""
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=output, **attributes))
        return output

    def run(self, layers: Sequence[Layer], x: str, output: str) -> str:
        """The rows in order from value ``x`` to value ``output``."""
        for layer in layers:
            name = output if layer is layers[-1] else layer.name
            arguments = [self.parameter(parameter.name) for parameter in layer.parameters]
            if layer.activation == "linear":
                x = KINDS[layer.kind](self, layer, name, x, *arguments)
            else:
                before = KINDS[layer.kind](self, layer, f"{name}.linear", x, *arguments)
                x = self.node(ACTIVATIONS[layer.activation], [before], name)
        return x

    def _initializer(self, name: str, array: npt.NDArray[Any]) -> str:
        self.initializers.setdefault(name, numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name


def conv(builder: GraphBuilder, layer: Layer, output: str, x: str, weight: str, bias: str) -> str:
    (top, bottom), (left, right) = layer.pads
    strides = [layer.stride, layer.stride]
    return builder.node(
        "Conv", [x, weight, bias], output, kernel_shape=layer.kernel, strides=strides, pads=[top, left, bottom, right]
    )


def conv_transpose(builder: GraphBuilder, layer: Layer, output: str, x: str, weight: str, bias: str) -> str:
    """Symmetric pads of the smaller amount, then a Slice to the row's size where "same" crops more at the end: CUDA's
    ConvTranspose takes symmetric pads only, and would leave others to the CPU."""
    (top, bottom), (left, right) = layer.pads
    strides = [layer.stride, layer.stride]
    symmetric = (top, left) == (bottom, right)
    full = output if symmetric else f"{output}.full"
    builder.node(
        "ConvTranspose", [x, weight, bias], full, kernel_shape=layer.kernel, strides=strides, pads=[top, left, top, left]
    )
    if symmetric:
        return full
    bounds = [
        builder.integers("slice.starts", [0, 0]),
        builder.integers(f"{layer.name}.ends", layer.out_shape[1:]),
        builder.integers("slice.axes", [2, 3]),
    ]
    return builder.node("Slice", [full, *bounds], output)


def dense(builder: GraphBuilder, layer: Layer, output: str, x: str, weight: str, bias: str) -> str:
    return builder.node("Gemm", [x, weight, bias], output, transB=1)


def reshape(builder: GraphBuilder, layer: Layer, output: str, x: str) -> str:
    """0 keeps the batch axis, empty or not, where -1 could not be told from an empty batch."""
    return builder.node("Reshape", [x, builder.integers(f"{layer.name}.shape", [0, *layer.out_shape])], output)


KINDS: dict[str, Callable[..., str]] = {
    "conv": conv,
    "conv_transpose": conv_transpose,
    "dense": dense,
    "reshape": reshape,
}
ACTIVATIONS = {"elu": "Elu"}
