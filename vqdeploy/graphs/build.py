"""Builds the five graphs of a bundle from the rows. The same model gives the same bytes.

``build_graph`` needs only numpy, so that anyone who verifies a bundle can build its graphs
again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

import vqref
import vqref.likelihoods
from vqdeploy.graphs import likelihoods, quantizer
from vqdeploy.graphs.network import GraphBuilder
from vqdeploy.runtime.protobuf import OPSETS, Graph
from vqdeploy.stages import INDEX_TYPES, STAGES, ports
from vqref.precisions import PRECISIONS
from vqref.spec import CODEBOOK, ModelSpec
from vqref.validation import Params, check_params

GRAPHS_VERSION = 2
"""The version of the graphs. It rises whenever the same model would get other graphs. Only the
version that wrote a bundle can verify it."""

TARGETS = ("any", "cpu")
"""The providers that graphs are written for. "cpu" graphs are faster on onnxruntime's CPU
provider; other providers run them too."""

TABLE_ENTRIES = 2**16
"""The most rows of indices that a table may have."""

TABLE_BYTES = 64 * 2**20
"""The most bytes of a table that ``fold=None`` chooses. A larger table outweighs most
networks."""


@dataclass(frozen=True)
class GraphOptions:
    """How to write the graphs.

    opset: one of ``OPSETS``.
    precision: the networks' precision, as the ``option`` of a row of ``vqref.precisions`` that can
        be exported. The quantizer is always float32.
    batch: the only batch size that the graphs take, or None if they take any.
    fold: whether the detokenizer is a table of all reconstructions. None makes it a table if the
        table is small.
    target: one of ``TARGETS``.
    index_type: the dtype of the inputs and outputs ``indices``, one of ``INDEX_TYPES``.

    Raises ValueError that names the wrong field.
    """

    opset: int = OPSETS[0]
    precision: str = "fp32"
    batch: int | None = None
    fold: bool | None = None
    target: str = TARGETS[0]
    index_type: str = INDEX_TYPES[0]

    def __post_init__(self) -> None:
        exported = [row.option for row in PRECISIONS.values() if row.exports]
        known: dict[str, Sequence[int | str]] = {
            "opset": OPSETS,
            "precision": exported,
            "target": TARGETS,
            "index_type": INDEX_TYPES,
        }
        for field, values in known.items():
            if (found := getattr(self, field)) not in values:
                expected = ", ".join(map(str, values))
                raise ValueError(f"{field} is {found!r}, expected one of {expected}")
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"batch is {self.batch}, expected at least 1")

    def folds(self, spec: ModelSpec) -> bool:
        """Returns whether the detokenizer of a model of ``spec`` is a table.

        Raises ValueError if ``fold`` is True but the table would be too large.
        """
        entries = _table_entries(spec)
        if self.fold is None:
            return entries is not None and 4 * entries * math.prod(spec.image_shape) <= TABLE_BYTES
        if self.fold and entries is None:
            raise ValueError(
                f"fold: {spec.num_codes}^{spec.latent_size} different rows of indices are more "
                f"than the {TABLE_ENTRIES} that a table may have"
            )
        return self.fold


def _table_entries(spec: ModelSpec) -> int | None:
    """Returns K^S, or None if a table may not have that many entries or axes."""
    if spec.latent_size > math.log2(TABLE_ENTRIES):
        return None
    entries: int = spec.num_codes**spec.latent_size
    return entries if entries <= TABLE_ENTRIES else None


def _encoder(builder: GraphBuilder, spec: ModelSpec) -> None:
    builder.run(spec.encoder, "images", "latents")


def _quantizer(builder: GraphBuilder, spec: ModelSpec) -> None:
    quantizer.nearest(builder, spec, "latents", "indices")
    quantizer.lookup(builder, "indices", "quantized")


def _decoder(builder: GraphBuilder, spec: ModelSpec) -> None:
    builder.run(spec.decoder, "quantized", "outputs")
    likelihoods.mean(builder, spec, "outputs", "reconstructions")


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


def build_graphs(
    spec: ModelSpec, params: Params, options: GraphOptions | None = None
) -> dict[str, bytes]:
    """Returns {stage: bytes of its ONNX file, including weights}.

    ``build_graph`` builds each graph, and onnx checks it.

    Raises ValueError for parameters that do not fit the spec or the precision, and for graphs that
    an ONNX file cannot hold.
    """
    import onnx

    options = options or GraphOptions()
    check_params(spec, params)
    contents = {}
    for stage in STAGES:
        contents[stage] = build_graph(stage, spec, params, options).to_bytes()
        try:
            onnx.checker.check_model(contents[stage], full_check=True)
        except onnx.checker.ValidationError as error:  # for example, rows whose names clash
            reason = str(error).splitlines()[0]
            raise ValueError(f"{stage}: its rows make no valid ONNX graph: {reason}") from None
    return contents


def build_graph(
    stage: str,
    spec: ModelSpec,
    params: Params,
    options: GraphOptions,
    table: npt.NDArray[np.float32] | None = None,
) -> Graph:
    """Returns the graph of one of ``STAGES``.

    For int8 the graph is float32, and ``vqdeploy.graphs.int8`` quantizes it. table: what ``fold``
    returns, if the caller has it and ``options`` ask for it.

    Raises ValueError for values that the precision does not hold, names that are not printable
    ASCII, and graphs that an ONNX file cannot hold.
    """
    builder = GraphBuilder(
        params,
        half=options.precision == "fp16",
        for_processor=options.target == "cpu",
        index_type=options.index_type,
    )
    if stage == "detokenizer" and options.folds(spec):
        quantizer.table(builder, fold(spec, params) if table is None else table)
    else:
        BUILDERS[stage](builder, spec)
    arrays = ports(spec, options.batch, options.index_type)
    inputs = tuple(arrays[name] for name in STAGES[stage].inputs)
    outputs = tuple(arrays[name] for name in STAGES[stage].outputs)
    return Graph(stage, options.opset, inputs, outputs, tuple(builder.nodes), builder.tensors)


def fold(spec: ModelSpec, params: Params) -> npt.NDArray[np.float32]:
    """Returns the oracle's reconstructions of every row of indices, rounded to float32.

    The shape is (K, ..., K, C, H, W), with S axes of K.
    """
    axes = [np.arange(spec.num_codes)] * spec.latent_size
    rows = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)  # (K, ..., K, S)
    indices = rows.reshape(-1, spec.latent_size)
    table = np.empty((len(indices), *spec.image_shape), np.float32)
    codebook = np.asarray(params[CODEBOOK], np.float32)
    for start in range(0, len(indices), 1024):
        part = slice(start, start + 1024)
        outputs = vqref.decode(spec, params, codebook[indices[part]])
        table[part] = vqref.likelihoods.mean(spec, outputs)
    return table.reshape(*rows.shape[:-1], *spec.image_shape)
