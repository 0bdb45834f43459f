"""The one place where onnxruntime is imported to run a graph."""

from __future__ import annotations

import os
from functools import cache
from typing import Any


@cache
def onnxruntime() -> Any:
    """Returns the module, with its telemetry off.

    From 1.29 on it tells its maker about the models that it opens. It begins as it is imported,
    with an identifier in the user's cache folder, which the environment variable alone prevents;
    the call stops it in a program that has imported onnxruntime before.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime as ort

    ort.disable_telemetry_events()
    return ort
