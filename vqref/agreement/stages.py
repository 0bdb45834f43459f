"""One comparison for every implementation.

Each stage gets the oracle's input, so that one flip cannot cascade. ``vqtrain`` wraps its module in
a ``Backend``, ``vqdeploy`` its onnxruntime sessions. Both are compared and judged in the same way.
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
"""How many codebook rows, evenly spread, the quantizer also gets as latents.

So a damaged row shows even if no image is near it."""

MIXED_ROWS, MIXED_BY = 256, 0.4
"""How many points between two of these rows are probed, and their distance from the first row.

The points are evenly spread over all pairs. The distance is a share of the way to the second row.
So a wrong distance shows even if there are few images."""

PROBED_TOKENS = 64
"""How many codes, evenly spread, are decoded in every position besides those of the images.

On a grid, each position gets one code."""

GRADIENT_IMAGES, IMAGES_PER_GRADIENT = 4, 4
"""Gradients are compared on one image in IMAGES_PER_GRADIENT, and on GRADIENT_IMAGES at most.

The oracle takes several times as long for them."""

Gradients = dict[bytes, list[Mapping[str, Float64]]]
"""Gradients of every parameter, and of their terms, by the bytes of the indices taken."""

SOFTPLUS_FLOOR = 0.01
"""The smallest scale of the loss of one value of an image, in nats.

Near 0, it keeps the rounding of 1 within the tolerance."""

DRAW_TEMPERATURE = 0.3
"""The temperature at which drawing is compared. It often draws codes other than the nearest."""

DRAWN_ELEMENTS = 2**20
"""The most scores for which drawing is compared, one per latent and code."""


@dataclass(frozen=True)
class Backend:
    """An implementation under test. It takes and returns NumPy arrays in ``precision``'s dtype.

    A stage that is None is not compared.

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

    gradients    {precision: images -> (indices taken, {name: gradient} of the losses' total for
                 every parameter of encoder and decoder)}, each in its own precision

    precision: that of the networks. quantizer_precision: that of distances. detokenizer_precision:
    that of the detokenizer, if it is a table. None means the networks' precision.
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
    """Compares every stage of ``backend`` with the oracle on images (N, C, H, W) in [0, 1].

    beta, decay, epsilon, dialect, steps: for the losses and the averages, as in ``vqref``.
    known: ``vqref.forward`` of the same parameters and images, if the caller has it.
    probed: the most codes that the decoder gets besides the images' tokens.
    Returns a report even if stages disagree. Raises only ValueError, for parameters or images that
    do not fit the spec.
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
    """The inputs of every stage of one comparison, in the dtype of its precision."""

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
    """Returns the scale (N, S, D) of errors in unit latents y = x / ||x||, where x is unscaled.

    Errors of at most e in each element of x cause errors of at most (e + |y| sqrt(D) e) / ||x|| in
    y. Most of it is a change of direction, which is large if x is short.
    """
    largest = np.abs(unscaled).max(initial=ELU_FLOOR)
    shares = 1 + np.abs(latents) * latents.shape[2] ** 0.5
    scale: Float64 = largest * shares / _lengths(unscaled)
    return scale


def _lengths(unscaled: Float64) -> Float64:
    """Returns the lengths (N, S, 1) by which the last row of a normalized encoder divides."""
    found: Float64 = np.linalg.norm(unscaled, axis=2, keepdims=True)
    return found.clip(min=LEAST_LENGTH)


def _check_quantizer(
    quantizer: Callable[[Array], tuple[Array, Array]], case: _Case
) -> Iterator[Check]:
    """Checks the quantizer on the images' latents and on probes, merged into one result."""
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
    """Checks the tokenizer, which computes latents of its own."""
    return check_indices(
        tokenizer(case.images),
        case.exact_latents,
        case.codebook,
        precision=case.quantizer_precision,
        latents_error=latents_error(case.spec, case.unscaled, case.precision),
        name="tokenizer",
    )


def latents_error(spec: ModelSpec, unscaled: Float64, precision: str) -> Float64:
    """Returns how far (N, S) an encoder's latents may be from the oracle's.

    unscaled (N, S, D) is the oracle's input of ``vqref.network.scaled``. Each element may be off by
    its tolerance, and a vector by sqrt(D) times that. For a unit vector, divide by its length
    before scaling.
    """
    allowed = allowed_error("encoder", unscaled, precision=precision)
    error: Float64 = allowed.max(axis=2) * spec.code_size**0.5
    return error / _lengths(unscaled)[..., 0] if spec.normalized else error


def _check_decoder(
    backend: Backend, case: _Case, known: Forward | None, beta: float, probed: int
) -> Iterator[Check]:
    """Checks decoder and detokenizer on the images' tokens and on probes, and the losses."""
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
    """Returns the oracle's outputs of quantized latents. Takes those of images from ``known``."""
    if known is None or not np.array_equal(known.indices, case.indices):
        return decode(spec, case.params, quantized)
    return np.concatenate(
        [known.outputs, decode(spec, case.params, quantized[len(case.indices) :])]
    )


