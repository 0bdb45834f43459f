"""Fields of other libraries' configurations: each wrong one is named in one line."""

import json
import re

import pytest

from vqdeploy.importers.configuration import Fields
from vqref.errors import InputError

WRONG = [
    ("table", "model", 3, "a table"),
    ("whole", "channels", -1, "an integer from 0 to "),
    ("whole", "channels", True, "an integer from 0 to "),
    ("wholes", "levels", [8, 0], "a list of at most "),
    ("texts", "types", ["a", 1], "a list of texts"),
    ("text", "name", 5, "a text"),
    ("number", "scale", "2", "a number"),
    ("number", "scale", True, "a number"),
    ("pair", "range", [1, -1], "two numbers, the lower first"),
    ("pair", "range", [0, True], "two numbers, the lower first"),
    ("axes", "transpose", [0, 1.5], "a list of axes"),
    ("truth", "tanh", 1, "true or false"),
]


def read(folder, values):
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return Fields.read(path)


def ask(fields, kind, name):
    return getattr(fields, kind)(name, *([(0.0, 1.0)] if kind == "pair" else []))


@pytest.mark.parametrize(("kind", "name", "value", "expected"), WRONG)
def test_a_field_of_the_wrong_kind_is_named_with_what_it_must_be(
    tmp_path, kind, name, value, expected
):
    fields = read(tmp_path, {name: value})
    said = f"{tmp_path / 'config.json'}: {name} is {value!r}, expected {expected}"
    with pytest.raises(InputError, match=f"^{re.escape(said)}"):
        ask(fields, kind, name)


@pytest.mark.parametrize("kind", ["whole", "wholes", "texts", "text", "number", "truth", "table"])
def test_a_field_that_is_missing_is_named(tmp_path, kind):
    with pytest.raises(InputError, match="inner is missing, expected "):
        ask(read(tmp_path, {}), kind, "inner")


def test_right_fields_are_read_and_optional_ones_have_defaults(tmp_path):
    fields = read(
        tmp_path, {"a": {"n": 3, "x": 0.5, "s": "t", "all": ["u"], "p": [-1, 1], "b": True}}
    ).table("a")
    assert (fields.whole("n"), fields.number("x"), fields.number("n")) == (3, 0.5, 3.0)
    assert (fields.text("s"), fields.texts("all"), fields.truth("b")) == ("t", ("u",), True)
    assert (fields.pair("p", (0, 1)), fields.pair("q", (0.0, 1.0))) == ((-1.0, 1.0), (0.0, 1.0))
    assert (fields.whole("none", 7), fields.axes("none")) == (7, ())


@pytest.mark.parametrize("content", ["[1]", "{", '{"a": 1'])
def test_a_file_that_holds_no_table_of_fields_is_refused(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}"):
        Fields.read(path)
