"""One comparison for every implementation: each stage is fed the oracle's input, so that one flip cannot cascade.

``vqtrain`` wraps its module in a ``Backend``, ``vqdeploy`` its onnxruntime sessions; what is compared, and how it is
judged, is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vqref.bounds import array_dtype
from vqref.dialects import POST, Dialect
from vqref.losses import compute_losses
from vqref.network import decode, encode, sigmoid
from vqref.parity import allowed_error, check, check_indices
from vqref.quantizer import EMAState, draw_scores, quantize, reset_codes, update_ema
from vqref.report import Check, Report
from vqref.spec import CODEBOOK, ModelSpec
from vqref.validation import Float64, Params, check_params

Array = npt.NDArray[Any]


STATE = ("codebook", "ema_count", "ema_means")

PROBED_ROWS = 1024
"""Codebook rows fed to the quantizer as latents, evenly spread: a damaged row shows though no image is near it."""

DRAW_TEMPERATURE = 0.3
"""At which drawing is compared: where codes other than the nearest are drawn often."""

PROBED_TOKENS = 64
"""Codes decoded in every position, evenly spread, beside those that the images chose."""


@dataclass(frozen=True)
class Backend:
    """An implementation under test: NumPy arrays in the dtype of ``precision`` in and out. A stage left None is not compared.

    encoder      images -> latents
    quantizer    latents -> (indices, quantized)
    decoder      quantized -> (logits, probabilities)
    tokenizer    images -> indices
    detokenizer  indices -> probabilities
    losses       (images, logits, latents, quantized) -> reconstruction, commitment, prior, total
    ema          (latents, indices) -> codebook, ema_count, ema_means after one update of the parameters' state
    draw         (latents, gumbel, temperature) -> indices drawn
    reset        (codes, rows, counts) -> codebook, ema_count, ema_means after a reset in the parameters' state

    precision: of the networks; quantizer_precision, detokenizer_precision: of distances, and of the detokenizer where that is
    a table; None where they are the networks'.
    """

    precision: str
    encoder: Callable[[Array], Array] | None = None
    quantizer: Callable[[Array], tuple[Array, Array]] | None = None
    decoder: Callable[[Array], tuple[Array, Array]] | None = None
    tokenizer: Callable[[Array], Array] | None = None
    detokenizer: Callable[[Array], Array] | None = None
    losses: Callable[[Array, Array, Array, Array], Array] | None = None
    ema: Callable[[Array, Array], tuple[Array, Array, Array]] | None = None
    draw: Callable[[Array, Array, float], Array] | None = None
    reset: Callable[[Array, Array, Array], tuple[Array, Array, Array]] | None = None
    quantizer_precision: str | None = None
    detokenizer_precision: str | None = None


def compare(
    spec: ModelSpec,
    params: Params,
    images: npt.ArrayLike,
    backend: Backend,
    *,
    beta: float = 0.25,
    decay: float = 0.99,
    epsilon: float = 1e-5,
) -> Report:
    """Every stage of ``backend`` against the oracle on images (N, C, H, W) in [0, 1]. The report says; nothing is raised
    but ValueError for parameters or images that do not fit the spec."""
    check_params(spec, params)
    precision, dtype = backend.precision, array_dtype(backend.precision)
    quantizer_precision = backend.quantizer_precision or precision
    images = np.asarray(images).astype(dtype)
    codebook = np.asarray(params[CODEBOOK])
    exact_latents = encode(spec, params, images)
    latents = exact_latents.astype(dtype)
    indices = quantize(latents, codebook).indices

    checks: list[Check] = []
    if backend.encoder:
        checks.append(check("encoder", backend.encoder(images), exact_latents, precision=precision))
    if backend.quantizer:
        fed = np.concatenate([latents, _probe_latents(spec, codebook).astype(dtype)])
        checks += check_quantized(*backend.quantizer(fed), fed, codebook, precision=quantizer_precision)
    if backend.tokenizer:
        checks.append(_check_tokenizer(backend.tokenizer(images), exact_latents, codebook, precision, quantizer_precision))
    if backend.decoder or backend.detokenizer:
        tokens = np.concatenate([indices, _probe_tokens(spec)])
        quantized = codebook[tokens].astype(dtype)
        exact_logits = decode(spec, params, quantized)
        if backend.decoder:
            found_logits, found_probabilities = backend.decoder(quantized)
            checks.append(check("decoder", found_logits, exact_logits, precision=precision))
            checks.append(check_probabilities("probabilities", found_probabilities, exact_logits, precision))
        if backend.detokenizer:
            found = backend.detokenizer(tokens)
            checks.append(check_probabilities("detokenizer", found, exact_logits, backend.detokenizer_precision or precision))
    if backend.losses:
        chosen = codebook[indices].astype(dtype)
        logits = decode(spec, params, chosen).astype(dtype)
        losses = compute_losses(spec, images, logits, latents, chosen, beta)
        expected = np.array([losses.reconstruction, losses.commitment, losses.prior, losses.total])
        found = backend.losses(images, logits, latents, chosen)
        checks.append(check("losses", found, expected, precision=precision))
    if backend.ema:
        moved = backend.ema(latents, indices)
        state = EMAState.from_params(params)
        checks += check_ema(moved, state, latents, indices, precision=precision, decay=decay, epsilon=epsilon)
    if backend.draw:
        checks.append(_check_draw(backend.draw, latents, codebook, precision))
    if backend.reset:
        checks += _check_reset(backend.reset, EMAState.from_params(params), latents, precision, epsilon)
    return Report(tuple(checks))


def _probe_latents(spec: ModelSpec, codebook: Array) -> Array:
    """Rows of the codebook as latents (n, S, D)."""
    rows = codebook[_spread(spec.num_codes, PROBED_ROWS)]
    n = -(-len(rows) // spec.latent_size)
    return np.resize(rows, (n, spec.latent_size, spec.code_size))


def _probe_tokens(spec: ModelSpec) -> Array:
    """Indices (n, S): each probed code in each position, neighbours in one row of tokens being different codes."""
    codes = _spread(spec.num_codes, PROBED_TOKENS)
    return np.stack([np.roll(codes, position) for position in range(spec.latent_size)], axis=1)


def _spread(count: int, most: int) -> npt.NDArray[np.int64]:
    """At most ``most`` of 0 to count - 1, evenly spread, the ends among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def _check_tokenizer(found: Array, latents: Float64, codebook: Array, precision: str, quantizer_precision: str) -> Check:
    """Images to indices: the encoder may be off by its tolerance in every element of a latent, by sqrt(D) of it in all."""
    delta = allowed_error("encoder", latents, precision=precision).max(axis=2) * latents.shape[2] ** 0.5  # (N, S)
    return check_indices(found, latents, codebook, precision=quantizer_precision, latents_error=delta, name="tokenizer")


