"""The inspection: a graph that export would not write is refused before onnxruntime sees it.

The refusal is one line. onnxruntime gets exactly what was inspected.
"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper
from support import ROOT

import vqref
from benchmarks.hostile import inspection
from benchmarks.hostile.inspection import encoded, entry, varint, within
from vqdeploy.graphs.build import TARGETS, GraphOptions, build_graphs
from vqdeploy.graphs.int8 import quantize_graphs
from vqdeploy.runtime import library, protobuf, wire
from vqdeploy.runtime.protobuf import (
    ATTRIBUTES,
    DTYPES,
    MODEL,
    OPERATORS,
    OPSETS,
    Tensor,
    read_graph,
)
from vqdeploy.runtime.sessions import Runtime, Session, open_sessions
from vqref.errors import InputError, MachineError
from vqref.families import post, residual
from vqref.spec import CODEBOOK

NETWORK, NODE, TENSOR, PORT = [(7, 0)], [(7, 0), (1, 0)], [(7, 0), (5, 0)], [(7, 0), (11, 0)]
TYPE = [*PORT, (2, 0)]
MESSAGES = {
    "model": [],
    "graph": NETWORK,
    "node": NODE,
    "attribute": [*NETWORK, (1, 3), (5, 0)],
    "tensor": TENSOR,
    "port": PORT,
    "type": TYPE,
    "array": [*TYPE, (1, 0)],
    "shape": [*TYPE, (1, 0), (2, 0)],
    "axis": [*TYPE, (1, 0), (2, 0), (1, 0)],
    "opset": [(8, 0)],
}
"""Where each kind of message is in the quantizer's file: (number of the field, position)."""

REPEATED = {"graph": {1, 5, 11, 12}, "node": {1, 2, 5}, "tensor": {1}, "shape": {1}}
"""Fields that may repeat."""


@pytest.fixture(scope="module")
def small():
    spec = post((1, 8, 8), 2, 2, 4, 2)
    return spec, vqref.init_params(spec, np.random.default_rng(0))


@pytest.fixture(scope="module")
def content(small):
    return build_graphs(*small)["quantizer"]


def refused(content, message="", name="quantizer.onnx"):
    with pytest.raises(InputError, match=rf"^{name}: refused: .*{message}") as caught:
        read_graph(name, content)
    assert str(caught.value).isprintable()


def variants():
    for family, spec in {
        "post": post((1, 8, 8), 2, 2, 4, 2),
        "large": post((1, 8, 8), 2, 2, 513, 16),
        "residual": residual((3, 8, 8), hidden=4, blocks=1, block_hidden=2, num_codes=8),
        "logistic": residual(
            (3, 8, 8), hidden=4, blocks=1, block_hidden=2, num_codes=8, likelihood="logistic"
        ),
    }.items():
        for precision in ("fp32", "fp16"):
            for target in TARGETS:
                yield family, spec, {"precision": precision, "target": target}
        for precision in ("fp32", "int8"):
            yield family, spec, {"batch": 3, "precision": precision, "fold": False}
        for opset in OPSETS[1:]:
            yield family, spec, {"opset": opset}
        yield family, spec, {"precision": "int8"}


VARIANTS = {f"{family}, {options}": (spec, options) for family, spec, options in variants()}


@pytest.fixture(scope="module", params=VARIANTS)
def graphs(request):
    """Returns the five graphs of a model in one form, as bytes."""
    spec, options = VARIANTS[request.param]
    params = vqref.init_params(spec, np.random.default_rng(0))
    chosen = GraphOptions(**options)
    made = build_graphs(spec, params, chosen)
    if chosen.precision == "int8":
        images = np.random.default_rng(1).random((2, *spec.image_shape), np.float32)
        quantized = vqref.forward(spec, params, images).quantized.astype(np.float32)
        inputs = {"images": images, "quantized": quantized}
        made = quantize_graphs(made, inputs, folded=chosen.folds(spec))
    return made


