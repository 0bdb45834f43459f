"""Tokens proved in advance: the bound holds under every perturbation and every order of summation
that can be thought of, is near what the worst one does, and is refuted where the machine computes
in another arithmetic than it says."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import small_model

import vqref
from vqdeploy.graphs.build import GraphOptions, build_graph
from vqdeploy.runtime.sessions import open_sessions
from vqref import families
from vqref.agreement import advance
from vqref.agreement.advance import ARITHMETICS, enclose, prove, reach
from vqref.network import ACTIVATIONS, KINDS, before_activation, weights_of
from vqref.spec import CODEBOOK, Layer, plan
from vqtrain import VQVAE

SIZES = {"hidden": 12, "blocks": 1, "block_hidden": 6, "num_codes": 64, "code_size": 4}


def with_silu(spec):
    rows = tuple(
        dataclasses.replace(row, activation="silu") if row.activation == "relu" else row
        for row in spec.encoder
    )
    return dataclasses.replace(spec, encoder=rows)


SPECS = {
    "post": families.post((1, 12, 12), 4, 2, 32, 4),
    "residual": families.residual((3, 16, 16), **SIZES),
    "two at a place": families.residual((1, 16, 16), **{**SIZES, "depth": 2}),
    "silu": with_silu(families.residual((3, 16, 16), **SIZES)),
}


@pytest.fixture(params=SPECS, scope="module")
def case(request):
    """A spec, its parameters and images."""
    spec = SPECS[request.param]
    images = np.random.default_rng(0).random((4, *spec.image_shape)).astype(np.float32)
    return spec, small_model(spec).params, images


def moved(spec, params, image, wrong):
    """Latents (S, D) of a network whose rows are off: ``wrong(number, z)`` is what a row gets wrong
    before its activation, and what that adds."""
    values, weights = {0: image[None].astype(np.float64)}, weights_of(spec.encoder, params)
    for number, step in enumerate(plan(spec.encoder), 1):
        z = before_activation(step, values, weights)
        before, after = wrong(number, z[0])
        values[number] = ACTIVATIONS[step.layer.activation].value(z + before) + after
    return values[number][0]


def rounding(found, number, z, name):
    """What an activation's own result is off by, at most."""
    activation = found.steps[number - 1].layer.activation
    return advance._rounding(activation, z, np.zeros_like(z), ARITHMETICS[name])


@pytest.mark.parametrize("name", ["float32", "pairwise", "tf32"])
def test_no_perturbation_moves_a_latent_beyond_the_bound(case, name):
    spec, params, images = case
    rng = np.random.default_rng(1)
    for image in images[:2]:
        found = enclose(spec, params, image[None].astype(np.float64), ARITHMETICS[name])
        for trial in range(20):
            how = rng.choice([-1, 1]) if trial < 2 else None

            def wrong(number, z, found=found, how=how):
                share = rng.uniform(-1, 1, z.shape) if how is None else how
                return share * found.errors[number], share * rounding(found, number, z, name)

            off = moved(spec, params, image, wrong) - found.latents
            assert (np.abs(off) <= found.radius[-1]).all()
            directions = rng.normal(size=(len(off), spec.code_size))
            bounds = reach(found, np.arange(len(off)), directions, np.full(len(off), -np.inf))
            assert (np.abs((off * directions).sum(axis=1)) <= bounds).all()
            assert np.abs(off).max() > 0


def worst(spec, params, found, token, direction):
    """The signs of every row's error that push the latent of a token furthest in a direction."""
    values, weights = [v[None] for v in found.values], found.weights
    last = len(found.steps)
    gradients = {last: np.zeros_like(values[last])}
    gradients[last][0, token] = direction
    signs = {}
    for number, step in reversed([*enumerate(found.steps, 1)]):
        if number not in gradients:
            continue
        after = gradients.pop(number)
        g = after * found.slopes[number]
        signs[number] = np.sign(g[0]), np.sign(after[0])
        taken = [values[i] for i in step.sources]
        pulled = KINDS[step.layer.kind].backward(step.layer, g, *taken, *weights[step.layer.name])
        for source, each in zip(step.sources, pulled, strict=True):
            gradients[source] = gradients.get(source, 0) + each
    return signs


