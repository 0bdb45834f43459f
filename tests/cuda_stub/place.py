"""Opens every graph below a folder on CUDA and prints the results as JSON.

Run it with LD_LIBRARY_PATH naming the libraries of ``build.py``. Each folder below the argument
holds {stage}.onnx files and spec.json, which has the spec and the batch size. A graph that opens
gives {"placement": Session.placement(), "operators": of the graph that onnxruntime runs,
"use_tf32": "0" or "1"}. A graph that does not open gives {"error": the line}. Providers named after
the folder replace the device's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort

from vqdeploy.runtime.sessions import CUDA, Runtime, Session
from vqref.errors import CommandError
from vqref.prior import PriorSpec
from vqref.spec import ModelSpec


def main(folder: Path, *providers: str) -> None:
    found = {
        str(path.relative_to(folder).with_suffix("")): placed(path, providers)
        for path in sorted(folder.glob("**/*.onnx"))
    }
    print(json.dumps(found))


def placed(path: Path, providers: tuple[str, ...]) -> dict[str, Any]:
    model = json.loads((path.parent / "spec.json").read_text())
    options = ort.SessionOptions()
    options.log_severity_level = 4
    final = path.with_suffix(".optimized")
    options.optimized_model_filepath = str(final)
    try:
        session = Session(
            path.stem,
            path.read_bytes(),
            (PriorSpec if "rows" in model["spec"] else ModelSpec).from_dict(model["spec"]),
            "cuda",
            batch=model["batch"],
            runtime=Runtime(list(providers) or None, options),
        )
    except CommandError as error:
        return {"error": str(error)}
    return {
        "placement": session.placement(),
        "operators": sorted({node.op_type for node in onnx.load(final).graph.node}),
        "use_tf32": session._session.get_provider_options()[CUDA]["use_tf32"],
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
