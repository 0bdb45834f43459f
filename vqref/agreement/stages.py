"""One comparison for every implementation.

Each stage is fed the oracle's input, so that one flip cannot cascade. ``vqtrain`` wraps its module
in a ``Backend``, ``vqdeploy`` its onnxruntime sessions; what is compared and how it is judged is
the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vqref.agreement.bounds import array_dtype
from vqref.agreement.parity import ELU_FLOOR, allowed_error, check, check_indices
from vqref.agreement.report import Check, Report, merge
from vqref.dialects import POST, Dialect
from vqref.likelihoods import LIKELIHOODS, mean
from vqref.losses import compute_losses
from vqref.model import Forward, gradient_terms, gradients
from vqref.network import LEAST_LENGTH, decode, encode_unscaled, scaled
from vqref.quantizer import EMAState, draw_scores, quantize, reset_codes, update_ema
from vqref.spec import CODEBOOK, ModelSpec
from vqref.validation import Array, Float64, Int64, Params, check_params

STATE = ("codebook", "ema_count", "ema_means")

PROBED_ROWS = 1024
"""Codebook rows fed to the quantizer as latents, evenly spread: a damaged row shows even if no
image is near it."""

MIXED_ROWS, MIXED_BY = 256, 0.4
"""Probes between two of these rows, evenly spread over all pairs, and how far they are from the
first: a wrong distance shows even if there are few images."""

PROBED_TOKENS = 64
"""Codes decoded in every position, evenly spread, beside those that the images chose; on a grid,
one code per position."""

GRADIENT_IMAGES, IMAGES_PER_GRADIENT = 4, 4
"""Images at most on which gradients are compared, and one of how many: the oracle takes several
times as long for them."""

Gradients = dict[bytes, list[Mapping[str, Float64]]]
"""Of every parameter, and sums of the terms' magnitudes, by the bytes of the indices taken."""

SOFTPLUS_FLOOR = 0.01
"""Of a value of an image, the nats that its loss is judged beside at the least: near 0, so much
keeps the rounding of 1 within the tolerance."""

DRAW_TEMPERATURE = 0.3
"""At which drawing is compared: codes other than the nearest are drawn often."""

DRAWN_ELEMENTS = 2**20
"""Scores at most for which drawing is compared: one per latent and code."""


