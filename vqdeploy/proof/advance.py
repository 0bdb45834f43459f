"""Tokens proved in advance, and what a machine shows that gives others: it computes in another
arithmetic than it says. The proofs are ``vqref.agreement.advance``'s."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vqdeploy.bundle import Bundle
from vqref.agreement.advance import CLAIM, Proof, count_proved, prove
from vqref.agreement.arithmetics import ARITHMETICS
from vqref.agreement.budget import seconds_per_proof
from vqref.agreement.report import Check
from vqref.errors import InputError
from vqref.network import ACTIVATIONS, before_activation, encode, weights_of
from vqref.quantizer import quantize
from vqref.spec import CODEBOOK, ModelSpec, plan
from vqref.validation import Array, Float64, Int64, Params

if TYPE_CHECKING:
    from vqdeploy.runtime.sessions import Session

REFUTED_BY = "a machine that computes float32 in any order and gives another token for one of them"

OWN_SECONDS, DATA_SECONDS, DATA_SHARE = 1.2, 5.0, 4
"""What proofs of a ``verify`` take at worst: as many as go into the first, and a fourth of the
further images more, within the second."""

EXPORT_SECONDS = 2.5
"""The same of an ``export``."""

EXPLAINED = 4
"""Images with tokens that differ, for which another arithmetic is sought."""


def require_float32(bundle: Bundle) -> None:
    """Raises InputError for a bundle of whose networks nothing is proved."""
    if bundle.precision != CLAIM:
        raise InputError(
            f"{bundle.path}: its networks are {bundle.precision}, which rounds activations, too; "
            "proofs are of float32: export it with --precision fp32"
        )


def provable(spec: ModelSpec, own: int, data: int) -> int:
    """Of how many of ``own`` images and ``data`` further ones a ``verify`` proves the tokens; none
    if the oracle is too slow, or nothing can be proved."""
    one = seconds_per_proof(spec)
    seconds = OWN_SECONDS + min(DATA_SECONDS, data * one / DATA_SHARE)
    return min(own + data, int(seconds / one))


def told_at_export(
    spec: ModelSpec, params: Params, images: Array, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """The manifest's entry ``proved``: ``count_proved`` of as many of the measured images as an
    export proves, and ``of`` what these are. No entry if the oracle is too slow, or the networks
    are not float32, or nothing can be proved.

    facts: the manifest's others.
    """
    few = int(EXPORT_SECONDS / seconds_per_proof(spec))
    if facts["precision"] != CLAIM or not few:
        return {}
    counts = count_proved(spec, params, images[:few])
    return {"proved": {**counts, "of": facts["measured"]["of"]}}


def check_proved(
    spec: ModelSpec,
    params: Params,
    images: Array,
    indices: Int64,
    proof: Proof,
    arithmetic: str = CLAIM,
    places: npt.NDArray[np.int64] | None = None,
) -> Check:
    """Holds the tokens (N, S) that a machine gives for images to those that are proved for the
    arithmetic that it claims; no other may differ.

    The stage ``tokenizer`` lets an encoder be off by a tolerance: what was measured of right ones,
    and some more. A machine beyond it may still be right, only adding in an order that nobody
    measured. Here nothing is measured: whatever the order, a proved token does not move, and one
    that differs shows another arithmetic. The bound is wider than the tolerance, so fewer tokens
    are held.

    proof: of these images for ``arithmetic``. places: the images' numbers among those that were
    compared. The check counts proved tokens as certified, and the others as those that rounding may
    decide.
    """
    differ = indices != proof.indices
    wrong = differ & proof.proved
    certified = int(proof.proved.sum())
    worst, problem = None, None
    if wrong.any():
        image, token = (int(i) for i in np.argwhere(wrong)[0])
        found, right = int(indices[image, token]), int(proof.indices[image, token])
        number = image if places is None else int(places[image])
        worst = {"position": [number, token], "found": found, "expected": right}
        problem = (
            f"{wrong.sum()} tokens that are proved for {_told(arithmetic)} differ: this machine "
            "computes in another arithmetic (TF32 left on, reduced precision), "
            f"{_explanation(spec, params, images, indices, wrong)}; the first is token {token} of "
            f"image {number}: {found}, not {right}"
        )
    return Check(
        "proved",
        "float32",
        differ.size,
        int(wrong.sum()),
        certified=certified,
        near_ties=differ.size - certified,
        flips=int((differ & ~proof.proved).sum()),
        worst=worst,
        problem=problem,
    )


def _told(arithmetic: str) -> str:
    return "float32 in any order" if arithmetic == CLAIM else ARITHMETICS[arithmetic].meaning


def _explanation(
    spec: ModelSpec,
    params: Params,
    images: Array,
    indices: Int64,
    wrong: npt.NDArray[np.bool_],
) -> str:
    few = np.flatnonzero(wrong.any(axis=1))[:EXPLAINED]
    names = explained(spec, params, images[few], indices[few], wrong[few])
    return (
        f"as {' or '.join(names)} would explain" if names else "which none that is known explains"
    )


def explained(
    spec: ModelSpec,
    params: Params,
    images: Array,
    indices: Int64,
    wrong: npt.NDArray[np.bool_],
) -> list[str]:
    """Names of the arithmetics that may have given the tokens ``indices`` (N, S) where they are
    wrong: nothing is proved there for them.

    Little may be proved for an arithmetic at all, so of those that round factors it takes more: the
    exact network with such factors gives most of these tokens. Others count if there is none.
    """
    given, rest = [], []
    for name, row in ARITHMETICS.items():
        if prove(spec, params, images, name).proved[wrong].any():
            continue
        if row.factors is None:
            rest.append(name)
        elif _share_given(spec, params, images, indices, wrong, row.factors.bits) > 0.5:
            given.append(name)
    return given or rest


def _share_given(
    spec: ModelSpec,
    params: Params,
    images: Array,
    indices: Int64,
    wrong: npt.NDArray[np.bool_],
    bits: int,
) -> float:
    """The share of the wrong tokens that factors of some bits after the point give, cut off or
    rounded: tensor cores do either."""
    tokens = (tokens_of(spec, params, images, bits, cut=cut) for cut in (True, False))
    return max(float((each == indices)[wrong].mean()) for each in tokens)


def explained_encoder(
    check: Check, spec: ModelSpec, params: Params, images: Array, encoder: Session
) -> Check:
    """A check, and if it is of the encoder and failed, the arithmetics whose factors put latents as
    far off as it does on some images: a third to three times as far."""
    if check.stage != "encoder" or check.passed:
        return check
    exact = encode(spec, params, images)
    far, names = np.abs(encoder(images)[0] - exact).max(), []
    for name, row in ARITHMETICS.items():
        if row.factors is None:
            continue
        ways = (
            latents_of(spec, params, images, row.factors.bits, cut=cut) for cut in (True, False)
        )
        least, most = sorted(float(np.abs(each - exact).max()) for each in ways)
        if least / 3 <= far <= 3 * most:
            names.append(name)
    if not names:
        return check
    like = f"as far as factors rounded to {' or '.join(names)} put it"
    return dataclasses.replace(check, problem=f"{check.problem}, {like}")


def tokens_of(spec: ModelSpec, params: Params, images: Array, bits: int, *, cut: bool) -> Int64:
    """Tokens (N, S) of a network that is exact but for the factors of its products."""
    return quantize(latents_of(spec, params, images, bits, cut=cut), params[CODEBOOK]).indices


def latents_of(spec: ModelSpec, params: Params, images: Array, bits: int, *, cut: bool) -> Float64:
    """The same network's latents (N, S, D)."""
    weights, values = weights_of(spec.encoder, params), {0: np.asarray(images, np.float64)}
    for number, step in enumerate(plan(spec.encoder), 1):
        taken, own = values, weights[step.layer.name]
        if own and step.layer.products:
            taken = {i: few_bits(values[i], bits, cut=cut) for i in step.sources}
            own = [few_bits(own[0], bits, cut=cut), own[1]]
        z = before_activation(step, taken, {step.layer.name: own})
        values[number] = ACTIVATIONS[step.layer.activation].value(z)
    return values[number]


def few_bits(array: Array, bits: int, *, cut: bool) -> Array:
    """Values with so many bits after the point: cut off, or the nearest."""
    raw, spare = np.ascontiguousarray(array, np.float32).view(np.uint32), 23 - bits
    if not cut:
        raw = raw + np.uint32(2 ** (spare - 1) - 1) + ((raw >> spare) & 1)
    return (raw & np.uint32(2**32 - 2**spare)).view(np.float32).astype(np.float64)
