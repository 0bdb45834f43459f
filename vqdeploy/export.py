"""From a trained model to a bundle: built, verified, and only then published."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import vqref
import vqref.checkpoint
from vqdeploy.bundle import CARD, FORMAT, FORMAT_VERSION, MANIFEST, ORACLE, Bundle, Oracle, describe_files
from vqdeploy.card import write_card
from vqdeploy.graphs import IR_VERSION, PRECISIONS, GraphOptions, build_graphs
from vqdeploy.int8 import quantize_graphs
from vqdeploy.measure import measure
from vqdeploy.samples import draw_images
from vqdeploy.sessions import open_sessions
from vqdeploy.stages import STAGES, ports
from vqdeploy.verify import GOLDEN_IMAGES, check_graphs, golden_batch
from vqref.checkpoint import Model
from vqref.commandline import InputError, MachineError
from vqref.files import publish_folder, require_new_folder
from vqref.images import read_npz
from vqref.report import ParityError, Report
from vqref.spec import CODEBOOK, EMA_COUNT, EMA_MEANS, ModelSpec
from vqref.validation import check_params

Array = npt.NDArray[Any]

PARAMETER_FORMATS = (".npz", ".safetensors")

MEASURED_IMAGES = 256
"""Images that the model draws, where no data are given, for int8's ranges and for what the manifest measures."""


def read_source(path: Path) -> tuple[Model, str]:
    """The model in a ``model.pt``, or one made of the parameters in an .npz or .safetensors file, and the file's sha256.

    The one place where deployment needs torch, and safetensors, each for its files alone. Raises InputError.
    """
    if path.suffix in PARAMETER_FORMATS:
        return read_parameters(path)
    import torch

    return vqref.checkpoint.read(path, lambda file: torch.load(file, map_location="cpu", weights_only=True))


def read_parameters(path: Path) -> tuple[Model, str]:
    """A model of parameters under the spec's names, whose shapes say the sizes. Without ``quantizer.ema_count`` and
    ``ema_means``, each code counts once. Raises InputError, and MachineError where safetensors is not installed."""
    try:
        content = path.read_bytes()
        if path.suffix == ".npz":
            params = read_npz(content)
        else:
            try:
                from safetensors import SafetensorError
                from safetensors.numpy import load
            except ModuleNotFoundError:
                raise MachineError(f"{path}: reading it needs pip install safetensors") from None
            try:
                params = load(content)
            except (SafetensorError, KeyError, TypeError) as error:  # damaged, or a dtype that NumPy lacks
                raise ValueError(f"not a safetensors file: {error}") from None
        if CODEBOOK not in params:
            raise ValueError(f"holds no {CODEBOOK}; its names are {', '.join(sorted(params)[:4])}, …")
        codebook = np.asarray(params[CODEBOOK], np.float32)
        count = np.ones(len(codebook), np.float32)
        params = {EMA_COUNT: count, EMA_MEANS: codebook * count[:, None], **params}
        spec = ModelSpec.of_parameters({name: array.shape for name, array in params.items()})
        params = {name: np.asarray(array, np.float32) for name, array in params.items()}
        check_params(spec, params)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    return Model(spec, params, {}, {}, {"parameters": path.name}), hashlib.sha256(content).hexdigest()


def export(
    source: Path,
    output: Path,
    *,
    options: GraphOptions | None = None,
    images: Callable[[ModelSpec], Array] | None = None,
    replace: bool = False,
) -> Report:
    """Writes the bundle of the model in ``source``, a ``model.pt`` or a file of parameters, to the folder ``output``, once its
    graphs agree with the oracle.

    options: of the graphs. images: gives images (N, C, H, W) in [0, 1] of a spec, that int8 takes its ranges from and that are
    measured on; None: images that the model draws. The same model, options and images give the same bytes.
    Raises InputError for a source that cannot be read or an ``output`` that exists (unless ``replace``), ParityError where
    a graph disagrees, MachineError and OSError where nothing can be written; ``output`` is then as it was.
    """
    options = options or GraphOptions()
    require_replaceable(output, replace=replace)
    model, digest = read_source(source)
    spec = model.spec
    try:
        folded = options.folds(spec)
        golden = golden_batch(spec, model.params)
        graphs = build_graphs(spec, model.params, options)
    except ValueError as error:  # weights so large that a stage overflows, or that float16 cannot hold
        raise InputError(f"{source}: cannot be exported: {error}") from None
    oracle = Oracle({p.name: model.params[p.name] for p in spec.parameters}, golden)
    seen = draw_images(spec, model.params, MEASURED_IMAGES) if images is None else images(spec)
    if not len(seen):
        raise InputError(f"{source}: cannot be exported: there are no images to measure it on")
    if options.precision == "int8":
        graphs = quantize_graphs(graphs, _stage_inputs(model, seen), folded=folded)
    precision = PRECISIONS[options.precision]
    sessions, _ = open_sessions(graphs, spec, "cpu", batch=options.batch)
    report = check_graphs(spec, oracle.params, oracle.golden["images"], sessions, precision=precision, folded=folded)
    if not report.passed:
        raise ParityError(f"{source}: not exported: the graphs disagree with the oracle: {report.failures[0]}", report)

    measured = {
        **measure(spec, oracle.params, seen, sessions),
        "of": "images that the model draws" if images is None else "data",
    }
    files = {f"{name}.onnx": content for name, content in graphs.items()} | {ORACLE: oracle.to_bytes()}
    publish_folder(output, _described(model, digest, options, files, measured, report), replace=replace)
    return report


def _described(
    model: Model,
    digest: str,
    options: GraphOptions,
    files: dict[str, bytes],
    measured: dict[str, Any],
    report: Report,
) -> dict[str, bytes]:
    """The files of a bundle, and the card and the manifest that describe them."""
    provenance = {
        **model.provenance,
        "checkpoint_sha256": digest,
        "export": {"python": platform.python_version()} | {name: version(name) for name in ("portable-vqvae", "numpy", "onnx")},
        "onnxruntime": _onnxruntime_version(),
    }
    written = {
        "precision": PRECISIONS[options.precision],
        "opset": options.opset,
        "ir_version": IR_VERSION,
        "symmetric_pads": options.symmetric_pads,
        "target": options.target,
        "batch": options.batch,
        "detokenizer": "table" if options.folds(model.spec) else "network",
    }
    files = {**files, CARD: write_card(model, provenance, written, measured, report).encode()}
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "spec": model.spec.to_dict(),
        **written,
        "graphs": _describe_graphs(model, options.batch),
        "files": describe_files(files),
        "training": model.training,
        "metrics": {name: value for name, value in model.metrics.items() if name not in ("history", "oracle")},
        "provenance": provenance,
        "agreement": {"provider": "CPUExecutionProvider", "images": GOLDEN_IMAGES, **report.to_dict()},
        "measured": measured,
    }
    return {**files, MANIFEST: (json.dumps(manifest, indent=2) + "\n").encode()}


def _stage_inputs(model: Model, images: Array) -> dict[str, Array]:
    """What enters each graph when ``images`` go through the oracle."""
    out = vqref.forward(model.spec, model.params, images)
    return {"images": images, "indices": out.indices, "quantized": out.quantized.astype(np.float32)}


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


def _describe_graphs(model: Model, batch: int | None) -> dict[str, Any]:
    found = ports(model.spec, batch)
    arrays = {name: {"name": name, "dtype": port.dtype, "shape": list(port.shape)} for name, port in found.items()}
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
