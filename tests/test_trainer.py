"""The trainer: the oracle's rows and quantizer, the post's step.

A run stops if the oracle disagrees.
"""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support import CPU, SPEC, trainer

import vqref
import vqtrain.network
import vqtrain.quantizer
import vqtrain.run.trainer
from vqref import families
from vqref.agreement.advance import count_proved
from vqref.dialects import DIALECTS
from vqref.errors import CommandError, InputError, ParityError
from vqref.quantizer import EMAState
from vqref.spec import CODEBOOK
from vqtrain import RECIPES, VQVAE, Trainer, TrainingOptions, evaluate, training_step
from vqtrain.agreement import check_against_oracle, images_to_prove, share_proved
from vqtrain.data.batches import Batches
from vqtrain.device import choose_precision
from vqtrain.modelfile import read_model
from vqtrain.network import conv_transpose
from vqtrain.quantizer import Quantizer, assigned
from vqtrain.run.metrics import Meter
from vqtrain.run.rules import Rules
from vqtrain.run.start import mean_outputs, start_model
from vqtrain.run.step import make_optimizer

GRID = families.residual(
    (3, 16, 16), hidden=8, blocks=1, block_hidden=4, num_codes=8, code_size=4, variance=0.08
)


@pytest.fixture
def module(model):
    return VQVAE(model.spec, model.params)


def test_the_module_has_the_parameters_of_the_spec_and_learns_all_but_the_quantizers(module, model):
    assert [*module.state_dict()] == [p.name for p in model.spec.parameters]
    learned = {name for name, _ in module.named_parameters()}
    assert learned == {p.name for p in model.spec.parameters if not p.name.startswith("quantizer.")}
    for name, array in module.params().items():
        np.testing.assert_array_equal(array, model.params[name])


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 16, 24), (4, 4, 8)])
def test_the_module_agrees_with_the_oracle_in_every_stage_at_any_image_size(shape):
    spec = families.post(shape, base_depth=4, latent_size=3, num_codes=8, code_size=5)
    rng = np.random.default_rng(0)
    module = VQVAE(spec, vqref.init_params(spec, rng))
    report = check_against_oracle(
        module, rng.random((8, *shape)).astype(np.float32), TrainingOptions()
    )
    assert len(report.require().checks) == 16


def test_the_check_leaves_the_model_as_it_was(module, real_images):
    before = module.params()
    check_against_oracle(module, real_images, TrainingOptions())
    for name, array in module.params().items():
        np.testing.assert_array_equal(array, before[name])


def test_the_decoder_is_fed_codebook_rows_and_the_encoder_its_gradient(module, real_images):
    seen = {}

    def keep(_, inputs):
        seen["decoder input"] = inputs[0]
        inputs[0].retain_grad()

    module.decoder.register_forward_pre_hook(keep)
    out = module(torch.from_numpy(real_images))
    out.latents.retain_grad()
    out.outputs.sum().backward()
    assert torch.equal(seen["decoder input"], out.quantized)
    assert torch.equal(out.latents.grad, seen["decoder input"].grad)
    assert out.latents.grad.abs().sum() > 0


def test_a_step_moves_weights_by_adam_and_the_codebook_by_its_averages(module, model, real_images):
    options = TrainingOptions(batch_size=16)
    optimizer = torch.optim.Adam(module.parameters(), lr=options.learning_rate)
    before = module.params()
    losses, indices = training_step(
        module, optimizer, torch.from_numpy(real_images), options, Rules(options, 10), 0
    )
    after = module.params()
    out = vqref.forward(model.spec, before, real_images)
    assert losses.total.item() == pytest.approx(out.losses.total, rel=1e-5)
    np.testing.assert_array_equal(indices, out.indices)
    expected = vqref.update_ema(vqref.EMAState.from_params(before), out.latents, out.indices)
    np.testing.assert_allclose(after[CODEBOOK], expected.codebook, rtol=1e-4, atol=1e-6)
    for name in before:
        if not name.startswith("quantizer."):
            moved = np.abs(after[name] - before[name]).max()
            assert 0 < moved <= options.learning_rate * 1.001, name


