"""Follows documents: runs their commands and their Python. ``python walk.py WALKS``

All run in one process, one after another, since imports take longer than most blocks. Each line of
a ``bash`` block is a command; it is run if it is one of this project's. A ``python`` block is
executed with the names of the document's earlier blocks.

WALKS is a JSON list with an object per document: ``document``; ``folder`` to be in; ``words`` to
add, by the beginning of a command ("vqtrain", "vqdeploy page"); and ``text`` to replace in blocks
of Python. ``words`` and ``text`` make work small. One that changes nothing is an error.
"""

import importlib
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PROGRAMS = ("vqtrain", "vqdeploy", "vqref")
OTHERS = ("python3 -m venv ", "pip install ", "python -m http.server ", "tritonserver ")
"""Beginnings of commands that are not run: they install, or they serve without end."""


def follow(document: str, words: Mapping[str, str], text: Mapping[str, str]) -> None:
    """Runs the blocks of a document in the current folder."""
    unused, names = {*words, *text}, {"__name__": "__main__"}
    whole = Path(document).read_text()
    for found in BLOCK.finditer(whole):
        block = found[2]
        if found[1] == "bash":
            for line in block.splitlines():
                unused.discard(command(line, words))
            continue
        unused -= {old for old in text if old in block}
        for old, new in text.items():
            block = block.replace(old, new)
        above = "\n" * whole.count("\n", 0, found.start(2))  # so that a traceback has the line
        exec(compile(above + block, document, "exec"), names)
    assert not unused, f"in no block of {document}: {sorted(unused)}"


def command(line: str, words: Mapping[str, str]) -> str:
    """Runs a line, and returns its beginning, by which ``words`` know it."""
    given = shlex.split(line)
    if given[:2] != ["python", "-m"] or given[2] not in PROGRAMS:
        assert line.startswith(OTHERS), f"neither ours nor known: {line}"
        return ""
    program, *rest = given[2:]
    begins = program if rest[0].startswith("-") else f"{program} {rest[0]}"
    print(f"$ {line}", flush=True)
    more = shlex.split(words.get(begins, ""))
    code = importlib.import_module(f"{program}.__main__").main([*rest, *more])
    assert code == 0, f"{line}: exit code {code}"
    return begins


if __name__ == "__main__":
    for walk in json.loads(sys.argv[1]):
        print(f"=== {walk['document']}", flush=True)
        os.chdir(walk["folder"])
        follow(walk["document"], walk.get("words", {}), walk.get("text", {}))
