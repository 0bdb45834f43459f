"""How libraries keep a codebook by moving averages: one recurrence and a table of differences.

Every dialect updates the averages in the same way:

    count <- decay * count + (1 - decay) * hits
    means <- decay * means + (1 - decay) * sum of the latents that hit

Dialects differ in the initial averages and in how they compute the codebook. docs/agreement.md
says what this means for the first step and for codes that are never hit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True)
class Dialect:
    """The rules of one library.

    count: the initial count of every code.
    means: the initial means: the codebook, zeros, or values of their own.
    debiased: whether count and means are divided by 1 - decay^steps before use, as Adam does.
    smoothing: how the codebook is computed. "epsilon" divides the means by count + epsilon.
        "laplace" divides them by the smoothed count (count + epsilon) / (n + K * epsilon) * n,
        where n is the sum of the counts.
    stores_smoothed: whether the smoothed count replaces the count and enters the next average.
    decay, epsilon: the library's defaults.
    source: the code from which the formulas were taken.
    """

    name: str
    count: float
    means: Literal["codebook", "zeros", "own"]
    debiased: bool
    smoothing: Literal["epsilon", "laplace"]
    stores_smoothed: bool
    decay: float
    epsilon: float
    source: str


POST = Dialect(
    name="post",
    count=0.0,
    means="codebook",
    debiased=False,
    smoothing="epsilon",
    stores_smoothed=False,
    decay=0.99,
    epsilon=1e-5,
    source="Keydana 2019, after tensorflow_probability/examples/vq_vae.py (zero_debias=False)",
)

DIALECTS: Mapping[str, Dialect] = MappingProxyType(
    {
        dialect.name: dialect
        for dialect in (
            POST,
            Dialect(
                name="sonnet",
                count=0.0,
                means="zeros",
                debiased=True,
                smoothing="laplace",
                stores_smoothed=False,
                decay=0.99,
                epsilon=1e-5,
                source="google-deepmind/sonnet, sonnet/src/nets/vqvae.py and moving_averages.py",
            ),
            Dialect(
                name="rosinality",
                count=1.0,
                means="codebook",
                debiased=False,
                smoothing="laplace",
                stores_smoothed=False,
                decay=0.99,
                epsilon=1e-5,
                source="rosinality/vq-vae-2-pytorch, vqvae.py, at 29e36e7 "
                "(older versions start from count 0)",
            ),
            Dialect(
                name="zalandoresearch",
                count=0.0,
                means="own",
                debiased=False,
                smoothing="laplace",
                stores_smoothed=True,
                decay=0.99,
                epsilon=1e-5,
                source="zalandoresearch/pytorch-vq-vae, vq-vae.ipynb, class VectorQuantizerEMA",
            ),
            Dialect(
                name="vector-quantize-pytorch",
                count=1.0,
                means="codebook",
                debiased=False,
                smoothing="laplace",
                stores_smoothed=False,
                decay=0.8,
                epsilon=1e-5,
                source="lucidrains/vector-quantize-pytorch 1.32, vector_quantize_pytorch.py, "
                "class Codebook",
            ),
        )
    }
)
"""The dialects by name."""