def test_what_is_read_is_written_again_byte_for_byte(graphs):
    for stage, content in graphs.items():
        graph = read_graph(stage, content)
        assert graph.to_bytes() == content
        assert dataclasses.replace(graph).to_bytes() == content  # written anew
        assert graph.name == stage
        assert graph.operators == {n.op_type for n in onnx.load_from_string(content).graph.node}


def test_what_is_read_is_what_onnx_reads(graphs):
    for stage, content in graphs.items():
        graph = read_graph(stage, content)
        assert inspection.summary(graph) == inspection.summary_by_onnx(content)
        for proto in onnx.load_from_string(content).graph.initializer:
            found, expected = graph.tensors[proto.name].array(), numpy_helper.to_array(proto)
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected, strict=True)
            assert not found.flags.writeable


def test_tokenizer_and_detokenizer_are_put_together_from_the_others(graphs):
    """Compares nodes, and all bits of the weights, in every precision."""
    found = {stage: read_graph(stage, content) for stage, content in graphs.items()}
    encoder, quantizer, decoder, tokenizer, detokenizer = found.values()
    *search, lookup = quantizer.nodes
    assert lookup.operator == "Gather"
    expected = {tokenizer.name: (encoder, tokenizer, (*encoder.nodes, *search))}
    if detokenizer.operators != {"GatherND"}:
        expected[detokenizer.name] = (decoder, detokenizer, (lookup, *decoder.nodes))
    for part, whole, nodes in expected.values():
        assert whole.nodes == nodes
        taken = {name for node in nodes for name in node.inputs}
        both = {**quantizer.tensors, **part.tensors}
        assert whole.tensors == {name: both[name] for name in both if name in taken}
    assert tokenizer.inputs == encoder.inputs
    assert tokenizer.outputs == quantizer.outputs[:1]


def test_tensors_are_equal_by_their_bits():
    one = Tensor("float32", (2,), memoryview(np.array([0.0, np.nan], np.float32).tobytes()))
    assert one == Tensor("float32", (2,), memoryview(bytes(one.content)))
    assert one != Tensor(
        "float32", (2,), memoryview(np.array([-0.0, np.nan], np.float32).tobytes())
    )
    assert one != Tensor("float32", (2, 1), one.content)
    assert one != Tensor("int32", (2,), one.content)


# Bytes.


@pytest.mark.parametrize("junk", [b"", b"not a graph", b"\x3a\x05ab", b"\xff" * 40])
def test_a_session_refuses_bytes_that_are_no_graph(model, junk):
    with pytest.raises(InputError, match=r"^encoder\.onnx: refused: not an ONNX file"):
        Session("encoder", junk, model.spec, "cpu")


def test_a_file_cut_anywhere_is_refused(content):
    for size in range(len(content)):
        refused(content[:size])
    for more in (b"\0", b"\x08\x0a", content):
        refused(content + more)


OVERLONG: dict[str, Any] = {
    "an operator": (NODE, 4, b"Tanh"),
    "a loop": (NODE, 4, b"Loop"),
    "a domain": (NODE, 7, b"com.microsoft"),
    "FastGelu": (NODE, 4, b"FastGelu"),
    "external data": (TENSOR, 13, entry("location", "/etc/passwd")),
    "a place of data": (TENSOR, 14, 1),
    "functions": ([], 25, b""),
    "a subgraph": (MESSAGES["attribute"], 6, b""),
}


@pytest.mark.parametrize("what", OVERLONG)
@pytest.mark.parametrize("above", [1, 2**20, 2**31])
def test_a_tag_whose_upper_bits_protobuf_drops_hides_nothing(content, what, above):
    path, number, body = OVERLONG[what]
    for place in (0, -1):

        def edit(pieces, kind, place=place):
            tag = encoded(number, body, above=above)
            pieces.insert(place if place == 0 else len(pieces), tag)

        refused(within(content, edit, path), "holds the tag|longer than")


def test_a_tag_of_64_bits_is_no_way_around(content):
    tag = varint((1 << 63) | (7 << 3) | 2)
    refused(within(content, lambda pieces, kind: pieces.append(tag + b"\x00"), NODE), "the tag")
    refused(b"\x80" * 10 + b"\x01" + content, "more bytes than it needs, or more than 64 bits")
    refused(b"\xff" * 9 + b"\x7f" + content, "more bytes than it needs, or more than 64 bits")


