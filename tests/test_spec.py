"""The specification as data: what follows from the rows, and which rows are refused."""

import copy
import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vqref
from vqref import families
from vqref.spec import ACTIVATIONS, CODEBOOK, EMA_COUNT, EMA_MEANS, KINDS, Layer, ModelSpec, plan

POST = families.post((1, 8, 8), base_depth=2, latent_size=3, num_codes=5, code_size=2)
RESIDUAL = families.residual(
    (3, 8, 12), hidden=4, blocks=1, block_hidden=2, depth=2, num_codes=6, code_size=3, variance=0.1
)
SPECS = (POST, RESIDUAL)


def test_parameters_are_those_of_the_golden_files(golden):
    named = {p.name: p.shape for p in golden.spec.parameters}
    recorded = {
        key.removeprefix("param/"): golden[key].shape
        for key in golden.arrays
        if key.startswith("param/")
    }
    assert named == recorded


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.family)
def test_initial_parameters_follow_the_rows(spec):
    params = vqref.init_params(spec, np.random.default_rng(0))
    again = vqref.init_params(spec, np.random.default_rng(0))
    assert list(params) == [p.name for p in spec.parameters]
    for parameter in spec.parameters:
        array = params[parameter.name]
        assert array.shape == parameter.shape
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, again[parameter.name])
    np.testing.assert_array_equal(params[EMA_MEANS], params[CODEBOOK])
    assert not params[EMA_COUNT].any()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.family)
def test_a_spec_survives_plain_data_and_json(spec):
    assert ModelSpec.from_dict(spec.to_dict()) == spec
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict(), allow_nan=False))) == spec


PIXELS = st.integers(1, 9)


@st.composite
def rows(draw):
    """Draws a row of any kind, with shapes that follow from the kind."""
    kind, activation = draw(st.sampled_from(list(KINDS))), draw(st.sampled_from(ACTIVATIONS))
    image = (draw(PIXELS), draw(PIXELS), draw(PIXELS))
    fields = {}
    if kind in ("conv", "conv_transpose"):
        fields = {
            "kernel": (draw(st.integers(1, 5)), draw(st.integers(1, 5))),
            "stride": draw(st.integers(1, 3)),
            "pads": tuple((draw(st.integers(0, 3)), draw(st.integers(0, 3))) for _ in "hw"),
        }
        if kind == "conv_transpose":
            fields["stride"] = min(2, fields["stride"])
        out = conv_shape(kind, draw(PIXELS), image, **fields)
        if min(out) < 1:
            kind, fields = "activation", {}
    if kind == "affine":
        number = st.floats(-1e3, 1e3)
        fields = {"scale": draw(number), "shift": draw(number)}
    size, side = draw(PIXELS), image[1] * image[2]
    if kind == "embedding":
        fields = {"num_codes": draw(PIXELS)}
    if kind == "group_norm":
        fields = {"groups": draw(st.sampled_from([n for n in range(1, 9) if image[0] % n == 0]))}
    if kind == "bounded":
        fields = {"levels": tuple(draw(st.integers(3, 9)) for _ in range(size))}
    if kind == "attention":
        fields = {"heads": draw(PIXELS), "causal": draw(st.booleans())}
    wide = (side, size * fields.get("heads", 1))
    vectors = (side * image[0], size)
    shapes = {
        "dense": (image[:1], (size,)),
        "reshape": (image, (side, image[0])),
        "to_vectors": ((image[0] * size, *image[1:]), vectors),
        "to_grid": (vectors, (image[0] * size, *image[1:])),
        "embedding": ((side + 1,), (side + 1, size)),
        "layer_norm": (wide, wide),
        "unit_norm": (wide, wide),
        "bounded": (wide, wide),
        "upsample": (image, (image[0], size * image[1], size * image[2])),
        "attention": (wide, wide),
    }
    first, last = shapes.get(kind, (image, image))
    last = out if kind in ("conv", "conv_transpose") else last
    inputs = draw(st.sampled_from([(), ("a",), ("a", "b")]))
    return Layer("x.row", kind, first, last, inputs, activation, **fields)


