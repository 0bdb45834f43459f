"""Checks every entry of a detokenizer that is a table."""

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
"""The time that the oracle may take. The other entries are compared with the decoder's graph, which
was compared with the oracle."""

ENTRIES_AT_ONCE = 1024


def check_table(
    spec: ModelSpec, params: Params, table: Array, sessions: Sessions, precision: str
) -> Check:
    """Checks the entries of a table (K, ..., K, C, H, W), float32.

    The oracle checks as many, evenly spread, as it can in SECONDS. The decoder's graph checks the
    others. precision: the decoder's. Raises ValueError if a stage of the oracle overflows.
    """
    entries = table.reshape(-1, *spec.image_shape)
    axes = np.unravel_index(np.arange(len(entries)), table.shape[: spec.latent_size])
    rows = np.stack(axes, axis=1)  # (K^S, S)
    every = -(-len(rows) // images_within(spec, len(rows), SECONDS))
    by_oracle = np.arange(len(rows)) % every == 0

    def oracle(quantized: Array) -> Array:
        return vqref.decode(spec, params, quantized)

    def decoder(quantized: Array) -> Array:
        return sessions["decoder"](quantized)[0].astype(np.float64)

    codebook, found = np.asarray(params[CODEBOOK], np.float32), []
    for mask, answer, exact in ((by_oracle, oracle, "float32"), (~by_oracle, decoder, precision)):
        chosen = np.flatnonzero(mask)
        for start in range(0, len(chosen), ENTRIES_AT_ONCE):
            part = chosen[start : start + ENTRIES_AT_ONCE]
            outputs = answer(codebook[rows[part]])
            found.append(check_reconstructions("table", entries[part], outputs, exact, spec))
    return merge("table", "float32", tuple(found))