def test_a_flatbuffer_of_onnxruntimes_is_refused(content, small):
    refused(content[:4] + b"ORTM" + content[8:])
    refused(b"\x20\0\0\0ORTM" + content)
    options = ort.SessionOptions()
    Session("quantizer", content, small[0], "cpu", runtime=Runtime(session_options=options))
    assert options.get_session_config_entry("session.load_model_format") == "ONNX"


def appending(piece):
    """Returns an edit that adds a piece at the end of a message."""
    return lambda pieces, _: pieces.append(piece)


def replacing(place, piece):
    """Returns an edit that replaces a piece of a message."""
    return lambda pieces, _: pieces.__setitem__(place, piece)


@pytest.mark.parametrize("kind", MESSAGES)
def test_fields_that_export_does_not_write_are_refused(content, kind):
    for number in (99, 2**20, 2**29 - 1):
        for wire_type, body in ((0, b"\1"), (1, bytes(8)), (2, b"\1x"), (5, bytes(4))):
            piece = varint(number << 3 | wire_type) + body
            changed = within(content, appending(piece), path(kind))
            refused(changed, f"a field {number} of wire type {wire_type}")
    for tag, message in ((0, "holds the tag 0"), (99 << 3 | 3, "the tag 795"), (2**32, "the tag")):
        piece = varint(tag)
        changed = within(content, appending(piece), path(kind))
        refused(changed, message)


def path(kind):
    return MESSAGES[kind]


@pytest.mark.parametrize("kind", MESSAGES)
def test_a_field_that_may_not_repeat_does_not(content, kind):
    """protobuf merges both or takes the last, so another graph would run than was inspected."""
    seen = set()

    def repeat(number):
        def edit(pieces, _):
            numbers = [inspection.fields(piece)[0][0] for piece in pieces]
            seen.update(numbers)
            if number in numbers:
                pieces.insert(numbers.index(number), pieces[numbers.index(number)])

        return edit

    repeated = [
        changed
        for number in set(range(1, 21)) - REPEATED.get(kind, set())
        if (changed := within(content, repeat(number), path(kind))) != content
    ]
    assert len(repeated) == len(seen - REPEATED.get(kind, set())) > 0 or kind == "shape"
    for changed in repeated:
        refused(changed, "repeats or is out of order")


@pytest.mark.parametrize("kind", ["model", "graph", "node", "tensor", "port", "array", "opset"])
def test_fields_are_in_order(content, kind):
    changed = within(content, lambda pieces, _: pieces.reverse(), path(kind))
    refused(changed, "out of order")


@pytest.mark.parametrize("kind", MESSAGES)
@pytest.mark.parametrize("longer", [1, 4, 8])
def test_no_length_and_no_number_is_longer_than_it_need_be(content, kind, longer):
    def edit(pieces, _):
        ((number, body, _),) = inspection.fields(pieces[-1])
        pieces[-1] = encoded(number, body, longer=longer)

    refused(within(content, edit, path(kind)), "more bytes than it needs")


def test_a_field_of_another_wire_type_is_refused(content):
    for piece in (varint(4 << 3 | 5) + bytes(4), varint(4 << 3 | 1) + bytes(8), b"\x20\x01"):
        refused(within(content, appending(piece), NODE), "a field 4 of")
    packed = encoded(1, b"\x04\x02")  # dims as protobuf 3 would write them
    refused(within(content, lambda pieces, _: pieces.insert(0, packed), TENSOR), "a field 1 of")


def test_names_cannot_steer_a_terminal(content):
    for name in (b"\x1b[31m", b"two\nlines", b"", b"\xff\xfe", "ä".encode(), b"a b", b"x" * 2001):
        changed = within(content, replacing(-2, encoded(4, name)), NODE)
        refused(changed, "")


