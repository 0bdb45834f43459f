"""``python -m benchmarks.hostile.inspection [--mutations N]``: checks the inspection with ``onnx``.

Changes graphs in all ways that a file can be changed. The inspection must refuse each mutation with
one line, or accept it. If it accepts it, ``onnx``, in a process of its own, must read the same
graph: operators, domains, attributes, inputs and outputs, weights and their bits, and nothing that
the inspection does not know.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

import vqref
from benchmarks.measure import ROOT, Record, parser
from vqdeploy.graphs.build import GraphOptions, build_graphs
from vqdeploy.graphs.int8 import quantize_graphs
from vqdeploy.runtime.protobuf import Graph, read_graph
from vqref.errors import InputError
from vqref.families import post, residual

BATCH = 500
"""How many accepted graphs the process gets at a time."""

MODEL, GRAPH, NODE, TENSOR, PORT = "model", "graph", "node", "tensor", "port"

INNER: dict[str, dict[int, str]] = {
    MODEL: {7: GRAPH, 8: "opset"},
    GRAPH: {1: NODE, 5: TENSOR, 11: PORT, 12: PORT},
    NODE: {5: "attribute"},
    PORT: {2: "type"},
    "type": {1: "array"},
    "array": {2: "shape"},
    "shape": {1: "axis"},
}
"""The messages inside each message, by the numbers of their fields."""


@dataclass
class Findings:
    """How many mutations of each kind were accepted and refused, and lines on what went wrong.

    Wrong are differences from ``onnx``, and errors that are not one printable line.
    """

    accepted: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not self.differences and not self.errors


def campaign(count: int, seed: int = 0) -> Findings:
    """Makes ``count`` mutations of small graphs of all kinds."""
    rng, found, pending = np.random.default_rng(seed), Findings(), []
    graphs, kinds = small_graphs(), list(MUTATIONS)
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.hostile.inspection", "--peer"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as peer:
        for number in range(count):
            kind = kinds[number % len(kinds)]
            content = MUTATIONS[kind](rng, graphs[rng.integers(len(graphs))], graphs)
            graph = inspect(content, f"{kind}, {number}", found)
            (found.refused if graph is None else found.accepted)[kind] += 1
            if graph is not None:
                pending.append((f"{kind}, {number}", graph, content))
            if len(pending) == BATCH or number == count - 1:
                compare(peer, pending, found)
                pending = []
    return found


def inspect(content: bytes, name: str, found: Findings) -> Graph | None:
    """Returns the graph; None if it is refused with one line, as it should be."""
    try:
        graph = read_graph("x.onnx", content)
    except InputError as error:
        if not str(error).isprintable() or len(str(error)) > 500:
            found.errors.append(f"{name}: {str(error)[:500]!r}")
        return None
    except Exception as error:  # the inspection must not raise anything else
        found.errors.append(f"{name}: {type(error).__name__}: {error}")
        return None
    if graph.to_bytes() != content or b"".join(graph.pieces()) != content:
        found.differences.append(f"{name}: written in other bytes")
    return graph


def compare(
    peer: subprocess.Popen[bytes],
    pending: Sequence[tuple[str, Graph, bytes]],
    found: Findings,
) -> None:
    """Has the graphs read by ``onnx``, and notes what differs."""
    assert peer.stdin is not None
    assert peer.stdout is not None
    pickle.dump([b"".join(graph.pieces()) for _, graph, _ in pending], peer.stdin)
    peer.stdin.flush()
    for (name, graph, _), other in zip(pending, json.loads(peer.stdout.readline()), strict=True):
        mine = summary(graph)
        for what in mine:
            if mine[what] != other.get(what):
                found.differences.append(f"{name}: {what}: {other.get(what, other)}")


def summary(graph: Graph) -> dict[str, Any]:
    """Returns the graph as lists and numbers, like ``summary_by_onnx``."""
    return {
        "nodes": [
            ["", n.operator, n.name, [*n.inputs], [*n.outputs], n.attributes.hex()]
            for n in graph.nodes
        ],
        "tensors": [
            [name, t.dtype, [*t.shape], hashlib.sha256(t.array().tobytes()).hexdigest()]
            for name, t in graph.tensors.items()
        ],
        "ports": [
            [[port.name, port.dtype, [*port.shape]] for port in ports]
            for ports in (graph.inputs, graph.outputs)
        ],
        "header": [10, "portable-vqvae", graph.name, [["", graph.opset]]],
        "foreign": [],
        "canonical": True,
    }


def summary_by_onnx(content: bytes) -> dict[str, Any]:
    model = onnx.load_from_string(content)
    graph = model.graph
    dtype = onnx.helper.tensor_dtype_to_np_dtype

    def attributes(node: onnx.NodeProto) -> str:
        plain: bytes = onnx.NodeProto(attribute=node.attribute).SerializeToString()
        return plain.hex()

    def tensor(proto: onnx.TensorProto) -> list[Any]:
        bits = onnx.numpy_helper.to_array(proto).tobytes()
        shape, digest = [*proto.dims], hashlib.sha256(bits).hexdigest()
        return [proto.name, str(dtype(proto.data_type)), shape, digest]

    def port(info: onnx.ValueInfoProto) -> list[Any]:
        array = info.type.tensor_type
        shape = [axis.dim_param or axis.dim_value for axis in array.shape.dim]
        return [info.name, str(dtype(array.elem_type)), shape]

    return {
        "nodes": [
            [n.domain, n.op_type, n.name, [*n.input], [*n.output], attributes(n)]
            for n in graph.node
        ],
        "tensors": [tensor(proto) for proto in graph.initializer],
        "ports": [[port(info) for info in infos] for infos in (graph.input, graph.output)],
        "header": [
            model.ir_version,
            model.producer_name,
            graph.name,
            [[opset.domain, opset.version] for opset in model.opset_import],
        ],
        "foreign": [
            *(function.name for function in model.functions),
            *("training" for _ in model.training_info),
            *("sparse" for _ in graph.sparse_initializer),
            *(t.name for t in graph.initializer if t.external_data or t.data_location),
            *(a.name for n in graph.node for a in n.attribute if a.HasField("g") or a.graphs),
        ],
        "canonical": model.SerializeToString(deterministic=True) == content,
    }


def serve() -> None:
    """The other process's side: answers each list of files with a line of summaries."""
    while sys.stdin.buffer.peek(1):  # type: ignore[union-attr]
        answers = []
        for content in pickle.load(sys.stdin.buffer):
            try:
                answers.append(summary_by_onnx(content))
            except Exception as error:  # onnx cannot read what the inspection accepted
                answers.append({"error": f"{type(error).__name__}: {error}"})
        print(json.dumps(answers), flush=True)


