"""What a bundle's graphs lose beside the float64 oracle: tokens, nats, and fidelity."""

from __future__ import annotations

import numpy as np

import vqref
from vqdeploy.agreement import Sessions
from vqdeploy.proof.golden import Answered
from vqref.agreement.budget import images_within
from vqref.model import Forward
from vqref.spec import CODEBOOK, ModelSpec
from vqref.validation import Array, Params

MEASURED_IMAGES, MEASURED_SECONDS = 256, 60.0
"""Images that are measured, and that int8 takes its ranges from; fewer if the oracle would take
longer."""

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
