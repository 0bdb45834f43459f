"""The nearest code at any size: products answer as the direct form does, and memory stays flat.

Hard cases and ties are included. Draws need no noise for all latents and codes at once.
"""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vqref
import vqtrain.nearest as search
from vqref.agreement.parity import check_indices
from vqref.checks.adversary import CASES
from vqref.checks.checks import check_quantizer
from vqtrain.nearest import by_products, directly, nearest, takes_products
from vqtrain.quantizer import draw


def case(name, n=600, k=83, d=7, precision="float32", seed=0):
    latents, codebook = CASES[name](np.random.default_rng(seed), n, k, d, precision)
    return torch.from_numpy(latents[:, 0]), torch.from_numpy(codebook)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_products_answer_as_the_direct_form_does(name, precision):
    latents, codebook = case(name, precision=precision)
    found = by_products(latents, codebook)
    assert (found.shape, found.dtype) == ((600,), torch.int64)
    assert torch.equal(found, directly(latents, codebook))
    check_indices(
        found[:, None].numpy(), latents[:, None].numpy(), codebook.numpy(), precision=precision
    ).require()


@settings(deadline=None)
@given(
    n=st.integers(0, 40),
    k=st.integers(1, 70),
    d=st.integers(1, 20),
    copies=st.integers(1, 3),
    seed=st.integers(0, 999),
)
def test_any_size_gives_the_first_of_equal_codes(n, k, d, copies, seed):
    rng = np.random.default_rng(seed)
    codebook = np.tile(rng.normal(size=(k, d)), (copies, 1)).astype(np.float32)
    latents = np.concatenate(
        [rng.normal(size=(n, d)), codebook[rng.integers(0, len(codebook), n)]]
    ).astype(np.float32)
    found = by_products(torch.from_numpy(latents), torch.from_numpy(codebook))
    assert torch.equal(found, directly(torch.from_numpy(latents), torch.from_numpy(codebook)))
    assert not n or found.max() < k


def test_products_pass_the_kit():
    def quantize(latents, codebook):
        rows = torch.from_numpy(latents).reshape(-1, latents.shape[-1])
        return by_products(rows, torch.from_numpy(codebook)).reshape(latents.shape[:-1]).numpy()

    check_quantizer(quantize)


def test_a_value_that_is_not_a_number_gives_what_the_direct_form_gives():
    latents, codebook = case("ordinary")
    latents[3, 2], latents[4, 0], latents[5] = torch.nan, torch.inf, 3e38
    assert torch.equal(by_products(latents, codebook), directly(latents, codebook))


def test_without_its_margin_the_product_alone_is_wrong(monkeypatch):
    """The margin is for norms that are large beside the distances: there, the product cancels."""
    latents, codebook = case("bisector", k=128)
    codebook, latents = codebook + 300, latents + 300
    monkeypatch.setattr(search, "margin", lambda latents, longest: torch.zeros_like(latents[:, :1]))
    found = by_products(latents, codebook)[:, None].numpy()
    assert not check_indices(
        found, latents[:, None].numpy(), codebook.numpy(), precision="float32"
    ).passed
    monkeypatch.undo()
    found = by_products(latents, codebook)[:, None].numpy()
    check_indices(found, latents[:, None].numpy(), codebook.numpy(), precision="float32").require()


def test_pieces_answer_as_the_whole_does(monkeypatch):
    latents, codebook = case("duplicates", n=50)
    whole = directly(latents, codebook)
    assert torch.equal(
        whole[:, None],
        torch.from_numpy(vqref.quantize(latents[:, None].numpy(), codebook.numpy()).indices),
    )
    monkeypatch.setattr(search, "PROCESSOR_BYTES", 1)
    monkeypatch.setattr(search, "TILE", 2)
    assert torch.equal(directly(latents, codebook), whole)
    assert torch.equal(by_products(latents, codebook), whole)


def test_autocast_does_not_reach_the_products():
    latents, codebook = torch.randn(400, 64), torch.randn(1000, 64)
    assert takes_products(latents, codebook)
    with torch.autocast("cpu", torch.bfloat16):
        found = nearest(latents[:, None], codebook)
    assert torch.equal(found[:, 0], directly(latents, codebook))


