"""A detokenizer that is a table: every one of its entries."""

from __future__ import annotations

import numpy as np

import vqref
from vqdeploy.agreement import Sessions
from vqref.agreement.budget import images_within
from vqref.agreement.report import Check, merge
from vqref.agreement.stages import check_reconstructions
from vqref.spec import CODEBOOK, ModelSpec
from vqref.validation import Array, Params

SECONDS = 20.0
"""What the oracle may take for entries; the decoder's graph, itself held to the oracle, answers for
the others."""

ENTRIES_AT_ONCE = 1024


def check_table(
    spec: ModelSpec, params: Params, table: Array, sessions: Sessions, precision: str
) -> Check:
    """Holds the entries of a table (K, ..., K, C, H, W), float32, to the oracle's reconstructions,
    and those beyond what the oracle does in SECONDS, evenly spread among them, to the decoder's.

    precision: of the decoder. Raises ValueError if a stage of the oracle overflows.
    """
    rows = np.stack(
        np.unravel_index(
            np.arange(spec.num_codes**spec.latent_size), table.shape[: spec.latent_size]
        ),
        axis=1,
    )
    entries = table.reshape(-1, *spec.image_shape)
    every = -(-len(rows) // images_within(spec, len(rows), SECONDS))
    codebook, found = np.asarray(params[CODEBOOK], np.float32), []
    for by_oracle in (True, False):
        chosen = np.flatnonzero((np.arange(len(rows)) % every == 0) == by_oracle)
        for start in range(0, len(chosen), ENTRIES_AT_ONCE):
            part = chosen[start : start + ENTRIES_AT_ONCE]
            quantized = codebook[rows[part]]
            outputs = (
                vqref.decode(spec, params, quantized)
                if by_oracle
                else sessions["decoder"](quantized)[0].astype(np.float64)
            )
            found.append(
                check_reconstructions(
                    "table", entries[part], outputs, "float32" if by_oracle else precision, spec
                )
            )
    return merge("table", "float32", tuple(found))
