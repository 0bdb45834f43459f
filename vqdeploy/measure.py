"""What a bundle's graphs make of images, beside the float64 oracle: equal tokens, and nats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

import vqref
from vqref.spec import ModelSpec
from vqref.validation import Params

Array = npt.NDArray[Any]


def measure(
    spec: ModelSpec, params: Params, images: Array, sessions: Mapping[str, Callable[[Array], list[Array]]]
) -> dict[str, float | int]:
    """images; equal_tokens, the share of indices that are the oracle's; nats, the reconstruction loss in nats an image of the
    graphs' own tokens and probabilities; nats_lost, by how much that is more than the oracle's."""
    out = vqref.forward(spec, params, images)
    indices = sessions["tokenizer"](images)[0]
    exact = nats(images, vqref.sigmoid(out.logits))
    found = nats(images, sessions["detokenizer"](indices)[0])
    return {
        "images": len(images),
        "equal_tokens": float((indices == out.indices).mean()),
        "nats": found,
        "nats_lost": found - exact,
    }


def nats(images: Array, probabilities: Array) -> float:
    """Minus the Bernoulli log-probability of grey levels (N, C, H, W), nats an image; probabilities are kept 1e-7 off 0 and 1,
    where float32 has no more to say."""
    p = np.clip(np.asarray(probabilities, np.float64), 1e-7, 1 - 1e-7)
    x = np.asarray(images, np.float64)
    return float(-(x * np.log(p) + (1 - x) * np.log1p(-p)).sum() / len(x))
