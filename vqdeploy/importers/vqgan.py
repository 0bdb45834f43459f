"""What the importers of VQGANs share: how rows in blocks and levels are named."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from vqdeploy.importers.plan import fitting
from vqdeploy.importers.tables import Source
from vqref import families
from vqref.spec import CODEBOOK, ModelSpec

_LEVEL = re.compile(r"\.level(\d+)(?:\.(block|attention)(\d+))?")

_MATRICES = ("query", "key", "value", "out")

ROWS = {
    "encoder.conv_in": "encoder.conv_in",
    "encoder.conv_out": "encoder.conv_out",
    "encoder.quant_conv": "quant_conv",
    "decoder.post_quant_conv": "post_quant_conv",
    "decoder.conv_in": "decoder.conv_in",
    "decoder.conv_out": "decoder.conv_out",
}
"""The rows that have the same names in all three libraries."""

TAMING_ROWS = {
    **ROWS,
    "encoder.norm_out": "encoder.norm_out",
    "decoder.norm_out": "decoder.norm_out",
}
TAMING_WORDS = {
    "shortcut": "nin_shortcut",
    "query": "q",
    "key": "k",
    "value": "v",
    "out": "proj_out",
}
"""The names that LlamaGen shares with taming-transformers, from which its code comes."""


@dataclass(frozen=True)
class Names:
    """How a library names the rows of a VQGAN.

    rows: the library's name for each of our rows. groups: the same for blocks and attentions.
    words: the same for rows within groups, if the name differs. Our names are written without
    numbers of levels. In the library's names ``{fine}`` counts levels from the finest, ``{coarse}``
    from the coarsest, and ``{j}`` counts within a level, all from 0. convolutions: whether the
    matrices of attention are 1×1 convolutions.
    """

    rows: Mapping[str, str]
    groups: Mapping[str, str]
    words: Mapping[str, str]
    convolutions: bool

    def sources(self, spec: ModelSpec, levels: int) -> dict[str, Source | None]:
        """Returns the source of every row's parameters, and of the codebook."""
        found: dict[str, Source | None] = {CODEBOOK: Source("quantize.embedding.weight")}
        for layer in spec.layers:
            for name, shape in layer.parameters:
                row, _, what = name.rpartition(".")
                matrix = self.convolutions and row.rpartition(".")[2] in _MATRICES
                squeezed = (2, 3) if matrix and len(shape) == 2 else ()
                found[name] = Source(f"{self._row(row, levels)}.{what}", squeezed)
        return found

    def _row(self, row: str, levels: int) -> str:
        numbers = {}
        if place := _LEVEL.search(row):
            i, group, j = place.groups()
            numbers = {"fine": int(i) - 1, "coarse": levels - int(i), "j": int(j or 1) - 1}
            row = _LEVEL.sub(".level" + (f".{group}" if group else ""), row)
        group, _, word = row.rpartition(".")
        named = self.rows.get(row) or f"{self.groups[group]}.{self.words.get(word, word)}"
        return named.format(**numbers)


def described(where: str, **sizes: Any) -> ModelSpec:
    """Returns the network of these sizes. Raises InputError, with ``where``, for invalid ones."""
    return fitting(where, partial(families.vqgan, **sizes))


def grid_sides(side: int, levels: int) -> tuple[int, ...]:
    """Returns the sides of the feature maps of an image of this side, the finest level first."""
    return tuple(side // 2**i for i in range(levels))
