"""The five graphs of a bundle, built from the layer table: the same model gives the same bytes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import helper

from vqdeploy import quantizer
from vqdeploy.network import GraphBuilder
from vqdeploy.stages import STAGES, ports
from vqref.spec import ModelSpec
from vqref.validation import Params, check_params

OPSET = 18
"""Below 22, where onnxruntime's CUDA provider has every kernel that these graphs need."""

IR_VERSION = 10
"""onnx writes a newer one by default, which onnxruntime refuses."""


def _encoder(builder: GraphBuilder, spec: ModelSpec) -> None:
    builder.run(spec.encoder, "images", "latents")


def _quantizer(builder: GraphBuilder, spec: ModelSpec) -> None:
    quantizer.nearest(builder, "latents", "indices")
    quantizer.lookup(builder, "indices", "quantized")


def _decoder(builder: GraphBuilder, spec: ModelSpec) -> None:
    builder.run(spec.decoder, "quantized", "logits")
    builder.node("Sigmoid", ["logits"], "probabilities")


def _tokenizer(builder: GraphBuilder, spec: ModelSpec) -> None:
    _encoder(builder, spec)
    quantizer.nearest(builder, "latents", "indices")


def _detokenizer(builder: GraphBuilder, spec: ModelSpec) -> None:
    quantizer.lookup(builder, "indices", "quantized")
    _decoder(builder, spec)


BUILDERS: dict[str, Callable[[GraphBuilder, ModelSpec], None]] = {
    "encoder": _encoder,
    "quantizer": _quantizer,
    "decoder": _decoder,
    "tokenizer": _tokenizer,
    "detokenizer": _detokenizer,
}


def build_graphs(spec: ModelSpec, params: Params) -> dict[str, bytes]:
    """{stage: bytes of its ONNX file} of every stage, weights inside, batch axis free, checked by onnx.

    Raises ValueError for parameters that do not fit the spec.
    """
    check_params(spec, params)
    return {stage: _model(stage, spec, params) for stage in STAGES}


def _model(stage: str, spec: ModelSpec, params: Params) -> bytes:
    builder = GraphBuilder(params)
    BUILDERS[stage](builder, spec)
    arrays = ports(spec)
    infos = {
        port.name: helper.make_tensor_value_info(port.name, helper.np_dtype_to_tensor_dtype(np.dtype(port.dtype)), port.shape)
        for port in arrays.values()
    }
    graph = helper.make_graph(
        builder.nodes,
        stage,
        [infos[port] for port in STAGES[stage].inputs],
        [infos[port] for port in STAGES[stage].outputs],
        list(builder.initializers.values()),
    )
    model = helper.make_model(
        graph, ir_version=IR_VERSION, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="portable-vqvae"
    )
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))
