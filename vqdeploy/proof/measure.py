"""What a bundle's graphs lose beside the float64 oracle: tokens, nats, and fidelity."""

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
"""Images that are measured, and that int8 takes its ranges from; fewer if the oracle would take
longer."""

LEAST_KEPT = 0.1
"""Of the tokens that a constant answer in each position would miss, the share that a network must
keep whatever was recorded."""

OTHER_MACHINES = 5
"""How many times as many tokens of a float16 network another machine may lose. An export runs it on
a processor, where onnxruntime multiplies in float32 and rounds what it stores; a card multiplies in
float16. On an H200 a network lost 10 of 10,368 tokens that had lost 3."""

LEAST_ERROR = 1e-10
"""Mean squared errors and variances below this count as this, 100 dB: exact copies have no PSNR."""


def measured_images(spec: ModelSpec) -> int:
    """How many images of a model of ``spec`` an export measures, unless it is told how many."""
    return images_within(spec, MEASURED_IMAGES, MEASURED_SECONDS)


def measure(
    spec: ModelSpec,
    params: Params,
    seen: Answered,
    sessions: Sessions,
    *,
    folded: bool = False,
) -> dict[str, float | int]:
    """Compares what the graphs make of images with the oracle's answers.

    folded: the detokenizer is a table, whose entries are the oracle's.

    Returns images, equal_tokens (the share of indices that are the oracle's), and for the graphs'
    own tokens and reconstructions nats per image, nmse (the mean squared error over the images'
    variance) and psnr (dB, of the mean squared error); with ``_lost``, how much worse each is than
    the oracle's.
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
    """How many of the oracle's tokens (N, S) the graphs' own are: tokens in all, and equal ones."""
    return {"tokens": exact.size, "equal": int((indices == exact).sum())}


def check_kept(
    precision: str, indices: Array, exact: Array, recorded: Mapping[str, int] | None = None
) -> Check:
    """Holds the share of tokens that networks of few bits keep to what was recorded at export, and
    to what they must keep at the least: half of them, or more than a constant answer does.

    indices: (N, S), the graphs'. exact: the oracle's. recorded: what ``kept_tokens`` found of
    the same images at export; None if this is the export. Other machines round otherwise, so a few
    more may differ: three deviations of the count, as of one that chance decides. Of float16 the
    expected count is OTHER_MACHINES times as many.
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
    """The decoder's outputs for the graphs' tokens: a table holds the oracle's own."""
    codebook = params[CODEBOOK]
    if not folded:
        return sessions["decoder"](codebook[indices])[0]
    outputs = known.outputs.copy()
    other = (indices != known.indices).any(axis=1)
    outputs[other] = vqref.decode(spec, params, codebook[indices[other]])
    return outputs


def _error(images: Array, reconstructions: Array) -> float:
    """The mean squared error of values in [0, 1]."""
    return max(float(np.square(images - reconstructions, dtype=np.float64).mean()), LEAST_ERROR)
