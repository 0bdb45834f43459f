"""Turns a trained model into a bundle: builds it, verifies it, and only then publishes it."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from vqdeploy.bundle import (
    CARD,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    ORACLE,
    Oracle,
    describe_files,
    describe_graphs,
    read_manifest,
)
from vqdeploy.card import write_card
from vqdeploy.graphs.build import GRAPHS_VERSION, GraphOptions, build_graphs
from vqdeploy.graphs.int8 import quantize_graphs
from vqdeploy.graphs.prior import build_prior_graph
from vqdeploy.proof.advance import told_at_export
from vqdeploy.proof.golden import Answered, golden_batch, golden_images
from vqdeploy.proof.measure import kept_tokens, measure, measured_images
from vqdeploy.proof.prior import check_prior, golden_tokens
from vqdeploy.proof.samples import aimed_images, draw_images
from vqdeploy.proof.structure import check_structure
from vqdeploy.runtime.protobuf import IR_VERSION, read_graph
from vqdeploy.runtime.sessions import CPU, open_sessions
from vqdeploy.sealed import sealed
from vqdeploy.sources import read_source
from vqdeploy.stages import PRIOR_STAGES
from vqdeploy.verify import Written, check_answers
from vqref import modelfile
from vqref.agreement.report import Report
from vqref.errors import InputError, ParityError
from vqref.host.files import publish_folder, require_new_folder
from vqref.modelfile import Model
from vqref.precisions import of_option
from vqref.preprocessing import Preprocessing
from vqref.prior import Prior
from vqref.spec import ModelSpec
from vqref.validation import Array, Params

UNPUBLISHED = {"history", "oracle"}
"""Metrics that stay in model.pt: those of every epoch, and of the checks during training."""


def export(
    source: str | Path | Model,
    output: str | Path,
    *,
    options: GraphOptions | None = None,
    images: Callable[[Model], Array] | None = None,
    replace: bool = False,
) -> Report:
    """Writes a bundle of the model to the folder ``output`` if its graphs agree with the oracle.

    source: a ``model.pt``, a file of parameters, or a model in memory.
    options: how to write the graphs.
    images: a function that returns images (N, C, H, W) in [0, 1] for the model. They serve to
    measure on and to set the ranges of int8. None takes images drawn from the model.
    replace: whether to replace a bundle that exists.

    Returns the report on the agreement. The same model, options and images give the same bytes.

    Raises InputError for a source that cannot be read or an ``output`` that exists (unless
    ``replace``), ParityError if a graph disagrees, MachineError and OSError if nothing can be
    written. ``output`` is then unchanged.
    """
    options, output = options or GraphOptions(), Path(output)
    require_replaceable(output, replace=replace)
    name, model, origin = _source(source)
    spec, params = model.spec, {p.name: model.params[p.name] for p in model.spec.parameters}
    given = None if images is None else images(model)
    try:  # large weights may overflow in a stage, or exceed float16
        options = dataclasses.replace(options, fold=options.folds(spec))
        golden = golden_images(spec, params)
        asked = Answered.of(spec, params, np.concatenate([golden, aimed_images(spec, params)]))
        measured_on = _measured_on(spec, params, given)
        contents = build_graphs(spec, params, options)
    except ValueError as error:
        raise InputError(f"{name}: cannot be exported: {error}") from None
    if options.precision == "int8":
        quantized = measured_on.known.quantized.astype(np.float32)
        inputs = {"images": measured_on.images, "quantized": quantized}
        contents = quantize_graphs(contents, inputs, folded=bool(options.fold))
    graphs = {stage: read_graph(f"{stage}.onnx", content) for stage, content in contents.items()}
    sessions, _ = open_sessions(graphs, spec, "cpu", batch=options.batch)
    report = _agreement(name, spec, params, asked, Written(graphs, sessions, options))
    measured = measure(spec, params, measured_on, sessions, folded=bool(options.fold))
    facts = {
        **_form(spec, options),
        **_origin(model, origin),
        "agreement": {"provider": CPU, **report.to_dict()},
        "measured": {**measured, "of": "images that the model draws" if given is None else "data"},
        "kept": kept_tokens(sessions["tokenizer"](asked.images)[0], asked.known.indices),
    }
    facts |= told_at_export(spec, params, measured_on.images, facts)
    oracle, learned = Oracle(params, golden_batch(asked, len(golden))), model.prior
    if learned is not None:
        golden_prior = golden_tokens(learned.spec, learned.params)
        oracle = Oracle(params, oracle.golden, dict(learned.params), golden_prior)
        contents |= _prior_graphs(name, learned, options, golden_prior)
        facts |= _about_prior(spec, learned, options)
    publish_folder(output, _files(spec, contents, oracle, facts, report), replace=replace)
    return report


def _prior_graphs(
    name: str, learned: Prior, options: GraphOptions, golden: Mapping[str, Array]
) -> dict[str, bytes]:
    """Returns the graphs of a prior. Raises ParityError if they disagree with the oracle."""
    graphs = {
        stage: build_prior_graph(stage, learned.spec, learned.params, options)
        for stage in PRIOR_STAGES
    }
    sessions, _ = open_sessions(graphs, learned.spec, "cpu", batch=options.batch)
    report = Report(tuple(check_prior(learned.spec, learned.params, golden, sessions)))
    if not report.passed:
        what = "not exported: the prior disagrees with the oracle"
        raise ParityError(f"{name}: {what}: {report.failures[0]}", report)
    return {stage: graph.to_bytes() for stage, graph in graphs.items()}


def _about_prior(spec: ModelSpec, learned: Prior, options: GraphOptions) -> dict[str, Any]:
    """Returns the manifest entries that a prior adds or changes."""
    return {
        "graphs": describe_graphs(spec, options.batch, options.index_type, learned.spec),
        "prior": {
            "spec": learned.spec.to_dict(),
            "training": dict(learned.training),
            "nats": float(learned.metrics.get("held_out", 0.0)),
        },
    }


def _source(source: str | Path | Model) -> tuple[str, Model, dict[str, str]]:
    """Returns the model's name in messages, the model, and the manifest entries on its digest.

    Raises InputError for a file that cannot be read and for a model that no file could hold.
    """
    if isinstance(source, Model):
        model = Model.from_plain(source.to_plain())
        digest = modelfile.digest(model.to_plain())
        return "the model", model, {"model_sha256": digest, "model_digest": "in memory"}
    model, digest = read_source(Path(source))
    checked = "checked" if model.digested else "none"
    return str(source), model, {"model_sha256": digest, "model_digest": checked}


def _measured_on(spec: ModelSpec, params: Params, given: Array | None) -> Answered:
    """Returns the images to measure on: the given ones, or some drawn from the model.

    Raises ValueError if there are none.
    """
    images = draw_images(spec, params, measured_images(spec)) if given is None else given
    if not len(images):
        raise ValueError("there are no images to measure it on")
    return Answered.of(spec, params, images)


def _agreement(
    name: str, spec: ModelSpec, params: Params, asked: Answered, written: Written
) -> Report:
    """Returns the report on the graphs to publish. Raises ParityError unless all of them agree."""
    count, codes = len(asked.images), len(np.unique(asked.known.indices))
    answers = check_answers(spec, params, asked, written, count)
    checks = (*answers, *check_structure(spec, params, written.graphs, written.options))
    report = Report(checks, count, codes)
    if not report.passed:
        raise ParityError(
            f"{name}: not exported: the graphs disagree with the oracle: {report.failures[0]}",
            report,
        )
    return report


def _files(
    spec: ModelSpec,
    graphs: Mapping[str, bytes],
    oracle: Oracle,
    facts: Mapping[str, Any],
    report: Report,
) -> dict[str, bytes]:
    """Returns the files of the bundle by name. ``facts`` go into the manifest and the card."""
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
    return {**files, MANIFEST: sealed(manifest)}


def _form(spec: ModelSpec, options: GraphOptions) -> dict[str, Any]:
    """Returns the manifest entries on how the graphs were written."""
    return {
        "precision": of_option(options.precision),
        "opset": options.opset,
        "ir_version": IR_VERSION,
        "graphs_version": GRAPHS_VERSION,
        "target": options.target,
        "batch": options.batch,
        "detokenizer": "table" if options.fold else "network",
        "graphs": describe_graphs(spec, options.batch, options.index_type),
    }


def _origin(model: Model, origin: Mapping[str, str]) -> dict[str, Any]:
    """Returns the manifest entries on the model's origin.

    They say where it came from, how to prepare its pictures, and what exported it.
    """
    from vqdeploy.runtime.library import onnxruntime

    prepared = model.preprocessing or Preprocessing(model.spec.image_shape[0])
    exporter = {name: version(name) for name in ("portable-vqvae", "numpy", "onnx")}
    return {
        "preprocessing": prepared.to_dict(),
        "training": dict(model.training),
        "metrics": {n: value for n, value in model.metrics.items() if n not in UNPUBLISHED},
        "provenance": {
            **model.provenance,
            **origin,
            "export": {"python": platform.python_version(), **exporter},
            "onnxruntime": str(onnxruntime().__version__),
        },
    }


def require_replaceable(output: Path, *, replace: bool) -> None:
    """Raises an error unless a bundle can be written to ``output``.

    Raises InputError if ``output`` exists and may not be replaced, MachineError if nothing can be
    written there. With ``replace``, a bundle of any version and an empty folder may be replaced.
    """
    require_new_folder(output, replace=replace)
    if output.exists() and any(output.iterdir()):
        try:
            read_manifest(output)
        except InputError as error:
            raise InputError(f"{output}: not replaced: it is not a bundle ({error})") from None
