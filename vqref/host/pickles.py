"""Refuses pickles in which a few bytes describe endless values, before PyTorch loads them.

``torch.load(weights_only=True)`` executes nothing. But a tuple may hold another tuple twice, which
holds another twice, and so on for forty levels. As the key of a dictionary, it takes for ever to be
hashed. Standard library only.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from typing import IO

from vqref.errors import InputError

MOST_VALUES = 10**6
"""The most values that a tuple may have.

The values of inner tuples count as often as they occur."""

_MARKED = pickletools.markobject


def require_bounded(archive: zipfile.ZipFile) -> None:
    """Raises InputError if a tuple in the pickle of a PyTorch archive has more than MOST_VALUES.

    Raises what ``pickletools`` raises for anything that is not a pickle.
    """
    for member in archive.infolist():
        if member.filename.endswith("data.pkl"):
            _require_bounded(io.BytesIO(archive.read(member)))


def require_bounded_pickles(content: bytes) -> None:
    """Checks pickles that follow one another. Whatever comes after them is ignored."""
    file = io.BytesIO(content)
    try:
        while True:
            _require_bounded(file)
    except InputError:
        raise
    except Exception:  # pickletools can raise anything: here the pickles end
        return


def _require_bounded(file: IO[bytes]) -> None:
    """Follows the pickle's stack. Each entry counts as one value, unless it is a tuple."""
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
    """Where on the stack the opcode's arguments begin. Raises IndexError for a short stack."""
    taken = opcode.stack_before
    marked = _MARKED in taken
    start = marks.pop() - taken.index(_MARKED) if marked else len(stack) - len(taken)
    if start < 0:
        raise IndexError("the pickle takes more than it made")
    return start