def require_near(spec, params, images):
    """The worst perturbation of all rows at once comes near the bound, and never above."""
    rng, ratios = np.random.default_rng(2), []
    for image in images:
        found = enclose(spec, params, image[None].astype(np.float64), ARITHMETICS["pairwise"])
        for token in rng.choice(spec.latent_size, 2, replace=False):
            direction = rng.normal(size=spec.code_size)
            (bound,) = reach(found, np.array([token]), direction[None], np.array([-np.inf]))
            signs = worst(spec, params, found, token, direction)

            def wrong(number, z, found=found, signs=signs):
                sizes = found.errors[number], rounding(found, number, z, "pairwise")
                return tuple(a * b for a, b in zip(sizes, signs[number], strict=True))

            off = moved(spec, params, image, wrong) - found.latents
            ratios.append(float(off[token] @ direction) / bound)
    assert max(ratios) <= 1
    assert np.median(ratios) >= 0.9


def test_the_worst_perturbation_of_all_rows_at_once_comes_near_the_bound(case):
    require_near(*case)


def test_a_bound_that_is_too_small_by_a_quarter_is_refuted(case, monkeypatch):
    monkeypatch.setattr(
        advance, "_weighed", lambda g, array, weigh=advance._weighed: 0.75 * weigh(g, array)
    )
    with pytest.raises(AssertionError):
        require_near(*case)


def test_windows_of_a_grid_give_what_the_whole_gradient_gives(case, monkeypatch):
    spec, params, images = case
    rng = np.random.default_rng(3)
    found = enclose(spec, params, images[:1].astype(np.float64), ARITHMETICS["float32"])
    tokens = np.arange(spec.latent_size)
    directions = rng.normal(size=(spec.latent_size, spec.code_size))
    room = np.full(len(tokens), -np.inf)
    windows = reach(found, tokens, directions, room)
    monkeypatch.setattr(advance, "_to_places", lambda layer, g: advance._Window(
        KINDS[layer.kind].backward(layer, g.values, np.empty((len(g.values), *layer.in_shape)))[0],
        None,
    ))  # fmt: skip
    whole = reach(found, tokens, directions, room)
    np.testing.assert_allclose(windows, whole, rtol=1e-12)


def test_what_is_dropped_early_is_proved_by_the_whole_way_too(case):
    spec, params, images = case
    rng = np.random.default_rng(4)
    found = enclose(spec, params, images[:1].astype(np.float64), ARITHMETICS["float32"])
    tokens = np.arange(spec.latent_size)
    directions = rng.normal(size=(spec.latent_size, spec.code_size))
    exact = reach(found, tokens, directions, np.full(len(tokens), -np.inf))
    for factor in (0.9, 1.1, 3.0, 100.0):
        early = reach(found, tokens, directions, factor * exact)
        assert (early >= exact * (1 - 1e-12)).all()
        assert ((early < factor * exact) == (factor > 1)).all()


def sums(terms, order, rng):
    """float32 sums along the last axis, in an order."""
    terms = terms.astype(np.float32)
    if order == "backwards":
        terms = terms[..., ::-1]
    if order == "tree":
        terms = terms[..., rng.permutation(terms.shape[-1])]
        while terms.shape[-1] > 1:
            if terms.shape[-1] % 2:
                terms = np.concatenate([terms, np.zeros_like(terms[..., :1])], axis=-1)
            terms = terms[..., 0::2] + terms[..., 1::2]
        return terms[..., 0]
    return np.add.accumulate(terms, axis=-1, dtype=np.float32)[..., -1]


