"""The NumPy interpreter of the rows, in float64.

Each kind has a function, written beside its equation, and a vector-Jacobian product next to it.
``KIND(layer, x, weight, bias)`` returns y. Let g be the gradient of a number with respect to y.
``KIND_backward(layer, g, x, weight, bias)`` returns the gradients of that number with respect to
the inputs. ``KIND_learn(layer, g, x)`` returns those with respect to weight and bias.

A convolution is sliding windows and one matrix product, so that a batch takes seconds, not minutes.
Batches are cut so that the windows of the widest row stay under ``WINDOW_BYTES``. The windows of
one large image are taken in bands, and so are the queries of attention.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vqref.likelihoods import sigmoid
from vqref.spec import Layer, ModelSpec, Step, plan
from vqref.validation import Float64, Int64, Params, as_float64, as_images

Gradients = tuple[Float64, ...]

WINDOW_BYTES = 64 * 2**20
"""The most bytes that the widest row's windows may take at once.

A batch of any size then needs about 0.2 GiB."""


NORM_EPSILON = 1e-5
"""The number that layer_norm adds to a variance."""

GROUP_EPSILON = 1e-6
"""The number that group_norm adds to a variance."""

LEAST_LENGTH = 1e-12
"""The smallest length that unit_norm divides by."""

BEYOND = 1e-3
"""The share by which the range of bounded goes beyond the outer values."""


def encode(spec: ModelSpec, params: Params, images: npt.ArrayLike) -> Float64:
    """Returns the latents (N, S, D) of images (N, C, H, W) in [0, 1].

    Raises ValueError if images or parameters do not fit the spec.
    """
    return scaled(spec, encode_unscaled(spec, params, images))


def encode_unscaled(spec: ModelSpec, params: Params, images: npt.ArrayLike) -> Float64:
    """Returns the input of ``scaled``. If codes are unit vectors, these have any length."""
    rows = spec.encoder[:-1] if spec.normalized else spec.encoder
    return run(rows, params, as_images(images, spec))


def scaled(spec: ModelSpec, unscaled: Float64) -> Float64:
    """Returns latents (N, S, D): applies a normalized encoder's last row.

    Latents of other encoders stay as they are.
    """
    return run(spec.encoder[-1:], {}, unscaled) if spec.normalized else unscaled


def decode(spec: ModelSpec, params: Params, quantized: npt.ArrayLike) -> Float64:
    """Returns outputs (N, P, H, W), the likelihood's parameters, of quantized (N, S, D).

    Raises ValueError if quantized or parameters do not fit the spec.
    """
    shape = ("N", spec.latent_size, spec.code_size)
    return run(spec.decoder, params, as_float64("quantized", quantized, shape))


def run(layers: Sequence[Layer], params: Params, x: Float64 | Int64) -> Float64:
    """Applies the rows to x (N, *layers[0].in_shape), a few images at a time."""
    weights, steps = weights_of(layers, params), plan(layers)
    size = max(1, WINDOW_BYTES // max(_window_bytes(layer) for layer in layers))
    out = np.empty((len(x), *layers[-1].out_shape))
    for start in range(0, len(x), size):
        values: dict[int, Any] = {0: x[start : start + size]}
        for number, step in enumerate(steps, 1):
            y = before_activation(step, values, weights)
            for spent in step.spent:
                del values[spent]
            values[number] = ACTIVATIONS[step.layer.activation].value(y)
        out[start : start + size] = values[len(steps)]
    return out


def backward(
    layers: Sequence[Layer], params: Params, x: Float64 | Int64, gradient: Float64
) -> tuple[Float64, dict[str, Float64]]:
    """Returns the gradients of a number with respect to x and to every parameter of the rows.

    x is (N, *layers[0].in_shape). gradient is that of the number with respect to
    ``run(layers, params, x)``. Works on a few images at a time.
    """
    weights, steps = weights_of(layers, params), plan(layers)
    held = sum(_window_bytes(layer) for layer in layers)
    size = max(1, WINDOW_BYTES // held)
    of_x = np.empty(x.shape)
    found = {name: np.zeros(shape) for layer in layers for name, shape in layer.parameters}
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        values, before = dict[int, Any]({0: x[part]}), dict[int, Float64]()
        for number, step in enumerate(steps, 1):
            before[number] = before_activation(step, values, weights)
            values[number] = ACTIVATIONS[step.layer.activation].value(before[number])
        gradients = {len(steps): gradient[part]}
        for number, step in reversed([*enumerate(steps, 1)]):
            if number not in gradients:  # no later row takes it
                continue
            layer, taken = step.layer, [values[i] for i in step.sources]
            g = gradients.pop(number) * ACTIVATIONS[layer.activation].slope(before[number])
            pulled = KINDS[layer.kind].backward(layer, g, *taken, *weights[layer.name])
            for source, each in zip(step.sources, pulled, strict=True):
                gradients[source] = gradients[source] + each if source in gradients else each
            learned = KINDS[layer.kind].learn(layer, g, *taken)
            for (name, _), each in zip(layer.parameters, learned, strict=True):
                found[name] += each
        of_x[part] = gradients[0]
    return of_x, found


def affine(layer: Layer, x: Float64) -> Float64:
    """y = scale * x + shift, with constant scale and shift."""
    return layer.scale * x + layer.shift


def affine_backward(layer: Layer, g: Float64, x: Float64) -> Gradients:
    return (layer.scale * g,)


def conv(layer: Layer, x: Float64, weight: Float64, bias: Float64) -> Float64:
    """y[n,o,i,j] = bias[o] + sum over c,a,b of weight[o,c,a,b] * padded[n, c, s*i + a, s*j + b]."""
    windows = _gathered(layer, np.pad(x, ((0, 0), (0, 0), *layer.pads)))
    y = np.concatenate(
        [
            np.tensordot(weight, windows[:, :, band], axes=((1, 2, 3), (1, 4, 5)))
            for band in _bands(layer, len(x))
        ],
        axis=2,
    )  # (O, N, H', W')
    return y.transpose(1, 0, 2, 3) + bias[:, None, None]


def conv_backward(
    layer: Layer, g: Float64, x: Float64, weight: Float64, bias: Float64
) -> Gradients:
    """At padded[n, c, s*i + a, s*j + b], adds the sum over o of g[n,o,i,j] * weight[o,c,a,b].

    Returns the result without the pads, the gradient of x.
    """
    sides = [n + sum(pads) for n, pads in zip(x.shape[2:], layer.pads, strict=True)]
    total, s = np.zeros((*x.shape[:2], *sides)), layer.stride
    for band in _bands(layer, len(x)):
        taps = np.tensordot(g[:, :, band], weight, axes=((1,), (0,)))  # (N, H', W', C, kh, kw)
        rows = slice(s * band.start, s * (band.stop - 1) + layer.kernel[0])
        total[:, :, rows] += scattered(layer, taps, total[:, :, rows].shape)
    return (_cropped(layer, total),)


def conv_learn(layer: Layer, g: Float64, x: Float64) -> Gradients:
    windows = _gathered(layer, np.pad(x, ((0, 0), (0, 0), *layer.pads)))
    places = (0, 2, 3)
    parts = (
        np.tensordot(g[:, :, band], windows[:, :, band], axes=(places, places))
        for band in _bands(layer, len(x))
    )
    return functools.reduce(operator.add, parts), g.sum(axis=places)


def conv_transpose(layer: Layer, x: Float64, weight: Float64, bias: Float64) -> Float64:
    """full[n, o, s*i + a, s*j + b] += x[n,c,i,j] * weight[c,o,a,b], then cropped by ``pads``.

    This is the gradient of a convolution.
    """
    taps = np.tensordot(x, weight, axes=((1,), (0,)))  # (N, H, W, O, kh, kw)
    return _cropped(layer, scattered(layer, taps, _full_shape(layer, x))) + bias[:, None, None]


def conv_transpose_backward(
    layer: Layer, g: Float64, x: Float64, weight: Float64, bias: Float64
) -> Gradients:
    """At x[n,c,i,j], sums full[n, o, s*i + a, s*j + b] * weight[c,o,a,b] over o, a and b.

    Here full is g with pads around it. Returns the gradient of x.
    """
    windows = _gathered(layer, np.pad(g, ((0, 0), (0, 0), *layer.pads)))  # (N, O, H, W, kh, kw)
    return (np.tensordot(windows, weight, axes=((1, 4, 5), (1, 2, 3))).transpose(0, 3, 1, 2),)


def conv_transpose_learn(layer: Layer, g: Float64, x: Float64) -> Gradients:
    windows = _gathered(layer, np.pad(g, ((0, 0), (0, 0), *layer.pads)))
    return np.tensordot(x, windows, axes=((0, 2, 3), (0, 2, 3))), g.sum(axis=(0, 2, 3))


def dense(layer: Layer, x: Float64, weight: Float64, bias: Float64) -> Float64:
    """y[...,o] = bias[o] + sum over i of weight[o,i] * x[...,i]."""
    return x @ weight.T + bias


def dense_backward(
    layer: Layer, g: Float64, x: Float64, weight: Float64, bias: Float64
) -> Gradients:
    return (g @ weight,)


def dense_learn(layer: Layer, g: Float64, x: Float64) -> Gradients:
    flat = g.reshape(-1, g.shape[-1])
    return flat.T @ x.reshape(-1, x.shape[-1]), flat.sum(axis=0)


def reshape(layer: Layer, x: Float64) -> Float64:
    """y has the elements of x in row-major order, under another shape."""
    return x.reshape(len(x), *layer.out_shape)


def reshape_backward(layer: Layer, g: Float64, x: Float64) -> Gradients:
    return (g.reshape(x.shape),)


def to_vectors(layer: Layer, x: Float64) -> Float64:
    """y[n, (i*w + j)*g + m, d] = x[n, m*D + d, i, j]."""
    return _grid_to_vectors(x, layer.out_shape)


def to_vectors_backward(layer: Layer, g: Float64, x: Float64) -> Gradients:
    return (_vectors_to_grid(g, layer.in_shape),)


def to_grid(layer: Layer, x: Float64) -> Float64:
    """y[n, m*D + d, i, j] = x[n, (i*w + j)*g + m, d]: the inverse of to_vectors."""
    return _vectors_to_grid(x, layer.out_shape)


def to_grid_backward(layer: Layer, g: Float64, x: Float64) -> Gradients:
    return (_grid_to_vectors(g, layer.in_shape),)


def add(layer: Layer, x: Float64, y: Float64) -> Float64:
    """Returns x + y, element by element."""
    return x + y


def add_backward(layer: Layer, g: Float64, x: Float64, y: Float64) -> Gradients:
    return g, g


def activation(layer: Layer, x: Float64) -> Float64:
    """y = x. The row only has its activation."""
    return x


def activation_backward(layer: Layer, g: Float64, x: Float64) -> Gradients:
    return (g,)


def embedding(layer: Layer, x: Int64, weight: Float64, bias: Float64) -> Float64:
    """y[n,s] = bias[s] + weight[x[n,s-1]]; y[n,0] = bias[0]."""
    y = np.repeat(bias[None], len(x), axis=0)
    y[:, 1:] += weight[x[:, :-1]]
    return y


def embedding_backward(
    layer: Layer, g: Float64, x: Int64, weight: Float64, bias: Float64
) -> Gradients:
    """Returns 0, because indices have no gradient."""
    return (np.zeros(x.shape),)


def embedding_learn(layer: Layer, g: Float64, x: Int64) -> Gradients:
    weight = np.zeros((layer.num_codes, g.shape[2]))
    np.add.at(weight, x[:, :-1], g[:, 1:])
    return weight, g.sum(axis=0)


def layer_norm(layer: Layer, x: Float64, weight: Float64, bias: Float64) -> Float64:
    """y = weight * (x - mean) / sqrt(variance + NORM_EPSILON) + bias.

    Mean and variance are over the last axis (Ba, Kiros and Hinton 2016).
    """
    return weight * _normalised(x, NORM_EPSILON)[0] + bias


def layer_norm_backward(
    layer: Layer, g: Float64, x: Float64, weight: Float64, bias: Float64
) -> Gradients:
    return (_normalised_backward(weight * g, *_normalised(x, NORM_EPSILON)),)


def layer_norm_learn(layer: Layer, g: Float64, x: Float64) -> Gradients:
    return (g * _normalised(x, NORM_EPSILON)[0]).sum(axis=(0, 1)), g.sum(axis=(0, 1))


def group_norm(layer: Layer, x: Float64, weight: Float64, bias: Float64) -> Float64:
    """y = weight[c] * (x - mean) / sqrt(variance + GROUP_EPSILON) + bias[c].

    Mean and variance are over all positions of the channels of a group (Wu and He 2018).
    """
    h, _ = _normalised(_in_groups(layer, x), GROUP_EPSILON)
    return weight[:, None, None] * h.reshape(x.shape) + bias[:, None, None]


def group_norm_backward(
    layer: Layer, g: Float64, x: Float64, weight: Float64, bias: Float64
) -> Gradients:
    c = _in_groups(layer, weight[:, None, None] * g)
    known = _normalised(_in_groups(layer, x), GROUP_EPSILON)
    return (_normalised_backward(c, *known).reshape(x.shape),)


def group_norm_learn(layer: Layer, g: Float64, x: Float64) -> Gradients:
    h, _ = _normalised(_in_groups(layer, x), GROUP_EPSILON)
    return (g * h.reshape(x.shape)).sum(axis=(0, 2, 3)), g.sum(axis=(0, 2, 3))


def _in_groups(layer: Layer, x: Float64) -> Float64:
    """Reshapes (N, C, H, W) to (N, groups, C / groups * H * W)."""
    return x.reshape(len(x), layer.groups, -1)


def _normalised(x: Float64, epsilon: float) -> tuple[Float64, Float64]:
    """Returns x with mean 0 and variance 1 along the last axis, and its divisor."""
    centred = x - _mean(x)
    deviation = np.sqrt(_mean(np.square(centred)) + epsilon)
    return centred / deviation, deviation


def _normalised_backward(c: Float64, h: Float64, deviation: Float64) -> Float64:
    """Returns the gradient of x: (c - mean(c) - h mean(c h)) / deviation.

    h is the normalised x, and c is the gradient of h.
    """
    pulled: Float64 = (c - _mean(c) - h * _mean(c * h)) / deviation
    return pulled


def _mean(x: Float64) -> Float64:
    mean: Float64 = x.mean(axis=-1, keepdims=True)
    return mean


def unit_norm(layer: Layer, x: Float64) -> Float64:
    """y = x / max(||x||, LEAST_LENGTH) for each vector."""
    return x / np.maximum(_length(x), LEAST_LENGTH)


def unit_norm_backward(layer: Layer, g: Float64, x: Float64) -> Gradients:
    """Returns (g - y g.y) / ||x||, or g / LEAST_LENGTH for vectors shorter than that."""
    length, y = _length(x), unit_norm(layer, x)
    along = np.where(length < LEAST_LENGTH, 0.0, (g * y).sum(axis=-1, keepdims=True))
    return ((g - along * y) / np.maximum(length, LEAST_LENGTH),)


def bounded(layer: Layer, x: Float64) -> Float64:
    """y = scale * tanh(x + shift) - middle, with constants per element.

    This is finite scalar quantization (Mentzer et al. 2023).
    """
    shift, scale, middle = bounds_of(layer)
    return scale * np.tanh(x + shift) - middle


def bounded_backward(layer: Layer, g: Float64, x: Float64) -> Gradients:
    shift, scale, _ = bounds_of(layer)
    return (g * scale * (1 - np.square(np.tanh(x + shift))),)


def bounds_of(layer: Layer) -> tuple[Float64, Float64, Float64]:
    """Returns shift, scale and middle of a row of kind bounded, each (D,).

    An element with L levels takes the values n / h, where h = L // 2 and n goes from -h to
    L - 1 - h. The tanh reaches a little beyond the outer values. If L is even, the outer values are
    half a step off centre, so shift keeps 0 at 0.
    """
    levels = np.array(layer.levels)
    h, reach = levels // 2, (levels - 1) * (1 + BEYOND) / 2
    offset = np.where(levels % 2 == 0, 0.5, 0.0)
    return np.arctanh(offset / reach), reach / h, offset / h


def _length(x: Float64) -> Float64:
    length: Float64 = np.sqrt(np.square(x).sum(axis=-1, keepdims=True))
    return length


def upsample(layer: Layer, x: Float64) -> Float64:
    """y[n,c,i,j] = x[n, c, i // f, j // f]."""
    factor = upsample_factor(layer)
    return x.repeat(factor, axis=2).repeat(factor, axis=3)


def upsample_backward(layer: Layer, g: Float64, x: Float64) -> Gradients:
    """Returns the sum of g over the f x f positions that show a position of x."""
    (n, channels, height, width), f = x.shape, upsample_factor(layer)
    return (g.reshape(n, channels, height, f, width, f).sum(axis=(3, 5)),)


def upsample_factor(layer: Layer) -> int:
    """Returns the factor f of a row of kind upsample."""
    return layer.out_shape[1] // layer.in_shape[1]


def attention(layer: Layer, q: Float64, k: Float64, v: Float64) -> Float64:
    """In each head, y[n,s] = sum over t of a[n,s,t] * v[n,t].

    a is the softmax over t of q[n,s].k[n,t] / sqrt(size of a head) (Vaswani et al. 2017). If the
    row is causal, both are over t <= s.
    """
    q, k, v = (_heads(layer, each) for each in (q, k, v))
    parts = [_weights(layer, q, k, part) @ v for part in _queries(q, k)]
    return _joined(np.concatenate(parts, axis=2))


def attention_backward(layer: Layer, g: Float64, q: Float64, k: Float64, v: Float64) -> Gradients:
    """The gradient of the scores is a * (b - sum over t of a * b), where b = g.v'."""
    q, k, v, g = (_heads(layer, each) for each in (q, k, v, g))
    of_q, of_k, of_v = (np.zeros_like(each) for each in (q, k, v))
    for part in _queries(q, k):
        a, b = _weights(layer, q, k, part), g[:, :, part] @ v.swapaxes(2, 3)
        scores = a * (b - (a * b).sum(axis=3, keepdims=True)) / math.sqrt(q.shape[3])
        of_q[:, :, part] = scores @ k
        of_k += scores.swapaxes(2, 3) @ q[:, :, part]
        of_v += a.swapaxes(2, 3) @ g[:, :, part]
    return _joined(of_q), _joined(of_k), _joined(of_v)


def _weights(layer: Layer, q: Float64, k: Float64, part: slice) -> Float64:
    """Returns a (N, heads, queries, S) for a part of the queries."""
    scores = q[:, :, part] @ k.swapaxes(2, 3) / math.sqrt(q.shape[3])
    if layer.causal:
        later = np.triu(np.ones(scores.shape[2:], bool), 1 + part.start)
        scores = np.where(later, -np.inf, scores)
    powers = np.exp(scores - scores.max(axis=3, keepdims=True))
    a: Float64 = powers / powers.sum(axis=3, keepdims=True)
    return a


def _queries(q: Float64, k: Float64) -> list[slice]:
    """Returns parts of the queries whose weights and two more such arrays fit ``WINDOW_BYTES``."""
    n, heads, queries, _ = q.shape
    return _parts(queries, 8 * 3 * n * heads * k.shape[2])


def _heads(layer: Layer, x: Float64) -> Float64:
    """Reshapes (N, S, F) to (N, heads, S, F / heads)."""
    n, s, size = x.shape
    return x.reshape(n, s, layer.heads, size // layer.heads).transpose(0, 2, 1, 3)


def _joined(x: Float64) -> Float64:
    """Inverts ``_heads``."""
    n, heads, s, size = x.shape
    return x.transpose(0, 2, 1, 3).reshape(n, s, heads * size)


def linear(x: Float64) -> Float64:
    """y = x."""
    return x


def linear_slope(x: Float64) -> Float64:
    return np.ones_like(x)


def elu(x: Float64) -> Float64:
    """x if x > 0, else exp(x) - 1 (Clevert, Unterthiner and Hochreiter 2016, alpha = 1)."""
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0.0)))