@dataclass(frozen=True)
class Backend:
    """An implementation under test: NumPy arrays in the dtype of ``precision`` in and out.

    A stage left None is not compared.

    encoder      images -> latents
    quantizer    latents -> (indices, quantized)
    decoder      quantized -> (outputs, reconstructions)
    tokenizer    images -> indices
    detokenizer  indices -> reconstructions
    losses       (images, outputs, latents, quantized) -> reconstruction, commitment, prior, total
    ema          (latents, indices) -> codebook, ema_count, ema_means after one update of the
                 parameters' state
    draw         (latents, gumbel, temperature) -> indices drawn
    reset        (codes, rows, counts) -> codebook, ema_count, ema_means after a reset in the
                 parameters' state

    gradients    {precision: images -> (indices that were taken, {name: gradient} of the losses'
                 total for every parameter of encoder and decoder)}, each in its own precision

    precision: of the networks. quantizer_precision: of distances; detokenizer_precision: of the
    detokenizer, if that is a table; None means the networks'.
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
    gradients: Mapping[str, Callable[[Array], tuple[Array, Mapping[str, Array]]]] = field(
        default_factory=dict
    )
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
    dialect: Dialect = POST,
    steps: int = 0,
    known: Forward | None = None,
    probed: int = PROBED_TOKENS,
) -> Report:
    """Holds every stage of ``backend`` to the oracle on images (N, C, H, W) in [0, 1].

    beta, decay, epsilon, dialect, steps: of the losses and the averages, as in ``vqref``.
    known: ``vqref.forward`` of the same parameters and images, if the caller has it.
    probed: how many codes at most the decoder is fed beside the images' tokens.
    The report says what was found. Raises ValueError alone, for parameters or images that do not
    fit the spec.
    """
    check_params(spec, params)
    case = _Case.of(spec, params, images, backend, known)
    checks: list[Check] = []
    if backend.encoder:
        found = backend.encoder(case.images)
        scale = unit_scale(case.unscaled, case.exact_latents) if spec.normalized else None
        exact, precision = case.exact_latents, case.precision
        checks.append(check("encoder", found, exact, precision=precision, scale=scale))
    if backend.quantizer:
        checks += _check_quantizer(backend.quantizer, case)
    if backend.tokenizer:
        checks.append(_check_tokenizer(backend.tokenizer, case))
    if backend.decoder or backend.detokenizer or backend.losses:
        checks += _check_decoder(backend, case, known, beta, probed)
    if backend.ema:
        state = EMAState.from_params(params, steps, normalized=spec.normalized)
        moved = backend.ema(case.latents, case.indices)
        checks += check_ema(
            moved,
            state,
            case.latents,
            case.indices,
            precision=case.precision,
            decay=decay,
            epsilon=epsilon,
            dialect=dialect,
        )
    if backend.draw:
        checks.append(_check_draw(backend.draw, case))
    if backend.reset:
        state = EMAState.from_params(params, steps, normalized=spec.normalized)
        checks += _check_reset(backend.reset, state, case, (decay, epsilon, dialect))
    pulls: Gradients = {}
    for precision, pulled in backend.gradients.items():
        checks.append(_check_gradients(pulled, precision, case, beta, pulls))
    return Report(tuple(checks), len(case.images))


@dataclass(frozen=True)
class _Case:
    """What every stage of one comparison is fed, in the dtype of its precision."""

    spec: ModelSpec
    params: Params
    precision: str
    quantizer_precision: str
    images: Array
    unscaled: Float64
    exact_latents: Float64
    latents: Array
    indices: Int64

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        params: Params,
        images: npt.ArrayLike,
        backend: Backend,
        known: Forward | None,
    ) -> _Case:
        dtype = array_dtype(backend.precision)
        given = np.asarray(images).astype(dtype)
        unscaled = encode_unscaled(spec, params, given) if known is None else known.unscaled
        exact = scaled(spec, unscaled) if known is None else known.latents
        latents = exact.astype(dtype)
        indices = quantize(latents, params[CODEBOOK]).indices
        precisions = backend.precision, backend.quantizer_precision or backend.precision
        return cls(spec, params, *precisions, given, unscaled, exact, latents, indices)

    @property
    def codebook(self) -> Array:
        return np.asarray(self.params[CODEBOOK])


def unit_scale(unscaled: Float64, latents: Float64) -> Float64:
    """The scale (N, S, D) of an error in each element of unit latents y = x / ||x||, of unscaled x:
    errors of at most e in each element of x leave (e + |y| sqrt(D) e) / ||x||, first and foremost a
    turn, which is large where x is short."""
    largest = np.abs(unscaled).max(initial=ELU_FLOOR)
    shares = 1 + np.abs(latents) * latents.shape[2] ** 0.5
    scale: Float64 = largest * shares / _lengths(unscaled)
    return scale


def _lengths(unscaled: Float64) -> Float64:
    """(N, S, 1): by which the last row of a normalized encoder divides."""
    found: Float64 = np.linalg.norm(unscaled, axis=2, keepdims=True)
    return found.clip(min=LEAST_LENGTH)


def _check_quantizer(
    quantizer: Callable[[Array], tuple[Array, Array]], case: _Case
) -> Iterator[Check]:
    """The latents of the images and rows of the codebook, both judged as one."""
    probes = _probe_latents(case.spec, case.codebook).astype(case.latents.dtype)
    parts = [
        tuple(
            check_quantized(*quantizer(fed), fed, case.codebook, precision=case.quantizer_precision)
        )
        for fed in (case.latents, probes)
    ]
    for name in ("quantizer", "quantized"):
        found = tuple(c for part in parts for c in part if c.stage == name)
        if found:
            yield merge(name, case.quantizer_precision, found)


def _check_tokenizer(tokenizer: Callable[[Array], Array], case: _Case) -> Check:
    """Images to indices, by latents of its own."""
    return check_indices(
        tokenizer(case.images),
        case.exact_latents,
        case.codebook,
        precision=case.quantizer_precision,
        latents_error=latents_error(case.spec, case.unscaled, case.precision),
        name="tokenizer",
    )


def latents_error(spec: ModelSpec, unscaled: Float64, precision: str) -> Float64:
    """How far (N, S) an encoder's latents may be from the oracle's, of which ``unscaled`` (N, S, D)
    are what ``vqref.network.scaled`` takes: it may be off by its tolerance in every element, by
    sqrt(D) times that in all, and a unit vector by that over its length before."""
    allowed = allowed_error("encoder", unscaled, precision=precision)
    error: Float64 = allowed.max(axis=2) * spec.code_size**0.5
    return error / _lengths(unscaled)[..., 0] if spec.normalized else error


def _check_decoder(
    backend: Backend, case: _Case, known: Forward | None, beta: float, probed: int
) -> Iterator[Check]:
    """Decoder and detokenizer on the images' tokens and on probes, and the losses of the former."""
    spec, dtype = case.spec, case.latents.dtype
    tokens = np.concatenate([case.indices, _probe_tokens(spec, probed)])
    quantized = case.codebook[tokens].astype(dtype)
    exact = _decode_but_known(spec, case, quantized, known)
    if backend.decoder:
        outputs, reconstructions = backend.decoder(quantized)
        yield check("decoder", outputs, exact, precision=case.precision)
        yield check_reconstructions("reconstructions", reconstructions, exact, case.precision, spec)
    if backend.detokenizer:
        precision = backend.detokenizer_precision or case.precision
        found = backend.detokenizer(tokens)
        yield check_reconstructions("detokenizer", found, exact, precision, spec)
    if backend.losses:
        n = len(case.images)
        chosen, outputs = quantized[:n], exact[:n].astype(dtype)
        losses = compute_losses(spec, case.images, outputs, case.latents, chosen, beta)
        expected = np.array([losses.reconstruction, losses.commitment, losses.prior, losses.total])
        yield check(
            "losses",
            backend.losses(case.images, outputs, case.latents, chosen),
            expected,
            precision=case.precision,
            magnitude=_loss_magnitudes(spec, expected),
        )


