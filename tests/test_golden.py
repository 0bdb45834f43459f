"""Golden values from outside: training steps that TensorFlow and Sonnet computed in float64."""

import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch
from support import GOLDEN

import vqref
from vqref import families
from vqref.agreement import parity
from vqref.dialects import DIALECTS
from vqref.errors import InputError
from vqref.modelfile import FORMAT_VERSION, Model, read
from vqref.spec import CODEBOOK, EMA_COUNT, EMA_MEANS
from vqtrain import VQVAE
from vqtrain.likelihoods import mean
from vqtrain.losses import compute_losses
from vqtrain.quantizer import Quantizer, assigned

STAGES = {
    "latents": "latents",
    "quantized": "quantized",
    "outputs": "logits",
    "reconstructions": "probabilities",
}
"""Our names of the stages, and the names in the files of family post."""

LOSSES = ("reconstruction", "commitment", "prior", "total")
STATE = ("codebook", "ema_count", "ema_means")


def off(found, expected):
    """Returns the largest error, divided by the array's largest magnitude."""
    found = np.asarray(found)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype == np.float64
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def in_float64(params):
    return {name: array.astype(np.float64) for name, array in params.items()}


def require_gradients(module, arrays, scale=1.0):
    """Compares each parameter's gradient with the array ``grad/NAME``, beside its magnitude."""
    gradients = {name: scale * p.grad.numpy() for name, p in module.named_parameters()}
    recorded = {key.removeprefix("grad/") for key in arrays if key.startswith("grad/")}
    assert set(gradients) == recorded
    for name, gradient in gradients.items():
        parity.check("gradients", gradient, arrays[f"grad/{name}"], precision="float64").require()
    assert parity.tolerance("gradients", "float64").relative <= 1e-11


def test_the_oracle_computes_every_stage_of_the_golden_step(golden):
    out = vqref.forward(golden.spec, golden.params, golden["images"])
    np.testing.assert_array_equal(out.indices, golden["indices"])
    for name, recorded in STAGES.items():
        assert off(getattr(out, name), golden[recorded]) <= 1e-12, name
    for name in LOSSES:
        assert off(np.float64(getattr(out.losses, name)), golden[f"loss/{name}"]) <= 1e-12, name


def test_the_oracle_computes_the_golden_ema_step(golden):
    assert (golden.params[EMA_COUNT] == 0).sum() == 3
    state = vqref.EMAState.from_params(golden.params)
    after = vqref.update_ema(state, golden["latents"], golden["indices"])
    for name in STATE:
        assert off(getattr(after, name), golden[f"after/quantizer.{name}"]) <= 1e-12, name


@pytest.fixture
def trained(golden):
    """The trainer's module in float64, after a forward and backward pass on the golden batch."""
    module = VQVAE(golden.spec, in_float64(golden.params))
    images = torch.from_numpy(golden["images"])
    out = module(images)
    losses = compute_losses(golden.spec, images, out.outputs, out.latents, out.quantized, beta=0.25)
    losses.total.backward()
    return module, out, losses


def test_the_trainer_computes_every_stage_of_the_golden_step(golden, trained):
    _, out, losses = trained
    np.testing.assert_array_equal(out.indices.numpy(), golden["indices"])
    for name in ("latents", "quantized", "outputs"):
        assert off(getattr(out, name).detach().numpy(), golden[STAGES[name]]) <= 1e-12, name
    reconstructions = mean(golden.spec, out.outputs).detach().numpy()
    assert off(reconstructions, golden["probabilities"]) <= 1e-12
    for name in LOSSES:
        assert off(getattr(losses, name).detach().numpy(), golden[f"loss/{name}"]) <= 1e-12, name


def test_the_trainer_computes_the_golden_gradient_of_every_parameter(golden, trained):
    module, _, _ = trained
    require_gradients(module, golden.arrays)


def test_the_trainer_computes_the_golden_ema_step(golden, trained):
    module, out, _ = trained
    hit = assigned(out.latents.detach(), out.indices, golden.spec.num_codes)
    module.quantizer.update(*hit, decay=0.99, epsilon=1e-5)
    for name in STATE:
        found = getattr(module.quantizer, name).numpy()
        assert off(found, golden[f"after/quantizer.{name}"]) <= 1e-12, name


