"""Every backend gets adversarial latents and a model's own: wrong quantizers are refuted."""

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

import vqref
from vqdeploy.graphs.build import build_graphs
from vqdeploy.proof.samples import check_samples
from vqdeploy.runtime.sessions import open_sessions
from vqref import families
from vqref.agreement.parity import check_indices
from vqref.checks.adversary import CASES
from vqref.spec import CODEBOOK
from vqtrain.nearest import nearest

K, D = 32, 8
SPEC = families.post((1, 4, 4), base_depth=1, num_codes=K, code_size=D)


def graphs(codebook):
    return build_graphs(
        SPEC, vqref.init_params(SPEC, np.random.default_rng(0)) | {CODEBOOK: codebook}
    )


def onnxruntime(latents, codebook):
    sessions, _ = open_sessions({"quantizer": graphs(codebook)["quantizer"]}, SPEC, "cpu")
    return sessions["quantizer"](latents)[0]


def reference_evaluator(latents, codebook):
    evaluator = ReferenceEvaluator(onnx.load_from_string(graphs(codebook)["quantizer"]))
    (indices,) = evaluator.run(["indices"], {"latents": latents})
    return indices


def torch_eager(latents, codebook):
    x, c = torch.from_numpy(latents), torch.from_numpy(codebook)
    return (x[:, :, None] - c).square().sum(-1).argmin(-1).numpy()


def trainer(latents, codebook):
    return nearest(torch.from_numpy(latents), torch.from_numpy(codebook)).numpy()


def torch_cdist(latents, codebook):
    return (
        torch.cdist(torch.from_numpy(latents[:, 0]), torch.from_numpy(codebook))
        .argmin(-1)[:, None]
        .numpy()
    )


BACKENDS = {
    "onnxruntime": (onnxruntime, "direct"),
    "onnx's reference evaluator": (reference_evaluator, "direct"),
    "torch eager": (torch_eager, "direct"),
    "the trainer": (trainer, "direct"),
    "torch.cdist": (torch_cdist, "expanded root"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid")
def test_a_backend_violates_nothing_on_an_adversary(backend, name):
    quantize, form = BACKENDS[backend]
    latents, codebook = CASES[name](np.random.default_rng(5), 2000, K, D, "float32")
    check_indices(
        quantize(latents, codebook), latents, codebook, precision="float32", form=form
    ).require()


@pytest.fixture(scope="module", params=["model", "residual_model"])
def opened(request):
    """A model and sessions of its graphs."""
    model = request.getfixturevalue(request.param)
    return model, open_sessions(build_graphs(model.spec, model.params), model.spec, "cpu")[0]


def test_samples_cover_the_models_latents_and_its_bisectors(opened):
    model, sessions = opened
    drawn, bisectors = check_samples(model.spec, model.params, sessions, 2001)
    assert drawn.passed
    assert bisectors.passed
    s = model.spec.latent_size  # whole images are drawn
    assert (drawn.compared, bisectors.compared) == (-(-1001 // s) * s, -(-1000 // s) * s)
    assert bisectors.near_ties > 0.05 * bisectors.compared
    again, _ = check_samples(model.spec, model.params, sessions, 2001)
    assert again == drawn


@pytest.mark.parametrize("wrong", ["rounded", "shifted", "rows"])
def test_a_wrong_quantizer_is_refuted_by_samples(opened, wrong):
    model, sessions = opened
    codebook = model.params[CODEBOOK]

    def quantizer(latents):
        x = latents.astype(np.float16).astype(np.float32) if wrong == "rounded" else latents
        indices = np.square(x[:, :, None] - codebook).sum(-1).argmin(-1)
        if wrong == "shifted":
            indices[-1, -1] = (indices[-1, -1] + 1) % len(codebook)
        return [indices, codebook[indices] * np.float32(1 + 1e-6 * (wrong == "rows"))]

    checks = check_samples(model.spec, model.params, {**sessions, "quantizer": quantizer}, 4000)
    assert not all(check.passed for check in checks)
    assert "bisectors" in str(checks[1])
