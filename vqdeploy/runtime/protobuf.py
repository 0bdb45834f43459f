"""Reads ONNX bytes before onnxruntime does, without onnx, far enough to refuse what a bundle never
holds.

onnxruntime follows external data to any file that the process can read, even if the model came as
bytes. The graphs of a bundle hold their weights, so external data, functions, subgraphs, sparse
tensors, training information and operators of other domains are refused outright. Field numbers are
those of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator

from vqref.errors import InputError

OPERATORS = frozenset(
    {
        "Add",
        "ArgMin",
        "Cast",
        "Clip",
        "Conv",
        "ConvTranspose",
        "DequantizeLinear",
        "Div",
        "Elu",
        "Exp",
        "Gather",
        "GatherElements",
        "GatherND",
        "Gemm",
        "Greater",
        "Identity",
        "Min",
        "Mod",
        "Mul",
        "NonZero",
        "Not",
        "QuantizeLinear",
        "ReduceL2",
        "ReduceMin",
        "ReduceSum",
        "Relu",
        "Reshape",
        "ScatterElements",
        "Sigmoid",
        "Slice",
        "Squeeze",
        "Sub",
        "Transpose",
        "Unsqueeze",
        "Where",
    }
)
"""Every operator that the exporter writes."""

_MODEL = {7: "graph", 20: "training information", 25: "functions"}
_GRAPH = {1: "node", 5: "tensor", 15: "sparse tensors"}
_NODE = {4: "operator", 5: "attribute", 7: "domain"}
_ATTRIBUTE = {
    5: "tensor",
    10: "tensor",
    6: "subgraphs",
    11: "subgraphs",
    22: "sparse tensors",
    23: "sparse tensors",
}
_TENSOR = {13: "external data", 14: "data location"}


def require_plain(name: str, content: bytes) -> frozenset[str]:
    """Returns the operators in ``content``.

    Raises InputError, which says what it found, unless this is one graph of ``OPERATORS`` with its
    weights inside.
    """
    try:
        return _walk(memoryview(content))
    except InputError as error:
        raise InputError(f"{name}: refused: {error}") from None
    except (IndexError, UnicodeDecodeError):
        raise InputError(f"{name}: refused: not an ONNX file") from None


def _walk(content: memoryview) -> frozenset[str]:
    graphs = [value for kind, value in _fields(content, _MODEL) if _allowed(kind, "graph")]
    if len(graphs) != 1:
        raise InputError("not an ONNX file")
    found = set()
    for kind, value in _fields(graphs[0], _GRAPH):
        if _allowed(kind, "node", "tensor") == "tensor":
            _walk_tensor(value)
            continue
        for part, inner in _fields(value, _NODE):
            if part == "operator":
                found.add(bytes(inner).decode())
            if part == "domain" and len(inner):
                raise InputError(f"it holds an operator of the domain {bytes(inner).decode()}")
            if part == "attribute":
                for piece, tensor in _fields(inner, _ATTRIBUTE):
                    _allowed(piece, "tensor")
                    _walk_tensor(tensor)
    if foreign := found - OPERATORS:
        raise InputError(f"it holds the operator {min(foreign)}, which no bundle has")
    return frozenset(found)


def _walk_tensor(content: memoryview) -> None:
    for kind, value in _fields(content, _TENSOR):
        if kind == "external data" or bytes(value) != b"\0":
            raise InputError("it keeps weights outside the file")


def _allowed(kind: str, *allowed: str) -> str:
    if kind not in allowed:
        raise InputError(f"it holds {kind}")
    return kind


def _fields(content: memoryview, wanted: dict[int, str]) -> Iterator[tuple[str, memoryview]]:
    """Yields the fields of one message that ``wanted`` names, a number as its bytes.

    Raises IndexError if the message ends early.
    """
    at = 0
    while at < len(content):
        tag, at = _varint(content, at)
        start = at
        match tag & 7:
            case 0:
                _, at = _varint(content, at)
            case 1:
                at += 8
            case 2:
                size, start = _varint(content, at)
                at = start + size
            case 5:
                at += 4
            case _:
                raise IndexError
        if at > len(content):
            raise IndexError
        if tag >> 3 in wanted:
            yield wanted[tag >> 3], content[start:at]


def _varint(content: memoryview, at: int) -> tuple[int, int]:
    """Returns a number of seven bits per byte, the lowest first, and the position after it."""
    value = shift = 0
    while True:
        byte = content[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise IndexError
