"""The interpreters in NumPy and PyTorch: each kind of row is its equation, for any batch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import correlate2d
from support import CPU

import vqref
import vqref.network
import vqtrain.network
from vqref.families import same_pads
from vqref.spec import ACTIVATIONS, KINDS, Layer
from vqtrain import VQVAE


def random_row(kind, draw):
    """A convolution or the transposed one that undoes its shape, from channels to filters."""
    channels, filters, size, kernel, stride, same = draw
    wide, window = (channels, size, size), (kernel, kernel)
    pads = same_pads(wide, window, stride) if same else ((0, 0), (0, 0))
    out = (size + sum(pads[0]) - kernel) // stride + 1
    narrow = (filters, out, out)
    shapes = (wide, narrow) if kind == "conv" else (narrow, wide)
    return Layer("x.y", kind, *shapes, kernel=window, stride=stride, pads=pads)


GEOMETRY = st.tuples(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(5, 12),
    st.integers(1, 5),
    st.integers(1, 3),
    st.booleans(),
)


@settings(deadline=None)
@given(geometry=GEOMETRY, seed=st.integers(0, 2**32 - 1))
def test_conv_is_correlation_as_scipy_computes_it(geometry, seed):
    layer, rng = random_row("conv", geometry), np.random.default_rng(seed)
    weight, bias = (rng.normal(size=shape) for _, shape in layer.parameters)
    x = rng.normal(size=(2, *layer.in_shape))
    found = vqref.network.conv(layer, x, weight, bias)
    padded = np.pad(x, ((0, 0), (0, 0), *layer.pads))
    for n in range(2):
        for o in range(len(weight)):
            full = sum(
                correlate2d(padded[n, c], weight[o, c], mode="valid") for c in range(x.shape[1])
            )
            expected = full[:: layer.stride, :: layer.stride] + bias[o]
            np.testing.assert_allclose(found[n, o], expected, rtol=1e-12, atol=1e-12)


@settings(deadline=None)
@given(geometry=GEOMETRY, seed=st.integers(0, 2**32 - 1))
def test_conv_transpose_is_the_gradient_of_conv(geometry, seed):
    """<conv(x), y> = <x, conv_transpose(y)> for every x and y: each is the other's adjoint."""
    conv = random_row("conv", geometry)
    left_over = (conv.in_shape[1] - conv.kernel[0] + sum(conv.pads[0])) % conv.stride
    if left_over or conv.stride > 2:
        return  # no transposed row has this size or stride
    transpose = random_row("conv_transpose", geometry)
    rng = np.random.default_rng(seed)
    shape = conv.parameters[0][1]  # (out, in, kh, kw) of one is (in, out, kh, kw) of the other
    weight = rng.normal(size=shape)
    assert shape == transpose.parameters[0][1]
    x, y = rng.normal(size=(2, *conv.in_shape)), rng.normal(size=(2, *conv.out_shape))
    forward = vqref.network.conv(conv, x, weight, np.zeros(conv.out_shape[0]))
    backward = vqref.network.conv_transpose(transpose, y, weight, np.zeros(conv.in_shape[0]))
    assert (forward * y).sum() == pytest.approx((backward * x).sum(), rel=1e-11, abs=1e-11)


def test_an_impulse_shows_the_kernel_where_same_padding_puts_it():
    """A bright pixel at (4, 4), stride 2, pads (1, 2). Powers of two make the answer exact."""
    layer = Layer(
        "x.y", "conv", (1, 8, 8), (1, 4, 4), kernel=(5, 5), stride=2, pads=((1, 2), (1, 2))
    )
    weight = np.exp2(-np.arange(25.0)).reshape(1, 1, 5, 5)
    x = np.zeros((1, 1, 8, 8))
    x[0, 0, 4, 4] = 1
    y = vqref.network.conv(layer, x, weight, np.zeros(1))[0, 0]
    expected = np.zeros((4, 4))
    for i in range(4):
        for j in range(4):
            a, b = 4 + 1 - 2 * i, 4 + 1 - 2 * j  # the kernel element at the pixel
            if 0 <= a < 5 and 0 <= b < 5:
                expected[i, j] = weight[0, 0, a, b]
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("depth", [1, 2])
def test_vectors_of_a_grid_are_numbered_row_by_row_group_within_place(depth):
    """Position (i, j, m) of the grid is latent (i*w + j)*g + m."""
    h, w, d = 2, 3, 4
    grid = np.arange(depth * d * h * w, dtype=float).reshape(1, depth * d, h, w)
    row = Layer("x.y", "to_vectors", (depth * d, h, w), (h * w * depth, d))
    back = Layer("x.z", "to_grid", row.out_shape, row.in_shape)
    vectors = vqref.network.to_vectors(row, grid)
    for i in range(h):
        for j in range(w):
            for m in range(depth):
                expected = grid[0, m * d : (m + 1) * d, i, j]
                np.testing.assert_array_equal(vectors[0, (i * w + j) * depth + m], expected)
    np.testing.assert_array_equal(vqref.network.to_grid(back, vectors), grid)