@pytest.mark.parametrize("large", [0, 2**14])
def test_weights_in_another_place_are_not_taken_for_those_inspected(content, large, monkeypatch):
    """Shows if the reader mistakes where weights are; it does not copy large weights."""
    monkeypatch.setattr(protobuf, "LARGE_BYTES", large)
    read = protobuf._tensor

    def shifted(values):
        name, tensor = read(values)
        if name == CODEBOOK:
            moved = memoryview(content)[: len(tensor.content)]
            tensor = dataclasses.replace(tensor, content=moved)
        return name, tensor

    monkeypatch.setattr(protobuf, "_tensor", shifted)
    refused(content, "what was read would be written in other bytes")


def test_what_a_weaker_reader_overlooks_is_not_written_and_so_it_shows(content, monkeypatch):
    port = MODEL.fields[7].kind.fields[11].kind
    monkeypatch.setitem(port.rows, 99 << 3 | 2, wire.Field("secret", wire.RAW))
    hidden = within(content, lambda pieces, _: pieces.append(encoded(99, b"secret")), path("port"))
    refused(hidden, "what was read would be written in other bytes")


# Content.


def by_onnx(content, change):
    proto = onnx.load_from_string(content)
    change(proto)
    return proto.SerializeToString(deterministic=True)


def outside(proto):
    tensor = next(t for t in proto.graph.initializer if t.name == CODEBOOK)
    onnx.external_data_helper.set_external_data(tensor, "weights.bin")
    tensor.ClearField("raw_data")


def set_node(**fields):
    def change(proto):
        for name, value in fields.items():
            setattr(proto.graph.node[0], name, value)

    return change


def set_tensor(**fields):
    def change(proto):
        for name, value in fields.items():
            tensor = next(t for t in proto.graph.initializer if t.name == CODEBOOK)
            if name == "dims":
                tensor.ClearField("dims")
                tensor.dims.extend(value)
            else:
                setattr(tensor, name, value)

    return change


def rewired(node, way, name):
    def change(proto):
        getattr(proto.graph.node[node], way)[0] = name

    return change


def subgraph(proto):
    body = proto.graph.node[0].attribute.add(name="body", type=5)
    body.g.CopyFrom(onnx.GraphProto(name="inner"))


def in_another_field(proto):
    tensor = next(t for t in proto.graph.initializer if t.name == CODEBOOK)
    array = numpy_helper.to_array(tensor)
    tensor.CopyFrom(helper.make_tensor(CODEBOOK, 1, array.shape, array.ravel().tolist()))


def reordered(proto):
    first = onnx.NodeProto()
    first.CopyFrom(proto.graph.node[0])
    del proto.graph.node[0]
    proto.graph.node.append(first)


def twice(field, index=0):
    def change(proto):
        held = getattr(proto.graph, field)
        held.append(held[index])

    return change


def attribute(**fields):
    return lambda proto: proto.graph.node[0].attribute.add(**fields)


