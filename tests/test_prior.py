"""The prior: three interpreters agree, none looks ahead, and samples depend only on their noise."""

import dataclasses
import itertools
import json

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import prior_params

from vqdeploy.graphs.build import GraphOptions
from vqdeploy.graphs.prior import build_prior_graph
from vqdeploy.runtime.library import onnxruntime
from vqdeploy.runtime.protobuf import read_graph
from vqdeploy.stages import prior_ports
from vqref import prior
from vqref.prior import PriorSpec, categorical, certified, choose, gumbel, transformer
from vqref.spec import Layer
from vqtrain.prior import Prior

SPEC = transformer(6, 5, width=8, depth=2, heads=2)
TINY = transformer(3, 4, width=8, depth=2, heads=2)


PARAMS, INDICES = prior_params(SPEC), np.random.default_rng(1).integers(0, 5, (7, 6))


@pytest.fixture(scope="module", params=["autoregressive", "categorical"])
def case(request):
    """A prior of each kind, its parameters, and indices."""
    if request.param == "autoregressive":
        return SPEC, PARAMS, INDICES
    return *categorical(INDICES, 5), INDICES


def every_sequence(spec):
    return np.array(list(itertools.product(range(spec.num_codes), repeat=spec.latent_size)))


def off(found, expected):
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max())


def test_the_probabilities_of_all_sequences_add_up_to_1():
    for spec, params in (
        (TINY, prior_params(TINY)),
        categorical(np.random.default_rng(0).integers(0, 4, (9, 3)), 4),
    ):
        total = np.exp(-prior.nats(spec, params, every_sequence(spec))).sum()
        assert abs(total - 1) <= 1e-12


def test_an_index_changes_nothing_at_its_own_position_and_before(case):
    spec, params, indices = case
    usual = prior.log_probabilities(spec, params, indices)
    for s in range(spec.latent_size):
        changed = indices.copy()
        changed[:, s] = (changed[:, s] + 1) % spec.num_codes
        found = prior.log_probabilities(spec, params, changed)
        np.testing.assert_array_equal(found[:, : s + 1], usual[:, : s + 1])
        if spec.rows and s + 1 < spec.latent_size:
            assert off(found[:, s + 1 :], usual[:, s + 1 :]) > 1e-3


def test_step_by_step_is_the_full_sequence(case):
    spec, params, indices = case
    full, cache = prior.log_probabilities(spec, params, indices), prior.begin(spec, len(indices))
    for s in range(spec.latent_size):
        before = indices[:, s - 1]
        found, cache = prior.step(spec, params, before, s, cache)
        assert off(found, full[:, s]) <= 1e-12
    for row in spec.attention:
        assert cache[row.name].keys.shape == (len(indices), *row.in_shape)


def test_gradients_are_difference_quotients(case):
    spec, params, indices = case
    params = {name: array.astype(np.float64) for name, array in params.items()}
    loss, found = prior.gradients(spec, params, indices)
    assert loss == pytest.approx(prior.nats(spec, params, indices).mean())
    rng, h = np.random.default_rng(2), 1e-5
    assert set(found) == set(params)
    for name, array in params.items():
        direction = rng.normal(size=array.shape)
        upper, lower = (
            prior.nats(spec, params | {name: array + step * direction}, indices).mean()
            for step in (h, -h)
        )
        expected = (upper - lower) / (2 * h)
        assert abs((found[name] * direction).sum() - expected) <= 1e-6 * max(1, abs(expected))


def in_torch(spec, params, dtype=np.float64):
    return Prior(spec, {name: array.astype(dtype) for name, array in params.items()}).eval()


