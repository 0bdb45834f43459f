"""The five graphs of a bundle, built from the layer table: the same model gives the same bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

import vqref
from vqdeploy import quantizer
from vqdeploy.network import GraphBuilder
from vqdeploy.stages import STAGES, ports
from vqref.spec import CODEBOOK, ModelSpec
from vqref.validation import Params, check_params

OPSETS = (18, 19, 20)
"""Below 22, where onnxruntime's CUDA provider has every kernel that these graphs need."""

IR_VERSION = 10
"""onnx writes a newer one by default, which onnxruntime refuses."""

PRECISIONS = {"fp32": "float32", "fp16": "float16", "int8": "int8"}
"""Of the networks, as the command line and as the manifest names them. The quantizer is always float32."""

TARGETS = ("any", "cpu")
"""What graphs are written for: any provider, or onnxruntime's CPU provider, on which they are faster; others run them too."""

FOLDED_ENTRIES = 65_536
"""At most so many different tokens an image make a table."""

FOLDED_BYTES = 64 * 2**20
"""A larger table is made only where it is asked for: it would be larger than most networks."""


@dataclass(frozen=True)
class GraphOptions:
    """How graphs are written.

    opset: one of OPSETS. precision: one of PRECISIONS. symmetric_pads: see ``GraphBuilder``. batch: the one batch size that
    every graph takes, None where any will do. fold: whether the detokenizer is a table; None: where that is small. target: one
    of TARGETS.

    Raises ValueError that names the field.
    """

    opset: int = OPSETS[0]
    precision: str = "fp32"
    symmetric_pads: bool = False
    batch: int | None = None
    fold: bool | None = None
    target: str = TARGETS[0]

    def __post_init__(self) -> None:
        if self.opset not in OPSETS:
            raise ValueError(f"opset is {self.opset}, expected one of {', '.join(map(str, OPSETS))}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}, expected one of {', '.join(PRECISIONS)}")
        if self.target not in TARGETS:
            raise ValueError(f"target is {self.target!r}, expected one of {', '.join(TARGETS)}")
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"batch is {self.batch}, expected at least 1")

    def folds(self, spec: ModelSpec) -> bool:
        """Whether the detokenizer of a model of ``spec`` is a table. Raises ValueError where it should be and is too large."""
        entries: int = spec.num_codes**spec.latent_size
        if self.fold is None:
            return entries <= FOLDED_ENTRIES and 4 * entries * math.prod(spec.image_shape) <= FOLDED_BYTES
        if self.fold and entries > FOLDED_ENTRIES:
            raise ValueError(f"fold: {spec.num_codes}^{spec.latent_size} entries, at most {FOLDED_ENTRIES} make a table")
        return self.fold


def _encoder(builder: GraphBuilder, spec: ModelSpec) -> None:
    builder.run(spec.encoder, "images", "latents")


def _quantizer(builder: GraphBuilder, spec: ModelSpec) -> None:
    quantizer.nearest(builder, spec, "latents", "indices")
    quantizer.lookup(builder, "indices", "quantized")


def _decoder(builder: GraphBuilder, spec: ModelSpec) -> None:
    builder.run(spec.decoder, "quantized", "logits")
    builder.node("Sigmoid", ["logits"], "probabilities")


def _tokenizer(builder: GraphBuilder, spec: ModelSpec) -> None:
    _encoder(builder, spec)
    quantizer.nearest(builder, spec, "latents", "indices")


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


def build_graphs(spec: ModelSpec, params: Params, options: GraphOptions | None = None) -> dict[str, bytes]:
    """{stage: bytes of its ONNX file} of every stage, weights inside, checked by onnx. int8 is float32 here: what quantizes
    it is ``vqdeploy.int8``.

    Raises ValueError for parameters that do not fit the spec or the precision.
    """
    options = options or GraphOptions()
    check_params(spec, params)
    graphs = {}
    for stage in STAGES:
        builder = GraphBuilder(
            params,
            half=options.precision == "fp16",
            symmetric_pads=options.symmetric_pads,
            for_processor=options.target == "cpu",
        )
        if stage == "detokenizer" and options.folds(spec):
            _table(builder, spec, params)
        else:
            BUILDERS[stage](builder, spec)
        graphs[stage] = _model(stage, spec, builder, options)
    return graphs


def _table(builder: GraphBuilder, spec: ModelSpec, params: Params) -> None:
    """The detokenizer as one look-up: the oracle's probabilities of every possible row of indices, rounded to float32."""
    table = fold(spec, params)
    builder.initializers["table"] = numpy_helper.from_array(table, "table")
    builder.node("GatherND", ["table", "indices"], "probabilities")


def fold(spec: ModelSpec, params: Params) -> npt.NDArray[np.float32]:
    """Probabilities of every row of indices: (K, ..., K, C, H, W) with S axes of num_codes K."""
    grid = np.stack(np.meshgrid(*[np.arange(spec.num_codes)] * spec.latent_size, indexing="ij"), axis=-1)  # (K, ..., K, S)
    indices = grid.reshape(-1, spec.latent_size)
    table = np.empty((len(indices), *spec.image_shape), np.float32)
    codebook = np.asarray(params[CODEBOOK], np.float32)
    for start in range(0, len(indices), 1024):
        part = slice(start, start + 1024)
        table[part] = vqref.sigmoid(vqref.decode(spec, params, codebook[indices[part]]))
    return table.reshape(*grid.shape[:-1], *spec.image_shape)


def _model(stage: str, spec: ModelSpec, builder: GraphBuilder, options: GraphOptions) -> bytes:
    arrays = ports(spec, options.batch)
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
        graph, ir_version=IR_VERSION, opset_imports=[helper.make_opsetid("", options.opset)], producer_name="portable-vqvae"
    )
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))
