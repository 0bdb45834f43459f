"""Networks in int8 by onnxruntime's own quantizer.

Weights are scaled per channel, activations by the ranges that they take on images.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx

from vqdeploy.stages import STAGES
from vqref.validation import Array

OPERATORS = ("Conv", "ConvTranspose", "Gemm")
"""The operators that are quantized: the networks' products. The search of a large codebook holds
one, too; its nodes are known by their names, and stay."""


def quantize_graphs(
    graphs: Mapping[str, bytes], inputs: Mapping[str, Array], *, folded: bool
) -> dict[str, bytes]:
    """Returns the float32 graphs of a bundle with their networks in int8.

    inputs: for each name of an input in ``STAGES``, the arrays whose activations set the ranges.
    folded: whether the detokenizer is a table, which stays as it is.
    """
    untouched = {"quantizer", *(["detokenizer"] if folded else [])}
    return {
        stage: content
        if stage in untouched
        else _quantize(content, STAGES[stage].inputs[0], inputs)
        for stage, content in graphs.items()
    }


def _quantize(content: bytes, name: str, inputs: Mapping[str, Array]) -> bytes:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Gives one image at a time, for the calibration holds every value of the graph."""

        def __init__(self) -> None:
            self.images = iter(inputs[name])

        def get_next(self) -> dict[str, Array] | None:
            image = next(self.images, None)
            return None if image is None else {name: np.ascontiguousarray(image[None])}

    # It recommends a preparation for which graphs of these few operators have no use.
    logging.disable(logging.WARNING)
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = Path(folder) / "int8.onnx"
            model = onnx.load_from_string(content)
            quantize_static(
                model,
                str(output),
                Reader(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(OPERATORS),
                nodes_to_exclude=[
                    node.name for node in model.graph.node if node.name.startswith("quantizer.")
                ],
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
            model = onnx.load(output)
    finally:
        logging.disable(logging.NOTSET)
    del model.metadata_props[:]
    standard = [opset for opset in model.opset_import if opset.domain == ""]
    del model.opset_import[:]
    model.opset_import.extend(standard)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))
