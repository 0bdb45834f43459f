"""Reads and writes JSON that carries the digest of its own bytes, so that any damage shows.

The last entry, ``sha256``, is the digest of the file with 64 zeros in the entry's place. It shows
damage but not who wrote the file: whoever changes the content can compute it again. This module
needs only the standard library.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

SEAL = "sha256"
"""The entry with the digest."""

_BEFORE, _BLANK, _AFTER = f'  "{SEAL}": "'.encode(), b"0" * 64, b'"\n}\n'


def sealed(content: Mapping[str, Any]) -> bytes:
    """Returns the bytes of a JSON file of ``content``, plain data, with its seal.

    Raises ValueError for what JSON cannot hold, such as a number that is not finite.
    """
    blank = {**content, SEAL: _BLANK.decode()}
    form = (json.dumps(blank, indent=2, allow_nan=False) + "\n").encode()
    return form[: -len(_BLANK + _AFTER)] + _digest(form) + _AFTER


def parsed(content: bytes) -> dict[str, Any]:
    """Returns the entries of a JSON object, sealed or not. Raises ValueError."""
    try:
        found = json.loads(content)
    except RecursionError:
        raise ValueError("not JSON: nested too deep") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found


def require_seal(content: bytes) -> None:
    """Raises ValueError for content that has no seal or a wrong one."""
    seal = slice(len(content) - len(_BLANK + _AFTER), len(content) - len(_AFTER))
    if not (content[: seal.start].endswith(_BEFORE) and content.endswith(_AFTER)):
        raise ValueError(f"has no seal: its last entry is not {SEAL!r}")
    if content[seal] != _digest(content[: seal.start] + _BLANK + _AFTER):
        raise ValueError("damaged: its seal is not the digest of its bytes")


def unsealed(content: bytes) -> dict[str, Any]:
    """Returns the entries of a file that ``sealed`` made, without the seal.

    Raises ValueError for content that has no seal or a wrong one.
    """
    require_seal(content)
    found = parsed(content)
    found.pop(SEAL, None)
    return found


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()
