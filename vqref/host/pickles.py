"""What PyTorch's loader is not asked to build: values without end that a few bytes describe.

``torch.load(weights_only=True)`` executes nothing, but a tuple that holds another twice, and so on
for forty levels, takes for ever to be hashed once it is a dictionary's key. Standard library only.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from typing import IO

from vqref.errors import InputError

MOST_VALUES = 10**6
"""The most values that a tuple may have, those of the tuples in it counted as often as they are
there."""

_MARKED = pickletools.markobject


def require_bounded(archive: zipfile.ZipFile) -> None:
    """Raises InputError for an archive of PyTorch in whose pickle a tuple has more than
    MOST_VALUES, and what ``pickletools`` raises for what is no pickle."""
    for member in archive.infolist():
        if member.filename.endswith("data.pkl"):
            _require_bounded(io.BytesIO(archive.read(member)))


def require_bounded_pickles(content: bytes) -> None:
    """The same for pickles one after the other, and whatever comes after them."""
    file = io.BytesIO(content)
    try:
        while True:
            _require_bounded(file)
    except InputError:
        raise
    except Exception:  # whatever pickletools stumbles on: here the pickles end
        return


def _require_bounded(file: IO[bytes]) -> None:
    """Follows the pickle's stack. What is on it is counted as one value, unless it is a tuple."""
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[object, int] = {}
    for opcode, argument, _ in pickletools.genops(file):
        name = opcode.name
        if name == "MARK":
            marks.append(len(stack))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        else:
            start = _start(opcode, stack, marks)
            size = 1 + sum(stack[start:]) if "TUPLE" in name else 1
            if size > MOST_VALUES:
                raise InputError(f"holds a tuple of more than {MOST_VALUES} values")
            stack[start:] = [size] * len(opcode.stack_after)


def _start(opcode: pickletools.OpcodeInfo, stack: list[int], marks: list[int]) -> int:
    """Where on the stack begins what the opcode takes. Raises IndexError for a stack too short."""
    taken = opcode.stack_before
    marked = _MARKED in taken
    start = marks.pop() - taken.index(_MARKED) if marked else len(stack) - len(taken)
    if start < 0:
        raise IndexError("the pickle takes more than it made")
    return start
