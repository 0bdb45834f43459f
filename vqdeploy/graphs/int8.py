"""Turns networks into int8 with onnxruntime's own quantizer.

Weights are scaled per channel, activations by the ranges that they take on images. Encoder and
decoder are quantized once. Tokenizer and detokenizer are then put together from their nodes and
those of the quantizer, in the same way as in float32.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, numpy_helper

from vqdeploy.runtime.library import onnxruntime
from vqdeploy.stages import STAGES
from vqref.validation import Array

OPERATORS = ("Conv", "ConvTranspose", "Gemm")
"""The operators that are quantized: the networks' products."""


def quantize_graphs(
    graphs: Mapping[str, bytes], inputs: Mapping[str, Array], *, folded: bool
) -> dict[str, bytes]:
    """Returns the float32 graphs of a bundle with their networks in int8.

    inputs: images (N, C, H, W) and quantized (N, S, D), whose activations set the ranges.
    folded: whether the detokenizer is a table, which stays as it is.
    """
    encoder, decoder = (
        _quantize(graphs[stage], STAGES[stage].inputs[0], inputs)
        for stage in ("encoder", "decoder")
    )
    quantizer = onnx.load_from_string(graphs["quantizer"]).graph
    *search, lookup = quantizer.node
    tensors = [*encoder.initializer, *quantizer.initializer, *decoder.initializer]
    nodes = {
        "encoder": encoder.node,
        "decoder": decoder.node,
        "tokenizer": [*encoder.node, *search],
        **({} if folded else {"detokenizer": [lookup, *decoder.node]}),
    }
    composed = {stage: _composed(graphs[stage], nodes[stage], tensors) for stage in nodes}
    return {**graphs, **composed}


def _composed(content: bytes, nodes: Sequence[NodeProto], tensors: Sequence[TensorProto]) -> bytes:
    """Returns the graph ``content`` with other nodes and with those of ``tensors`` that they take.

    All tensors are written in the same form.
    """
    model = onnx.load_from_string(content)
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    taken = {name for node in nodes for name in node.input}
    kept = {tensor.name: tensor for tensor in tensors if tensor.name in taken}
    model.graph.initializer.extend(
        numpy_helper.from_array(numpy_helper.to_array(tensor), name)
        for name, tensor in kept.items()
    )
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))


def _quantize(content: bytes, name: str, inputs: Mapping[str, Array]) -> GraphProto:
    onnxruntime()  # with its telemetry off
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    model = onnx.load_from_string(content)
    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 1

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Returns one image per call, repeated to fill the graph's batch.

        One at a time, because the calibration keeps every value of the graph in memory.
        """

        def __init__(self) -> None:
            self.images = iter(inputs[name])

        def get_next(self) -> dict[str, Array] | None:
            image = next(self.images, None)
            return None if image is None else {name: np.stack([image] * batch)}

    # The quantizer recommends a preparation that is useless for graphs of these few operators.
    logging.disable(logging.WARNING)
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = Path(folder) / "int8.onnx"
            quantize_static(
                model,
                str(output),
                Reader(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(OPERATORS),
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
            return onnx.load(output).graph
    finally:
        logging.disable(logging.NOTSET)