def _decode_but_known(
    spec: ModelSpec, case: _Case, quantized: Array, known: Forward | None
) -> Float64:
    """The oracle's outputs of quantized latents, those of the images taken from what is known."""
    if known is None or not np.array_equal(known.indices, case.indices):
        return decode(spec, case.params, quantized)
    return np.concatenate(
        [known.outputs, decode(spec, case.params, quantized[len(case.indices) :])]
    )


def _loss_magnitudes(spec: ModelSpec, losses: Float64) -> Float64:
    """Scales of the four losses: terms of a reconstruction may cancel if densities exceed 1, and do
    so with a gaussian, whose constant is (CHW/2) ln 2πσ². A softplus may be computed as log(1 +
    exp), which is off by a rounding of 1 however small it is, in each value of an image."""
    magnitudes = np.abs(losses)
    if spec.likelihood == "bernoulli":
        magnitudes[[0, 3]] += SOFTPLUS_FLOOR * np.prod(spec.image_shape)
    if spec.likelihood == "gaussian":
        constant = 0.5 * np.prod(spec.image_shape) * np.log(2 * np.pi * spec.variance)
        magnitudes[[0, 3]] += abs(constant)
    return magnitudes


def _probe_latents(spec: ModelSpec, codebook: Array) -> Array:
    """Rows of the codebook, and points between two of them, as latents (n, S, D). Row
    first - 1 - second, counted from the end if negative, is never row first."""
    rows = codebook[_spread(spec.num_codes, PROBED_ROWS)]
    first, second = np.divmod(_spread(len(rows) * (len(rows) - 1), MIXED_ROWS), len(rows) - 1)
    mixed = (1 - MIXED_BY) * rows[first] + MIXED_BY * rows[first - 1 - second]
    if spec.normalized:
        mixed /= np.linalg.norm(mixed, axis=1, keepdims=True).clip(min=LEAST_LENGTH)
    probes = np.concatenate([rows, mixed])
    n = -(-len(probes) // spec.latent_size)
    return np.resize(probes, (n, spec.latent_size, spec.code_size))


def _probe_tokens(spec: ModelSpec, most: int = PROBED_TOKENS) -> Int64:
    """Indices (n, S). Each probed code stands in each position, neighbours in a row being different
    codes; on a grid, whose positions share their weights, in one position each."""
    codes = _spread(spec.num_codes, most)
    if len(spec.latent_shape) > 1:
        n = -(-len(codes) // spec.latent_size)
        return np.resize(codes, (n, spec.latent_size))
    return np.stack([np.roll(codes, position) for position in range(spec.latent_size)], axis=1)


def _spread(count: int, most: int) -> Int64:
    """At most ``most`` of 0 to count - 1, evenly spread, the ends among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def check_reconstructions(
    name: str, found: Array, outputs: Float64, precision: str, spec: ModelSpec
) -> Check:
    """Reconstructions beside ``reconstruction_scale``."""
    return check(
        "reconstructions",
        found,
        mean(spec, outputs),
        precision=precision,
        name=name,
        magnitude=reconstruction_scale(spec, outputs),
    )


def reconstruction_scale(spec: ModelSpec, outputs: Float64) -> Float64:
    """The scale (N, 1, 1, 1) that the oracle's outputs (N, P, H, W) leave reconstructions: an error
    in an output moves a mean by the likelihood's slope."""
    slope = LIKELIHOODS[spec.likelihood].slope(spec)
    largest: Float64 = np.abs(outputs).max(axis=(1, 2, 3), keepdims=True, initial=0.0)
    return 1 + largest * slope


def check_quantized(
    indices: Array,
    quantized: Array,
    latents: npt.ArrayLike,
    codebook: Array,
    *,
    precision: str,
    form: str = "direct",
) -> Iterator[Check]:
    """The indices by their rule, and quantized, which is a copy: rows of the codebook at those
    indices, to the last bit."""
    judged = check_indices(indices, latents, codebook, precision=precision, form=form)
    yield judged
    if judged.problem is not None:
        return
    copied = np.asarray(codebook)[indices].astype(array_dtype(precision))
    found = np.asarray(quantized)
    if found.shape != copied.shape or found.dtype != copied.dtype:
        problem = f"{found.dtype} {found.shape}, expected {copied.dtype} {copied.shape}"
        yield Check("quantized", precision, copied.size, max(1, copied.size), problem=problem)
        return
    wrong = np.argwhere(found != copied)
    at = f"not a row of the codebook at {tuple(int(i) for i in wrong[0])}" if len(wrong) else None
    yield Check("quantized", precision, copied.size, len(wrong), problem=at)


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
    """codebook, ema_count and ema_means after one update of ``state``, each element beside the sum
    of the magnitudes that it adds up: sums of latents may cancel."""
    how = decay, epsilon, dialect
    after = update_ema(state, latents, indices, *how)
    positive = EMAState(
        np.abs(state.codebook), state.ema_count, np.abs(state.ema_means), state.steps
    )
    magnitudes = update_ema(positive, np.abs(latents), indices, *how)
    sizes = {name: getattr(magnitudes, name) for name in STATE}
    if state.normalized:
        before = update_ema(dataclasses.replace(state, normalized=False), latents, indices, *how)
        sizes["codebook"] = _on_sphere(sizes["codebook"], after.codebook, before.codebook)
    for name, array in zip(STATE, found, strict=True):
        expected, magnitude = getattr(after, name), sizes[name]
        yield check("ema", array, expected, precision=precision, name=name, magnitude=magnitude)


def _on_sphere(magnitude: Float64, codes: Float64, before: Float64) -> Float64:
    """The magnitudes (K, D) of codes that are rows ``before`` over their lengths: of y = x / ||x||,
    those of x and of ||x||, which is y.x."""
    length, lengths = (np.linalg.norm(x, axis=1, keepdims=True) for x in (before, magnitude))
    shared: Float64 = (magnitude + np.abs(codes) * lengths) / np.maximum(length, LEAST_LENGTH)
    return shared


def _check_gradients(
    pulled: Callable[[Array], tuple[Array, Mapping[str, Array]]],
    precision: str,
    case: _Case,
    beta: float,
    known: Gradients,
) -> Check:
    """The gradient of every parameter on a few of the images, with the codes that were taken there:
    another code at a near tie is another gradient. known: the oracle's, by these codes.

    A bias is judged beside its row's weight, too: those of keys, and those before a norm of single
    channels, move no result, so that their gradients are rounding and nothing else.
    """
    images = case.images[: min(GRADIENT_IMAGES, -(-len(case.images) // IMAGES_PER_GRADIENT))]
    indices, found = pulled(images)
    if (codes := indices.tobytes()) not in known:
        known[codes] = [
            of(case.spec, case.params, images, beta, indices) for of in (gradients, gradient_terms)
        ]
    exact, terms = known[codes]
    sizes = {name: np.abs(each) + np.abs(terms[name]) for name, each in exact.items()}
    for name, size in sizes.items():
        if name.endswith(".bias"):
            weight = sizes[f"{name.removesuffix('.bias')}.weight"]
            sizes[name] = np.maximum(size, weight.max())
    return merge(
        f"{precision} gradients",
        precision,
        tuple(
            check(
                "gradients",
                found[name],
                each,
                precision=precision,
                name=f"of {name}",
                magnitude=sizes[name],
            )
            for name, each in exact.items()
        ),
    )


def _check_draw(draw: Callable[[Array, Array, float], Array], case: _Case) -> Check:
    """The scores of the codes that were drawn beside the best ones: either of two that are equally
    good to rounding may be drawn."""
    precision, k = case.precision, case.spec.num_codes
    latents = _few(case.latents, DRAWN_ELEMENTS // k)
    shape = latents.shape[:2]
    gumbel = np.random.default_rng(0).gumbel(size=(*shape, k)).astype(precision)
    scores = draw_scores(latents, case.codebook, gumbel, DRAW_TEMPERATURE)
    found = np.asarray(draw(latents, gumbel, DRAW_TEMPERATURE))
    fits = found.shape == shape and found.dtype == np.int64
    if not fits or not ((found >= 0) & (found < k)).all():
        problem = f"indices are {found.dtype} {found.shape}, expected int64 {shape} below {k}"
        count = scores[..., 0].size
        return Check("draw", precision, count, max(1, count), problem=problem)
    drawn = np.take_along_axis(scores, found[..., None], axis=2)[..., 0].astype(precision)
    terms = (np.abs(gumbel) + np.abs(scores - gumbel)).min(axis=2)
    magnitude = terms + np.abs(scores).max(axis=2)
    return check("draw", drawn, scores.max(axis=2), precision=precision, magnitude=magnitude)


def _few(latents: Array, most: int) -> Array:
    """At most ``most`` latents, as (n, S, D), or as (1, n, D) if that is less than an image's."""
    if most >= latents.shape[1]:
        return latents[: most // latents.shape[1]]
    return latents[:1, : max(1, most)]


def _check_reset(
    reset: Callable[[Array, Array, Array], tuple[Array, Array, Array]],
    state: EMAState,
    case: _Case,
    how: tuple[float, float, Dialect],
) -> Iterator[Check]:
    """Every second code set to a latent of the batch."""
    codes = np.arange(0, len(state.codebook), 2)
    rows = np.resize(
        case.latents.reshape(-1, case.latents.shape[2]), (len(codes), case.latents.shape[2])
    )
    counts = np.linspace(0, 2, len(codes)).astype(case.precision)
    after = reset_codes(state, codes, rows, counts, *how)
    for name, array in zip(STATE, reset(codes, rows, counts), strict=True):
        label = f"reset {name.removeprefix('ema_')}"
        yield check("ema", array, getattr(after, name), precision=case.precision, name=label)
