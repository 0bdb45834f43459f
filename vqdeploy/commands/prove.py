"""``vqdeploy prove``: says which tokens are the same on every machine, without running any."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import vqref
from vqdeploy.commands.shared import PicturesOptions, limit_option
from vqref.agreement.advance import Proof, prove
from vqref.agreement.arithmetics import ARITHMETICS, unbounded
from vqref.agreement.budget import images_within
from vqref.agreement.parity import allowed_error, check_indices
from vqref.errors import ExitCode, InputError, UsageError
from vqref.host.commandline import Command, option
from vqref.host.files import require_writable
from vqref.host.listing import many
from vqref.host.streams import plain
from vqref.spec import CODEBOOK, ModelSpec
from vqref.validation import Array, Float64, Params

if TYPE_CHECKING:
    from vqdeploy.bundle import Bundle
    from vqdeploy.tokens import Images

MOST_IMAGES, SECONDS = 1000, 15.0
"""The limits on images without ``--limit``: their number, and the seconds that one check by the
oracle may take for all arithmetics together. A proof takes half to six times as long as such a
check."""

LEAST = 8
"""How many of the least provable tokens and images are shown."""

NAME_WIDTH = 36


@dataclass(frozen=True, kw_only=True)
class ProveOptions(PicturesOptions):
    """Which images to prove, what machines are assumed to do, and what to show."""

    bundle: Path = option(type=Path, help="the folder that export wrote")
    images: Path = option(type=Path, help="a picture, a folder of pictures, .npz, .npy or IDX")
    arithmetic: list[str] | None = option(
        "--arithmetic",
        default=None,
        choices=(*ARITHMETICS, "all"),
        action="append",
        metavar="NAME",
        help=f"arithmetic that machines compute in: {', '.join(ARITHMETICS)}, or all; may be "
        "repeated (default: float32)",
    )
    limit: int | None = limit_option(f"what takes about a minute, at most {MOST_IMAGES}")
    picture: Path | None = option(
        "--picture",
        default=None,
        type=Path,
        metavar="FILE",
        help="PNG to write: the least provable images, and what their token and its rival "
        "decode to",
    )
    json: bool = option("--json", default=False, action="store_true", help="print JSON")
    per_token: bool = option(
        "--per-token",
        default=False,
        action="store_true",
        help="with --json: also print what is known of every token",
    )


class Proved(NamedTuple):
    """A proof of the images under an arithmetic, and the seconds that it took."""

    proof: Proof
    seconds: float


class Asked(NamedTuple):
    """The given images, their exact latents (N, S, D), and the number of tokens that an encoder
    within its measured tolerance may flip."""

    images: Images
    latents: Float64
    near_ties: int


def run(options: ProveOptions) -> int:
    from vqdeploy.bundle import Bundle
    from vqdeploy.proof.advance import require_float32
    from vqdeploy.tokens import require_format

    if options.per_token and not options.json:
        raise UsageError("--per-token needs --json")
    if options.picture is not None:
        require_format(options.picture, (".png", ".PNG"))
        require_writable(options.picture)
    bundle = Bundle.open(options.bundle)
    require_float32(bundle)
    spec, params, names = bundle.spec, bundle.oracle().params, _names(options.arithmetic)
    asked = _ask(options, bundle, params, len(names))
    found = {name: _timed(spec, params, asked.images.images, name) for name in names}
    least = _least(found[names[0]].proof)
    if options.picture is not None:
        _draw(options.picture, spec, params, asked.images.images, found[names[0]].proof)
    if options.json:
        told = _as_data(options, bundle, asked, found, least)
        print(json.dumps(told, indent=None if options.per_token else 2))
    else:
        for line in _lines(options, spec, asked, found, least):
            print(line)
    return ExitCode.DONE


def _names(given: Sequence[str] | None) -> list[str]:
    """Returns the arithmetics that were asked for, each once."""
    if given is None:
        return ["float32"]
    return [*ARITHMETICS] if "all" in given else [*dict.fromkeys(given)]


def _ask(options: ProveOptions, bundle: Bundle, params: Params, arithmetics: int) -> Asked:
    """Reads and encodes the images. Raises InputError if they do not fit or there are none."""
    spec = bundle.spec
    most = images_within(spec, MOST_IMAGES, SECONDS / arithmetics)
    found = options.read(options.images, spec, bundle.preprocessing, most)
    if not len(found.images):
        raise InputError(f"{options.images}: holds no images")
    latents = vqref.encode(spec, params, found.images)
    judged = check_indices(
        vqref.quantize(latents, params[CODEBOOK]).indices,
        latents,
        params[CODEBOOK],
        precision="float32",
        latents_error=allowed_error("encoder", latents, precision="float32").max(axis=2)
        * spec.code_size**0.5,
    )
    return Asked(found, latents, judged.near_ties or 0)


def _timed(spec: ModelSpec, params: Params, images: Array, name: str) -> Proved:
    start = time.perf_counter()
    proof = prove(spec, params, images, name)
    return Proved(proof, time.perf_counter() - start)


def _least(proof: Proof) -> list[tuple[int, int]]:
    """Returns (image, position) of the least provable tokens."""
    order = np.argsort(proof.excess, axis=None, kind="stable")[:LEAST]
    return [divmod(int(each), proof.excess.shape[1]) for each in order]


def _draw(path: Path, spec: ModelSpec, params: Params, images: Array, proof: Proof) -> None:
    """Draws the least provable images, with three rows beneath them.

    The rows: what their tokens decode to; the same with the rival in place of the least provable
    token; and where the two differ, with the largest difference white.
    """
    from vqref.host.sheets import save_pairs

    chosen = np.argsort(proof.excess.min(axis=1), kind="stable")[:LEAST]
    tokens = proof.excess[chosen].argmin(axis=1)
    indices = np.stack([proof.indices[chosen]] * 2)
    indices[1, np.arange(len(chosen)), tokens] = proof.rivals[chosen, tokens]
    own, other = (
        vqref.reconstruct(spec, vqref.decode(spec, params, params[CODEBOOK][each]))
        for each in indices
    )
    apart = np.abs(own - other).max(axis=1, keepdims=True)
    apart /= np.maximum(apart.max(axis=(1, 2, 3), keepdims=True), np.finfo(float).tiny)
    save_pairs(path, images[chosen], own, other, apart)


def _lines(
    options: ProveOptions,
    spec: ModelSpec,
    asked: Asked,
    found: Mapping[str, Proved],
    least: Sequence[tuple[int, int]],
) -> Iterator[str]:
    """Yields the lines to print, at most 80 characters wide except paths and picture remarks."""
    yield from asked.images.said
    size = asked.latents[..., 0].size
    yield (
        f"{options.images}: {many(len(asked.latents), 'image')}, {many(size, 'token')}, of which "
        f"{asked.near_ties} near ties"
    )
    if kinds := unbounded(spec.encoder):
        yield f"nothing is proved: the effect of rounding has no known bound in {', '.join(kinds)}"
        return
    yield f"{'arithmetic':<12}{'proved':>9}{'moved, median':>16}{'largest':>10}{'s per image':>13}"
    for name, (proof, seconds) in found.items():
        median, largest = _moved(asked, proof)
        yield (
            f"{name:<12}{proof.proved.mean():>9.2%}{median:>16.1e}{largest:>10.1e}"
            f"{seconds / len(asked.latents):>13.3f}"
        )
        yield f"    {ARITHMETICS[name].meaning}"
    name = next(iter(found))
    yield f"least provable for {name}:"
    yield f"{'image':<{NAME_WIDTH}}{'position':>11}{'token':>8}{'rival':>8}{'excess':>11}"
    for image, token in least:
        position = ", ".join(map(str, _position(spec, token)))
        index, rival, excess = (
            each[image, token]
            for each in (
                found[name].proof.indices,
                found[name].proof.rivals,
                found[name].proof.excess,
            )
        )
        yield (
            f"{_short(_name(asked, image)):<{NAME_WIDTH}}{position:>11}{index:>8}{rival:>8}"
            f"{excess:>11.1e}"
        )
    if options.picture is not None:
        yield f"wrote {options.picture}"


def _moved(asked: Asked, proof: Proof) -> tuple[float, float]:
    """Returns the median and the largest bound on how far a latent moves, over its length.

    They are infinite if there is no bound.
    """
    lengths = np.sqrt(np.square(asked.latents).sum(axis=2))
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.nan_to_num(proof.moved / lengths, nan=np.inf, posinf=np.inf)
    return float(np.median(share)), float(share.max())


def _position(spec: ModelSpec, token: int) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(token, spec.latent_shape))


def _name(asked: Asked, image: int) -> str:
    """Returns the name of the picture, or the number of the image if it has no name."""
    names = asked.images.names
    return str(image) if names is None else names[image]


def _short(name: str) -> str:
    """Shortens a name so that columns stay aligned. Keeps its end, which says more."""
    shown = plain(name)
    return shown if len(shown) < NAME_WIDTH else "…" + shown[2 - NAME_WIDTH :]


def _as_data(
    options: ProveOptions,
    bundle: Bundle,
    asked: Asked,
    found: Mapping[str, Proved],
    least: Sequence[tuple[int, int]],
) -> dict[str, Any]:
    """Returns the same as plain data, with null for infinite values."""
    first = next(iter(found.values())).proof
    told: dict[str, Any] = {
        "bundle": str(options.bundle),
        "manifest_sha256": bundle.sha256,
        "images": len(asked.latents),
        "images_sha256": asked.images.sha256,
        "said": asked.images.said,
        "tokens": first.proved.size,
        "near_ties": asked.near_ties,
        "unbounded": unbounded(bundle.spec.encoder),
        "arithmetics": {
            name: _row(asked, *each, per_token=options.per_token) for name, each in found.items()
        },
        "least": [
            {
                "image": image,
                "name": asked.images.names and asked.images.names[image],
                "position": _position(bundle.spec, token),
                "token": int(first.indices[image, token]),
                "rival": int(first.rivals[image, token]),
                "excess": _finite(first.excess[image, token]),
            }
            for image, token in least
        ],
    }
    if options.per_token:
        told |= {"names": asked.images.names, "indices": first.indices.tolist()}
    return told


def _row(asked: Asked, proof: Proof, seconds: float, *, per_token: bool) -> dict[str, Any]:
    """Returns what is known under one arithmetic."""
    median, largest = _moved(asked, proof)
    row: dict[str, Any] = {
        "proved": int(proof.proved.sum()),
        "moved_median": _finite(median),
        "moved_largest": _finite(largest),
        "seconds_per_image": seconds / len(proof.proved),
    }
    if per_token:
        row |= {
            "proved_tokens": proof.proved.tolist(),
            "rivals": proof.rivals.tolist(),
            "excess": [[_finite(each) for each in image] for image in proof.excess],
            "moved": [[_finite(each) for each in image] for image in proof.moved],
        }
    return row


def _finite(value: Any) -> float | None:
    """Returns a number that JSON can hold, None if it is not finite."""
    return float(value) if np.isfinite(value) else None


COMMAND = Command(
    "prove",
    "say which tokens are the same on every machine, and why others may not be",
    ProveOptions,
    run,
)
