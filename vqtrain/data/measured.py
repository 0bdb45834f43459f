"""Which images a model is measured on, and whether it was trained on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqref.errors import InputError
from vqref.host.images import ImageSet
from vqref.host.pictures import Reading, load_any
from vqref.modelfile import Model
from vqref.spec import ModelSpec
from vqref.validation import Array
from vqtrain.data.holdout import hold_out, share, split
from vqtrain.data.streams import Stream


@dataclass(frozen=True)
class Measured:
    """Images to measure on, (N, C, H, W).

    others: the images that they were held out of, to fit floors to; or None.
    kind: "held-out images" if the model was not trained on them, "training images" if it was
    trained on all, else "images". source: the name of their file. how: how they were chosen, and
    how many of them the model was trained on, if not all or none; else empty.
    said: lines on what was done to pictures.
    """

    images: Array
    others: Array | None
    kind: str
    source: str
    how: str
    said: tuple[str, ...]

    def __str__(self) -> str:
        """As "340 held-out images of emoji (a tenth, by hash)"."""
        kind = self.kind if len(self.images) != 1 else self.kind.removesuffix("s")
        return f"{len(self.images)} {kind} of {self.source}" + (
            f" ({self.how})" if self.how else ""
        )


@dataclass(frozen=True)
class _Training:
    """What a model says about its training images.

    It gives their digest, the share held out by hash (None if unknown), and the digest of other
    images that were held out.
    """

    sha256: str | None
    fraction: float | None
    held_out: str | None

    @classmethod
    def of(cls, provenance: Mapping[str, Any]) -> _Training:
        data = provenance.get("data", {})
        held_out = data.get("held_out", {})
        if not isinstance(held_out, dict):
            return cls(data.get("sha256"), None, None)
        fraction = held_out.get("fraction", 0.0)
        if type(fraction) is not float or not 0 <= fraction < 1:
            fraction = None
        return cls(data.get("sha256"), fraction, held_out.get("sha256"))

    def trained_on(self, images: Array, sha256: str | None) -> int | None:
        """Counts training images among images (N, C, H, W) of the file; None if unknown.

        sha256: the digest of the file.
        """
        if sha256 is not None and sha256 == self.held_out:
            return 0
        if sha256 is None or sha256 != self.sha256 or self.fraction is None:
            return None
        return len(images) - int(split(images, self.fraction).sum())


def choose(
    source: ImageSet | Stream, model: Model, wanted: float | Path | None, reading: Reading
) -> Measured:
    """Chooses the images of a source to measure a model on.

    wanted: a share of the source's images, by the hash of each, or the path of others. None takes
    the source's own held-out images. If the source is the model's training images, None takes
    those that training held out; otherwise all. reading: how to read pictures at that path.

    Raises InputError if there are no images, or if their size is not the model's.
    """
    training = _Training.of(model.provenance)
    if isinstance(source, Stream):
        return _sampled(source, model, training, wanted)
    _require_fitting(source, model.spec)
    if wanted is None and source.sha256 == training.sha256:
        wanted = training.fraction or None
    parts = source if wanted is None else _held_out(source, model.spec, wanted, reading)
    images, others, kind, of = parts.train, None, "images", dict[str, Any]()
    if parts.held_out is not None and len(parts.held_out):
        images, others, kind = parts.held_out, parts.train, "held-out images"
        of = dict(parts.held_out_as or {"sha256": None})  # these have no digest of their own
    if not len(images):
        raise InputError(f"{source.source}: no images to measure on")
    how = [f"{share(of['fraction'])}, by hash"] if "fraction" in of else []
    trained = training.trained_on(images, of.get("sha256", source.sha256))
    if trained is not None:
        kind = {0: "held-out images", len(images): "training images"}.get(trained, "images")
        how += [f"{trained} of them trained on"] * (kind == "images")
    name = of.get("source", source.source)
    return Measured(images, others, kind, name, "; ".join(how), parts.said)


def _sampled(
    source: Stream, model: Model, training: _Training, wanted: float | Path | None
) -> Measured:
    """Returns samples of shards: of held-out images if any, else of all. Raises InputError."""
    known = source.sha256 == training.sha256
    if wanted is None and source.own is None:
        wanted = (training.fraction if known else None) or 0.0
    parts = hold_out(source, wanted, source.reading)
    _require_fitting(parts, model.spec)
    of = dict(parts.held_out_as or {})
    if parts.held_out is None:
        kind, count = (
            "training images" if known and not training.fraction else "images",
            parts.count,
        )
        return Measured(parts.train, None, kind, source.source, f"a sample of {count}", parts.said)
    unseen = known and wanted in (None, training.fraction)
    unseen |= training.held_out is not None and of.get("sha256") == training.held_out
    kind = "held-out images" if unseen else "images"
    how = f"{share(of['fraction'])}, by hash" if "fraction" in of else ""
    name = of.get("source", source.source)
    return Measured(parts.held_out, parts.train, kind, name, how, parts.said)


def _held_out(
    source: ImageSet, spec: ModelSpec, wanted: float | Path, reading: Reading
) -> ImageSet:
    """Returns the source with the wanted images held out. Raises InputError."""
    if not isinstance(wanted, Path):
        return hold_out(source, wanted)
    others = load_any(wanted, reading)
    _require_fitting(others, spec)
    return hold_out(source, others)


def _require_fitting(source: ImageSet, spec: ModelSpec) -> None:
    """Raises InputError unless the images have the size of the model's."""
    if source.train.shape[1:] != spec.image_shape:
        raise InputError(
            f"{source.source}: images of {source.train.shape[1:]}, the model's are "
            f"{spec.image_shape}"
        )