def test_pytorch_agrees_with_the_oracle_in_full_and_step_by_step(case):
    spec, params, indices = case
    module, rows = in_torch(spec, params), torch.from_numpy(indices)
    full = prior.log_probabilities(spec, params, indices)
    with torch.no_grad():
        assert off(module(rows).numpy(), full) <= 1e-12
        assert off(module.nats(rows).numpy(), prior.nats(spec, params, indices)) <= 1e-11
    cache = module.begin(len(indices))
    for s in range(spec.latent_size):
        assert off(module.step(rows[:, s - 1], s, cache).numpy(), full[:, s]) <= 1e-12
    assert module.params().keys() == params.keys()


def test_pytorch_pulls_back_the_oracles_gradients(case):
    spec, params, indices = case
    module = in_torch(spec, params)
    module.nats(torch.from_numpy(indices)).mean().backward()
    _, expected = prior.gradients(spec, params, indices)
    for name, parameter in module.named_parameters():
        scale = np.abs(expected[name]).max()
        assert off(parameter.grad.numpy(), expected[name]) <= 1e-12 * max(1, scale)


def test_pytorchs_probabilities_add_up_to_1_and_see_nothing_ahead():
    module = in_torch(TINY, prior_params(TINY), np.float32)
    sequences = torch.from_numpy(every_sequence(TINY))
    with torch.no_grad():
        total = (-module.nats(sequences)).double().exp().sum().item()
        assert abs(total - 1) <= 1e-6
        usual = module(sequences)
        for s in range(TINY.latent_size):
            changed = sequences.clone()
            changed[:, s] = (changed[:, s] + 1) % TINY.num_codes
            assert torch.equal(module(changed)[:, : s + 1], usual[:, : s + 1])


def in_onnx(stage, spec, params, **options):
    """Runs the graph in onnxruntime, after onnx has checked it."""
    graph = build_prior_graph(stage, spec, params, GraphOptions(**options))
    content = graph.to_bytes()
    onnx.checker.check_model(content, full_check=True)
    assert read_graph(stage, content).to_bytes() == content
    return onnxruntime().InferenceSession(content, providers=["CPUExecutionProvider"])


def step_by_step(session, spec, indices, index_type="int64"):
    """Returns log p (N, S, K) of indices by the graph of one step."""
    shape = (len(indices), *map(int, prior_ports(spec)["prior_step"]["keys"].shape[1:]))
    keys = values = np.zeros(shape, np.float32)
    found = []
    for s in range(spec.latent_size):
        log_p, keys, values = session.run(
            None,
            {
                "previous": indices[:, s - 1].astype(index_type),
                "position": np.array([s]),
                "keys": keys,
                "values": values,
            },
        )
        found.append(log_p)
    return np.stack(found, axis=1)


@pytest.mark.parametrize("options", [{}, {"opset": 20}, {"index_type": "int32"}, {"batch": 7}])
def test_both_graphs_agree_with_the_oracle(case, options):
    spec, params, indices = case
    expected = prior.log_probabilities(spec, params, indices)
    dtype = options.get("index_type", "int64")
    whole = in_onnx("prior", spec, params, **options)
    (found,) = whole.run(None, {"indices": indices.astype(dtype)})
    assert off(found, expected) <= 1e-5
    step = in_onnx("prior_step", spec, params, **options)
    assert off(step_by_step(step, spec, indices, dtype), expected) <= 1e-5
    if "batch" not in options:
        (none,) = whole.run(None, {"indices": indices[:0].astype(dtype)})
        assert none.shape == (0, *expected.shape[1:])


def test_the_graphs_probabilities_add_up_to_1_and_see_nothing_ahead():
    params, sequences = prior_params(TINY), every_sequence(TINY)
    whole = in_onnx("prior", TINY, params)
    (usual,) = whole.run(None, {"indices": sequences})
    taken = np.take_along_axis(usual, sequences[..., None], 2).astype(np.float64)
    assert abs(np.exp(taken.sum(axis=(1, 2))).sum() - 1) <= 1e-6
    for s in range(TINY.latent_size):
        changed = sequences.copy()
        changed[:, s] = (changed[:, s] + 1) % TINY.num_codes
        (found,) = whole.run(None, {"indices": changed})
        np.testing.assert_array_equal(found[:, : s + 1], usual[:, : s + 1])