def conv_shape(kind, channels, image, kernel, stride, pads):
    """Returns the shape by the formulas of torch.nn.Conv2d and ConvTranspose2d, pads per side."""
    sides = []
    for n, k, p in zip(image[1:], kernel, pads, strict=True):
        wide = n + sum(p) >= k
        shrunk = (n + sum(p) - k) // stride + 1 if wide else 0
        sides.append(shrunk if kind == "conv" else (n - 1) * stride - sum(p) + k)
    return channels, *sides


@given(row=rows())
def test_a_row_survives_plain_data_and_json(row):
    assert Layer.from_dict(row.to_dict()) == row
    assert Layer.from_dict(json.loads(json.dumps(row.to_dict(), allow_nan=False))) == row


def test_a_field_that_came_later_is_in_files_only_where_it_says_something():
    spec = families.vqgan((3, 8, 8), 4, (1,), 1, groups=2, latent_channels=2, code_size=2)
    assert "normalized" not in spec.to_dict()
    assert not ModelSpec.from_dict(spec.to_dict()).normalized
    unit = families.vqgan(
        (3, 8, 8), 4, (1,), 1, groups=2, latent_channels=2, code_size=2, normalized=True
    )
    assert unit.to_dict()["normalized"] is True
    assert ModelSpec.from_dict(json.loads(json.dumps(unit.to_dict()))) == unit


@given(row=rows())
def test_a_row_of_another_result_is_refused(row):
    other = (*row.out_shape[:-1], row.out_shape[-1] + 1)
    if row.kind in ("dense", "embedding"):
        return  # these may have any number of features
    with pytest.raises(ValueError, match=r"x\.row: out_shape is .*, a .* of these sizes gives"):
        dataclasses.replace(row, out_shape=other)


def conv(**fields):
    shapes = (1, 4, 4), (2, 4, 4)
    return Layer("x.y", fields.pop("kind", "conv"), *shapes, **{"kernel": (1, 1), **fields})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Layer("a", "norm", (1,), (1,)), "a: kind is 'norm', expected affine, conv, "),
        (lambda: conv(activation="mish"), r"x\.y: activation is 'mish', expected linear, elu"),
        (lambda: Layer("a", "affine", (), ()), "a: in_shape is None; it must be an integer from 1"),
        (lambda: Layer("a", "affine", (0,), (0,)), "a: in_shape is 0"),
        (lambda: Layer("a", "affine", (2**25,), (2**25,)), "in_shape is 33554432"),
        (lambda: conv(kernel=(5, 5)), r"out_shape is \(2, 4, 4\), a conv of these sizes gives"),
        (lambda: Layer("a", "conv", (4,), (4,)), "a conv of these sizes gives nothing"),
        (lambda: conv(kind="conv_transpose", stride=3), "conv_transpose of these sizes gives n"),
        (lambda: conv(stride=0), r"x\.y: stride is 0; it must be an integer from 1"),
        (lambda: conv(pads=(1, 1)), r"x\.y: pads is \(1, 1\), expected two pairs of pixels"),
        (lambda: conv(scale=float("nan")), r"x\.y: scale is nan; it must be a number within"),
        (lambda: Layer("a", "dense", (2, 2), (4,)), r"a dense of these sizes gives \(2, 4\)"),
        (lambda: Layer("a", "dense", (2, 2, 2), (4,)), "a dense of these sizes gives nothing"),
        (lambda: Layer("a", "embedding", (1,), (1, 3)), "embedding of these sizes gives nothing"),
        (lambda: Layer("a", "layer_norm", (3,), (3,)), "layer_norm of these sizes gives nothing"),
        (
            lambda: Layer("a", "attention", (2, 6), (2, 6), ("b", "c", "d"), heads=4),
            "an? attention of these sizes gives nothing",
        ),
        (
            lambda: Layer("a", "group_norm", (6, 2, 2), (6, 2, 2), groups=4),
            "a group_norm of these sizes gives nothing",
        ),
        (lambda: Layer("a", "group_norm", (6, 2), (6, 2)), "a group_norm of these sizes gives no"),
        (lambda: Layer("a", "unit_norm", (3,), (3,)), "a unit_norm of these sizes gives nothing"),
        (lambda: Layer("a", "bounded", (4, 2), (4, 2), levels=(3,)), "a bounded .* gives nothing"),
        (lambda: Layer("a", "bounded", (4, 2), (4, 2), levels=(3, 2)), "bounded .* gives nothing"),
        (lambda: Layer("a", "bounded", (4, 2), (4, 2), levels=(3, 0)), "levels is 0; it must be"),
        (
            lambda: Layer("a", "bounded", (4, 2), (4, 2), levels=(3, "x")),  # type: ignore[arg-type]
            "levels is 'x'; it must",
        ),
        (lambda: Layer("a", "upsample", (2, 3, 3), (2, 6, 9)), r"upsample of .* \(2, 6, 6\)"),
        (lambda: Layer("a", "upsample", (2, 3, 3), (3, 6, 6)), r"upsample of .* \(2, 6, 6\)"),
        (lambda: Layer("a", "upsample", (2, 3, 3), (2, 2, 2)), "an? upsample of .* gives nothing"),
        (lambda: conv(groups=0), r"x\.y: groups is 0; it must be an integer from 1"),
        (lambda: conv(heads=0), r"x\.y: heads is 0; it must be an integer from 1"),
        (lambda: conv(causal=1), r"x\.y: causal is 1, expected bool"),
        (lambda: conv(num_codes=True), r"x\.y: num_codes is True, expected int"),
        (lambda: Layer("a", "reshape", (2, 2), (5,)), "a reshape of these sizes gives nothing"),
        (lambda: Layer("a", "to_vectors", (3, 2, 2), (6, 2)), "to_vectors of these sizes gives n"),
        (lambda: Layer("a", "to_grid", (4, 3), (4, 1, 3)), "a to_grid of these sizes gives nothi"),
    ],
)
def test_a_row_that_cannot_be_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def add_row(fields, **row):
    """Returns plain data of a spec with one more row at the decoder's end, of the same shape."""
    shape = fields["decoder"][-1]["out_shape"]
    kept = {"name": "decoder.more", "kind": "activation", "in_shape": shape, "out_shape": shape}
    fields["decoder"].append({**kept, **row})


