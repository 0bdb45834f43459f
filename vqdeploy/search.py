"""Sizes of the search by products in a graph: they shape the graph and limit the batch."""

from __future__ import annotations

import math

from vqref.spec import ModelSpec

SMALLEST_GROUP = 4
"""The fewest codes in a group. Of each group only the best score is kept."""

TILE_SCORES, MOST_TILES = 2**20, 256
"""How many scores of an image (4 MiB) one product gives. If that would take more than MOST_TILES
products, each gives more."""

GROUP_BYTES, CODE_BYTES = 13, 24
"""Bytes that a latent takes: per group of codes, for scores and distances; and per element of the
codes of one group, for the few groups that are compared."""


def group_size(spec: ModelSpec) -> int:
    """Returns the number of codes in a group: the power of two that takes the least memory."""
    wanted = math.sqrt(GROUP_BYTES / CODE_BYTES * spec.num_codes / spec.code_size)
    return int(max(SMALLEST_GROUP, 2 ** round(math.log2(wanted))))


def tile_size(spec: ModelSpec) -> int:
    """Returns the number of codes in one product, a multiple of the group's size."""
    group, count = group_size(spec), spec.num_codes
    wanted = max(TILE_SCORES // spec.latent_size, count // MOST_TILES, group)
    return -(-wanted // group) * group


def bytes_per_latent(spec: ModelSpec) -> int:
    """Returns roughly how many bytes a latent takes at a time.

    With S = 1,024, K = 16,384 and D = 64 this gives 54 MiB per image; 54 were measured. With
    S = 4,096, K = 262,144 and D = 8 it gives 274 MiB; 200 were measured.
    """
    group = group_size(spec)
    tile = min(tile_size(spec), spec.num_codes)
    held = GROUP_BYTES * -(-spec.num_codes // group) + CODE_BYTES * group * spec.code_size
    return 4 * tile + held
