"""Reads and writes protobuf's wire format strictly, by tables of messages.

A message has only one form here: fields are in the order of their numbers, and each tag and number
takes as few bytes as possible. Other forms, which protobuf's own readers allow, are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from vqref.errors import InputError

INTEGER, FLOAT, NAME, RAW = "integer", "float", "name", "raw"
"""The kinds of fields that hold no message: a varint, four bytes, a printable name, any bytes."""

PRINTABLE = re.compile(rb"[!-~]{1,2000}")
"""What a name must match, since error messages print names."""

WIRE_TYPES = {INTEGER: 0, FLOAT: 5}
"""The wire types of some kinds. All other fields are of type 2: a length, and so many bytes."""


class Field(NamedTuple):
    """A row of a table.

    kind: one of the above, or a Message. most: how often the field may appear; if more than once,
    it is read as a list. needed: whether it must appear.
    """

    name: str
    kind: Any
    most: int = 1
    needed: bool = True


@dataclass(frozen=True, eq=False)
class Message:
    """A table of a message's fields.

    fields: the fields by number. refused: what refused fields mean, by number, for error messages.

    These follow from ``fields``: rows, the fields by tag; heads, the fields with the bytes of their
    tags, in order; lists and needed, names of fields.
    """

    name: str
    fields: Mapping[int, Field]
    refused: Mapping[int, str] = field(default_factory=dict)
    rows: dict[int, Field] = field(init=False, default_factory=dict)
    heads: list[tuple[bytes, Field]] = field(init=False, default_factory=list)
    lists: list[str] = field(init=False, default_factory=list)
    needed: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        for number, row in sorted(self.fields.items()):
            tag = number << 3 | WIRE_TYPES.get(row.kind, 2)
            self.rows[tag] = row
            self.heads.append((_number(tag), row))
            self.lists.extend([row.name] if row.most > 1 else [])
            self.needed.extend([row.name] if row.needed else [])


def read(message: Message, content: bytes) -> dict[str, Any]:
    """Returns {field: value} of a message.

    A value is an int, a str, the four bytes of a FLOAT, a view of RAW bytes, such a dictionary for
    an inner message, or a list of these. Raises InputError unless ``content`` is that message in
    its one form.
    """
    try:
        return _read(message, content, 0, len(content))
    except IndexError:
        raise malformed("it ends within a number") from None


def _read(message: Message, content: bytes, at: int, end: int) -> dict[str, Any]:
    """Reads the message from ``at`` to ``end``. Raises IndexError if it ends within a number.

    Most numbers have one byte. They are read here, which opens a bundle noticeably faster.
    """
    found: dict[str, Any] = {name: [] for name in message.lists}
    rows, last = message.rows, 0
    while at < end:
        tag = content[at]
        tag, at = (tag, at + 1) if tag < 0x80 else _varint(content, at)
        row = rows.get(tag)
        if row is None:
            raise _foreign(message, tag)
        name, kind, most, _ = row
        if tag < last or (tag == last and (most == 1 or len(found[name]) == most)):
            raise malformed(f"{name} of {message.name} repeats or is out of order")
        last = tag
        value: Any = 4 if kind is FLOAT else content[at]
        if value >= 0x80:
            value, at = _varint(content, at)
        elif kind is not FLOAT:
            at += 1
        if kind is not INTEGER:
            start, at = at, at + value
            if at > end:
                break
            value = _name(content[start:at]) if kind is NAME else _value(kind, content, start, at)
        if most == 1:
            found[name] = value
        else:
            found[name].append(value)
    if at > end:
        raise malformed(f"{message.name} is cut short")
    for name in message.needed:
        if name not in found or found[name] == []:
            raise malformed(f"{message.name} lacks {name}")
    return found


def _value(kind: Any, content: bytes, start: int, end: int) -> Any:
    if kind is RAW:
        return memoryview(content)[start:end]
    return content[start:end] if kind is FLOAT else _read(kind, content, start, end)


@lru_cache(2**12)
def _name(content: bytes) -> str:
    """Returns a name. Cached, because most names appear several times."""
    if PRINTABLE.fullmatch(content) is None:
        raise malformed("a name is not printable, empty or too long")
    return str(content, "ascii")


def write(message: Message, values: Mapping[str, Any]) -> list[bytes | memoryview]:
    """Returns the pieces of ``message`` with these values.

    This inverts ``read``, except that the value of an inner message is the list of its pieces.
    """
    pieces: list[bytes | memoryview] = []
    for head, (name, kind, most, _) in message.heads:
        given = values.get(name)
        if given is None:
            continue
        for value in given if most > 1 else (given,):
            if kind is INTEGER:
                pieces.append(head + _number(value))
            elif kind is FLOAT:
                pieces.append(head + value)
            elif kind is NAME:
                pieces.append(head + _sized(value))
            else:
                inner = [value] if kind is RAW else value
                pieces += [head + _number(sum(map(len, inner))), *inner]
    return pieces


@lru_cache(2**12)
def _sized(name: str) -> bytes:
    body = name.encode("ascii")
    return _number(len(body)) + body


def malformed(reason: str) -> InputError:
    return InputError(f"not an ONNX file as export writes it: {reason}")


def _foreign(message: Message, tag: int) -> InputError:
    """Returns the error for a tag that is not in the table."""
    number, wire = tag >> 3, tag & 7
    if not 0 < number < 2**29 or wire not in (0, 1, 2, 5):
        return malformed(f"{message.name} holds the tag {tag}")
    if number in message.refused:
        return InputError(f"it {message.refused[number]}, which no bundle does")
    return InputError(
        f"it holds a field {number} of wire type {wire} in {message.name}, which no bundle does"
    )


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """Returns a number of seven bits per byte, the lowest first, and the position after it.

    Raises InputError unless it fits 64 bits and takes as few bytes as possible.
    """
    value = shift = 0
    while shift < 70:
        byte = content[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            break
    if value >> 64 or not 0 < byte < 0x80:
        raise malformed("a number takes more bytes than it needs, or more than 64 bits")
    return value, at


_BYTES = tuple(bytes((value,)) for value in range(0x100))


def _number(value: int) -> bytes:
    """Inverts ``_varint``. A negative number becomes its two's complement of 64 bits."""
    if value < 0:
        value += 2**64
    if value < 0x80:
        return _BYTES[value]
    return _BYTES[value & 0x7F | 0x80] + _number(value >> 7)
