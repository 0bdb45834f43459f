"""The specification: the table is the post's network, and says everything that follows from it."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vqref
from vqref.spec import CODEBOOK, EMA_COUNT, EMA_MEANS, Layer

POST = [
    ("encoder.conv1", "conv", (32, 1, 5, 5), 1, (32, 28, 28)),
    ("encoder.conv2", "conv", (32, 32, 5, 5), 2, (32, 14, 14)),
    ("encoder.conv3", "conv", (64, 32, 5, 5), 1, (64, 14, 14)),
    ("encoder.conv4", "conv", (64, 64, 5, 5), 2, (64, 7, 7)),
    ("encoder.conv5", "conv", (4, 64, 7, 7), 1, (4, 1, 1)),
    ("encoder.dense", "dense", (16, 4), 1, (16,)),
    ("decoder.deconv1", "conv_transpose", (16, 64, 7, 7), 1, (64, 7, 7)),
    ("decoder.deconv2", "conv_transpose", (64, 64, 5, 5), 1, (64, 7, 7)),
    ("decoder.deconv3", "conv_transpose", (64, 64, 5, 5), 2, (64, 14, 14)),
    ("decoder.deconv4", "conv_transpose", (64, 32, 5, 5), 1, (32, 14, 14)),
    ("decoder.deconv5", "conv_transpose", (32, 32, 5, 5), 2, (32, 28, 28)),
    ("decoder.deconv6", "conv_transpose", (32, 32, 5, 5), 1, (32, 28, 28)),
    ("decoder.conv1", "conv", (1, 32, 5, 5), 1, (1, 28, 28)),
]


def test_default_table_is_the_network_of_the_post():
    rows = [layer for layer in vqref.ModelSpec().layers if layer.kind != "reshape"]
    found = [(r.name, r.kind, r.parameters[0].shape, r.stride, r.out_shape) for r in rows]
    assert found == POST
    linear = [row.name for row in rows if row.activation == "linear"]
    assert linear == ["encoder.dense", "decoder.conv1"]


def test_each_row_starts_where_the_last_one_ended():
    spec = vqref.ModelSpec((3, 16, 24), base_depth=4, latent_size=3, num_codes=5, code_size=6)
    for stage, first, last in ((spec.encoder, (3, 16, 24), (3, 6)), (spec.decoder, (3, 6), (3, 16, 24))):
        assert stage[0].in_shape == first
        assert stage[-1].out_shape == last
        assert all(a.out_shape == b.in_shape for a, b in itertools.pairwise(stage))


def test_stride_two_pads_the_smaller_half_first():
    by_name = {layer.name: layer for layer in vqref.ModelSpec().layers}
    assert by_name["encoder.conv2"].pads == ((1, 2), (1, 2))
    assert by_name["decoder.deconv3"].pads == ((1, 2), (1, 2))
    assert by_name["encoder.conv1"].pads == ((2, 2), (2, 2))
    assert by_name["encoder.conv5"].pads == ((0, 0), (0, 0))


@given(n=st.integers(1, 40), k=st.integers(1, 9), s=st.integers(1, 4))
def test_same_padding_gives_the_size_divided_by_the_stride_rounded_up(n, k, s):
    out = math.ceil(n / s)
    (before, after), _ = Layer("x", "conv", (1, n, n), (1, out, out), (k, k), s, "same").pads
    padded = before + n + after
    assert 0 <= after - before <= 1
    if padded >= k:
        assert (padded - k) // s + 1 == out
    if before + after > 0:
        assert padded == (out - 1) * s + k


def test_parameters_are_those_of_the_golden_files(golden):
    named = {p.name: p.shape for p in golden.spec.parameters}
    recorded = {key.removeprefix("param/"): golden[key].shape for key in golden.arrays if key.startswith("param/")}
    assert named == recorded


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_codes": 0}, "num_codes is 0; it must be an integer from 1"),
        ({"code_size": 2.0}, "code_size is 2.0"),
        ({"latent_size": True}, "latent_size is True"),
        ({"base_depth": 2**30}, "base_depth is 1073741824"),
        ({"image_shape": (28, 28)}, r"image_shape is \(28, 28\); it must be \(channels, height, width\)"),
        ({"image_shape": (1, 30, 28)}, "height and width must be divisible by 4"),
        ({"image_shape": (0, 28, 28)}, r"image_shape\[0\] is 0"),
    ],
)
def test_a_size_that_cannot_be_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        vqref.ModelSpec(**fields)


def test_a_spec_survives_plain_data():
    spec = vqref.ModelSpec((3, 32, 32), 8, 2, 32, 4)
    assert vqref.ModelSpec.from_dict(spec.to_dict()) == spec


def test_plain_data_with_missing_or_unknown_fields_is_refused():
    fields = vqref.ModelSpec().to_dict()
    with pytest.raises(ValueError, match="unknown fields: dilation"):
        vqref.ModelSpec.from_dict({**fields, "dilation": 2})
    del fields["num_codes"]
    with pytest.raises(ValueError, match="lacks num_codes"):
        vqref.ModelSpec.from_dict(fields)
    with pytest.raises(ValueError, match="image_shape is '28'"):
        vqref.ModelSpec.from_dict({**vqref.ModelSpec().to_dict(), "image_shape": "28"})


def test_initial_parameters_follow_the_table():
    spec = vqref.ModelSpec()
    params = vqref.init_params(spec, np.random.default_rng(0))
    again = vqref.init_params(spec, np.random.default_rng(0))
    assert list(params) == [p.name for p in spec.parameters]
    for parameter in spec.parameters:
        array = params[parameter.name]
        assert array.shape == parameter.shape
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, again[parameter.name])
        if parameter.initial == "glorot_uniform":
            assert np.abs(array).max() <= parameter.limit
            deviation = array.std() * math.sqrt(3)  # of a uniform distribution: its half-width
            assert deviation == pytest.approx(parameter.limit, rel=5 / math.sqrt(array.size))
        elif parameter.initial == "zeros":
            assert not array.any()
    np.testing.assert_array_equal(params[EMA_MEANS], params[CODEBOOK])
    assert not params[EMA_COUNT].any()


def test_glorot_limits_count_the_kernel():
    limits = {p.name: p.limit for p in vqref.ModelSpec().parameters}
    assert limits["encoder.conv3.weight"] == pytest.approx(math.sqrt(6 / (25 * 32 + 25 * 64)))
    assert limits["encoder.dense.weight"] == pytest.approx(math.sqrt(6 / (4 + 16)))
    assert limits[CODEBOOK] == pytest.approx(math.sqrt(6 / (64 + 16)))
