"""The oracle's own oracle: every row, the quantizer and its averages in plain Python loops.

Sums are by math.fsum, and distances by exact fractions.
"""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ROWS, inputs_of

import vqref
import vqref.network
import vqtrain.network
from vqref.agreement.parity import check_indices
from vqref.checks.adversary import CASES
from vqref.dialects import DIALECTS
from vqref.quantizer import EMAState
from vqref.spec import ACTIVATIONS, KINDS


def conv(layer, x, weight, bias):
    """x[c][i][j] -> y[o][i][j], from the definition, with zeros outside the image."""
    (top, _), (left, _) = layer.pads
    outputs, height, width = layer.out_shape
    channels, rows, columns = layer.in_shape
    kh, kw = layer.kernel
    y = np.empty(layer.out_shape)
    for o in range(outputs):
        for i in range(height):
            for j in range(width):
                terms = [bias[o]]
                for a in range(kh):
                    for b in range(kw):
                        row, column = layer.stride * i + a - top, layer.stride * j + b - left
                        if 0 <= row < rows and 0 <= column < columns:
                            terms += [
                                weight[o][c][a][b] * x[c][row][column] for c in range(channels)
                            ]
                y[o, i, j] = math.fsum(terms)
    return y.tolist()


def conv_transpose(layer, x, weight, bias):
    """Each output sums the inputs that would read it in a convolution of this stride and pads."""
    (top, _), (left, _) = layer.pads
    outputs, height, width = layer.out_shape
    channels, rows, columns = layer.in_shape
    kh, kw = layer.kernel
    y = np.empty(layer.out_shape)
    for o in range(outputs):
        for i in range(height):
            for j in range(width):
                terms = [bias[o]]
                for a in range(kh):
                    row, left_over = divmod(i + top - a, layer.stride)
                    if left_over or not 0 <= row < rows:
                        continue
                    for b in range(kw):
                        column, left_over = divmod(j + left - b, layer.stride)
                        if not left_over and 0 <= column < columns:
                            terms += [
                                x[c][row][column] * weight[c][o][a][b] for c in range(channels)
                            ]
                y[o, i, j] = math.fsum(terms)
    return y.tolist()


def dense(layer, x, weight, bias):
    if isinstance(x[0], list):
        return [dense(layer, part, weight, bias) for part in x]
    return [
        math.fsum([b, *(w * v for w, v in zip(row, x, strict=True))])
        for row, b in zip(weight, bias, strict=True)
    ]


def affine(layer, x):
    if isinstance(x, list):
        return [affine(layer, part) for part in x]
    return layer.scale * x + layer.shift


def reshape(layer, x):
    return np.reshape(x, layer.out_shape).tolist()


def to_vectors(layer, x):
    """Group m at position (i, j) is vector (i*w + j)*g + m."""
    size = layer.out_shape[1]
    groups, (_, height, width) = layer.in_shape[0] // size, layer.in_shape
    return [
        [x[m * size + element][i][j] for element in range(size)]
        for i in range(height)
        for j in range(width)
        for m in range(groups)
    ]