def small_graphs() -> list[bytes]:
    """Returns graphs of every form: families, precisions, searches, a table, a fixed batch."""
    found = []
    for spec, options in (
        (post((1, 8, 8), 2, 1, 4, 2), {}),
        (post((1, 8, 8), 2, 2, 33, 2), {"target": "cpu", "fold": False}),
        (post((1, 8, 8), 2, 2, 4, 2), {"precision": "fp16", "opset": 20}),
        (residual((3, 8, 8), hidden=4, blocks=1, block_hidden=2, num_codes=8), {"batch": 2}),
        (post((1, 8, 8), 2, 1, 512, 16), {"fold": False}),
        (post((1, 8, 8), 2, 2, 4, 2), {"precision": "int8", "fold": False}),
    ):
        params = vqref.init_params(spec, np.random.default_rng(0))
        graphs = build_graphs(spec, params, GraphOptions(**options))
        if options.get("precision") == "int8":
            images = np.random.default_rng(1).random((2, *spec.image_shape), np.float32)
            quantized = vqref.forward(spec, params, images).quantized.astype(np.float32)
            inputs = {"images": images, "quantized": quantized}
            graphs = quantize_graphs(graphs, inputs, folded=False)
        found += [content for content in graphs.values() if len(content) < 2**15]
    return found


