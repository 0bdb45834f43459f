"""The rules of a recipe: when each applies, and what it does to the codebook."""

import dataclasses
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from scipy.cluster.vq import kmeans2
from support import CPU, SPEC, trainer, unit

import vqref
from vqref import families
from vqtrain import RECIPES, VQVAE, TrainingOptions
from vqtrain.data.batches import Batches
from vqtrain.nearest import nearest
from vqtrain.options import recipe_sizes
from vqtrain.quantizer import draw
from vqtrain.run import rules
from vqtrain.run.rules import Rules, fits_an_array, kmeans

POST, RESIDUAL = families.post(), families.residual()
DEFAULT = RECIPES["default"](POST)


def test_the_recipe_of_the_post_has_no_rule_and_the_posts_constants():
    for spec in (POST, RESIDUAL):
        assert RECIPES["post"](spec) == TrainingOptions()
    post = TrainingOptions()
    assert (post.epochs, post.batch_size, post.learning_rate) == (20, 64, 1e-3)
    assert (post.beta, post.decay, post.epsilon, post.dialect) == (0.25, 0.99, 1e-5, "post")
    each = Rules(post, 100)
    assert not any(each.plain(step) or each.starts(step) for step in range(100))
    assert {each.learning_rate(step) for step in range(100)} == {1e-3}
    assert {each.choices(step, POST, 8).kind for step in range(100)} == {(False, False, False)}


def test_the_recipe_of_sonnet_has_no_rule_and_the_examples_constants():
    """The gaussian loss is CHW/2 times Sonnet's; beta and Adam's epsilon take this factor, too."""
    options = RECIPES["sonnet"](RESIDUAL)
    factor = 3 * 32 * 32 / 2
    assert (options.batch_size, options.learning_rate, options.second_moment) == (32, 3e-4, 0.999)
    assert (options.decay, options.epsilon, options.dialect) == (0.99, 1e-5, "sonnet")
    assert options.beta == pytest.approx(0.25 * factor)
    assert options.adam_epsilon == pytest.approx(1e-8 * factor)
    each = Rules(options, 100)
    assert not any(each.plain(step) or each.starts(step) for step in range(100))
    assert {each.learning_rate(step) for step in range(100)} == {3e-4}
    assert {each.choices(step, RESIDUAL, 8).kind for step in range(100)} == {(False,) * 3}


def test_the_default_recipe_of_the_post_waits_starts_anneals_and_settles():
    each = Rules(DEFAULT, 4360)
    assert [step for step in range(4360) if each.starts(step)] == [400]
    assert [each.plain(step) for step in (0, 399, 400)] == [True, True, False]
    temperatures = [each.temperature(step) for step in range(4360)]
    assert temperatures[0] == 0.3
    assert temperatures == sorted(temperatures, reverse=True)
    assert [t > 0 for t in (temperatures[2615], temperatures[2616])] == [True, False]
    rates = [each.learning_rate(step) for step in range(4360)]
    assert max(rates) == pytest.approx(1e-3, rel=0.01)
    assert rates[0] < 2e-5
    assert rates[-1] < 2e-5


def test_every_recipe_gives_options_for_every_family():
    for recipe in RECIPES.values():
        for family in families.FAMILIES.values():
            options = recipe(family())
            assert TrainingOptions(**options.to_dict()) == options


@pytest.mark.parametrize("most", [2**24, 1000])
def test_the_choices_of_an_annealed_step_are_distributed_as_the_rule_says(most, monkeypatch):
    """One latent between three codes, 20,000 times, compared with the oracle's draws.

    The oracle has NumPy's noise. The choices have an array of noise, or a seed if the array would
    be too large.
    """
    monkeypatch.setattr(rules, "CHOICE_ELEMENTS", most)
    codebook = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    latents = torch.tensor([0.4, 0.1]).expand(20_000, 1, 2)
    each = Rules(dataclasses.replace(DEFAULT, temperature=5.0, plain_steps=0), 100)
    choices = each.choices(0, families.post(num_codes=3, code_size=2), 20_000)
    assert isinstance(choices.gumbel, int) is (most == 1000)
    found = draw(latents, codebook, choices.gumbel, choices.temperature)
    gumbel = np.random.default_rng(0).gumbel(size=(20_000, 1, 3))
    expected = vqref.draw_indices(latents.numpy(), codebook.numpy(), gumbel, 5.0)
    shares = [
        np.bincount(np.asarray(drawn).ravel(), minlength=3) / 20_000 for drawn in (found, expected)
    ]
    np.testing.assert_allclose(shares[0], shares[1], atol=0.015)
    assert (shares[0] > 0.001).all()