def test_dropout_leaves_out_in_training_alone():
    module = Prior(SPEC, PARAMS, dropout=0.5)
    rows = torch.from_numpy(INDICES)
    with torch.no_grad():
        assert not torch.equal(module.train()(rows), module(rows))
        assert torch.equal(module.eval()(rows), module(rows))


def test_a_categorical_prior_is_the_smoothed_frequencies():
    spec, params = categorical([[0], [0], [2]], 3)
    log_p = prior.log_probabilities(spec, params, np.zeros((1, 1), int))
    np.testing.assert_allclose(np.exp(log_p[0, 0]), np.array([2.5, 0.5, 1.5]) / 4.5, rtol=1e-6)


def test_samples_have_the_probabilities_of_the_prior():
    params = prior_params(TINY)
    noise = gumbel(5, TINY, 4000)
    found = prior.sample(TINY, params, noise)
    sequences = every_sequence(TINY)
    expected = np.exp(-prior.nats(TINY, params, sequences))
    places = found @ np.array([16, 4, 1])
    share = np.bincount(places, minlength=64) / len(found)
    assert np.abs(share - expected).sum() / 2 < 0.06  # total variation; 0.047 by chance


def test_noise_is_a_function_of_the_seed_and_the_image_alone():
    whole = gumbel(7, SPEC, 5)
    np.testing.assert_array_equal(gumbel(7, SPEC, 2, first=3), whole[3:])
    assert (gumbel(8, SPEC, 5) != whole).all()
    assert len(np.unique(whole)) == whole.size
    assert np.isfinite(whole).all()
    found = prior.sample(SPEC, PARAMS, whole)
    np.testing.assert_array_equal(prior.sample(SPEC, PARAMS, whole[2:4]), found[2:4])
    for seed in (-1, 2**128):
        with pytest.raises(ValueError, match="seed is"):
            gumbel(seed, SPEC, 1)


def test_noise_is_gumbels():
    found = gumbel(0, transformer(10, 100), 50).ravel()
    assert abs(found.mean() - 0.5772) < 0.01
    assert abs(found.var() - np.pi**2 / 6) < 0.05


def test_temperature_and_top_k_choose_among_the_probable():
    log_p = np.log([[0.5, 0.3, 0.15, 0.05]])
    noise = np.array([[0.0, 0.0, 10.0, 20.0]])
    assert choose(log_p, noise)[0] == 3
    assert choose(log_p, noise, top_k=3)[0] == 2
    assert choose(log_p, noise, top_k=2)[0] == 0
    assert choose(log_p, noise, temperature=1e-3)[0] == 0
    assert choose(log_p, noise, top_k=9)[0] == 3
    for wrong in ({"temperature": 0}, {"temperature": float("nan")}, {"top_k": 0}):
        with pytest.raises(ValueError, match="expected"):
            choose(log_p, noise, **wrong)


@given(
    seed=st.integers(0, 2**32 - 1),
    error=st.sampled_from([0.0, 1e-6, 1e-2, 0.3]),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    top_k=st.sampled_from([None, 1, 2, 3, 5]),
)
@settings(max_examples=300, deadline=None)
def test_what_is_certified_no_error_within_the_bound_changes(seed, error, temperature, top_k):
    rng = np.random.default_rng(seed)
    log_p = prior.log_softmax(rng.normal(size=(20, 5)) * rng.choice([0.1, 1, 3]))
    noise = rng.gumbel(size=(20, 5))
    sure = certified(log_p, noise, error, temperature, top_k)
    usual = choose(log_p, noise, temperature, top_k)
    for _ in range(20):
        moved = log_p + error * rng.choice([-1.0, 1.0, 0.3], log_p.shape)
        found = choose(moved, noise, temperature, top_k)
        assert (found == usual)[sure].all()
    if error == 0 and top_k is None:
        assert sure.all()


