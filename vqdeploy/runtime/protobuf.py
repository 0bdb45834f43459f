"""Reads ONNX bytes before onnxruntime does, without onnx, and writes them again.

The tables below hold every field that the exporter writes. Any other field is refused: see
``vqdeploy.runtime.wire``. onnxruntime gets only bytes that can be written from what was read here.
That matters because onnxruntime reads external data from any file that the process can read, runs
operators of other domains, and recognises other formats by their first bytes. Field numbers are
those of onnx.proto.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from vqdeploy.runtime.wire import FLOAT, INTEGER, NAME, RAW, Field, Message, malformed, read, write
from vqdeploy.stages import Port
from vqref.errors import InputError
from vqref.validation import Array

IR_VERSION, PRODUCER, OPSETS = 10, "portable-vqvae", range(18, 21)
"""What the exporter writes into every file."""

OPERATORS: dict[str, tuple[str, ...]] = {
    "Add": (),
    "ArgMin": ("axis", "keepdims", "select_last_index"),
    "Cast": ("to",),
    "Clip": (),
    "Concat": ("axis",),
    "Conv": ("kernel_shape", "pads", "strides"),
    "ConvTranspose": ("kernel_shape", "pads", "strides"),
    "DequantizeLinear": ("axis",),
    "Div": (),
    "Elu": (),
    "Equal": (),
    "Exp": (),
    "Gather": ("axis",),
    "GatherND": (),
    "Gemm": ("alpha", "transB"),
    "Greater": (),
    "Identity": (),
    "LayerNormalization": ("axis", "epsilon"),
    "LogSoftmax": ("axis",),
    "MatMul": (),
    "Min": (),
    "Mul": (),
    "NonZero": (),
    "Not": (),
    "Pad": (),
    "QuantizeLinear": (),
    "ReduceL2": ("keepdims",),
    "ReduceMean": ("keepdims",),
    "ReduceMin": ("keepdims",),
    "ReduceSum": ("keepdims",),
    "Relu": (),
    "Reshape": (),
    "ScatterElements": ("axis",),
    "Sigmoid": (),
    "Slice": (),
    "Softmax": ("axis",),
    "Sqrt": (),
    "Squeeze": (),
    "Sub": (),
    "Tanh": (),
    "Transpose": ("perm",),
    "Unsqueeze": (),
    "Where": (),
}
"""Every operator that the exporter writes, with its attributes."""

ATTRIBUTES = {
    "alpha": "f",
    "axis": "i",
    "epsilon": "f",
    "keepdims": "i",
    "kernel_shape": "ints",
    "pads": "ints",
    "perm": "ints",
    "select_last_index": "i",
    "strides": "ints",
    "to": "i",
    "transB": "i",
}
"""The field that holds each attribute."""

ATTRIBUTE_TYPES = {"f": 1, "i": 2, "ints": 7}
"""The AttributeProto.AttributeType for each of these fields."""

DTYPES = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 10: "float16"}
"""NumPy's names for the members of TensorProto.DataType that the exporter writes."""

DTYPE_NUMBERS = {dtype: number for number, dtype in DTYPES.items()}
DTYPE_BYTES = {dtype: np.dtype(dtype).itemsize for dtype in DTYPE_NUMBERS}


MOST_NODES, MOST_PORTS, MOST_INPUTS, MOST_AXES = 2**17, 4, 256, 32
"""The most nodes or tensors of a graph; inputs or outputs of a graph; inputs, outputs or attributes
of a node; axes of a tensor or numbers of an attribute. No network of a spec has so many."""

LARGE_BYTES = 2**14
"""From about this size on, copying bytes takes longer than finding their address."""

ATTRIBUTE = Message(
    "AttributeProto",
    {
        1: Field("name", NAME),
        2: Field("f", FLOAT, needed=False),
        3: Field("i", INTEGER, needed=False),
        8: Field("ints", INTEGER, MOST_AXES, needed=False),
        20: Field("type", INTEGER),
    },
    {
        5: "holds tensors in attributes",
        6: "holds subgraphs",
        10: "holds tensors in attributes",
        11: "holds subgraphs",
        22: "holds sparse tensors",
        23: "holds sparse tensors",
    },
)