def test_what_products_cannot_bound_or_hasten_takes_the_direct_form():
    assert takes_products(torch.zeros(4096, 8), torch.zeros(4096, 8))
    assert not takes_products(torch.zeros(65_536, 64), torch.zeros(64, 64))
    assert not takes_products(torch.zeros(4, 8), torch.zeros(4096, 8))
    assert not takes_products(torch.zeros(4096, 8).bfloat16(), torch.zeros(4096, 8).bfloat16())


def test_a_product_that_may_be_rounded_has_a_wider_margin_or_is_not_made(monkeypatch):
    latents, codebook = torch.randn(4096, 8), torch.randn(4096, 8)
    usual = search.margin(latents, codebook.norm(dim=1).max())
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert (search.margin(latents, codebook.norm(dim=1).max()) > 100 * usual).all()
    assert torch.equal(by_products(latents, codebook), directly(latents, codebook))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert not takes_products(latents, codebook)


@pytest.mark.parametrize("pieces", [True, False])
def test_a_draw_by_a_seed_follows_the_softmax_of_distances(pieces, monkeypatch):
    """Draws for 20,000 latents at one place, in one piece or in pieces with their own noise."""
    if pieces:
        monkeypatch.setattr(search, "PROCESSOR_BYTES", 4 * 3 * 2 * 100)  # 100 latents at a time
    codebook = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
    latents = torch.tensor([0.4, 0.1]).expand(20_000, 1, 2)
    found = draw(latents, codebook, 5, 0.5)
    assert (found.shape, found.dtype) == ((20_000, 1), torch.int64)
    distances = np.square(latents[0].numpy() - codebook.numpy()).sum(axis=1)
    weights = np.exp(-distances / (2 * 0.5 * distances.min() / 2))
    shares = np.bincount(found.numpy().ravel(), minlength=3) / 20_000
    np.testing.assert_allclose(shares, weights / weights.sum(), atol=0.01)
    assert torch.equal(found, draw(latents, codebook, 5, 0.5))
    assert not torch.equal(found, draw(latents, codebook, 6, 0.5))
    assert not torch.equal(found[:100], found[100:200])


def test_noise_in_an_array_is_drawn_with_in_any_pieces(monkeypatch):
    rng = np.random.default_rng(0)
    arrays = rng.normal(size=(30, 2, 4)), rng.normal(size=(9, 4)), rng.gumbel(size=(30, 2, 9))
    latents, codebook, gumbel = (torch.from_numpy(array) for array in arrays)
    whole = draw(latents, codebook, gumbel, 0.3)
    monkeypatch.setattr(search, "PROCESSOR_BYTES", 1)
    assert torch.equal(draw(latents, codebook, gumbel, 0.3), whole)
    np.testing.assert_array_equal(whole.numpy(), vqref.draw_indices(*arrays, 0.3))


MEMORY = """
import resource, torch
from vqtrain.nearest import nearest
from vqtrain.quantizer import update_ema
codebook = torch.randn(4096, 16)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def step(n):
    latents = torch.randn(n, 1, 16)
    before = peak()
    indices = nearest(latents, codebook)
    update_ema(codebook, torch.ones(4096), codebook, latents, indices, 0.99, 1e-5)
    return peak() - before
step(4096)
print(step(131072))
"""
DRAWN = """
import resource, torch
from vqtrain.quantizer import draw
codebook, latents = torch.randn(4096, 2), torch.randn(16, 1024, 2)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
draw(latents[:1, :64], codebook, 0, 0.3)
before = peak()
draw(latents, codebook, 0, 0.3)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the resource module is POSIX's")
def test_memory_does_not_grow_with_latents_times_codes():
    """With 131,072 latents and 4,096 codes, all scores would take 2 GiB, all differences 32 GiB."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 64 * 1024  # KiB


@pytest.mark.skipif(sys.platform == "win32", reason="the resource module is POSIX's")
def test_a_draw_by_a_seed_makes_no_array_of_all_latents_and_codes():
    """For 16 images of 1,024 latents and 4,096 codes, noise and distances take 256 MiB each."""
    done = subprocess.run([sys.executable, "-c", DRAWN], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64 * 1024  # KiB
