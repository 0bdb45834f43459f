"""Reads the configuration of a checkpoint as tables of fields, and checks the fields' types."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqref.errors import InputError
from vqref.host.extras import missing
from vqref.host.files import about, parsed, read_bytes
from vqref.modelfile import require_plain
from vqref.spec import SIZE_LIMIT

LONGEST = 2**16
"""The largest configuration that is read, in bytes."""

MOST_LEVELS, MOST_BLOCKS = 16, 64
"""The most levels of a network, and the most blocks of a level."""

FORMATS = (".yaml", ".yml", ".json", ".toml")
"""The endings of a configuration with the checkpoint's name, in order of preference."""

_REQUIRED = object()


@dataclass(frozen=True)
class Fields:
    """A table of a configuration.

    path, sha256: the file's. prefix: the names of the outer tables, each with a dot after it.
    """

    path: Path
    values: Mapping[str, Any]
    sha256: str
    prefix: str = ""

    @classmethod
    def read(cls, path: Path) -> Fields:
        """Reads a file of JSON, YAML or TOML.

        Raises InputError, and MachineError if PyYAML is needed and not installed.
        """
        content = read_bytes(path, LONGEST)
        with about(path):
            with parsed("not a configuration"):
                values = _parse(path.suffix, content.decode())
                require_plain("configuration", values)
            if not isinstance(values, dict):
                raise InputError("is not a table of fields")
        return cls(path, values, hashlib.sha256(content).hexdigest())

    def fail(self, name: str, expected: str) -> InputError:
        """Returns the error that says what the field is and what it must be."""
        found = f"is {self.values[name]!r:.60}" if name in self.values else "is missing"
        return InputError(f"{self.path}: {self.prefix}{name} {found}, expected {expected}")

    def table(self, name: str) -> Fields:
        """Returns an inner table. Raises InputError."""
        if not isinstance(found := self.values.get(name), dict):
            raise self.fail(name, "a table")
        return Fields(self.path, found, self.sha256, f"{self.prefix}{name}.")

    def whole(self, name: str, default: Any = _REQUIRED, most: int = SIZE_LIMIT) -> int:
        """Returns an integer from 0 to ``most``. Raises InputError."""
        value = self._get(name, default)
        if type(value) is not int or not 0 <= value <= most:
            raise self.fail(name, f"an integer from 0 to {most}")
        return value

    def wholes(self, name: str, default: Any = _REQUIRED) -> tuple[int, ...]:
        """Returns a list of at most MOST_LEVELS sizes. Raises InputError."""
        values = self._get(name, default)
        fits = isinstance(values, list | tuple) and len(values) <= MOST_LEVELS
        if not fits or not all(type(value) is int and 1 <= value <= SIZE_LIMIT for value in values):
            raise self.fail(name, f"a list of at most {MOST_LEVELS} sizes")
        return tuple(values)

    def texts(self, name: str, default: Any = _REQUIRED) -> tuple[str, ...]:
        """Returns a list of strings. Raises InputError."""
        values = self._get(name, default)
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise self.fail(name, "a list of texts")
        return tuple(values)

    def text(self, name: str) -> str:
        """Returns a string. Raises InputError."""
        if not isinstance(value := self._get(name, _REQUIRED), str):
            raise self.fail(name, "a text")
        return value

    def number(self, name: str) -> float:
        """Returns a number. Raises InputError."""
        value = self._get(name, _REQUIRED)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.fail(name, "a number")
        return float(value)

    def pair(self, name: str, default: tuple[float, float]) -> tuple[float, float]:
        """Returns two numbers, the lower first. Raises InputError."""
        if name not in self.values:
            return default
        value = self.values[name]
        fits = isinstance(value, list) and [type(each) in (int, float) for each in value]
        if fits != [True, True] or not value[0] < value[1]:
            raise self.fail(name, "two numbers, the lower first")
        return float(value[0]), float(value[1])

    def axes(self, name: str) -> tuple[int, ...]:
        """Returns the axes of an array, () if the field is absent. Raises InputError."""
        value = self.values.get(name, [])
        if not isinstance(value, list) or not all(type(axis) is int for axis in value):
            raise self.fail(name, "a list of axes")
        return tuple(value)

    def truth(self, name: str, default: Any = _REQUIRED) -> bool:
        """Returns a boolean. Raises InputError."""
        if type(value := self._get(name, default)) is not bool:
            raise self.fail(name, "true or false")
        return value

    def only(self, name: str, *allowed: Any, default: Any = _REQUIRED) -> None:
        """Raises InputError if a field is none of ``allowed``: our networks lack anything else."""
        value = self._get(name, default)
        if not any(type(value) is type(each) and value == each for each in allowed):
            raise self.fail(name, " or ".join(map(repr, allowed)))

    def require_known(self, *names: str) -> None:
        """Raises InputError for a field that is not in ``names`` and does not begin with "_"."""
        for name in self.values:
            if name not in names and not name.startswith("_"):
                raise self.fail(name, "no such field")

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name, default)
        if value is _REQUIRED:
            raise self.fail(name, "a value")
        return value


def beside(path: Path) -> Path | None:
    """Returns the configuration with a checkpoint's name, or else config.json in its folder."""
    places = [*(path.with_suffix(ending) for ending in FORMATS), path.with_name("config.json")]
    return next((place for place in places if place.is_file() and place != path), None)


def _parse(suffix: str, text: str) -> Any:
    if suffix == ".json":
        return json.loads(text)
    if suffix == ".toml":
        return tomllib.loads(text)
    return _yaml(text)


def _yaml(text: str) -> Any:
    """Parses the safe subset of YAML without aliases: a few aliases can make an endless value."""
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise missing(error) or error from None
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
        raise InputError("not a configuration: holds an alias (*name); write the value out")
    return yaml.safe_load(text)