def check_probabilities(name: str, found: Array, logits: Float64, precision: str) -> Check:
    """Probabilities beside the scale that their logits leave them: an error in a logit moves its sigmoid by a quarter."""
    largest = np.abs(logits).max(axis=(1, 2, 3), keepdims=True, initial=0.0)  # (N, 1, 1, 1)
    return check("probabilities", found, sigmoid(logits), precision=precision, name=name, magnitude=1 + largest / 4)


def check_quantized(
    indices: Array, quantized: Array, latents: npt.ArrayLike, codebook: Array, *, precision: str, form: str = "direct"
) -> Iterator[Check]:
    """The indices by their rule, and quantized, which is a copy: the codebook's rows at those indices, to the last bit."""
    judged = check_indices(indices, latents, codebook, precision=precision, form=form)
    yield judged
    if judged.problem is None:
        copied = np.asarray(codebook)[indices].astype(array_dtype(precision))
        wrong = np.argwhere(np.asarray(quantized) != copied) if np.shape(quantized) == copied.shape else None
        if wrong is None or np.asarray(quantized).dtype != copied.dtype:
            problem = f"{np.asarray(quantized).dtype} {np.shape(quantized)}, expected {copied.dtype} {copied.shape}"
            yield Check("quantized", precision, copied.size, max(1, copied.size), problem=problem)
        else:
            where = f"not a row of the codebook at {tuple(int(i) for i in wrong[0])}" if len(wrong) else None
            yield Check("quantized", precision, copied.size, len(wrong), problem=where)


def check_ema(
    found: tuple[Array, Array, Array],
    state: EMAState,
    latents: npt.ArrayLike,
    indices: npt.ArrayLike,
    *,
    precision: str,
    decay: float,
    epsilon: float,
    dialect: Dialect = POST,
) -> Iterator[Check]:
    """codebook, ema_count and ema_means after one update of ``state``, each element beside the sum of the magnitudes that
    it adds up: sums of latents may cancel."""
    after = update_ema(state, latents, indices, decay, epsilon, dialect)
    magnitudes = update_ema(
        EMAState(np.abs(state.codebook), state.ema_count, np.abs(state.ema_means), state.steps),
        np.abs(latents),
        indices,
        decay,
        epsilon,
        dialect,
    )
    for name, array in zip(STATE, found, strict=True):
        expected, magnitude = getattr(after, name), getattr(magnitudes, name)
        yield check("ema", array, expected, precision=precision, name=name, magnitude=magnitude)


def _check_draw(draw: Callable[[Array, Array, float], Array], latents: Array, codebook: Array, precision: str) -> Check:
    """The scores of the codes that were drawn beside the best ones: where two are as good to rounding, either may be drawn."""
    rng = np.random.default_rng(0)
    gumbel = rng.gumbel(size=(*latents.shape[:2], len(codebook))).astype(precision)
    scores = draw_scores(latents, codebook, gumbel, DRAW_TEMPERATURE)
    found = np.asarray(draw(latents, gumbel, DRAW_TEMPERATURE))
    if found.shape != latents.shape[:2] or found.dtype != np.int64 or not ((found >= 0) & (found < len(codebook))).all():
        problem = f"indices are {found.dtype} {found.shape}, expected int64 {latents.shape[:2]} below {len(codebook)}"
        return Check("draw", precision, scores[..., 0].size, max(1, scores[..., 0].size), problem=problem)
    drawn = np.take_along_axis(scores, found[..., None], axis=2)[..., 0].astype(precision)
    terms = (np.abs(gumbel) + np.abs(scores - gumbel)).min(axis=2)
    return check("draw", drawn, scores.max(axis=2), precision=precision, magnitude=terms + np.abs(scores).max(axis=2))


def _check_reset(
    reset: Callable[[Array, Array, Array], tuple[Array, Array, Array]],
    state: EMAState,
    latents: Array,
    precision: str,
    epsilon: float,
) -> Iterator[Check]:
    """Every second code set to a latent of the batch."""
    codes = np.arange(0, len(state.codebook), 2)
    rows = np.resize(latents.reshape(-1, latents.shape[2]), (len(codes), latents.shape[2]))
    counts = np.linspace(0, 2, len(codes)).astype(precision)
    after = reset_codes(state, codes, rows, counts, epsilon)
    for name, array in zip(STATE, reset(codes, rows, counts), strict=True):
        yield check("ema", array, getattr(after, name), precision=precision, name=f"reset {name.removeprefix('ema_')}")
