"""The NumPy interpreter of the layer table: a function a layer kind, written beside its equation, in float64.

Each layer is sliding windows and one matrix product, so that a batch takes seconds, not minutes; batches are cut so that
the windows of the largest layer stay under ``WINDOW_BYTES``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from vqref.spec import Layer, ModelSpec
from vqref.validation import Float64, Params, as_float64, as_images

WINDOW_BYTES = 64 * 2**20
"""Bytes that the widest layer's windows may take at once; 64 MiB keeps a batch of any size near 0.2 GiB."""


def encode(spec: ModelSpec, params: Params, images: npt.ArrayLike) -> Float64:
    """Latents (N, S, D) of images (N, C, H, W) in [0, 1]. Raises ValueError for input that does not fit the spec."""
    return run(spec.encoder, params, as_images(images, spec))


def decode(spec: ModelSpec, params: Params, quantized: npt.ArrayLike) -> Float64:
    """Bernoulli logits (N, C, H, W) of quantized latents (N, S, D). Raises ValueError for input that does not fit."""
    return run(spec.decoder, params, as_float64("quantized", quantized, ("N", spec.latent_size, spec.code_size)))


def sigmoid(logits: npt.ArrayLike) -> Float64:
    """Probabilities 1 / (1 + exp(-logits)), in the form that never overflows."""
    logits = np.asarray(logits, np.float64)
    small = np.exp(-np.abs(logits))
    probabilities: Float64 = np.where(logits >= 0, 1.0, small) / (1.0 + small)
    return probabilities


def run(layers: Sequence[Layer], params: Params, x: Float64) -> Float64:
    """Applies the rows in order to x (N, *layers[0].in_shape), a few images at a time."""
    arrays = {
        parameter.name: as_float64(parameter.name, _find(params, parameter.name), parameter.shape)
        for layer in layers
        for parameter in layer.parameters
    }
    step = max(1, WINDOW_BYTES // max(_window_bytes(layer) for layer in layers))
    out = np.empty((len(x), *layers[-1].out_shape))
    for start in range(0, len(x), step):
        y = x[start : start + step]
        for layer in layers:
            own = {parameter.name.rsplit(".", 1)[1]: arrays[parameter.name] for parameter in layer.parameters}
            y = ACTIVATIONS[layer.activation](KINDS[layer.kind](layer, y, **own))
        out[start : start + step] = y
    return out


def conv(layer: Layer, x: Float64, weight: Float64, bias: Float64) -> Float64:
    """y[n, o, i, j] = bias[o] + sum over c, a, b of weight[o, c, a, b] * padded[n, c, s*i + a, s*j + b]."""
    s = layer.stride
    padded = np.pad(x, ((0, 0), (0, 0), *layer.pads))
    windows = np.lib.stride_tricks.sliding_window_view(padded, layer.kernel, axis=(2, 3))[:, :, ::s, ::s]
    y = np.tensordot(windows, weight, axes=((1, 4, 5), (1, 2, 3)))  # (N, H', W', O)
    return y.transpose(0, 3, 1, 2) + bias[:, None, None]


def conv_transpose(layer: Layer, x: Float64, weight: Float64, bias: Float64) -> Float64:
    """full[n, o, s*i + a, s*j + b] += x[n, c, i, j] * weight[c, o, a, b], then cropped by ``layer.pads``: conv's gradient."""
    (kh, kw), s = layer.kernel, layer.stride
    (top, bottom), (left, right) = layer.pads
    n, _, h, w = x.shape
    taps = np.tensordot(x, weight, axes=((1,), (0,)))  # (N, H, W, O, kh, kw)
    full = np.zeros((n, weight.shape[1], s * (h - 1) + kh, s * (w - 1) + kw))
    for a in range(kh):
        for b in range(kw):
            full[:, :, a : a + s * h : s, b : b + s * w : s] += taps[..., a, b].transpose(0, 3, 1, 2)
    return full[:, :, top : full.shape[2] - bottom, left : full.shape[3] - right] + bias[:, None, None]


def dense(layer: Layer, x: Float64, weight: Float64, bias: Float64) -> Float64:
    """y[n, o] = bias[o] + sum over i of weight[o, i] * x[n, i]."""
    return x @ weight.T + bias


def reshape(layer: Layer, x: Float64) -> Float64:
    """The same elements in row-major order under another shape."""
    return x.reshape(len(x), *layer.out_shape)


def elu(x: Float64) -> Float64:
    """x where x > 0, exp(x) - 1 elsewhere (Clevert, Unterthiner and Hochreiter 2016, alpha = 1)."""
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0.0)))


def linear(x: Float64) -> Float64:
    return x


KINDS: dict[str, Callable[..., Float64]] = {
    "conv": conv,
    "conv_transpose": conv_transpose,
    "dense": dense,
    "reshape": reshape,
}
ACTIVATIONS: dict[str, Callable[[Float64], Float64]] = {"elu": elu, "linear": linear}


def _window_bytes(layer: Layer) -> int:
    """Float64 bytes of one image's windows (conv) or taps (conv_transpose)."""
    positions = layer.out_shape if layer.kind == "conv" else layer.in_shape
    channels = layer.in_shape[0] if layer.kind == "conv" else layer.out_shape[0]
    return 8 * channels * math.prod(positions[1:]) * math.prod(layer.kernel)


def _find(params: Params, name: str) -> npt.NDArray[np.floating]:
    if name not in params:
        raise ValueError(f"parameters missing: {name}")
    return params[name]
