"""How libraries keep a codebook by moving averages: the same recurrence, with rules that differ. A table, not copies.

Every dialect moves the averages alike:

    count <- decay * count + (1 - decay) * hits
    means <- decay * means + (1 - decay) * sum of the latents that hit

and differs in where they start and in what the codebook is then made of. docs/agreement.md says what that does to the first
step and to codes that are never hit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True)
class Dialect:
    """The rules of one library.

    count      the value that every code's count starts from
    means      what the means start from: the codebook, zeros, or values of their own
    debiased   count and means are divided by 1 - decay^steps before they are used (Adam's correction)
    smoothing  the codebook is means over count + epsilon ("epsilon"), or means over the smoothed count
               (count + epsilon) / (n + K * epsilon) * n, n the sum of the counts ("laplace")
    stores_smoothed  the smoothed count takes the count's place, and is averaged on
    decay, epsilon   the library's defaults
    source     where its formulas were read
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
                source="rosinality/vq-vae-2-pytorch, vqvae.py, at 29e36e7 (older versions start from count 0)",
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
                source="lucidrains/vector-quantize-pytorch 1.32, vector_quantize_pytorch.py, class Codebook",
            ),
        )
    }
)
"""By name."""
