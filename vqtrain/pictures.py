"""The curves of a run: what one looks at after every epoch, beside the sheets of ``vqref.pictures``."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vqref.files import write_file


def save_curves(path: Path, history: Sequence[Mapping[str, Any]], num_codes: int) -> None:
    """Bound and perplexity over the epochs, training and held-out."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it remarks on its font cache at the first start
    from matplotlib.figure import Figure

    epochs = [line["epoch"] for line in history]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, key, title in ((left, "bound", "bound, nats an image"), (right, "perplexity", f"perplexity, of {num_codes}")):
        axes.plot(epochs, [line[key] for line in history], marker=".", label="training")
        held_out = [line["held_out"][key] for line in history if "held_out" in line]
        if len(held_out) == len(epochs):
            axes.plot(epochs, held_out, marker=".", label="held out")
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    right.set_ylim(0, num_codes)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    write_file(path, buffer.getvalue())