def test_an_epoch_is_every_image_once_in_a_seeded_order():
    images = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1)
    batches = Batches(images, 3, CPU)
    first = torch.cat([*batches.shuffled(torch.Generator().manual_seed(1))])
    again = torch.cat([*batches.shuffled(torch.Generator().manual_seed(1))])
    rest = torch.cat([*batches.shuffled(torch.Generator().manual_seed(1), skip=2)])
    assert torch.equal(rest, first[6:])
    assert not [*batches.shuffled(torch.Generator().manual_seed(1), skip=3)]
    other = torch.cat([*batches.shuffled(torch.Generator().manual_seed(2))])
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(batches) == 3
    assert len(first.unique()) == 9
    assert first.dtype == torch.float32
    assert torch.equal(torch.cat([*batches.in_order()]).flatten() * 255, torch.arange(10.0))


def test_metrics_are_means_over_images_and_perplexity_counts_codes_in_use():
    meter = Meter(SPEC, CPU)
    one, three = (
        vqtrain.losses.Losses(*torch.tensor([value, value, 2.0, value])) for value in (1.0, 3.0)
    )
    meter.add(one, torch.tensor([[0, 1]]))
    meter.add(three, torch.tensor([[2, 3], [0, 1], [2, 3]]))
    found = meter.read()
    assert (found.reconstruction, found.prior, found.bound) == (2.5, 2.0, 4.5)
    assert found.perplexity == pytest.approx(4)
    assert found.codes_used == 4


def test_evaluation_counts_every_image_and_takes_no_step(module, model, many_images):
    before = module.params()
    found = evaluate(module, Batches(many_images[:70, None], 64, CPU), TrainingOptions(), 0.1)
    images = (many_images[:70, None] / np.float32(255)).astype(np.float32)
    out = vqref.forward(model.spec, model.params, images)
    assert found.reconstruction == pytest.approx(out.losses.reconstruction, rel=1e-5)
    assert found.codes_used == len(np.unique(out.indices))
    for name, array in module.params().items():
        np.testing.assert_array_equal(array, before[name])


def test_a_run_publishes_what_it_trained_and_says_how_it_went(tmp_path, many_images):
    said: list[str] = []
    run = trainer(tmp_path, many_images, said, work={"pictures": True})
    result = run.run()
    stored = read_model(tmp_path / "model.pt")
    assert stored.spec == SPEC
    assert stored.training == run.options.to_dict()
    for name, array in stored.params.items():
        np.testing.assert_array_equal(array, run.model.params()[name])
    assert [line["epoch"] for line in stored.metrics["history"]] == [1, 2]
    assert stored.metrics["history"][0]["bound"] > stored.metrics["bound"]
    assert all(line["oracle"]["passed"] for line in stored.metrics["history"])
    assert stored.metrics["held_out"] == result.metrics["held_out"]
    assert sum("oracle: agrees" in line for line in said) == 2
    assert all(len(line) <= 80 for line in said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "run"]
    folder = tmp_path / "run"
    assert (folder / "model.pt").read_bytes() == (tmp_path / "model.pt").read_bytes()
    assert len([*(folder / "snapshots").iterdir()]) == 2
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == stored.metrics["history"]
    assert lines[0]["data"] == "test.npz"
    assert lines[0]["bits_per_dimension"] == pytest.approx(lines[0]["bound"] / np.log(2) / 784)
    names = [
        f"epoch-{epoch:03d}-{what}.png"
        for epoch in (1, 2)
        for what in ("codebook", "reconstructions", "samples")
    ]
    assert sorted(path.name for path in (folder / "pictures").iterdir()) == names
    for path in (folder / "pictures").iterdir():
        with Image.open(path) as picture:
            assert 600 < picture.width < 1400


def test_the_share_of_tokens_proved_in_advance_is_measured_and_said(tmp_path, many_images):
    said: list[str] = []
    run = trainer(tmp_path, many_images, said, epochs=2)
    run.proved_sample = run.measured_sample[:10]
    metrics = run.run().metrics
    assert ["proved" in line["held_out"] for line in metrics["history"]] == [False, True]
    found = metrics["held_out"]
    counts = count_proved(SPEC, run.model.params(), run.proved_sample)
    assert found["proved"] == counts["float32"] / counts["tokens"]
    assert found["proved_in_lanes"] == counts["lanes"] / counts["tokens"]
    assert found["proved_images"] == 10
    (line,) = [line for line in said if line.startswith("proved in advance")]
    assert f"{found['proved']:.1%}" in line
    assert len(line) <= 80


