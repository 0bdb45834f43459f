"""One comparison for every backend: honest ones pass, each corruption is named by its stage."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from support import RESIDUAL, small_model, unit

import vqref
from vqref import families
from vqref.agreement import budget, stages
from vqref.agreement.stages import Backend, check_ema, check_reconstructions, compare
from vqref.dialects import DIALECTS, POST
from vqref.likelihoods import LIKELIHOODS
from vqref.network import encode_unscaled
from vqref.spec import CODEBOOK

DECAY, EPSILON = 0.99, 1e-5


def honest(model, precision, dialect=POST, steps=0, normalized=None):
    """The oracle itself, with the interface of a backend, rounded to ``precision``."""
    spec, params = model.spec, model.params
    how = DECAY, EPSILON, dialect
    codebook = params[CODEBOOK]
    on_sphere = spec.normalized if normalized is None else normalized
    state = vqref.EMAState.from_params(params, steps, normalized=on_sphere)

    def quantizer(latents):
        q = vqref.quantize(latents, codebook)
        return q.indices, q.quantized.astype(precision)

    def decoder(quantized):
        outputs = vqref.decode(spec, params, quantized)
        return outputs.astype(precision), vqref.reconstruct(spec, outputs).astype(precision)

    def losses(images, outputs, latents, quantized):
        out = vqref.compute_losses(spec, images, outputs, latents, quantized)
        return np.array([out.reconstruction, out.commitment, out.prior, out.total], precision)

    def ema(latents, indices):
        after = vqref.update_ema(state, latents, indices, *how)
        return tuple(
            getattr(after, name).astype(precision)
            for name in ("codebook", "ema_count", "ema_means")
        )

    def draw(latents, gumbel, temperature):
        return vqref.draw_indices(latents, codebook, gumbel, temperature)

    def reset(codes, rows, counts):
        after = vqref.reset_codes(state, codes, rows, counts, *how)
        return tuple(
            getattr(after, name).astype(precision)
            for name in ("codebook", "ema_count", "ema_means")
        )

    return Backend(
        precision,
        encoder=lambda images: vqref.encode(spec, params, images).astype(precision),
        quantizer=quantizer,
        decoder=decoder,
        tokenizer=lambda images: (
            vqref.quantize(vqref.encode(spec, params, images), codebook).indices
        ),
        detokenizer=lambda indices: decoder(codebook[indices])[1],
        losses=losses,
        ema=ema,
        draw=draw,
        reset=reset,
    )


STAGES = [
    "encoder",
    "quantizer",
    "quantized",
    "tokenizer",
    "decoder",
    "reconstructions",
    "detokenizer",
    "losses",
]


ALL_STAGES = [
    *STAGES,
    *("codebook", "ema_count", "ema_means"),
    *("draw", "reset codebook", "reset count", "reset means"),
]


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_an_honest_backend_agrees_in_every_stage(model, real_images, precision):
    report = compare(model.spec, model.params, real_images, honest(model, precision)).require()
    assert [c.stage for c in report.checks] == ALL_STAGES
    assert report.images == 16


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_an_honest_backend_agrees_on_a_grid_under_every_likelihood(likelihood, precision):
    spec = families.residual((3, 16, 16), **RESIDUAL, likelihood=likelihood, variance=0.08)
    model = small_model(spec)
    images = np.random.default_rng(0).random((4, 3, 16, 16))
    report = compare(spec, model.params, images, honest(model, precision)).require()
    assert [c.stage for c in report.checks] == ALL_STAGES


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=list(DIALECTS))
def test_averages_and_resets_are_judged_in_the_dialect_and_at_the_step_of_the_run(
    model, real_images, dialect
):
    backend = honest(model, "float64", dialect, steps=3)
    for judge, steps, passes in (
        (dialect, 3, True),
        (dialect, 9, not dialect.debiased),
        (POST, 3, dialect == POST),
    ):
        report = compare(model.spec, model.params, real_images, backend, dialect=judge, steps=steps)
        assert report.passed is passes


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_codes_that_leave_the_sphere_are_found(precision):
    """After updates and resets, the rules of unit codes agree; those of other codes do not."""
    model = small_model(families.residual((3, 16, 16), **RESIDUAL, normalized=True))
    images = np.random.default_rng(0).random((4, 3, 16, 16))
    how = model.spec, model.params, images
    right = honest(model, precision)
    assert [c.stage for c in compare(*how, right).require().checks] == ALL_STAGES
    plain = honest(model, precision, normalized=False)
    found = compare(*how, dataclasses.replace(right, ema=plain.ema))
    assert [c.stage for c in found.checks if not c.passed] == ["codebook"]

    def reset(codes, rows, counts):
        return plain.reset(codes, 2 * rows, counts)

    found = compare(*how, dataclasses.replace(right, reset=reset))
    assert [c.stage for c in found.checks if not c.passed] == ["reset codebook", "reset means"]


def test_a_unit_code_is_judged_beside_the_length_that_is_left_of_its_sum():
    """The sum of two opposed latents has 1e-3 of their length.

    So a rounding of the latents turns the code a thousand times as far. That passes; ten times more
    does not.
    """
    state = vqref.EMAState(np.eye(2), np.ones(2), np.eye(2), normalized=True)
    latents, indices = np.array([[[1.0, 1e-3], [-1.0, 0.0]]]), np.zeros((1, 2), int)
    after = vqref.update_ema(state, latents, indices, decay=0.0, epsilon=EPSILON)
    for turned, passes in ((1e-4, True), (1e-1, False)):
        codebook = after.codebook + np.array([[turned, 0.0], [0.0, 0.0]])
        count, means = (x.astype(np.float32) for x in (after.ema_count, after.ema_means))
        found = codebook.astype(np.float32), count, means
        judged = check_ema(
            found, state, latents, indices, precision="float32", decay=0.0, epsilon=EPSILON
        )
        assert next(judged).passed is passes


def test_unit_latents_may_be_turned_by_what_their_lengths_make_of_the_encoders_tolerance():
    """An encoder within its tolerance before its last row passes, however short a vector was.

    Tokens of such latents are right or near ties. An encoder that is not within its tolerance
    fails.
    """
    model = small_model(families.residual((3, 16, 16), **RESIDUAL, normalized=True))
    how = model.spec, model.params
    rng = np.random.default_rng(0)
    images = rng.random((8, 3, 16, 16)).astype(np.float32)
    bias = model.params["encoder.to_latents.bias"]
    bias -= encode_unscaled(*how, images).mean(axis=(0, 1)).astype(np.float32)
    unscaled = encode_unscaled(*how, images)
    lengths, scale = np.linalg.norm(unscaled, axis=2), np.abs(unscaled).max()
    assert lengths.min() < 0.25 * scale
    for off, passes in ((0.9e-5, True), (1e-4, False)):
        moved = unit(unscaled + off * scale * rng.choice([-1, 1], unscaled.shape))
        backend = Backend(
            "float32",
            encoder=giving(moved.astype(np.float32)),
            tokenizer=giving(vqref.quantize(moved, model.params[CODEBOOK]).indices),
        )
        judged = compare(*how, images, backend).checks
        assert judged[0].passed is passes
        assert judged[1].passed or not passes


def test_what_the_caller_knows_is_not_computed_again(model, real_images, monkeypatch):
    known = vqref.forward(model.spec, model.params, real_images)
    backend = honest(model, "float64")
    monkeypatch.setattr(stages, "encode_unscaled", None)
    report = compare(model.spec, model.params, real_images, backend, known=known).require()
    assert [c.stage for c in report.checks] == ALL_STAGES
    wrong = dataclasses.replace(known, latents=known.latents + 1e-3)
    monkeypatch.undo()
    assert not compare(model.spec, model.params, real_images, backend, known=wrong).passed


def test_every_code_is_probed_at_every_position_or_at_one_place_of_a_grid(model, residual_model):
    for each in (model, residual_model):
        tokens = stages._probe_tokens(each.spec)
        assert set(tokens.ravel()) == set(range(each.spec.num_codes))
        assert tokens.shape[1] == each.spec.latent_size
    assert all(set(column) == set(range(16)) for column in stages._probe_tokens(model.spec).T)
    latents = stages._probe_latents(model.spec, model.params[CODEBOOK])
    assert latents.shape == (64, 4, 8)  # 16 rows, and 240 points between two


def test_reconstructions_may_be_off_by_what_the_outputs_may_be_times_the_slope(residual_model):
    spec = residual_model.spec
    outputs = np.zeros((2, *spec.output_shape))
    outputs[0, 0, 0, 0] = 100.0  # it is clipped, and is the scale of its image
    exact = vqref.reconstruct(spec, outputs)
    for image, by, passes in ((0, 5e-4, True), (1, 5e-4, False), (1, 5e-6, True)):
        found = exact.copy()
        found[image, 1, 2, 3] += by
        judged = check_reconstructions(
            "reconstructions", found.astype(np.float32), outputs, "float32", spec
        )
        assert judged.passed is passes


def test_a_check_takes_as_many_images_as_fit_its_seconds_or_four_that_fit_a_minute_or_one():
    small, large = families.post(), families.residual((3, 256, 256), downsample=8, num_codes=16384)
    assert budget.images_within(small) == 64
    assert budget.images_within(small, most=5) == 5
    assert budget.images_within(large) == 4
    assert budget.images_within(large, most=2) == 2
    middle = families.residual((3, 64, 64))
    fits = budget.images_within(middle)
    assert 4 < fits < 64
    assert fits * budget.seconds_per_image(middle) <= budget.SECONDS
    slow = families.vqgan((3, 128, 128))
    assert 4 * budget.seconds_per_image(slow) < budget.LONGEST
    assert budget.images_within(slow) == 4
    assert budget.images_within(families.vqgan((3, 256, 256))) == 1


def giving(array):
    """Returns a stage that returns ``array`` for any input."""
    return lambda *_: array


def swap(stage: str, corrupt):
    """A backend whose ``stage`` passes its output through ``corrupt``."""

    def corrupted(backend: Backend) -> Backend:
        original = getattr(backend, stage)

        def changed(*arrays):
            return corrupt(original(*arrays))

        return dataclasses.replace(backend, **dict[str, Any]({stage: changed}))

    return corrupted


def nudge(array, by=1e-4):
    """Moves one element by ``by`` times the largest magnitude."""
    out = np.array(array)
    out.flat[out.size // 2] += by * np.abs(out).max()
    return out


def row_of_the_codebook(damaged: int):
    """Returns a quantizer with one codebook row moved, though no image is near that row."""

    def corrupted(backend: Backend) -> Backend:
        def quantizer(latents):
            indices, quantized = backend.quantizer(latents)
            return indices, np.where(
                (indices == damaged)[..., None], quantized + np.float32(1e-3), quantized
            )

        return dataclasses.replace(backend, quantizer=quantizer)

    return corrupted


MUTANTS = {
    "encoder off by 1e-4": ("encoder", swap("encoder", nudge)),
    "encoder transposed": ("encoder", swap("encoder", lambda x: x[::-1])),
    "encoder in float16": (
        "encoder",
        swap("encoder", lambda x: x.astype(np.float16).astype(np.float32)),
    ),
    "index of the next code": (
        "quantizer",
        swap("quantizer", lambda out: ((out[0] + 1) % 16, out[1])),
    ),
    "quantized from elsewhere": (
        "quantized",
        swap("quantizer", lambda out: (out[0], nudge(out[1], 1e-7))),
    ),
    "quantized in float64": (
        "quantized",
        swap("quantizer", lambda out: (out[0], out[1].astype(np.float64))),
    ),
    "one damaged codebook row": ("quantized", row_of_the_codebook(5)),
    "outputs off by 1e-4": ("decoder", swap("decoder", lambda out: (nudge(out[0]), out[1]))),
    "reconstructions are outputs": (
        "reconstructions",
        swap("decoder", lambda out: (out[0], out[0])),
    ),
    "tokens rolled by one image": ("tokenizer", swap("tokenizer", lambda x: np.roll(x, 1, axis=0))),
    "tokens of another order": ("tokenizer", swap("tokenizer", lambda x: x[:, ::-1].copy())),
    "detokenizer ignores positions": (
        "detokenizer",
        lambda backend: dataclasses.replace(
            backend, detokenizer=lambda i: backend.detokenizer(i[:, ::-1])
        ),
    ),
    "prior left out": ("losses", swap("losses", lambda x: x - np.array([0, 0, 0, x[2]]))),
    "mean of pixels": (
        "losses",
        swap("losses", lambda x: x / np.array([784, 1, 1, 1], np.float32)),
    ),
    "epsilon left out": (
        "codebook",
        swap("ema", lambda out: (out[2] / out[1][:, None], out[1], out[2])),
    ),
    "count not updated": (
        "ema_count",
        swap("ema", lambda out: (out[0], out[1] * np.float32(1.01), out[2])),
    ),
    "drawn from elsewhere": ("draw", swap("draw", lambda x: (x + 1) % 16)),
    "drawn without noise": (
        "draw",
        lambda backend: dataclasses.replace(
            backend, draw=lambda x, gumbel, t: backend.draw(x, 0 * gumbel, t)
        ),
    ),
    "drawn at twice the temperature": (
        "draw",
        lambda backend: dataclasses.replace(
            backend, draw=lambda x, gumbel, t: backend.draw(x, gumbel, 2 * t)
        ),
    ),
    "reset leaves the count": (
        "reset count",
        swap("reset", lambda out: (out[0], out[1] + np.float32(1), out[2])),
    ),
    "reset leaves the means": (
        "reset means",
        swap("reset", lambda out: (out[0], out[1], out[2] * np.float32(2))),
    ),
    "means not decayed": ("ema_means", swap("ema", lambda out: (out[0], out[1], nudge(out[2])))),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_corrupted_backend_is_caught_at_its_stage_and_nowhere_else(model, real_images, mutant):
    stage, corrupt = MUTANTS[mutant]
    report = compare(model.spec, model.params, real_images, corrupt(honest(model, "float32")))
    assert [c.stage for c in report.failures] == [stage]


def test_a_stage_left_out_is_not_compared(model, real_images):
    backend = Backend("float32", encoder=honest(model, "float32").encoder)
    assert [c.stage for c in compare(model.spec, model.params, real_images, backend).checks] == [
        "encoder"
    ]
