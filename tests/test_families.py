"""The families: their rows are the published networks, for all sizes."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vqref
from vqref import families
from vqref.families import FAMILIES, choose, make, of_parameters, same_pads, sizes, spelt
from vqref.likelihoods import LIKELIHOODS
from vqref.spec import CODEBOOK

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
RESIDUAL = [
    ("encoder.down1", "conv", (64, 3, 4, 4), 2, (64, 16, 16), "relu"),
    ("encoder.down2", "conv", (128, 64, 4, 4), 2, (128, 8, 8), "relu"),
    ("encoder.conv", "conv", (128, 128, 3, 3), 1, (128, 8, 8), "relu"),
    ("encoder.block1.conv3", "conv", (32, 128, 3, 3), 1, (32, 8, 8), "relu"),
    ("encoder.block1.conv1", "conv", (128, 32, 1, 1), 1, (128, 8, 8), "linear"),
    ("encoder.block2.conv3", "conv", (32, 128, 3, 3), 1, (32, 8, 8), "relu"),
    ("encoder.block2.conv1", "conv", (128, 32, 1, 1), 1, (128, 8, 8), "linear"),
    ("encoder.to_latents", "conv", (64, 128, 1, 1), 1, (64, 8, 8), "linear"),
    ("decoder.conv", "conv", (128, 64, 3, 3), 1, (128, 8, 8), "linear"),
    ("decoder.block1.conv3", "conv", (32, 128, 3, 3), 1, (32, 8, 8), "relu"),
    ("decoder.block1.conv1", "conv", (128, 32, 1, 1), 1, (128, 8, 8), "linear"),
    ("decoder.block2.conv3", "conv", (32, 128, 3, 3), 1, (32, 8, 8), "relu"),
    ("decoder.block2.conv1", "conv", (128, 32, 1, 1), 1, (128, 8, 8), "linear"),
    ("decoder.up1", "conv_transpose", (128, 64, 4, 4), 2, (64, 16, 16), "relu"),
    ("decoder.up2", "conv_transpose", (64, 3, 4, 4), 2, (3, 32, 32), "linear"),
]


def weighted(spec):
    """Returns name, kind, weight, stride, result and activation of every row with a weight."""
    rows = [row for row in spec.layers if row.parameters]
    return [(r.name, r.kind, r.parameters[0][1], r.stride, r.out_shape, r.activation) for r in rows]


def test_the_default_post_is_the_network_of_the_post():
    found = weighted(families.post())
    assert [row[:5] for row in found] == POST
    linear = [row[0] for row in found if row[5] == "linear"]
    assert linear == ["encoder.dense", "decoder.conv1"]
    assert {row[5] for row in found} == {"elu", "linear"}
    assert families.post().likelihood == "bernoulli"


def test_the_default_residual_is_sonnets_network_on_cifar():
    spec = families.residual()
    assert weighted(spec) == RESIDUAL
    assert (spec.latent_shape, spec.num_codes, spec.code_size) == ((8, 8), 512, 64)
    assert (spec.likelihood, spec.value_range, spec.initial) == ("gaussian", (-0.5, 0.5), "fan_in")
    centre = spec.encoder[0]
    assert (centre.kind, centre.scale, centre.shift) == ("affine", 1.0, -0.5)


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_a_residual_block_adds_to_its_input_and_the_last_sum_is_rectified(blocks):
    spec = families.residual((3, 8, 8), hidden=4, blocks=blocks, block_hidden=2)
    for name, rows in (("encoder", spec.encoder), ("decoder", spec.decoder)):
        sums = [row for row in rows if row.kind == "add"]
        assert [row.name for row in sums] == [f"{name}.block{i}.sum" for i in range(1, blocks + 1)]
        by_name = {row.name: row for row in rows}
        before = f"{name}.conv"
        for i, row in enumerate(sums, 1):
            assert row.inputs == (before, f"{name}.block{i}.conv1")
            rectified = rows[rows.index(by_name[f"{name}.block{i}.conv3"]) - 1]
            assert rectified.activation == "relu"
            before = row.name
        if blocks:
            assert [row.activation for row in sums] == ["linear"] * (blocks - 1) + ["relu"]


def test_blocks_compute_what_the_paper_says():
    """A block is h + conv1(relu(conv3(relu(h)))). One image and channel, kernels that show taps."""
    spec = families.residual(
        (1, 2, 2), hidden=2, blocks=2, block_hidden=1, downsample=2, code_size=2, num_codes=2
    )
    params = {p.name: np.zeros(p.shape) for p in spec.parameters}
    params["encoder.down1.bias"][:] = [1.0, 2.0]
    params["encoder.conv.weight"][:, :, 1, 1] = [[-1.0, 0.0], [0.0, 1.0]]  # its relu: (0, 2)
    params["encoder.conv.bias"][:] = [0.5, 1.0]  # so h is (0, 3) after the relu
    for block in (1, 2):
        params[f"encoder.block{block}.conv3.weight"][0, :, 1, 1] = [1.0, 2.0]
        params[f"encoder.block{block}.conv1.weight"][:, 0, 0, 0] = [1.0, -1.0]
    params["encoder.to_latents.weight"][:, :, 0, 0] = np.eye(2)
    # block 1: relu h = (0, 3), inner 6, h = (6, -3); block 2: relu h = (6, 0), inner 6,
    # h = (12, -9), and the last relu leaves (12, 0)
    latents = vqref.encode(spec, params, np.zeros((1, 1, 2, 2)))
    np.testing.assert_array_equal(latents, [[[12.0, 0.0]]])


SIZES: dict[str, dict[str, Any]] = {
    "post": {"base_depth": 2, "latent_size": 3},
    "residual": {"hidden": 4, "blocks": 1, "block_hidden": 2, "depth": 2},
    "vqgan": {
        "channels": 4,
        "multipliers": (1, 1, 2),
        "blocks": 1,
        "attention": (4, 8, 16),
        "groups": 2,
        "latent_channels": 3,
    },
}
LATENTS = {"post": lambda h, w: (3,), "residual": lambda h, w: (h, w, 2)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@given(channels=st.integers(1, 4), h=st.integers(1, 6), w=st.integers(1, 6))
def test_each_row_starts_where_its_input_ended(family, likelihood, channels, h, w):
    image = (channels, 4 * h, 4 * w)
    spec = FAMILIES[family](image, num_codes=5, code_size=6, likelihood=likelihood, **SIZES[family])
    outputs = (LIKELIHOODS[likelihood].parameters * channels, *image[1:])
    vectors = (spec.latent_size, 6)
    assert spec.output_shape == outputs
    assert spec.latent_shape == LATENTS.get(family, lambda h, w: (h, w))(h, w)
    for rows, first, last in ((spec.encoder, image, vectors), (spec.decoder, vectors, outputs)):
        assert rows[0].in_shape == first
        assert rows[-1].out_shape == last
        chained = [(a, b) for a, b in itertools.pairwise(rows) if not b.inputs]
        assert all(a.out_shape == b.in_shape for a, b in chained)


@pytest.mark.parametrize(("downsample", "downs"), [(2, [8]), (4, [4, 8]), (8, [4, 8, 8])])
def test_downsampling_is_a_power_of_two_and_the_first_of_several_rows_is_narrow(downsample, downs):
    spec = families.residual((3, 16, 16), hidden=8, downsample=downsample, block_hidden=2)
    found = {row.name: row for row in spec.layers}
    side = 16 // downsample
    assert spec.latent_shape == (side, side)
    assert [found[f"encoder.down{i}"].out_shape[0] for i in range(1, len(downs) + 1)] == downs
    ups = [found[f"decoder.up{i}"].out_shape[0] for i in range(1, len(downs) + 1)]
    assert ups == [4] * (len(downs) - 1) + [3]


def test_stride_two_pads_the_smaller_half_first():
    by_name = {layer.name: layer for layer in families.post().layers}
    assert by_name["encoder.conv2"].pads == ((1, 2), (1, 2))
    assert by_name["decoder.deconv3"].pads == ((1, 2), (1, 2))
    assert by_name["encoder.conv1"].pads == ((2, 2), (2, 2))
    assert by_name["encoder.conv5"].pads == ((0, 0), (0, 0))


@given(n=st.integers(1, 40), k=st.integers(1, 9), s=st.integers(1, 4))
def test_same_padding_gives_the_size_divided_by_the_stride_rounded_up(n, k, s):
    out = math.ceil(n / s)
    (before, after), _ = same_pads((1, n, n), (k, k), s)
    padded = before + n + after
    assert 0 <= after - before <= 1
    if padded >= k:
        assert (padded - k) // s + 1 == out
    if before + after > 0:
        assert padded == (out - 1) * s + k


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("post", {"num_codes": 0}, "num_codes is 0; it must be an integer from 1"),
        ("post", {"code_size": 2.0}, "code_size is 2.0"),
        ("post", {"latent_size": True}, "latent_size is True"),
        ("post", {"base_depth": 2**30}, "base_depth is 1073741824"),
        ("post", {"image_shape": (28, 28)}, r"it must be \(channels, height, width\)"),
        ("post", {"image_shape": (1, 30, 28)}, "height and width must be divisible by 4"),
        ("post", {"image_shape": (0, 28, 28)}, r"image_shape\[0\] is 0"),
        ("post", {"likelihood": "poisson"}, "likelihood is 'poisson', expected bernoulli, gauss"),
        ("residual", {"hidden": 7}, "hidden is 7; it must be even"),
        ("residual", {"downsample": 6}, "downsample is 6; it must be a power of two above 1"),
        ("residual", {"downsample": 1}, "downsample is 1; it must be a power of two above 1"),
        ("residual", {"downsample": 0}, "downsample is 0"),
        ("residual", {"downsample": 8, "image_shape": (3, 36, 32)}, "must be divisible by 8"),
        ("residual", {"blocks": -1}, r"blocks is -1|blocks \+ 1 is 0"),
        ("residual", {"depth": 0}, "depth is 0"),
        ("vqgan", {"channels": 48}, "groups is 32; it must divide the 48 channels of a level"),
        ("vqgan", {"multipliers": ()}, r"multipliers are \(\); there must be 1 to 10"),
        ("vqgan", {"multipliers": (1,) * 11}, "there must be 1 to 10"),
        ("vqgan", {"multipliers": [1, 2]}, r"multipliers is \[1, 2\], expected a tuple of inte"),
        ("vqgan", {"multipliers": (1, 0)}, "multipliers is 0; it must be an integer from 1"),
        ("vqgan", {"attention": (16.0,)}, "attention is 16.0; it must be an integer from 1"),
        ("vqgan", {"blocks": 0}, "blocks is 0; it must be an integer from 1"),
        ("vqgan", {"groups": 0}, "groups is 0; it must be an integer from 1"),
        ("vqgan", {"latent_channels": 0}, "latent_channels is 0; it must be an integer from 1"),
        ("vqgan", {"image_shape": (3, 40, 32)}, "height and width must be divisible by 16"),
        ("residual", {"variance": -1.0}, "variance is -1.0, expected a positive number"),
    ],
)
def test_a_size_that_cannot_be_is_refused_by_name(family, fields, message):
    with pytest.raises(ValueError, match=message):
        FAMILIES[family](**fields)


def test_sizes_of_several_numbers_are_spelt_as_the_command_line_has_them():
    assert [spelt(size) for size in (3, True, (), (16,), (1, 2))] == [3, True, "none", "16", "1,2"]


def test_the_default_vqgan_is_the_published_one_of_16_pixels_to_a_latent():
    """The sizes are those of taming-transformers' configuration for ImageNet."""
    spec = families.vqgan()
    assert (spec.latent_shape, spec.num_codes, spec.code_size) == ((16, 16), 1024, 256)
    assert (spec.value_range, spec.likelihood, spec.normalized) == ((-1.0, 1.0), "gaussian", False)
    scale = spec.encoder[0]
    assert (scale.name, scale.scale, scale.shift) == ("encoder.scale", 2.0, -1.0)
    found = {row.name: row for row in spec.layers}
    widths = [found[f"encoder.level{i}.block2.sum"].out_shape for i in range(1, 6)]
    assert widths == [(128, 256, 256), (128, 128, 128), (256, 64, 64), (256, 32, 32), (512, 16, 16)]
    attended = [name for name in found if name.endswith(".attention")]
    levels = [f"encoder.level5.attention{j}" for j in (1, 2)]
    levels += [f"decoder.level5.attention{j}" for j in (1, 2, 3)]
    middles = [f"{side}.middle.attention" for side in ("encoder", "decoder")]
    assert {*attended} == {f"{name}.attention" for name in levels + middles}
    assert {found[name].heads for name in attended} == {1}
    assert not any(found[name].causal for name in attended)
    norms = [row for row in spec.layers if row.kind == "group_norm"]
    assert {row.groups for row in norms} == {32}
    plain = {row.name.rsplit(".", 1)[1] for row in norms if row.activation == "linear"}
    assert plain == {"norm"}
    assert {row.activation for row in norms} == {"linear", "silu"}


