"""Compares a machine's tokens with those that ``vqref.agreement.advance`` proves in advance.

If a proved token differs, the machine does not compute in the arithmetic that it claims.
"""

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
"""The time that ``verify`` may spend on proofs: OWN_SECONDS, and for given images the time to prove
one in DATA_SHARE of them, at most DATA_SECONDS."""

EXPORT_SECONDS = 2.5
"""The time for proofs in ``export``."""

EXPLAINED = 4
"""The most images on which to look for the arithmetic that explains wrong tokens."""


def require_float32(bundle: Bundle) -> None:
    """Raises InputError if nothing can be proved about the bundle's networks."""
    if bundle.precision != CLAIM:
        raise InputError(
            f"{bundle.path}: its networks are {bundle.precision}, which also rounds activations; "
            "proofs need float32: export it with --precision fp32"
        )


def provable(spec: ModelSpec, own: int, data: int) -> int:
    """Returns for how many images ``verify`` proves the tokens.

    own: how many images the bundle has itself. data: how many were given besides. Returns 0 if the
    oracle is too slow or nothing can be proved.
    """
    one = seconds_per_proof(spec)
    seconds = OWN_SECONDS + min(DATA_SECONDS, data * one / DATA_SHARE)
    return min(own + data, int(seconds / one))


def told_at_export(
    spec: ModelSpec, params: Params, images: Array, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the manifest's entry ``proved``, on as many of the images as an export has time for.

    It holds what ``count_proved`` finds, and ``of``, which names the images. There is no entry if
    the oracle is too slow, if the networks are not float32, or if nothing can be proved.

    images: the measured images. facts: the manifest's other entries.
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
    """Checks that a machine gives the proved tokens (N, S). Tokens without a proof may differ.

    The stage ``tokenizer`` allows the encoder a tolerance, which was measured on correct encoders
    and then widened. A machine beyond that tolerance may still be correct if it adds in an order
    that nobody measured. This check uses no measurement. A proved token is the same in every order,
    so a proved token that differs shows another arithmetic. The bound is wider than the tolerance,
    so this check covers fewer tokens.

    proof: the proof of these images for ``arithmetic``, which the machine claims. places: the
    numbers of these images among the compared ones. The check counts proved tokens as certified,
    and the others as near ties.
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
            "computes in another arithmetic (TF32 left on, reduced precision); "
            f"{_explanation(spec, params, images, indices, wrong)}; the first is token {token} of "
            f"image {number}: {found}, expected {right}"
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
    return f"{' or '.join(names)} would explain it" if names else "no known arithmetic explains it"


def explained(
    spec: ModelSpec,
    params: Params,
    images: Array,
    indices: Int64,
    wrong: npt.NDArray[np.bool_],
) -> list[str]:
    """Returns the names of the arithmetics that may have given the wrong tokens.

    indices: the machine's tokens (N, S). wrong: where they are wrong, (N, S).

    An arithmetic is possible if nothing is proved for it at the wrong tokens. That alone says
    little if few of its tokens are proved. So an arithmetic that rounds factors must also give most
    of the wrong tokens when the exact network is run with its factors. The arithmetics that do not
    round factors are returned only if no other explains the tokens.
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
    """Returns the share of the wrong tokens that factors with so many bits after the point give.

    Tries factors that are cut off and factors that are rounded: tensor cores do either.
    """
    tokens = (tokens_of(spec, params, images, bits, cut=cut) for cut in (True, False))
    return max(float((each == indices)[wrong].mean()) for each in tokens)


def explained_encoder(
    check: Check, spec: ModelSpec, params: Params, images: Array, encoder: Session
) -> Check:
    """Adds an explanation to the encoder's check if it failed; returns other checks unchanged.

    The explanation names the arithmetics whose rounding of factors makes errors of the size found
    on ``images``: a third to three times as large.
    """
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
    like = f"as far off as factors rounded to {' or '.join(names)} would be"
    return dataclasses.replace(check, problem=f"{check.problem}, {like}")


def tokens_of(spec: ModelSpec, params: Params, images: Array, bits: int, *, cut: bool) -> Int64:
    """Returns the tokens (N, S) of a network that is exact except for the factors of products."""
    return quantize(latents_of(spec, params, images, bits, cut=cut), params[CODEBOOK]).indices


def latents_of(spec: ModelSpec, params: Params, images: Array, bits: int, *, cut: bool) -> Float64:
    """Returns the latents (N, S, D) of the same network."""
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
    """Returns values with so many bits after the point.

    cut: whether to cut off the other bits or to round to the nearest.
    """
    raw, spare = np.ascontiguousarray(array, np.float32).view(np.uint32), 23 - bits
    if not cut:
        raw = raw + np.uint32(2 ** (spare - 1) - 1) + ((raw >> spare) & 1)
    return (raw & np.uint32(2**32 - 2**spare)).view(np.float32).astype(np.float64)
