"""Imports VQModel of taming-transformers: a ``.ckpt`` and its ``.yaml``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vqdeploy.importers.checkpoint import Checkpoint
from vqdeploy.importers.configuration import MOST_BLOCKS, Fields
from vqdeploy.importers.plan import Choices, Importer, Plan, configuration
from vqdeploy.importers.vqgan import TAMING_ROWS, TAMING_WORDS, Names, described, grid_sides
from vqref.spec import ModelSpec

GROUPS = 32
"""The number of groups of every norm."""

NAMES = Names(
    rows={
        **TAMING_ROWS,
        "encoder.level.down": "encoder.down.{fine}.downsample.conv",
        "decoder.level.up": "decoder.up.{fine}.upsample.conv",
    },
    groups={
        "encoder.level.block": "encoder.down.{fine}.block.{j}",
        "encoder.level.attention": "encoder.down.{fine}.attn.{j}",
        "encoder.middle.block1": "encoder.mid.block_1",
        "encoder.middle.attention": "encoder.mid.attn_1",
        "encoder.middle.block2": "encoder.mid.block_2",
        "decoder.level.block": "decoder.up.{fine}.block.{j}",
        "decoder.level.attention": "decoder.up.{fine}.attn.{j}",
        "decoder.middle.block1": "decoder.mid.block_1",
        "decoder.middle.attention": "decoder.mid.attn_1",
        "decoder.middle.block2": "decoder.mid.block_2",
    },
    words=TAMING_WORDS,
    convolutions=True,
)


def _knows(tensors: Mapping[str, Any]) -> bool:
    return any(name.startswith("encoder.down.0.block.0.") for name in tensors)


def _plan(checkpoint: Checkpoint, tensors: Mapping[str, Any], choices: Choices) -> Plan:
    config = configuration(checkpoint, choices)
    spec, levels = _spec(config, choices.image_size)
    files = {config.path.name: config.sha256}
    return Plan(spec, tensors, NAMES.sources(spec, levels), ("loss.*",), files=files)


def _spec(config: Fields, image_size: int | None) -> tuple[ModelSpec, int]:
    """Returns the network of the configuration, and its number of levels. Raises InputError."""
    model = config.table("model") if "model" in config.values else config
    model.only("target", "taming.models.vqgan.VQModel")
    params = model.table("params")
    params.only("remap", None, default=None)
    network = params.table("ddconfig")
    network.only("double_z", False)
    network.only("resamp_with_conv", True, default=True)
    network.only("give_pre_end", False, default=False)
    widths = network.wholes("ch_mult", (1, 2, 4, 8))
    levels, channels = len(widths), network.whole("in_channels")
    network.only("out_ch", channels)
    written = network.whole("resolution", image_size)
    side, sides = image_size or written, grid_sides(written, levels)
    attending = network.wholes("attn_resolutions")
    if unknown := [each for each in attending if each not in sides]:
        raise network.fail("attn_resolutions", f"some of {sides}, not {unknown[0]}")
    spec = described(
        str(config.path),
        image_shape=(channels, side, side),
        channels=network.whole("ch"),
        multipliers=widths,
        blocks=network.whole("num_res_blocks", most=MOST_BLOCKS),
        attention=tuple(
            there
            for there, then in zip(grid_sides(side, levels), sides, strict=True)
            if then in attending
        ),
        middle_attention=True,
        groups=GROUPS,
        latent_channels=network.whole("z_channels"),
        num_codes=params.whole("n_embed"),
        code_size=params.whole("embed_dim"),
    )
    params.require_known(*_PARAMS)
    network.require_known(*_NETWORK)
    return spec, levels


_PARAMS = (
    *("ckpt_path", "colorize_nlabels", "ddconfig", "embed_dim", "ignore_keys", "image_key"),
    *("lossconfig", "monitor", "n_embed", "remap", "sane_index_shape"),
)
_NETWORK = (
    *("attn_resolutions", "ch", "ch_mult", "double_z", "dropout", "give_pre_end", "in_channels"),
    *("num_res_blocks", "out_ch", "resamp_with_conv", "resolution", "z_channels"),
)

IMPORTER = Importer(
    "taming", "VQModel of taming-transformers", ("config", "image_size"), _knows, _plan
)