def _loss_magnitudes(spec: ModelSpec, losses: Float64) -> Float64:
    """Returns the scales of the four losses.

    Terms of a reconstruction may cancel if densities exceed 1. Those of a gaussian do; its constant
    is (CHW/2) ln 2πσ². A softplus may be computed as log(1 + exp). This is off by a rounding of 1
    in each value of an image, however small the softplus is.
    """
    magnitudes = np.abs(losses)
    if spec.likelihood == "bernoulli":
        magnitudes[[0, 3]] += SOFTPLUS_FLOOR * np.prod(spec.image_shape)
    if spec.likelihood == "gaussian":
        constant = 0.5 * np.prod(spec.image_shape) * np.log(2 * np.pi * spec.variance)
        magnitudes[[0, 3]] += abs(constant)
    return magnitudes


def _probe_latents(spec: ModelSpec, codebook: Array) -> Array:
    """Returns rows of the codebook, and points between two of them, as latents (n, S, D).

    Row first - 1 - second is never row first. A negative number counts from the end.
    """
    rows = codebook[_spread(spec.num_codes, PROBED_ROWS)]
    first, second = np.divmod(_spread(len(rows) * (len(rows) - 1), MIXED_ROWS), len(rows) - 1)
    mixed = (1 - MIXED_BY) * rows[first] + MIXED_BY * rows[first - 1 - second]
    if spec.normalized:
        mixed /= np.linalg.norm(mixed, axis=1, keepdims=True).clip(min=LEAST_LENGTH)
    probes = np.concatenate([rows, mixed])
    n = -(-len(probes) // spec.latent_size)
    return np.resize(probes, (n, spec.latent_size, spec.code_size))


def _probe_tokens(spec: ModelSpec, most: int = PROBED_TOKENS) -> Int64:
    """Returns indices (n, S) to decode.

    Each probed code stands in each position, and neighbours in a row are different codes. On a
    grid, where positions share their weights, each code stands in one position.
    """
    codes = _spread(spec.num_codes, most)
    if len(spec.latent_shape) > 1:
        n = -(-len(codes) // spec.latent_size)
        return np.resize(codes, (n, spec.latent_size))
    return np.stack([np.roll(codes, position) for position in range(spec.latent_size)], axis=1)


def _spread(count: int, most: int) -> Int64:
    """Returns at most ``most`` of 0 to count - 1, evenly spread, both ends included."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def check_reconstructions(
    name: str, found: Array, outputs: Float64, precision: str, spec: ModelSpec
) -> Check:
    """Checks reconstructions against the oracle's, on the scale of ``reconstruction_scale``."""
    return check(
        "reconstructions",
        found,
        mean(spec, outputs),
        precision=precision,
        name=name,
        magnitude=reconstruction_scale(spec, outputs),
    )


def reconstruction_scale(spec: ModelSpec, outputs: Float64) -> Float64:
    """Returns the scale (N, 1, 1, 1) of reconstructions of the oracle's outputs (N, P, H, W).

    An error in an output moves a mean by the likelihood's slope.
    """
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
    """Checks the indices by their rule, and quantized as a copy.

    quantized must be the rows of the codebook at those indices, to the last bit.
    """
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
    """Checks codebook, ema_count and ema_means after one update of ``state``.

    The scale of each element is the sum of the magnitudes that it adds up, because sums of latents
    may cancel.
    """
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
    """Returns the magnitudes (K, D) of codes that are rows ``before`` divided by their lengths.

    For y = x / ||x||, these are the magnitudes of x and of ||x||, which is y.x.
    """
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
    """Checks the gradient of every parameter on a few of the images.

    The oracle uses the codes that the backend took, because another code at a near tie has another
    gradient. known: the oracle's gradients, by these codes.

    The scale of a bias includes that of its row's weight. Biases of keys, and those before a norm
    of single channels, move no result. Their gradients are nothing but rounding.
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
    """Checks that the scores of the drawn codes are the best ones, up to rounding.

    If two codes are equally good up to rounding, either may be drawn.
    """
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
    """Returns at most ``most`` latents as (n, S, D), or as (1, n, D) if they are less than S."""
    if most >= latents.shape[1]:
        return latents[: most // latents.shape[1]]
    return latents[:1, : max(1, most)]


def _check_reset(
    reset: Callable[[Array, Array, Array], tuple[Array, Array, Array]],
    state: EMAState,
    case: _Case,
    how: tuple[float, float, Dialect],
) -> Iterator[Check]:
    """Checks a reset that sets every second code to a latent of the batch."""
    codes = np.arange(0, len(state.codebook), 2)
    rows = np.resize(
        case.latents.reshape(-1, case.latents.shape[2]), (len(codes), case.latents.shape[2])
    )
    counts = np.linspace(0, 2, len(codes)).astype(case.precision)
    after = reset_codes(state, codes, rows, counts, *how)
    for name, array in zip(STATE, reset(codes, rows, counts), strict=True):
        label = f"reset {name.removeprefix('ema_')}"
        yield check("ema", array, getattr(after, name), precision=case.precision, name=label)
