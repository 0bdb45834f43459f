"""Finds nearest codes: by the direct form if there is little work, else by matrix products.

The product

c

^2 / 2 - x.c is fast, but less exact than the direct form

x - c

^2. So the product only tells which codes may be nearest: those with a score within a margin of the
best. ``vqref.agreement.bounds`` derives the margin from rounding. The direct form then chooses
among these codes. It would choose the same one among all codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from vqref.agreement.bounds import score_slack

PROCESSOR_BYTES, CARD_BYTES = 4 * 2**20, 64 * 2**20
"""The most bytes of an intermediate array, so that memory does not grow with the number of latents.
On a processor, larger arrays are ten times as slow: they do not fit its cache, and the allocator
gives their pages back each time."""

PRODUCT_WORK = 2**21
"""Products are faster if there are more differences (N*S*K*D) than this.
``python -m benchmarks.nearest`` measures it."""

PRODUCT_CODES = 256
"""Products are faster if there are at least this many codes. After the products, the direct form
still compares each latent with GROUP codes."""

GROUP = 16
"""The fewest codes in a group. Only the best score of a group is kept; the direct form looks at the
whole group."""

TILE = 4096
"""Codes in one product."""

MOST_SCORES = 1024
"""All scores are kept if there are at most this many codes."""

MOST_GROUPS = 8
"""If more groups than this may hold a latent's nearest code, it is compared with every code."""

_FLOAT32_PRODUCTS = {"highest": "float32", "high": "tf32"}
"""The arithmetic of a product under each ``torch.set_float32_matmul_precision``. "medium" is not
here: its factors have only 8 bits, so its products are useless."""


@torch.no_grad()
def nearest(latents: Tensor, codebook: Tensor) -> Tensor:
    """Returns indices (N, S) int64 of the codebook rows (K, D) nearest to latents (N, S, D).

    They are the indices of the direct form, the lowest on a tie. Memory, apart from the result,
    does not grow with N. It is a few times PROCESSOR_BYTES or CARD_BYTES, plus twice the codebook.
    """
    rows = latents.reshape(-1, latents.shape[-1])
    found = (
        by_products(rows, codebook) if takes_products(rows, codebook) else directly(rows, codebook)
    )
    return found.reshape(latents.shape[:-1])


def takes_products(latents: Tensor, codebook: Tensor) -> bool:
    """Returns whether ``nearest`` uses products.

    On CUDA, products wait for the device, so a CUDA graph cannot hold them.
    """
    if len(codebook) < PRODUCT_CODES or latents.numel() * len(codebook) <= PRODUCT_WORK:
        return False
    return latents.dtype == codebook.dtype and product_precision(latents.dtype) is not None


def product_precision(dtype: torch.dtype) -> str | None:
    """Returns the arithmetic of a product in ``dtype``, by its name in ``vqref.agreement.bounds``.

    Returns None if it has no useful bound.
    """
    if dtype == torch.float64:
        return "float64"
    return (
        _FLOAT32_PRODUCTS.get(torch.get_float32_matmul_precision())
        if dtype == torch.float32
        else None
    )


def squared_distances(latents: Tensor, codebook: Tensor, first: int = 0) -> Iterator[Tensor]:
    """Yields

    x - c

    ^2 of latents (M, D) and codebook (K, D) in the direct form.

    Each part is (m, K), for ``at_once`` latents, without gradient.

    first: how many latents of the same batch come before these. Parts always end at the same
    latents of the batch, wherever these begin.
    """
    most = at_once(latents, codebook)
    step = min(len(latents), most)
    room = torch.empty(
        step, *codebook.shape, dtype=torch.result_type(latents, codebook), device=latents.device
    )
    head = min(len(latents), -first % most)
    for x in (*latents.detach()[:head].split(most), *latents.detach()[head:].split(most)):
        if not len(x):
            continue
        difference = torch.sub(x[:, None], codebook, out=room[: len(x)])
        yield difference.square_().sum(dim=-1)


def at_once(latents: Tensor, codebook: Tensor) -> int:
    """Returns for how many latents at a time ``squared_distances`` yields."""
    return _at_once(latents, codebook.numel())


