"""Measures what a bundle's graphs lose against the float64 oracle: tokens, nats, and fidelity."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

import vqref
from vqdeploy.agreement import Sessions
from vqdeploy.proof.golden import Answered
from vqref.agreement.budget import images_within
from vqref.agreement.report import Check
from vqref.model import Forward
from vqref.spec import CODEBOOK, ModelSpec
from vqref.validation import Array, Params

MEASURED_IMAGES, MEASURED_SECONDS = 256, 60.0
"""The most images to measure on, which also set the ranges of int8, and the seconds that the oracle
may take for them."""

LEAST_KEPT = 0.1
"""The least share that a network must keep of the tokens that a constant answer in each position
misses."""

OTHER_MACHINES = 5
"""The factor by which the expected loss of tokens grows for a float16 network on another machine.
An export runs the network on a CPU, where onnxruntime multiplies in float32 and rounds what it
stores; a card multiplies in float16. A network that lost 3 of 10,368 tokens at export lost 10 on an
H200."""

LEAST_ERROR = 1e-10
"""The least mean squared error and variance that count. An exact copy thus has a PSNR of 100 dB."""


def measured_images(spec: ModelSpec) -> int:
    """Returns how many images an export measures by default for a model of ``spec``."""
    return images_within(spec, MEASURED_IMAGES, MEASURED_SECONDS)


def measure(
    spec: ModelSpec,
    params: Params,
    seen: Answered,
    sessions: Sessions,
    *,
    folded: bool = False,
) -> dict[str, float | int]:
    """Compares the graphs' answers on images with the oracle's.

    folded: whether the detokenizer is a table, whose entries are the oracle's.

    Returns images (their number) and equal_tokens, the share of indices that are the oracle's. It
    also returns nats (per image), nmse (the mean squared error over the variance of the images) and
    psnr (dB, of the mean squared error) of the graphs' tokens and reconstructions. The same names
    with ``_lost`` say how much worse each is than the oracle's.
    """
    images, known = seen
    indices = sessions["tokenizer"](images)[0]
    reconstructions = sessions["detokenizer"](indices)[0]
    outputs = _outputs(spec, params, indices, known, sessions, folded)
    nats = float(vqref.nats(spec, images, outputs).mean())
    error, best = _error(images, reconstructions), _error(images, known.reconstructions)
    variance = max(float(np.var(images, dtype=np.float64)), LEAST_ERROR)
    return {
        "images": len(images),
        "equal_tokens": float((indices == known.indices).mean()),
        "nats": nats,
        "nats_lost": nats - float(vqref.nats(spec, images, known.outputs).mean()),
        "nmse": error / variance,
        "nmse_lost": (error - best) / variance,
        "psnr": -10 * float(np.log10(error)),
        "psnr_lost": 10 * float(np.log10(error / best)),
    }


def kept_tokens(indices: Array, exact: Array) -> dict[str, int]:
    """Returns the number of tokens (N, S), and how many of the graphs' equal the oracle's."""
    return {"tokens": exact.size, "equal": int((indices == exact).sum())}


def check_kept(
    precision: str, indices: Array, exact: Array, recorded: Mapping[str, int] | None = None
) -> Check:
    """Checks that networks of few bits keep enough of the oracle's tokens.

    They may lose at most half of the tokens, or the share 1 - LEAST_KEPT of those that a constant
    answer in each position loses, whichever is more. After the export they must also lose not many
    more than at export. Other machines round differently, so three standard deviations of a random
    count are added to the count at export. For float16 it is first multiplied by OTHER_MACHINES.

    indices: (N, S), the graphs'. exact: (N, S), the oracle's. recorded: what ``kept_tokens`` found
    on the same images at export; None during the export.
    """
    tokens = exact.size
    differ = tokens - kept_tokens(indices, exact)["equal"]
    constant = sum(int(np.bincount(column).max()) for column in exact.T)
    answer = f"a constant answer in each position keeps {constant}"
    limits = {answer: max(tokens / 2, (1 - LEAST_KEPT) * (tokens - constant))}
    if recorded is not None:
        share = recorded["equal"] / max(1, recorded["tokens"])
        before = (1 - share) * tokens * (OTHER_MACHINES if precision == "float16" else 1)
        limits[f"{share:.2%} were at export"] = before + 3 * math.sqrt(before + 1)
    why, most = min(limits.items(), key=lambda limit: limit[1])
    wrong = max(0, math.ceil(differ - most))
    problem = f"{1 - differ / tokens:.2%} of the tokens are the oracle's; {why}" if wrong else None
    return Check("kept tokens", precision, tokens, wrong, problem=problem)


def _outputs(
    spec: ModelSpec,
    params: Params,
    indices: Array,
    known: Forward,
    sessions: Sessions,
    folded: bool,
) -> Array:
    """Returns the decoder's outputs for the graphs' tokens; the oracle's if there is a table."""
    codebook = params[CODEBOOK]
    if not folded:
        return sessions["decoder"](codebook[indices])[0]
    outputs = known.outputs.copy()
    other = (indices != known.indices).any(axis=1)
    outputs[other] = vqref.decode(spec, params, codebook[indices[other]])
    return outputs


def _error(images: Array, reconstructions: Array) -> float:
    """Returns the mean squared error of values in [0, 1], at least LEAST_ERROR."""
    return max(float(np.square(images - reconstructions, dtype=np.float64).mean()), LEAST_ERROR)