def test_near_ties_of_winners_and_of_the_top_k_are_not_certified():
    log_p = np.array([[-1.0, -1.1, -3.0]])
    assert not certified(log_p, np.zeros((1, 3)), 0.06)[0]
    assert certified(log_p, np.zeros((1, 3)), 0.04)[0]
    noise = np.array([[0.0, 5.0, 0.0]])
    assert not certified(log_p, noise, 0.06, top_k=1)[0]  # the second code might be the first
    assert certified(log_p, noise, 0.04, top_k=1)[0]


def test_specs_come_back_from_plain_data(case):
    spec, _, _ = case
    assert PriorSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def changed(**fields):
    return dataclasses.replace(SPEC, **fields)


def with_row(place, **fields):
    rows = list(SPEC.rows)
    rows[place] = dataclasses.replace(rows[place], **fields)
    return changed(rows=tuple(rows))


ATTENTION = next(i for i, row in enumerate(SPEC.rows) if row.kind == "attention")
BAD = {
    "an unknown kind": (lambda: changed(kind="uniform"), "kind is 'uniform', expected categor"),
    "no positions": (lambda: changed(latent_size=0), "latent_size is 0"),
    "other positions": (lambda: changed(latent_size=7), "the prior maps"),
    "other codes": (lambda: changed(num_codes=6), "begins with an embedding of 6"),
    "no rows": (lambda: changed(rows=()), "the prior has 0 rows"),
    "rows of a table": (lambda: changed(kind="categorical"), "rows, expected none"),
    "no embedding": (lambda: changed(rows=SPEC.rows[1:]), "begins with an embedding"),
    "a look ahead": (lambda: with_row(ATTENTION, causal=False), "attention that is not causal"),
    "a second embedding": (
        lambda: changed(rows=(SPEC.rows[0], dataclasses.replace(SPEC.rows[0], name="prior.x"))),
        "in_shape is",
    ),
    "a row of pixels": (
        lambda: changed(
            rows=(
                *SPEC.rows,
                Layer("prior.x", "reshape", (6, 5), (5, 6)),
                Layer("prior.y", "reshape", (5, 6), (6, 5)),
            )
        ),
        r"prior\.x: a prior has no reshape",
    ),
    "a foreign name": (lambda: with_row(-1, name="decoder.x"), r"decoder\.x: the name of a row of"),
    "no table": (lambda: PriorSpec.from_dict([]), "is not a table of"),
    "a field too many": (lambda: PriorSpec.from_dict(SPEC.to_dict() | {"x": 1}), "not a table"),
    "rows that are a table": (
        lambda: PriorSpec.from_dict(SPEC.to_dict() | {"rows": {}}),
        "rows are not a list",
    ),
    "heads that do not divide": (lambda: transformer(4, 4, width=6, heads=4), "width is 6"),
    "one position": (lambda: transformer(1, 4), "latent_size is 1"),
    "no indices": (lambda: categorical(np.zeros((0, 2), int), 4), "expected at least one"),
    "an index beyond": (lambda: categorical([[4]], 4), "expected 0 to 3"),
    "an index of the wrong kind": (
        lambda: prior.nats(SPEC, PARAMS, INDICES.astype(float)),
        "expected an integer dtype",
    ),
    "a position beyond": (
        lambda: prior.step(SPEC, PARAMS, INDICES[:, 0], 6, prior.begin(SPEC, 7)),
        "position is 6",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_prior_is_refused_in_one_line(name):
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert len(str(caught.value).splitlines()) == 1


def test_an_encoder_takes_no_indices(residual_model):
    spec = residual_model.spec
    rows = (Layer("encoder.x", "embedding", (4,), (4, 8)), *spec.encoder)
    with pytest.raises(ValueError, match=r"encoder\.x: takes indices; it belongs to a prior"):
        dataclasses.replace(spec, encoder=rows)
