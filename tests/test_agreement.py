"""One comparison for every backend: an honest one passes in both precisions, and each corruption is named by its stage."""

import dataclasses

import numpy as np
import pytest

import vqref
from vqref.agreement import Backend, compare
from vqref.spec import CODEBOOK


def honest(model, precision: str) -> Backend:
    """The oracle itself behind the interface of a backend, rounded to ``precision``."""
    spec, params = model.spec, model.params
    codebook = params[CODEBOOK]

    def quantizer(latents):
        q = vqref.quantize(latents, codebook)
        return q.indices, q.quantized.astype(precision)

    def decoder(quantized):
        logits = vqref.decode(spec, params, quantized)
        return logits.astype(precision), vqref.sigmoid(logits).astype(precision)

    def losses(images, logits, latents, quantized):
        out = vqref.compute_losses(spec, images, logits, latents, quantized)
        return np.array([out.reconstruction, out.commitment, out.prior, out.total], precision)

    def ema(latents, indices):
        after = vqref.update_ema(vqref.EMAState.from_params(params), latents, indices)
        return tuple(getattr(after, name).astype(precision) for name in ("codebook", "ema_count", "ema_means"))

    def draw(latents, gumbel, temperature):
        return vqref.draw_indices(latents, codebook, gumbel, temperature)

    def reset(codes, rows, counts):
        after = vqref.reset_codes(vqref.EMAState.from_params(params), codes, rows, counts)
        return tuple(getattr(after, name).astype(precision) for name in ("codebook", "ema_count", "ema_means"))

    return Backend(
        precision,
        encoder=lambda images: vqref.encode(spec, params, images).astype(precision),
        quantizer=quantizer,
        decoder=decoder,
        tokenizer=lambda images: vqref.quantize(vqref.encode(spec, params, images), codebook).indices,
        detokenizer=lambda indices: decoder(codebook[indices])[1],
        losses=losses,
        ema=ema,
        draw=draw,
        reset=reset,
    )


STAGES = ["encoder", "quantizer", "quantized", "tokenizer", "decoder", "probabilities", "detokenizer", "losses"]


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_an_honest_backend_agrees_in_every_stage(model, real_images, precision):
    report = compare(model.spec, model.params, real_images, honest(model, precision)).require()
    assert [c.stage for c in report.checks] == [
        *STAGES,
        *("codebook", "ema_count", "ema_means"),
        *("draw", "reset codebook", "reset count", "reset means"),
    ]


def swap(stage: str, corrupt):
    """A backend whose ``stage`` passes its output through ``corrupt``."""

    def corrupted(backend: Backend) -> Backend:
        original = getattr(backend, stage)
        return dataclasses.replace(backend, **{stage: lambda *arrays: corrupt(original(*arrays))})

    return corrupted


def nudge(array, by=1e-4):
    """One element off by ``by`` of the largest magnitude."""
    out = np.array(array)
    out.flat[out.size // 2] += by * np.abs(out).max()
    return out


def row_of_the_codebook(damaged: int):
    """The quantizer with one codebook row moved, though no image is near that row."""

    def corrupted(backend: Backend) -> Backend:
        def quantizer(latents):
            indices, quantized = backend.quantizer(latents)
            return indices, np.where((indices == damaged)[..., None], quantized + np.float32(1e-3), quantized)

        return dataclasses.replace(backend, quantizer=quantizer)

    return corrupted


MUTANTS = {
    "encoder off by 1e-4": ("encoder", swap("encoder", nudge)),
    "encoder transposed": ("encoder", swap("encoder", lambda x: x[::-1])),
    "encoder in float16": ("encoder", swap("encoder", lambda x: x.astype(np.float16).astype(np.float32))),
    "index of the next code": ("quantizer", swap("quantizer", lambda out: ((out[0] + 1) % 16, out[1]))),
    "quantized from elsewhere": ("quantized", swap("quantizer", lambda out: (out[0], nudge(out[1], 1e-7)))),
    "quantized in float64": ("quantized", swap("quantizer", lambda out: (out[0], out[1].astype(np.float64)))),
    "one damaged codebook row": ("quantized", row_of_the_codebook(5)),
    "logits off by 1e-4": ("decoder", swap("decoder", lambda out: (nudge(out[0]), out[1]))),
    "probabilities are logits": ("probabilities", swap("decoder", lambda out: (out[0], out[0]))),
    "tokens rolled by one image": ("tokenizer", swap("tokenizer", lambda x: np.roll(x, 1, axis=0))),
    "tokens of another order": ("tokenizer", swap("tokenizer", lambda x: x[:, ::-1].copy())),
    "detokenizer ignores positions": (
        "detokenizer",
        lambda backend: dataclasses.replace(backend, detokenizer=lambda i: backend.detokenizer(i[:, ::-1])),
    ),
    "prior left out": ("losses", swap("losses", lambda x: x - np.array([0, 0, 0, x[2]]))),
    "mean of pixels": ("losses", swap("losses", lambda x: x / np.array([784, 1, 1, 1], np.float32))),
    "epsilon left out": ("codebook", swap("ema", lambda out: (out[2] / out[1][:, None], out[1], out[2]))),
    "count not updated": ("ema_count", swap("ema", lambda out: (out[0], out[1] * np.float32(1.01), out[2]))),
    "drawn from elsewhere": ("draw", swap("draw", lambda x: (x + 1) % 16)),
    "drawn without noise": (
        "draw",
        lambda backend: dataclasses.replace(backend, draw=lambda x, gumbel, t: backend.draw(x, 0 * gumbel, t)),
    ),
    "drawn at twice the temperature": (
        "draw",
        lambda backend: dataclasses.replace(backend, draw=lambda x, gumbel, t: backend.draw(x, gumbel, 2 * t)),
    ),
    "reset leaves the count": ("reset count", swap("reset", lambda out: (out[0], out[1] + np.float32(1), out[2]))),
    "reset leaves the means": ("reset means", swap("reset", lambda out: (out[0], out[1], out[2] * np.float32(2)))),
    "means not decayed": ("ema_means", swap("ema", lambda out: (out[0], out[1], nudge(out[2])))),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_corrupted_backend_is_caught_at_its_stage_and_nowhere_else(model, real_images, mutant):
    stage, corrupt = MUTANTS[mutant]
    report = compare(model.spec, model.params, real_images, corrupt(honest(model, "float32")))
    assert [c.stage for c in report.failures] == [stage]


def test_a_stage_left_out_is_not_compared(model, real_images):
    backend = Backend("float32", encoder=honest(model, "float32").encoder)
    assert [c.stage for c in compare(model.spec, model.params, real_images, backend).checks] == ["encoder"]
