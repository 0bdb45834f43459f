"""The training step's own gradients, checked against the oracle during a run: errors are named."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import small_model, trainer

import vqtrain.agreement
import vqtrain.losses
import vqtrain.run.step
from vqref import families
from vqref.errors import ExitCode, ParityError
from vqtrain import VQVAE, TrainingOptions
from vqtrain.agreement import check_against_oracle
from vqtrain.model import Forward
from vqtrain.nearest import nearest
from vqtrain.network import ACTIVATIONS

SPECS = {
    "post": families.post((1, 12, 12), 4, 2, 8, 4),
    "residual": families.residual(
        (3, 16, 16), hidden=8, blocks=1, block_hidden=4, num_codes=16, code_size=4, variance=0.1
    ),
}
OPTIONS = TrainingOptions(beta=0.3)


@pytest.fixture(params=SPECS)
def case(request):
    """A model and images of it."""
    spec = SPECS[request.param]
    images = np.random.default_rng(0).random((9, *spec.image_shape)).astype(np.float32)
    return VQVAE(spec, small_model(spec).params), images


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_steps_gradients_are_the_oracles(case, precision):
    model, images = case
    before = model.params()
    report = check_against_oracle(model, images, dataclasses.replace(OPTIONS, precision=precision))
    report.require()
    stages = {check.stage: check for check in report.checks}
    exact, own = stages["float64 gradients"], stages[f"{precision} gradients"]
    assert exact.max_error <= 1e-12
    assert 0 < own.max_error < own.allowed
    learned = sum(p.numel() for p in model.parameters())
    assert exact.compared == own.compared == learned
    for name, array in model.params().items():
        np.testing.assert_array_equal(array, before[name])
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_images_that_are_all_alike_raise_no_alarm(case, level, precision):
    """Latents then equal their codes, and a gradient is only the rounding of a difference."""
    model, images = case
    images = np.full_like(images, level)
    with torch.no_grad():
        latents = model.encoder(torch.from_numpy(images))
        model.quantizer.codebook[: latents.shape[1]] = latents[0]
    options = dataclasses.replace(OPTIONS, precision=precision)
    gradients = [
        check for check in check_against_oracle(model, images, options).checks
        if check.stage.endswith("gradients")
    ]  # fmt: skip
    assert len(gradients) == 2
    assert all(check.passed for check in gradients), gradients


def without_stop(self, images, choose=nearest):
    """Gives the decoder an input without the gradient of the latents."""
    latents = self.encoder(images)
    indices, quantized = self.quantizer(latents, choose)
    return Forward(latents, indices, quantized, self.decoder(quantized))


def halved(self, images, choose=nearest):
    """Makes the estimator pass on half of the gradient."""
    latents = self.encoder(images)
    indices, quantized = self.quantizer(latents, choose)
    through = quantized + 0.5 * (latents - latents.detach())
    return Forward(latents, indices, quantized, self.decoder(through))


def fed_latents(self, images, choose=nearest):
    """Gives the decoder the latents, not quantized at all."""
    latents = self.encoder(images)
    indices, quantized = self.quantizer(latents, choose)
    return Forward(latents, indices, quantized, self.decoder(latents))


def losses_with(**changed):
    """Returns ``compute_losses`` with one of its terms changed."""
    terms = {
        "over": len,
        "squares": lambda latents, quantized: (latents - quantized.detach()).square().mean(),
        "total": lambda r, beta, c: r + beta * c,
        **changed,
    }

    def compute(spec, images, outputs, latents, quantized, beta):
        r = vqtrain.likelihoods.nats(spec, images, outputs).sum() / terms["over"](images)
        c = terms["squares"](latents, quantized)
        prior = outputs.new_zeros(())
        return vqtrain.losses.Losses(r, c, prior, terms["total"](r, beta, c) + prior)

    return compute


def first(model, part):
    return next(p for name, p in model.encoder.named_parameters() if name.endswith(part))


def freeze(model, monkeypatch):
    for parameter in list(model.decoder.parameters())[:2]:
        parameter.requires_grad_(False)


def drop_bias(model, monkeypatch):
    first(model, "bias").requires_grad_(False)


def pulled_back_by(change):
    """Every activation computes what it should, but returns a changed gradient."""

    class Changed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, gradient):
            return change(gradient)

    def put_in_place(model, monkeypatch):
        for name, function in list(ACTIVATIONS.items()):
            changed = lambda x, function=function: Changed.apply(function(x))  # noqa: E731
            monkeypatch.setitem(ACTIVATIONS, name, changed)

    return put_in_place


def in_place_of(where, name, new):
    def change(model, monkeypatch):
        monkeypatch.setattr(where, name, new)

    return change


def losses_otherwise(**changed):
    return in_place_of(vqtrain.run.step, "compute_losses", losses_with(**changed))


WRONG = {
    "the straight-through estimator hands nothing on": in_place_of(VQVAE, "forward", without_stop),
    "the estimator hands half on": in_place_of(VQVAE, "forward", halved),
    "the decoder is fed the latents": in_place_of(VQVAE, "forward", fed_latents),
    "no stop-gradient at the latents of the commitment": losses_otherwise(
        squares=lambda latents, quantized: (latents.detach() - quantized.detach()).square().mean()
    ),
    "the commitment is a sum over the code": losses_otherwise(
        squares=lambda latents, quantized: (latents - quantized.detach()).square().sum(-1).mean()
    ),
    "the commitment is not squared": losses_otherwise(
        squares=lambda latents, quantized: F.l1_loss(latents, quantized.detach())
    ),
    "beta stands at the reconstruction": losses_otherwise(total=lambda r, beta, c: beta * r + c),
    "beta is left out": losses_otherwise(total=lambda r, beta, c: r + c),
    "the commitment is left out": losses_otherwise(total=lambda r, beta, c: r),
    "the reconstruction is a sum over the batch": losses_otherwise(over=lambda images: 1),
    "the reconstruction is a mean over pixels": losses_otherwise(over=torch.numel),
    "a row is frozen": freeze,
    "a bias gets no gradient": drop_bias,
    "activations hand on one percent more": pulled_back_by(lambda g: 1.01 * g),
    "activations turn signs": pulled_back_by(torch.neg),
    "activations clip": pulled_back_by(lambda g: g.clamp(max=float(g.abs().max()) / 2)),
    "activations round to float16": pulled_back_by(lambda g: g.half().to(g)),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_gradient_is_named(case, what, monkeypatch):
    model, images = case
    WRONG[what](model, monkeypatch)
    report = check_against_oracle(model, images, OPTIONS)
    names = {check.stage: check for check in report.failures}
    assert "float64 gradients" in names
    assert "of encoder." in names["float64 gradients"].problem or "of decoder." in (
        names["float64 gradients"].problem
    )


def test_a_run_whose_gradients_are_wrong_ends_with_exit_code_4(tmp_path, many_images, monkeypatch):
    made = trainer(tmp_path, many_images)
    in_place_of(vqtrain.run.step, "compute_losses", losses_with(total=lambda r, b, c: r))(
        made.model, monkeypatch
    )
    with pytest.raises(
        ParityError, match=r"float64 gradients .* of encoder\.conv1\.weight"
    ) as caught:
        made.run()
    assert caught.value.exit_code == ExitCode.PARITY