def elu_slope(x: Float64) -> Float64:
    return np.exp(np.minimum(x, 0.0))


def relu(x: Float64) -> Float64:
    """x if x > 0, else 0."""
    return np.maximum(x, 0.0)


def relu_slope(x: Float64) -> Float64:
    """1 if x > 0, else 0. At 0, it is 0."""
    return (x > 0).astype(np.float64)


def silu(x: Float64) -> Float64:
    """x / (1 + exp(-x)) (Elfwing, Uchibe and Doya 2018)."""
    return x * sigmoid(x)


def silu_slope(x: Float64) -> Float64:
    s = sigmoid(x)
    slope: Float64 = s * (1 + x * (1 - s))
    return slope


def gelu(x: Float64) -> Float64:
    """x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3) (Hendrycks and Gimpel 2016)."""
    y: Float64 = 0.5 * x * (1 + np.tanh(_gelu_inner(x)))
    return y


def gelu_slope(x: Float64) -> Float64:
    t = np.tanh(_gelu_inner(x))
    inner = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * np.square(x))
    slope: Float64 = 0.5 * (1 + t) + 0.5 * x * (1 - np.square(t)) * inner
    return slope


def _gelu_inner(x: Float64) -> Float64:
    inner: Float64 = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return inner


class Kind(NamedTuple):
    """The function of one kind of row, and its vector-Jacobian products.

    backward is for its inputs; learn is for weight and bias, if it has them.
    """

    value: Callable[..., Float64]
    backward: Callable[..., Gradients]
    learn: Callable[..., Gradients] = lambda layer, g, *inputs: ()


