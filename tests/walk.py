"""Follows documents, one after another in one process, whose imports take longer than most blocks:
`python walk.py WALKS`.

Of a ``bash`` block each line is a command, which is run if it is one of this project's; a
``python`` block is executed, with the names of the document's blocks before. WALKS is a JSON list
with, for each document, the ``folder`` to be in, ``words`` that are added to commands that begin so
("vqtrain", "vqdeploy page"), and ``text`` that is replaced in blocks of Python. Both make things
small, and one that changes nothing is an error.
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
"""How commands begin that are not ours to run: they install, or they serve for ever."""


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
    """Runs a line, and returns how it begins."""
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