NODE = Message(
    "NodeProto",
    {
        1: Field("input", NAME, MOST_INPUTS),
        2: Field("output", NAME, MOST_INPUTS),
        3: Field("name", NAME),
        4: Field("op_type", NAME),
        5: Field("attribute", RAW, MOST_INPUTS, needed=False),  # an ATTRIBUTE
    },
    {7: "holds an operator of another domain"},
)

TENSOR = Message(
    "TensorProto",
    {
        1: Field("dims", INTEGER, MOST_AXES, needed=False),
        2: Field("data_type", INTEGER),
        8: Field("name", NAME),
        9: Field("raw_data", RAW),
    },
    {13: "keeps weights outside the file", 14: "keeps weights outside the file"},
)

AXIS = Message(
    "Dimension",
    {
        1: Field("dim_value", INTEGER, needed=False),
        2: Field("dim_param", NAME, needed=False),
    },
)
SHAPE = Message("TensorShapeProto", {1: Field("dim", AXIS, MOST_AXES)})
ARRAY = Message("TypeProto.Tensor", {1: Field("elem_type", INTEGER), 2: Field("shape", SHAPE)})
TYPE = Message("TypeProto", {1: Field("tensor_type", ARRAY)})
PORT = Message("ValueInfoProto", {1: Field("name", NAME), 2: Field("type", TYPE)})

GRAPH = Message(
    "GraphProto",
    {
        1: Field("node", NODE, MOST_NODES),
        2: Field("name", NAME),
        5: Field("initializer", TENSOR, MOST_NODES, needed=False),
        11: Field("input", PORT, MOST_PORTS),
        12: Field("output", PORT, MOST_PORTS),
    },
    {13: "holds types of inner values", 15: "holds sparse tensors"},
)

OPSET = Message("OperatorSetIdProto", {1: Field("domain", RAW), 2: Field("version", INTEGER)})

MODEL = Message(
    "ModelProto",
    {
        1: Field("ir_version", INTEGER),
        2: Field("producer_name", NAME),
        7: Field("graph", GRAPH),
        8: Field("opset_import", OPSET),
    },
    {14: "holds metadata", 20: "holds training information", 25: "holds functions"},
)


@dataclass(frozen=True)
class Node:
    """One node.

    attributes: the bytes of its attributes. They have only one form, so nodes that compute the same
    from the same values are ``==``.
    """

    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: bytes

    def pieces(self) -> list[bytes | memoryview]:
        values = {
            "input": self.inputs,
            "output": self.outputs,
            "name": self.name,
            "op_type": self.operator,
        }
        return [b"".join([*write(NODE, values), self.attributes])]


@dataclass(frozen=True, eq=False)
class Tensor:
    """One initializer. Tensors are ``==`` if their dtypes, shapes and bits are equal.

    dtype: a name of ``DTYPES``. content: the values in C order, little-endian, as a view of the
    file.
    """

    dtype: str
    shape: tuple[int, ...]
    content: memoryview

    def array(self) -> Array:
        """Returns the values as a read-only view."""
        dtype = np.dtype(self.dtype).newbyteorder("<")
        return np.frombuffer(self.content, dtype).reshape(self.shape)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tensor):
            return NotImplemented
        mine, others = (np.frombuffer(each.content, np.uint8) for each in (self, other))
        alike = (self.dtype, self.shape) == (other.dtype, other.shape)
        return alike and np.array_equal(mine, others)

    __hash__ = None  # type: ignore[assignment]

    def pieces(self, name: str) -> list[bytes | memoryview]:
        values = {
            "dims": self.shape,
            "data_type": DTYPE_NUMBERS[self.dtype],
            "name": name,
            "raw_data": self.content,
        }
        return write(TENSOR, values)


