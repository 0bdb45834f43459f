"""Proves tokens in advance: no rounding can change them under a named arithmetic.

A proof holds for every machine with that arithmetic, in whatever order it adds.

The exact network has the parameters and the images as they are in float32. Its values are z_0 (the
image), z_1, ..., z_L (the latents), one per row. A machine has other values, z_i + δ_i. Its row i
makes a local error e_i: the difference from what the exact row makes of the machine's own inputs.
|e_i| is bounded, see ``arithmetics``. Rows are linear except for their activations. So before the
activation, δ_i is exactly W δ_(i-1) + e_i. Let an activation f have the exact input z, and let the
machine's input be off by |δ| <= Δ. Then f(z + δ) = f(z) + f'(z) δ + r, where

    elu     |r| <= Δ² exp(min(0, z + Δ)) / 2 if z - Δ < 0, else 0: f'' is exp(z) below 0 and 0
            above, and f' is continuous; ``arithmetics`` has a closer bound
    relu    |r| <= max(0, Δ - |z|): if the input crosses 0, the distance beyond 0
    silu    |r| <= Δ² / 4: |f''| <= 1/2

If r and the activation's own rounding count as local errors, the latents move by

    δ_L = Σ over rows of J_i (e_i + r_i)

with the exact Jacobians J_i at the exact values. This is an identity, not an approximation.

If the arithmetic rounds factors, the exact network gets other weights and inputs. Its weights are
the centres of what the rounded weights may be, and its inputs are moved by a known shift. z_i then
stands for the values of this network. The machine's inputs are within ρ of these, so its row gives
W (δ_(i-1) + ρ_i) + e_i. This adds the term J W ρ_i, in which W ρ_i cancels as W δ does. e_i
includes the error of the weights. The network with its own factors is one of the networks covered,
so the proved token is its token.

The first look takes Δ_i from the rows' magnitudes alone: Δ_i = |W| Δ_(i-1) + |e_i|. At the end it
is far too large, but it enters squared, or only where a relu's input is near 0. If tokens stay
open, a second look also bounds lengths: that of the whole δ_i, and that at each position of a grid:

    ||δ_i|| <= ||W|| (||δ_(i-1)|| + ||ρ_i||) + ||e_i||

Here ||W|| is the norm of the whole row, or of the part that one position sees. Magnitudes assume
the worst signs for every element at once. Lengths do not, so they are tighter: for 800 weights, |W|
is 20 times larger than ||W||. An element is off by at most the length of its weights times the
length of the error that it sees. A row with few results, such as the post's last convolution, gets
its Δ from exact Jacobians. Let g be the gradient after a row. ||δ|| also limits Σ |g| |r|: if
|r| <= c δ², then

    Σ |g| |r| <= p ||δ||² + Σ max(0, |g| c - p) Δ²     for every p > 0

A third look is for tokens that would be proved without r. From row to row, it bounds one by one the
elements with the largest |g| c. It pulls their gradients back, and uses the lengths on the way,
until the bounds are small enough or the allowed work is spent. The other elements have small c, so
||δ||² is good enough for them.

The machine computes distances by the direct form, Σ (x - c)², in float32. It takes the first code
if several are equally near. Code k can win over the nearest code b if ||x + δ - c_k||² -
||x + δ - c_b||², which is gap - 2 (c_k - c_b).δ, is not above the quantizer's own rounding
(``vqref.agreement.bounds``). So a token is proved if for every k

    gap > 2 Σ over rows, elements of |J_i' (c_k - c_b)| (|e_i| + |r_i|) + rounding of two distances

Codes that cannot win even with Δ_L need no Jacobian. For each other code, the direction c_k - c_b
is pulled back row by row. It is dropped as soon as the errors of the rows passed, with Δ for the
rows below, cannot close the gap. If one code could win, the token's other directions are skipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vqref.agreement.arithmetics import ARITHMETICS, unbounded
from vqref.agreement.bounds import distance_error
from vqref.agreement.enclosure import Network, enclose
from vqref.agreement.pulled import PULLED_VALUES, SLACK, Enclosure, Told, Window, pulled, reach
from vqref.network import encode
from vqref.quantizer import quantize, squared_distances
from vqref.spec import CODEBOOK, ModelSpec
from vqref.validation import Array, Float64, Int64, Params, as_images, check_params

SHARPENED, WORK, LITTLE = 2048, 64, 8
"""Limits of the third look: results of a row that are pulled back, and the work for it.

