"""Networks in int8 by onnxruntime's own quantizer: weights by channel, activations by the ranges that images show."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from vqdeploy.stages import STAGES

Array = npt.NDArray[Any]

OPERATORS = ("Conv", "ConvTranspose", "Gemm")
"""What is quantized: the networks' products; not those of a large codebook's search, whose nodes are named after it."""


def quantize_graphs(graphs: Mapping[str, bytes], inputs: Mapping[str, Array], *, folded: bool) -> dict[str, bytes]:
    """The float32 graphs of a bundle with their networks in int8. inputs: for each name of STAGES' inputs, the arrays whose
    activations set the ranges. folded: the detokenizer is a table, and stays."""
    untouched = {"quantizer", *(["detokenizer"] if folded else [])}
    return {
        stage: content if stage in untouched else _quantize(content, STAGES[stage].inputs[0], inputs)
        for stage, content in graphs.items()
    }


def _quantize(content: bytes, name: str, inputs: Mapping[str, Array]) -> bytes:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """The arrays once, a few images at a time."""

        def __init__(self) -> None:
            array = inputs[name]
            self.parts = iter([array[start : start + 64] for start in range(0, len(array), 64)])

        def get_next(self) -> dict[str, Array] | None:
            part = next(self.parts, None)
            return None if part is None else {name: np.ascontiguousarray(part)}

    logging.disable(logging.WARNING)  # it recommends a preparation that graphs of these few operators have no use for
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
                nodes_to_exclude=[node.name for node in model.graph.node if node.name.startswith("quantizer.")],
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