def nested(depth):
    return [nested(depth - 1)] if depth else []


BAD_FIELDS = {
    "no table": (lambda f: f.clear() or f.update(x=1), "the spec lacks code_size, decoder"),
    "an unknown field": (lambda f: f.update(dilation=2), "unknown fields: dilation"),
    "a missing field": (lambda f: f.pop("num_codes"), "the spec lacks num_codes"),
    "a missing newer field": (lambda f: f.pop("variance"), "the spec lacks variance"),
    "a string for a shape": (lambda f: f.update(image_shape="28"), "image_shape is '28'"),
    "an image without channels": (lambda f: f.update(image_shape=[28, 28]), "expected .channels"),
    "a number for a name": (lambda f: f.update(family=3), "family is 3, expected str"),
    "a fraction for a size": (lambda f: f.update(num_codes=2.0), "num_codes is 2.0, expected int"),
    "a truth for a size": (lambda f: f.update(code_size=True), "code_size is True"),
    "no codes": (lambda f: f.update(num_codes=0), "num_codes is 0; it must be an integer from 1"),
    "codes without end": (lambda f: f.update(num_codes=2**25), "num_codes is 33554432"),
    "four axes of latents": (lambda f: f.update(latent_shape=[1, 1, 1, 3]), "latent_shape is"),
    "other latents": (lambda f: f.update(latent_shape=[4]), r"encoder maps .* expected .*\(4, 2\)"),
    "an unknown likelihood": (lambda f: f.update(likelihood="t"), "likelihood is 't', expected be"),
    "a wider likelihood": (lambda f: f.update(likelihood="logistic"), "the decoder maps"),
    "an unknown start": (lambda f: f.update(initial="he"), "initial is 'he'"),
    "no variance": (lambda f: f.update(variance=0), "variance is 0, expected a positive number"),
    "a variance that is no number": (lambda f: f.update(variance=float("nan")), "variance is nan"),
    "a huge variance": (lambda f: f.update(variance=10**400), "variance is 1000"),
    "an empty range": (lambda f: f.update(value_range=[1, 1]), r"value_range is \(1, 1\)"),
    "half a range": (lambda f: f.update(value_range=[1]), "value_range is .*two numbers"),
    "a huge range": (lambda f: f.update(value_range=[0, 10**400]), "value_range is"),
    "no rows": (lambda f: f.update(encoder=[]), "the encoder has 0 rows"),
    "rows that are a table": (lambda f: f.update(encoder={}), "the encoder is not a list"),
    "too many rows": (lambda f: f.update(encoder=[None] * 5000), "not a list of at most 4096 rows"),
    "a row that is a number": (lambda f: f["encoder"].append(3), "a row is 3, expected a table"),
    "a row without a name": (lambda f: f["encoder"][0].pop("name"), "expected a table with a name"),
    "a row without a kind": (lambda f: f["encoder"][0].pop("kind"), r"encoder\.conv1: lacks kind"),
    "a row's unknown field": (
        lambda f: add_row(f, dilation=2),
        r"decoder\.more: unknown fields: di",
    ),
    "an unknown kind": (lambda f: add_row(f, kind="norm"), r"decoder\.more: kind is 'norm'"),
    "an unknown activation": (lambda f: add_row(f, activation="mish"), "activation is 'mish'"),
    "a name of two lines": (lambda f: add_row(f, name="decoder.a\nb"), r"named 'decoder\.a\\nb'"),
    "an empty word": (lambda f: add_row(f, name="decoder..a"), r"named 'decoder\.\.a', expected w"),
    "a name within a row": (lambda f: add_row(f, name="decoder.conv1.weight"), "lies within the n"),
    "a family of two lines": (lambda f: f.update(family="a\nb"), r"'a\\nb' is not a name"),
    "a field of two lines": (lambda f: f.update({"a\nb": 1}), r"unknown fields: a\\nb"),
    "lists without end": (lambda f: f.update(latent_shape=nested(600)), "latent_shape is"),
    "a list for a kind": (lambda f: add_row(f, kind=["add"]), "kind is .*expected str"),
    "a name twice": (lambda f: add_row(f, name="decoder.conv1"), "two rows have one name"),
    "a name of the other network": (lambda f: add_row(f, name="encoder.z"), r"begins with decoder"),
    "a later row": (lambda f: add_row(f, inputs=["decoder.more"]), "expected earlier rows"),
    "an unheard-of row": (lambda f: add_row(f, inputs=["decoder.z"]), "expected earlier rows"),
    "an input too many": (
        lambda f: add_row(f, inputs=["decoder.conv1", "decoder.conv1"]),
        "takes 2 inputs",
    ),
    "an input too few": (lambda f: add_row(f, kind="add"), "takes 1 inputs"),
    "an input of another shape": (lambda f: add_row(f, inputs=["decoder.pixel"]), "its input is"),
    "a number for an input": (
        lambda f: add_row(f, inputs=[1]),
        "1 is not a name, expected words and dots",
    ),
    "a row out of the chain": (lambda f: f["encoder"].pop(1), r"in_shape is .*, its input is"),
    "one side of a kernel": (lambda f: add_row(f, kernel=[3]), "kernel is .*expected two numbers"),
    "no kernel": (lambda f: add_row(f, kernel=[0, 1]), "kernel is 0"),
    "no stride": (lambda f: add_row(f, stride=0), "stride is 0"),
    "one pad": (lambda f: add_row(f, pads=[1, 1]), "pads is .*expected two pairs"),
    "pads below nothing": (lambda f: add_row(f, pads=[[0, -1], [0, 0]]), "pads is"),
    "a scale that is no number": (lambda f: add_row(f, scale=float("nan")), "scale is nan"),
    "a shift without end": (lambda f: add_row(f, shift=float("inf")), "shift is inf"),
}


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_plain_data_that_is_no_spec_is_refused_in_one_line(case):
    change, message = BAD_FIELDS[case]
    fields = POST.to_dict()
    change(fields)
    with pytest.raises(ValueError, match=message) as caught:
        ModelSpec.from_dict(fields)
    assert len(str(caught.value).splitlines()) == 1


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
NUMBERS = st.integers(-1, 9) | st.sampled_from([2**24, 2**25, 10**400, 0.5, float("nan")])
JSON = st.recursive(
    SCALARS | NUMBERS,
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=4), part),
    max_leaves=6,
)


