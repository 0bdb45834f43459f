"""Imports VQModel of LlamaGen.

The file gives all sizes except that of the images, and does not say whether codes are unit vectors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vqdeploy.importers.checkpoint import Checkpoint
from vqdeploy.importers.configuration import Fields
from vqdeploy.importers.plan import Choices, Importer, Plan, optional_configuration
from vqdeploy.importers.vqgan import TAMING_ROWS, TAMING_WORDS, Names, described, grid_sides
from vqref.errors import InputError
from vqref.quantizer import averaged
from vqref.spec import CODEBOOK, EMA_COUNT, EMA_MEANS
from vqref.validation import Array

GROUPS = 32
"""The number of groups of every norm."""

NAMES = Names(
    rows={
        **TAMING_ROWS,
        "encoder.level.down": "encoder.conv_blocks.{fine}.downsample.conv",
        "decoder.level.up": "decoder.conv_blocks.{coarse}.upsample.conv",
    },
    groups={
        "encoder.level.block": "encoder.conv_blocks.{fine}.res.{j}",
        "encoder.level.attention": "encoder.conv_blocks.{fine}.attn.{j}",
        "encoder.middle.block1": "encoder.mid.0",
        "encoder.middle.attention": "encoder.mid.1",
        "encoder.middle.block2": "encoder.mid.2",
        "decoder.level.block": "decoder.conv_blocks.{coarse}.res.{j}",
        "decoder.level.attention": "decoder.conv_blocks.{coarse}.attn.{j}",
        "decoder.middle.block1": "decoder.mid.0",
        "decoder.middle.attention": "decoder.mid.1",
        "decoder.middle.block2": "decoder.mid.2",
    },
    words=TAMING_WORDS,
    convolutions=True,
)

_BLOCK = re.compile(r"encoder\.conv_blocks\.(\d{1,2})\.res\.(\d{1,2})\.conv2\.weight")

_UNIT = "codebook_l2_norm"
_NO_PART = ("codebook_show_usage", "commit_loss_beta", "dropout_p", "entropy_loss_ratio")
"""Fields of ``ModelArgs`` that do not affect encoding and decoding."""


def _knows(tensors: Mapping[str, Any]) -> bool:
    return any(name.startswith("encoder.conv_blocks.0.res.0.") for name in tensors)


def _plan(checkpoint: Checkpoint, tensors: Mapping[str, Any], choices: Choices) -> Plan:
    config = optional_configuration(checkpoint, choices)
    options = checkpoint.options()
    side = choices.image_size or options.get("image_size")
    if type(side) is not int:
        raise InputError("does not say the size of its images; give it with --image-size N")
    sizes = _sizes(tensors)
    if config is not None:
        _require(config, sizes)
    fields = config or Fields(checkpoint.path, options, checkpoint.sha256)
    if _UNIT not in fields.values:
        raise InputError(
            f"does not say {_UNIT}; write it to a JSON file, and name that with --config "
            f'FILE: {{"{_UNIT}": true}} for the published models'
        )
    normalized = fields.truth(_UNIT)
    levels = len(sizes["multipliers"])
    spec = described(
        "it",
        **sizes,
        image_shape=(_shape(tensors, "encoder.conv_in.weight", 4)[1], side, side),
        attention=grid_sides(side, levels)[-1:],
        middle_attention=True,
        groups=GROUPS,
        normalized=normalized,
    )
    return Plan(
        spec,
        tensors,
        NAMES.sources(spec, levels),
        ("quantize.codebook_used",),
        finish=_unit_codes if normalized else lambda params: params,
        files={config.path.name: config.sha256} if config else {},
    )


def _sizes(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the sizes that follow from shapes, by the family's names. Raises InputError."""
    channels = _shape(tensors, "encoder.conv_in.weight", 4)[0]
    places = [tuple(map(int, found.groups())) for found in map(_BLOCK.fullmatch, tensors) if found]
    levels, blocks = (1 + max((place[axis] for place in places), default=-1) for axis in (0, 1))
    multipliers = []
    for i in range(levels):
        name = f"encoder.conv_blocks.{i}.res.0.conv2.weight"
        width = _shape(tensors, name, 4)[0]
        if not channels or width % channels:
            raise InputError(
                f"the tensor {name} has {width} channels, expected a multiple of {channels}"
            )
        multipliers.append(width // channels)
    num_codes, code_size = _shape(tensors, "quantize.embedding.weight", 2)
    return {
        "channels": channels,
        "multipliers": tuple(multipliers),
        "blocks": blocks,
        "latent_channels": _shape(tensors, "encoder.conv_out.weight", 4)[0],
        "num_codes": num_codes,
        "code_size": code_size,
    }


def _shape(tensors: Mapping[str, Any], name: str, axes: int) -> tuple[int, ...]:
    """Returns the shape of a tensor that must exist. Raises InputError."""
    if name not in tensors:
        raise InputError(f"lacks {name}")
    shape = tuple(getattr(tensors[name], "shape", ()))
    if len(shape) != axes:
        raise InputError(f"the tensor {name} has shape {shape}, expected {axes} axes")
    return shape


def _require(config: Fields, sizes: Mapping[str, Any]) -> None:
    """Raises InputError for a field that contradicts the weights."""
    names = {
        "codebook_size": "num_codes",
        "codebook_embed_dim": "code_size",
        "z_channels": "latent_channels",
        "encoder_ch_mult": "multipliers",
        "decoder_ch_mult": "multipliers",
    }
    for name, ours in names.items():
        size = sizes[ours]
        size = list(size) if isinstance(size, tuple) else size
        config.only(name, size, default=size)
    config.require_known(_UNIT, *names, *_NO_PART)


def _unit_codes(params: dict[str, Array]) -> dict[str, Array]:
    """Returns the parameters with codes of unit norm, as the model uses them."""
    codes = params[CODEBOOK].astype(np.float64)
    norms = np.maximum(np.linalg.norm(codes, axis=1, keepdims=True), 1e-12)
    others = {name: a for name, a in params.items() if name not in (EMA_COUNT, EMA_MEANS)}
    return averaged({**others, CODEBOOK: (codes / norms).astype(np.float32)})


IMPORTER = Importer(
    "llamagen",
    "VQModel of LlamaGen",
    ("config", "image_size", "weights"),
    _knows,
    _plan,
    ("ema", "model", "", "state_dict"),
)