# Bytes of a message, its fields as they stand.


def varint(value: int, length: int = 0) -> bytes:
    """Returns a number in seven bits per byte, the lowest first, in at least ``length`` bytes."""
    found = bytearray()
    while value >= 0x80 or len(found) + 1 < length:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def encoded(number: int, body: bytes | int, *, above: int = 0, longer: int = 0) -> bytes:
    """Returns a field.

    above: what to add to its tag above 32 bits. longer: by how many bytes its length or its value
    is too long.
    """
    tag = number << 3 | (0 if isinstance(body, int) else 2) | above << 32
    size = body if isinstance(body, int) else len(body)
    head = varint(tag) + varint(size, len(varint(size)) + longer if longer else 0)
    return head if isinstance(body, int) else head + body


def fields(content: bytes) -> list[tuple[int, bytes | int, bytes]]:
    """Returns the fields of a well-formed message: number, value, and the bytes of both."""
    found, at = [], 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte, at = content[at], at + 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(content):
        start, tag = at, number()
        value: bytes | int
        if tag & 7 == 5:
            value, at = content[at : at + 4], at + 4
        else:
            value = number()
            if tag & 7 == 2:
                at += value
                value = content[at - value : at]
        found.append((tag >> 3, value, content[start:at]))
    return found


Edit = Callable[[list[bytes], str], None]


def within(content: bytes, edit: Edit, path: Sequence[tuple[int, int]], kind: str = MODEL) -> bytes:
    """Returns ``content`` with an edit of the message at ``path``.

    path: (number of the field, position) of each step. edit: changes a list of fields in place; it
    also gets the message's name.
    """
    parts = fields(content)
    pieces = [piece for _, _, piece in parts]
    if not path:
        edit(pieces, kind)
        return b"".join(pieces)
    (number, place), *rest = path
    index = [i for i, part in enumerate(parts) if part[0] == number][place]
    inner = parts[index][1]
    assert isinstance(inner, bytes)
    pieces[index] = encoded(number, within(inner, edit, rest, INNER[kind][number]))
    return b"".join(pieces)


def somewhere(rng: np.random.Generator, content: bytes, edit: Edit) -> bytes:
    """Returns ``content`` with an edit of a random message, at any depth."""
    path, kind, inner = [], MODEL, content
    while kind in INNER and rng.random() < 0.85:
        numbers = [number for number, _, _ in fields(inner) if number in INNER[kind]]
        if not numbers:
            break
        place = int(rng.integers(len(numbers)))
        number, nth = numbers[place], numbers[:place].count(numbers[place])
        path.append((number, nth))
        bodies = [body for other, body, _ in fields(inner) if other == number]
        inner, kind = bodies[nth], INNER[kind][number]  # type: ignore[assignment]
    return within(content, edit, path)


# The mutations. Each takes a generator, a graph and all graphs.

Rng = np.random.Generator
Mutation = Callable[[Rng, bytes, Sequence[bytes]], bytes]


def bits(rng: Rng, content: bytes, graphs: Sequence[bytes]) -> bytes:
    changed = bytearray(content)
    for at in rng.integers(len(content), size=rng.integers(1, 4)):
        changed[at] ^= 1 << rng.integers(8)
    return bytes(changed)


def structural_bits(rng: Rng, content: bytes, graphs: Sequence[bytes]) -> bytes:
    """Flips bits where there are no weights."""

    def edit(pieces: list[bytes], kind: str) -> None:
        place = rng.integers(len(pieces))
        pieces[place] = bits(rng, pieces[place][:12], graphs) + pieces[place][12:]

    return somewhere(rng, content, edit)


def bytes_changed(rng: Rng, content: bytes, graphs: Sequence[bytes]) -> bytes:
    changed = bytearray(content)
    for at in rng.integers(len(content), size=rng.integers(1, 9)):
        changed[at] = rng.integers(256)
    return bytes(changed)