class Sonnet:
    """Sonnet's golden step: ``spec``, ``params``, ``images`` and the arrays by key."""

    def __init__(self):
        with np.load(GOLDEN / "sonnet_step.npz") as arrays:
            self.arrays = {key: arrays[key] for key in arrays.files}
        hidden, blocks, block_hidden, num_codes, code_size = map(int, self["sizes"])
        self.spec = families.residual(
            (3, 32, 32),
            hidden=hidden,
            blocks=blocks,
            block_hidden=block_hidden,
            num_codes=num_codes,
            code_size=code_size,
            variance=float(self["variance"]),
        )
        quantizer = {CODEBOOK: "codebook", EMA_COUNT: "count", EMA_MEANS: "means"}
        self.params = {
            p.name: self[
                f"before/{quantizer[p.name]}" if p.name in quantizer else f"param/{p.name}"
            ]
            for p in self.spec.parameters
        }
        # The file's images are float32 roundings of k/255, but what it records was computed from
        # k/255 itself. With the rounded ones the latents are off by 2e-8.
        self.images = np.rint(255 * self["images"].astype(np.float64)) / 255
        self.values = math.prod(self.spec.image_shape)
        self.beta = 0.25 * self.values / 2
        self.constant = math.log(2 * math.pi * self.spec.variance)

    def __getitem__(self, key):
        return self.arrays[key]


@pytest.fixture(scope="module")
def sonnet():
    return Sonnet()


def require_sonnets_losses(sonnet, losses):
    """Compares losses: total = nmse + commitment / 4 is the gaussian loss at beta = CHW / 8.

    The two differ by the scale CHW / 2 and a constant.
    """
    scale = 2 / sonnet.values
    nmse = float(losses.reconstruction) * scale - sonnet.constant
    total = float(losses.reconstruction + sonnet.beta * losses.commitment) * scale
    assert nmse == pytest.approx(float(sonnet["nmse"]), rel=1e-12)
    assert float(losses.commitment) == pytest.approx(float(sonnet["commitment"]), rel=1e-12)
    assert total - sonnet.constant == pytest.approx(float(sonnet["total"]), rel=1e-12)
    prior = sonnet.spec.latent_size * math.log(sonnet.spec.num_codes)
    assert float(losses.total) - prior == pytest.approx(total / scale, rel=1e-12)


def test_the_oracle_computes_every_stage_of_sonnets_step(sonnet):
    out = vqref.forward(sonnet.spec, sonnet.params, sonnet.images, beta=sonnet.beta)
    np.testing.assert_array_equal(out.indices, sonnet["indices"])
    assert off(out.latents, sonnet["latents"]) <= 1e-12
    assert off(out.quantized, sonnet["quantized"]) <= 1e-12
    assert off(out.outputs + 0.5, sonnet["mean"]) <= 1e-12
    assert off(out.reconstructions, np.clip(sonnet["mean"], 0, 1)) <= 1e-12
    require_sonnets_losses(sonnet, out.losses)


def test_images_rounded_to_float32_move_sonnets_latents(sonnet):
    """This is why the tests use exact grey levels."""
    rounded = vqref.encode(sonnet.spec, sonnet.params, sonnet["images"])
    assert 1e-9 < off(rounded, sonnet["latents"]) < 1e-7


def test_the_trainer_computes_sonnets_step_with_its_gradients(sonnet):
    module = VQVAE(sonnet.spec, in_float64(sonnet.params))
    images = torch.from_numpy(sonnet.images)
    out = module(images)
    arrays = images, out.outputs, out.latents, out.quantized
    losses = compute_losses(sonnet.spec, *arrays, beta=sonnet.beta)
    losses.total.backward()
    np.testing.assert_array_equal(out.indices.numpy(), sonnet["indices"])
    assert off(out.latents.detach().numpy(), sonnet["latents"]) <= 1e-12
    assert off(out.quantized.numpy(), sonnet["quantized"]) <= 1e-12
    assert off(out.outputs.detach().numpy() + 0.5, sonnet["mean"]) <= 1e-12
    found = mean(sonnet.spec, out.outputs).detach().numpy()
    assert off(found, np.clip(sonnet["mean"], 0, 1)) <= 1e-12
    require_sonnets_losses(sonnet, losses._replace(**detached(losses)))
    require_gradients(module, sonnet.arrays, scale=2 / sonnet.values)