@st.composite
def mutated(draw):
    """Draws the plain data of a spec after a few changes anywhere in it."""
    fields = copy.deepcopy(draw(st.sampled_from(SPECS)).to_dict())
    for _ in range(draw(st.integers(1, 3))):
        place = fields
        while True:
            if not place:
                break
            keys = list(place) if isinstance(place, dict) else range(len(place))
            key = draw(st.sampled_from(keys))
            inner = place[key]
            if isinstance(inner, dict | list) and draw(st.integers(0, 5)):
                place = inner
                continue
            change = draw(st.sampled_from(["replace", "drop", "another", "copy", "swap"]))
            other = draw(st.sampled_from(keys))
            if change == "replace":
                place[key] = draw(NUMBERS | JSON)
            elif change == "drop":
                del place[key]
            elif change == "swap":
                place[key], place[other] = place[other], place[key]
            elif isinstance(place, list):
                place.insert(key, draw(JSON) if change == "another" else copy.deepcopy(inner))
            elif change == "another":
                place[draw(st.text(max_size=4) | st.integers())] = draw(JSON)
            break
    return fields


@settings(max_examples=400, deadline=None)
@given(fields=mutated() | JSON)
def test_whatever_plain_data_holds_it_is_a_spec_or_a_value_error(fields):
    message = "it is a spec"
    try:
        spec = ModelSpec.from_dict(fields)
    except ValueError as error:
        message = str(error)
        spec = POST
    assert len(message.splitlines()) == 1
    assert message.isprintable()
    assert ModelSpec.from_dict(spec.to_dict()) == spec
    assert all(p.shape for p in spec.parameters)