def test_a_vqgan_halves_with_zeros_on_the_right_and_below_and_doubles_by_copies():
    spec = families.vqgan((3, 32, 32), **SIZES["vqgan"], num_codes=8, code_size=4)
    found = {row.name: row for row in spec.layers}
    for i in (1, 2):
        down, up = found[f"encoder.level{i}.down"], found[f"decoder.level{i + 1}.upsample"]
        assert (down.kernel, down.stride, down.pads) == ((3, 3), 2, ((0, 1), (0, 1)))
        assert up.out_shape[1:] == tuple(2 * side for side in up.in_shape[1:])
        assert up.in_shape[0] == found[f"decoder.level{i + 1}.up"].out_shape[0]
    assert "encoder.level3.down" not in found
    assert "decoder.level1.up" not in found
    shortcuts = [name.removesuffix(".shortcut") for name in found if name.endswith("shortcut")]
    assert shortcuts == ["encoder.level3.block1", "decoder.level2.block1"]
    for name in shortcuts:
        before = found[f"{name}.norm1"].in_shape
        assert found[f"{name}.shortcut"].in_shape == before
        assert found[f"{name}.sum"].inputs == (f"{name}.shortcut", f"{name}.conv2")


def test_attention_goes_by_the_longer_side_and_the_middles_can_be_left_out():
    sizes = {**SIZES["vqgan"], "attention": (8,), "num_codes": 8, "code_size": 4}
    spec = families.vqgan((3, 16, 8), **sizes, middle_attention=False)
    attended = [row for row in spec.layers if row.kind == "attention"]
    assert {row.name.split(".")[1] for row in attended} == {"level2"}
    assert {row.in_shape for row in attended} == {(32, 4)}


