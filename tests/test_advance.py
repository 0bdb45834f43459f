"""Tokens proved in advance: the bound holds, is tight, and is refuted on other arithmetics.

It holds under every perturbation and order of summation that these tests can think of. It is near
what the worst perturbation does. It is refuted if a machine computes in another arithmetic than it
claims.
"""

import dataclasses
import math
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import VQGAN, small_model

import vqref
from benchmarks.advance import (
    Machine,
    activation_of,
    cut_to_tf32,
    in_float32,
    latents_in_float32,
    moved,
    refuted,
    share_of_bound,
    sums,
    to_bfloat16,
    to_float16,
)
from vqdeploy.graphs.build import GraphOptions, build_graph
from vqdeploy.proof.advance import provable
from vqdeploy.runtime.sessions import open_sessions
from vqref import families
from vqref.agreement import advance, arithmetics, enclosure, pulled
from vqref.agreement.advance import prove
from vqref.agreement.arithmetics import ARITHMETICS, UNBOUNDED
from vqref.agreement.budget import seconds_per_proof
from vqref.agreement.enclosure import Network, enclose, norm
from vqref.agreement.pulled import reach
from vqref.network import ACTIVATIONS, KINDS
from vqref.spec import CODEBOOK, Layer, plan
from vqtrain import VQVAE

SIZES: dict[str, Any] = {
    "hidden": 12,
    "blocks": 1,
    "block_hidden": 6,
    "num_codes": 64,
    "code_size": 4,
}


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


def looks(spec, params, image, name):
    """Returns what is known of an image at each look. The last one is made even if not needed."""
    network, codebook = Network(spec, params, ARITHMETICS[name]), params[CODEBOOK].astype(float)
    image = image.astype(np.float64)
    found = [enclose(network, image, closely=False), enclose(network, image)]
    proof = advance._looked(found[1], codebook)
    proof = proof._replace(proved=proof.proved & False)
    sharper = advance._sharpened(network, found[1], proof, codebook)
    return found if sharper is None else [*found, sharper]


def require_within(bounds, off):
    assert (np.abs(off) <= bounds.radius).all()
    assert (pulled.lengths(off) <= bounds.places * (1 + 1e-6)).all()
    assert pulled.length(off) <= bounds.whole * (1 + 1e-6)


@pytest.mark.parametrize("name", ["float32", "pairwise", "winograd", "tf32", "bfloat16"])
def test_no_perturbation_moves_a_value_beyond_the_bounds(case, name):
    """Checks each row before and after its activation, and latents in any direction."""
    spec, params, images = case
    rng = np.random.default_rng(1)
    for found in looks(spec, params, images[0], name):
        for trial in range(10):
            how = rng.choice([-1, 1]) if trial < 2 else None

            def wrong(number, row, found=found, how=how):
                each = activation_of(found, number, ARITHMETICS[name])
                shares = rng.uniform(-1, 1, row.z.shape) if how is None else how
                rho = np.zeros(()) if row.inputs is None else row.inputs
                of_inputs = rng.uniform(-1, 1, rho.shape) if how is None else how
                return of_inputs * rho, shares * row.error, shares * each

            every = moved(found, wrong)
            for row, (before, after) in zip(found.rows[1:], every[1:], strict=True):
                require_within(row.before, before)
                require_within(row.off, after)
            off = every[-1][1]
            directions = rng.normal(size=(len(off), spec.code_size))
            bounds = reach(found, np.arange(len(off)), directions, np.full(len(off), -np.inf))
            assert (np.abs((off * directions).sum(axis=1)) <= bounds).all()
            assert np.abs(off).max() > 0


