"""From a trained model to a bundle: built, verified, and only then published."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from vqdeploy.agreement import check_graphs
from vqdeploy.bundle import (
    CARD,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    ORACLE,
    Oracle,
    describe_files,
    read_manifest,
)
from vqdeploy.card import write_card
from vqdeploy.graphs.build import IR_VERSION, GraphOptions, build_graphs
from vqdeploy.graphs.int8 import quantize_graphs
from vqdeploy.proof.golden import Answered, golden_batch, golden_images
from vqdeploy.proof.measure import measure, measured_images
from vqdeploy.proof.samples import draw_images
from vqdeploy.runtime.sessions import open_sessions
from vqdeploy.sources import read_source
from vqdeploy.stages import STAGES, ports
from vqref.agreement.report import Report
from vqref.errors import InputError, ParityError
from vqref.host.files import publish_folder, require_new_folder
from vqref.modelfile import Model
from vqref.precisions import PRECISIONS
from vqref.spec import ModelSpec
from vqref.validation import Array

UNPUBLISHED = {"history", "oracle"}
"""Metrics of every epoch, and of the training's own checks: a manifest leaves them to model.pt."""


def export(
    source: Path,
    output: Path,
    *,
    options: GraphOptions | None = None,
    images: Callable[[ModelSpec], Array] | None = None,
    replace: bool = False,
) -> Report:
    """Writes the bundle of the model in ``source`` to the folder ``output``, once its graphs agree
    with the oracle.

    source: a ``model.pt`` or a file of parameters. images: gives images (N, C, H, W) in [0, 1] of a
    spec, to measure on and to take int8's ranges from; None for images that the model draws. The
    same model, options and images give the same bytes.
    Raises InputError for a source that cannot be read or an ``output`` that exists (unless
    ``replace``), ParityError if a graph disagrees, MachineError and OSError if nothing can be
    written; ``output`` is then as it was.
    """
    options = options or GraphOptions()
    require_replaceable(output, replace=replace)
    model, digest = read_source(source)
    spec, params = model.spec, {p.name: model.params[p.name] for p in model.spec.parameters}
    given = None if images is None else images(spec)
    try:  # weights may be so large that a stage overflows, or that float16 cannot hold them
        folded = options.folds(spec)
        golden = Answered.of(spec, params, golden_images(spec, params))
        graphs = build_graphs(spec, params, options)
        seen = draw_images(spec, params, measured_images(spec)) if given is None else given
        if not len(seen):
            raise ValueError("there are no images to measure it on")
        measured_on = Answered.of(spec, params, seen)
    except ValueError as error:
        raise InputError(f"{source}: cannot be exported: {error}") from None
    if options.precision == "int8":
        graphs = quantize_graphs(graphs, _stage_inputs(measured_on), folded=folded)
    sessions, _ = open_sessions(graphs, spec, "cpu", batch=options.batch)
    report = check_graphs(
        spec,
        params,
        golden.images,
        sessions,
        precision=_precision(options),
        folded=folded,
        known=golden.known,
    )
    if not report.passed:
        raise ParityError(
            f"{source}: not exported: the graphs disagree with the oracle: {report.failures[0]}",
            report,
        )
    measured = {
        **measure(spec, params, measured_on, sessions, folded=folded),
        "of": "images that the model draws" if given is None else "data",
    }
    facts = {**_form(spec, options), **_origin(model, digest), **_proof(report, measured)}
    oracle = Oracle(params, golden_batch(golden))
    publish_folder(output, _files(spec, graphs, oracle, facts, report), replace=replace)
    return report


def _files(
    spec: ModelSpec,
    graphs: Mapping[str, bytes],
    oracle: Oracle,
    facts: Mapping[str, Any],
    report: Report,
) -> dict[str, bytes]:
    """Every file of the bundle by name; ``facts`` go into the manifest and onto the card."""
    files = {f"{name}.onnx": content for name, content in graphs.items()}
    files[ORACLE] = oracle.to_bytes()
    files[CARD] = write_card(spec, facts, report).encode()
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "spec": spec.to_dict(),
        **facts,
        "files": describe_files(files),
    }
    return {**files, MANIFEST: (json.dumps(manifest, indent=2) + "\n").encode()}


def _form(spec: ModelSpec, options: GraphOptions) -> dict[str, Any]:
    """The manifest's entries on how the graphs were written."""
    arrays = {
        name: {"name": name, "dtype": port.dtype, "shape": list(port.shape)}
        for name, port in ports(spec, options.batch).items()
    }
    return {
        "precision": _precision(options),
        "opset": options.opset,
        "ir_version": IR_VERSION,
        "target": options.target,
        "batch": options.batch,
        "detokenizer": "table" if options.folds(spec) else "network",
        "graphs": {
            name: {
                "file": f"{name}.onnx",
                "inputs": [arrays[port] for port in stage.inputs],
                "outputs": [arrays[port] for port in stage.outputs],
            }
            for name, stage in STAGES.items()
        },
    }


def _origin(model: Model, digest: str) -> dict[str, Any]:
    """The manifest's entries on where the model came from, and what exported it."""
    import onnxruntime

    exporter = {name: version(name) for name in ("portable-vqvae", "numpy", "onnx")}
    return {
        "training": dict(model.training),
        "metrics": {n: value for n, value in model.metrics.items() if n not in UNPUBLISHED},
        "provenance": {
            **model.provenance,
            "model_sha256": digest,
            "export": {"python": platform.python_version(), **exporter},
            "onnxruntime": str(onnxruntime.__version__),
        },
    }


def _proof(report: Report, measured: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's entries on agreement with the oracle."""
    provider = "CPUExecutionProvider"
    agreement = {"provider": provider, "images": report.images, **report.to_dict()}
    return {"agreement": agreement, "measured": measured}


def require_replaceable(output: Path, *, replace: bool) -> None:
    """Raises InputError if ``output`` exists and may not be replaced, MachineError if nothing can
    be written there.

    With ``replace``, a bundle of any version may be replaced, and an empty folder.
    """
    require_new_folder(output, replace=replace)
    if output.exists() and any(output.iterdir()):
        try:
            read_manifest(output)
        except InputError as error:
            raise InputError(f"{output}: not replaced, for it is no bundle ({error})") from None


def _stage_inputs(seen: Answered) -> dict[str, Array]:
    """What enters each graph when images go through the oracle."""
    quantized = seen.known.quantized.astype(np.float32)
    return {"images": seen.images, "indices": seen.known.indices, "quantized": quantized}


def _precision(options: GraphOptions) -> str:
    """The name in PRECISIONS of the precision that the options name."""
    return next(name for name, row in PRECISIONS.items() if row.option == options.precision)
