"""A prior's graphs held to the oracle, and to each other: all positions at once, one after another,
and the samples that they draw."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from vqdeploy.runtime.sessions import Session
from vqdeploy.sampling import draw_with, steps
from vqref import prior
from vqref.agreement.parity import check
from vqref.agreement.report import Check
from vqref.prior import PriorSpec
from vqref.validation import Array, Int64, Params

GOLDEN_ROWS, SAMPLED, MANY = 8, 4, 64
"""Rows of tokens of a golden batch, images that a check draws, and that one draws that was asked
for samples; fewer of long rows."""

MOST_SCORES = 2**22
"""The most log-probabilities that one of these takes."""

SEED = 0
"""Of the golden tokens and of the noise of the samples."""


def _count(spec: PriorSpec, most: int) -> int:
    return max(1, min(most, MOST_SCORES // (spec.latent_size * spec.num_codes)))


def golden_tokens(spec: PriorSpec, params: Params) -> dict[str, Array]:
    """What a bundle records of a prior: rows of tokens, some of its own and some random, and the
    oracle's log p (N, S) of each token."""
    count = _count(spec, GOLDEN_ROWS)
    rows = np.random.default_rng(SEED).integers(0, spec.num_codes, (count, spec.latent_size))
    own = prior.sample(spec, params, prior.gumbel(SEED, spec, (count + 1) // 2))
    rows[: len(own)] = own
    return {"indices": rows, "log_probabilities": _taken(spec, params, rows)}


def _taken(spec: PriorSpec, params: Params, rows: Int64) -> Array:
    found = prior.log_probabilities(spec, params, rows)
    return np.take_along_axis(found, rows[..., None], axis=2)[..., 0]


def check_prior(
    spec: PriorSpec,
    params: Params,
    golden: Mapping[str, Array],
    sessions: Mapping[str, Session],
    sampled: int = SAMPLED,
) -> Iterator[Check]:
    """The recorded answers, both graphs on the golden tokens, and ``sampled`` samples."""
    rows = golden["indices"]
    expected = prior.log_probabilities(spec, params, rows)
    yield check(
        "log_probabilities",
        golden["log_probabilities"],
        np.take_along_axis(expected, rows[..., None], axis=2)[..., 0],
        precision="float64",
        name="golden prior",
    )
    found = sessions["prior"](rows)[0]
    yield check("log_probabilities", found, expected, precision="float32", name="prior")
    walked = np.stack([*steps(sessions["prior_step"], spec, rows)], axis=1)
    yield check("log_probabilities", walked, expected, precision="float32", name="prior_step")
    yield check_samples(spec, params, sessions["prior_step"], _count(spec, sampled))


def check_samples(spec: PriorSpec, params: Params, step: Session, count: int) -> Check:
    """Images that the graph draws beside those that the oracle draws of the same noise. Up to the
    first token that is not certified they must be equal; after it each goes its own way."""
    noise = prior.gumbel(SEED, spec, count)
    exact, (found, sure) = prior.sample(spec, params, noise), draw_with(step, spec, noise)
    held = np.logical_and.accumulate(sure, axis=1)
    wrong = (found != exact) & held
    problem = None
    if wrong.any():
        image, position = (int(i) for i in np.argwhere(wrong)[0])
        problem = (
            f"token {position} of sample {image} is {found[image, position]}, the oracle's "
            f"{exact[image, position]}, and no rounding explains it"
        )
    return Check(
        "samples",
        "float32",
        found.size,
        int(wrong.sum()),
        certified=int(held.sum()),
        near_ties=int((~held).sum()),
        flips=int(((found != exact) & ~held).sum()),
        problem=problem,
    )
