"""What a model itself gives to be asked about: images of its tokens, and latents by the million,
where its own lie and where its codes are equally near."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

import vqref
from vqdeploy.agreement import Sessions
from vqref.agreement.budget import DIFFERENCES_PER_SECOND, FEWEST, SECONDS, images_within
from vqref.agreement.parity import allowed_error, check_indices
from vqref.agreement.report import Check, merge
from vqref.agreement.stages import check_quantized
from vqref.checks.adversary import around_bisectors
from vqref.spec import CODEBOOK, EMA_COUNT, ModelSpec
from vqref.validation import Array, Params

OWN_LATENTS = 512
"""The model's own latents come from as many images as one check may take, and are at least so
many; further ones lie on lines between them."""

LATENTS_AT_ONCE = 65_536

COMPOSED_IMAGES = 2048
"""Images on which the tokenizer is held to the encoder; fewer if their latents take the judge
longer than SECONDS, or their pass onnxruntime."""

TIMES_FASTER = 10
"""onnxruntime is at least so many times as fast as the oracle."""

CODES_AT_MOST = 2**16
"""Rows of a codebook that are fed to the quantizer, evenly spread."""


def check_samples(
    spec: ModelSpec, params: Params, sessions: Sessions, samples: int, seed: int = 0
) -> tuple[Check, Check]:
    """The quantizer graph on ``samples`` latents, half of them drawn from the model's own
    distribution, half around the bisectors of its codes.

    Each index is judged as ``vqref.agreement.check_indices`` does.
    """
    rng = np.random.default_rng(seed)
    codebook, quantizer = params[CODEBOOK], sessions["quantizer"]
    own = own_latents(spec, params, sessions)  # (M, D)

    def drawn(count: int) -> Array:
        first, second = own[rng.integers(0, len(own), (2, count))]
        return np.asarray(first + rng.random((count, 1), np.float32) * (second - first))

    def bisecting(count: int) -> Array:
        return around_bisectors(rng, codebook, count, "float32")[:, 0]

    def judged(name: str, draw: Callable[[int], Array], count: int) -> Check:
        return merge(name, "float32", tuple(_judge(spec, codebook, quantizer, draw, count)))

    return (
        judged("drawn", drawn, samples - samples // 2),
        judged("bisectors", bisecting, samples // 2),
    )


def check_composed(
    spec: ModelSpec, params: Params, sessions: Sessions, precision: str
) -> tuple[Check, Array]:
    """The tokenizer on images by the thousand, beside what the encoder says of them, and the tokens
    (N, S): the oracle, which is slower, judges the encoder on fewer.

    The two may differ by the encoder's tolerance, as ``vqref.agreement.stages`` has it. precision:
    of the networks.
    """
    per_image = 3 * spec.latent_size * spec.num_codes * spec.code_size
    judged = max(FEWEST, int(SECONDS * DIFFERENCES_PER_SECOND / per_image))
    count = images_within(spec, min(COMPOSED_IMAGES, judged), TIMES_FASTER * SECONDS)
    images = varied_images(spec, sessions, count)
    latents = np.asarray(sessions["encoder"](images)[0])
    tokens = sessions["tokenizer"](images)[0]
    allowed = allowed_error("encoder", latents, precision=precision)
    return check_indices(
        tokens,
        latents,
        params[CODEBOOK],
        precision="float32",
        latents_error=allowed.max(axis=2) * spec.code_size**0.5,
        name="composed",
    ), tokens


def varied_images(
    spec: ModelSpec, sessions: Sessions, count: int, seed: int = 0
) -> npt.NDArray[np.float32]:
    """Images (count, C, H, W) of many kinds, made of those that tokens decode to, each code at
    least once if there are enough: pixels drawn as black or white, two images beyond each other,
    mosaics of two, and moved ones. They have more codes than decoded images alone."""
    rng = np.random.default_rng(seed)
    rows = np.arange(count * spec.latent_size).reshape(count, -1) % spec.num_codes
    indices = rows if spec.latent_size == 1 else rng.permuted(rows, axis=0)
    first = np.asarray(sessions["detokenizer"](indices)[0])
    second = first[rng.permutation(count)]
    blocks = np.kron(rng.random((count, 1, 4, 4)) < 0.5, np.ones((1, 1, *_fourths(spec))))
    mask = blocks[:, :, : spec.image_shape[1], : spec.image_shape[2]] > 0
    kinds = (
        first > rng.random(first.shape),
        first + 1.5 * (first - second),
        np.where(mask, first, second),
        np.roll(first, (3, -3), (2, 3)),
    )
    chosen = [kind[i :: len(kinds)] for i, kind in enumerate(kinds)]
    return np.asarray(np.clip(np.concatenate(chosen), 0, 1), np.float32)


def _fourths(spec: ModelSpec) -> tuple[int, int]:
    """A fourth of an image's height and width, rounded up."""
    return -(-spec.image_shape[1] // 4), -(-spec.image_shape[2] // 4)


def check_codes(spec: ModelSpec, params: Params, sessions: Sessions) -> Check:
    """The quantizer graph on every row of the codebook: at distance 0 each is its own nearest code
    in any arithmetic, unless another is so near that the judge has to decide."""
    codebook = np.asarray(params[CODEBOOK], np.float32)
    chosen = np.arange(0, len(codebook), -(-len(codebook) // CODES_AT_MOST))
    images = -(-len(chosen) // spec.latent_size)
    chosen = np.resize(chosen, (images, spec.latent_size))
    latents = codebook[chosen]
    indices, quantized = sessions["quantizer"](latents)
    doubtful = (indices != chosen).any(axis=1) | (quantized != latents).any(axis=(1, 2))
    judged = check_quantized(
        indices[doubtful], quantized[doubtful], latents[doubtful], codebook, precision="float32"
    )
    found = merge("codes", "float32", tuple(judged))
    certified = chosen.size - (found.near_ties or 0)
    return replace(found, compared=chosen.size, certified=certified)


def draw_indices(
    spec: ModelSpec, params: Params, rng: np.random.Generator, count: int
) -> npt.NDArray[np.int64]:
    """Indices (count, S), each code drawn as often as training hit it; uniform if it never did."""
    hits = np.asarray(params[EMA_COUNT], np.float64)
    share = hits / hits.sum() if hits.sum() > 0 else None
    return rng.choice(spec.num_codes, (count, spec.latent_size), p=share)


def draw_images(
    spec: ModelSpec, params: Params, count: int, seed: int = 0
) -> npt.NDArray[np.float32]:
    """Images (count, C, H, W) that the model draws: the oracle's reconstructions of drawn indices,
    every second one under noise."""
    rng = np.random.default_rng(seed)
    indices = draw_indices(spec, params, rng, count)
    distinct, back = np.unique(indices, axis=0, return_inverse=True)
    outputs = vqref.decode(spec, params, params[CODEBOOK][distinct])
    drawn = vqref.reconstruct(spec, outputs)[back]
    drawn[1::2] = 0.8 * drawn[1::2] + 0.2 * rng.random(drawn[1::2].shape)
    return drawn.astype(np.float32)


def aimed_images(spec: ModelSpec, params: Params) -> npt.NDArray[np.float32]:
    """Images (N, C, H, W) aimed at every code: the oracle's reconstructions of indices in which
    each code stands once among others, then of one code in every position, as many as a check may
    take.

    Which code an image has is the encoder's to say: it need not be the code that it was decoded
    from. Nothing is drawn, so they are the same for the same model on every machine and version.
    """
    k, s = spec.num_codes, spec.latent_size
    mixed = np.resize(np.arange(k) * _stride(k) % k, (-(-k // s), s))
    alone = np.repeat(np.arange(k)[:, None], s, axis=1)
    indices = mixed if s == 1 else np.concatenate([mixed, alone])
    count = images_within(spec, most=len(indices))
    chosen = indices if count == len(indices) else indices[:: -(-len(indices) // count)]
    outputs = vqref.decode(spec, params, params[CODEBOOK][chosen])
    return vqref.reconstruct(spec, outputs).astype(np.float32)


def _stride(count: int) -> int:
    """A step that visits 0 to count - 1 in a scattered order."""
    return next(
        step
        for step in range(round(0.618 * count) or 1, 2 * count + 1)
        if math.gcd(step, count) == 1
    )


def own_latents(spec: ModelSpec, params: Params, sessions: Sessions) -> Array:
    """Latents (M, D) of images that the model draws."""
    needed = -(-OWN_LATENTS // spec.latent_size)
    images = draw_images(spec, params, max(needed, images_within(spec, most=OWN_LATENTS)))
    return np.asarray(sessions["encoder"](images)[0]).reshape(-1, spec.code_size)


def _judge(
    spec: ModelSpec,
    codebook: Array,
    quantizer: Callable[[Array], list[Array]],
    draw: Callable[[int], Array],
    count: int,
) -> Iterator[Check]:
    """Judges ``count`` latents a part at a time; the last image is filled up with latents again."""
    for start in range(0, count, LATENTS_AT_ONCE):
        latents = draw(min(LATENTS_AT_ONCE, count - start))
        images = -(-len(latents) // spec.latent_size)
        latents = np.resize(latents, (images, spec.latent_size, spec.code_size))
        indices, quantized = quantizer(latents)
        yield from check_quantized(indices, quantized, latents, codebook, precision="float32")