@dataclass(frozen=True)
class Graph:
    """Everything that an ONNX file of a bundle holds.

    name: the stage's name. nodes: in an order in which they can run. tensors: the initializers by
    name. Every value has one origin, and is used or is an output.
    """

    name: str
    opset: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    nodes: tuple[Node, ...]
    tensors: Mapping[str, Tensor]

    @property
    def operators(self) -> frozenset[str]:
        return frozenset(node.operator for node in self.nodes)

    def to_bytes(self) -> bytes:
        """Returns the ONNX file, which is written once, from these fields only."""
        return self._written

    @cached_property
    def _written(self) -> bytes:
        return b"".join(self.pieces())

    def pieces(self) -> list[bytes | memoryview]:
        """Returns the pieces of the ONNX file, without copying weights."""
        graph = {
            "node": [node.pieces() for node in self.nodes],
            "name": self.name,
            "initializer": [tensor.pieces(name) for name, tensor in self.tensors.items()],
            "input": [_port_pieces(port) for port in self.inputs],
            "output": [_port_pieces(port) for port in self.outputs],
        }
        model = {
            "ir_version": IR_VERSION,
            "producer_name": PRODUCER,
            "graph": write(GRAPH, graph),
            "opset_import": write(OPSET, {"domain": b"", "version": self.opset}),
        }
        return write(MODEL, model)


def read_graph(name: str, content: bytes) -> Graph:
    """Returns the graph that ``content`` holds. Its tensors are views of ``content``.

    Raises InputError, which begins with ``name`` and says what is wrong, unless ``content`` is a
    graph of ``OPERATORS`` that holds its weights and whose ``to_bytes`` gives ``content`` again.
    """
    try:
        graph = _graph(read(MODEL, content))
        _require_flow(graph)
        if not _spell(graph.pieces(), content):
            raise malformed("what was read would be written in other bytes")
    except InputError as error:
        raise InputError(f"{name}: refused: {error}") from None
    vars(graph)["_written"] = content  # the same bytes, so that large weights are not copied
    return graph


def _spell(pieces: Sequence[bytes | memoryview], content: bytes) -> bool:
    """Returns whether the pieces, joined, are ``content``.

    A large piece that is a view of ``content`` at the right place is neither copied nor compared.
    """
    start, begun, at, between = _address(content), 0, 0, list[bytes | memoryview]()
    for piece in pieces:
        if len(piece) > LARGE_BYTES and _address(piece) == start + at:
            if content[begun:at] != b"".join(between):
                return False
            begun, between = at + len(piece), []
        else:
            between.append(piece)
        at += len(piece)
    return content[begun:] == b"".join(between)


def _address(buffer: bytes | memoryview) -> int:
    """Returns the buffer's address in memory."""
    place: int = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
    return place


def _graph(model: Mapping[str, Any]) -> Graph:
    """Returns the graph of a model. Raises InputError for values that no bundle has."""
    graph, opset = model["graph"], model["opset_import"]
    if (model["ir_version"], model["producer_name"]) != (IR_VERSION, PRODUCER):
        found = f"{model['producer_name'][:80]}, ir_version {model['ir_version']}"
        raise malformed(f"its producer is {found}, expected {PRODUCER}, {IR_VERSION}")
    if len(opset["domain"]):
        raise InputError("its operators are of another domain, which no bundle's are")
    if opset["version"] not in OPSETS:
        raise InputError(f"its opset is {opset['version']}, expected one of {[*OPSETS]}")
    tensors = dict(map(_tensor, graph["initializer"]))
    if len(tensors) != len(graph["initializer"]):
        raise malformed("two tensors have one name")
    inputs, outputs = (tuple(map(_port, graph[way])) for way in ("input", "output"))
    nodes = tuple(map(_node, graph["node"]))
    return Graph(graph["name"], opset["version"], inputs, outputs, nodes, tensors)


def _node(values: Mapping[str, Any]) -> Node:
    operator = values["op_type"]
    allowed = OPERATORS.get(operator)
    if allowed is None:
        raise InputError(f"it holds the operator {operator[:80]}, which no bundle has")
    attributes = [_attribute(bytes(content)) for content in values["attribute"]]
    names = [name for name, _ in attributes]
    if foreign := [name for name in names if name not in allowed]:
        raise InputError(f"it holds a {operator} with {foreign[0][:80]}, which no bundle has")
    if any(one >= other for one, other in pairwise(names)):
        raise malformed(f"attributes of a {operator} repeat or are out of order")
    written = b"".join(written for _, written in attributes)
    inputs, outputs = tuple(values["input"]), tuple(values["output"])
    return Node(values["name"], operator, inputs, outputs, written)


