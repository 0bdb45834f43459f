"""Users' own networks: all three interpreters do what a spec's rows say, and files keep them."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

import vqref
from vqdeploy.agreement import check_graphs
from vqdeploy.graphs.build import GraphOptions, build_graphs
from vqdeploy.runtime.sessions import open_sessions
from vqref.families import residual
from vqref.spec import ACTIVATIONS, ModelSpec
from vqtrain import VQVAE, TrainingOptions
from vqtrain.agreement import check_against_oracle

SIZES: dict[str, Any] = {
    "hidden": 8,
    "blocks": 1,
    "block_hidden": 4,
    "num_codes": 16,
    "code_size": 4,
}


def with_activation(name: str) -> ModelSpec:
    """Returns the residual network with ``name`` in place of every relu."""
    spec = residual((3, 8, 8), **SIZES, variance=0.1)

    def changed(rows):
        return tuple(
            dataclasses.replace(row, activation=name) if row.activation == "relu" else row
            for row in rows
        )

    return dataclasses.replace(spec, encoder=changed(spec.encoder), decoder=changed(spec.decoder))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_the_same_in_numpy_pytorch_and_onnx(activation):
    spec, rng = with_activation(activation), np.random.default_rng(0)
    params = vqref.init_params(spec, rng)
    images = rng.random((6, 3, 8, 8)).astype(np.float32)
    check_against_oracle(VQVAE(spec, params), images, TrainingOptions()).require()
    for precision, name in (("fp32", "float32"), ("fp16", "float16")):
        graphs = build_graphs(spec, params, GraphOptions(precision=precision))
        sessions, _ = open_sessions(graphs, spec, "cpu")
        check_graphs(spec, params, images, sessions, precision=name).require()


def test_a_network_of_ones_own_comes_back_from_its_file(tmp_path):
    from vqref.modelfile import Model
    from vqtrain.modelfile import read_model, write_model

    spec = with_activation("silu")
    model = Model(spec, vqref.init_params(spec, np.random.default_rng(0)))
    write_model(tmp_path / "model.pt", model)
    assert read_model(tmp_path / "model.pt").spec == spec


def test_gradients_flow_through_every_activation():
    for activation in ACTIVATIONS:
        spec = with_activation(activation)
        params = vqref.init_params(spec, np.random.default_rng(0))
        module = VQVAE(spec, {name: array.astype(np.float64) for name, array in params.items()})
        images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
        module(images).outputs.square().sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in module.parameters()), activation