def test_proofs_at_the_end_are_few_beside_what_it_trains_on():
    assert images_to_prove(SPEC, 149) == 0
    assert images_to_prove(SPEC, 1500) == 10
    assert images_to_prove(SPEC, 10**9) == 64
    large = families.residual((3, 512, 512), downsample=8)
    assert images_to_prove(large, 10**9) == 0  # one would take seconds
    assert share_proved(SPEC, {}, np.empty((0, *SPEC.image_shape))) == {}


def test_the_same_seed_trains_the_same_model_and_another_seed_another(tmp_path, many_images):
    for i in range(3):
        (tmp_path / str(i)).mkdir()
    first, again, other = (
        trainer(tmp_path / str(i), many_images, epochs=1, seed=seed)
        .run()
        .params["encoder.conv1.weight"]
        for i, seed in enumerate((3, 3, 4))
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_run_on_a_grid_shows_its_tokens_and_the_use_of_its_codes(tmp_path, colour_images):
    said: list[str] = []
    drawn = {"pictures": True}
    run = trainer(
        tmp_path, colour_images, said, spec=GRID, work=drawn, center=True, kmeans_start=True
    )
    result = run.run()
    last = result.metrics
    assert last["history"][0]["bound"] > last["bound"]
    assert all(line["oracle"]["passed"] for line in last["history"])
    error = last["held_out"]["nmse"] * GRID.variance
    assert last["held_out"]["psnr"] == pytest.approx(-10 * np.log10(error))
    assert f" {last['held_out']['psnr']:.2f} " in said[-2]
    assert all(len(line) <= 80 for line in said)
    names = [f"epoch-{epoch:03d}-reconstructions.png" for epoch in (1, 2)]
    assert sorted(path.name for path in (tmp_path / "run" / "pictures").iterdir()) == names


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("rules", [{}, {"kmeans_start": True, "revive_below": 0.5}])
def test_every_dialect_trains_and_agrees_with_the_oracle(tmp_path, many_images, dialect, rules):
    run = trainer(tmp_path, many_images, dialect=dialect, **rules)
    start = run.model.params()
    assert all(line["oracle"]["passed"] for line in run.run().metrics["history"])
    begun = vqref.init_params(SPEC, np.random.default_rng(0))[CODEBOOK]
    np.testing.assert_array_equal(start[CODEBOOK], begun)
    if DIALECTS[dialect].means != "own":
        expected = EMAState.start(begun, DIALECTS[dialect])
        np.testing.assert_array_equal(start["quantizer.ema_count"], expected.ema_count)
        np.testing.assert_array_equal(start["quantizer.ema_means"], expected.ema_means)
    else:
        assert 0.5 < start["quantizer.ema_means"].std() < 1.5


def test_checks_take_as_many_images_and_come_as_often_as_they_are_told_to(tmp_path, many_images):
    said: list[str] = []
    work = {"check_images": 5, "check_every": 2}
    result = trainer(tmp_path, many_images, said, work=work, epochs=3).run()
    assert ["oracle" in line for line in result.metrics["history"]] == [False, True, False]
    assert result.metrics["history"][1]["oracle"]["images"] == 5
    assert [line.split(" (")[0] for line in said if "oracle: agrees" in line] == [
        "oracle: agrees on 5 images, before the first step",
        "oracle: agrees on 5 images, model.pt read back",
    ]
    assert [line.split()[-1] for line in said[4:7]] == ["-", "agrees", "-"]


def test_pictures_come_as_often_as_they_are_told_to_and_at_the_end(tmp_path, many_images):
    work = {"pictures": True, "pictures_every": 2}
    trainer(tmp_path, many_images, work=work, epochs=3).run()
    drawn = sorted((tmp_path / "run" / "pictures").glob("*-codebook.png"))
    assert [path.name[:9] for path in drawn] == ["epoch-002", "epoch-003"]


def test_a_long_run_is_checked_and_drawn_after_some_epochs_only(tmp_path, many_images, monkeypatch):
    monkeypatch.setattr("vqtrain.run.trainer.TIMES_PER_RUN", 2)
    found = trainer(tmp_path, many_images, work={"pictures": True}, epochs=5).run()
    checked = [line["epoch"] for line in found.metrics["history"] if "oracle" in line]
    assert checked == [2, 4]
    drawn = sorted((tmp_path / "run" / "pictures").glob("*-codebook.png"))
    assert [path.name[:9] for path in drawn] == ["epoch-002", "epoch-004", "epoch-005"]


def test_without_held_out_images_a_sample_of_the_training_images_is_measured(
    tmp_path, many_images, monkeypatch
):
    monkeypatch.setattr(vqtrain.run.trainer, "SAMPLED_IMAGES", 50)
    said: list[str] = []
    run = trainer(tmp_path, many_images, said, held_out=0, epochs=1)
    line = run.run().metrics["history"][0]
    assert "held_out" not in line
    assert line["training_sample"]["ssim"] <= 1
    assert said[2].startswith("sample: a perfect reconstruction would score ")
    assert said[3].split()[2] == "sample"
    assert said[-2].split()[2] == f"{line['training_sample']['bound']:.2f}"
    images = many_images[:160:4, None] / np.float32(255)
    out = vqref.forward(SPEC, run.model.params(), images)
    assert line["training_sample"]["reconstruction"] == pytest.approx(
        out.losses.reconstruction, rel=1e-5
    )


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "logistic"])
@pytest.mark.parametrize("make", [families.post, families.residual])
def test_a_centred_start_reconstructs_the_mean_pixel(likelihood, make, colour_images):
    spec = make((3, 16, 16), likelihood=likelihood)
    found = mean_outputs(spec, colour_images)
    outputs = np.broadcast_to(found[:, None, None], (1, *spec.output_shape))
    expected = colour_images.mean(axis=(0, 2, 3)) / 255
    np.testing.assert_allclose(
        vqref.reconstruct(spec, outputs)[0, :, 0, 0], expected, rtol=0, atol=1e-12
    )
    assert (found[3:] == 0).all()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("make", [families.post, families.residual])