@lru_cache(2**10)
def _attribute(content: bytes) -> tuple[str, bytes]:
    """Returns an attribute's name and bytes. Cached, since most appear in many nodes.

    Raises InputError if the attribute is unknown or has the wrong type.
    """
    values = read(ATTRIBUTE, content)
    name = values["name"]
    field = ATTRIBUTES.get(name)
    given = [other for other in ATTRIBUTE_TYPES if values.get(other, []) != []]
    if field is None or given != [field] or values["type"] != ATTRIBUTE_TYPES[field]:
        raise InputError(f"it holds an attribute {name[:80]} of a type that no bundle has")
    return name, b"".join(write(NODE, {"attribute": [b"".join(write(ATTRIBUTE, values))]}))


def attributes_of(values: Mapping[str, Any]) -> bytes:
    """Returns the bytes of a node's attributes: ints, floats or sequences of ints."""
    written = []
    for name, value in sorted(values.items()):
        field = ATTRIBUTES[name]
        held = struct.pack("<f", value) if field == "f" else value
        attribute = {"name": name, field: held, "type": ATTRIBUTE_TYPES[field]}
        written.append(b"".join(write(ATTRIBUTE, attribute)))
    return b"".join(write(NODE, {"attribute": written}))


def _tensor(values: Mapping[str, Any]) -> tuple[str, Tensor]:
    """Returns the tensor's name and the tensor."""
    name, content, shape = values["name"], values["raw_data"], tuple(values["dims"])
    dtype = _dtype(name, values["data_type"])
    if 0 in shape or math.prod(shape) * DTYPE_BYTES[dtype] != len(content):
        raise malformed(f"{name[:80]} has {len(content)} bytes, which is no {dtype} of its shape")
    return name, Tensor(dtype, shape, content)


def _port(values: Mapping[str, Any]) -> Port:
    array, name = values["type"]["tensor_type"], values["name"]
    sizes: list[int | str] = []
    for axis in array["shape"]["dim"]:
        if len(axis) != 1:
            raise malformed(f"an axis of {name[:80]} must have one size")
        sizes += axis.values()
    if wrong := [size for size in sizes if isinstance(size, int) and not 0 < size < 2**31]:
        raise malformed(f"an axis of {name[:80]} has the size {wrong[0]}")
    return Port(name, _dtype(name, array["elem_type"]), tuple(sizes))


def _port_pieces(port: Port) -> list[bytes | memoryview]:
    axes = [{"dim_param" if isinstance(n, str) else "dim_value": n} for n in port.shape]
    shape = write(SHAPE, {"dim": [write(AXIS, axis) for axis in axes]})
    array = write(ARRAY, {"elem_type": DTYPE_NUMBERS[port.dtype], "shape": shape})
    return write(PORT, {"name": port.name, "type": write(TYPE, {"tensor_type": array})})


def _dtype(name: str, number: int) -> str:
    if number not in DTYPES:
        raise InputError(f"{name[:80]} is of the data type {number}, which no bundle has")
    return DTYPES[number]


def _require_flow(graph: Graph) -> None:
    """Raises InputError unless every value has one origin and a use after it."""
    defined = {port.name for port in graph.inputs}
    used = {port.name for port in graph.outputs}
    distinct = (len(defined), len(used)) == (len(graph.inputs), len(graph.outputs))
    if not distinct or defined & graph.tensors.keys():
        raise malformed("two of its inputs, of its outputs or of its tensors have one name")
    defined |= graph.tensors.keys()
    if given := used & defined:
        raise malformed(f"no node gives its output {min(given)[:80]}")
    for node in graph.nodes:
        if early := set(node.inputs) - defined:
            raise malformed(f"{node.name[:80]} takes {min(early)[:80]} before it is computed")
        used.update(node.inputs)
        for name in node.outputs:
            if name in defined:
                raise malformed(f"the value {name[:80]} has two origins")
            defined.add(name)
    if lost := used ^ defined:
        raise malformed(f"the value {min(lost)[:80]} has no origin or no use")
