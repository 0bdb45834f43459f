"""Imports a codebook of vector-quantize-pytorch into one of our models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from vqdeploy.importers.checkpoint import Checkpoint
from vqdeploy.importers.plan import Choices, Importer, Plan, fitting
from vqdeploy.importers.tables import Source
from vqdeploy.sources import read_source
from vqref.errors import InputError, UsageError
from vqref.host.files import parsed
from vqref.modelfile import Model
from vqref.spec import CODEBOOK, EMA_COUNT, EMA_MEANS
from vqref.validation import Array

_EMBED = "_codebook.embed"
"""The end of a codebook's name. The quantizer's own name is before it."""

UNIT = 1e-4
"""The largest difference from 1 at which a code's norm counts as 1. It allows for float16."""


def _knows(tensors: Mapping[str, Any]) -> bool:
    return any(name.endswith(_EMBED) for name in tensors)


def _plan(checkpoint: Checkpoint, tensors: Mapping[str, Any], choices: Choices) -> Plan:
    if choices.model is None:
        raise UsageError("a codebook is not a model; name the model that gets it: --model MODEL")
    model, sha256 = read_source(choices.model)
    quantizer = _quantizer(tensors)
    own = {name: value for name, value in tensors.items() if name.startswith(quantizer)}
    book = f"{quantizer}_codebook."
    found = tuple(getattr(own[f"{book}embed"], "shape", ()))
    size = model.spec.code_size
    if len(found) != 3 or found[0] != 1 or found[2] != size or not found[1]:
        raise InputError(f"the tensor {book}embed has shape {found}, expected (1, K, {size})")
    with parsed(f"{book}initted is not true or false"):
        begun = bool(own.get(f"{book}initted", True))
    if not begun:
        raise InputError(f"{book}initted is false: the codebook was never initialised")
    sources: dict[str, Source | None] = {CODEBOOK: Source(f"{book}embed", (0,))}
    if f"{book}cluster_size" in own and f"{book}embed_avg" in own:
        sources[EMA_COUNT] = Source(f"{book}cluster_size", (0,))
        sources[EMA_MEANS] = Source(f"{book}embed_avg", (0,))
    said = [f"the network of {choices.model}"]
    if others := len(tensors) - len(own):
        said.append(f"left out {others} tensors that are not of {quantizer or 'the quantizer'}")
    if model.prior is not None:
        said.append("left out the prior, which describes the former tokens")
    changed = partial(dataclasses.replace, model.spec, num_codes=found[1])
    return Plan(
        fitting("it", changed),
        own,
        sources,
        (f"{book}initted",),
        tuple(said),
        lambda params: _fitting_norms(model, f"{book}embed", params),
        {choices.model.name: sha256},
        model,
    )


def _quantizer(tensors: Mapping[str, Any]) -> str:
    """Returns the quantizer's name. Raises InputError unless there is exactly one codebook."""
    found = [name for name in tensors if name.endswith(_EMBED)]
    if len(found) != 1:
        raise InputError(f"holds {len(found)} codebooks: {', '.join(found[:3])}; expected one")
    return found[0].removesuffix(_EMBED)


def _fitting_norms(model: Model, name: str, params: dict[str, Array]) -> dict[str, Array]:
    """Raises InputError if only one of codes and latents has unit norm."""
    norms = np.linalg.norm(params[CODEBOOK].astype(np.float64), axis=1)
    unit = bool(np.all(np.abs(norms - 1) < UNIT))
    if unit != model.spec.normalized and (unit or model.spec.normalized) and len(norms) > 1:
        kind = "are unit vectors" if unit else "are not unit vectors"
        raise InputError(
            f"the codes of {name} {kind}, but the latents of the network are{' not' * unit}"
        )
    return params


IMPORTER = Importer(
    "vector-quantize-pytorch",
    "a codebook of vector-quantize-pytorch",
    ("model",),
    _knows,
    _plan,
    ("", "state_dict", "model"),
)
