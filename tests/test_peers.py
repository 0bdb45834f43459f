"""Other people's quantizers, compared with the same oracle. Needs the extra ``peers``."""

from functools import partial

import numpy as np
import pytest
import torch

import vqref
from benchmarks.grids import CARE
from benchmarks.peers import without_one_hot
from vqref.agreement.parity import check_indices
from vqref.checks.checks import quantizer_checks
from vqref.dialects import DIALECTS, POST
from vqref.quantizer import EMAState

library = pytest.importorskip("vector_quantize_pytorch", reason="needs pip install -e '.[peers]'")

DIALECT = DIALECTS["vector-quantize-pytorch"]
BUFFERS = ("embed", "cluster_size", "embed_avg")


def codebook_of(k, d, **options):
    return library.VectorQuantize(dim=d, codebook_size=k, **options)._codebook


def load(module, codebook, count, means):
    for name, array in zip(BUFFERS, (codebook, count, means), strict=True):
        getattr(module, name).data.copy_(torch.from_numpy(np.asarray(array, np.float32))[None])


def read(module):
    return tuple(getattr(module, name)[0].numpy().copy() for name in BUFFERS)


@torch.no_grad()
def quantize(latents, codebook):
    module = codebook_of(*codebook.shape).eval()
    module.embed.data.copy_(torch.from_numpy(codebook)[None])
    quantized, indices, _ = module(torch.from_numpy(latents))
    return indices.numpy(), quantized.numpy()


@torch.no_grad()
def update(state, latents, indices, decay, epsilon):
    module = codebook_of(*state.codebook.shape, decay=decay, eps=epsilon).train()
    load(module, state.codebook, state.ema_count, state.ema_means)
    module.update_indices(torch.from_numpy(latents), torch.from_numpy(indices))
    return read(module)


@torch.no_grad()
def step(state, latents, decay, epsilon):
    module = codebook_of(*state.codebook.shape, decay=decay, eps=epsilon).train()
    load(module, state.codebook, state.ema_count, state.ema_means)
    quantized, indices, _ = module(torch.from_numpy(latents))
    return indices.numpy(), quantized.numpy(), read(module)


CLAMPED = (
    "its cdist takes every squared distance below 1e-8 for 1e-8, so that such codes are equally "
    "near"
)
DISAGREES = dict.fromkeys(("mixed_scales", "scales", "step_small", "step_mixed"), CLAMPED)
CHECKS = quantizer_checks(quantize, update, step, form="expanded root", dialect=DIALECT)


@pytest.mark.parametrize(
    "check", [check for check in CHECKS if check.name not in DISAGREES], ids=str
)
def test_vector_quantize_pytorch_agrees_under_its_dialect(check):
    check.run().require()


@pytest.mark.parametrize("check", [check for check in CHECKS if check.name in DISAGREES], ids=str)
def test_what_vector_quantize_pytorch_does_otherwise_is_found(check):
    assert not check.run().passed, f"it no longer differs: {DISAGREES[check.name]}"


@pytest.mark.parametrize("dead_below", [0, 2])
@torch.no_grad()
def test_a_hundred_training_steps_of_vector_quantize_pytorch_are_the_oracles(dead_below):
    """Each side continues from its own state.

    A code whose count fell below ``dead_below`` is replaced by a latent. The library draws it, and
    the oracle is told which.
    """
    torch.manual_seed(0)
    k, d, rng = 64, 16, np.random.default_rng(0)
    module = codebook_of(k, d, decay=0.99, threshold_ema_dead_code=dead_below).train()
    module.embed.data.copy_(torch.from_numpy(rng.normal(size=(1, k, d)).astype(np.float32)))
    module.embed_avg.data.copy_(module.embed)
    state = EMAState.start(read(module)[0], DIALECT)
    off = {"codebook": 0.0, "ema_count": 0.0}
    replaced = 0
    for _ in range(100):
        latents = rng.normal(size=(32, 4, d)).astype(np.float32)
        before = read(module)[0]
        indices = module(torch.from_numpy(latents))[1].numpy()
        check_indices(indices, latents, before, precision="float32", form="expanded root").require()
        state = vqref.update_ema(state, latents, indices, 0.99, module.eps, DIALECT)
        dead = np.flatnonzero(state.ema_count < dead_below)
        if len(dead):
            rows = read(module)[0][dead]
            assert all((row == latents.reshape(-1, d)).all(axis=1).any() for row in rows)
            # its means are rows times the count: a reset without epsilon, not smoothed
            counts = np.full(len(dead), float(dead_below))
            state = vqref.reset_codes(state, dead, rows, counts, 0.99, epsilon=0.0, dialect=POST)
            replaced += len(dead)
        codebook, count, _ = read(module)
        off["codebook"] = max(
            off["codebook"], np.abs(codebook - state.codebook).max() / np.abs(state.codebook).max()
        )
        off["ema_count"] = max(
            off["ema_count"], np.abs(count - state.ema_count).max() / state.ema_count.max()
        )
    print(f"dead below {dead_below}, {replaced} replaced; deviation over magnitude: {off}")
    assert bool(replaced) == bool(dead_below)
    assert off["codebook"] <= 1e-5
    assert off["ema_count"] <= 1e-5


@pytest.mark.parametrize("options", [{}, {**CARE, "threshold_ema_dead_code": 2}], ids=str)
def test_the_library_without_one_hot_matrices_is_the_library(options):
    """Compares five training steps: quantized, indices, commitment and gradients, then the buffers.

    Each side continues from its own state, with the same random choices.
    """
    rng, found = np.random.default_rng(0), []
    steps = [rng.normal(size=(8, 64, 8)).astype(np.float32) for _ in range(5)]
    for plain in (True, False):
        torch.manual_seed(0)
        module = library.VectorQuantize(dim=8, codebook_size=100, **options).train()
        if not plain:
            module._codebook.forward = partial(without_one_hot, module._codebook)
        answers = []
        for latents in steps:
            x = torch.from_numpy(latents).requires_grad_()
            quantized, indices, commitment = module(x)
            (quantized.square().sum() + commitment.sum()).backward()
            answers += [quantized.detach(), indices, commitment.detach(), x.grad]
        found.append([*(each.numpy() for each in answers), *read(module._codebook)])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
