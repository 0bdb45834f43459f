"""Writes a model repository for NVIDIA's Triton Inference Server, one model per graph of a bundle.

The files follow ``model_repository.md`` and ``model_configuration.md`` of Triton's documentation;
``config.pbtxt`` is the text form of its ``ModelConfig``. The ``parameters`` of each configuration
hold the digest of the bundle's manifest, for clients.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vqdeploy.bundle import Bundle
from vqdeploy.runtime.protobuf import read_graph
from vqdeploy.runtime.sessions import INT8_OPERATOR, batch_size, cuda_options
from vqdeploy.stages import POSITION, PRIOR_STAGES, STAGES, Port, ports_of, stage_of
from vqref.host.files import publish_folder

TYPES = {"float32": "TYPE_FP32", "int64": "TYPE_INT64", "int32": "TYPE_INT32"}
"""Triton's names for the dtypes of ports."""

QUEUE_MICROSECONDS = 1000
"""How long a request waits for others to join its batch."""

CUDA_PARAMETERS = {"cudnn_conv_algo_search": "1"}
"""1 is the heuristic search. Triton's default is the exhaustive search, which would start again at
each batch size. The entry belongs in the model's parameters: set among the provider's options, it
would lose to Triton's default."""

VERSION = "1"


def write_repository(
    bundle: Bundle,
    path: Path,
    *,
    prefix: str = "",
    instances: int = 1,
    most: int | None = None,
    replace: bool = False,
) -> list[str]:
    """Writes a model repository in one piece, and returns the names of its models.

    prefix: precedes the stage in each model's name. instances: how many instances of each model
    run, per GPU or on the CPU. most: the largest batch; None takes what fits the memory that a
    Codec uses.

    Raises InputError for a damaged bundle, and if ``path`` exists and may not be replaced. Raises
    OSError.
    """
    files: dict[str, bytes] = {}
    stages = [*STAGES, *(PRIOR_STAGES if bundle.prior is not None else ())]
    for stage in stages:
        content = bundle.graph(stage)
        config = _config(bundle, stage, content, f"{prefix}{stage}", instances, most)
        files[f"{prefix}{stage}/config.pbtxt"] = config.encode()
        files[f"{prefix}{stage}/{VERSION}/model.onnx"] = content
    publish_folder(path, files, replace=replace)
    return [f"{prefix}{stage}" for stage in stages]


def _config(
    bundle: Bundle, stage: str, content: bytes, name: str, instances: int, most: int | None
) -> str:
    """Returns the ``config.pbtxt`` of a model. Raises InputError if ``read_graph`` refuses it."""
    graph = read_graph(f"{stage}.onnx", content)
    spec = bundle.prior if stage in PRIOR_STAGES else bundle.spec
    assert spec is not None
    known = ports_of(stage, spec, bundle.batch, bundle.index_type)
    ports = stage_of(stage)
    inputs, outputs = ([known[name] for name in way] for way in (ports.inputs, ports.outputs))
    batched = bundle.batch is None and POSITION not in known
    largest = most or batch_size(spec, graph.operators)
    warm = sorted({1, largest}) if batched else [None]
    waiting = {"max_queue_delay_microseconds": QUEUE_MICROSECONDS}
    on_cpu = INT8_OPERATOR in graph.operators  # needs a session entry that Triton does not pass on
    said = {"manifest_sha256": bundle.sha256, **({} if on_cpu else CUDA_PARAMETERS)}
    fields: dict[str, Any] = {
        "name": name,
        "backend": "onnxruntime",
        "max_batch_size": largest if batched else 0,
        "input": [_port(port, batched) for port in inputs],
        "output": [_port(port, batched) for port in outputs],
        "version_policy": {"latest": {"num_versions": 1}},
        "instance_group": [
            {"count": instances, "kind": Name("KIND_CPU" if on_cpu else "KIND_AUTO")}
        ],
        "optimization": None if on_cpu else _optimization(cuda_options(graph)),
        "dynamic_batching": waiting if batched else None,
        "model_warmup": [_warmup(inputs, size) for size in warm],
        "parameters": [
            {"key": key, "value": {"string_value": value}} for key, value in said.items()
        ],
    }
    return "\n".join(_text(fields)) + "\n"


class Name(str):
    """A value of an enumeration, which is written without quotes."""


def _port(port: Port, batched: bool) -> dict[str, Any]:
    """Returns the entry of an input or output, without the batch axis if Triton adds it."""
    return {
        "name": port.name,
        "data_type": Name(TYPES[port.dtype]),
        "dims": [-1 if size == "N" else size for size in port.shape[batched:]],
    }


def _optimization(options: Mapping[str, str]) -> dict[str, Any]:
    """Returns the entry for the options of onnxruntime's CUDA provider."""
    parameters = [{"key": key, "value": value} for key, value in options.items()]
    cuda = {"name": "cuda", "parameters": parameters}
    return {"execution_accelerators": {"gpu_execution_accelerator": cuda}}


def _warmup(inputs: list[Port], batch: int | None) -> dict[str, Any]:
    """Returns a request of zeros that runs before the first user's.

    On a card, cuDNN chooses its algorithms in that run. batch: the size of the batch, or None for a
    model that Triton does not batch, where the request counts as one.
    """
    batched = batch is not None
    return {
        "name": f"batch_{batch or 'own'}",
        "batch_size": batch or 1,
        "inputs": [
            {
                "key": port.name,
                "value": {
                    "data_type": Name(TYPES[port.dtype]),
                    "dims": [1 if size == "N" else size for size in port.shape[batched:]],
                    "zero_data": True,
                },
            }
            for port in inputs
        ],
    }


def _text(fields: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Yields the lines of a message in protobuf's text form.

    A list repeats its field. None omits it.
    """
    for key, value in fields.items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, Mapping):
                yield f"{indent}{key} {{"
                yield from _text(each, indent + "  ")
                yield f"{indent}}}"
            elif each is not None:
                yield f"{indent}{key}: {each if isinstance(each, Name) else json.dumps(each)}"
