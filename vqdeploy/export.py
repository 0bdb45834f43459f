"""From a trained model to a bundle: built, verified, and only then published."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import vqref.checkpoint
from vqdeploy.bundle import CARD, FORMAT, FORMAT_VERSION, MANIFEST, ORACLE, Bundle, Oracle, describe_files
from vqdeploy.card import write_card
from vqdeploy.graphs import IR_VERSION, OPSET, build_graphs
from vqdeploy.sessions import open_sessions
from vqdeploy.stages import STAGES, ports
from vqdeploy.verify import check_graphs, golden_batch
from vqref.checkpoint import Model
from vqref.commandline import InputError
from vqref.files import publish_folder, require_new_folder
from vqref.report import ParityError, Report


def read_model(path: Path) -> tuple[Model, str]:
    """The model in ``model.pt`` and the file's sha256. The one place where deployment needs torch. Raises InputError."""
    import torch

    return vqref.checkpoint.read(path, lambda file: torch.load(file, map_location="cpu", weights_only=True))


def export(checkpoint: Path, output: Path, *, replace: bool = False) -> Report:
    """Writes the bundle of the model in ``checkpoint`` to the folder ``output``, once its graphs agree with the oracle.

    The same checkpoint gives the same bytes. Raises InputError for a checkpoint that cannot be read or an ``output`` that
    exists (unless ``replace``), ParityError where a graph disagrees, MachineError and OSError where nothing can be
    written; ``output`` is then as it was.
    """
    require_replaceable(output, replace=replace)
    model, digest = read_model(checkpoint)
    graphs = build_graphs(model.spec, model.params)
    try:
        golden = golden_batch(model.spec, model.params)
    except ValueError as error:  # weights so large that a stage overflows
        raise InputError(f"{checkpoint}: the oracle cannot run it: {error}") from None
    oracle = Oracle({p.name: model.params[p.name] for p in model.spec.parameters}, golden)
    sessions, _ = open_sessions(graphs, model.spec, "cpu")
    report = check_graphs(model.spec, oracle.params, oracle.golden["images"], sessions)
    if not report.passed:
        raise ParityError(f"{checkpoint}: not exported: the graphs disagree with the oracle: {report.failures[0]}", report)

    files = {f"{name}.onnx": content for name, content in graphs.items()} | {ORACLE: oracle.to_bytes()}
    agreement = {"provider": "CPUExecutionProvider", "images": len(oracle.golden["images"]), **report.to_dict()}
    provenance = {
        **model.provenance,
        "checkpoint_sha256": digest,
        "export": {"python": platform.python_version()} | {name: version(name) for name in ("portable-vqvae", "numpy", "onnx")},
        "onnxruntime": _onnxruntime_version(),
    }
    files[CARD] = write_card(model, provenance, report).encode()
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "spec": model.spec.to_dict(),
        "precision": "float32",
        "opset": OPSET,
        "ir_version": IR_VERSION,
        "graphs": _describe_graphs(model),
        "files": describe_files(files),
        "training": model.training,
        "metrics": {name: value for name, value in model.metrics.items() if name not in ("history", "oracle")},
        "provenance": provenance,
        "agreement": agreement,
    }
    files[MANIFEST] = (json.dumps(manifest, indent=2) + "\n").encode()
    publish_folder(output, files, replace=replace)
    return report


def require_replaceable(output: Path, *, replace: bool) -> None:
    """Raises InputError where ``output`` exists and may not be replaced: with ``replace``, a bundle may, and an empty folder.

    MachineError where nothing can be written there.
    """
    require_new_folder(output, replace=replace)
    if output.exists() and any(output.iterdir()):
        try:
            Bundle.open(output)
        except InputError as error:
            raise InputError(f"{output}: not replaced, for it is no bundle ({error})") from None


def _describe_graphs(model: Model) -> dict[str, Any]:
    arrays = {name: {"name": name, "dtype": port.dtype, "shape": list(port.shape)} for name, port in ports(model.spec).items()}
    return {
        name: {
            "file": f"{name}.onnx",
            "inputs": [arrays[port] for port in stage.inputs],
            "outputs": [arrays[port] for port in stage.outputs],
        }
        for name, stage in STAGES.items()
    }


def _onnxruntime_version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)
