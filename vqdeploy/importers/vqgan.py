"""What the importers of VQGANs share: the names of rows, in blocks and levels, as theirs."""

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
"""The rows that all three call the same."""

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
"""What LlamaGen has of taming-transformers, from which its code comes."""


@dataclass(frozen=True)
class Names:
    """How a library calls the rows of a VQGAN.

    rows: of one of ours, theirs. groups: of a block or an attention. words: of a row within those,
    where it is another. Our names are written without numbers of levels; in theirs ``{fine}``
    counts levels from the finest, ``{coarse}`` from the coarsest, ``{j}`` within a level, from 0.
    convolutions: whether their attention's matrices are 1×1 convolutions.
    """

    rows: Mapping[str, str]
    groups: Mapping[str, str]
    words: Mapping[str, str]
    convolutions: bool

    def sources(self, spec: ModelSpec, levels: int) -> dict[str, Source | None]:
        """Theirs of every row with parameters, and of the codebook."""
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
    """The network of these sizes. where: what says them. Raises InputError if none has them."""
    return fitting(where, partial(families.vqgan, **sizes))


def grid_sides(side: int, levels: int) -> tuple[int, ...]:
    """Of the feature maps of an image of this side, from the finest level on."""
    return tuple(side // 2**i for i in range(levels))
