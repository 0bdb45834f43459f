"""Holds a bundle to the oracle that it carries, on any provider, with numpy and onnxruntime."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

import vqref
from vqdeploy.agreement import check_graphs
from vqdeploy.bundle import FILES, ORACLE, Bundle, Oracle
from vqdeploy.proof.golden import check_recorded
from vqdeploy.proof.samples import check_samples
from vqdeploy.runtime.sessions import open_sessions
from vqdeploy.stages import STAGES
from vqref.agreement.report import Report
from vqref.errors import InputError
from vqref.validation import Array

Placement = dict[str, dict[str, dict[str, int]]]
"""How many nodes of each operator each provider takes: {stage: {provider: {operator: count}}}."""


class Verified(NamedTuple):
    """What a verification found, the device that ran, and where each graph's nodes were placed."""

    report: Report
    device: str
    placement: Placement


def verify(bundle: Bundle, device: str, images: Array | None = None, samples: int = 0) -> Verified:
    """Checks every file's digest, the recorded answers, and the five graphs on ``device``.

    device: "cpu", "cuda" or "auto". images: further images (N, C, H, W), float32 in [0, 1], beside
    the golden batch. samples: how many latents to feed the quantizer, see
    ``vqdeploy.proof.samples``. Raises InputError for a damaged bundle, MachineError if the device
    cannot be used.
    """
    spec, files = bundle.spec, {name: bundle.read(name) for name in FILES}
    oracle = Oracle.from_bytes(files[ORACLE], str(bundle.path / ORACLE))
    graphs = {stage: files[f"{stage}.onnx"] for stage in STAGES}
    try:
        golden = oracle.golden["images"]
        batch = golden if images is None else np.concatenate([golden, images])
        known = vqref.forward(spec, oracle.params, batch)
        recorded = check_recorded(spec, oracle, known)
    except (KeyError, ValueError) as error:
        raise InputError(
            f"{bundle.path}: the oracle file does not fit the manifest: {error}"
        ) from None
    sessions, chosen = open_sessions(graphs, spec, device, batch=bundle.batch)
    run = check_graphs(
        spec,
        oracle.params,
        batch,
        sessions,
        precision=bundle.precision,
        folded=bundle.folded,
        known=known,
    )
    checks = [*recorded.checks, *run.checks]
    if samples:
        checks += check_samples(spec, oracle.params, sessions, samples)
    placement = {stage: session.placement() for stage, session in sessions.items()}
    return Verified(Report(tuple(checks), len(batch)), chosen, placement)
