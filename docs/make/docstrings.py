"""Docstrings are plain text with code in backquotes: in Markdown their stars would be emphasis."""

import re
from typing import Any

from griffe import Extension, Object

CODE = re.compile(r"(``?.+?``?)")


class Stars(Extension):
    """Keeps the stars of docstrings."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Called for each object with what was found of it."""
        if obj.docstring is not None:
            obj.docstring.value = kept(obj.docstring.value)


def kept(text: str) -> str:
    """The text with a backslash before each star that is in no code: neither in backquotes, nor in
    a block, which is indented and begins after an empty line."""
    lines, block, before = [], False, ""
    for line in text.splitlines():
        block = line.startswith("    ") and (block or not before)
        parts = CODE.split(line)
        parts[::2] = [part if block else part.replace("*", "\\*") for part in parts[::2]]
        lines.append("".join(parts))
        before = line.strip()
    return "\n".join(lines)