def test_both_interpreters_know_every_kind_and_activation():
    for interpreter in (vqref.network, vqtrain.network):
        assert set(interpreter.KINDS) == set(KINDS)
        assert set(interpreter.ACTIVATIONS) == set(ACTIVATIONS)


def test_a_batch_cut_into_pieces_gives_the_same_answer(model, residual_model, monkeypatch):
    for each in (model, residual_model):
        images = np.random.default_rng(0).random((5, *each.spec.image_shape))
        whole = vqref.encode(each.spec, each.params, images)
        with monkeypatch.context() as patch:
            patch.setattr(vqref.network, "WINDOW_BYTES", 1)
            pieces = vqref.encode(each.spec, each.params, images)
        np.testing.assert_allclose(pieces, whole, rtol=1e-13, atol=1e-13)


def test_an_empty_batch_goes_through(model, residual_model):
    for each in (model, residual_model):
        spec = each.spec
        latents = vqref.encode(spec, each.params, np.zeros((0, *spec.image_shape)))
        assert latents.shape == (0, spec.latent_size, spec.code_size)
        assert vqref.decode(spec, each.params, latents).shape == (0, *spec.output_shape)
        codebook = each.params["quantizer.codebook"]
        assert vqref.quantize(latents, codebook).indices.shape == (0, spec.latent_size)


def test_elu_neither_overflows_nor_loses_its_ends():
    x = np.array([-1e4, -1.0, -1e-20, 0.0, 1e-20, 2.0, 1e4])
    expected = [-1, np.expm1(-1), -1e-20, 0, 1e-20, 2, 1e4]
    np.testing.assert_allclose(vqref.network.elu(x), expected, rtol=1e-15)
    np.testing.assert_array_equal(vqref.network.relu(x), [0, 0, 0, 0, 1e-20, 2, 1e4])
    np.testing.assert_array_equal(vqref.network.linear(x), x)


BAD_IMAGES = [
    (np.zeros((2, 1, 28, 27)), r"images: shape is \(2, 1, 28, 27\), expected \(N, 1, 28, 28\)"),
    (np.zeros((28, 28)), "images: shape is"),
    (np.zeros((1, 1, 28, 28), np.uint8), "images: dtype is uint8, expected a floating dtype"),
    (np.full((1, 1, 28, 28), 1.5), r"images: values from 1.5 to 1.5, expected grey levels in"),
    (np.full((1, 1, 28, 28), np.nan), r"images: nan at \(0, 0, 0, 0\), expected finite values"),
]


@pytest.mark.parametrize(("images", "message"), BAD_IMAGES)
def test_images_that_do_not_fit_are_named(model, images, message):
    with pytest.raises(ValueError, match=message):
        vqref.encode(model.spec, model.params, images)