def test_every_recipe_has_options_for_every_family(recipe, make):
    options = RECIPES[recipe](make())
    assert isinstance(options, TrainingOptions)
    if recipe == "post":
        assert options == TrainingOptions()


def test_the_sonnet_recipe_takes_sonnets_steps(colour_images):
    """After three steps, the parameters are Sonnet's up to rounding.

    Sonnet's loss is NMSE + commitment / 4, with Adam's epsilon 1e-8.
    """
    options = RECIPES["sonnet"](GRID)
    module = start_model(GRID, options, colour_images, CPU).double()
    params = {name: array.astype(np.float64) for name, array in module.params().items()}
    ours, theirs = (VQVAE(GRID, params, DIALECTS["sonnet"]) for _ in range(2))
    optimizer, rules = make_optimizer(ours, options), Rules(options, 100)
    peer = torch.optim.Adam(theirs.parameters(), lr=3e-4, eps=1e-8)
    for step in range(3):
        images = torch.from_numpy(colour_images[32 * step : 32 * step + 32] / 255)
        training_step(ours, optimizer, images, options, rules, step)
        out = theirs(images)
        low, high = GRID.value_range
        errors = images - (out.outputs - low) / (high - low)
        nmse = errors.square().mean() / GRID.variance
        commitment = (out.latents - out.quantized).square().mean()
        peer.zero_grad()
        (nmse + 0.25 * commitment).backward()
        peer.step()
        found = assigned(out.latents.detach(), out.indices, GRID.num_codes)
        theirs.quantizer.update(*found, 0.99, 1e-5)
    for name, array in theirs.params().items():
        np.testing.assert_allclose(ours.params()[name], array, rtol=0, atol=1e-9)


def test_fewer_images_than_one_batch_are_refused(tmp_path, many_images):
    with pytest.raises(InputError, match=r"test\.npz: 160 images, fewer than one batch of 161"):
        trainer(tmp_path, many_images, batch_size=161)


def test_a_module_that_is_not_the_specs_network_never_starts(tmp_path, many_images, monkeypatch):
    monkeypatch.setitem(vqtrain.network.ACTIVATIONS, "elu", F.relu)
    with pytest.raises(
        ParityError,
        match=r"disagrees with the oracle before the first step: encoder .*; nothing was written",
    ):
        trainer(tmp_path, many_images).run()
    assert not [*tmp_path.rglob("*.pt")]


def test_a_disagreement_after_an_epoch_stops_the_run_and_keeps_the_last_good_model(
    tmp_path, many_images, monkeypatch
):
    run = trainer(tmp_path, many_images, epochs=3)
    publish = Trainer._epoch

    def by_sum_of_magnitudes(self, latents, choose=None):
        indices = (latents[:, :, None] - self.codebook).abs().sum(-1).argmin(-1)
        return indices, self.codebook[indices]

    def sabotage(self):
        if self.state.epoch == 1:
            monkeypatch.setattr(Quantizer, "forward", by_sum_of_magnitudes)
        publish(self)

    monkeypatch.setattr(Trainer, "_epoch", sabotage)
    with pytest.raises(ParityError, match=r"after epoch 2: quantizer .*model\.pt holds epoch 1"):
        run.run()
    assert read_model(tmp_path / "run" / "model.pt").metrics["epoch"] == 1


