"""The options of a training run and the recipes that set them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from vqref.dialects import DIALECTS
from vqref.families import Size
from vqref.precisions import PRECISIONS
from vqref.spec import ModelSpec

SMALLEST, LARGEST = 1e-12, 1e6
"""Bounds of options that multiply or divide. float32 holds them and their products."""

TRAINED = tuple(name for name, precision in PRECISIONS.items() if precision.trains)
"""Names of the precisions in which a network can be trained."""

OPTIMIZERS = ("adam", "muon")
"""Names of the optimizers in ``vqtrain.optimizers``."""


@dataclass(frozen=True)
class TrainingOptions:
    """How to train. The defaults are the post's.

    epochs, batch_size: passes over the images, and images per step. A last batch that is not full
        is dropped.
    optimizer: one of ``OPTIMIZERS``. Muon moves the convolutions, and Adam everything else.
    learning_rate: of both
    second_moment, adam_epsilon: Adam's decay of the mean squared gradient (beta2) and its epsilon
    beta: weight of the commitment loss
    dialect: the rule of the codebook's moving averages, a name of ``vqref.dialects.DIALECTS``
    decay, epsilon: of these averages, as in ``vqref.update_ema``
    seed: for the initial parameters and the order of the images
    center: start the decoder's last bias so that the first reconstructions are the mean pixel.
        The first steps then need not drive every latent the same way to learn it.
    plain_steps: steps at the start in which the decoder gets the latents themselves. The codebook
        does not change in these steps.
    kmeans_start: after these steps, set the codebook by k-means on the latents of all images
    temperature, anneal_until: then draw indices from softmax(-d / (2 * temperature * variance)).
        The temperature falls linearly to 0, which it reaches after the share ``anneal_until`` of
        all steps. A temperature of 0 takes the nearest code from the start.
    revive_below: reset a code to a latent of the batch if its ``ema_count`` is below this share of
        the mean; 0 resets none
    cosine: raise the learning rate for a hundred steps, and lower it along half a cosine to a
        hundredth
    precision: of the networks' products in training, one of ``TRAINED``; tf32 needs a CUDA device.
        Checks and evaluation always compute in float32.

    Raises ValueError that names the field, its value and what it must be.
    """

    epochs: int = 20
    batch_size: int = 64
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    second_moment: float = 0.999
    adam_epsilon: float = 1e-7
    beta: float = 0.25
    dialect: str = "post"
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
                raise ValueError(
                    f"{name} is {value!r}; it must be an integer of at least {least} "
                    "and below 2**63"
                )
        for names, low, high in (
            (("learning_rate", "adam_epsilon", "epsilon"), SMALLEST, LARGEST),
            (("beta", "temperature"), 0, LARGEST),
            (("decay", "anneal_until", "revive_below"), 0, 1),
        ):
            for name in names:
                value = getattr(self, name)
                if not (isinstance(value, int | float) and low <= value <= high):
                    raise ValueError(
                        f"{name} is {value!r}; it must be a number from {low:g} to {high:g}"
                    )
        for name in ("center", "kmeans_start", "cosine"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be true or false")
        if not 0 <= self.second_moment < 1:
            raise ValueError(
                f"second_moment is {self.second_moment!r}; it must be a number from 0 to below 1"
            )
        for name, known in (
            ("optimizer", OPTIMIZERS),
            ("precision", TRAINED),
            ("dialect", DIALECTS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}"
                )
        if DIALECTS[self.dialect].debiased and self.decay == 1:
            raise ValueError(f"decay is 1; {self.dialect} divides by 1 - decay**steps")

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain data."""
        return dataclasses.asdict(self)


STILL: Mapping[str, Any] = MappingProxyType(
    {"dialect": "rosinality", "decay": 1.0, "kmeans_start": False, "revive_below": 0.0}
)
"""Options that leave the codebook as it starts."""


def require_still(spec: ModelSpec, options: TrainingOptions) -> None:
    """Raises ValueError that names an option that would move the codebook of a grid."""
    for name, value in STILL.items():
        if spec.levels and (found := getattr(options, name)) != value:
            raise ValueError(f"{name} is {found!r}; it must be {value!r}: the codebook is a grid")


def default(spec: ModelSpec) -> TrainingOptions:
    """Returns the options that work best here: they start, revive and anneal the codebook.

    docs/recipes.md has the measurements.
    """
    if spec.family == "post":
        return TrainingOptions(
            batch_size=32,
            optimizer="muon",
            second_moment=0.99,
            beta=1.0,
            decay=0.985,
            center=True,
            plain_steps=400,
            kmeans_start=True,
            temperature=0.3,
            revive_below=0.05,
            cosine=True,
        )
    if spec.levels:
        return TrainingOptions(
            batch_size=32,
            optimizer="muon",
            learning_rate=3e-3,
            second_moment=0.99,
            beta=0.0,
            center=True,
            plain_steps=400,
            cosine=True,
            **STILL,
        )
    return TrainingOptions(
        batch_size=32,
        optimizer="muon",
        learning_rate=3e-3,
        second_moment=0.99,
        beta=0.35 * _squares(spec),
        dialect="rosinality",
        decay=0.985,
        center=True,
        kmeans_start=True,
        revive_below=0.5,
        cosine=True,
    )


def post(spec: ModelSpec) -> TrainingOptions:
    """Returns exactly the post's options. The codebook starts Glorot uniform, ``ema_count`` 0."""
    return TrainingOptions()


def sonnet(spec: ModelSpec) -> TrainingOptions:
    """Returns exactly the options of Sonnet's CIFAR-10 example, if the likelihood is gaussian.

    Sonnet's loss is NMSE + commitment / 4. The gaussian likelihood's loss is CHW/2 times that, plus
    a constant, so beta takes the same factor. Adam's epsilon takes it too, so that each step is
    Sonnet's.
    """
    factor = _squares(spec)
    return TrainingOptions(
        batch_size=32,
        learning_rate=3e-4,
        adam_epsilon=1e-8 * factor,
        beta=0.25 * factor,
        dialect="sonnet",
    )


def _squares(spec: ModelSpec) -> float:
    """Returns CHW / 2: nats per image per unit of NMSE under a gaussian likelihood."""
    return math.prod(spec.image_shape) / 2


RECIPES: Mapping[str, Callable[[ModelSpec], TrainingOptions]] = MappingProxyType(
    {"default": default, "post": post, "sonnet": sonnet}
)
"""Named sets of options, each a function of the model's spec."""

DEFAULT_RECIPE = "default"

LARGE_CODEBOOK, SHORT_ROWS = 2048, 8
"""The default recipe gives codes of LARGE_CODEBOOK or more only SHORT_ROWS elements each.
docs/recipes.md has the measurements."""


def recipe_sizes(recipe: str, family: str, asked: Mapping[str, Size]) -> Mapping[str, Size]:
    """Returns the sizes ``asked`` for, and those that the recipe sets for such a codebook.

    Both replace the family's sizes; they go by the names of the options.
    """
    codes = asked.get("num_codes", 0)
    large = isinstance(codes, int) and codes >= LARGE_CODEBOOK
    short = recipe == DEFAULT_RECIPE and family != "post" and large
    return {"code_size": SHORT_ROWS, **asked} if short else asked