@st.composite
def graphs(draw):
    """Draws rows of one shape; each reads the row before or any earlier rows, in any order."""
    layers = [Layer("x.r0", "affine", (2,), (2,))]
    for i in range(1, draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(["affine", "activation", "add"]))
        earlier = st.sampled_from([layer.name for layer in layers])
        named = kind == "add" or draw(st.booleans())
        inputs = tuple(draw(earlier) for _ in range(KINDS[kind].inputs)) if named else ()
        layers.append(Layer(f"x.r{i}", kind, (2,), (2,), inputs))
    return tuple(layers)


@given(layers=graphs())
def test_a_value_is_freed_by_the_last_row_that_reads_it_and_by_no_other(layers):
    steps = plan(layers)
    assert [step.layer for step in steps] == list(layers)
    values = {layer.name: number for number, layer in enumerate(layers, 1)}
    held = {0}
    for number, step in enumerate(steps, 1):
        inputs = step.layer.inputs
        assert step.sources == (tuple(values[name] for name in inputs) or (number - 1,))
        assert set(step.sources) <= held
        later = {source for other in steps[number:] for source in other.sources}
        assert set(step.spent) == set(step.sources) - later
        assert len(set(step.spent)) == len(step.spent)
        held = held - set(step.spent) | {number}
    read = {source for step in steps for source in step.sources}
    assert held == set(range(len(steps) + 1)) - read


def test_rows_that_read_each_other_in_any_order_are_planned():
    def row(name, kind, *inputs):
        return Layer(f"x.{name}", kind, (2,), (2,), tuple(f"x.{i}" for i in inputs))

    steps = plan([row("a", "affine"), row("b", "affine"), row("c", "add", "b", "a")])
    assert [step.sources for step in steps] == [(0,), (1,), (2, 1)]
    assert [step.spent for step in steps] == [(0,), (), (1, 2)]
    with pytest.raises(ValueError, match=r"x\.c: takes x\.b, x\.d, expected earlier rows"):
        plan(
            [row("a", "affine"), row("b", "affine"), row("c", "add", "b", "d"), row("d", "affine")]
        )
