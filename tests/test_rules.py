"""The rules of a recipe: when each applies, and what it does to the codebook."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_trainer import CPU, trainer

import vqref
from vqtrain import RECIPES, VQVAE, TrainingOptions
from vqtrain.data import Batches
from vqtrain.nearest import nearest
from vqtrain.quantizer import draw, revive_codes
from vqtrain.rules import Rules

SPEC = vqref.ModelSpec()
SEED, DEFAULT = RECIPES["seed"], RECIPES["default"]


def test_the_seed_recipe_has_no_rule_and_the_posts_constants():
    assert dataclasses.asdict(SEED) == dataclasses.asdict(TrainingOptions())
    assert (SEED.epochs, SEED.batch_size, SEED.learning_rate, SEED.beta, SEED.decay, SEED.epsilon) == (
        *(20, 64, 1e-3, 0.25, 0.99),
        1e-5,
    )
    rules = Rules(SEED, 100)
    assert not any(rules.plain(step) or rules.starts(step) for step in range(100))
    assert {rules.learning_rate(step) for step in range(100)} == {1e-3}
    assert {rules.choices(step, SPEC, 8).kind for step in range(100)} == {(False, False, False)}


def test_the_default_recipe_waits_starts_anneals_and_settles():
    rules = Rules(DEFAULT, 4360)
    assert [step for step in range(4360) if rules.starts(step)] == [400]
    assert [rules.plain(step) for step in (0, 399, 400)] == [True, True, False]
    temperatures = [rules.temperature(step) for step in range(4360)]
    assert temperatures[0] == 0.3
    assert temperatures == sorted(temperatures, reverse=True)
    assert [t > 0 for t in (temperatures[2615], temperatures[2616])] == [True, False]
    rates = [rules.learning_rate(step) for step in range(4360)]
    assert max(rates) == pytest.approx(1e-3, rel=0.01)
    assert rates[0] < 2e-5
    assert rates[-1] < 2e-5


def test_the_choices_of_an_annealed_step_are_distributed_as_the_rule_says():
    """One latent between three codes, 20,000 times, beside the oracle's draws with NumPy's own Gumbel noise."""
    codebook = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    latents = torch.tensor([0.4, 0.1]).expand(20_000, 1, 2)
    rules = Rules(dataclasses.replace(DEFAULT, temperature=5.0, plain_steps=0), 100)
    choices = rules.choices(0, vqref.ModelSpec(num_codes=3, code_size=2), 20_000)
    found = draw(latents, codebook, choices.gumbel, choices.temperature)
    gumbel = np.random.default_rng(0).gumbel(size=(20_000, 1, 3))
    expected = vqref.draw_indices(latents.numpy(), codebook.numpy(), gumbel, 5.0)
    shares = [np.bincount(np.asarray(drawn).ravel(), minlength=3) / 20_000 for drawn in (found, expected)]
    np.testing.assert_allclose(shares[0], shares[1], atol=0.015)
    assert (shares[0] > 0.001).all()


def test_a_short_run_has_a_codebook_too():
    assert [step for step in range(40) if Rules(DEFAULT, 40).starts(step)] == [4]


def test_the_start_puts_every_code_among_the_latents(model, many_images):
    module = VQVAE(model.spec, model.params)
    batches = Batches(many_images[:200, None], 32, CPU)
    Rules(dataclasses.replace(DEFAULT, batch_size=32), 100).start(module, batches)
    with torch.no_grad():
        latents = torch.cat([module.encoder(images) for images in batches.in_order()])
    indices = nearest(latents, module.quantizer.codebook)
    assert len(indices.unique()) == model.spec.num_codes
    assert module.quantizer.ema_count.sum().item() == pytest.approx(32 * model.spec.latent_size, rel=1e-5)
    expected = module.quantizer.codebook * (module.quantizer.ema_count + DEFAULT.epsilon)[:, None]
    torch.testing.assert_close(module.quantizer.ema_means, expected)
    before = (
        latents - torch.from_numpy(np.array(model.params["quantizer.codebook"]))[nearest(latents, module.quantizer.codebook)]
    )
    after = latents - module.quantizer.codebook[indices]
    assert after.square().mean() < before.square().mean()


def test_the_start_with_fewer_latents_than_codes_is_made_all_the_same(model, many_images):
    module = VQVAE(model.spec, model.params)
    Rules(DEFAULT, 100).start(module, Batches(many_images[:2, None], 2, CPU))
    assert torch.isfinite(module.quantizer.codebook).all()


def test_dead_codes_are_revived_until_the_end_is_near_and_not_in_plain_steps():
    options = dataclasses.replace(DEFAULT, plain_steps=5, revive_below=0.05)
    found = [step for step in range(100) if Rules(options, 100).choices(step, SPEC, 8).order is not None]
    assert found == list(range(5, 90))
    assert Rules(options, 100).choices(50, SPEC, 8).order.sort().values.tolist() == list(range(8 * SPEC.latent_size))
    assert not Rules(dataclasses.replace(options, revive_below=0.0), 100).revives(50)


@given(seed=st.integers(0, 999), latents=st.integers(1, 12), below=st.floats(0.01, 1.0))
def test_reviving_is_the_oracles_reset_of_the_dead_codes(seed, latents, below):
    """Some dead, none, all, and more than there are latents."""
    rng = np.random.default_rng(seed)
    codebook, means, rows = (rng.normal(size=(k, 3)) for k in (7, 7, latents))
    count, order = rng.uniform(0, 2 * latents / 7, 7), rng.permutation(latents)
    arrays = (codebook, count, means, rows, order)
    found = revive_codes(*map(torch.from_numpy, arrays), below, 1e-5)
    mean = latents / 7
    dead = np.flatnonzero(count < below * mean)[:latents]
    state = vqref.EMAState(codebook, count, means)
    expected = vqref.reset_codes(state, dead, rows[order[: len(dead)]], np.full(len(dead), mean), 1e-5)
    for name, tensor in zip(("codebook", "ema_count", "ema_means"), found, strict=True):
        np.testing.assert_allclose(tensor.numpy(), getattr(expected, name), rtol=0, atol=1e-12)


def test_a_centred_decoder_starts_at_the_mean_pixel(tmp_path, many_images):
    run = trainer(tmp_path, many_images, center=True)
    bias = run.model.params()["decoder.conv1.bias"]
    assert bias.shape == (1,)
    assert 1 / (1 + np.exp(-bias[0])) == pytest.approx(many_images[:160].mean() / 255, rel=1e-5)


def test_plain_steps_leave_the_codebook_alone_and_train_the_networks(tmp_path, many_images):
    run = trainer(tmp_path, many_images, epochs=1, plain_steps=5)
    run.rules.plain_steps = 5
    before = run.model.params()
    run.run()
    after = run.model.params()
    np.testing.assert_array_equal(after["quantizer.codebook"], before["quantizer.codebook"])
    assert not np.array_equal(after["encoder.conv1.weight"], before["encoder.conv1.weight"])


def test_the_default_recipe_agrees_with_the_oracle_all_along(tmp_path, many_images):
    options = {name: value for name, value in dataclasses.asdict(DEFAULT).items() if name not in ("epochs", "batch_size")}
    result = trainer(tmp_path, many_images, epochs=3, **options).run()
    stages = {check["stage"] for check in result.metrics["oracle"]["checks"]}
    assert stages >= {"draw", "reset codebook", "reset count", "reset means"}
    assert all(line["oracle"]["passed"] for line in result.metrics["history"])
    assert result.metrics["codes_used"] == 8