def to_grid(layer, x):
    channels, height, width = layer.out_shape
    size = layer.in_shape[1]
    groups = channels // size
    return [
        [
            [x[(i * width + j) * groups + channel // size][channel % size] for j in range(width)]
            for i in range(height)
        ]
        for channel in range(channels)
    ]


def add(layer, x, y):
    if isinstance(x, list):
        return [add(layer, a, b) for a, b in zip(x, y, strict=True)]
    return x + y


def embedding(layer, x, weight, bias):
    size = layer.out_shape[1]
    before = [[0.0] * size, *(weight[index] for index in x[:-1])]
    return [[bias[s][f] + before[s][f] for f in range(size)] for s in range(layer.in_shape[0])]


def layer_norm(layer, x, weight, bias):
    out = []
    for vector in x:
        mean = sum(vector) / len(vector)
        variance = sum((value - mean) ** 2 for value in vector) / len(vector)
        scaled = [(value - mean) / math.sqrt(variance + 1e-5) for value in vector]
        out.append([w * value + b for w, value, b in zip(weight, scaled, bias, strict=True)])
    return out


def group_norm(layer, x, weight, bias):
    out, size = [], len(x) // layer.groups
    for c, channel in enumerate(x):
        first = c // size * size
        values = [v for other in x[first : first + size] for row in other for v in row]
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / len(values)
        by = weight[c] / math.sqrt(variance + 1e-6)
        out.append([[by * (value - mean) + bias[c] for value in row] for row in channel])
    return out


def unit_norm(layer, x):
    return [[value / max(math.hypot(*vector), 1e-12) for value in vector] for vector in x]


def bounded(layer, x):
    out = []
    for vector in x:
        row = []
        for value, n in zip(vector, layer.levels, strict=True):
            reach, middle = 1.001 * (n - 1) / 2, 0.5 if n % 2 == 0 else 0.0
            at = math.tanh(value + math.atanh(middle / reach))
            row.append((reach * at - middle) / (n // 2))
        out.append(row)
    return out


def upsample(layer, x):
    _, height, width = layer.out_shape
    f = height // layer.in_shape[1]
    return [[[c[i // f][j // f] for j in range(width)] for i in range(height)] for c in x]


def attention(layer, q, k, v):
    places, size = layer.in_shape
    part = size // layer.heads
    out = [[0.0] * size for _ in range(places)]
    for head in range(layer.heads):
        own = range(head * part, (head + 1) * part)
        for s in range(places):
            seen = range(s + 1 if layer.causal else places)
            scores = [sum(q[s][f] * k[t][f] for f in own) / math.sqrt(part) for t in seen]
            powers = [math.exp(score) for score in scores]
            for f in own:
                out[s][f] = sum(p * v[t][f] for p, t in zip(powers, seen, strict=True))
                out[s][f] /= sum(powers)
    return out


LOOPS: dict[str, Any] = {
    "affine": affine,
    "conv": conv,
    "conv_transpose": conv_transpose,
    "dense": dense,
    "reshape": reshape,
    "to_vectors": to_vectors,
    "to_grid": to_grid,
    "add": add,
    "activation": lambda layer, x: x,
    "embedding": embedding,
    "layer_norm": layer_norm,
    "group_norm": group_norm,
    "unit_norm": unit_norm,
    "bounded": bounded,
    "upsample": upsample,
    "attention": attention,
}
NUMBERS = {
    "linear": lambda x: x,
    "elu": lambda x: x if x > 0 else math.expm1(x),
    "relu": lambda x: max(x, 0.0),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


def activate(name, y):
    if isinstance(y, list):
        return [activate(name, part) for part in y]
    return NUMBERS[name](y)


def run(layers, params, x):
    """Runs one image, or one quantized, through the rows; keeps every value."""
    values: dict[str, Any] = {}
    before = x
    for layer in layers:
        inputs = [values[name] for name in layer.inputs] or [before]
        arrays = [np.asarray(params[n], np.float64).tolist() for n, _ in layer.parameters]
        before = activate(layer.activation, LOOPS[layer.kind](layer, *inputs, *arrays))
        values[layer.name] = before
    return np.array(before)


def off(found, expected):
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ROWS)
def test_loops_numpy_and_pytorch_agree_in_every_kind_and_activation(name, activation):
    row, rng = ROWS[name], np.random.default_rng(0)
    kind = row.kind
    weights = [rng.normal(size=shape) for _, shape in row.parameters]
    inputs = inputs_of(row, rng)
    expected = np.array(
        [
            activate(activation, LOOPS[kind](row, *each, *(w.tolist() for w in weights)))
            for each in zip(*(array.tolist() for array in inputs), strict=True)
        ]
    )
    found = vqref.network.KINDS[kind].value(row, *inputs, *weights)
    found = vqref.network.ACTIVATIONS[activation].value(found)
    tensors = [torch.from_numpy(array) for array in (*inputs, *weights)]
    in_torch = vqtrain.network.ACTIVATIONS[activation](vqtrain.network.KINDS[kind](row, *tensors))
    for array in (found, in_torch.numpy()):
        assert array.shape == (3, *row.out_shape)
        assert off(array, expected) <= 1e-12


def test_there_is_a_row_of_every_kind():
    assert {row.kind for row in ROWS.values()} == set(KINDS)


@pytest.fixture(scope="module")
def looped(golden):
    """The first image of the golden batch, with its latents and outputs by loops."""
    latents = run(golden.spec.encoder, golden.params, golden["images"][0].tolist())
    return latents, run(golden.spec.decoder, golden.params, golden["quantized"][0].tolist())


def test_loops_oracle_and_golden_vectors_agree_in_the_networks(golden, looped):
    latents, outputs = looped
    oracle = vqref.forward(golden.spec, golden.params, golden["images"][:1])
    for found, name, recorded in (
        (latents, "latents", "latents"),
        (outputs, "outputs", "logits"),
    ):
        assert off(found, golden[recorded][0]) <= 1e-12
        assert off(found, getattr(oracle, name)[0]) <= 1e-12


def test_loops_and_oracle_agree_in_a_residual_network(residual_model):
    spec, params = residual_model.spec, residual_model.params
    image = np.random.default_rng(0).random(spec.image_shape)
    oracle = vqref.forward(spec, params, image[None])
    assert off(run(spec.encoder, params, image.tolist()), oracle.latents[0]) <= 1e-12
    outputs = run(spec.decoder, params, oracle.quantized[0].tolist())
    assert off(outputs, oracle.outputs[0]) <= 1e-12


def nearest(latent, codebook):
    """Returns (index, gap) by exact fractions; the first index on a tie."""
    exact = [
        sum(
            (Fraction(float(x)) - Fraction(float(c))) ** 2 for x, c in zip(latent, row, strict=True)
        )
        for row in codebook
    ]
    best, second = sorted(exact)[:2]
    return exact.index(best), best, second


def test_loops_oracle_and_golden_vectors_agree_in_the_quantizer(golden):
    q = vqref.quantize(golden["latents"], golden.params["quantizer.codebook"])
    for image, latents in enumerate(golden["latents"]):
        for position, latent in enumerate(latents):
            index, best, second = nearest(latent, golden.params["quantizer.codebook"])
            assert index == q.indices[image, position] == golden["indices"][image, position]
            assert abs(q.gap[image, position] - float(second - best)) <= 1e-12 * float(
                best + second
            )


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    name=st.sampled_from(list(CASES)),
    precision=st.sampled_from(["float32", "float64"]),
)
def test_the_oracles_index_is_exact_or_within_its_own_rounding_on_every_adversary(
    seed, name, precision
):
    latents, codebook = CASES[name](np.random.default_rng(seed), 12, 6, 3, precision)
    q = vqref.quantize(latents, codebook)
    exact = np.array([[nearest(latent, codebook)[0]] for (latent,) in latents])
    check_indices(exact, latents, codebook, precision="float64").require()
    certified = q.gap > 1e-10 * np.square(latents - q.quantized).sum(axis=2) + 1e-300
    assert (q.indices == exact)[certified].all()


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=list(DIALECTS))
def test_loops_and_oracle_agree_in_every_dialect(dialect):
    rng = np.random.default_rng(0)
    k, d, decay, epsilon = 4, 3, 0.9, 1e-3
    codebook, own = rng.normal(size=(k, d)), rng.normal(size=(k, d))
    state = EMAState.start(codebook, dialect, own if dialect.means == "own" else None)
    count, means = state.ema_count.tolist(), state.ema_means.tolist()
    for step in range(1, 6):
        latents, indices = rng.normal(size=(7, 2, d)), rng.integers(0, k - 1, (7, 2))
        state = vqref.update_ema(state, latents, indices, decay, epsilon, dialect)
        flat, chosen = latents.reshape(-1, d), indices.ravel()
        for code in range(k):
            own_latents = [flat[i] for i in range(len(flat)) if chosen[i] == code]
            count[code] = decay * count[code] + (1 - decay) * len(own_latents)
            means[code] = [
                decay * means[code][e]
                + (1 - decay) * math.fsum(latent[e] for latent in own_latents)
                for e in range(d)
            ]
        share = 1 - decay**step if dialect.debiased else 1.0
        used = [c / share for c in count]
        if dialect.smoothing == "laplace":
            total = math.fsum(used)
            used = [(c + epsilon) / (total + k * epsilon) * total for c in used]
        else:
            used = [c + epsilon for c in used]
        if dialect.stores_smoothed:
            count = used
        expected = np.array(
            [[m / share / n for m in row] for row, n in zip(means, used, strict=True)]
        )
        assert off(state.codebook, expected) <= 1e-12
        assert off(state.ema_count, np.array(count)) <= 1e-12
        assert off(state.ema_means, np.array(means)) <= 1e-12