def test_choices_too_many_for_an_array_are_a_seed_and_a_new_one_each_step():
    """For 64 images of 1,024 latents with 16,384 codes, an array would take 4 GiB."""
    spec = families.residual((3, 256, 256), downsample=8, num_codes=16_384)
    assert spec.latent_size == 1024
    assert not fits_an_array(spec, 64)
    assert fits_an_array(POST, 64)
    each = Rules(dataclasses.replace(DEFAULT, plain_steps=0), 100)
    seeds = [each.choices(step, spec, 64).gumbel for step in range(5)]
    assert all(isinstance(seed, int) for seed in seeds)
    assert len(set(seeds)) == 5
    again = Rules(dataclasses.replace(DEFAULT, plain_steps=0), 100)
    assert [again.choices(step, spec, 64).gumbel for step in range(5)] == seeds


def test_large_codebooks_of_grids_have_short_rows_unless_others_are_asked_for():
    large, small = {"num_codes": 2048}, {"num_codes": 2047}
    for family in ("residual", "vqgan"):
        assert recipe_sizes("default", family, large) == {"num_codes": 2048, "code_size": 8}
        assert recipe_sizes("default", family, small) == small
        assert recipe_sizes("default", family, {}) == {}
        assert recipe_sizes("sonnet", family, large) == large
        asked = {**large, "code_size": 64}
        assert recipe_sizes("default", family, asked) == asked
    assert recipe_sizes("default", "post", large) == large


def test_a_short_run_has_a_codebook_too():
    assert [step for step in range(40) if Rules(DEFAULT, 40).starts(step)] == [4]


@pytest.mark.parametrize("grid", [False, True])
def test_the_start_puts_every_code_among_the_latents(
    grid, model, residual_model, many_images, colour_images
):
    each = residual_model if grid else model
    images = colour_images[:50] if grid else many_images[:200, None]
    module, spec = VQVAE(each.spec, each.params), each.spec
    batches = Batches(images, 25, CPU)
    Rules(dataclasses.replace(DEFAULT, batch_size=25), 100).start(module, batches)
    quantizer = module.quantizer
    with torch.no_grad():
        latents = torch.cat([module.encoder(part) for part in batches.in_order()])
    indices = nearest(latents, quantizer.codebook)
    assert len(indices.unique()) == spec.num_codes
    total = quantizer.ema_count.sum().item()
    assert total == pytest.approx(25 * spec.latent_size, rel=1e-5)
    expected = quantizer.codebook * (quantizer.ema_count + DEFAULT.epsilon)[:, None]
    torch.testing.assert_close(quantizer.ema_means, expected)
    before = torch.from_numpy(np.array(each.params["quantizer.codebook"]))
    error = (latents - before[nearest(latents, before)]).square().mean()
    assert (latents - quantizer.codebook[indices]).square().mean() < error


def test_the_start_with_fewer_latents_than_codes_is_made_all_the_same(model, many_images):
    module = VQVAE(model.spec, model.params)
    Rules(DEFAULT, 100).start(module, Batches(many_images[:2, None], 2, CPU))
    assert torch.isfinite(module.quantizer.codebook).all()


@pytest.mark.parametrize("most", [2**24, 1000])
def test_kmeans_is_a_sensible_partition_with_an_array_of_distances_and_without(most, monkeypatch):
    """For eight clusters of 2,000 latents, the error is near that of SciPy's best of ten."""
    monkeypatch.setattr(rules, "CHOICE_ELEMENTS", most)
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(8, 4)) * 3
    points = centres[rng.integers(0, 8, 2000)] + rng.normal(size=(2000, 4))
    rows, labels = kmeans(torch.from_numpy(points), 8, seed=1)
    assert (rows.shape, labels.shape, labels.dtype) == ((8, 4), (2000,), torch.int64)
    again = kmeans(torch.from_numpy(points), 8, seed=1)
    assert torch.equal(again[0], rows)
    assert torch.equal(again[1], labels)

    def error(rows, labels):
        return np.square(points - np.asarray(rows)[np.asarray(labels)]).sum()

    best = min(error(*kmeans2(points, 8, minit="++", rng=seed)) for seed in range(10))
    assert error(rows, labels) < 1.3 * best
    assert len(labels.unique()) == 8
    nearest_rows = nearest(torch.from_numpy(points)[None], rows.double())[0]
    assert (nearest_rows == labels).double().mean() > 0.99


def test_kmeans_of_unit_latents_ends_on_the_sphere_at_the_directions_of_its_clusters():
    points = unit(np.random.default_rng(0).normal(size=(500, 3)))
    rows, labels = kmeans(torch.from_numpy(points), 8, seed=1, normalized=True)
    np.testing.assert_allclose(rows.norm(dim=1).numpy(), 1, rtol=1e-14)
    means = np.stack([points[labels == code].mean(axis=0) for code in range(8)])
    np.testing.assert_allclose(rows, unit(means), atol=0.02)  # not yet converged


