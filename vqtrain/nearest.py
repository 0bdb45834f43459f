"""The nearest code: in the direct form where that is little work, else by matrix products whose near ties the direct form
decides.

The product ||c||^2 / 2 - x.c is off by more than the direct form ||x - c||^2, and nothing but the product is fast. So the
product only says which codes may be nearest: those within a margin of the best, twice what ``vqref.bounds`` says that rounding
can do. The direct form chooses among them; what it chooses is what it would have chosen among all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vqref.bounds import distance_error

PROCESSOR_BYTES, CARD_BYTES = 4 * 2**20, 64 * 2**20
"""Bytes of an intermediate array, so that memory stays flat in the number of latents. On a processor, larger ones leave its
cache, and the allocator gives their pages back each time: ten times as slow."""

PRODUCT_WORK = 2**21
"""Differences, N*S*K*D, from which products are faster: measured by ``python -m benchmarks.nearest``."""

PRODUCT_CODES = 256
"""Codes from which products are faster: the direct form looks at GROUP codes of each latent in any case."""

GROUP = 16
"""Codes of which only the best score is kept: the direct form looks at a group at a time."""

TILE = 64
"""Groups in one product, so that its scores stay in a processor's cache."""

MOST_GROUPS = 8
"""A latent with more groups that may hold its nearest code is compared to every code instead."""

FORMS = ("direct", "expanded")
"""Of a distance, as ``vqref.bounds`` names them, that decide about an index here."""

_FLOAT32_PRODUCTS = {"highest": "float32", "high": "tf32"}
"""What ``torch.set_float32_matmul_precision`` lets a product do; with "medium", factors of 8 bits, none is of use here."""


@torch.no_grad()
def nearest(latents: Tensor, codebook: Tensor) -> Tensor:
    """Indices (N, S) int64 of the codebook rows (K, D) nearest to latents (N, S, D): direct form, the lowest on a tie.

    Memory beside the answer does not grow with N: PROCESSOR_BYTES or CARD_BYTES a few times over, and twice the codebook.
    """
    rows = latents.reshape(-1, latents.shape[-1])
    found = by_products(rows, codebook) if takes_products(rows, codebook) else directly(rows, codebook)
    return found.reshape(latents.shape[:-1])


def takes_products(latents: Tensor, codebook: Tensor) -> bool:
    """Whether ``nearest`` multiplies: on CUDA that waits for the device, so that it cannot be part of a CUDA graph."""
    if len(codebook) < PRODUCT_CODES or latents.numel() * len(codebook) <= PRODUCT_WORK:
        return False
    return latents.dtype == codebook.dtype and product_precision(latents.dtype) is not None


def product_precision(dtype: torch.dtype) -> str | None:
    """The arithmetic of a product of such tensors, as ``vqref.bounds`` names it; None where that has no bound of use."""
    if dtype == torch.float64:
        return "float64"
    return _FLOAT32_PRODUCTS.get(torch.get_float32_matmul_precision()) if dtype == torch.float32 else None


def squared_distances(latents: Tensor, codebook: Tensor) -> Iterator[Tensor]:
    """||x - c||^2 of latents (M, D) and codebook (K, D) in the direct form, (m, K) for a few latents at a time. No gradient."""
    step = min(len(latents), _at_once(latents, codebook.numel()))
    room = torch.empty(step, *codebook.shape, dtype=torch.result_type(latents, codebook), device=latents.device)
    for x in latents.detach().split(max(1, step)):
        difference = torch.sub(x[:, None], codebook, out=room[: len(x)])
        yield difference.square_().sum(dim=-1)