class Activation(NamedTuple):
    """A function of one number, and its derivative."""

    value: Callable[[Float64], Float64]
    slope: Callable[[Float64], Float64]


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "affine": Kind(affine, affine_backward),
        "conv": Kind(conv, conv_backward, conv_learn),
        "conv_transpose": Kind(conv_transpose, conv_transpose_backward, conv_transpose_learn),
        "dense": Kind(dense, dense_backward, dense_learn),
        "reshape": Kind(reshape, reshape_backward),
        "to_vectors": Kind(to_vectors, to_vectors_backward),
        "to_grid": Kind(to_grid, to_grid_backward),
        "add": Kind(add, add_backward),
        "activation": Kind(activation, activation_backward),
        "embedding": Kind(embedding, embedding_backward, embedding_learn),
        "layer_norm": Kind(layer_norm, layer_norm_backward, layer_norm_learn),
        "group_norm": Kind(group_norm, group_norm_backward, group_norm_learn),
        "unit_norm": Kind(unit_norm, unit_norm_backward),
        "bounded": Kind(bounded, bounded_backward),
        "upsample": Kind(upsample, upsample_backward),
        "attention": Kind(attention, attention_backward),
    }
)
ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        "linear": Activation(linear, linear_slope),
        "elu": Activation(elu, elu_slope),
        "relu": Activation(relu, relu_slope),
        "silu": Activation(silu, silu_slope),
        "gelu": Activation(gelu, gelu_slope),
    }
)


