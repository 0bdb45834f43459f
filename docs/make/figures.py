"""Draws the pictures of docs/how-agreement-works.md: `python docs/make/figures.py`.

Twelve codes in a plane. What the pictures show is computed, not sketched: the bands are the bounds
of ``vqref.agreement``, and the flips are those of NumPy's own float16.
"""

import io
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from vqref.agreement.bounds import choices

FOLDER = Path(__file__).parent.parent / "figures"
SIDE, DOTS = 10.0, 500
CODES = np.random.default_rng(5).uniform(0.8, SIDE - 0.8, (12, 2)).astype(np.float16).astype(float)
INK, BAND, WRONG, GOOD = "#263238", "#f9a825", "#c62828", "#00695c"
CELLS = ("#eceff1", "#cfd8dc", "#e0f2f1", "#e8eaf6")


def distances(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Squared distances (M, K) of points (M, 2) and CODES, in float64."""
    return ((points[:, None] - CODES) ** 2).sum(axis=2)


def plane() -> NDArray[np.float64]:
    """Points of the square, row by row, each one that float16 holds."""
    across = np.linspace(0, SIDE, DOTS)
    points = np.stack(np.meshgrid(across, across), axis=2).reshape(-1, 2)
    return points.astype(np.float16).astype(float)


def expanded_in_half(points: NDArray[np.float64]) -> NDArray[np.intp]:
    """The nearest code (M,) as float16 finds it by x.x - 2 x.c + c.c, each step rounded."""
    x, c = points.astype(np.float16), CODES.astype(np.float16)
    squares, norms = x[:, 0] * x[:, 0] + x[:, 1] * x[:, 1], c[:, 0] * c[:, 0] + c[:, 1] * c[:, 1]
    products = x[:, None, 0] * c[:, 0] + x[:, None, 1] * c[:, 1]
    return (squares[:, None] - np.float16(2) * products + norms).argmin(axis=1)


def square(axes: Axes, nearest: NDArray[np.intp]) -> None:
    """The cells of the codes, white lines between them, and the codes."""
    of_cell = nearest.reshape(DOTS, DOTS)
    colours = np.array([to_rgb(CELLS[code % len(CELLS)]) for code in range(len(CODES))])[of_cell]
    for axis in (0, 1):
        colours[of_cell != np.roll(of_cell, 1, axis)] = 1.0
    axes.imshow(colours, extent=(0, SIDE) * 2, origin="lower", interpolation="nearest")
    axes.scatter(*CODES.T, s=34, color=INK, zorder=3)
    axes.set_axis_off()


def save(figure: Figure, name: str) -> None:
    """Writes a small PNG: of 64 colours."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, bbox_inches="tight", pad_inches=0.05)
    FOLDER.mkdir(exist_ok=True)
    small = Image.open(drawn).convert("RGB").quantize(64, Image.Quantize.MAXCOVERAGE)
    small.save(FOLDER / f"{name}.png", optimize=True)


def cells() -> None:
    """Codes, the cell of each, a latent, and the two distances that decide."""
    figure = Figure((5.2, 5.2))
    axes = figure.subplots()
    square(axes, distances(plane()).argmin(axis=1))
    latent = np.array([[5.5, 5.6]])
    first, second = distances(latent)[0].argsort()[:2]
    for code, colour, width in ((first, GOOD, 2.4), (second, INK, 1.2)):
        axes.plot(*np.stack([latent[0], CODES[code]]).T, color=colour, lw=width, zorder=2)
    axes.scatter(*latent.T, s=70, marker="x", color=WRONG, zorder=4, linewidths=2.4)
    for code, (x, y) in enumerate(CODES):
        axes.annotate(str(code), (x, y), (5, 4), textcoords="offset points", color=INK, size=10)
    save(figure, "cells")


def band() -> None:
    """Where float16 may answer otherwise than the exact distance, and where it does."""
    points = plane()
    exact = distances(points)
    nearest, beyond = choices(exact, points, CODES, precision="float16", form="expanded")
    possible = ((beyond <= 0).sum(axis=1) > 1).reshape(DOTS, DOTS)
    flipped = expanded_in_half(points) != nearest
    figure = Figure((10.6, 5.2))
    left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.03})
    for axes in (left, right):
        square(axes, nearest)
        layer = np.zeros((DOTS, DOTS, 4))
        layer[possible] = to_rgba(BAND, 0.75)
        axes.imshow(layer, extent=(0, SIDE) * 2, origin="lower", interpolation="nearest")
    right.scatter(*points[flipped].T, s=0.6, color=WRONG, zorder=2, linewidths=0)
    inside = possible.reshape(-1)[flipped]
    print(
        f"band: {possible.mean():.1%} of the plane; float16 differs in {flipped.mean():.1%}, "
        f"{(~inside).sum()} of {len(inside)} points outside of the band"
    )
    save(figure, "band")


def gaps() -> None:
    """Two squared distances and how far rounding may move each: apart, and overlapping."""
    figure = Figure((8.4, 2.3))
    axes = figure.subplots()
    rows = (
        (1.0, 2.0, 3.4, 0.35, "certified: no rounding closes the gap"),
        (0.0, 2.0, 2.5, 0.35, "near tie: either answer may be rounding"),
    )
    for y, near, far, error, words in rows:
        for at, colour, code in ((near, GOOD, "a"), (far, INK, "b")):
            axes.plot([at - error, at + error], [y, y], color=colour, lw=7, alpha=0.35)
            axes.scatter([at], [y], color=colour, s=46, zorder=3)
            axes.annotate(code, (at, y), (0, 9), textcoords="offset points", ha="center", size=11)
        axes.annotate(words, (4.2, y), va="center", size=11, color=INK)
    axes.annotate("squared distance to code a, to code b", (1.2, -0.62), size=9, color=INK)
    axes.annotate("", (3.95, -0.4), (1.2, -0.4), arrowprops={"arrowstyle": "->", "color": INK})
    axes.set(xlim=(1.1, 7.4), ylim=(-0.8, 1.5))
    axes.set_axis_off()
    save(figure, "gaps")


if __name__ == "__main__":
    cells()
    band()
    gaps()
