"""Makes and checks the golden batch: images that need no data set, with the oracle's answers."""

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
"""The number of images in a golden batch. It is smaller if the oracle is slow, but at least
FEWEST_GOLDEN: one image that the model draws, and one of noise."""

NOISE_SHARE, EXTREME_SHARE = 5 / 32, 3 / 32
"""The shares of a golden batch that are noise and extremes. The model draws the rest."""

ANSWERS = tuple(name for name in GOLDEN if name != "images")


class Answered(NamedTuple):
    """Images (N, C, H, W) float32 in [0, 1], and the oracle's pass over them."""

    images: Array
    known: Forward

    @classmethod
    def of(cls, spec: ModelSpec, params: Params, images: Array) -> Answered:
        """Runs the oracle. Raises ValueError if images do not fit or a stage overflows."""
        return cls(images, vqref.forward(spec, params, images))


def golden_count(spec: ModelSpec) -> int:
    """Returns how many images a golden batch has."""
    return max(FEWEST_GOLDEN, images_within(spec, most=GOLDEN_IMAGES))


def require_golden(spec: ModelSpec, images: Array) -> None:
    """Raises ValueError if a golden batch has too few images."""
    if len(images) < golden_count(spec):
        raise ValueError(f"the golden batch has {len(images)} images, not {golden_count(spec)}")


def golden_images(spec: ModelSpec, params: Params) -> npt.NDArray[np.float32]:
    """Returns images (N, C, H, W) in [0, 1] that depend only on the model.

    The model draws most of them, as ``draw_images`` does. Then come images of noise, and extremes:
    one bright pixel, white, black. N is 32, or fewer if one check by the oracle would take too
    long. A batch of two has no extremes.
    """
    count = golden_count(spec)
    noisy, extreme = (max(1, round(share * count)) for share in (NOISE_SHARE, EXTREME_SHARE))
    noise = np.random.default_rng(0).random((noisy, *spec.image_shape))
    drawn = draw_images(spec, params, max(1, count - noisy - extreme))
    images = np.concatenate([drawn, noise, _extremes(spec)[:extreme]])
    return images[:count].astype(np.float32)


def golden_batch(asked: Answered, count: int) -> dict[str, Array]:
    """Returns the first ``count`` images and the oracle's answers, by name, for the oracle file."""
    arrays = {"images": asked.images, **{name: getattr(asked.known, name) for name in ANSWERS}}
    return {name: array[:count] for name, array in arrays.items()}


def check_recorded(spec: ModelSpec, oracle: Oracle, known: Forward) -> Report:
    """Compares the recorded answers with those that the oracle gives now, in float64.

    known: ``vqref.forward`` of the golden images; other images may follow.

    Raises KeyError or ValueError if the records are not of a golden batch of ``spec``.
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
            held("gap", "gap", now["gap"], 2 * best + gap),  # the sum of the two distances
            held("copy", "quantized", rows),
            held("decoder", "outputs", now["outputs"]),
            check_reconstructions(
                "golden means", golden["reconstructions"], now["outputs"], "float64", spec
            ),
        )
    )


def _extremes(spec: ModelSpec) -> Array:
    """Returns three images (3, C, H, W): one bright pixel, white, black."""
    images = np.zeros((3, *spec.image_shape))
    images[0, :, spec.image_shape[1] // 2, spec.image_shape[2] // 2] = 1.0
    images[1] = 1.0
    return images
