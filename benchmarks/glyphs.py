"""``python -m benchmarks.glyphs [--compare FILE.npz]``: measures how close the generated set is to
genuine images, and how fast it is drawn.

The figures are for 2,000 images, because the number of dimensions grows with the number of images.
FILE.npz holds genuine images (N, 28, 28) uint8; its first 2,000 are measured in the same way. The
speed is per CPU time of this process, which is one core's, since no step of the drawing is
threaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from benchmarks.measure import Record, parser
from vqref.host import images as image_files
from vqtrain.data.glyphs import glyphs

Images = npt.NDArray[np.uint8]

INK = 128
"""From this grey level on, a pixel is ink, for every figure that counts shapes."""
EIGHT = np.ones((3, 3), int)
"""Pixels that touch at a corner are connected."""
COUNT = 2000


def pixel_mean(images: Images) -> float:
    """The mean grey level, white being 1."""
    return float((images / 255).mean())


def pixel_sd(images: Images) -> float:
    """The standard deviation of all grey levels of all images together, white being 1."""
    return float((images / 255).std())


def black(images: Images) -> float:
    """The fraction of pixels that are exactly 0."""
    return float((images == 0).mean())


def stroke_widths(images: Images) -> npt.NDArray[np.float64]:
    """Returns the width of the strokes of each image in pixels, (N,).

    It is 2d - 1; d is the mean distance to the background on the ridges. A ridge is an ink pixel
    whose distance to the nearest pixel without ink is not exceeded by a neighbour's. So a line one
    pixel wide has d = 1. Leaves out images without ink.
    """
    widths = []
    for ink in images >= INK:
        if ink.any():
            distance = ndimage.distance_transform_edt(ink)
            ridge = ink & (distance == ndimage.maximum_filter(distance, 3))
            widths.append(2 * distance[ridge].mean() - 1)
    return np.array(widths)


def components(images: Images) -> float:
    """The mean number of connected pieces of ink per image."""
    return float(np.mean([ndimage.label(ink, EIGHT)[1] for ink in images >= INK]))


def holes(images: Images) -> float:
    """The mean number of connected regions per image that its ink encloses."""
    return float(
        np.mean(
            [
                ndimage.label(ndimage.binary_fill_holes(ink) & ~ink, EIGHT)[1]
                for ink in images >= INK
            ]
        )
    )


def box(images: Images) -> tuple[float, float]:
    """Returns the mean height and width in pixels of the box around an image's ink.

    Leaves out images without ink.
    """
    ink = (images >= INK)[(images >= INK).any((1, 2))]
    rows, columns = np.asarray(ink.any(2)), np.asarray(ink.any(1))
    height, width = (
        float(np.mean([np.ptp(np.flatnonzero(line)) + 1 for line in lines]))
        for lines in (rows, columns)
    )
    return height, width


def dimensions(images: Images, share: float) -> int:
    """How many principal components of the pixels hold this share of their variance."""
    pixels = images.reshape(len(images), -1) / 255
    variance = np.linalg.svd(pixels - pixels.mean(0), compute_uv=False) ** 2
    return int(np.searchsorted(np.cumsum(variance) / variance.sum(), share)) + 1


FIGURES: dict[str, Callable[[Images], float]] = {
    "pixel mean": pixel_mean,
    "pixel sd": pixel_sd,
    "fraction black": black,
    "stroke width, mean": lambda images: float(stroke_widths(images).mean()),
    "stroke width, sd": lambda images: float(stroke_widths(images).std()),
    "components": components,
    "holes": holes,
    "box, height": lambda images: box(images)[0],
    "box, width": lambda images: box(images)[1],
    "dimensions for 50 %": lambda images: dimensions(images, 0.5),
    "dimensions for 90 %": lambda images: dimensions(images, 0.9),
}
"""The figures, by the names that the table prints."""


def measure(images: Images) -> dict[str, float]:
    """Returns the figures of images (N, 28, 28) uint8."""
    return {name: figure(images) for name, figure in FIGURES.items()}


def speed(count: int = COUNT) -> float:
    """Images per second of CPU time: the median of five batches, after one to fill the caches."""
    glyphs(100)
    rates = []
    for repeat in range(5):
        start = time.process_time()
        glyphs(count, seed=repeat)
        rates.append(count / (time.process_time() - start))
    return float(np.median(rates))


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--compare",
        type=Path,
        metavar="FILE.npz",
        help="genuine images to measure beside the generated",
    )
    arguments = options.parse_args()
    record = Record(arguments)
    columns = {"generated": glyphs(COUNT)[0]}
    if arguments.compare:
        columns["genuine"] = image_files.load(arguments.compare).train[:COUNT, 0]
    figures = {name: measure(images) for name, images in columns.items()}
    record.say(f"{'figure':<22}" + "".join(f"{name:>12}" for name in figures))
    for figure in FIGURES:
        record.say(
            f"{figure:<22}" + "".join(f"{column[figure]:>12.4g}" for column in figures.values())
        )
    rate = speed()
    record.say(f"{rate:.0f} images per second on one core")
    record.figures = {**figures, "images a second of one core": rate}
    record.write()


if __name__ == "__main__":
    main()
