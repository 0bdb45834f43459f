"""Sizes of a graph's search by products, which the graph is made of and batches are measured by."""

from __future__ import annotations

import math

from vqref.spec import ModelSpec

SMALLEST_GROUP = 16
"""Codes of which only the best score is kept, at least."""

TILE_SCORES, MOST_TILES = 2**20, 256
"""Scores of an image, 4 MiB, that one product gives, if that takes no more products than this."""

GROUP_BYTES, CODE_BYTES = 13, 24
"""What a latent takes for each group of codes, for scores and distances, and for each element of
the codes of one group, for a few that are compared."""


def group_size(spec: ModelSpec) -> int:
    """Codes of which only the best score is kept: the power of two by which a latent takes the
    least."""
    wanted = math.sqrt(GROUP_BYTES / CODE_BYTES * spec.num_codes / spec.code_size)
    return int(max(SMALLEST_GROUP, 2 ** round(math.log2(wanted))))


def tile_size(spec: ModelSpec) -> int:
    """Codes in one product, a multiple of the group's size."""
    group, count = group_size(spec), spec.num_codes
    wanted = max(TILE_SCORES // spec.latent_size, count // MOST_TILES, group)
    return -(-wanted // group) * group


def bytes_per_latent(spec: ModelSpec) -> int:
    """Roughly what a latent takes at a time. At S 1,024, K 16,384 and D 64 that is 54 MiB per
    image, where 54 were measured; at 4,096, 262,144 and 8 it is 274, where 200 were."""
    group = group_size(spec)
    tile = min(tile_size(spec), spec.num_codes)
    held = GROUP_BYTES * -(-spec.num_codes // group) + CODE_BYTES * group * spec.code_size
    return 4 * tile + held
