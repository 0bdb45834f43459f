"""How many images one check may take.

The oracle's cost grows with the network; the time of a check must not.
"""

from __future__ import annotations

import math

from vqref.agreement.arithmetics import unbounded
from vqref.spec import ModelSpec

SECONDS = 2.0
"""About how long one check of the oracle may take on two cores."""

FEWEST, LONGEST = 4, 60.0
"""If SECONDS is too short, a check takes up to FEWEST images within LONGEST seconds.

It takes one image however long that takes."""

PRODUCTS_PER_SECOND = 4e9
"""The oracle's speed in convolutions, measured by ``python -m benchmarks.oracle``."""

DIFFERENCES_PER_SECOND = 1.5e9
"""The oracle's speed in squared distances, which a check computes about three times."""


def seconds_per_image(spec: ModelSpec) -> float:
    """Returns about how long one image takes in a check.

    Counts encoder, decoder and the distances to every code.
    """
    products = sum(layer.products for layer in spec.layers)
    differences = spec.latent_size * spec.num_codes * spec.code_size
    return products / PRODUCTS_PER_SECOND + 3 * differences / DIFFERENCES_PER_SECOND


TOKENS_PULLED = 16
"""How many unproved tokens take as long as an image's pass, because each is pulled back."""


def seconds_per_proof(spec: ModelSpec) -> float:
    """Returns about how long a first look at one image takes if it proves nothing.

    Infinite for an encoder with ``unbounded`` rows, of which nothing can be proved.
    """
    if unbounded(spec.encoder):
        return math.inf
    return seconds_per_image(spec) * (1 + spec.latent_size / TOKENS_PULLED)


def images_within(spec: ModelSpec, most: int = 64, seconds: float = SECONDS) -> int:
    """Returns how many images fit into ``seconds``, at most ``most``.

    If fewer than FEWEST fit, returns as many of FEWEST as fit into LONGEST, but at least one. The
    answer is the same on every machine.
    """
    one = seconds_per_image(spec)
    return min(most, max(1, int(seconds / one), min(FEWEST, int(LONGEST / one))))