def test_a_normalized_vqgan_ends_its_encoder_on_the_sphere_and_starts_with_unit_codes():
    sizes = {**SIZES["vqgan"], "num_codes": 8, "code_size": 4}
    spec = families.vqgan((3, 8, 8), **sizes, normalized=True)
    params = vqref.init_params(spec, np.random.default_rng(0))
    np.testing.assert_allclose(np.linalg.norm(params[CODEBOOK], axis=1), 1, rtol=1e-6)
    latents = vqref.encode(spec, params, np.random.default_rng(1).random((2, 3, 8, 8)))
    np.testing.assert_allclose(np.linalg.norm(latents, axis=2), 1, rtol=1e-14)
    assert spec.encoder[-1].name == "encoder.unit"
    with pytest.raises(ValueError, match=r"encoder\.latents: is a to_vectors; an encoder of a nor"):
        dataclasses.replace(spec, encoder=spec.encoder[:-1])


@pytest.mark.parametrize(
    ("image_shape", "family"),
    [
        ((1, 28, 28), "post"),
        ((1, 32, 32), "post"),
        ((1, 32, 36), "residual"),
        ((3, 28, 28), "residual"),
    ],
)
def test_auto_takes_the_post_for_small_grey_images(image_shape, family):
    assert choose(image_shape) == family


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sizes_of_a_family_are_its_arguments_with_their_defaults(family):
    found = sizes(family)
    assert set(found) >= {"num_codes", "code_size"}
    assert not set(found) & {"image_shape", "likelihood", "variance", "channels"}
    default = FAMILIES[family]()
    assert make(family, default.image_shape, found) == default


