"""The five graphs of a bundle, built from the layer table: the same model gives the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from vqdeploy import quantizer
from vqdeploy.network import GraphBuilder
from vqref.spec import ModelSpec
from vqref.validation import Params, check_params

OPSET = 18
"""Below 22, where onnxruntime's CUDA provider has every kernel that these graphs need."""

IR_VERSION = 10
"""onnx writes a newer one by default, which onnxruntime refuses."""


@dataclass(frozen=True)
class Port:
    """An input or output: its name in the vocabulary, dtype, and shape with "N" for the batch."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def ports(spec: ModelSpec) -> dict[str, Port]:
    """Every array that enters or leaves a graph, by name."""
    latents = ("N", spec.latent_size, spec.code_size)
    images = ("N", *spec.image_shape)
    found = (
        Port("images", "float32", images),
        Port("latents", "float32", latents),
        Port("indices", "int64", latents[:2]),
        Port("quantized", "float32", latents),
        Port("logits", "float32", images),
        Port("probabilities", "float32", images),
    )
    return {port.name: port for port in found}


@dataclass(frozen=True)
class Stage:
    """One graph: the arrays it takes and gives, by name, and the nodes between."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    build: Callable[[GraphBuilder, ModelSpec], None]


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


STAGES = {
    "encoder": Stage(("images",), ("latents",), _encoder),
    "quantizer": Stage(("latents",), ("indices", "quantized"), _quantizer),
    "decoder": Stage(("quantized",), ("logits", "probabilities"), _decoder),
    "tokenizer": Stage(("images",), ("indices",), _tokenizer),
    "detokenizer": Stage(("indices",), ("probabilities",), _detokenizer),
}
"""encoder, quantizer and decoder are one stage each; tokenizer and detokenizer are what applications run."""


def build_graphs(spec: ModelSpec, params: Params) -> dict[str, bytes]:
    """{stage: bytes of its ONNX file} of every stage, weights inside, batch axis free, checked by onnx.

    Raises ValueError for parameters that do not fit the spec.
    """
    check_params(spec, params)
    return {name: _model(name, stage, spec, params) for name, stage in STAGES.items()}


def _model(name: str, stage: Stage, spec: ModelSpec, params: Params) -> bytes:
    builder = GraphBuilder(params)
    stage.build(builder, spec)
    arrays = ports(spec)
    infos = {
        port.name: helper.make_tensor_value_info(port.name, helper.np_dtype_to_tensor_dtype(np.dtype(port.dtype)), port.shape)
        for port in arrays.values()
    }
    graph = helper.make_graph(
        builder.nodes,
        name,
        [infos[port] for port in stage.inputs],
        [infos[port] for port in stage.outputs],
        list(builder.initializers.values()),
    )
    model = helper.make_model(
        graph, ir_version=IR_VERSION, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="portable-vqvae"
    )
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))
