"""How many images one check may take: the oracle's cost grows with the network, a check's may
not."""

from __future__ import annotations

import math

from vqref.agreement.arithmetics import unbounded
from vqref.spec import ModelSpec

SECONDS = 2.0
"""About what one check of the oracle may take on two cores."""

FEWEST, LONGEST = 4, 60.0
"""Images that a check takes if they take longer than SECONDS, up to so many seconds; one image is
taken however long it takes."""

PRODUCTS_PER_SECOND = 4e9
"""Of the oracle's convolutions: measured by ``python -m benchmarks.oracle``."""

DIFFERENCES_PER_SECOND = 1.5e9
"""Of its squared distances, which a check computes about three times."""


def seconds_per_image(spec: ModelSpec) -> float:
    """About how long one image takes in a check: through encoder and decoder, and beside every
    code."""
    products = sum(layer.products for layer in spec.layers)
    differences = spec.latent_size * spec.num_codes * spec.code_size
    return products / PRODUCTS_PER_SECOND + 3 * differences / DIFFERENCES_PER_SECOND


TOKENS_PULLED = 16
"""Tokens of which nothing is proved that take as long as an image's pass: each is pulled back."""


def seconds_per_proof(spec: ModelSpec) -> float:
    """About how long a first look at one image takes if nothing of it can be proved; infinitely
    long if it is known that nothing can, of an encoder with ``unbounded`` rows."""
    if unbounded(spec.encoder):
        return math.inf
    return seconds_per_image(spec) * (1 + spec.latent_size / TOKENS_PULLED)


def images_within(spec: ModelSpec, most: int = 64, seconds: float = SECONDS) -> int:
    """How many images fit ``seconds``, at most ``most``; FEWEST if these fit LONGEST, and at least
    one. The same on every machine."""
    one = seconds_per_image(spec)
    return min(most, max(1, int(seconds / one), min(FEWEST, int(LONGEST / one))))
