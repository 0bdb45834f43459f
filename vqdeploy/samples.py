"""Latents by the million, drawn where a model lives and where its codes are equally near, for the quantizer to answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

import vqref
from vqref.adversary import around_bisectors
from vqref.agreement import check_quantized
from vqref.report import Check, merge
from vqref.spec import CODEBOOK, EMA_COUNT, ModelSpec
from vqref.validation import Params

Array = npt.NDArray[Any]

DRAWN_IMAGES = 512
"""Images that the model draws; further latents lie on lines between theirs."""

LATENTS_AT_ONCE = 65_536


def check_samples(
    spec: ModelSpec, params: Params, sessions: Mapping[str, Callable[[Array], list[Array]]], samples: int, seed: int = 0
) -> tuple[Check, Check]:
    """The quantizer graph on ``samples`` latents, half drawn from the model's own distribution, half around the bisectors of
    its codes, each index judged as ``vqref.parity.check_indices`` does."""
    rng = np.random.default_rng(seed)
    codebook = params[CODEBOOK]
    own: Array = own_latents(spec, params, sessions)  # (M, D)

    def drawn(count: int) -> Array:
        first, second = own[rng.integers(0, len(own), count)], own[rng.integers(0, len(own), count)]
        return np.asarray(first + rng.random((count, 1), np.float32) * (second - first))

    def bisecting(count: int) -> Array:
        return around_bisectors(rng, codebook, count, "float32")[:, 0]

    def judged(name: str, draw: Callable[[int], Array], count: int) -> Check:
        return merge(name, "float32", tuple(_judge(spec, codebook, sessions["quantizer"], draw, count)))

    return judged("drawn", drawn, samples - samples // 2), judged("bisectors", bisecting, samples // 2)


def draw_indices(spec: ModelSpec, params: Params, rng: np.random.Generator, count: int) -> npt.NDArray[np.int64]:
    """Indices (count, S), each code as often as training hit it; uniform for a model that was never trained."""
    hits = np.asarray(params[EMA_COUNT], np.float64)
    share = hits / hits.sum() if hits.sum() > 0 else None
    return rng.choice(spec.num_codes, (count, spec.latent_size), p=share)


def draw_images(spec: ModelSpec, params: Params, count: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Images (count, C, H, W) that the model draws: its pixels' probabilities by the oracle, every second image under noise."""
    rng = np.random.default_rng(seed)
    indices = draw_indices(spec, params, rng, count)
    distinct, back = np.unique(indices, axis=0, return_inverse=True)
    drawn = vqref.sigmoid(vqref.decode(spec, params, params[CODEBOOK][distinct]))[back]
    drawn[1::2] = 0.8 * drawn[1::2] + 0.2 * rng.random(drawn[1::2].shape)
    return drawn.astype(np.float32)


def own_latents(spec: ModelSpec, params: Params, sessions: Mapping[str, Callable[[Array], list[Array]]]) -> Array:
    """Latents (M, D) of images that the model draws."""
    return np.asarray(sessions["encoder"](draw_images(spec, params, DRAWN_IMAGES))[0]).reshape(-1, spec.code_size)


def _judge(
    spec: ModelSpec,
    codebook: Array,
    quantizer: Callable[[Array], list[Array]],
    draw: Callable[[int], Array],
    count: int,
) -> Iterator[Check]:
    """A part of ``count`` latents at a time, as many images as they fill; what is left over is filled up."""
    for start in range(0, count, LATENTS_AT_ONCE):
        latents = draw(min(LATENTS_AT_ONCE, count - start))
        images = -(-len(latents) // spec.latent_size)
        latents = np.resize(latents, (images, spec.latent_size, spec.code_size))
        indices, quantized = quantizer(latents)
        yield from check_quantized(indices, quantized, latents, codebook, precision="float32")
