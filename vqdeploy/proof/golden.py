"""The golden batch: images that need no data set, with the float64 oracle's answers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

import vqref
from vqdeploy.bundle import GOLDEN, Oracle
from vqdeploy.proof.samples import draw_images
from vqref.agreement.budget import images_within
from vqref.agreement.parity import check, check_indices
from vqref.agreement.report import Check, Report
from vqref.agreement.stages import check_reconstructions
from vqref.model import Forward
from vqref.spec import CODEBOOK, ModelSpec
from vqref.validation import Array, Params

GOLDEN_IMAGES, FEWEST_GOLDEN = 32, 2
"""Images of a golden batch; fewer if the oracle is slow on them, but these at the least: one that
the model draws, and noise."""

NOISE_SHARE, EXTREME_SHARE = 5 / 32, 3 / 32
"""What part of a golden batch is noise, and what part extremes; the model draws the rest."""

ANSWERS = tuple(name for name in GOLDEN if name != "images")


class Answered(NamedTuple):
    """Images (N, C, H, W) float32 in [0, 1], and the oracle's pass over them."""

    images: Array
    known: Forward

    @classmethod
    def of(cls, spec: ModelSpec, params: Params, images: Array) -> Answered:
        """Asks the oracle. Raises ValueError if images do not fit or a stage overflows."""
        return cls(images, vqref.forward(spec, params, images))


def golden_count(spec: ModelSpec) -> int:
    """How many images a golden batch has."""
    return max(FEWEST_GOLDEN, images_within(spec, most=GOLDEN_IMAGES))


def require_golden(spec: ModelSpec, images: Array) -> None:
    """Raises ValueError for a golden batch that was cut."""
    if len(images) < golden_count(spec):
        raise ValueError(f"the golden batch has {len(images)} images, not {golden_count(spec)}")


def golden_images(spec: ModelSpec, params: Params) -> npt.NDArray[np.float32]:
    """Images (N, C, H, W) in [0, 1]: the same for the same model.

    Most images are of the model's own distribution (indices drawn as often as training hit them,
    decoded), every second one under noise; then come noise and extremes: one bright pixel, white,
    black. N is 32, or as many as one check of the oracle may take; of two, there are no extremes.
    """
    count = golden_count(spec)
    noisy, extreme = (max(1, round(share * count)) for share in (NOISE_SHARE, EXTREME_SHARE))
    noise = np.random.default_rng(0).random((noisy, *spec.image_shape))
    drawn = draw_images(spec, params, max(1, count - noisy - extreme))
    images = np.concatenate([drawn, noise, _extremes(spec)[:extreme]])
    return images[:count].astype(np.float32)


def golden_batch(asked: Answered, count: int) -> dict[str, Array]:
    """What a bundle records: the first ``count`` images, and the oracle's answers by name."""
    arrays = {"images": asked.images, **{name: getattr(asked.known, name) for name in ANSWERS}}
    return {name: array[:count] for name, array in arrays.items()}


def check_recorded(spec: ModelSpec, oracle: Oracle, known: Forward) -> Report:
    """Holds the recorded answers to those that the oracle gives here and now, in float64.

    known: ``vqref.forward`` of the golden images, and of others after them.

    Raises KeyError or ValueError for records that are not those of a golden batch of ``spec``.
    """
    golden, codebook = oracle.golden, np.asarray(oracle.params[CODEBOOK], np.float64)
    now = {name: getattr(known, name)[: len(golden["images"])] for name in ANSWERS}
    best = np.square(golden["latents"] - codebook[now["indices"]]).sum(axis=2)  # (N, S)
    gap = np.where(np.isfinite(now["gap"]), now["gap"], 0.0)
    rows = codebook[np.clip(golden["indices"], 0, spec.num_codes - 1)]

    def held(stage: str, name: str, expected: Array, magnitude: Array | None = None) -> Check:
        shown = f"golden {'rows' if name == 'quantized' else name}"
        found = golden[name]
        return check(stage, found, expected, precision="float64", name=shown, magnitude=magnitude)

    indices, latents = golden["indices"], golden["latents"]
    return Report(
        (
            held("encoder", "latents", now["latents"]),
            check_indices(indices, latents, codebook, precision="float64", name="golden indices"),
            held("gap", "gap", now["gap"], 2 * best + gap),  # of the two distances it lies between
            held("copy", "quantized", rows),
            held("decoder", "outputs", now["outputs"]),
            check_reconstructions(
                "golden means", golden["reconstructions"], now["outputs"], "float64", spec
            ),
        )
    )


def _extremes(spec: ModelSpec) -> Array:
    """One bright pixel, white and black, (3, C, H, W)."""
    images = np.zeros((3, *spec.image_shape))
    images[0, :, spec.image_shape[1] // 2, spec.image_shape[2] // 2] = 1.0
    images[1] = 1.0
    return images