Work counts in multiples of the encoder's multiplications. If factors are not rounded, LITTLE
replaces WORK, because magnitudes alone prove nearly all that can be proved."""


CLAIM = "float32"
"""The arithmetic of graphs with float32 networks, on the CPU and on CUDA with TF32 off.

Networks of fewer bits round activations too, which no arithmetic covers."""

NARROW = "lanes"
"""The arithmetic of most machines. Its share is reported beside that of CLAIM."""


class Proof(NamedTuple):
    """What is known in advance about the tokens of some images under an arithmetic.

    indices: (N, S), the exact tokens.
    proved: (N, S), whether no rounding can change them.
    rivals: (N, S), the code that comes nearest to winning, or one that could win. It is the token
        itself if there is no other code.
    excess: (N, S), how far the rival's squared distance stays beyond what rounding can bridge. It
        is negative if the rival could win.
    moved: (N, S), a bound on how far the latent can move in any direction, far larger than needed.
        If factors are rounded, it counts from the latent that the centres of the weights give.
    """

    indices: Int64
    proved: npt.NDArray[np.bool_]
    rivals: Int64
    excess: Float64
    moved: Float64


def prove(
    spec: ModelSpec,
    params: Params,
    images: npt.ArrayLike,
    arithmetic: str = "float32",
    *,
    closely: bool = True,
) -> Proof:
    """Proves as many tokens of images (N, C, H, W) in [0, 1] as it can.

    Images and parameters are taken as float32 rounds them. An encoder with ``unbounded`` rows gets
    no proofs.

    arithmetic: a name of ARITHMETICS.
    closely: look again if the first look leaves tokens open. This proves some more tokens. It may
        take a hundred times as long on a network of which little can be proved.

    Raises ValueError for another name, for images or parameters that do not fit, and for latents so
    large that float64 cannot hold their distances.
    """
    if arithmetic not in ARITHMETICS:
        raise ValueError(f"arithmetic is {arithmetic!r}, expected {', '.join(ARITHMETICS)}")
    check_params(spec, params)
    x = as_images(images, spec).astype(np.float32).astype(np.float64)
    params = {name: np.asarray(each, np.float32) for name, each in params.items()}
    codebook = params[CODEBOOK].astype(np.float64)
    if unbounded(spec.encoder):
        return _nothing(encode(spec, params, x), codebook)
    network = Network(spec, params, ARITHMETICS[arithmetic])
    with np.errstate(over="ignore", invalid="ignore"):  # what has no bound is not proved
        found = [_prove_one(network, image, codebook, closely=closely) for image in x]
    if not found:
        nothing = np.empty((0, spec.latent_size))
        return Proof(
            nothing.astype(np.int64), nothing > 0, nothing.astype(np.int64), nothing, nothing
        )
    proof = Proof(*(np.stack(each) for each in zip(*found, strict=True)))
    if network.spare and not proof.proved.all():  # unproved ones are those of rounded weights
        exact = quantize(encode(spec, params, x), codebook).indices
        rivals = np.where(proof.rivals == exact, proof.indices, proof.rivals)
        proof = proof._replace(indices=exact, rivals=rivals)
    return proof


def _nothing(latents: Float64, codebook: Float64) -> Proof:
    """Returns a Proof of no token of latents (N, S, D): every bound is infinite.

    The rivals are the second-nearest codes.
    """
    shape = latents.shape[:2]
    indices = quantize(latents, codebook).indices
    rivals = np.empty(indices.size, np.int64)
    for rows, distances in squared_distances(latents.reshape(-1, latents.shape[2]), codebook):
        own = indices.reshape(-1)[rows]
        distances[np.arange(len(own)), own] = np.inf
        rivals[rows] = distances.argmin(axis=1) if len(codebook) > 1 else own
    infinite = np.full(shape, np.inf)
    return Proof(indices, infinite < 0, rivals.reshape(shape), -infinite, infinite)


def count_proved(
    spec: ModelSpec,
    params: Params,
    images: Array,
    proved: npt.NDArray[np.bool_] | None = None,
) -> dict[str, int]:
    """Counts the tokens of images (N, C, H, W) that the first look proves.

    Returns plain data: images, tokens, and a count each for CLAIM and NARROW.
    proved: the tokens proved for CLAIM, if the caller knows. They are proved for NARROW too.
    """
    if proved is None:
        proved = prove(spec, params, images, CLAIM, closely=False).proved
    rest = ~proved.all(axis=1)
    also = prove(spec, params, images[rest], NARROW, closely=False).proved
    counts = {CLAIM: int(proved.sum()), NARROW: int(proved[~rest].sum() + also.sum())}
    return {"images": len(images), "tokens": proved.size, **counts}


def tell_proved(counts: Mapping[str, Any]) -> str:
    """Says in words what ``count_proved`` found."""
    tokens = counts["tokens"]
    shares = [f"{counts[name] / max(1, tokens):.2%}" for name in (CLAIM, NARROW)]
    return (
        f"of {tokens} tokens of {counts['images']} images {shares[0]} are proved for float32 in "
        f"any order, {shares[1]} in 16 lanes or more"
    )


def _prove_one(network: Network, image: Float64, codebook: Float64, *, closely: bool) -> Proof:
    """Returns the Proof of one image, without the first axis."""
    if network.arithmetic.factors is None or not closely:
        first = _looked(enclose(network, image, closely=False), codebook)
        if first.proved.all() or not closely:
            return first
    enclosure = enclose(network, image)
    second = _looked(enclosure, codebook)
    if second.proved.all():
        return second
    sharper = _sharpened(network, enclosure, second, codebook)
    return second if sharper is None else _looked(sharper, codebook)


def _sharpened(
    network: Network, enclosure: Enclosure, proof: Proof, codebook: Float64
) -> Enclosure | None:
    """Tightens the bounds on the results whose curvature keeps most tokens from being proved.

    Returns the new enclosure, or None if nothing can be gained.
    """
    tokens = np.flatnonzero(~proof.proved & np.isfinite(proof.excess))
    directions = codebook[proof.rivals[tokens]] - codebook[proof.indices[tokens]]
    seen = {
        number: np.zeros_like(enclosure.rows[number].value)
        for number, step in enumerate(enclosure.steps, 1)
        if number > 1 and step.layer.activation != "linear" and len(step.layer.out_shape) == 3
    }
    told = Told(np.zeros(len(tokens)), seen)
    bounds = reach(enclosure, tokens, directions, np.full(len(tokens), -np.inf), told)
    room = bounds + proof.excess[tokens] / 2
    room, sharper = room[bounds - told.curved < room], False
    if not len(room):
        return None
    for number, weight in seen.items():
        row = enclosure.rows[number]
        worst = weight * row.bend
        top = np.argsort(worst, axis=None)[::-1][:SHARPENED]
        if not (weight * row.after).sum() >= 0.1 * room.min() or not worst.any():
            continue
        where = np.unravel_index(top[worst.reshape(-1)[top] > 0], worst.shape)
        cap = row.before.radius.copy()
        share = 0.1 * np.median(room) / len(where[0])
        enough = np.sqrt(share / worst[where])
        if enclosure.steps[number - 1].layer.activation == "relu":
            enough = np.maximum(enough, np.abs(row.z[where]))
        work = LITTLE if network.arithmetic.plain else WORK
        found = _pulled_each(enclosure.before(number), where, enough, work)
        cap[where] = np.minimum(cap[where], found)
        enclosure = enclose(network, row.value, begun=enclosure.rows[:number], cap=cap)
        sharper = True
    return enclosure if sharper else None


def _pulled_each(
    enclosure: Enclosure, where: tuple[Int64, ...], enough: Float64, times: int
) -> Float64:
    """Returns bounds on |δ| of single elements of the last row, at channels, rows and columns.

    Pulls each back until it is less than ``enough``, or until the work of ``times`` passes is
    spent.
    """
    channels, rows, columns = where
    work = times * sum(step.layer.products for step in enclosure.steps) / len(channels)
    found, chunks = np.empty(len(channels)), len(channels) * 2**15 // PULLED_VALUES + 1
    for start in range(chunks):
        part = slice(start, None, chunks)
        values = np.zeros((len(channels[part]), len(enclosure.latents), 1, 1))
        values[np.arange(len(values)), channels[part]] = 1.0
        window = Window(values, np.stack([rows[part], columns[part]], axis=1))
        found[part] = pulled(enclosure, window, enough[part], work=work * len(values))
    return found


def _looked(enclosure: Enclosure, codebook: Float64) -> Proof:
    """Returns the Proof of an enclosure's tokens, as far as it proves them."""
    latents, radius = enclosure.latents, enclosure.rows[-1].off.radius
    moved = np.sqrt(np.square(radius).sum(axis=1))
    size, norms = codebook.shape[1], np.sqrt(np.square(codebook).sum(axis=1))
    count = len(latents)
    indices, rivals = np.empty(count, np.int64), np.empty(count, np.int64)
    excess = np.empty(count)
    for rows, distances in squared_distances(latents, codebook):
        best, each = distances.argmin(axis=1), np.arange(len(distances))
        wide = moved[rows, None]
        error = distance_error(
            distances,
            np.sqrt(np.square(latents[rows]).sum(axis=1))[:, None],
            norms,
            size,
            precision="float32",
            moved=wide,
        )
        least = distances[each, best][:, None]
        room = (distances - least - error - error[each, best][:, None]) / 2  # (rows, K)
        room[each, best] = np.inf
        left = room - SLACK * wide * (np.sqrt(distances) + np.sqrt(least))
        pairs = np.argwhere(~(left > 0))
        for start in range(0, len(pairs), PULLED_VALUES // size + 1):
            tokens, codes = pairs[start : start + PULLED_VALUES // size + 1].T
            own, where = room[tokens, codes], tokens + (rows.start or 0)
            directions = codebook[codes] - codebook[best[tokens]]
            left[tokens, codes] = own - _bounds(enclosure, where, directions, own)
        left[np.isnan(left)] = -np.inf
        indices[rows], rivals[rows] = best, left.argmin(axis=1)
        excess[rows] = 2 * left[each, rivals[rows]]
    return Proof(indices, excess > 0, rivals, excess, moved)


def _bounds(enclosure: Enclosure, tokens: Int64, directions: Float64, room: Float64) -> Float64:
    """Returns bounds (B,) on |direction . δ|, from magnitudes alone if these suffice.

    If not, first pulls back each token's direction with the least room for its length. If its bound
    is not less than its room, the token is not proved. Its other bounds are not needed: -inf.
    """
    bounds: Float64 = SLACK * (np.abs(directions) * enclosure.rows[-1].off.radius[tokens]).sum(
        axis=1
    )
    hopeless = np.isin(tokens, tokens[~(room > 0)])
    pending = ~(bounds < room) & ~hopeless
    near = room / np.sqrt(np.square(directions).sum(axis=1))
    order = np.lexsort((near, tokens))
    order = order[pending[order]]
    first = order[np.unique(tokens[order], return_index=True)[1]]
    bounds[first] = reach(enclosure, tokens[first], directions[first], room[first])
    pending[first] = False
    lost = pending & np.isin(tokens, tokens[first[~(bounds[first] < room[first])]])
    bounds[lost] = -np.inf
    rest = np.flatnonzero(pending & ~lost)
    bounds[rest] = reach(enclosure, tokens[rest], directions[rest], room[rest])
    return bounds
