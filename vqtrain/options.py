"""The options of a training run and the recipes that set them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

SMALLEST, LARGEST = 1e-12, 1e6
"""Bounds of options that are factors and divisors: float32 holds them and their products with what they meet."""

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class TrainingOptions:
    """How to train; the defaults are the post's.

    epochs, batch_size: passes over the images, images a step (a last batch that is not full is dropped)
    learning_rate: of Adam
    beta: weight of the commitment loss
    decay, epsilon: of the codebook's moving averages, as in ``vqref.update_ema``
    seed: of the initial parameters and the order of the images
    precision: of the networks' products in training, float32 or bfloat16; checks and evaluation are always float32

    Raises ValueError that names the field, what it was and what it must be.
    """

    epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 1e-3
    beta: float = 0.25
    decay: float = 0.99
    epsilon: float = 1e-5
    seed: int = 0
    precision: str = "float32"

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("seed", 0)):
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
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay is {self.decay!r}; it must be a number from 0 to 1")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


ADAM_BETAS, ADAM_EPSILON = (0.9, 0.999), 1e-7
"""What no option changes: the moments' decays and epsilon of the post's optimizer."""

RECIPES = {"seed": TrainingOptions()}
"""Named sets of options. "seed" is the post, exactly: the codebook starts Glorot uniform, with ``ema_count`` 0."""

DEFAULT_RECIPE = "seed"
