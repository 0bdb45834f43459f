"""The NumPy interpreter: each kind is its equation, whatever the batch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import correlate2d

import vqref
from vqref import network
from vqref.spec import Layer


def random_layer(kind: str, draw: tuple[int, int, int, int, int, str]) -> Layer:
    channels, filters, size, kernel, stride, padding = draw
    out = -(-size // stride) if padding == "same" else (size - kernel) // stride + 1
    wide, narrow = (channels, size, size), (filters, out, out)
    shapes = (wide, narrow) if kind == "conv" else (narrow, wide)
    return Layer("x.y", kind, *shapes, (kernel, kernel), stride, padding)


GEOMETRY = st.tuples(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(5, 12),
    st.integers(1, 5),
    st.integers(1, 3),
    st.sampled_from(["same", "valid"]),
)


@settings(deadline=None)
@given(geometry=GEOMETRY, seed=st.integers(0, 2**32 - 1))
def test_conv_is_correlation_as_scipy_computes_it(geometry, seed):
    layer, rng = random_layer("conv", geometry), np.random.default_rng(seed)
    weight, bias = (rng.normal(size=p.shape) for p in layer.parameters)
    x = rng.normal(size=(2, *layer.in_shape))
    found = network.conv(layer, x, weight, bias)
    padded = np.pad(x, ((0, 0), (0, 0), *layer.pads))
    for n in range(2):
        for o in range(len(weight)):
            full = sum(correlate2d(padded[n, c], weight[o, c], mode="valid") for c in range(x.shape[1]))
            expected = full[:: layer.stride, :: layer.stride] + bias[o]
            np.testing.assert_allclose(found[n, o], expected, rtol=1e-12, atol=1e-12)


@settings(deadline=None)
@given(geometry=GEOMETRY, seed=st.integers(0, 2**32 - 1))
def test_conv_transpose_is_the_gradient_of_conv(geometry, seed):
    """<conv(x), y> = <x, conv_transpose(y)> for every x and y: the two are each other's adjoint."""
    conv, transpose = random_layer("conv", geometry), random_layer("conv_transpose", geometry)
    if (conv.in_shape[1] - conv.kernel[0] + sum(conv.pads[0])) % conv.stride:
        return  # a valid convolution that leaves pixels over has no transposed row of that size
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=conv.parameters[0].shape)  # (out, in, kh, kw) of one is (in, out, kh, kw) of the other
    assert weight.shape == transpose.parameters[0].shape
    x, y = rng.normal(size=(2, *conv.in_shape)), rng.normal(size=(2, *conv.out_shape))
    forward = (network.conv(conv, x, weight, np.zeros(conv.out_shape[0])) * y).sum()
    backward = (network.conv_transpose(transpose, y, weight, np.zeros(conv.in_shape[0])) * x).sum()
    assert forward == pytest.approx(backward, rel=1e-11, abs=1e-11)


def test_an_impulse_shows_the_kernel_where_same_padding_puts_it():
    """Powers of two, so that the answer is exact: one bright pixel at (4, 4), stride 2, pads (1, 2)."""
    layer = Layer("x.y", "conv", (1, 8, 8), (1, 4, 4), (5, 5), 2, "same")
    weight = 2.0 ** -np.arange(25).reshape(1, 1, 5, 5)
    x = np.zeros((1, 1, 8, 8))
    x[0, 0, 4, 4] = 1
    y = network.conv(layer, x, weight, np.zeros(1))[0, 0]
    expected = np.zeros((4, 4))
    for i in range(4):
        for j in range(4):
            a, b = 4 + 1 - 2 * i, 4 + 1 - 2 * j  # the kernel element that meets the pixel
            if 0 <= a < 5 and 0 <= b < 5:
                expected[i, j] = weight[0, 0, a, b]
    np.testing.assert_array_equal(y, expected)


def test_a_batch_cut_into_pieces_gives_the_same_answer(model, real_images, monkeypatch):
    whole = vqref.encode(model.spec, model.params, real_images)
    monkeypatch.setattr(network, "WINDOW_BYTES", 1)
    pieces = vqref.encode(model.spec, model.params, real_images)
    np.testing.assert_allclose(pieces, whole, rtol=1e-13, atol=1e-13)


def test_an_empty_batch_goes_through(model):
    latents = vqref.encode(model.spec, model.params, np.zeros((0, 1, 28, 28)))
    assert latents.shape == (0, 4, 8)
    assert vqref.decode(model.spec, model.params, latents).shape == (0, 1, 28, 28)
    assert vqref.quantize(latents, model.params["quantizer.codebook"]).indices.shape == (0, 4)


def test_elu_and_sigmoid_neither_overflow_nor_lose_their_ends():
    x = np.array([-1e4, -1.0, -1e-20, 0.0, 1e-20, 2.0, 1e4])
    np.testing.assert_allclose(network.elu(x), [-1, np.expm1(-1), -1e-20, 0, 1e-20, 2, 1e4], rtol=1e-15)
    np.testing.assert_allclose(vqref.sigmoid(x[[0, 3, 6]]), [0, 0.5, 1])
    assert vqref.sigmoid(-700.0) == pytest.approx(np.exp(-700.0), rel=1e-14)


BAD_IMAGES = [
    (np.zeros((2, 1, 28, 27)), r"images: shape is \(2, 1, 28, 27\), expected \(N, 1, 28, 28\)"),
    (np.zeros((28, 28)), "images: shape is"),
    (np.zeros((1, 1, 28, 28), np.uint8), "images: dtype is uint8, expected a floating dtype"),
    (np.full((1, 1, 28, 28), 1.5), r"images: values from 1.5 to 1.5, expected grey levels in \[0, 1\]"),
    (np.full((1, 1, 28, 28), np.nan), r"images: nan at \(0, 0, 0, 0\), expected finite values"),
]


@pytest.mark.parametrize(("images", "message"), BAD_IMAGES)
def test_images_that_do_not_fit_are_named(model, images, message):
    with pytest.raises(ValueError, match=message):
        vqref.encode(model.spec, model.params, images)


def test_missing_extra_and_misshapen_parameters_are_named(model, real_images):
    params = dict(model.params)
    del params["encoder.conv2.bias"]
    with pytest.raises(ValueError, match=r"parameters missing: encoder\.conv2\.bias"):
        vqref.forward(model.spec, params, real_images)
    with pytest.raises(ValueError, match=r"parameters missing: encoder\.conv2\.bias"):
        vqref.encode(model.spec, params, real_images)
    with pytest.raises(ValueError, match=r"unknown to the spec: encoder\.conv9\.bias"):
        vqref.forward(model.spec, {**model.params, "encoder.conv9.bias": np.zeros(4)}, real_images)
    with pytest.raises(ValueError, match=r"encoder\.conv2\.bias: shape is \(5,\), expected \(4,\)"):
        vqref.forward(model.spec, {**model.params, "encoder.conv2.bias": np.zeros(5)}, real_images)
    with pytest.raises(ValueError, match=r"encoder\.conv2\.bias: dtype is int64"):
        vqref.forward(model.spec, {**model.params, "encoder.conv2.bias": np.zeros(4, int)}, real_images)
    with pytest.raises(ValueError, match=r"encoder\.conv2\.bias: inf at \(0,\)"):
        vqref.forward(model.spec, {**model.params, "encoder.conv2.bias": np.full(4, np.inf)}, real_images)