def _at_once(latents: Tensor, elements: int) -> int:
    """Returns how many latents to process at once if each takes this many elements."""
    room = PROCESSOR_BYTES if latents.device.type == "cpu" else CARD_BYTES
    return max(1, room // (elements * latents.element_size()))


def directly(latents: Tensor, codebook: Tensor) -> Tensor:
    """Returns indices (M,) of the codebook rows (K, D) nearest to latents (M, D).

    Computes every distance in the direct form.
    """
    if len(latents) <= _at_once(latents, codebook.numel()):
        return (latents[:, None] - codebook).square_().sum(dim=-1).argmin(dim=-1)
    indices = torch.empty(len(latents), dtype=torch.int64, device=latents.device)
    start = 0  # of a piece; separate results would fragment the heap
    for distances in squared_distances(latents, codebook):
        torch.argmin(distances, dim=-1, out=indices[start : start + len(distances)])
        start += len(distances)
    return indices


def by_products(latents: Tensor, codebook: Tensor) -> Tensor:
    """Returns what ``directly`` returns, by matrix products.

    Finds the best score of each latent in each group of codes, then applies the direct form to the
    groups that may hold the nearest code.
    """
    (k, d), group = codebook.shape, _group_size(codebook)
    count = -(-k // group)
    codes = torch.cat([codebook, codebook[-1:].expand(group * count - k, -1)])  # copies of the last
    norms = codes.square().sum(dim=-1, keepdim=True)
    rows, longest = torch.cat([-codes, norms / 2], dim=1), norms.max().sqrt()
    choose, scores = (_by_groups, min(TILE, len(rows))) if k > MOST_SCORES else (_by_scores, k)
    if choose is _by_scores:
        rows = rows[:k].T.contiguous().T  # the product with latents reads columns
    step = min(len(latents), _at_once(latents, max(count, scores, group * d)))
    room, groups = latents.new_empty(step, count + scores), codes.view(count, group, d)
    indices = torch.empty(len(latents), dtype=torch.int64, device=latents.device)
    with torch.autocast(latents.device.type, enabled=False):
        for x, part in zip(latents.split(step), indices.split(step), strict=True):
            limit, own = margin(x, longest), room[: len(x)].view(-1)
            part.copy_(choose(x, limit, codebook, groups, rows, own))
    return indices


def _group_size(codebook: Tensor) -> int:
    """Returns the number of codes in a group, a power of two.

    If groups are larger, there are fewer best scores to compare, but more codes to look at in each.
    """
    k, d = codebook.shape
    return int(max(GROUP, 2 ** round(math.log2(math.sqrt(k / (2 * d))))))


def _by_scores(
    x: Tensor, limit: Tensor, codebook: Tensor, groups: Tensor, rows: Tensor, room: Tensor
) -> Tensor:
    """Returns what ``_by_groups`` returns, for codes few enough to keep all scores.

    If only one score of a latent is within the margin, its index is known. The direct form decides
    for the other latents.

    Comparisons that return bools, and reductions that return places, are ten
    times as slow as those of numbers. A product with the codes' places counts the scores within the
    margin and finds a single one; it is exact in every arithmetic, even tf32.
    """
    scores = room[: len(x) * len(codebook)].view(len(x), len(codebook))
    torch.mm(_with_one(x), rows.T, out=scores)
    near = scores.le_(scores.amin(dim=1, keepdim=True) + limit)  # ones, still as numbers
    places = torch.arange(len(codebook)).to(near)
    sums = near @ torch.stack([torch.ones_like(places), places], dim=1)
    count, index = sums.long().unbind(dim=1)
    several = count != 1  # 0 if a score is not a number
    if bool(several.any()):
        index[several] = directly(x[several], codebook)
    return index


def _by_groups(
    x: Tensor, limit: Tensor, codebook: Tensor, groups: Tensor, rows: Tensor, room: Tensor
) -> Tensor:
    """Returns the indices (m,) of latents x (m, D).

    limit: their margins (m, 1). groups: the codes as (count, group, D); copies of the last code
    fill the last group. rows: -c and ||c||^2 / 2 of these codes, (count * group, D + 1), so that
    one product gives scores. room: memory for the best score of each group and the scores of a
    tile.

    Scores are (codes, latents). The product and the search for the best of a group both go by rows,
    so a thread finds its scores in its cache. A tall product is faster than other shapes.
    """
    m, (count, size, _) = len(x), groups.shape
    best = room[: m * count].view(count, m)
    columns = _with_one(x).T
    for part, tile in zip(best.split(TILE // size), rows.split(TILE), strict=True):
        scores = room[m * count :][: len(tile) * m].view(len(tile), m)
        torch.mm(tile, columns, out=scores)
        torch.amin(scores.view(-1, size, m), dim=1, out=part)
    may_hold = best <= best.amin(dim=0) + limit[:, 0]
    group, row = may_hold.nonzero(as_tuple=True)  # (p,) each
    held = torch.bincount(row, minlength=m)
    clear = (held > 0) & (held <= MOST_GROUPS)  # no group if a score is not a number
    if not (all_clear := bool(clear.all())):
        row, group = row[clear[row]], group[clear[row]]

    distances = (x[row, None] - groups[group]).square().sum(dim=-1)
    found, within = distances.min(dim=1)  # the first on a tie, which is the lowest code
    last = torch.full_like(row, len(codebook) - 1)
    code = torch.minimum(group * size + within, last)
    least = torch.full_like(x[:, 0], torch.inf).scatter_reduce(0, row, found, "amin")
    index = torch.full_like(held, len(codebook) - 1)
    index.scatter_reduce_(0, row, torch.where(found == least[row], code, last), "amin")
    if not all_clear:
        index[~clear] = directly(x[~clear], codebook)
    return index


def _with_one(x: Tensor) -> Tensor:
    """Returns x (m, D) with a column of ones, which adds half the squared norms to the scores."""
    return torch.cat([x, torch.ones_like(x[:, :1])], dim=1)


def margin(latents: Tensor, longest: Tensor) -> Tensor:
    """Returns margins (M, 1) for the scores ||c||^2 / 2 - x.c of latents (M, D).

    A code whose score is further than this from the best cannot be the choice of the direct form.

    longest: the norm () of the longest code.
    """
    slack = score_slack(latents.shape[-1], product_precision(latents.dtype) or "")
    norms, longest = latents.double().norm(dim=-1, keepdim=True), longest.double()
    products = longest.square() / 2 + norms * longest
    squares = (norms + longest).square()
    allowed: Tensor = slack.squares * squares + slack.products * products + slack.floor
    return allowed.mul(1 + 1e-6).to(latents.dtype)
