"""What is done to pictures, as plain data: it is read back unchanged, or refused with a reason."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqref.preprocessing import CHANNELS, WHITE, Preprocessing, parse_colour

LEVEL = st.integers(0, 255)
COLOURS = st.tuples(LEVEL, LEVEL, LEVEL)
SIZES = st.tuples(st.integers(1, 5000), st.integers(1, 5000))

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
"""Anything that a manifest can say."""

GOOD: dict[str, Any] = {"size": [28, 32], "crop": True, "channels": 1, "background": "#00ff7f"}
SHAPE = (1, 28, 32)


@st.composite
def preprocessings(draw):
    size = draw(st.none() | SIZES)
    crop = size is not None and draw(st.booleans())
    return Preprocessing(draw(st.integers(1, 9)), size, crop, draw(COLOURS))


def shape_of(preprocessing):
    return (preprocessing.channels, *(preprocessing.size or (7, 9)))


@given(preprocessings())
def test_plain_data_give_the_same_preprocessing(preprocessing):
    data = json.loads(json.dumps(preprocessing.to_dict()))
    assert Preprocessing.from_dict(data, shape_of(preprocessing)) == preprocessing


@given(COLOURS)
def test_a_colour_is_parsed_as_it_is_written(colour):
    assert parse_colour("#{:02x}{:02x}{:02x}".format(*colour)) == colour


@given(PLAIN)
def test_any_other_data_are_refused(data):
    if data is None:
        assert Preprocessing.from_dict(data, SHAPE) == Preprocessing(1)
        return
    with pytest.raises(ValueError, match="preprocessing is "):
        Preprocessing.from_dict(data, SHAPE)


@given(st.sampled_from(sorted(GOOD)), PLAIN)
def test_any_other_value_is_refused_with_its_name(name, value):
    data = {**GOOD, name: value}
    if value == GOOD[name] and type(value) is type(GOOD[name]):
        assert Preprocessing.from_dict(data, SHAPE).to_dict() == data
    elif (name, value) == ("crop", False) and type(value) is bool:
        assert not Preprocessing.from_dict(data, SHAPE).crop
    else:
        with pytest.raises(ValueError, match=f"{name}|does not give images") as caught:
            Preprocessing.from_dict(data, SHAPE)
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", GOOD)
def test_a_value_without_end_is_not_repeated_in_full(name):
    with pytest.raises(ValueError, match=f"^{name} is ") as caught:
        Preprocessing.from_dict({**GOOD, name: {"x" * 10**6: 1}}, SHAPE)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", GOOD)
def test_a_missing_or_a_further_field_is_refused(name):
    fewer = {key: value for key, value in GOOD.items() if key != name}
    for data in (fewer, {**GOOD, "more": 1}):
        with pytest.raises(ValueError, match="expected size, crop, channels, background"):
            Preprocessing.from_dict(data, SHAPE)


@pytest.mark.parametrize("shape", [(3, 28, 32), (1, 28, 31), (1, 27, 32)])
def test_what_gives_other_images_is_refused(shape):
    with pytest.raises(ValueError, match="does not give images"):
        Preprocessing.from_dict(GOOD, shape)
    with pytest.raises(ValueError, match="does not give images"):
        Preprocessing(1, (28, 32)).require(shape)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"channels": 0}, "channels"),
        ({"channels": True}, "channels"),
        ({"channels": 1.0}, "channels"),
        ({"size": (28,)}, "size"),
        ({"size": (0, 28)}, "size"),
        ({"size": (28, 28.0)}, "size"),
        ({"size": (28, 28), "crop": 1}, "crop is 1, expected true or false"),
        ({"crop": True}, "crop is true without a size"),
        ({"background": (0, 0)}, "background"),
        ({"background": (0, 0, 256)}, "background"),
        ({"background": (0, 0, -1)}, "background"),
        ({"background": (0, 0, 1.0)}, "background"),
    ],
)
def test_a_field_without_sense_is_named(fields, said):
    with pytest.raises(ValueError, match=said):
        Preprocessing(**{"channels": 1, **fields})


@pytest.mark.parametrize("text", ["", "white", "#fff", "#FFFFFF", "ffffff", "#ffffff0", "#fffff\n"])
def test_other_texts_are_no_colours(text):
    with pytest.raises(ValueError, match="expected a text like #ffffff"):
        parse_colour(text)


def test_the_default_is_white_and_nothing_else_is_done():
    assert Preprocessing(3).to_dict() == {
        "size": None,
        "crop": False,
        "channels": 3,
        "background": "#ffffff",
    }
    assert WHITE == (255, 255, 255)
    assert set(CHANNELS) == {1, 3, 4}