def spliced(rng: Rng, content: bytes, graphs: Sequence[bytes]) -> bytes:
    other = graphs[int(rng.integers(len(graphs)))]
    start, end = sorted(rng.integers(len(other), size=2))
    at, to = sorted(rng.integers(len(content), size=2))
    return content[:at] + other[start : min(end, start + 200)] + content[to:]


def cut(rng: Rng, content: bytes, graphs: Sequence[bytes]) -> bytes:
    return content[: rng.integers(len(content))]


def polyglot(rng: Rng, content: bytes, graphs: Sequence[bytes]) -> bytes:
    """Looks like a FlatBuffer of onnxruntime's by its first bytes."""
    if rng.random() < 0.5:
        return content[:4] + b"ORTM" + content[8:]
    return varint(int(rng.integers(2**20)), 4)[:4] + b"ORTM" + content


def edits(change: Callable[[Rng, list[bytes], str], None]) -> Mutation:
    """Returns a mutation of the fields of a random message."""

    def mutation(rng: Rng, content: bytes, graphs: Sequence[bytes]) -> bytes:
        return somewhere(rng, content, lambda pieces, kind: change(rng, pieces, kind))

    return mutation


def overlong(rng: Rng, pieces: list[bytes], kind: str) -> None:
    """Makes a length, a value or a tag longer than it need be."""
    place = int(rng.integers(len(pieces)))
    ((number, body, _),) = fields(pieces[place])
    above = int(rng.integers(1, 2**31)) if rng.random() < 0.5 else 0
    longer = 0 if above else int(rng.integers(1, 10))
    pieces[place] = encoded(number, body, above=above, longer=longer)


def hidden(rng: Rng, pieces: list[bytes], kind: str) -> None:
    """Hides a field with a meaning under a tag whose upper bits protobuf drops."""
    number, body = HIDDEN[kind][rng.integers(len(HIDDEN[kind]))] if kind in HIDDEN else (1, 1)
    field = encoded(number, body, above=int(rng.choice([0, 1, 2, 2**20])))
    pieces.insert(int(rng.integers(len(pieces) + 1)), field)


def entry(key: str, value: str) -> bytes:
    return encoded(1, key.encode()) + encoded(2, value.encode())


HIDDEN: dict[str, list[tuple[int, bytes | int]]] = {
    MODEL: [(8, entry("com.microsoft", "")), (14, entry("a", "b")), (25, b""), (20, b"")],
    GRAPH: [(15, b""), (10, b"doc"), (13, encoded(1, b"x")), (2, b"other")],
    NODE: [(4, b"Tanh"), (4, b"Loop"), (7, b"com.microsoft"), (7, b""), (6, b"doc")],
    TENSOR: [(13, entry("location", "weights.bin")), (14, 1), (14, 0), (4, b"\0\0\0\0"), (3, b"")],
    "attribute": [(6, b""), (11, b""), (5, b""), (21, b"other"), (13, b"doc"), (4, b"s")],
    PORT: [(3, b"doc"), (4, entry("a", "b"))],
    "axis": [(3, b"DATA_BATCH"), (1, 2), (2, b"M")],
}
"""Fields with meanings that no bundle has, or that it has once."""


def unknown(rng: Rng, pieces: list[bytes], kind: str) -> None:
    wire = int(rng.integers(8))
    body = {0: b"\x01", 1: bytes(8), 2: b"\x01x", 5: bytes(4)}.get(wire, b"")
    number = int(rng.choice([0, 17, 30, 99, 2**20, 2**29 - 1, 2**29]))
    pieces.insert(int(rng.integers(len(pieces) + 1)), varint(number << 3 | wire) + body)


def duplicated(rng: Rng, pieces: list[bytes], kind: str) -> None:
    pieces.insert(int(rng.integers(len(pieces) + 1)), pieces[rng.integers(len(pieces))])


