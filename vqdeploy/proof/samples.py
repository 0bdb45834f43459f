"""Makes images and latents from a model, and checks its graphs on them.

The images are decoded from tokens. The latents lie where the model's own lie, and where two codes
are equally near.
"""

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
"""The least number of the model's own latents. They come from as many images as one check may take;
further latents lie on lines between them."""

LATENTS_AT_ONCE = 65_536

COMPOSED_IMAGES = 2048
"""The most images on which the tokenizer is compared with the encoder. There are fewer if the judge
or onnxruntime would take longer than SECONDS."""

TIMES_FASTER = 10
"""How many times as fast as the oracle onnxruntime is, at least."""

CODES_AT_MOST = 2**16
"""The most rows of a codebook that are fed to the quantizer, evenly spread."""


def check_samples(
    spec: ModelSpec, params: Params, sessions: Sessions, samples: int, seed: int = 0
) -> tuple[Check, Check]:
    """Checks the quantizer graph on ``samples`` latents.

    Half of them come from the model's own distribution, half lie around the bisectors of its codes.
    ``vqref.agreement.check_indices`` says how each index is judged.
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
    """Compares the tokenizer with the encoder on thousands of images.

    The oracle is slower, so it judges the encoder on fewer images. Tokenizer and encoder may differ
    by the encoder's tolerance, see ``vqref.agreement.stages``. precision: the networks' precision.
    Also returns the tokens (N, S).
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
    """Returns images (count, C, H, W) of four kinds, made from decoded tokens.

    The kinds are: pixels drawn as black or white, two images extrapolated, mosaics of two images,
    and shifted images. They have more codes than decoded images alone. The decoded tokens include
    each code at least once if there are enough of them.
    """
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
    """Returns a quarter of an image's height and width, rounded up."""
    return -(-spec.image_shape[1] // 4), -(-spec.image_shape[2] // 4)


def check_codes(spec: ModelSpec, params: Params, sessions: Sessions) -> Check:
    """Checks the quantizer graph on every row of the codebook.

    A row has distance 0 to itself, so it is its own nearest code in any arithmetic. Only if another
    code is very near must the judge decide.
    """
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
    """Draws indices (count, S), each code as often as training hit it; uniform without hits."""
    hits = np.asarray(params[EMA_COUNT], np.float64)
    share = hits / hits.sum() if hits.sum() > 0 else None
    return rng.choice(spec.num_codes, (count, spec.latent_size), p=share)


def draw_images(
    spec: ModelSpec, params: Params, count: int, seed: int = 0
) -> npt.NDArray[np.float32]:
    """Returns images (count, C, H, W) that the model draws.

    They are the oracle's reconstructions of drawn indices. Every second one is mixed with noise.
    """
    rng = np.random.default_rng(seed)
    indices = draw_indices(spec, params, rng, count)
    distinct, back = np.unique(indices, axis=0, return_inverse=True)
    outputs = vqref.decode(spec, params, params[CODEBOOK][distinct])
    drawn = vqref.reconstruct(spec, outputs)[back]
    drawn[1::2] = 0.8 * drawn[1::2] + 0.2 * rng.random(drawn[1::2].shape)
    return drawn.astype(np.float32)


def aimed_images(spec: ModelSpec, params: Params) -> npt.NDArray[np.float32]:
    """Returns images (N, C, H, W) that aim at every code.

    They are the oracle's reconstructions of two kinds of indices: first each code once, among
    others; then each code in all positions. There are as many as one check may take.

    The encoder may give an image other codes than those that it was decoded from. Nothing is drawn,
    so the images are the same for a model on every machine and in every version.
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
    """Returns a step that visits 0 to count - 1 in a scattered order."""
    return next(
        step
        for step in range(round(0.618 * count) or 1, 2 * count + 1)
        if math.gcd(step, count) == 1
    )


def own_latents(spec: ModelSpec, params: Params, sessions: Sessions) -> Array:
    """Returns the latents (M, D) of images that the model draws."""
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
    """Judges ``count`` latents, a part at a time. Latents are repeated to fill the last image."""
    for start in range(0, count, LATENTS_AT_ONCE):
        latents = draw(min(LATENTS_AT_ONCE, count - start))
        images = -(-len(latents) // spec.latent_size)
        latents = np.resize(latents, (images, spec.latent_size, spec.code_size))
        indices, quantized = quantizer(latents)
        yield from check_quantized(indices, quantized, latents, codebook, precision="float32")
