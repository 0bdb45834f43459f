"""A bundle held to the oracle that it carries, on any provider, with numpy and onnxruntime alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

import vqref
from vqdeploy.bundle import FILES, Bundle, Oracle
from vqdeploy.samples import check_samples, draw_images
from vqdeploy.sessions import open_sessions
from vqdeploy.stages import STAGES
from vqref.agreement import Backend, check_probabilities, compare
from vqref.commandline import InputError
from vqref.parity import check, check_indices
from vqref.report import Report
from vqref.spec import CODEBOOK, ModelSpec
from vqref.validation import Params

Array = npt.NDArray[Any]

GOLDEN_SAMPLES, GOLDEN_NOISE = 24, 5
GOLDEN_IMAGES = GOLDEN_SAMPLES + GOLDEN_NOISE + 3
"""Of the golden batch: images that the model itself draws, noise, and all of them with three extremes."""


def verify(bundle: Bundle, device: str, images: Array | None = None, samples: int = 0) -> tuple[Report, str]:
    """Every file's digest, the golden batch's recorded answers, and the five graphs on ``device`` against the oracle.

    device: "cpu", "cuda" or "auto". images: further images (N, C, H, W), float32 in [0, 1], to compare the graphs on beside
    the golden batch. samples: how many latents to feed the quantizer beside, see ``vqdeploy.samples``.
    Returns the report and the device that ran. Raises InputError for a damaged bundle, MachineError where the device cannot
    be used.
    """
    for name in FILES:
        bundle.read(name)
    oracle = bundle.oracle()
    try:
        recorded = check_recorded(bundle.spec, oracle)
    except (KeyError, ValueError) as error:
        raise InputError(f"{bundle.path}: the oracle file does not fit the manifest: {error}") from None
    graphs = {stage: bundle.graph(stage) for stage in STAGES}
    sessions, chosen = open_sessions(graphs, bundle.spec, device, batch=bundle.batch)
    batch = oracle.golden["images"]
    if images is not None:
        batch = np.concatenate([batch, images])
    run = check_graphs(bundle.spec, oracle.params, batch, sessions, precision=bundle.precision, folded=bundle.folded)
    checks = [*recorded.checks, *run.checks]
    if samples:
        checks += check_samples(bundle.spec, oracle.params, sessions, samples)
    return Report(tuple(checks)), chosen


def check_graphs(
    spec: ModelSpec,
    params: Params,
    images: Array,
    sessions: Mapping[str, Callable[[Array], list[Array]]],
    *,
    precision: str = "float32",
    folded: bool = False,
) -> Report:
    """The five graphs, each fed the oracle's input, on images (N, C, H, W) in [0, 1]. precision: of the networks, a row of
    ``vqref.parity.TOLERANCES``; folded: the detokenizer is a table, and float32 whatever they are."""

    def quantizer(latents: Array) -> tuple[Array, Array]:
        indices, quantized = sessions["quantizer"](latents)
        return indices, quantized

    def decoder(quantized: Array) -> tuple[Array, Array]:
        logits, probabilities = sessions["decoder"](quantized)
        return logits, probabilities

    backend = Backend(
        precision=precision,
        quantizer_precision="float32",
        detokenizer_precision="float32" if folded else None,
        encoder=lambda images: sessions["encoder"](images)[0],
        quantizer=quantizer,
        decoder=decoder,
        tokenizer=lambda images: sessions["tokenizer"](images)[0],
        detokenizer=lambda indices: sessions["detokenizer"](indices)[0],
    )
    return compare(spec, params, images, backend)


def golden_batch(spec: ModelSpec, params: Params) -> dict[str, Array]:
    """Images that need no data set, and the oracle's float64 answers: the same for the same model.

    Most of the model's own distribution (decoded indices, drawn as often as training hit them), plain and under noise;
    then noise, black, white and one bright pixel.
    """
    drawn = draw_images(spec, params, GOLDEN_SAMPLES)
    noise = np.random.default_rng(0).random((GOLDEN_NOISE, *spec.image_shape))
    extremes = np.zeros((3, *spec.image_shape))
    extremes[1] = 1.0
    extremes[2, :, spec.image_shape[1] // 2, spec.image_shape[2] // 2] = 1.0
    images = np.concatenate([drawn, noise, extremes]).astype(np.float32)
    return {"images": images, **_answers(spec, params, images)}


def check_recorded(spec: ModelSpec, oracle: Oracle) -> Report:
    """The answers that the bundle recorded beside those that the oracle gives here and now, in float64: all six."""
    golden, codebook = oracle.golden, np.asarray(oracle.params[CODEBOOK], np.float64)
    now = _answers(spec, oracle.params, golden["images"])
    best = np.square(golden["latents"] - codebook[now["indices"]]).sum(axis=2)  # (N, S)
    both = 2 * best + np.where(np.isfinite(now["gap"]), now["gap"], 0.0)  # the two squared distances that the gap is between
    rows = codebook[np.clip(golden["indices"], 0, spec.num_codes - 1)]
    return Report(
        (
            check("encoder", golden["latents"], now["latents"], precision="float64", name="golden latents"),
            check_indices(golden["indices"], golden["latents"], codebook, precision="float64", name="golden indices"),
            check("gap", golden["gap"], now["gap"], precision="float64", name="golden gap", magnitude=both),
            check("copy", golden["quantized"], rows, precision="float64", name="golden rows"),
            check("decoder", golden["logits"], now["logits"], precision="float64", name="golden logits"),
            check_probabilities("golden probs", golden["probabilities"], now["logits"], "float64"),
        )
    )


def _answers(spec: ModelSpec, params: Params, images: Array) -> dict[str, Array]:
    out = vqref.forward(spec, params, images)
    names = ("latents", "indices", "gap", "quantized", "logits", "probabilities")
    return {name: getattr(out, name) for name in names}
