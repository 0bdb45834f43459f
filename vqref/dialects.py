"""How libraries keep a codebook by moving averages: one recurrence, and a table of how they differ.

Every dialect moves the averages alike:

    count <- decay * count + (1 - decay) * hits
    means <- decay * means + (1 - decay) * sum of the latents that hit

They differ in where the averages start and in how the codebook is made of them. docs/agreement.md
says what follows for the first step and for codes that are never hit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True)
class Dialect:
    """The rules of one library.

    count: the value from which every code's count starts.
    means: what the means start from: the codebook, zeros, or values of their own.
    debiased: whether count and means are divided by 1 - decay^steps before they are used, which is
        Adam's correction.
    smoothing: "epsilon" if the codebook is means over count + epsilon; "laplace" if it is means
        over the smoothed count (count + epsilon) / (n + K * epsilon) * n, n the sum of the counts.
    stores_smoothed: whether the smoothed count takes the place of the count, and is averaged on.
    decay, epsilon: the library's defaults.
    source: where its formulas were read.
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
"""By name."""
