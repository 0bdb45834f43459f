"""Runs commands in forks of one process that has imported the libraries.

``python -m`` starts a process that takes a second or two to import PyTorch. A fork has imported it
already, and is still a separate process, with its own folder, streams, signals and exit status. Our
packages are not imported before the fork, so each command imports them itself.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

LIBRARIES = ("numpy", "torch", "torch._dynamo", "onnx", "scipy", "filelock", "PIL.Image")
"""What commands import; their first optimizer imports torch._dynamo. Libraries that start threads,
such as onnxruntime, are left out: a fork would wait for their end."""

OPTIONS = ("-W", "error::DeprecationWarning:vq")
"""Options of every interpreter: our own warnings are errors."""


class Server:
    """The process that forks, and the environment that it was started with."""

    def __init__(self) -> None:
        self.environment = environment()
        self.process = subprocess.Popen(
            [sys.executable, *OPTIONS, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, words: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
        """Runs ``python`` with these words, ``-m`` or ``-c`` first, in the folder ``cwd``."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            said = [Path(folder, name) for name in ("stdout", "stderr")]
            streams = [os.devnull, *map(str, said)]
            request = {"words": words, "cwd": str(cwd), "streams": streams}
            print(json.dumps(request), file=self.process.stdin, flush=True)
            code = int(self.process.stdout.readline())
            return subprocess.CompletedProcess(words, code, *(path.read_text() for path in said))

    def close(self) -> None:
        self.process.communicate()


def environment() -> dict[str, str]:
    """Returns this process's environment, without what pytest changes from test to test."""
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


def serve() -> dict[str, Any]:
    """Forks for each request, a line of JSON, and answers with the exit status.

    Returns the request in the fork. Ends the process when there are no more requests.
    """
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            request: dict[str, Any] = json.loads(line)
            return request
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    sys.exit()


def become(words: list[str], cwd: str, streams: list[str]) -> None:
    """Makes this process do what ``python`` with these words does in the folder ``cwd``."""
    os.chdir(cwd)
    for number, path in enumerate(streams):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = os.fdopen(0)  # the server's may have read ahead
    if words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], cwd
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = ["-c", *words[2:]], ""
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        exec(compile(words[1], "<string>", "exec"), vars(main))


if __name__ == "__main__":
    for library in LIBRARIES:
        __import__(library)
    gc.freeze()  # a fork's collector need not visit what it shares
    become(**serve())