def in_float32(spec, params, images, order="forwards", cut=lambda factor: factor, seed=0):
    """Tokens of a network in float32: every sum of products in an order, factors cut before."""
    rng = np.random.default_rng(seed)
    values = {0: images.astype(np.float32)}
    for number, step in enumerate(plan(spec.encoder), 1):
        layer, x = step.layer, [values[i] for i in step.sources]
        weights = [np.asarray(params[name], np.float32) for name, _ in layer.parameters]
        if layer.kind == "conv":
            padded = np.pad(cut(x[0]), ((0, 0), (0, 0), *layer.pads))
            view = np.lib.stride_tricks.sliding_window_view(padded, layer.kernel, axis=(2, 3))
            view = view[:, :, :: layer.stride, :: layer.stride].transpose(0, 2, 3, 1, 4, 5)
            flat = view.reshape(*view.shape[:3], 1, -1)
            terms = flat * cut(weights[0]).reshape(len(weights[0]), -1)
            y = (sums(terms, order, rng) + weights[1]).transpose(0, 3, 1, 2)
        elif layer.kind == "dense":
            y = sums(cut(x[0])[:, None] * cut(weights[0]), order, rng) + weights[1]
        else:
            y = KINDS[layer.kind].value(layer, *x).astype(np.float32)
        if layer.activation == "elu":
            y = np.where(y > 0, y, np.exp(np.minimum(y, np.float32(0))) - np.float32(1))
        elif layer.activation == "silu":
            y = y / (np.float32(1) + np.exp(-y))
        elif layer.activation == "relu":
            y = np.maximum(y, np.float32(0))
        values[number] = y
        assert y.dtype == np.float32
    difference = values[number][:, :, None] - np.asarray(params[CODEBOOK], np.float32)
    return sums(np.square(difference), order, rng).argmin(axis=-1)


def test_proved_tokens_are_the_same_in_whatever_order_float32_adds(case):
    spec, params, images = case
    found = prove(spec, params, images)
    np.testing.assert_array_equal(found.indices, vqref.forward(spec, params, images).indices)
    assert 0.3 < found.proved.mean() <= 1
    for seed, order in enumerate(("forwards", "backwards", "tree", "tree")):
        tokens = in_float32(spec, params, images, order, seed=seed)
        assert (tokens == found.indices)[found.proved].all()


def test_proved_tokens_are_those_of_pytorch_and_onnxruntime(case):
    spec, params, images = case
    proved, indices = prove(spec, params, images).proved, prove(spec, params, images).indices
    with torch.no_grad():
        module = VQVAE(spec, params)
        tokens = module.quantizer(module.encoder(torch.from_numpy(images)))[0].numpy()
    assert (tokens == indices)[proved].all()
    graph = {"tokenizer": build_graph("tokenizer", spec, params, GraphOptions())}
    sessions, _ = open_sessions(graph, spec, "cpu")
    assert (sessions["tokenizer"](images)[0] == indices)[proved].all()


def cut_to(bits):
    """Factors without all but ``bits`` of the bits after the point."""

    def cut(factor):
        mask = np.uint32((0xFFFFFFFF << (23 - bits)) & 0xFFFFFFFF)
        return (np.ascontiguousarray(factor).view(np.uint32) & mask).view(np.float32)

    return cut


def test_a_machine_of_another_arithmetic_is_refuted_by_the_tokens_that_it_changes():
    """bfloat16 cuts factors to 7 bits. Of the tokens proved for float32 some differ, of those
    proved for bfloat16 none."""
    spec = SPECS["residual"]
    params = small_model(spec).params
    images = np.random.default_rng(5).random((40, *spec.image_shape)).astype(np.float32)
    tokens = in_float32(spec, params, images, cut=cut_to(7))
    single, own = (prove(spec, params, images, name) for name in ("float32", "bfloat16"))
    assert (tokens != single.indices)[single.proved].any()
    assert (tokens == own.indices)[own.proved].all()
    assert own.proved.sum() <= single.proved.sum()


