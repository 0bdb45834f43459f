"""Holds out images that a run does not train on: a share by hash, or a separate set.

The hash of each image decides, so a data set that grows keeps its split, and copies of an image
stay together.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vqref.errors import InputError
from vqref.host.images import ImageSet
from vqref.host.pictures import Reading, load_any
from vqref.validation import Array
from vqtrain.data.sources import PLAIN
from vqtrain.data.streams import (
    AS_USUAL,
    Stream,
    StreamSet,
    apart,
    is_stream,
    open_stream,
    settle,
)

FRACTION = 0.1
"""The share to hold out of a source without held-out images of its own."""


def parse(text: str) -> float | Path:
    """Parses ``--held-out``: a fraction from 0 to below 1, or a path."""
    try:
        fraction = float(text)
    except ValueError:
        if not text:
            raise argparse.ArgumentTypeError("'' is neither a fraction nor a path") from None
        return Path(text)
    try:
        return require_fraction(fraction)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}; for a file, write ./{text}") from None


def require_fraction(fraction: float) -> float:
    """Returns the fraction. Raises ValueError unless it is from 0 to below 1."""
    if not 0 <= fraction < 1:  # nan is not, either
        raise ValueError(f"{fraction:g} is not a fraction from 0 to below 1")
    return fraction


def split(images: Array, fraction: float) -> npt.NDArray[np.bool_]:
    """Returns which of images (N, C, H, W) are held out, (N,).

    Holds an image out if the first 8 bytes of the sha256 of its pixels (uint8 or float32 in C
    order), read as a big-endian integer, are less than ``fraction`` times 2**64.
    """
    places = (_place(image) for image in images)
    return np.fromiter((place < fraction for place in places), np.bool_, len(images))


def _place(image: Array) -> float:
    """Returns a number between 0 and 1 from an image's hash."""
    digest = hashlib.sha256(np.ascontiguousarray(image).data).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def hold_out(
    source: ImageSet | Stream, wanted: float | Path | ImageSet | None, reading: Reading = PLAIN
) -> ImageSet:
    """Returns the source with the wanted images held out.

    wanted: a fraction of the source's images, or other images, or the path of other images. If it
    is other images, ``train`` stays whole. None takes the source's own held-out images, else
    FRACTION. reading: whether pictures at that path may be in subfolders, or broken; all else is as
    for the source's pictures.

    If the source is shards, reads a sample of each part. The hash of an image's place in the shards
    decides whether it is held out.

    Raises InputError for a path that holds no images of the source's size.
    """
    if isinstance(source, Stream):
        if wanted is None and source.own is not None:
            return settle(source, source.pieces, source.own, None)
        if wanted is None or isinstance(wanted, float):
            return apart(source, FRACTION if wanted is None else wanted)
        source = settle(source, source.pieces, (), None)
    elif isinstance(source, StreamSet) and not isinstance(wanted, Path | ImageSet):
        if wanted is None:
            return source
        raise InputError(f"{source.source}: its held-out images are chosen already")
    if wanted is None:
        if source.held_out is not None:
            return source
        wanted = FRACTION
    if isinstance(wanted, float):
        return _apart(source, wanted)
    others = _read(wanted, source, reading) if isinstance(wanted, Path) else wanted
    where = wanted if isinstance(wanted, Path) else "held_out"
    if others.train.shape[1:] != source.train.shape[1:]:
        raise InputError(
            f"{where}: images of {others.train.shape[1:]}, those to train on are "
            f"{source.train.shape[1:]}"
        )
    if not len(others.train):
        raise InputError(f"{where}: no images to hold out")
    return dataclasses.replace(
        source,
        held_out=others.train,
        said=(*source.said, *(f"held out: {line}" for line in others.said)),
        held_out_as={"source": others.source, "sha256": others.sha256},
    )


def _apart(source: ImageSet, fraction: float) -> ImageSet:
    """Splits the source into two parts by the hash of each image."""
    names, chosen = source.names, split(source.train, fraction)
    if names is not None:
        names = tuple(name for name, out in zip(names, chosen, strict=True) if not out)
    return dataclasses.replace(
        source,
        train=source.train[~chosen] if chosen.any() else source.train,
        held_out=source.train[chosen] if fraction else None,
        names=names,
        held_out_as={"fraction": fraction},
    )


def _read(path: Path, source: ImageSet, reading: Reading) -> ImageSet:
    """Reads the images at ``path``; pictures are read as those of the source were."""
    how = {"recursive": reading.recursive, "skip_bad": reading.skip_bad}
    fitting = Reading.of(source.preprocessing, source.train.shape[1:], **how)
    if is_stream(path, reading.recursive):
        streaming = source.streaming if isinstance(source, StreamSet) else AS_USUAL
        stream = open_stream(path, fitting, streaming)
        return settle(stream, stream.pieces, (), None)
    return load_any(path, fitting)


def record(images: ImageSet) -> dict[str, Any]:
    """Returns how many images are held out, and how, for a model's provenance."""
    held_out = 0 if images.held_out is None else len(images.held_out)
    return {"images": held_out, **(images.held_out_as or {})}


def share(fraction: float) -> str:
    """Returns a fraction in words."""
    return "a tenth" if fraction == FRACTION else f"{fraction:g}"


def described(images: ImageSet) -> str:
    """Returns a line that says how many images train and how many are held out."""
    train, held_out = images.count, record(images)
    if not held_out["images"]:
        return f"{train} images train, none are held out"
    if "fraction" in held_out:
        how = f"{share(held_out['fraction'])}, by hash"
    else:
        how = held_out.get("source", "the source's own")
    return f"{train} images train, {held_out['images']} are held out ({how})"