def swapped(rng: Rng, pieces: list[bytes], kind: str) -> None:
    one, other = rng.integers(len(pieces), size=2)
    pieces[one], pieces[other] = pieces[other], pieces[one]


def dropped(rng: Rng, pieces: list[bytes], kind: str) -> None:
    del pieces[rng.integers(len(pieces))]


def valued(rng: Rng, pieces: list[bytes], kind: str) -> None:
    """Sets another number, or other bytes."""
    place = int(rng.integers(len(pieces)))
    ((number, body, _),) = fields(pieces[place])
    numbers = (0, 1, 2, 7, 8, 11, 16, 127, 128, 2**31, 2**32 + 1, 2**63, 2**64 - 1)
    if isinstance(body, int):
        pieces[place] = encoded(number, int(numbers[rng.integers(len(numbers))]))
    else:
        names = (b"", b"\x1b[31m", b"\xff\xfe", b"images", b"Identity", b"x" * 3000, body[::-1])
        pieces[place] = encoded(number, names[rng.integers(len(names))])


def by_onnx(change: Callable[[Rng, onnx.ModelProto], object]) -> Mutation:
    """Returns a mutation that ``onnx`` makes and writes."""

    def mutation(rng: Rng, content: bytes, graphs: Sequence[bytes]) -> bytes:
        model = onnx.load_from_string(content)
        change(rng, model)
        written: bytes = model.SerializeToString(deterministic=True)
        return written

    return mutation


def a_node(rng: Rng, model: onnx.ModelProto) -> onnx.NodeProto:
    return model.graph.node[rng.integers(len(model.graph.node))]


def operator(rng: Rng, model: onnx.ModelProto) -> None:
    names = ("Tanh", "Loop", "If", "Scan", "Identity", "Relu", "Mul", "FastGelu", "ReadFile")
    a_node(rng, model).op_type = names[rng.integers(len(names))]


def domain(rng: Rng, model: onnx.ModelProto) -> None:
    a_node(rng, model).domain = str(rng.choice(["com.microsoft", "ai.onnx.ml", "", "ai.onnx"]))
    if rng.random() < 0.5:
        model.opset_import.add(domain="com.microsoft", version=1)


def external(rng: Rng, model: onnx.ModelProto) -> None:
    tensors = model.graph.initializer
    tensor = tensors[rng.integers(len(tensors))]
    onnx.external_data_helper.set_external_data(tensor, "/etc/passwd")
    if rng.random() < 0.5:
        tensor.ClearField("raw_data")
    if rng.random() < 0.3:
        tensor.ClearField("data_location")


def function(rng: Rng, model: onnx.ModelProto) -> None:
    made = model.functions.add(name=a_node(rng, model).op_type, domain="")
    made.node.add(op_type="Tanh", input=["x"], output=["y"])


def subgraph(rng: Rng, model: onnx.ModelProto) -> None:
    inner = onnx.GraphProto(name="inner", node=[onnx.NodeProto(op_type="Tanh")])
    attribute = a_node(rng, model).attribute.add(name="body", type=5)
    if rng.random() < 0.5:
        attribute.g.CopyFrom(inner)
    else:
        attribute.graphs.append(inner)


def remark(rng: Rng, model: onnx.ModelProto) -> None:
    holders = (model, model.graph, a_node(rng, model), model.graph.input[0])
    holder = holders[rng.integers(len(holders))]
    if rng.random() < 0.5:
        holder.doc_string = str(rng.choice(["", "x"]))
    else:
        holder.metadata_props.add(key="a", value="b")


def tensor_form(rng: Rng, model: onnx.ModelProto) -> None:
    """Stores the same values in another field, type or shape."""
    tensor = model.graph.initializer[rng.integers(len(model.graph.initializer))]
    array = onnx.numpy_helper.to_array(tensor)
    match rng.integers(4):
        case 0:
            if array.dtype != np.float16:
                made = onnx.helper.make_tensor(
                    tensor.name, tensor.data_type, array.shape, array.ravel().tolist()
                )
                tensor.CopyFrom(made)
        case 1:
            tensor.data_type = int(rng.integers(25))
        case 2:
            tensor.dims.append(int(rng.integers(-1, 3)))
        case 3:
            wide = array.astype(np.float64)
            tensor.CopyFrom(onnx.numpy_helper.from_array(wide, tensor.name))