def _at_once(latents: Tensor, elements: int) -> int:
    """How many latents to work on at once, where each takes so many elements."""
    room = PROCESSOR_BYTES if latents.device.type == "cpu" else CARD_BYTES
    return max(1, room // (elements * latents.element_size()))


def directly(latents: Tensor, codebook: Tensor) -> Tensor:
    """Indices (M,) of the codebook rows (K, D) nearest to latents (M, D), every distance in the direct form."""
    if len(latents) <= _at_once(latents, codebook.numel()):
        return (latents[:, None] - codebook).square_().sum(dim=-1).argmin(dim=-1)
    indices = torch.empty(len(latents), dtype=torch.int64, device=latents.device)  # pieces kept apart would scatter the heap
    start = 0
    for distances in squared_distances(latents, codebook):
        torch.argmin(distances, dim=-1, out=indices[start : start + len(distances)])
        start += len(distances)
    return indices


def by_products(latents: Tensor, codebook: Tensor) -> Tensor:
    """The same by matrix products: for each latent and each group of codes the best score, then the direct form on the groups
    that may hold the nearest."""
    count = -(-len(codebook) // GROUP)
    copies = codebook[-1:].expand(GROUP * count - len(codebook), -1)  # of the last row, which stands for them
    groups = torch.cat([codebook, copies]).reshape(GROUP, count, -1)  # code k in group k % count
    norms = groups.square().sum(dim=-1)
    tiles = [
        (norm.reshape(-1) / 2, group.reshape(-1, group.shape[-1]).T.contiguous())
        for norm, group in zip(norms.split(TILE, dim=1), groups.split(TILE, dim=1), strict=True)
    ]
    longest = norms.max().sqrt()
    step = _at_once(latents, max(count, GROUP * TILE, GROUP * codebook.shape[1]))
    room = latents.new_empty(min(step, len(latents)), GROUP * min(TILE, count) + count)
    indices = torch.empty(len(latents), dtype=torch.int64, device=latents.device)
    with torch.autocast(latents.device.type, enabled=False):
        for x, part in zip(latents.split(step), indices.split(step), strict=True):
            part.copy_(_by_groups(x, margin(x, longest), codebook, groups, tiles, room[: len(x)].view(-1)))
    return indices


def _by_groups(
    x: Tensor, limit: Tensor, codebook: Tensor, groups: Tensor, tiles: list[tuple[Tensor, Tensor]], room: Tensor
) -> Tensor:
    """Indices (m,) of latents x (m, D), with their margins (m, 1): groups (GROUP, count, D), for each tile of them half the
    squared norms and the columns, and room for the scores of a tile and the best of each group."""
    m, count = len(x), groups.shape[1]
    best = room[: m * count].view(m, count)
    for part, (half_norms, columns) in zip(best.split(TILE, dim=1), tiles, strict=True):
        scores = room[m * count :][: m * len(half_norms)].view(m, len(half_norms))
        torch.addmm(half_norms, x, columns, alpha=-1, out=scores)
        torch.amin(scores.unflatten(1, (GROUP, part.shape[1])), dim=1, out=part)
    row, group = (best <= best.amin(dim=1, keepdim=True) + limit).nonzero(as_tuple=True)  # (p,) each
    held = torch.bincount(row, minlength=m)
    clear = (held > 0) & (held <= MOST_GROUPS)  # none held: a score that is not a number
    if not (all_clear := bool(clear.all())):
        row, group = row[clear[row]], group[clear[row]]

    found, within = (x[row] - groups[:, group]).square().sum(dim=-1).min(dim=0)  # the first of equals is the lowest code
    last = torch.full_like(row, len(codebook) - 1)
    code = torch.minimum(within * count + group, last)
    least = torch.full_like(x[:, 0], torch.inf).scatter_reduce(0, row, found, "amin")
    index = torch.full_like(held, len(codebook) - 1)
    index.scatter_reduce_(0, row, torch.where(found == least[row], code, last), "amin")
    if not all_clear:
        index[~clear] = directly(x[~clear], codebook)
    return index


def margin(latents: Tensor, largest_norm: Tensor) -> Tensor:
    """By how much the score ||c||^2 / 2 - x.c of latents (M, D) may exceed the best and its code be the choice of the direct
    form all the same, (M, 1): half of the expanded form's error for each of the two scores, and of the direct form's for each
    of the two distances."""
    precision = product_precision(latents.dtype)
    norms, longest = latents.double().norm(dim=-1, keepdim=True), largest_norm.double()
    farthest = (norms + longest).square()
    bound: Any = distance_error  # arithmetic alone, so that it takes tensors as it takes arrays
    error = sum(bound(farthest, norms, longest, latents.shape[-1], precision=precision, form=form) for form in FORMS)
    allowed: Tensor = error * (1 + 1e-6)
    return allowed.to(latents.dtype)