def test_an_ema_that_forgets_epsilon_is_caught_before_the_first_step(
    tmp_path, many_images, monkeypatch
):
    true = vqtrain.quantizer.update_ema

    def forgetful(codebook, count, means, latents, indices, decay, epsilon, *more):
        return true(codebook, count, means, latents, indices, decay, 1e-9, *more)

    monkeypatch.setattr(vqtrain.agreement, "update_ema", forgetful)
    with pytest.raises(ParityError, match=r"before the first step: codebook"):
        trainer(tmp_path, many_images).run()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_model(
    tmp_path, many_images, monkeypatch
):
    run = trainer(tmp_path, many_images)
    step = vqtrain.run.step.training_step

    def explode(*arguments):
        losses, indices = step(*arguments)
        return (
            losses._replace(total=losses.total * float("nan")) if run.state.history else losses
        ), indices

    monkeypatch.setattr(vqtrain.run.trainer, "training_step", explode)
    with pytest.raises(
        CommandError, match=r"the loss is nan in epoch 2; .*model\.pt holds epoch 1"
    ):
        run.run()
    assert read_model(tmp_path / "run" / "model.pt").metrics["epoch"] == 1


def test_weights_that_diverge_stop_the_run_with_one_line(tmp_path, many_images):
    with pytest.raises(
        CommandError,
        match=r"the run diverged after epoch 1: .*; nothing was written|the loss is (nan|inf)",
    ):
        trainer(tmp_path, many_images, learning_rate=1e6).run()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 0}, "epochs is 0; it must be an integer of at least 1 and below"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"seed": -1}, "seed is -1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be a number from 1e-12 to 1e"),
        ({"epsilon": float("inf")}, "epsilon is inf"),
        ({"beta": -1.0}, "beta is -1.0"),
        ({"decay": 1.01}, "decay is 1.01"),
        ({"decay": 1.0, "dialect": "sonnet"}, r"decay is 1; sonnet divides by 1 - decay"),
        ({"dialect": "tf"}, "dialect is 'tf'; it must be one of post, sonnet, rosinality"),
        ({"adam_epsilon": 0.0}, "adam_epsilon is 0.0; it must be a number from 1e-12"),
        ({"revive_below": "x"}, "revive_below is 'x'; it must be a number from 0 to 1"),
        ({"precision": "int8"}, "precision is 'int8'; it must be one of float32, tf32, bfloat16"),
    ],
)
def test_an_option_that_cannot_be_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainingOptions(**fields)


@pytest.mark.parametrize(("instructions", "chosen"), [(True, "bfloat16"), (False, "float32")])
def test_auto_takes_the_precision_that_the_processor_has(monkeypatch, instructions, chosen):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: instructions, raising=False)
    assert choose_precision(torch.device("cpu")) == chosen


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 16, 24)])
def test_phases_are_the_transposed_convolution(shape):
    """At stride 2, four small convolutions and a shuffle give PyTorch's own result, in float64."""
    layers = [
        row
        for row in families.post(shape, base_depth=4).decoder
        if row.kind == "conv_transpose" and row.stride == 2
    ]
    assert layers
    for row in layers:
        generator = torch.Generator().manual_seed(0)
        x, weight, bias = (
            torch.randn(size, generator=generator, dtype=torch.float64)
            for size in ((3, *row.in_shape), row.parameters[0][1], row.parameters[1][1])
        )
        full = torch.nn.functional.conv_transpose2d(x, weight, bias, row.stride)
        (top, _), (left, _) = row.pads
        expected = full[:, :, top : top + row.out_shape[1], left : left + row.out_shape[2]]
        torch.testing.assert_close(
            conv_transpose(row, x, weight, bias), expected, rtol=0, atol=1e-13
        )


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_run_on_cuda_agrees_with_the_oracle(tmp_path, many_images):
    run = trainer(tmp_path, many_images, device=torch.device("cuda"))
    assert all(line["oracle"]["passed"] for line in run.run().metrics["history"])