@given(
    seed=st.integers(0, 2**32 - 1),
    activation=st.sampled_from([*ACTIVATIONS]),
    name=st.sampled_from(["float32", "tf32", "float16", "bfloat16"]),
    grid=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_no_machine_of_rounded_factors_leaves_the_bounds(seed, activation, name, grid):
    """In random networks, weights and inputs of each row are cut, rounded or kept, at random."""
    rng = np.random.default_rng(seed)
    spec = families.residual((1, 8, 8), **SIZES) if grid else families.post((1, 8, 8), 3, 1, 9, 4)
    rows = tuple(
        row if row.activation == "linear" else dataclasses.replace(row, activation=activation)
        for row in spec.encoder
    )
    spec = dataclasses.replace(spec, encoder=rows)
    params = {
        key: (each * np.float32(rng.uniform(0.5, 2))).astype(np.float32)
        for key, each in small_model(spec, seed).params.items()
    }
    image = rng.random((1, 1, 8, 8)).astype(np.float32)
    known = {"tf32": [cut_to_tf32, to_tf32], "float16": [to_float16], "bfloat16": [to_bfloat16]}
    ways = [lambda factor: factor, *known.get(name, [])]
    found = looks(spec, params, image[0], name)
    tokens = np.arange(spec.latent_size)
    directions = rng.normal(size=(len(tokens), spec.code_size))
    far = np.full(len(tokens), -np.inf)
    bounds = [reach(each, tokens, directions, far) for each in found]

    def by_chance(factor):
        return ways[rng.integers(len(ways))](factor)

    for trial in range(4):
        latents = latents_in_float32(
            spec,
            params,
            image,
            ["forwards", "tree"][trial % 2],
            by_chance,
            seed,
        )[0]
        for each, bound in zip(found, bounds, strict=True):
            off = latents - each.latents
            require_within(each.rows[-1].off, off)
            assert (np.abs((off * directions).sum(axis=1)) <= bound).all()


def to_tf32(factor):
    """Rounds to nearest, ties away from zero."""
    bits = np.ascontiguousarray(factor, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


@pytest.mark.parametrize("name", ARITHMETICS)
def test_a_closer_look_proves_no_less(case, name):
    spec, params, images = case
    codebook = params[CODEBOOK].astype(np.float64)
    for image in images[:2]:
        found = [advance._looked(each, codebook) for each in looks(spec, params, image, name)]
        for wide, close in pairwise(found):
            assert (close.proved | ~wide.proved).all()
            assert (close.moved <= wide.moved).all()


def test_a_closer_look_proves_more():
    spec = SPECS["post"]
    model = small_model(spec)
    images = np.random.default_rng(9).random((20, *spec.image_shape)).astype(np.float32)
    codebook = model.params[CODEBOOK].astype(np.float64)
    network = Network(spec, model.params, ARITHMETICS["tf32"])
    first = [advance._looked(enclose(network, each, closely=False), codebook) for each in images]
    shares = [np.mean([each.proved for each in first])]
    shares.append(prove(spec, model.params, images, "tf32").proved.mean())
    assert shares[0] < shares[1]
    assert any(len(looks(spec, model.params, each, "tf32")) == 3 for each in images)


def test_the_tokens_are_the_exact_ones_whether_proved_or_not(case):
    spec, params, images = case
    exact = vqref.forward(spec, params, images).indices
    for name in ("tf32", "bfloat16"):
        found = prove(spec, params, images, name)
        np.testing.assert_array_equal(found.indices, exact)
        assert (found.rivals != exact).all()


def require_near(spec, params, images):
    """Requires that the worst perturbation of all rows at once is near the bound, never above."""
    rng = np.random.default_rng(2)
    ratios = [
        share_of_bound(spec, params, image, "pairwise", rng) for image in images for _ in range(2)
    ]
    assert max(ratios) <= 1
    assert np.median(ratios) >= 0.9


def test_the_worst_perturbation_of_all_rows_at_once_comes_near_the_bound(case):
    require_near(*case)


def test_a_bound_that_is_too_small_by_a_quarter_is_refuted(case, monkeypatch):
    monkeypatch.setattr(
        pulled, "_weighed", lambda g, array, weigh=pulled._weighed: 0.75 * weigh(g, array)
    )
    with pytest.raises(AssertionError):
        require_near(*case)


def test_windows_of_a_grid_give_what_the_whole_gradient_gives(case, monkeypatch):
    spec, params, images = case
    rng = np.random.default_rng(3)
    network = Network(spec, params, ARITHMETICS["float32"])
    found = enclose(network, images[0].astype(np.float64), closely=False)
    tokens = np.arange(spec.latent_size)
    directions = rng.normal(size=(spec.latent_size, spec.code_size))
    room = np.full(len(tokens), -np.inf)
    windows = reach(found, tokens, directions, room)
    monkeypatch.setattr(pulled, "_to_places", lambda layer, g: pulled.Window(
        KINDS[layer.kind].backward(layer, g.values, np.empty((len(g.values), *layer.in_shape)))[0],
        None,
    ))  # fmt: skip
    whole = reach(found, tokens, directions, room)
    np.testing.assert_allclose(windows, whole, rtol=1e-12)


def test_what_is_dropped_early_is_proved_by_the_whole_way_too(case):
    spec, params, images = case
    rng = np.random.default_rng(4)
    network = Network(spec, params, ARITHMETICS["float32"])
    found = enclose(network, images[0].astype(np.float64), closely=False)
    tokens = np.arange(spec.latent_size)
    directions = rng.normal(size=(spec.latent_size, spec.code_size))
    exact = reach(found, tokens, directions, np.full(len(tokens), -np.inf))
    for factor in (0.9, 1.1, 3.0, 100.0):
        early = reach(found, tokens, directions, factor * exact)
        assert (early >= exact * (1 - 1e-12)).all()
        assert ((early < factor * exact) == (factor > 1)).all()


def test_proved_tokens_are_the_same_in_whatever_order_float32_adds(case):
    spec, params, images = case
    found = prove(spec, params, images)
    np.testing.assert_array_equal(found.indices, vqref.forward(spec, params, images).indices)
    assert 0.3 < found.proved.mean() <= 1
    for seed, order in enumerate(("forwards", "backwards", "tree", "tree", "fused")):
        tokens = in_float32(spec, params, images, order, seed=seed)
        assert (tokens == found.indices)[found.proved].all()


def test_proved_tokens_are_those_of_pytorch_and_onnxruntime(case):
    spec, params, images = case
    indices, proved = prove(spec, params, images)[:2]
    with torch.no_grad():
        module = VQVAE(spec, params)
        tokens = module.quantizer(module.encoder(torch.from_numpy(images)))[0].numpy()
    assert (tokens == indices)[proved].all()
    graph = {"tokenizer": build_graph("tokenizer", spec, params, GraphOptions())}
    sessions, _ = open_sessions(graph, spec, "cpu")
    assert (sessions["tokenizer"](images)[0] == indices)[proved].all()


def test_a_machine_of_another_arithmetic_is_refuted_by_the_tokens_that_it_changes():
    """Some of the tokens proved for float32 differ; none of those proved for bfloat16 do."""
    spec = SPECS["residual"]
    params = small_model(spec).params
    images = np.random.default_rng(5).random((12, *spec.image_shape)).astype(np.float32)
    tokens = in_float32(spec, params, images, cut=to_bfloat16)
    single, own = (prove(spec, params, images, name) for name in ("float32", "bfloat16"))
    assert (tokens != single.indices)[single.proved].any()
    assert (tokens == own.indices)[own.proved].all()
    assert own.proved.sum() <= single.proved.sum()


def test_the_benchmark_finds_the_machine_that_differs():
    model = small_model(SPECS["residual"])
    images = np.random.default_rng(8).integers(0, 256, (8, *model.spec.image_shape), np.uint8)
    machines = {
        name: Machine(partial(in_float32, model.spec, model.params, cut=cut))
        for name, cut in (("right", lambda factor: factor), ("wrong", to_bfloat16))
    }

    def broken(images):
        raise ZeroDivisionError("by zero")

    machines["broken"] = Machine(broken)
    found, by_row, seen = refuted(model, images, machines, 1, 1)
    assert seen == 64
    assert found.keys() == {"right", "wrong"}
    assert found["right"].compared == found["wrong"].compared > 0
    assert found["right"].differing == by_row["wrong"]["bfloat16"].differing == 0
    assert found["wrong"].differing == by_row["wrong"]["float32"].differing > 0


def test_a_narrower_arithmetic_proves_no_less(case):
    spec, params, images = case
    found = {name: prove(spec, params, images, name) for name in ARITHMETICS}
    known = {name: looks(spec, params, images[0], name)[:2] for name in ARITHMETICS}
    for wide, narrow in (
        ("float32", "lanes"), ("float32", "pairwise"), ("winograd", "float32"),
        ("tf32", "float32"), ("float16", "float32"), ("bfloat16", "tf32"),
    ):  # fmt: skip
        assert (found[narrow].proved | ~found[wide].proved).all(), (wide, narrow)
        for near, far in zip(known[narrow], known[wide], strict=True):
            assert (near.rows[-1].off.radius <= far.rows[-1].off.radius).all(), (wide, narrow)


def test_nothing_is_given_up_that_pulling_every_direction_all_the_way_would_prove(
    case, monkeypatch
):
    spec, params, images = case
    found = prove(spec, params, images)
    monkeypatch.setattr(
        advance,
        "_bounds",
        lambda found, tokens, directions, room: reach(
            found, tokens, directions, np.full(len(room), -np.inf)
        ),
    )
    np.testing.assert_array_equal(found.proved, prove(spec, params, images).proved)


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
    most = np.array([wide])
    assert np.abs(exact) <= arithmetics.remainder(name, at, most) * (1 + 1e-9) + 1e-14
    bend = arithmetics.curvature(name, at, most)
    assert np.abs(exact) <= bend * delta**2 * (1 + 1e-9) + 1e-14


@pytest.mark.parametrize("name", ["elu", "relu"])
@given(z=st.floats(-5, 5), wide=st.floats(0.1, 8))
@settings(max_examples=200)
def test_the_bend_of_an_activation_is_near_the_largest(name, z, wide):
    """It is within a factor of 2, unless an elu starts above 0. A relu has no bound at 0."""
    kind, at = ACTIVATIONS[name], np.array([z])
    delta = np.linspace(-wide, wide, 2001)
    exact = np.abs(kind.value(at + delta) - kind.value(at) - kind.slope(at) * delta)
    worst = (exact / np.square(np.where(delta == 0, np.inf, delta))).max()
    if z < -0.1 or (name == "relu" and z > 0.1):
        assert arithmetics.curvature(name, at, np.array([wide])) <= 2 * worst + 1e-9


@pytest.mark.parametrize("name", ["tf32", "float16", "bfloat16"])
@given(x=st.floats(width=32, allow_nan=False, allow_infinity=False), wide=st.floats(0, 2))
@settings(max_examples=400)
def test_rounded_factors_stay_within_their_bounds(name, x, wide):
    """Holds for known factors, and for unknown ones near a known factor."""
    factors = ARITHMETICS[name].factors
    ways = {"tf32": [cut_to_tf32, to_tf32], "float16": [to_float16], "bfloat16": [to_bfloat16]}
    if abs(x) >= factors.largest / 4:
        return
    at = np.array([x])
    radius = np.array([wide * abs(x)])
    (centre,), (own,) = factors.rounded(at)
    (moved_to,), (rho,) = factors.of_inputs(at, radius)
    for share in (-1, -0.9, -0.3, 0, 0.2, 0.7, 1):
        near = np.float32(x + share * radius[0] * (1 - 1e-6))
        off = float(near) - x
        if abs(off) > radius[0]:
            continue
        for way in [lambda factor: factor, *ways[name]]:
            found = float(way(np.array([near]))[0])
            for machine in (found, 0.0) if abs(near) < factors.tiny else (found,):
                assert abs(machine - (moved_to + off)) <= rho * (1 + 1e-9)
                if off == 0:
                    assert abs(machine - centre) <= own * (1 + 1e-9)


@given(
    seed=st.integers(0, 2**32 - 1),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.integers(1, 3),
    sides=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    pad=st.integers(0, 2),
)
@settings(max_examples=60, deadline=None)
def test_the_norm_of_a_convolution_is_bounded_and_nearly_reached(seed, kernel, stride, sides, pad):
    rng = np.random.default_rng(seed)
    channels, out = rng.integers(1, 4, 2)
    shape = tuple(stride * (n - 1) + k for n, k in zip(sides, kernel, strict=True))
    if min(shape) <= 2 * pad:
        pad = 0
    pads = ((pad, pad), (pad, pad))
    in_shape = (int(channels), shape[0] - 2 * pad, shape[1] - 2 * pad)
    row = Layer("x", "conv", in_shape, (int(out), *sides), kernel=kernel, stride=stride, pads=pads)
    weight = rng.normal(size=(out, channels, *kernel))
    each = np.eye(np.prod(in_shape)).reshape(-1, *in_shape)
    matrix = KINDS["conv"].value(row, each, weight, np.zeros(out)).reshape(len(each), -1)
    exact = np.linalg.norm(matrix, 2)
    assert exact <= norm(row, weight) * (1 + 1e-9)
    back = Layer(
        "x", "conv_transpose", row.out_shape, in_shape, kernel=kernel, stride=stride, pads=pads
    ) if stride <= 2 else None  # fmt: skip
    if back is not None:
        assert norm(back, weight) == norm(row, weight)


def test_the_norm_of_a_wide_convolution_is_nearly_reached():
    rng = np.random.default_rng(0)
    row = Layer("x", "conv", (2, 40, 40), (2, 40, 40), kernel=(3, 3), pads=((1, 1), (1, 1)))
    weight, x = rng.normal(size=(2, 2, 3, 3)), rng.normal(size=(1, 2, 40, 40))
    for _ in range(200):
        y = KINDS["conv"].value(row, x, weight, np.zeros(2))
        (x,) = KINDS["conv"].backward(row, y, x, weight, np.zeros(2))
        size, x = np.sqrt(np.linalg.norm(x)), x / np.linalg.norm(x)
    assert size <= norm(row, weight) <= 1.1 * size


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_winograds_algorithm_stays_within_its_bound(seed):
    """Compares F(4x4, 3x3) in float32 with the convolution in float64."""
    rng = np.random.default_rng(seed)
    scale = 10 ** rng.uniform(-2, 2)
    d = (scale * rng.normal(size=(3, 6, 6))).astype(np.float32)
    g = rng.normal(size=(2, 3, 3, 3)).astype(np.float32)
    data, of_weights, result = (
        np.array(m, np.float32)
        for m in (
            arithmetics.WINOGRAD_DATA,
            arithmetics.WINOGRAD_WEIGHTS,
            arithmetics.WINOGRAD_RESULT,
        )
    )
    u = np.einsum("ia,ocab,jb->ocij", of_weights, g, of_weights, dtype=np.float32)
    v = np.einsum("ia,cab,jb->cij", data, d, data, dtype=np.float32)
    found = np.einsum("ia,oab,jb->oij", result, (u * v).sum(axis=1), result, dtype=np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(d.astype(np.float64), (3, 3), axis=(1, 2))
    exact = np.einsum("cijab,ocab->oij", windows, g)
    row = Layer("x", "conv", (3, 6, 6), (2, 4, 4), kernel=(3, 3))
    bound = arithmetics._winograd(row, np.abs(d)[None].astype(float), np.abs(g), np.zeros(2))[0]
    assert (np.abs(found - exact) <= bound).all()
    assert (bound > np.abs(exact).max() * 1e-7).all()


def error_of_row(row, x, weight, bias, name="float32"):
    """Returns the bound on the error of a row with exact inputs, without the axis of images."""
    taken, weights = [(x[None], np.zeros_like(x)[None])], [weight, bias]
    z = KINDS[row.kind].value(row, x[None], *weights)
    return arithmetics.local_error(row, ARITHMETICS[name], taken, weights, z, np.zeros_like(z))[0]


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 300), zeros=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_a_sum_in_any_order_stays_within_its_bound(seed, count, zeros):
    """Terms have both signs and many sizes.

    They are added forwards, backwards, largest first (all positive ones before the negative), and
    in random trees.
    """
    rng = np.random.default_rng(seed)
    x = rng.normal(size=count).astype(np.float32) * (rng.random(count) >= zeros)
    weight = (rng.normal(size=(1, count)) * 10 ** rng.uniform(-3, 3, count)).astype(np.float32)
    bias = rng.normal(size=1).astype(np.float32)
    exact = x.astype(np.float64) @ weight[0].astype(np.float64) + bias
    row, taken = Layer("x", "dense", (count,), (1,)), x.astype(np.float64)
    bound = error_of_row(row, taken, weight, bias)
    terms = np.append(x * weight[0], bias)
    for order, each in (
        ("forwards", terms), ("backwards", terms), ("forwards", np.sort(terms)[::-1]),
        ("tree", terms), ("tree", terms),
    ):  # fmt: skip
        assert np.abs(sums(each, order, rng) - exact) <= bound
    assert np.abs(sums(terms, "tree", rng) - exact) <= error_of_row(
        row, taken, weight, bias, "pairwise"
    )


def test_the_bound_on_a_sum_is_reached():
    """1 + u is 1, so the sum of 1, 200 times u, and -1 is 0."""
    count, u = 202, arithmetics.UNIT
    weight = np.array([[1.0, *[u] * (count - 2), -1.0]])
    row, x, none = Layer("x", "dense", (count,), (1,)), np.ones(count), np.zeros(1)
    error = np.abs(sums(weight[0], "forwards", None) - weight.sum())
    (bound,) = error_of_row(row, x, weight, none)
    assert error == 200 * u
    assert 0.95 * bound < error <= bound


def test_an_addition_may_go_into_the_sum_of_the_row_before():
    """onnxruntime's convolutions start their sum from the other input of a residual addition."""
    count, u = 100, arithmetics.UNIT
    weight, other = np.full((1, count), u), np.ones((1, 1))
    row, add = Layer("x", "dense", (count,), (1,)), Layer("y", "add", (1,), (1,), ("a", "x"))
    (of_row,) = error_of_row(row, np.ones(count), weight, np.zeros(1))
    z = np.full((1, 1), count * u)
    taken = [(other, np.zeros((1, 1))), (z, np.zeros((1, 1)))]
    error = np.abs(sums(np.append(other, weight), "forwards", None) - (1 + z[0, 0]))
    for merged, covered in (((0, arithmetics.products(row)), True), ((0, 0), False)):
        bound = arithmetics.local_error(
            add, ARITHMETICS["float32"], taken, [], other + z, np.zeros((1, 1)), merged
        )
        assert (error <= of_row + bound[0, 0]) == covered
    spec = SPECS["residual"]
    steps = plan(spec.encoder)
    sum_row = next(step for step in steps if step.layer.kind == "add")
    assert [enclosure._merged(steps, i) for i in sum_row.sources] == [0, SIZES["block_hidden"]]


@pytest.mark.parametrize(
    ("name", "machine"),
    [
        ("elu", torch.nn.functional.elu),
        ("silu", torch.nn.functional.silu),
        ("gelu", lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
    ],
)
def test_activations_of_pytorch_stay_within_their_bound(name, machine):
    """Tries a million numbers from -104 to 104, of every size."""
    bits = np.arange(0, np.float32(104).view(np.uint32), 2200, dtype=np.uint32)
    x = np.concatenate([bits, bits | np.uint32(1 << 31)]).view(np.float32)
    z = x.astype(np.float64)
    bound = arithmetics.activation_error(name, z, np.zeros_like(z), ARITHMETICS["float32"])
    off = np.abs(machine(torch.from_numpy(x)).numpy() - ACTIVATIONS[name].value(z))
    assert (off <= bound).all()
    assert not (off <= bound / 10).all()


def test_what_has_no_bound_is_not_proved_and_raises_no_warning(case):
    """Tries sums beyond float32's range, and errors that grow beyond it."""
    spec, params, images = case
    huge = {name: each * np.float32(1e8) for name, each in params.items()}
    for name in ("float32", "float16"):
        assert not prove(spec, {**huge, CODEBOOK: params[CODEBOOK]}, images, name).proved.any()


def with_rows(spec, *more):
    """Returns a spec whose encoder ends with more rows, all of the latents' shape."""
    return dataclasses.replace(spec, encoder=(*spec.encoder, *more))


def test_behind_rows_without_a_bound_nothing_is_proved():
    spec = SPECS["residual"]
    shape = (spec.latent_size, spec.code_size)
    norm = Layer("encoder.norm", "layer_norm", shape, shape)
    seen = Layer("encoder.seen", "attention", shape, shape, ("encoder.norm",) * 3)
    images = np.random.default_rng(7).random((2, *spec.image_shape))
    unit = Layer("encoder.unit", "unit_norm", shape, shape)
    cases = [with_rows(spec, *more) for more in ((norm,), (norm, seen), (unit,))]
    cases.append(families.residual((3, 8, 8), 8, 1, 4, num_codes=60, code_size=3, levels=(5, 4, 3)))
    for each in (*cases, families.vqgan((3, 8, 8), **VQGAN)):
        params = small_model(each).params
        images = np.random.default_rng(7).random((2, *each.image_shape)).astype(np.float32)
        proof = prove(each, params, images)
        known = vqref.forward(each, params, images)
        assert not proof.proved.any()
        np.testing.assert_array_equal(proof.indices, known.indices)
        rivals = params[CODEBOOK].astype(np.float64)[proof.rivals]
        own = known.quantized
        further = [np.square(known.latents - codes).sum(axis=2) for codes in (rivals, own)]
        np.testing.assert_allclose(further[0] - further[1], known.gap, rtol=1e-9, atol=1e-12)
        assert np.isneginf(proof.excess).all()
        assert np.isposinf(proof.moved).all()


def test_every_kind_is_enclosed_or_known_not_to_be():
    """Enclosed kinds are rows of the networks above; a new kind has no bound until it is there."""
    enclosed = {"affine", "conv", "conv_transpose", "dense", "reshape", "to_vectors", "to_grid"}
    assert set(KINDS) - UNBOUNDED == enclosed | {"add", "activation"}
    assert math.isinf(seconds_per_proof(families.vqgan()))
    assert provable(families.vqgan(), 100, 100) == provable(families.vqgan(), 100, 0) == 0


@pytest.mark.parametrize("name", ARITHMETICS)
def test_dense_rows_of_several_vectors_are_enclosed(name):
    spec = SPECS["residual"]
    shape = (spec.latent_size, spec.code_size)
    longer = with_rows(spec, Layer("encoder.mixed", "dense", shape, shape, activation="gelu"))
    params = small_model(longer).params
    images = np.random.default_rng(7).random((2, *spec.image_shape)).astype(np.float32)
    with torch.no_grad():
        latents = VQVAE(longer, params).encoder(torch.from_numpy(images)).numpy()
    network = Network(longer, params, ARITHMETICS[name])
    for image, found in zip(images, latents, strict=True):
        for closely in (False, True):
            last = enclose(network, image.astype(np.float64), closely=closely).rows[-1]
            assert (np.abs(found - last.value) <= last.off.radius).all()


def test_images_count_as_float32_rounds_them():
    spec = SPECS["post"]
    params = small_model(spec).params
    images = np.random.default_rng(7).random((2, *spec.image_shape))
    for a, b in zip(
        prove(spec, params, images), prove(spec, params, images.astype(np.float32)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