def wired(rng: Rng, model: onnx.ModelProto) -> None:
    """Makes a node take or give another value, or have an attribute of another type."""
    node, other = a_node(rng, model), a_node(rng, model)
    match rng.integers(4):
        case 0:
            node.input[rng.integers(len(node.input))] = other.output[0]
        case 1:
            node.output[0] = other.output[0]
        case 2:
            node.input.append(str(rng.choice(["", "images", "nothing"])))
        case 3:
            for attribute in node.attribute:
                attribute.type = int(rng.integers(15))


def added(rng: Rng, model: onnx.ModelProto) -> None:
    """Adds nodes, tensors or outputs that nothing needs."""
    match rng.integers(4):
        case 0:
            model.graph.node.add(op_type="Relu", input=["images"], output=["more"], name="more")
        case 1:
            model.graph.initializer.append(
                onnx.numpy_helper.from_array(np.zeros(2, np.float32), "more")
            )
        case 2:
            model.graph.output.append(model.graph.input[0])
        case 3:
            model.graph.sparse_initializer.add()


def header(rng: Rng, model: onnx.ModelProto) -> None:
    match rng.integers(4):
        case 0:
            model.ir_version = int(rng.integers(1, 15))
        case 1:
            model.opset_import[0].version = int(rng.integers(1, 30))
        case 2:
            model.producer_version = str(rng.choice(["", "1"]))
        case 3:
            model.training_info.add()


MUTATIONS: dict[str, Mutation] = {
    "bits": bits,
    "structural bits": structural_bits,
    "bytes": bytes_changed,
    "splices": spliced,
    "cuts": cut,
    "polyglots": polyglot,
    "overlong numbers": edits(overlong),
    "hidden fields": edits(hidden),
    "unknown fields": edits(unknown),
    "duplicated fields": edits(duplicated),
    "swapped fields": edits(swapped),
    "dropped fields": edits(dropped),
    "other values": edits(valued),
    "operators": by_onnx(operator),
    "domains": by_onnx(domain),
    "external data": by_onnx(external),
    "functions": by_onnx(function),
    "subgraphs": by_onnx(subgraph),
    "remarks": by_onnx(remark),
    "tensors": by_onnx(tensor_form),
    "wires": by_onnx(wired),
    "additions": by_onnx(added),
    "headers": by_onnx(header),
}
"""The mutations, by kind; a campaign makes equally many of each."""


def main() -> int:
    options = parser(__doc__)
    options.add_argument(
        "--mutations", type=int, default=100_000, help="how many (default: %(default)s)"
    )
    options.add_argument("--seed", type=int, default=0, help="of all (default: %(default)s)")
    options.add_argument("--peer", action="store_true", help="be the process that asks onnx")
    arguments = options.parse_args()
    if arguments.peer:
        serve()
        return 0
    record = Record(arguments)
    found = campaign(arguments.mutations, arguments.seed)
    for kind in MUTATIONS:
        record.say(f"{kind:<18}{found.accepted[kind]:>8} accepted{found.refused[kind]:>8} refused")
    for line in (*found.differences[:20], *found.errors[:20]):
        record.say(line)
    record.say(
        f"{found.accepted.total() + found.refused.total()} mutations: "
        f"{len(found.differences)} differences from onnx, {len(found.errors)} errors of no line"
    )
    record.figures = {
        "accepted": dict(found.accepted),
        "refused": dict(found.refused),
        "differences": found.differences,
        "errors": found.errors,
    }
    record.write()
    return 0 if found.clean else 1


if __name__ == "__main__":
    sys.exit(main())