def test_the_alternation_moves_each_code_to_the_mean_of_its_latents(monkeypatch):
    monkeypatch.setattr(rules, "CHOICE_ELEMENTS", 1)
    points = torch.from_numpy(np.random.default_rng(0).normal(size=(300, 2)))
    rows, labels = kmeans(points, 5, seed=0)
    for code in range(5):
        torch.testing.assert_close(points[labels == code].mean(dim=0), rows[code], atol=0.1, rtol=0)


def test_latents_that_are_no_numbers_cannot_be_clustered():
    with pytest.raises(ValueError, match="latents are not finite"):
        kmeans(torch.full((20, 2), torch.nan), 3, seed=0)


CLUSTERED = """
import resource, torch
from vqtrain.run.rules import CHOICE_ELEMENTS, kmeans
import vqtrain.run.rules as rules
rules.KMEANS_STEPS = 1
latents = torch.randn(16384, 16)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
kmeans(latents[:1024], 512, 0)
before = peak()
assert 16384 * 4096 > CHOICE_ELEMENTS
kmeans(latents, 4096, 0)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the resource module is POSIX's")
def test_kmeans_of_many_latents_makes_no_array_of_all_distances():
    """For 16,384 latents and 4,096 codes, all distances in float64 would take 512 MiB."""
    done = subprocess.run(
        [sys.executable, "-c", CLUSTERED], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 128 * 1024  # KiB


def test_dead_codes_are_revived_until_the_end_is_near_and_not_in_plain_steps():
    options = dataclasses.replace(DEFAULT, plain_steps=5, revive_below=0.05)
    steps = range(100)
    found = [step for step in steps if Rules(options, 100).choices(step, POST, 8).order is not None]
    assert found == list(range(5, 90))
    order = Rules(options, 100).choices(50, RESIDUAL, 8).order
    assert order.sort().values.tolist() == list(range(8 * 64))
    assert not Rules(dataclasses.replace(options, revive_below=0.0), 100).revives(50)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "logistic"])
def test_a_centred_decoder_starts_at_the_mean_pixel(tmp_path, many_images, likelihood):
    spec = families.post(
        (1, 28, 28), base_depth=4, num_codes=8, code_size=4, likelihood=likelihood, variance=0.1
    )
    run = trainer(tmp_path, many_images, center=True, spec=spec)
    bias = run.model.params()["decoder.conv1.bias"]
    assert bias.shape == (spec.output_shape[0],)
    outputs = np.broadcast_to(bias[:, None, None], (1, *spec.output_shape))
    expected = many_images[:160].mean() / 255
    assert vqref.reconstruct(spec, outputs).mean() == pytest.approx(expected, rel=1e-5)


def test_plain_steps_leave_the_codebook_alone_and_train_the_networks(tmp_path, many_images):
    run = trainer(tmp_path, many_images, epochs=1, plain_steps=5)
    run.rules.plain_steps = 5
    before = run.model.params()
    run.run()
    after = run.model.params()
    np.testing.assert_array_equal(after["quantizer.codebook"], before["quantizer.codebook"])
    assert not np.array_equal(after["encoder.conv1.weight"], before["encoder.conv1.weight"])


def without_sizes(options):
    """Returns the fields of options without the length of the run and its batches."""
    return {n: v for n, v in options.to_dict().items() if n not in ("epochs", "batch_size")}


def test_the_default_recipe_agrees_with_the_oracle_all_along(tmp_path, many_images):
    options = without_sizes(RECIPES["default"](SPEC))
    result = trainer(tmp_path, many_images, epochs=3, **options).run()
    stages = {check["stage"] for check in result.metrics["oracle"]["checks"]}
    assert stages >= {"draw", "reset codebook", "reset count", "reset means"}
    assert all(line["oracle"]["passed"] for line in result.metrics["history"])
    assert result.metrics["codes_used"] == 8


@pytest.mark.parametrize("recipe", ["default", "sonnet"])
def test_a_grid_trains_and_agrees_with_the_oracle_under_its_recipe(tmp_path, colour_images, recipe):
    sizes: dict[str, Any] = {
        "hidden": 8,
        "blocks": 1,
        "block_hidden": 4,
        "num_codes": 16,
        "code_size": 4,
    }
    spec = families.residual((3, 16, 16), **sizes, variance=0.1)
    options = without_sizes(RECIPES[recipe](spec))
    result = trainer(tmp_path, colour_images, spec=spec, **options).run()
    assert all(line["oracle"]["passed"] for line in result.metrics["history"])
    assert math.isfinite(result.metrics["history"][-1]["total"])