def test_missing_extra_and_misshapen_parameters_are_named(model, real_images):
    spec, name = model.spec, "encoder.conv2.bias"
    params = dict(model.params)
    del params[name]
    for compute in (vqref.forward, vqref.encode):
        with pytest.raises(ValueError, match=r"parameters missing: encoder\.conv2\.bias"):
            compute(spec, params, real_images)
    for change, message in (
        ({"encoder.conv9.bias": np.zeros(4)}, r"unknown to the spec: encoder\.conv9\.bias"),
        ({name: np.zeros(5)}, r"encoder\.conv2\.bias: shape is \(5,\), expected \(4,\)"),
        ({name: np.zeros(4, int)}, r"encoder\.conv2\.bias: dtype is int64"),
        ({name: np.full(4, np.inf)}, r"encoder\.conv2\.bias: inf at \(0,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            vqref.forward(spec, {**model.params, **change}, real_images)


def test_both_interpreters_agree_on_whole_networks_in_float64(model, residual_model):
    for each in (model, residual_model):
        spec = each.spec
        params = {name: array.astype(np.float64) for name, array in each.params.items()}
        module, rng = VQVAE(spec, params), np.random.default_rng(0)
        images = rng.random((3, *spec.image_shape))
        quantized = rng.normal(size=(3, spec.latent_size, spec.code_size))
        with torch.no_grad():
            latents = module.encoder(torch.from_numpy(images)).numpy()
            outputs = module.decoder(torch.from_numpy(quantized)).numpy()
        for found, expected in (
            (latents, vqref.encode(spec, params, images)),
            (outputs, vqref.decode(spec, params, quantized)),
        ):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def test_a_network_has_a_parameter_for_each_of_the_specs_under_its_name():
    """This holds even for names that PyTorch's modules use themselves."""
    rows = (
        Layer("encoder.half", "dense", (3,), (2,)),
        Layer("encoder.forward.training", "dense", (2,), (2,)),
        Layer("encoder.sum", "add", (2,), (2,), ("encoder.half", "encoder.forward.training")),
    )
    network = vqtrain.network.Network(rows).double()
    named = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert {f"encoder.{name}": shape for name, shape in named.items()} == {
        name: shape for row in rows for name, shape in row.parameters
    }
    for value in network.state_dict().values():
        value.copy_(torch.from_numpy(np.random.default_rng(0).normal(size=tuple(value.shape))))
    x = np.random.default_rng(1).normal(size=(4, 3))
    params = {f"encoder.{name}": value.numpy() for name, value in network.state_dict().items()}
    found = network(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(found, vqref.network.run(rows, params, x), rtol=1e-12, atol=1e-12)


CROPS = st.tuples(st.integers(0, 3), st.integers(0, 3))


@settings(deadline=None, max_examples=200)
@given(
    kernel=st.tuples(st.integers(2, 7), st.integers(2, 7)),
    stride=st.integers(1, 2),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    crops=st.tuples(CROPS, CROPS),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 2**32 - 1),
)
def test_phases_are_the_transposed_convolution_with_its_gradients(
    kernel, stride, size, crops, channels, seed
):
    """Tries even and odd kernels, equal and unequal crops; PyTorch's result, cropped, is right."""
    sides = [stride * (n - 1) + k - sum(c) for n, k, c in zip(size, kernel, crops, strict=True)]
    if min(sides) < 1:
        return
    shapes = (channels[0], *size), (channels[1], *sides)
    row = Layer("x.y", "conv_transpose", *shapes, kernel=kernel, stride=stride, pads=crops)
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(size=(2, *row.in_shape)), *(rng.normal(size=s) for _, s in row.parameters)]
    mine = [torch.from_numpy(array).requires_grad_() for array in arrays]
    theirs = [torch.from_numpy(array).requires_grad_() for array in arrays]
    found = vqtrain.network.conv_transpose(row, *mine)
    x, weight, bias = theirs
    full = F.conv_transpose2d(x, weight, bias, stride)
    (top, _), (left, _) = crops
    expected = full[:, :, top : top + sides[0], left : left + sides[1]]
    assert found.shape == expected.shape == (2, *row.out_shape)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.from_numpy(rng.normal(size=tuple(found.shape)))
    gradients = torch.autograd.grad(found, mine, upstream)
    for gradient, other in zip(
        gradients, torch.autograd.grad(expected, theirs, upstream), strict=True
    ):
        torch.testing.assert_close(gradient, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_phases_serve_both_memory_layouts(layout):
    row = Layer(
        "x.y", "conv_transpose", (8, 4, 6), (4, 8, 12), kernel=(4, 4), stride=2, pads=((1, 1),) * 2
    )
    generator = torch.Generator(CPU).manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((3, 8, 4, 6), row.parameters[0][1], (4,))
    )
    x = x.contiguous(memory_format=layout)
    found = vqtrain.network.conv_transpose(row, x, weight, bias)
    expected = F.conv_transpose2d(x, weight, bias, 2, padding=1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
