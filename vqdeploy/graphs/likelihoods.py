"""Turns the decoder's outputs into images, as ONNX nodes: the twin of ``vqref.likelihoods``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vqdeploy.graphs.network import GraphBuilder, scaled
from vqref.spec import ModelSpec


def mean(builder: GraphBuilder, spec: ModelSpec, outputs: str, reconstructions: str) -> str:
    """Adds nodes from outputs (N, P, H, W) to reconstructions (N, C, H, W) in [0, 1], float32."""
    return MEANS[spec.likelihood](builder, spec, outputs, reconstructions)


def bernoulli(builder: GraphBuilder, spec: ModelSpec, outputs: str, reconstructions: str) -> str:
    return builder.node("Sigmoid", [outputs], reconstructions)


def gaussian(builder: GraphBuilder, spec: ModelSpec, outputs: str, reconstructions: str) -> str:
    """Maps the outputs back from the networks' range to [0, 1], and clips them."""
    low, high = spec.value_range
    scale, shift = np.array([1 / (high - low), -low / (high - low)], np.float32)
    grey = scaled(builder, f"{reconstructions}.unclipped", outputs, scale, shift)
    bounds = [
        builder.constant(f"{reconstructions}.{name}", np.float32(value))
        for name, value in (("black", 0), ("white", 1))
    ]
    return builder.node("Clip", [grey, *bounds], reconstructions)


def logistic(builder: GraphBuilder, spec: ModelSpec, outputs: str, reconstructions: str) -> str:
    """Takes the first C channels; the others are log-scales."""
    bounds = [
        builder.integers(f"{reconstructions}.{name}", [value])
        for name, value in (("starts", 0), ("ends", spec.image_shape[0]), ("axes", 1))
    ]
    centres = builder.node("Slice", [outputs, *bounds], f"{reconstructions}.centres")
    return gaussian(builder, spec, centres, reconstructions)


MEANS: dict[str, Callable[[GraphBuilder, ModelSpec, str, str], str]] = {
    "bernoulli": bernoulli,
    "gaussian": gaussian,
    "logistic": logistic,
}