def weights_of(layers: Sequence[Layer], params: Params) -> dict[str, list[Float64]]:
    """Returns {name of a row: [weight, bias]}, with [] if it has none. Raises ValueError."""
    return {
        layer.name: [
            as_float64(name, _find(params, name), shape) for name, shape in layer.parameters
        ]
        for layer in layers
    }


def before_activation(
    step: Step, values: Mapping[int, Float64], weights: Mapping[str, list[Float64]]
) -> Float64:
    """Returns the result of a row before its activation."""
    layer = step.layer
    taken = (values[i] for i in step.sources)
    return KINDS[layer.kind].value(layer, *taken, *weights[layer.name])


def _bands(layer: Layer, count: int) -> list[slice]:
    """Returns bands of a convolution's rows: windows of ``count`` images fit ``WINDOW_BYTES``."""
    height = layer.out_shape[1]
    return _parts(height, count * _window_bytes(layer) // height)


def _parts(length: int, each: int) -> list[slice]:
    """Returns slices of 0 to length that take at most ``WINDOW_BYTES``, but hold at least 1.

    each: the bytes per item.
    """
    step = max(1, WINDOW_BYTES // max(1, each))
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _gathered(layer: Layer, x: Float64) -> Float64:
    """Returns a view (N, C, H', W', kh, kw): [n,c,i,j,a,b] is x[n, c, s*i + a, s*j + b]."""
    windows = np.lib.stride_tricks.sliding_window_view(x, layer.kernel, axis=(2, 3))
    return windows[:, :, :: layer.stride, :: layer.stride]


def scattered(layer: Layer, taps: Float64, shape: tuple[int, ...]) -> Float64:
    """Transposes ``_gathered``.

    Returns an array of ``shape`` with taps (N, H', W', C, kh, kw) added at
    [n, c, s*i + a, s*j + b].
    """
    (kh, kw), s = layer.kernel, layer.stride
    _, h, w = taps.shape[:3]
    full = np.zeros(shape)
    for a in range(kh):
        for b in range(kw):
            rows, columns = slice(a, a + s * (h - 1) + 1, s), slice(b, b + s * (w - 1) + 1, s)
            full[:, :, rows, columns] += taps[..., a, b].transpose(0, 3, 1, 2)
    return full


def _full_shape(layer: Layer, x: Float64) -> tuple[int, ...]:
    """Returns the shape of a transposed convolution's result before it is cropped."""
    sides = (layer.stride * (n - 1) + k for n, k in zip(x.shape[2:], layer.kernel, strict=True))
    return (len(x), layer.out_shape[0], *sides)


def _cropped(layer: Layer, full: Float64) -> Float64:
    (top, bottom), (left, right) = layer.pads
    return full[:, :, top : full.shape[2] - bottom, left : full.shape[3] - right]


def _grid_to_vectors(x: Float64, shape: tuple[int, ...]) -> Float64:
    """Turns (N, g*D, h, w) into (N, *shape), where shape is (S, D)."""
    n, channels, h, w = x.shape
    grid = x.reshape(n, channels // shape[1], shape[1], h, w)  # (N, g, D, h, w)
    return grid.transpose(0, 3, 4, 1, 2).reshape(n, *shape)


def _vectors_to_grid(x: Float64, shape: tuple[int, ...]) -> Float64:
    """Turns (N, S, D) into (N, *shape), where shape is (g*D, h, w)."""
    n, _, size = x.shape
    channels, h, w = shape
    grid = x.reshape(n, h, w, channels // size, size)  # (N, h, w, g, D)
    return grid.transpose(0, 3, 4, 1, 2).reshape(n, *shape)


def _window_bytes(layer: Layer) -> int:
    """Returns the float64 bytes of one image's largest array.

    This is its windows (conv), taps (conv_transpose), attention weights (attention) or results.
    """
    if layer.kind == "conv":
        return 8 * layer.fan_in * math.prod(layer.out_shape[1:])
    if layer.kind == "conv_transpose":
        return 8 * layer.fan_out * math.prod(layer.in_shape[1:])
    if layer.kind == "attention":
        return 8 * 3 * layer.heads * layer.in_shape[0] ** 2
    return 8 * math.prod(layer.out_shape)


def _find(params: Params, name: str) -> npt.NDArray[np.floating]:
    if name not in params:
        raise ValueError(f"parameters missing: {name}")
    return params[name]