def detached(losses):
    return {name: value.detach() for name, value in losses._asdict().items()}


def sonnets_state(sonnet, when):
    codebook, count, means = (sonnet[f"{when}/{name}"] for name in ("codebook", "count", "means"))
    return vqref.EMAState(codebook, count, means, steps=int(sonnet[f"{when}/steps"]))


def test_the_oracle_computes_sonnets_averages(sonnet):
    before, after = (sonnets_state(sonnet, when) for when in ("before", "after"))
    found = vqref.update_ema(
        before, sonnet["latents"], sonnet["indices"], dialect=DIALECTS["sonnet"]
    )
    assert found.steps == after.steps == 4
    for name in STATE:
        assert off(getattr(found, name), getattr(after, name)) <= 1e-12, name
    post = vqref.update_ema(before, sonnet["latents"], sonnet["indices"])
    assert off(post.codebook, after.codebook) > 1e-4


def test_the_trainer_computes_sonnets_averages(sonnet):
    before, after = (sonnets_state(sonnet, when) for when in ("before", "after"))
    quantizer = Quantizer(sonnet.spec, DIALECTS["sonnet"]).double()
    for name in STATE:
        getattr(quantizer, name).copy_(torch.from_numpy(getattr(before, name)))
    quantizer.steps.fill_(before.steps)
    latents, indices = (torch.from_numpy(sonnet[name]) for name in ("latents", "indices"))
    hit = assigned(latents, indices, sonnet.spec.num_codes)
    quantizer.update(*hit, decay=0.99, epsilon=1e-5)
    assert int(quantizer.steps) == 4
    for name in STATE:
        assert off(getattr(quantizer, name).numpy(), getattr(after, name)) <= 1e-12, name


def version_1(golden):
    """Returns the dictionary of a model.pt of version 1, which has five sizes for a spec."""
    latent_size, num_codes, code_size, base_depth = map(int, golden["spec"])
    return {
        "format": "vqtrain-model",
        "format_version": 1,
        "spec": {
            "image_shape": [1, 28, 28],
            "base_depth": base_depth,
            "latent_size": latent_size,
            "num_codes": num_codes,
            "code_size": code_size,
        },
        "parameters": {name: array.astype(np.float32) for name, array in golden.params.items()},
        "training": {"epochs": 1},
        "metrics": {},
        "provenance": {"data": {"source": "kmnist"}},
    }


def test_a_model_file_of_version_1_is_read_as_family_post(golden, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(pickle.dumps(version_1(golden)))
    model, _ = read(path, pickle.load)
    assert model.spec == golden.spec
    assert model.spec.family == "post"
    assert dict(model.training) == {"epochs": 1}
    latents = vqref.encode(model.spec, model.params, golden["images"])
    assert off(latents, golden["latents"]) <= 1e-6  # the file's parameters are float32
    again = Model.from_plain(model.to_plain())
    assert again.to_plain()["format_version"] == FORMAT_VERSION == 2
    assert dataclasses.replace(again, params={**model.params}).spec == model.spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "the spec lacks decoder"),
        ({"format_version": 10**9}, "format version 1000000000 is newer than 2, the newest known"),
        ({"spec": {"image_shape": [1, 28, 28]}}, "the spec has fields image_shape, not image_sh"),
        ({"spec": {}}, "the spec has fields"),
        ({"parameters": {}}, "parameters missing: encoder"),
    ],
)
def test_another_version_or_a_damaged_file_of_version_1_is_refused(golden, change, message):
    with pytest.raises(InputError, match=message) as caught:
        Model.from_plain({**version_1(golden), **change})
    assert len(str(caught.value).splitlines()) == 1
