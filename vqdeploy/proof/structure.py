"""What the graphs of a bundle are, before any of them runs: those that the exporter writes for the
manifest's rows and the oracle's parameters, node for node and bit for bit.

Answers alone cannot show this: a code that no compared image has may be any code, and a branch that
no compared image takes may do anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from vqdeploy.graphs.build import GraphOptions, build_graph
from vqdeploy.graphs.prior import build_prior_graph
from vqdeploy.runtime.protobuf import Graph, Node, Tensor, attributes_of
from vqdeploy.stages import PRIOR_STAGES
from vqref.agreement.report import Check
from vqref.precisions import of_option
from vqref.prior import PriorSpec
from vqref.spec import ModelSpec
from vqref.validation import Array, Params

CONSTANT_ERROR = 1e-6
"""By which numbers that follow from parameters may differ, over their size: squares are summed in
an order that is the library's."""

CODES, QUANTIZE, DEQUANTIZE, MOVED = (
    "_quantized",
    "QuantizeLinear",
    "DequantizeLinear",
    "_QuantizeLinear_Input",
)
"""onnxruntime's names in a graph of int8: of a parameter's codes, of its operators, and of a value
whose own name its rounded copy has."""

HALF_STEP = 0.501
"""By how many steps of int8 a parameter may be off: it was rounded, its step too."""

Found = Iterator[str | None]
"""For each thing that was compared, what is wrong with it, if anything."""


def check_structure(
    spec: ModelSpec,
    params: Params,
    graphs: Mapping[str, Graph],
    options: GraphOptions,
    prior: tuple[PriorSpec, Params] | None = None,
) -> tuple[Check, Check]:
    """Holds the graphs of a bundle, of each of ``STAGES`` and those of its prior, to those that are
    written anew.

    The first check is of nodes, and of the shapes of what they take: graphs that fail it are not to
    be run, for a node that does not fit its input can end the process. The second is of numbers.
    Of int8, networks are compared without their steps of rounding, parameters to half a step, and
    what has one name in several graphs must be the same in all.
    """
    small, networks = options.precision == "int8", dict(graphs)
    learned = {stage: networks.pop(stage) for stage in PRIOR_STAGES if stage in networks}
    nodes, numbers = list[Found](), list[Found]()
    if options.folds(spec):
        nodes.append(_table(networks.pop("detokenizer"), spec, params, options))
    for stage, found in networks.items():
        expected = build_graph(stage, spec, params, options)
        nodes += [_head(found, expected), _nodes(found, expected, small), _shapes(found, expected)]
        numbers.append(_numbers(found, expected, params))
        if small:
            nodes.append(_paired(found))
    if small:
        numbers.append(_one_meaning(networks))
    for stage, found in learned.items():
        assert prior is not None
        expected = build_prior_graph(stage, *prior, options)
        nodes += [_head(found, expected), _nodes(found, expected, False), _shapes(found, expected)]
        numbers.append(_numbers(found, expected, prior[1]))
    return _check("graphs", options, nodes), _check("weights", options, numbers)


def _check(name: str, options: GraphOptions, found: list[Found]) -> Check:
    problems = [problem for each in found for problem in each]
    wrong = [problem for problem in problems if problem]
    problem = wrong[0] if wrong else None
    return Check(name, of_option(options.precision), len(problems), len(wrong), problem=problem)


def _table(found: Graph, spec: ModelSpec, params: Params, options: GraphOptions) -> Found:
    """A detokenizer that is a table; its entries are compared elsewhere."""
    table = found.tensors.get("table")
    shape = (*[spec.num_codes] * spec.latent_size, *spec.image_shape)
    if table is None or (table.dtype, table.shape) != ("float32", shape):
        yield f"detokenizer: it has no table of {shape}"
        return
    expected = build_graph("detokenizer", spec, params, options, table.array())
    yield from (*_head(found, expected), *_nodes(found, expected, False), *_shapes(found, expected))


def _head(found: Graph, expected: Graph) -> Found:
    for what in ("name", "opset", "inputs", "outputs"):
        same = getattr(found, what) == getattr(expected, what)
        yield None if same else f"{expected.name}: its {what} are not as its rows have them"


def _nodes(found: Graph, expected: Graph, small: bool) -> Found:
    """Each node by its name; every one is named after its value. Their order is free where values
    flow otherwise in no order."""
    stage, nodes = expected.name, _unrounded(found) if small else found.nodes
    own, written = ({node.name: node for node in each} for each in (nodes, expected.nodes))
    yield None if len(own) == len(nodes) else f"{stage}: two of its nodes have one name"
    for name in [*written, *(name for name in own if name not in written)]:
        if own.get(name) == written.get(name):
            yield None
        elif name not in written:
            yield f"{stage}: it has a node {name} that its rows do not"
        else:
            yield f"{stage}: its node {name} is not as its rows have it"


