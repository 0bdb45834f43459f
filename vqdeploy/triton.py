"""A model repository of NVIDIA's Triton Inference Server: each graph of a bundle as a model.

The files are what ``model_repository.md`` and ``model_configuration.md`` of Triton's documentation
ask for; ``config.pbtxt`` is the text form of its ``ModelConfig``. Clients find the digest of the
bundle's manifest in the ``parameters`` of a model's configuration.
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
"""Triton's names of the dtypes of ports."""

QUEUE_MICROSECONDS = 1000
"""How long a request waits for others to share a batch with."""

CUDA_PARAMETERS = {"cudnn_conv_algo_search": "1"}
"""Heuristic: batches of every size come, and an exhaustive search, Triton's default, would start
again at each. It stands among the parameters of the model, whose default overrules what is said
beside the other options of the provider."""

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
    """Writes a model repository, which appears as a whole, and returns the names of its models.

    prefix: what they begin with, before the stage. instances: of each model, per GPU or on the CPU.
    most: the largest batch; None: what fits the memory that a Codec takes.

    Raises InputError for a damaged bundle, or if ``path`` exists and may not be replaced; OSError.
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
    """The ``config.pbtxt`` of a model. Raises InputError for a graph that is not plain."""
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
    """A value of an enumeration, which stands without quotes."""


def _port(port: Port, batched: bool) -> dict[str, Any]:
    """An input or output. Triton adds the axis of the batch itself if there is one."""
    return {
        "name": port.name,
        "data_type": Name(TYPES[port.dtype]),
        "dims": [-1 if size == "N" else size for size in port.shape[batched:]],
    }


def _optimization(options: Mapping[str, str]) -> dict[str, Any]:
    """The options of onnxruntime's CUDA provider."""
    parameters = [{"key": key, "value": value} for key, value in options.items()]
    cuda = {"name": "cuda", "parameters": parameters}
    return {"execution_accelerators": {"gpu_execution_accelerator": cuda}}


def _warmup(inputs: list[Port], batch: int | None) -> dict[str, Any]:
    """A request of zeros, before the first of a user's: on a card cuDNN looks for its algorithms
    then. batch: None for a model that Triton does not batch, which has one request, as Triton
    counts."""
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
    """The lines of a message in protobuf's text form. A list repeats its field; None has none."""
    for key, value in fields.items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, Mapping):
                yield f"{indent}{key} {{"
                yield from _text(each, indent + "  ")
                yield f"{indent}}}"
            elif each is not None:
                yield f"{indent}{key}: {each if isinstance(each, Name) else json.dumps(each)}"
