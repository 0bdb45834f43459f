"""Family vqgan: what upstream's code computed in float64, training, export and proofs."""

import numpy as np
import pytest
import torch
import vqgans

import vqref
from vqtrain import VQVAE

CASES = tuple(vqgans.SPECS)


@pytest.fixture(scope="module", params=CASES)
def upstream(request):
    return (
        vqgans.SPECS[request.param],
        vqgans.params_of(request.param),
        vqgans.arrays(request.param),
    )


def off(found, expected):
    """The largest error."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    return float(np.abs(found - expected).max())


def test_the_oracle_computes_upstreams_latents_tokens_and_outputs(upstream):
    spec, params, golden = upstream
    out = vqref.forward(spec, params, golden["images"])
    assert off(out.latents, golden["latents"]) <= 1e-12 * np.abs(golden["latents"]).max()
    np.testing.assert_array_equal(out.indices, golden["indices"])
    np.testing.assert_array_equal(out.quantized, golden["quantized"])
    assert off(out.outputs, golden["reconstructions"]) <= 1e-11


def test_pytorch_computes_upstreams_latents_tokens_and_outputs(upstream):
    spec, params, golden = upstream
    module = VQVAE(spec, {name: array.astype(np.float64) for name, array in params.items()})
    with torch.no_grad():
        out = module(torch.from_numpy(golden["images"].astype(np.float64)))
    latents = out.latents.numpy()
    assert off(latents, golden["latents"]) <= 1e-12 * np.abs(golden["latents"]).max()
    np.testing.assert_array_equal(out.indices.numpy(), golden["indices"])
    assert off(out.outputs.numpy(), golden["reconstructions"]) <= 1e-11
