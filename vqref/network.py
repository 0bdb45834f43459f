"""The NumPy interpreter of the rows: a function per kind, written beside its equation, in float64.

A convolution is sliding windows and one matrix product, so that a batch takes seconds, not minutes.
Batches are cut so that the windows of the widest row stay under ``WINDOW_BYTES``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from vqref.likelihoods import sigmoid
from vqref.spec import Layer, ModelSpec, plan
from vqref.validation import Float64, Params, as_float64, as_images

WINDOW_BYTES = 64 * 2**20
"""Bytes that the widest row's windows may take at once; a batch of any size then needs about
0.2 GiB."""


def encode(spec: ModelSpec, params: Params, images: npt.ArrayLike) -> Float64:
    """Latents (N, S, D) of images (N, C, H, W) in [0, 1]. Raises ValueError if they do not fit."""
    return run(spec.encoder, params, as_images(images, spec))


def decode(spec: ModelSpec, params: Params, quantized: npt.ArrayLike) -> Float64:
    """Outputs (N, P, H, W), the likelihood's parameters, of quantized latents (N, S, D).

    Raises ValueError if they do not fit.
    """
    shape = ("N", spec.latent_size, spec.code_size)
    return run(spec.decoder, params, as_float64("quantized", quantized, shape))


def run(layers: Sequence[Layer], params: Params, x: Float64) -> Float64:
    """Applies the rows to x (N, *layers[0].in_shape), a few images at a time."""
    weights = {
        layer.name: [
            as_float64(name, _find(params, name), shape) for name, shape in layer.parameters
        ]
        for layer in layers
    }
    steps = plan(layers)
    size = max(1, WINDOW_BYTES // max(_window_bytes(layer) for layer in layers))
    out = np.empty((len(x), *layers[-1].out_shape))
    for start in range(0, len(x), size):
        values = {0: x[start : start + size]}
        for number, step in enumerate(steps, 1):
            layer = step.layer
            y = KINDS[layer.kind](layer, *(values[i] for i in step.sources), *weights[layer.name])
            for spent in step.spent:
                del values[spent]
            values[number] = ACTIVATIONS[layer.activation](y)
        out[start : start + size] = values[len(steps)]
    return out


def affine(layer: Layer, x: Float64) -> Float64:
    """y = scale * x + shift, of constants."""
    return layer.scale * x + layer.shift


def conv(layer: Layer, x: Float64, weight: Float64, bias: Float64) -> Float64:
    """y[n,o,i,j] = bias[o] + sum over c,a,b of weight[o,c,a,b] * padded[n, c, s*i + a, s*j + b]."""
    s = layer.stride
    padded = np.pad(x, ((0, 0), (0, 0), *layer.pads))
    windows = np.lib.stride_tricks.sliding_window_view(padded, layer.kernel, axis=(2, 3))
    windows = windows[:, :, ::s, ::s]
    y = np.tensordot(windows, weight, axes=((1, 4, 5), (1, 2, 3)))  # (N, H', W', O)
    return y.transpose(0, 3, 1, 2) + bias[:, None, None]


def conv_transpose(layer: Layer, x: Float64, weight: Float64, bias: Float64) -> Float64:
    """full[n, o, s*i + a, s*j + b] += x[n,c,i,j] * weight[c,o,a,b], then cropped by ``pads``: the
    gradient of a convolution."""
    (kh, kw), s = layer.kernel, layer.stride
    (top, bottom), (left, right) = layer.pads
    n, _, h, w = x.shape
    taps = np.tensordot(x, weight, axes=((1,), (0,)))  # (N, H, W, O, kh, kw)
    full = np.zeros((n, weight.shape[1], s * (h - 1) + kh, s * (w - 1) + kw))
    for a in range(kh):
        for b in range(kw):
            full[:, :, a : a + s * h : s, b : b + s * w : s] += taps[..., a, b].transpose(
                0, 3, 1, 2
            )
    cropped = full[:, :, top : full.shape[2] - bottom, left : full.shape[3] - right]
    return cropped + bias[:, None, None]


def dense(layer: Layer, x: Float64, weight: Float64, bias: Float64) -> Float64:
    """y[n,o] = bias[o] + sum over i of weight[o,i] * x[n,i]."""
    return x @ weight.T + bias


def reshape(layer: Layer, x: Float64) -> Float64:
    """The same elements in row-major order under another shape."""
    return x.reshape(len(x), *layer.out_shape)


def to_vectors(layer: Layer, x: Float64) -> Float64:
    """y[n, (i*w + j)*g + m, d] = x[n, m*D + d, i, j]."""
    n, channels, h, w = x.shape
    size = layer.out_shape[1]
    grid = x.reshape(n, channels // size, size, h, w)  # (N, g, D, h, w)
    return grid.transpose(0, 3, 4, 1, 2).reshape(n, *layer.out_shape)


def to_grid(layer: Layer, x: Float64) -> Float64:
    """y[n, m*D + d, i, j] = x[n, (i*w + j)*g + m, d]: the inverse of to_vectors."""
    n, _, size = x.shape
    channels, h, w = layer.out_shape
    grid = x.reshape(n, h, w, channels // size, size)  # (N, h, w, g, D)
    return grid.transpose(0, 3, 4, 1, 2).reshape(n, *layer.out_shape)


def add(layer: Layer, x: Float64, y: Float64) -> Float64:
    """The sum, element by element."""
    return x + y


def activation(layer: Layer, x: Float64) -> Float64:
    """x itself: the row's activation is all there is."""
    return x


def linear(x: Float64) -> Float64:
    """x."""
    return x


def elu(x: Float64) -> Float64:
    """x if x > 0, else exp(x) - 1 (Clevert, Unterthiner and Hochreiter 2016, alpha = 1)."""
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0.0)))


def relu(x: Float64) -> Float64:
    """x if x > 0, else 0."""
    return np.maximum(x, 0.0)


def silu(x: Float64) -> Float64:
    """x / (1 + exp(-x)) (Elfwing, Uchibe and Doya 2018)."""
    return x * sigmoid(x)


KINDS: Mapping[str, Callable[..., Float64]] = MappingProxyType(
    {
        "affine": affine,
        "conv": conv,
        "conv_transpose": conv_transpose,
        "dense": dense,
        "reshape": reshape,
        "to_vectors": to_vectors,
        "to_grid": to_grid,
        "add": add,
        "activation": activation,
    }
)
ACTIVATIONS: Mapping[str, Callable[[Float64], Float64]] = MappingProxyType(
    {"linear": linear, "elu": elu, "relu": relu, "silu": silu}
)


def _window_bytes(layer: Layer) -> int:
    """Float64 bytes of one image's windows (conv), taps (conv_transpose) or results."""
    if layer.kind == "conv":
        return 8 * layer.fan_in * math.prod(layer.out_shape[1:])
    if layer.kind == "conv_transpose":
        return 8 * layer.fan_out * math.prod(layer.in_shape[1:])
    return 8 * math.prod(layer.out_shape)


def _find(params: Params, name: str) -> npt.NDArray[np.floating]:
    if name not in params:
        raise ValueError(f"parameters missing: {name}")
    return params[name]
