"""Compares a prior's graphs with the oracle: all positions at once, step by step, and samples."""

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
"""The most rows of tokens in a golden batch, the most samples that a check draws, and the most that
it draws if the user asked for samples. Long rows have fewer."""

MOST_SCORES = 2**22
"""The most log-probabilities that these rows, or these samples, may have together."""

SEED = 0
"""The seed of the golden tokens and of the noise of the samples."""


def _count(spec: PriorSpec, most: int) -> int:
    return max(1, min(most, MOST_SCORES // (spec.latent_size * spec.num_codes)))


def golden_tokens(spec: PriorSpec, params: Params) -> dict[str, Array]:
    """Returns a prior's golden batch: rows of tokens, and the oracle's log p (N, S) of each token.

    The prior draws half of the rows; the others are random.
    """
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
    """Checks the recorded answers, both graphs on the golden tokens, and ``sampled`` samples."""
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
    """Compares images that the graph and the oracle draw from the same noise.

    They must be equal up to the first token that is not certified. After it they may differ.
    """
    noise = prior.gumbel(SEED, spec, count)
    exact, (found, sure) = prior.sample(spec, params, noise), draw_with(step, spec, noise)
    held = np.logical_and.accumulate(sure, axis=1)
    wrong = (found != exact) & held
    problem = None
    if wrong.any():
        image, position = (int(i) for i in np.argwhere(wrong)[0])
        problem = (
            f"token {position} of sample {image} is {found[image, position]}, the oracle's is "
            f"{exact[image, position]}, and rounding does not explain the difference"
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
