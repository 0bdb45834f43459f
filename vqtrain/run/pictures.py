"""Pictures of a run, beside the sheets of ``vqref.host.sheets``: maps of tokens, the use of the
codes, and the curves of what was measured.

Every function takes arrays and the path of the PNG that it writes, whole or not at all.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vqref.host.files import write_file
from vqref.host.sheets import save_pairs
from vqref.spec import ModelSpec
from vqref.validation import Array, Float64, Int64

PANELS = {
    "bound": "bound, nats per image",
    "perplexity": "perplexity, of {num_codes} codes",
    "nmse": "mean squared error / variance",
    "psnr": "PSNR of the mean squared error, dB",
    "mean_psnr": "mean PSNR of the images, dB",
    "ssim": "SSIM",
    "proved": "tokens proved in advance, share",
}
"""What the curves show and what it is called."""

MEASURED = {"held_out": "held out", "training_sample": "sample of training"}
"""The sets that are measured after an epoch, and what they are called."""


def save_tokens(
    path: Path,
    spec: ModelSpec,
    images: Array,
    reconstructions: Array,
    indices: Int64,
    colours: Float64,
) -> None:
    """Draws images (N, C, H, W), beneath them their reconstructions, and beneath those their
    indices (N, S) as maps: a cell per token in the colour of its code, g maps for a depth of g.

    spec: one whose latent_shape is (h, w) or (h, w, g). colours: (K, 3), of ``vqref.host.colours``.
    """
    height, width, *groups = spec.latent_shape
    cells = colours[indices].reshape(len(images), height, width, *(groups or [1]), 3)
    rows, columns = (
        np.arange(pixels) * cells_across // pixels
        for pixels, cells_across in zip(images.shape[2:], (height, width), strict=True)
    )
    maps = cells[:, rows][:, :, columns].transpose(3, 0, 4, 1, 2)  # (g, N, 3, H, W)
    save_pairs(path, images, reconstructions, *maps)


def save_use(path: Path, hits: Int64) -> None:
    """Draws each code's share of all tokens, the most used first. hits (K,): how often each was
    chosen, not all 0."""
    shares = np.sort(hits[hits > 0] / hits.sum())[::-1]
    perplexity = np.exp(-(shares * np.log(shares)).sum())
    alike = 1 / len(hits)
    figure = _figure(8, 4)
    axes = figure.subplots()
    edges, steps = np.arange(len(shares) + 1), np.append(shares, shares[-1])
    axes.fill_between(edges, steps, step="post", alpha=0.6)
    axes.axhline(alike, color="black", linestyle="--", linewidth=1)
    axes.axvline(perplexity, color="tab:red", linewidth=1)
    label = f" perplexity {perplexity:.1f} "
    side = "left" if perplexity < len(hits) / 2 else "right"
    axes.text(perplexity, max(shares[0], alike), label, color="tab:red", ha=side, va="top")
    axes.text(len(hits), alike, "all used alike ", ha="right", va="bottom")
    axes.set(title=f"{len(shares):,} of {len(hits):,} codes used", xlim=(0, len(hits)))
    axes.set(xlabel="codes, the most used first", ylabel="share of all tokens")
    axes.set_yscale("log")
    axes.margins(y=0.1)
    axes.grid(alpha=0.3)
    _write(path, figure)


def save_curves(path: Path, history: Sequence[Mapping[str, Any]], num_codes: int) -> None:
    """Draws the measures of ``history``, the lines of ``metrics.jsonl``, over the epochs: those of
    the training steps, and those of each of MEASURED that is in every line."""
    epochs = [line["epoch"] for line in history]
    lines = {"training": list(history)}
    for key, who in MEASURED.items():
        if all(key in line for line in history):
            lines[who] = [line[key] for line in history]
    shown = [key for key in PANELS if any(key in kept[0] for kept in lines.values())]
    rows = -(-len(shown) // 3)
    columns = -(-len(shown) // rows)
    figure = _figure(4.5 * columns, 3.4 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    for axes, key in zip(panels, shown, strict=False):
        for i, (who, kept) in enumerate(lines.items()):
            if key in kept[0]:
                values = [line[key] for line in kept]
                axes.plot(epochs, values, marker=".", label=who, color=f"C{i}")
        axes.set(title=PANELS[key].format(num_codes=num_codes), xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    _write(path, figure)


def _figure(width: float, height: float) -> Any:
    """An empty figure of so many inches."""
    quiet = logging.getLogger("matplotlib")
    quiet.setLevel(logging.ERROR)  # it remarks on its font cache at the first start
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _write(path: Path, figure: Any) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    write_file(path, buffer.getvalue())