def test_a_narrower_arithmetic_proves_no_less(case):
    spec, params, images = case
    found = {name: prove(spec, params, images, name) for name in ARITHMETICS}
    for wide, narrow in (
        ("float32", "lanes"), ("float32", "pairwise"), ("winograd", "float32"),
        ("tf32", "float32"), ("float16", "float32"), ("bfloat16", "tf32"),
    ):  # fmt: skip
        assert (found[narrow].proved | ~found[wide].proved).all(), (wide, narrow)
        assert (found[narrow].moved <= found[wide].moved).all(), (wide, narrow)


def test_rivals_are_codes_that_come_near(case):
    spec, params, images = case
    found = prove(spec, params, images)
    assert (found.rivals != found.indices).all()
    assert (found.proved == (found.excess > 0)).all()
    latents = vqref.encode(spec, params, images)
    codebook = params[CODEBOOK].astype(np.float64)
    gap = [
        np.square(latents - codebook[found.rivals]).sum(-1)
        - np.square(latents - codebook[found.indices]).sum(-1)
    ]
    assert (gap >= found.excess).all()


def test_a_single_code_is_always_proved():
    spec = families.residual((3, 8, 8), **{**SIZES, "num_codes": 1})
    images = np.random.default_rng(6).random((2, 3, 8, 8))
    found = prove(spec, small_model(spec).params, images)
    assert found.proved.all()
    assert (found.rivals == 0).all()


def test_no_images_have_no_tokens():
    spec = SPECS["post"]
    found = prove(spec, small_model(spec).params, np.empty((0, *spec.image_shape)))
    assert found.proved.shape == found.indices.shape == (0, spec.latent_size)


def test_an_unknown_arithmetic_is_refused():
    spec = SPECS["post"]
    with pytest.raises(ValueError, match="arithmetic is 'exact', expected float32, lanes"):
        prove(spec, small_model(spec).params, np.zeros((1, *spec.image_shape)), "exact")


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "linear"])
@given(z=st.floats(-5, 5), wide=st.floats(1e-8, 3), share=st.floats(-1, 1))
@settings(max_examples=300)
def test_what_an_activation_adds_to_its_tangent_is_within_the_remainder(name, z, wide, share):
    kind, at = ACTIVATIONS[name], np.array([z])
    delta = share * wide
    exact = kind.value(at + delta) - kind.value(at) - kind.slope(at) * delta
    assert np.abs(exact) <= advance._remainder(name, at, np.array([wide])) * (1 + 1e-9) + 1e-15


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_winograds_algorithm_stays_within_its_bound(seed):
    """F(4x4, 3x3) in float32 against the convolution in float64."""
    rng = np.random.default_rng(seed)
    scale = 10 ** rng.uniform(-2, 2)
    d = (scale * rng.normal(size=(3, 6, 6))).astype(np.float32)
    g = rng.normal(size=(2, 3, 3, 3)).astype(np.float32)
    data, of_weights, result = (
        np.array(m, np.float32)
        for m in (advance.WINOGRAD_DATA, advance.WINOGRAD_WEIGHTS, advance.WINOGRAD_RESULT)
    )
    u = np.einsum("ia,ocab,jb->ocij", of_weights, g, of_weights, dtype=np.float32)
    v = np.einsum("ia,cab,jb->cij", data, d, data, dtype=np.float32)
    found = np.einsum("ia,oab,jb->oij", result, (u * v).sum(axis=1), result, dtype=np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(d.astype(np.float64), (3, 3), axis=(1, 2))
    exact = np.einsum("cijab,ocab->oij", windows, g)
    row = Layer("x", "conv", (3, 6, 6), (2, 4, 4), kernel=(3, 3))
    bound = advance._winograd(row, np.abs(d)[None].astype(float), np.abs(g), np.zeros(2))[0]
    assert (np.abs(found - exact) <= bound).all()
    assert (bound > np.abs(exact).max() * 1e-7).all()