def _shapes(found: Graph, expected: Graph) -> Found:
    """Names, dtypes and shapes of what nodes take, and integers: axes, bounds and shapes."""
    stage = expected.name
    steps = {name for node in found.nodes if _rounds(node) for name in node.inputs}
    for name in found.tensors:
        foreign = name not in expected.tensors and name not in steps
        yield f"{stage}: it has numbers {name} that its rows do not" if foreign else None
    for name, tensor in expected.tensors.items():
        own, codes = found.tensors.get(name), found.tensors.get(name + CODES)
        if own is None:
            fits = codes is not None and codes.shape == tensor.shape
        else:
            fits = (own.dtype, own.shape) == (tensor.dtype, tensor.shape)
            fits = fits and (tensor.dtype.startswith("float") or own == tensor)
        yield None if fits else f"{stage}: its {name} is not as its rows have it"


def _numbers(found: Graph, expected: Graph, params: Params) -> Found:
    for name, tensor in expected.tensors.items():
        own = found.tensors.get(name)
        if own is None:
            same = _is_rounded(found, name, tensor.array())
        else:
            same = own == tensor or (name not in params and _near(own, tensor))
        yield None if same else f"{expected.name}: its numbers {name} are not the model's"


def _near(found: Tensor, expected: Tensor) -> bool:
    """Whether numbers that follow from parameters are equal but for rounding."""
    alike = (found.dtype, found.shape) == (expected.dtype, expected.shape)
    if not (alike and found.dtype.startswith("float")):
        return False
    return np.allclose(found.array(), expected.array(), CONSTANT_ERROR, 0)


def _rounds(node: Node) -> bool:
    return node.operator in (QUANTIZE, DEQUANTIZE)


def _unrounded(graph: Graph) -> tuple[Node, ...]:
    """The nodes of a graph of int8 but for those that round, each with the values that it had."""
    source = {node.outputs[0]: node.inputs[0] for node in graph.nodes if _rounds(node)}

    def of(value: str) -> str:
        while value in source:
            value = source[value]
        return value.removesuffix(CODES if value in graph.tensors else MOVED)

    return tuple(
        Node(
            node.name,
            node.operator,
            tuple(map(of, node.inputs)),
            tuple(name.removesuffix(MOVED) for name in node.outputs),
            node.attributes,
        )
        for node in graph.nodes
        if not _rounds(node)
    )


def _is_rounded(graph: Graph, name: str, expected: Array) -> bool:
    """Whether the graph holds a parameter in int8, each channel by a step of its own."""
    node = next((n for n in graph.nodes if _rounds(n) and n.inputs[0] == name + CODES), None)
    if node is None or not graph.tensors.keys() >= set(node.inputs):
        return False
    codes, steps, zeros = (graph.tensors[value].array() for value in node.inputs)
    axis = int(expected.ndim > 1 and node.attributes == attributes_of({"axis": 1}))
    channels = expected.shape[axis]
    if codes.shape != expected.shape or steps.shape not in ((), (channels,)) or zeros.any():
        return False
    across = np.ones(expected.ndim, np.int64)
    across[axis] = steps.size
    step = np.abs(steps.astype(np.float64)).reshape(across)
    return bool((np.abs(codes * step - expected) <= HALF_STEP * step).all())


def _paired(graph: Graph) -> Found:
    """Networks of int8 round, and a value is taken back by the step by which it was rounded."""
    stage, rounds = graph.name, QUANTIZE in graph.operators
    yield None if rounds == (stage != "quantizer") else f"{stage}: its networks are not int8"
    by = {node.outputs[0]: node for node in graph.nodes if node.operator == QUANTIZE}
    for node in graph.nodes:
        if node.operator == DEQUANTIZE and node.inputs[0] not in graph.tensors:
            rounding = by.get(node.inputs[0])
            same = rounding is not None and rounding.inputs[1:] == node.inputs[1:]
            yield None if same else f"{stage}: {node.name} takes back by another step"


def _one_meaning(graphs: Mapping[str, Graph]) -> Found:
    """What has one name in several graphs is the same in all, so that tokenizer and detokenizer
    round as the encoder and the decoder do."""
    meanings: dict[str, Node | Tensor] = {}
    for stage, graph in graphs.items():
        named: dict[str, Node | Tensor] = {node.name: node for node in graph.nodes}
        for name, found in (*graph.tensors.items(), *named.items()):
            same = meanings.setdefault(name, found) == found
            yield None if same else f"{stage}: its {name} is not that of the graph it is part of"