@given(
    channels=st.integers(1, 3),
    h=st.integers(1, 8),
    w=st.integers(1, 8),
    small=st.tuples(*[st.integers(1, 6)] * 4),
)
def test_a_post_is_found_again_from_the_shapes_of_its_parameters(channels, h, w, small):
    spec = families.post((channels, 4 * h, 4 * w), *small)
    assert of_parameters({p.name: p.shape for p in spec.parameters}) == spec


def test_parameters_that_are_no_post_are_refused_by_name():
    shapes = {p.name: p.shape for p in families.post().parameters}
    with pytest.raises(ValueError, match="not those of family post"):
        of_parameters({p.name: p.shape for p in families.residual().parameters})
    with pytest.raises(ValueError, match=r"encoder\.dense\.bias: shape is None, expected \(16,\)"):
        of_parameters({n: s for n, s in shapes.items() if n != "encoder.dense.bias"})
    with pytest.raises(ValueError, match=r"encoder\.dense\.bias: shape is \(3,\), expected"):
        of_parameters({**shapes, "encoder.dense.bias": (3,)})
    with pytest.raises(ValueError, match="unknown parameters: more"):
        of_parameters({**shapes, "more": (3,)})


def test_glorot_limits_count_the_kernel():
    """Glorot and Bengio (2010), equation 16: a uniform distribution in ±sqrt(6 / (in + out))."""
    limits = {p.name: p for p in families.post().parameters}
    assert limits["encoder.conv3.weight"].scale == pytest.approx(math.sqrt(6 / (25 * 32 + 25 * 64)))
    assert limits["encoder.dense.weight"].scale == pytest.approx(math.sqrt(6 / (4 + 16)))
    assert limits[CODEBOOK].scale == pytest.approx(math.sqrt(6 / (64 + 16)))
    params = vqref.init_params(families.post(), np.random.default_rng(0))
    for parameter in families.post().parameters:
        array = params[parameter.name]
        if parameter.initial == "uniform":
            assert np.abs(array).max() <= parameter.scale
            deviation = array.std() * math.sqrt(3)  # the half-width of a uniform distribution
            assert deviation == pytest.approx(parameter.scale, rel=5 / math.sqrt(array.size))
        elif parameter.initial == "zeros":
            assert not array.any()


def test_sonnets_weights_start_normal_and_cut_off_at_two_deviations():
    """Sonnet's default is a truncated normal of deviation 1 / sqrt(fan-in).

    Its codebook is uniform in ±sqrt(3 / D), which is the variance scaling of a (D, K) variable.
    """
    spec = families.residual()
    params = vqref.init_params(spec, np.random.default_rng(0))
    for parameter in spec.parameters:
        array = params[parameter.name]
        if parameter.initial == "truncated_normal":
            transposed = parameter.name.startswith("decoder.up")
            fan_in = math.prod(parameter.shape) / parameter.shape[1 if transposed else 0]
            assert parameter.scale == pytest.approx(1 / math.sqrt(fan_in))
            assert np.abs(array).max() <= 2 * parameter.scale
            # cut off at two deviations, a normal distribution keeps .8796 of its deviation
            expected = 0.8796 * parameter.scale
            assert array.std() == pytest.approx(expected, rel=5 / math.sqrt(array.size))
    assert np.abs(params[CODEBOOK]).max() <= math.sqrt(3 / 64)
    assert params[CODEBOOK].std() == pytest.approx(math.sqrt(1 / 64), rel=0.02)
