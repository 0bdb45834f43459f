"""Builds the two graphs of a prior: all positions at once, and one position per call.

Both are always float32.
"""

from __future__ import annotations

import numpy as np

from vqdeploy.graphs import network
from vqdeploy.graphs.build import GraphOptions
from vqdeploy.graphs.network import GraphBuilder
from vqdeploy.runtime.protobuf import Graph
from vqdeploy.stages import PRIOR_STAGES, prior_ports
from vqref.prior import LOGITS, PriorSpec
from vqref.spec import Layer, plan
from vqref.validation import Params, check_params


def build_prior_graph(stage: str, spec: PriorSpec, params: Params, options: GraphOptions) -> Graph:
    """Returns the graph of one of ``PRIOR_STAGES``.

    Uses only opset, batch and index_type of the options. Raises ValueError for parameters that do
    not fit, and for graphs that an ONNX file cannot hold.
    """
    check_params(spec, params)
    builder = GraphBuilder(params, index_type=options.index_type)
    if stage == "prior":
        _whole(builder, spec)
    else:
        _step(builder, spec)
    known = prior_ports(spec, options.batch, options.index_type)[stage]
    inputs, outputs = (
        tuple(known[name] for name in names)
        for names in (PRIOR_STAGES[stage].inputs, PRIOR_STAGES[stage].outputs)
    )
    return Graph(stage, options.opset, inputs, outputs, tuple(builder.nodes), builder.tensors)


def _whole(builder: GraphBuilder, spec: PriorSpec) -> None:
    """Adds nodes from indices (N, S) to log_probabilities (N, S, K)."""
    if spec.rows:
        logits = builder.run(spec.rows, "indices", "logits")
    else:
        logits = _table(builder, "indices", builder.parameter(LOGITS))
    builder.node("LogSoftmax", [logits], "log_probabilities", axis=-1)


def _table(builder: GraphBuilder, indices: str, table: str) -> str:
    """Adds the same table for each image.

    Only the indices know the number of images, so the table is added to 0 times each index.
    """
    nothing = builder.constant("nothing", np.float32(0))
    x = builder.cast(indices, "indices.numbers", "float32")
    x = builder.node("Mul", [x, nothing], "indices.nothing")
    x = builder.node("Unsqueeze", [x, builder.integers("last_axis", [-1])], "indices.columns")
    return builder.node("Add", [x, table], "logits")


def _step(builder: GraphBuilder, spec: PriorSpec) -> None:
    """Adds nodes for one position.

    Takes previous (N,), position (1,), and keys and values (N, L, S, F) of the L rows of attention.
    Gives log_probabilities (N, K), and keys and values that include this position.
    """
    if not spec.rows:
        row = builder.node("Gather", [builder.parameter(LOGITS), "position"], "row", axis=0)
        logits = _table(builder, "previous", row)
        builder.node("LogSoftmax", [logits], "log_probabilities", axis=-1)
        for name in ("keys", "values"):
            builder.node("Identity", [name], f"next_{name}")
        return
    values, kept = ["previous"], dict[str, tuple[str, str]]()
    for number, step in enumerate(plan(spec.rows), 1):
        layer, inputs = step.layer, [values[i] for i in step.sources]
        name = "logits" if number == len(spec.rows) else layer.name
        linear = name if layer.activation == "linear" else f"{name}.linear"
        if layer.kind == "embedding":
            x = _embedding(builder, layer, linear, *inputs)
        elif layer.kind == "attention":
            kept[layer.name] = _remembered(builder, layer, len(kept), *inputs[1:])
            places, _ = network.numbers_of_places(builder, layer.in_shape[0])
            later = builder.node("Greater", [places, "position"], f"{name}.later")
            x = network.attended(builder, layer, linear, (inputs[0], *kept[layer.name]), 1, later)
        else:
            x = network.KINDS[layer.kind](builder, layer, linear, *inputs)
        if layer.activation != "linear":
            x = network.ACTIVATIONS[layer.activation](builder, name, x)
        values.append(x)
    x = builder.node("Squeeze", ["logits", builder.integers("place_axis", [1])], "logits.place")
    builder.node("LogSoftmax", [x], "log_probabilities", axis=-1)
    for i, name in enumerate(("keys", "values")):
        builder.node(
            "Concat", [_layered(builder, pair[i]) for pair in kept.values()], f"next_{name}", axis=1
        )


def _embedding(builder: GraphBuilder, layer: Layer, output: str, previous: str) -> str:
    """Adds the place's bias (N, 1, F), and after the first place the previous index's vector."""
    weight, bias = builder.weights(layer)
    none = builder.integers("none", [0])
    started = builder.node("Greater", ["position", none], f"{output}.started")
    started = builder.cast(started, f"{output}.factor", "float32")
    x = builder.node("Gather", [weight, previous], f"{output}.vectors", axis=0)
    x = builder.node("Mul", [x, started], f"{output}.earlier")
    place = builder.node("Gather", [bias, "position"], f"{output}.place", axis=0)
    x = builder.node("Add", [x, place], f"{output}.sum")
    return builder.node("Unsqueeze", [x, builder.integers("place_axis", [1])], output)


def _remembered(
    builder: GraphBuilder, layer: Layer, number: int, key: str, value: str
) -> tuple[str, str]:
    """Adds the keys and values (N, S, F) of a row, including those of this place."""
    _, places = network.numbers_of_places(builder, layer.in_shape[0])
    here = builder.node("Equal", [places, "position"], f"{layer.name}.here")
    which = builder.constant(f"{layer.name}.number", np.int64(number))
    found = []
    for name, new in (("keys", key), ("values", value)):
        old = builder.node("Gather", [name, which], f"{layer.name}.{name}.before", axis=1)
        found.append(builder.node("Where", [here, new, old], f"{layer.name}.{name}.now"))
    return found[0], found[1]


def _layered(builder: GraphBuilder, kept: str) -> str:
    """Reshapes (N, S, F) to (N, 1, S, F)."""
    axis = builder.integers("place_axis", [1])
    return builder.node("Unsqueeze", [kept, axis], f"{kept}.layer")
