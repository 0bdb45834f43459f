"""What only a card can show: the trainer on a card, and onnxruntime's CUDA provider.

The provider's answers are checked for every form of the graphs, for ties, and for batches of
changing size.
"""

import dataclasses

import numpy as np
import pytest
import torch

import vqref
from vqdeploy import Codec
from vqdeploy.bundle import Bundle
from vqdeploy.export import export
from vqdeploy.graphs.build import GraphOptions, build_graphs
from vqdeploy.runtime.sessions import CUDA, open_sessions
from vqdeploy.verify import verify
from vqref.agreement import stages
from vqref.agreement.parity import check_indices
from vqref.checks.adversary import CASES
from vqref.checks.checks import check_quantizer
from vqref.families import post
from vqref.spec import CODEBOOK
from vqtrain import RECIPES, VQVAE, training_step
from vqtrain.nearest import nearest
from vqtrain.quantizer import update_ema
from vqtrain.run.recording import RecordedSteps
from vqtrain.run.rules import Rules
from vqtrain.run.start import prepare
from vqtrain.run.step import make_optimizer

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

K, D = 32, 8
SPEC = post((1, 4, 4), base_depth=1, num_codes=K, code_size=D)


def test_a_bundle_verifies_itself_with_no_node_on_the_cpu(bundle, many_images):
    images = (many_images[:200, None] / np.float32(255)).astype(np.float32)
    verified = verify(Bundle.open(bundle), "cuda", images, samples=20_000)
    assert verified.device == "cuda"
    assert all(set(providers) == {CUDA} for providers in verified.placement.values())
    verified.report.require()


@pytest.mark.parametrize(
    "options",
    [
        {"batch": 8},
        {"precision": "fp16"},
        {"precision": "int8"},
        {"opset": 20},
        {"target": "cpu"},
        {"fold": False},
    ],
)
@pytest.mark.parametrize("source", ["model_file", "residual_file"])
def test_other_forms_verify_too(source, request, tmp_path, options):
    export(request.getfixturevalue(source), tmp_path / "b", options=GraphOptions(**options))
    verify(Bundle.open(tmp_path / "b"), "cuda").report.require()


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_quantizer_graph_violates_nothing_on_an_adversary(name, large, monkeypatch):
    if large:
        monkeypatch.setattr("vqdeploy.graphs.quantizer.PRODUCT_ELEMENTS", 1)
    latents, codebook = CASES[name](np.random.default_rng(5), 2000, K, D, "float32")
    params = vqref.init_params(SPEC, np.random.default_rng(0)) | {CODEBOOK: codebook}
    sessions, _ = open_sessions(
        {"quantizer": build_graphs(SPEC, params)["quantizer"]}, SPEC, "cuda"
    )
    check_indices(
        sessions["quantizer"](latents)[0], latents, codebook, precision="float32"
    ).require()


def test_batches_of_changing_size_give_the_cpus_tokens(bundle, many_images):
    card, host = Codec.load(bundle, "cuda"), Codec.load(bundle, "cpu")
    for n in (1, 7, 64, 3, 300, 0, 65):
        found, expected = card.encode(many_images[:n]), host.encode(many_images[:n])
        assert found.shape == expected.shape
        assert (found == expected).mean() > 0.99 if n else True
        np.testing.assert_allclose(card.decode(expected), host.decode(expected), atol=1e-5)


def test_the_trainers_quantizer_passes_the_kit():
    def quantize(latents, codebook):
        return (
            nearest(torch.from_numpy(latents).cuda(), torch.from_numpy(codebook).cuda())
            .cpu()
            .numpy()
        )

    def update(state, latents, indices, decay, epsilon):
        held = (getattr(state, name).astype(np.float32) for name in stages.STATE)
        codebook, count, means, x, i = (
            torch.from_numpy(array).cuda() for array in (*held, latents, indices)
        )
        found = update_ema(codebook, count, means, x, i, decay, epsilon)
        return tuple(tensor.cpu().numpy() for tensor in found)

    check_quantizer(quantize, update)


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_steps_recorded_as_cuda_graphs_are_the_steps(model, real_images, precision):
    options = dataclasses.replace(
        RECIPES["default"](model.spec),
        batch_size=16,
        plain_steps=10,
        kmeans_start=False,
        revive_below=0.9,
        precision=precision,
    )
    batch, card, steps = torch.from_numpy(real_images).cuda(), torch.device("cuda"), 40
    modules = [prepare(VQVAE(model.spec, model.params), card) for _ in range(2)]
    optimizers = [make_optimizer(module, options) for module in modules]
    rules = [Rules(options, steps) for _ in range(2)]
    said: list[str] = []
    recorded = RecordedSteps(modules[0], optimizers[0], options, rules[0], say=said.append)
    for step in range(steps):
        losses, _ = recorded(batch, step)
        expected, _ = training_step(modules[1], optimizers[1], batch, options, rules[1], step)
        torch.testing.assert_close(losses.total, expected.total, rtol=1e-2, atol=0)
    assert not said
    assert all(kind.replay is not None for kind in recorded._kinds.values())