HOSTILE = {
    "external data": (outside, "keeps weights outside the file"),
    "an unknown operator": (set_node(op_type="Loop"), "holds the operator Loop, which no bundle"),
    "another domain": (set_node(domain="com.evil"), "holds an operator of another domain"),
    "the default domain by name": (set_node(domain="ai.onnx"), "operator of another domain"),
    "an empty domain": (set_node(domain=""), "operator of another domain"),
    "a function": (lambda p: p.functions.add(name="f"), "holds functions"),
    "training": (lambda p: p.training_info.add(), "holds training information"),
    "metadata": (lambda p: p.metadata_props.add(key="a", value="b"), "holds metadata"),
    "a sparse tensor": (lambda p: p.graph.sparse_initializer.add(), "holds sparse tensors"),
    "a subgraph": (subgraph, "holds subgraphs"),
    "a tensor in an attribute": (
        lambda p: p.graph.node[0].attribute.add(name="axis", type=4).t.CopyFrom(onnx.TensorProto()),
        "holds tensors in attributes",
    ),
    "an unknown attribute": (attribute(name="body", type=2, i=1), "an attribute body"),
    "a foreign attribute": (attribute(name="to", type=2, i=1), "holds a Unsqueeze with to"),
    "an attribute of another type": (attribute(name="axis", type=1, f=1), "attribute axis"),
    "an attribute of two values": (attribute(name="axis", type=2, i=1, f=1), "attribute axis"),
    "an attribute of none": (attribute(name="axis", type=2), "attribute axis"),
    "a remark": (set_node(doc_string="x"), "a field 6 of wire type 2 in NodeProto"),
    "an overload": (set_node(overload="x"), "a field 8 of wire type 2 in NodeProto"),
    "types of inner values": (
        lambda p: p.graph.value_info.append(p.graph.input[0]),
        "holds types of inner values",
    ),
    "a second opset": (
        lambda p: p.opset_import.add(domain="com.microsoft", version=1),
        "opset_import of ModelProto repeats",
    ),
    "a foreign opset": (
        lambda p: setattr(p.opset_import[0], "domain", "ai.onnx.ml"),
        "its operators are of another domain",
    ),
    "a newer opset": (
        lambda p: setattr(p.opset_import[0], "version", 21),
        r"its opset is 21, expected one of \[18, 19, 20\]",
    ),
    "an older version": (lambda p: setattr(p, "ir_version", 9), "portable-vqvae, ir_version 9"),
    "another producer": (lambda p: setattr(p, "producer_name", "x"), "its producer is x,"),
    "a producer's version": (lambda p: setattr(p, "producer_version", "1"), "a field 3 of"),
    "a dtype": (set_tensor(data_type=8), "quantizer.codebook is of the data type 8"),
    "a dtype of 64 bits": (set_tensor(data_type=11), "is of the data type 11"),
    "a wrong shape": (set_tensor(dims=[4, 3]), "32 bytes, which is no float32 of its shape"),
    "an empty shape": (set_tensor(dims=[0, 2]), "32 bytes, which is no float32"),
    "a negative shape": (set_tensor(dims=[-4, -2]), "32 bytes, which is no float32"),
    "a shape that wraps": (set_tensor(dims=[2**62, 2, 2, 8]), "which is no float32 of its shape"),
    "values in another field": (in_another_field, "a field 4 of wire type 2 in TensorProto"),
    "values in two fields": (
        lambda p: p.graph.initializer[0].int64_data.append(1),
        "a field 7 of wire type 2 in TensorProto",
    ),
    "a tensor twice": (twice("initializer"), "two tensors have one name"),
    "a tensor of doubles": (
        lambda p: p.graph.initializer.append(numpy_helper.from_array(np.ones(1), "more")),
        "is of the data type 11",
    ),
    "a spare tensor": (
        lambda p: p.graph.initializer.append(
            numpy_helper.from_array(np.ones(1, np.float32), "more")
        ),
        "the value more has no origin or no use",
    ),
    "a node twice": (twice("node"), "the value quantizer.column has two origins"),
    "a spare node": (
        lambda p: p.graph.node.add(op_type="Relu", input=["latents"], output=["more"], name="more"),
        "the value more has no origin or no use",
    ),
    "an input twice": (twice("input"), "have one name"),
    "an output twice": (twice("output"), "have one name"),
    "an output that is an input": (
        lambda p: p.graph.output.append(p.graph.input[0]),
        "no node gives its output latents",
    ),
    "an output of nothing": (
        lambda p: setattr(p.graph.output[0], "name", "nothing"),
        "has no origin or no use",
    ),
    "an unknown input": (rewired(1, "input", "nothing"), "takes nothing before it is computed"),
    "an absent input": (rewired(1, "input", ""), "a name is not printable, empty or too long"),
    "a loop": (rewired(0, "input", "indices"), "takes indices before it is computed"),
    "another order": (reordered, "before it is computed"),
    "a sequence": (
        lambda p: p.graph.input[0].type.sequence_type.elem_type.CopyFrom(onnx.TypeProto()),
        "TypeProto",
    ),
    "a denotation": (
        lambda p: setattr(p.graph.input[0].type, "denotation", "x"),
        "a field 6 of wire type 2 in TypeProto",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_no_bundle_holds_never_reaches_onnxruntime(small, content, kind, monkeypatch):
    change, message = HOSTILE[kind]
    changed = by_onnx(content, change)
    assert changed != content
    never(monkeypatch)
    refused(changed, message)
    with pytest.raises(InputError, match=message):
        Session("quantizer", changed, small[0], "cpu")


def never(monkeypatch):
    """Fails the test if onnxruntime gets anything."""

    def session(*arguments, **options):
        raise AssertionError("onnxruntime saw it")

    monkeypatch.setattr(ort, "InferenceSession", session)


def test_an_axis_has_one_size(content):
    axis = path("axis")
    both = within(content, lambda pieces, _: pieces.insert(0, encoded(1, 2)), axis)
    refused(both, "an axis of latents must have one size")
    for size in (0, 2**31, 2**63, 2**64 - 1):
        sized = within(content, replacing(0, encoded(1, size)), axis)
        refused(sized, f"an axis of latents has the size {size}")
    neither = within(content, lambda pieces, _: pieces.clear(), axis)
    refused(neither, "an axis of latents must have one size")


def test_a_graph_of_another_model_or_stage_is_refused_by_its_ports(model, monkeypatch):
    graphs = build_graphs(model.spec, model.params)
    never(monkeypatch)
    with pytest.raises(InputError, match=r"tokenizer\.onnx: its outputs are .*latents"):
        Session("tokenizer", graphs["encoder"], model.spec, "cpu")
    other = post((1, 28, 28), base_depth=4, latent_size=5, num_codes=16, code_size=8)
    with pytest.raises(
        InputError, match=r"tokenizer\.onnx: its outputs are .*\['N', 4\].* \['N', 5\]"
    ):
        Session("tokenizer", graphs["tokenizer"], other, "cpu")
    with pytest.raises(InputError, match=r"its inputs are .*\['N', 1.* \[8, 1"):
        Session("tokenizer", graphs["tokenizer"], model.spec, "cpu", batch=8)
    ids = by_onnx(
        graphs["tokenizer"],
        lambda p: setattr(p.graph.output[0].type.tensor_type, "elem_type", 1),
    )
    with pytest.raises(InputError, match=r"its outputs are \[\('indices', 'float32'"):
        Session("tokenizer", ids, model.spec, "cpu")


def test_all_graphs_are_inspected_before_the_first_is_opened(small, monkeypatch):
    spec, params = small
    graphs = build_graphs(spec, params)
    graphs["detokenizer"] += b"\0"
    never(monkeypatch)
    with pytest.raises(InputError, match=r"^detokenizer\.onnx: refused"):
        open_sessions(graphs, spec, "cpu")


def test_onnxruntime_gets_what_was_inspected(small, content, monkeypatch):
    given = []
    original = ort.InferenceSession

    def session(model, *arguments, **options):
        given.append(model)
        return original(model, *arguments, **options)

    monkeypatch.setattr(ort, "InferenceSession", session)
    graph = read_graph("quantizer", content)
    sessions, _ = open_sessions({"quantizer": graph}, small[0], "cpu")
    assert given == [content]
    latents = np.random.default_rng(0).normal(size=(3, 2, 2)).astype(np.float32)
    expected = Session("quantizer", content, small[0], "cpu")(latents)
    for found, other in zip(sessions["quantizer"](latents), expected, strict=True):
        np.testing.assert_array_equal(found, other)


def test_the_tables_are_those_of_onnx():
    """Compares field numbers, types and operators."""

    def fits(message, descriptor):
        assert message.name in (descriptor.name, f"TypeProto.{descriptor.name}")
        for number, row in message.fields.items():
            found = descriptor.fields_by_number[number]
            assert found.name == row.name
            assert (row.most > 1) == found.is_repeated or row.name == "opset_import"
            if isinstance(row.kind, wire.Message):
                fits(row.kind, found.message_type)

    fits(MODEL, onnx.ModelProto.DESCRIPTOR)
    for operator, attributes in OPERATORS.items():
        schema = onnx.defs.get_schema(operator, max(OPSETS), "")
        for name in attributes:
            field = {"FLOAT": "f", "INT": "i", "INTS": "ints"}[schema.attributes[name].type.name]  # type: ignore[attr-defined]
            assert ATTRIBUTES[name] == field
    for number, dtype in DTYPES.items():
        assert helper.tensor_dtype_to_np_dtype(number) == dtype


def test_random_mutations_are_refused_or_read_as_onnx_reads_them():
    found = inspection.campaign(2_000)
    assert found.differences == []
    assert found.errors == []
    assert found.accepted.total() + found.refused.total() == 2_000
    assert found.accepted.total() > 50


def test_the_campaign_notices_a_reader_that_errs(monkeypatch):
    graph = read_graph("x", inspection.small_graphs()[0])
    monkeypatch.setattr(inspection, "read_graph", lambda name, content: graph)
    assert len(inspection.campaign(10).differences) == 10

    def broken(name, content):
        raise InputError("two\nlines") if len(content) % 2 else IndexError("deep inside")

    monkeypatch.setattr(inspection, "read_graph", broken)
    assert len(inspection.campaign(10).errors) == 10


# onnxruntime.


def test_telemetry_is_off_before_the_first_session(small, content, monkeypatch):
    said: list[str] = []
    original = ort.InferenceSession
    monkeypatch.setattr(ort, "disable_telemetry_events", lambda: said.append("off"))

    def session(*arguments, **options):
        said.append("session")
        return original(*arguments, **options)

    monkeypatch.setattr(ort, "InferenceSession", session)
    library.onnxruntime.cache_clear()
    for _ in range(2):
        Session("quantizer", content, small[0], "cpu")
    assert said == ["off", "session", "session"]


def test_onnxruntime_leaves_nothing_in_the_home_folder(tmp_path):
    """Its telemetry would keep an identifier there, as soon as it is imported."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ORT_", "CI", "XDG_")) and "CI" not in name.split("_")
    }
    home = tmp_path / "home"
    home.mkdir()
    code = "from vqdeploy.runtime.library import onnxruntime; onnxruntime().SessionOptions()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**kept, "HOME": str(home)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert list(Path(home).iterdir()) == []


def test_a_graph_that_fails_as_it_runs_is_one_line(small):
    spec, params = small
    table = build_graphs(spec, params, GraphOptions(fold=True))["detokenizer"]
    session = Session("detokenizer", table, spec, "cpu")
    line = r"^detokenizer\.onnx: onnxruntime failed to run it on CPUExecutionProvider: .*"
    with pytest.raises(InputError, match=line) as caught:
        session(np.full((1, 2), 99))
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert session(np.zeros((1, 2), np.int64))[0].shape == (1, 1, 8, 8)


def test_a_graph_that_memory_cannot_hold_is_the_machines_error(small, content):
    """The graph computes the outer product of an outer product: 70 TB for 512 latents."""

    def explode(proto):
        nodes = list(proto.graph.node)
        del proto.graph.node[:]
        shapes = {"column": [-1, 1], "row": [1, -1], "back": [-1, 2, 2]}
        for name, shape in shapes.items():
            proto.graph.initializer.append(numpy_helper.from_array(np.array(shape), f"x.{name}"))

        def node(operator, inputs, output):
            proto.graph.node.append(helper.make_node(operator, inputs, [output], name=output))

        value = "latents"
        for step in "ab":
            for name in ("column", "row"):
                node("Reshape", [value, f"x.{name}"], f"{step}.{name}")
            node("Mul", [f"{step}.column", f"{step}.row"], f"{step}.product")
            value = f"{step}.product"
        node("Reshape", [value, "x.back"], "huge")
        nodes[0].input[0] = "huge"
        proto.graph.node.extend(nodes)

    session = Session("quantizer", by_onnx(content, explode), small[0], "cpu")
    session._largest = 512
    line = r"^quantizer\.onnx: onnxruntime failed .*: there is too little memory: "
    with pytest.raises(MachineError, match=line) as caught:
        session(np.zeros((512, 2, 2), np.float32))
    assert "\n" not in str(caught.value)
