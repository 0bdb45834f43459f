"""Golden vectors of upstream's VQGANs, and their checkpoints as our parameters."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from support import GOLDEN

from vqref import families
from vqref.spec import CODEBOOK, EMA_COUNT, EMA_MEANS, ModelSpec

FOLDER = GOLDEN / "vqgan"

SMALL: dict[str, Any] = {
    "image_shape": (3, 32, 32),
    "channels": 32,
    "multipliers": (1, 2),
    "blocks": 1,
}
SPECS = {
    "diffusers_small": families.vqgan(
        **SMALL, attention=(), groups=8, latent_channels=4, num_codes=64, code_size=4
    ),
    "taming_small": families.vqgan(
        **SMALL, attention=(16,), latent_channels=16, num_codes=64, code_size=8
    ),
}

Table = tuple[tuple[str, Any], ...]
"""Patterns of names and their replacements: a text, or a function of the match."""

TO_TAMING: Table = (
    (r"quantizer\.codebook", "quantize.embedding.weight"),
    (r"\w+\.(\w*quant_conv)", r"\1"),
    (r"\.level(\d)\.down", r".level\1.downsample.conv"),
    (r"\.level(\d)\.up", r".level\1.upsample.conv"),
    (r"\.middle\.block", ".mid.block_"),
    (r"\.middle\.attention", ".mid.attn_1"),
    (r"(encoder)\.level(\d)", lambda m: f"{m[1]}.down.{int(m[2]) - 1}"),
    (r"(decoder)\.level(\d)", lambda m: f"{m[1]}.up.{int(m[2]) - 1}"),
    (r"\.block(\d)", lambda m: f".block.{int(m[1]) - 1}"),
    (r"\.attention(\d)", lambda m: f".attn.{int(m[1]) - 1}"),
    (r"\.(q|k|v)(uery|ey|alue)\.", r".\1."),
    (r"\.out\.", ".proj_out."),
    (r"\.shortcut", ".nin_shortcut"),
)
TO_DIFFUSERS: Table = (
    (r"\.down\.", ".down_blocks."),
    (r"\.up\.(\d)", lambda m: f".up_blocks.{1 - int(m[1])}"),  # two levels, the finest first
    (r"\.(down|up)sample\.", r".\1samplers.0."),
    (r"\.mid\.block_(\d)", lambda m: f".mid_block.resnets.{int(m[1]) - 1}"),
    (r"\.mid\.attn_1\.norm", ".mid_block.attentions.0.group_norm"),
    (r"\.mid\.attn_1", ".mid_block.attentions.0"),
    (r"\.(q|k|v)\.", r".to_\1."),
    (r"\.proj_out\.", ".to_out.0."),
    (r"\.block\.", ".resnets."),
    (r"\.nin_shortcut", ".conv_shortcut"),
    (r"\.norm_out", ".conv_norm_out"),
)


def arrays(case: str) -> dict[str, np.ndarray]:
    """Returns the golden arrays of a case by their names."""
    with np.load(FOLDER / f"{case}.npz") as found:
        return {name: found[name] for name in found.files}


def params_of(case: str) -> dict[str, np.ndarray]:
    """Returns a case's checkpoint, float32, under the names of ``SPECS[case]``."""
    spec, tables = SPECS[case], [TO_TAMING]
    if case == "diffusers_small":
        theirs = load_file(FOLDER / case / "diffusion_pytorch_model.safetensors")
        tables.append(TO_DIFFUSERS)
    else:
        state = torch.load(FOLDER / f"{case}.ckpt", weights_only=True)["state_dict"]
        theirs = {name: tensor.numpy() for name, tensor in state.items()}
    found = {}
    for parameter in spec.parameters:
        if parameter.name not in (EMA_COUNT, EMA_MEANS):
            array = theirs.pop(_renamed(parameter.name, tables))
            found[parameter.name] = array.reshape(parameter.shape)
    assert all(name.startswith("loss.") for name in theirs), theirs.keys()
    return with_averages(spec, found)


def _renamed(name: str, tables: list[Table]) -> str:
    for pattern, other in (pair for table in tables for pair in table):
        name = re.sub(pattern, other, name)
    return name


def with_averages(spec: ModelSpec, params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns parameters with the averages of a codebook that was never updated."""
    codebook = params[CODEBOOK]
    averages = {EMA_COUNT: np.ones(spec.num_codes, np.float32), EMA_MEANS: codebook.copy()}
    return {**params, **averages}
