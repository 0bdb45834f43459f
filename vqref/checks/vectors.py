"""Conformance vectors: the oracle's answers, in files that any language can read.

``quantizer.json`` and ``ema.json`` hold everything. ``vectors.npz`` holds the same arrays, named
CASE/ARRAY.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from vqref.agreement.bounds import choices
from vqref.checks.adversary import CASES
from vqref.dialects import DIALECTS, Dialect
from vqref.quantizer import EMAState, quantize, squared_distances, update_ema

FORMAT = 1
"""The version of the format. It grows if a reader of the last version would misread the files."""

LATENTS, CODES, CODE_SIZE, STEPS = 24, 8, 4, 5
PRECISION, FORM = "float32", "direct"
DECAY = 0.9

README = """# Conformance vectors

## quantizer.json

Each of the `cases` has:

- `latents` (N, 1, D) and `codebook` (K, D): float32 values, written in full.
- `indices` (N, 1): the nearest codes by exact distances; on a tie, the lowest index.
- `gap`: the second-smallest squared distance minus the smallest.
- `allowed`: for each latent, every index that is a right answer for an implementation that sums
  (latent - code)^2 in float32, in any order. With one entry, the index is certified and any other
  answer is wrong. With several, rounding decides between them.

## ema.json

Each of the `cases` has:

- `dialect`, its `rules`, `decay` and `epsilon`.
- `codebook`, `ema_count` and `ema_means`: the state before the first step.
- `steps`: for each step, `latents` (N, 1, D), `indices` (N, 1) and the state after it, in float64.
  The next step starts from this state.

Each element sums several terms. In float32, it may be off by 1e-5 of the sum of their magnitudes.

## vectors.npz

The same arrays, named CASE/ARRAY, DIALECT/ARRAY and DIALECT/STEP/ARRAY.
"""


def conformance_vectors(seed: int = 0) -> dict[str, bytes]:
    """Returns {file name: content}. The same seed gives the same bytes of JSON."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    quantizer = list(_quantizer_cases(seed, arrays))
    ema = [_ema_case(dialect, seed, arrays) for dialect in DIALECTS.values()]
    packed = io.BytesIO()
    np.savez_compressed(packed, allow_pickle=False, **arrays)
    about = {"format": FORMAT, "seed": seed}
    return {
        "README.md": README.encode(),
        "quantizer.json": _json(
            {**about, "precision": PRECISION, "form": FORM, "cases": quantizer}
        ),
        "ema.json": _json({**about, "cases": ema}),
        "vectors.npz": packed.getvalue(),
    }


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, allow_nan=False).encode() + b"\n"


def _quantizer_cases(seed: int, arrays: dict[str, npt.NDArray[Any]]) -> Iterator[dict[str, Any]]:
    for name, case in CASES.items():
        latents, codebook = case(np.random.default_rng(seed), LATENTS, CODES, CODE_SIZE, PRECISION)
        q = quantize(latents, codebook)
        exact, rows = latents[:, 0].astype(np.float64), codebook.astype(np.float64)
        allowed: list[list[int]] = []
        for part, distances in squared_distances(exact, rows):
            _, excess = choices(distances, exact[part], rows, precision=PRECISION, form=FORM)
            allowed += [np.flatnonzero(row <= 0).tolist() for row in excess]
        found: dict[str, npt.NDArray[Any]] = {
            "latents": latents,
            "codebook": codebook,
            "indices": q.indices,
            "gap": q.gap,
        }
        arrays |= {f"{name}/{key}": array for key, array in found.items()}
        yield {
            "name": name,
            "about": " ".join((case.__doc__ or "").split()),
            **{k: v.tolist() for k, v in found.items()},
            "allowed": allowed,
        }


def _ema_case(dialect: Dialect, seed: int, arrays: dict[str, npt.NDArray[Any]]) -> dict[str, Any]:
    """Returns a few steps in which the last code is never hit."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(CODES, CODE_SIZE)).astype(np.float32)
    codebook = rng.normal(size=(CODES, CODE_SIZE)).astype(np.float32)
    state = EMAState.start(codebook, dialect, means if dialect.means == "own" else None)
    steps = []
    before = _state(state)
    arrays |= {f"{dialect.name}/{key}": array for key, array in before.items()}
    for number in range(STEPS):
        latents = rng.normal(size=(LATENTS, 1, CODE_SIZE)).astype(np.float32)
        indices = rng.integers(0, CODES - 1, (LATENTS, 1))
        state = update_ema(state, latents, indices, DECAY, dialect.epsilon, dialect)
        answers: dict[str, npt.NDArray[Any]] = {
            "latents": latents,
            "indices": indices,
            **_state(state),
        }
        arrays |= {f"{dialect.name}/{number}/{key}": array for key, array in answers.items()}
        steps.append({key: array.tolist() for key, array in answers.items()})
    return {
        "dialect": dialect.name,
        "source": dialect.source,
        "rules": {
            "debiased": dialect.debiased,
            "smoothing": dialect.smoothing,
            "stores_smoothed": dialect.stores_smoothed,
        },
        "decay": DECAY,
        "epsilon": dialect.epsilon,
        **{key: array.tolist() for key, array in before.items()},
        "steps": steps,
    }


def _state(state: EMAState) -> dict[str, npt.NDArray[np.float64]]:
    return {"codebook": state.codebook, "ema_count": state.ema_count, "ema_means": state.ema_means}
