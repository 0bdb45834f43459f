"""Imports VQModel of Hugging Face's diffusers: a folder of ``config.json`` and weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vqdeploy.importers.checkpoint import Checkpoint
from vqdeploy.importers.configuration import MOST_BLOCKS, Fields
from vqdeploy.importers.plan import Choices, Importer, Plan, configuration, ranged
from vqdeploy.importers.vqgan import ROWS, Names, described, grid_sides
from vqref.spec import ModelSpec

_WORDS = {
    "shortcut": "conv_shortcut",
    "norm": "group_norm",
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "out": "to_out.0",
}
_OLD_WORDS = {"query": "query", "key": "key", "value": "value", "out": "proj_attn"}
"""The names that older files use in attention."""

NAMES = Names(
    rows={
        **ROWS,
        "encoder.level.down": "encoder.down_blocks.{fine}.downsamplers.0.conv",
        "encoder.norm_out": "encoder.conv_norm_out",
        "decoder.level.up": "decoder.up_blocks.{coarse}.upsamplers.0.conv",
        "decoder.norm_out": "decoder.conv_norm_out",
    },
    groups={
        "encoder.level.block": "encoder.down_blocks.{fine}.resnets.{j}",
        "encoder.level.attention": "encoder.down_blocks.{fine}.attentions.{j}",
        "encoder.middle.block1": "encoder.mid_block.resnets.0",
        "encoder.middle.attention": "encoder.mid_block.attentions.0",
        "encoder.middle.block2": "encoder.mid_block.resnets.1",
        "decoder.level.block": "decoder.up_blocks.{coarse}.resnets.{j}",
        "decoder.level.attention": "decoder.up_blocks.{coarse}.attentions.{j}",
        "decoder.middle.block1": "decoder.mid_block.resnets.0",
        "decoder.middle.attention": "decoder.mid_block.attentions.0",
        "decoder.middle.block2": "decoder.mid_block.resnets.1",
    },
    words=_WORDS,
    convolutions=False,
)

_DOWN = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
_UP = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}
"""Whether a level of this type has attention."""

_NO_PART = ("force_upcast", "lookup_from_codebook", "scaling_factor")
"""Fields that do not affect encoding and decoding."""


def _knows(tensors: Mapping[str, Any]) -> bool:
    return any(name.startswith("encoder.down_blocks.0.resnets.0.") for name in tensors)


def _plan(checkpoint: Checkpoint, tensors: Mapping[str, Any], choices: Choices) -> Plan:
    config = configuration(checkpoint, choices)
    spec, levels = _spec(config, choices.image_size)
    low, high = choices.value_range or spec.value_range
    said = f"images in [{low:g}, {high:g}]"
    if choices.value_range is None:
        said += ": the configuration does not say; if the model was trained on [0, 1], --range 0,1"
    old = any(name.endswith(".proj_attn.weight") for name in tensors)
    names = dataclasses.replace(NAMES, words={**_WORDS, **_OLD_WORDS}) if old else NAMES
    return Plan(
        ranged(spec, low, high),
        tensors,
        names.sources(spec, levels),
        said=(said,),
        files={config.path.name: config.sha256},
    )


def _spec(config: Fields, image_size: int | None) -> tuple[ModelSpec, int]:
    """Returns the network of the configuration, and its number of levels. Raises InputError."""
    config.only("_class_name", "VQModel")
    config.only("norm_type", "group", default="group")
    config.only("act_fn", "silu", "swish", default="silu")
    widths = config.wholes("block_out_channels", (64,))
    levels, channels = len(widths), config.whole("in_channels", 3)
    if not widths or any(width % widths[0] for width in widths):
        raise config.fail("block_out_channels", "multiples of the first")
    config.only("out_channels", channels, default=3)
    latents = config.whole("latent_channels", 3)
    embed = config.values.get("vq_embed_dim")
    side = image_size or config.whole("sample_size", 32)
    attending = _attending(config, levels)
    sides = grid_sides(side, levels)
    spec = described(
        str(config.path),
        image_shape=(channels, side, side),
        channels=widths[0],
        multipliers=tuple(width // widths[0] for width in widths),
        blocks=config.whole("layers_per_block", 1, MOST_BLOCKS),
        attention=tuple(sides[i] for i in range(levels) if attending[i]),
        middle_attention=config.truth("mid_block_add_attention", True),
        groups=config.whole("norm_num_groups", 32),
        latent_channels=latents,
        num_codes=config.whole("num_vq_embeddings", 256),
        code_size=latents if embed is None else config.whole("vq_embed_dim"),
    )
    config.require_known(*_FIELDS, *_NO_PART)
    return spec, levels


_FIELDS = (
    *("act_fn", "block_out_channels", "down_block_types", "in_channels", "latent_channels"),
    *("layers_per_block", "mid_block_add_attention", "norm_num_groups", "norm_type"),
    *("num_vq_embeddings", "out_channels", "sample_size", "up_block_types", "vq_embed_dim"),
)


def _attending(config: Fields, levels: int) -> list[bool]:
    """Returns whether each level has attention, the finest first. Raises InputError."""
    down = config.texts("down_block_types", ["DownEncoderBlock2D"])
    up = config.texts("up_block_types", ["UpDecoderBlock2D"])
    for name, types, known in (("down_block_types", down, _DOWN), ("up_block_types", up, _UP)):
        if len(types) != levels or not set(types) <= set(known):
            raise config.fail(name, f"{levels} of {' or '.join(known)}")
    attending = [_DOWN[each] for each in down]
    if attending != [_UP[each] for each in reversed(up)]:
        raise config.fail("up_block_types", "attention at the levels of down_block_types")
    return attending


IMPORTER = Importer(
    "diffusers",
    "VQModel of diffusers",
    ("config", "image_size", "value_range"),
    _knows,
    _plan,
)
