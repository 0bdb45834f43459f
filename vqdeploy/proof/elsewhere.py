"""Turns the judge's rules into plain data, for checks by a runtime without this package.

The data say, for the golden batch, by how much the values of each image may be off and which codes
each token may have. So a page in a browser only compares, and knows nothing of tolerances.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vqdeploy.bundle import Oracle
from vqref import prior
from vqref.agreement.bounds import choices
from vqref.agreement.parity import allowed_error, tolerance
from vqref.agreement.stages import latents_error, reconstruction_scale, unit_scale
from vqref.network import encode_unscaled
from vqref.prior import PriorSpec
from vqref.quantizer import squared_distances
from vqref.spec import CODEBOOK, ModelSpec
from vqref.validation import Array, Float64

WALKED = 2**17
"""About how many log-probabilities of a prior are checked: those of the first positions, for a few
rows of tokens."""


def golden_checks(
    spec: ModelSpec, oracle: Oracle, precision: str, *, folded: bool
) -> list[dict[str, Any]]:
    """Returns the checks of the five graphs, in the order of the report.

    precision: the networks' precision. folded: whether the detokenizer is a table. Each graph takes
    the oracle's input. A check names its graph, the golden array to feed, and its rule:

    values: ``output`` must equal the golden array of that name. Each value may be off by at most
        ``tolerance`` times the ``scale`` of its image.
    tokens: the tokens, flat, must equal ``expected``. Where ``ties`` {place: codes} has an entry,
        any of its codes is right.
    copies: ``quantized`` must hold the rows of the codebook that ``indices`` name.
    """
    golden, latents = oracle.golden, oracle.golden["latents"]
    unscaled = (
        encode_unscaled(spec, oracle.params, golden["images"]) if spec.normalized else latents
    )
    codebook = np.asarray(oracle.params[CODEBOOK], np.float64)

    def values(name: str, stage: str, graph: str, output: str, scale: Array, number: str) -> Any:
        allowed = {"scale": _per_image(scale), "tolerance": tolerance(stage, number).relative}
        fed = {"encoder": "images", "decoder": "quantized", "detokenizer": "indices"}[graph]
        return {**_check(name, graph, fed, "values"), "output": output, **allowed}

    def relative(stage: str, expected: Array) -> Array:
        return (
            allowed_error(stage, expected, precision=precision)
            / tolerance(stage, precision).relative
        )

    scale = relative("encoder", latents)
    if spec.normalized:  # per image, the scale of the latent that may be off the most
        scale = unit_scale(unscaled, latents).max(axis=(1, 2), keepdims=True)
    means = reconstruction_scale(spec, golden["outputs"])
    table = "float32" if folded else precision
    as_fed = latents.astype(np.float32).astype(np.float64)
    return [
        values("encoder", "encoder", "encoder", "latents", scale, precision),
        _tokens("quantizer", "latents", as_fed, codebook),
        _check("quantized", "quantizer", "latents", "copies"),
        _tokens("tokenizer", "images", latents, codebook, latents_error(spec, unscaled, precision)),
        values(
            "decoder",
            "decoder",
            "decoder",
            "outputs",
            relative("decoder", golden["outputs"]),
            precision,
        ),
        values(
            "reconstructions", "reconstructions", "decoder", "reconstructions", means, precision
        ),
        values("detokenizer", "reconstructions", "detokenizer", "reconstructions", means, table),
    ]


def prior_check(spec: PriorSpec, oracle: Oracle) -> tuple[dict[str, Any], Mapping[str, Array]]:
    """Returns the check of a prior's graph for one step, and the arrays of the check.

    The arrays: ``prior_indices`` (n, S), and ``log_probabilities`` (n, P, K) of the first P
    positions. The check runs one position after another.
    """
    rows = oracle.golden_prior["indices"]
    rows = rows[: max(1, WALKED // (spec.latent_size * spec.num_codes))]
    expected = prior.log_probabilities(spec, oracle.prior, rows)
    expected = expected[:, : max(1, WALKED // (len(rows) * spec.num_codes))]
    stage, precision = "log_probabilities", "float32"
    relative = tolerance(stage, precision).relative
    scale = _per_image(allowed_error(stage, expected, precision=precision) / relative)
    check = _check("prior_step", "prior_step", "prior_indices", "values")
    allowed = {"output": stage, "scale": scale, "tolerance": relative}
    return {**check, **allowed}, {"prior_indices": rows, stage: expected}


def _check(name: str, graph: str, fed: str, rule: str) -> dict[str, Any]:
    return {"name": name, "graph": graph, "input": fed, "rule": rule}


def _per_image(scale: Array) -> list[float]:
    """Returns a scale that all values of an image share as a list of N numbers."""
    found: list[float] = scale.reshape(len(scale), -1)[:, 0].tolist()
    return found


def _tokens(
    graph: str, fed: str, latents: Array, codebook: Float64, moved: Float64 | float = 0.0
) -> dict[str, Any]:
    """Returns the check of tokens whose latents (N, S, D) may be off by ``moved``.

    moved: a number, or (N, S).
    """
    flat = latents.reshape(-1, latents.shape[2])
    off = np.broadcast_to(moved, latents.shape[:2]).reshape(-1, 1)
    expected = list[int]()
    ties = dict[str, list[int]]()
    for rows, best, fits in _fitting(flat, codebook, off):
        expected += best.tolist()
        for row in np.flatnonzero(fits.sum(axis=1) > 1):
            ties[str(rows.start + row)] = np.flatnonzero(fits[row]).tolist()
    return {**_check(graph, graph, fed, "tokens"), "expected": expected, "ties": ties}


def _fitting(
    latents: Float64, codebook: Float64, moved: Float64
) -> Iterator[tuple[slice, Array, Array]]:
    """Yields rows, the nearest code of each latent (M, D), and the codes (M, K) it may get."""
    for rows, distances in squared_distances(latents, codebook):
        best, excess = choices(
            distances, latents[rows], codebook, precision="float32", moved=moved[rows]
        )
        yield rows, best, excess <= 0
