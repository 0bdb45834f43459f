"""Triton's model repository: each configuration fits Triton's own schema and its graph.

The requests that it warms a model up with can be run.
"""

import dataclasses
import shutil
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from support import prior_params
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from vqdeploy.bundle import Bundle
from vqdeploy.export import export
from vqdeploy.graphs.build import GraphOptions
from vqdeploy.runtime.library import onnxruntime
from vqdeploy.stages import PRIOR_STAGES, STAGES
from vqdeploy.triton import write_repository
from vqref.errors import InputError
from vqref.prior import Prior, transformer

NUMPY = {"TYPE_FP32": np.float32, "TYPE_INT64": np.int64, "TYPE_INT32": np.int32}
"""Triton's types, from its documentation."""

CASES: dict[str, dict[str, Any]] = {
    "any batch": {},
    "one batch": {"batch": 8},
    "int32": {"index_type": "int32"},
    "fp16": {"precision": "fp16"},
    "int8": {"precision": "int8"},
}


@pytest.fixture(scope="module", params=CASES)
def case(request, model, tmp_path_factory):
    """A bundle with a prior, its repository, and its options of export."""
    spec = transformer(4, 16, width=16, depth=2, heads=2)
    prior = Prior(spec, prior_params(spec), model.digest(), {"seed": 0}, {"held_out": 9.5})
    options = GraphOptions(**CASES[request.param])
    folder = tmp_path_factory.mktemp("triton")
    export(dataclasses.replace(model, prior=prior), folder / "bundle", options=options)
    bundle = Bundle.open(folder / "bundle")
    names = write_repository(bundle, folder / "models", prefix="a.", instances=3, most=32)
    assert names == [f"a.{stage}" for stage in (*STAGES, *PRIOR_STAGES)]
    assert sorted(path.name for path in (folder / "models").iterdir()) == sorted(names)
    return bundle, folder / "models", options


def config_of(repository, stage):
    text = (repository / f"a.{stage}" / "config.pbtxt").read_text()
    return text_format.Parse(text, ModelConfig())


def graph_ports(values):
    """Returns {name: (dtype, shape)} of a graph's inputs or outputs; -1 is an axis without size."""
    return {
        value.name: (
            onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type),
            [d.dim_value if not d.dim_param else -1 for d in value.type.tensor_type.shape.dim],
        )
        for value in values
    }


def config_ports(ports, batched):
    """Returns the same for a configuration, with the batch axis that Triton adds."""
    return {
        port.name: (
            np.dtype(NUMPY[type(port).DESCRIPTOR.fields_by_name["data_type"].enum_type
                           .values_by_number[port.data_type].name]),
            [-1] * batched + list(port.dims),
        )
        for port in ports
    }  # fmt: skip


@pytest.mark.parametrize("stage", [*STAGES, *PRIOR_STAGES])
def test_a_configuration_says_what_the_graph_takes_and_gives(case, stage):
    bundle, repository, options = case
    config = config_of(repository, stage)
    content = (repository / f"a.{stage}" / "1" / "model.onnx").read_bytes()
    assert content == bundle.graph(stage)
    graph = onnx.load_from_string(content).graph
    batched = options.batch is None and stage != "prior_step"
    assert (config.name, config.backend) == (f"a.{stage}", "onnxruntime")
    assert config.max_batch_size == (32 if batched else 0)
    assert config.HasField("dynamic_batching") == batched
    assert config_ports(config.input, batched) == graph_ports(graph.input)
    assert config_ports(config.output, batched) == graph_ports(graph.output)
    assert config.parameters["manifest_sha256"].string_value == bundle.sha256


@pytest.mark.parametrize("stage", [*STAGES, *PRIOR_STAGES])
def test_the_requests_of_a_warm_up_can_be_run(case, stage):
    _, repository, options = case
    config = config_of(repository, stage)
    session = onnxruntime().InferenceSession(repository / f"a.{stage}" / "1" / "model.onnx")
    sizes = [request.batch_size for request in config.model_warmup]
    assert sizes == ([1, 32] if config.max_batch_size else [1])
    for request in config.model_warmup:
        given = {}
        for name, value in request.inputs.items():
            assert value.zero_data
            (port,) = (port for port in config.input if port.name == name)
            assert value.data_type == port.data_type
            shape = [request.batch_size] * bool(config.max_batch_size) + list(value.dims)
            dtype = config_ports([port], batched=False)[name][0]
            given[name] = np.zeros(shape, dtype)
        outputs = session.run(None, given)
        assert {len(output) for output in outputs} == {request.batch_size if
                                                       config.max_batch_size else
                                                       options.batch or 1}  # fmt: skip


def test_networks_run_on_cards_as_a_codec_runs_them(case):
    _, repository, options = case
    config = config_of(repository, "tokenizer")
    (group,) = config.instance_group
    kinds = ModelInstanceGroup.Kind
    assert group.count == 3
    if options.precision == "int8":  # it needs a session entry that Triton has no name for
        assert group.kind == kinds.KIND_CPU
        assert not config.HasField("optimization")
        return
    assert group.kind == kinds.KIND_AUTO
    (cuda,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert cuda.name == "cuda"
    assert dict(cuda.parameters) == {"use_tf32": "1" if options.precision == "fp16" else "0"}
    assert config.parameters["cudnn_conv_algo_search"].string_value == "1"


def test_a_repository_replaces_another_only_if_it_may(bundle, tmp_path):
    opened = Bundle.open(bundle)
    write_repository(opened, tmp_path / "models")
    before = sorted((tmp_path / "models").rglob("*"))
    with pytest.raises(InputError, match="exists already"):
        write_repository(opened, tmp_path / "models", prefix="b")
    assert sorted((tmp_path / "models").rglob("*")) == before
    write_repository(opened, tmp_path / "models", prefix="b", replace=True)
    assert {path.name for path in (tmp_path / "models").iterdir()} == {f"b{s}" for s in STAGES}


def test_a_damaged_bundle_becomes_no_repository(bundle, tmp_path, refused):
    shutil.copytree(bundle, tmp_path / "bundle")
    graph = tmp_path / "bundle" / "decoder.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"\0")
    said = refused(3, "-m", "vqdeploy", "triton", "bundle", "models")
    assert "decoder.onnx: damaged" in said
    assert not (tmp_path / "models").exists()


def test_the_command_says_what_it_wrote(bundle, tmp_path, run, refused):
    done = run(
        "-m", "vqdeploy", "triton", bundle, "models", "--prefix", "kmnist-", "--max-batch", 4
    )
    assert (done.returncode, done.stderr) == (0, "")
    names = ", ".join(f"kmnist-{stage}" for stage in STAGES)
    assert done.stdout == f"5 models, {names}; wrote models\n"
    assert "a/b" in refused(2, "-m", "vqdeploy", "triton", bundle, "other", "--prefix", "a/b")
