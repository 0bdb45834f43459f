"""The options of a training run and the recipes that set them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

SMALLEST, LARGEST = 1e-12, 1e6
"""Bounds of options that are factors and divisors: float32 holds them and their products with what they meet."""

PRECISIONS = ("float32", "tf32", "bfloat16")


@dataclass(frozen=True)
class TrainingOptions:
    """How to train; the defaults are the post's.

    epochs, batch_size: passes over the images, images a step (a last batch that is not full is dropped)
    learning_rate: of Adam
    second_moment: the decay of Adam's mean of squared gradients, beta2
    beta: weight of the commitment loss
    decay, epsilon: of the codebook's moving averages, as in ``vqref.update_ema``
    seed: of the initial parameters and the order of the images
    center: start the decoder's last bias at the logit of the mean pixel, so that the first steps need not drive every latent
        the same way to learn it
    plain_steps: steps at the start in which the decoder is fed the latents themselves and the codebook waits
    kmeans_start: set the codebook by k-means on the latents of all images when those steps are over
    temperature, anneal_until: after that draw indices from softmax(-d / (2 * temperature * variance)), the temperature
        falling linearly to 0 at that share of all steps; 0: the nearest code from the start
    revive_below: reset a code whose ``ema_count`` is below this share of the mean to a latent of the batch; 0: never
    cosine: let the learning rate fall to a hundredth along half a cosine, after a hundred steps of rising
    precision: of the networks' products in training, float32, bfloat16, or tf32, which only a card has; checks and evaluation
        are always float32

    Raises ValueError that names the field, what it was and what it must be.
    """

    epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 1e-3
    second_moment: float = 0.999
    beta: float = 0.25
    decay: float = 0.99
    epsilon: float = 1e-5
    seed: int = 0
    center: bool = False
    plain_steps: int = 0
    kmeans_start: bool = False
    temperature: float = 0.0
    anneal_until: float = 0.6
    revive_below: float = 0.0
    cosine: bool = False
    precision: str = "float32"

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("seed", 0), ("plain_steps", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
                raise ValueError(f"{name} is {value!r}; it must be an integer of at least {least} and below 2**63")
        for name in ("learning_rate", "epsilon"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and SMALLEST <= value <= LARGEST):
                raise ValueError(f"{name} is {value!r}; it must be a number from {SMALLEST:g} to {LARGEST:g}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}; it must be one of {', '.join(PRECISIONS)}")
        if not 0 <= self.beta <= LARGEST:
            raise ValueError(f"beta is {self.beta!r}; it must be a number from 0 to {LARGEST:g}")
        if not 0 <= self.temperature <= LARGEST:
            raise ValueError(f"temperature is {self.temperature!r}; it must be a number from 0 to {LARGEST:g}")
        if not 0 <= self.second_moment < 1:
            raise ValueError(f"second_moment is {self.second_moment!r}; it must be a number from 0 to below 1")
        for name in ("decay", "anneal_until", "revive_below"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value!r}; it must be a number from 0 to 1")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


FIRST_MOMENT, ADAM_EPSILON = 0.9, 1e-7
"""What no option changes in Adam: the decay of the mean gradient, and epsilon, both the post's."""

RECIPES = {
    "default": TrainingOptions(
        batch_size=32,
        second_moment=0.99,
        beta=1.0,
        decay=0.985,
        center=True,
        plain_steps=400,
        kmeans_start=True,
        temperature=0.3,
        revive_below=0.05,
        cosine=True,
    ),
    "seed": TrainingOptions(),
}
"""Named sets of options. "seed" is the post, exactly: the codebook starts Glorot uniform, with ``ema_count`` 0. "default" keeps
its network, losses and averages, and starts, keeps alive and anneals the codebook; docs/recipes.md has what it measures."""

DEFAULT_RECIPE = "default"
