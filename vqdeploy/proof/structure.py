"""Checks what the graphs of a bundle are, before any of them runs.

They must be the graphs that the exporter writes for the manifest's rows and the oracle's
parameters, node for node and bit for bit. Answers alone cannot show this: a code that no compared
image has could be anything, and a branch that no compared image takes could do anything.
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
"""The largest relative error of numbers that are computed from parameters. Their squares are summed
in an order that the library chooses."""

CODES, QUANTIZE, DEQUANTIZE, MOVED = (
    "_quantized",
    "QuantizeLinear",
    "DequantizeLinear",
    "_QuantizeLinear_Input",
)
"""onnxruntime's names in an int8 graph: the suffix of a parameter's codes, the two operators, and
the suffix of a value whose rounded copy has taken its name."""

HALF_STEP = 0.501
"""By how many int8 steps a parameter may be off. Both the parameter and the step were rounded."""

Found = Iterator[str | None]
"""Yields one entry per comparison: what is wrong, or None."""


def check_structure(
    spec: ModelSpec,
    params: Params,
    graphs: Mapping[str, Graph],
    options: GraphOptions,
    prior: tuple[PriorSpec, Params] | None = None,
) -> tuple[Check, Check]:
    """Compares the graphs of a bundle with graphs that are built again.

    graphs: by stage, all of ``STAGES``, and those of the prior if there is one.

    The first check compares nodes and the shapes of their inputs. Do not run graphs that fail it: a
    node that does not fit its input can end the process. The second check compares numbers. Int8
    networks are compared without their rounding nodes, and their parameters to half a step. A node
    or tensor that has the same name in several int8 graphs must be the same in all.
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
    """Compares a detokenizer that is a table, but not its entries: ``check_table`` does that."""
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
        yield None if same else f"{expected.name}: its {what} is not what its rows say"


def _nodes(found: Graph, expected: Graph, small: bool) -> Found:
    """Compares nodes by name; a node has the name of its value.

    Their order may differ, as long as each value is computed before its use.
    """
    stage, nodes = expected.name, _unrounded(found) if small else found.nodes
    own, written = ({node.name: node for node in each} for each in (nodes, expected.nodes))
    yield None if len(own) == len(nodes) else f"{stage}: two of its nodes have the same name"
    for name in [*written, *(name for name in own if name not in written)]:
        if own.get(name) == written.get(name):
            yield None
        elif name not in written:
            yield f"{stage}: it has a node {name}, which its rows do not have"
        else:
            yield f"{stage}: its node {name} is not what its rows say"


def _shapes(found: Graph, expected: Graph) -> Found:
    """Compares names, dtypes and shapes of tensors, and the values of integers."""
    stage = expected.name
    steps = {name for node in found.nodes if _rounds(node) for name in node.inputs}
    for name in found.tensors:
        foreign = name not in expected.tensors and name not in steps
        yield f"{stage}: it has a tensor {name}, which its rows do not have" if foreign else None
    for name, tensor in expected.tensors.items():
        own, codes = found.tensors.get(name), found.tensors.get(name + CODES)
        if own is None:
            fits = codes is not None and codes.shape == tensor.shape
        else:
            fits = (own.dtype, own.shape) == (tensor.dtype, tensor.shape)
            fits = fits and (tensor.dtype.startswith("float") or own == tensor)
        yield None if fits else f"{stage}: its tensor {name} is not what its rows say"


def _numbers(found: Graph, expected: Graph, params: Params) -> Found:
    for name, tensor in expected.tensors.items():
        own = found.tensors.get(name)
        if own is None:
            same = _is_rounded(found, name, tensor.array())
        else:
            same = own == tensor or (name not in params and _near(own, tensor))
        yield None if same else f"{expected.name}: the values of its {name} are not the model's"


def _near(found: Tensor, expected: Tensor) -> bool:
    """Returns whether numbers that are computed from parameters are equal except for rounding."""
    alike = (found.dtype, found.shape) == (expected.dtype, expected.shape)
    if not (alike and found.dtype.startswith("float")):
        return False
    return np.allclose(found.array(), expected.array(), CONSTANT_ERROR, 0)


def _rounds(node: Node) -> bool:
    return node.operator in (QUANTIZE, DEQUANTIZE)


def _unrounded(graph: Graph) -> tuple[Node, ...]:
    """Returns the nodes of an int8 graph as they were before rounding nodes were added."""
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
    """Returns whether the graph holds a parameter in int8, with one step or one per channel."""
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
    """Checks that int8 networks round, and that each value is restored by the step of rounding."""
    stage, rounds = graph.name, QUANTIZE in graph.operators
    yield None if rounds == (stage != "quantizer") else f"{stage}: its networks are not int8"
    by = {node.outputs[0]: node for node in graph.nodes if node.operator == QUANTIZE}
    for node in graph.nodes:
        if node.operator == DEQUANTIZE and node.inputs[0] not in graph.tensors:
            rounding = by.get(node.inputs[0])
            same = rounding is not None and rounding.inputs[1:] == node.inputs[1:]
            yield None if same else f"{stage}: {node.name} restores a value by another step"


def _one_meaning(graphs: Mapping[str, Graph]) -> Found:
    """Checks that nodes and tensors with the same name are the same in all graphs.

    Then tokenizer and detokenizer round as the encoder and the decoder do.
    """
    meanings: dict[str, Node | Tensor] = {}
    for stage, graph in graphs.items():
        named: dict[str, Node | Tensor] = {node.name: node for node in graph.nodes}
        for name, found in (*graph.tensors.items(), *named.items()):
            same = meanings.setdefault(name, found) == found
            yield None if same else f"{stage}: its {name} is another one than in earlier graphs"
