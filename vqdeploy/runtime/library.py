"""The one place where onnxruntime is imported to run a graph."""

from __future__ import annotations

import os
from functools import cache
from typing import Any


@cache
def onnxruntime() -> Any:
    """Returns the module, with its telemetry off.

    From 1.29 on, onnxruntime reports to its maker the models that it opens. On import it puts an
    identifier into the user's cache folder; only the environment variable prevents that. The call
    stops the reports of an onnxruntime that was imported before.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime as ort

    ort.disable_telemetry_events()
    return ort
