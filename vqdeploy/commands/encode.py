"""``vqdeploy encode``: turns images into tokens, from a file or an archive larger than memory."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vqdeploy.bundle import Bundle
from vqdeploy.commands.shared import BundleOptions, PicturesOptions, opened
from vqdeploy.runtime.sessions import quiet
from vqdeploy.tokens import TOKEN_FORMATS
from vqref.agreement.advance import Proof, prove
from vqref.agreement.arithmetics import ARITHMETICS
from vqref.errors import ExitCode, UsageError
from vqref.host.archives import SHARD_IMAGES, describe, list_shards
from vqref.host.arrow import parquet
from vqref.host.commandline import Command, count, option, positive
from vqref.host.files import is_folder
from vqref.validation import Array, Int64

ENGINES = ("process", "ray")


@dataclass(frozen=True, kw_only=True)
class EncodeOptions(PicturesOptions, BundleOptions):
    """Which images to encode, and the file or folder for their tokens."""

    images: Path = option(
        type=Path,
        help="a picture, a folder of pictures, .npz, .npy or IDX; if --output is a folder, also "
        "parquet files, tars and .npy files larger than memory, or a folder of them",
    )
    output: str = option(
        "--output",
        default="tokens.npz",
        metavar="PATH",
        help="file or folder to write: .npz, .npy, .parquet, or a folder for parquet files and "
        "their manifest",
    )
    prove: str | None = option(
        "--prove",
        default=None,
        choices=tuple(ARITHMETICS),
        metavar="NAME",
        help="record for each token whether it is the same on every machine that computes in "
        f"NAME: {', '.join(ARITHMETICS)}; takes about as long as the oracle (default: record "
        "nothing)",
    )
    engine: str | None = option(
        "--engine",
        default=None,
        choices=ENGINES,
        help="for a folder: work in this process, or with Ray Data on all cores and GPUs "
        "(default: process)",
    )
    address: str | None = option(
        "--address",
        default=None,
        metavar="HOST:PORT",
        help="for --engine ray: address of the cluster, or auto for one that runs on this machine "
        "(default: start one)",
    )
    workers: int | None = option(
        "--workers",
        default=None,
        type=positive,
        metavar="N",
        help="for --engine ray: workers at a time (default: one per core, four per GPU)",
    )
    max_broken: int | None = option(
        "--max-broken",
        default=None,
        type=count,
        metavar="N",
        help="for a folder: how many unreadable images may be left out (default: 0)",
    )
    shard_images: int | None = option(
        "--shard-images",
        default=None,
        type=positive,
        metavar="N",
        help=f"for a folder: about how many images per file (default: {SHARD_IMAGES}; images of "
        "one tar stay together)",
    )


OF_FILES = ("prove", "part", "skip_bad", "limit")
OF_FOLDERS = ("engine", "address", "workers", "max_broken", "shard_images")
OF_RAY = ("address", "workers")
"""Options that apply to only one kind of output, or to only one engine."""


def run(options: EncodeOptions) -> int:
    output = Path(options.output)
    named = options.output.endswith(("/", os.sep)) or not output.suffix
    if named or (is_folder(output) and output.suffix not in TOKEN_FORMATS):
        return _to_folder(options)
    return _to_file(options)


def _require_absent(options: EncodeOptions, names: tuple[str, ...], why: str) -> None:
    """Raises UsageError if one of the options was given, since it has no meaning here."""
    for field in dataclasses.fields(EncodeOptions):
        if field.name in names and getattr(options, field.name) != field.default:
            raise UsageError(f"--{field.name.replace('_', '-')} is for {why}")


def _to_folder(options: EncodeOptions) -> int:
    """Writes the tokens of an archive."""
    from vqdeploy.archives import Job, encode_archive, in_process

    _require_absent(options, OF_FILES, "a file as --output")
    if options.engine != "ray":
        _require_absent(options, OF_RAY, "--engine ray")
    parquet()
    quiet()
    bundle = Bundle.open(options.bundle)
    job = Job(
        options.bundle.absolute(),
        bundle.sha256,
        Path(options.output).absolute(),
        options.device,
        options.threads,
        options.max_broken or 0,
    )
    source = options.images.absolute()
    shards = list_shards(
        source, recursive=options.recursive, images=options.shard_images or SHARD_IMAGES
    )
    print(f"{options.images}: {describe(shards)}")
    engine = in_process
    if options.engine == "ray":
        from vqdeploy.cluster import on_ray

        engine = partial(on_ray, address=options.address, workers=options.workers)
    done = encode_archive(job, bundle.spec, source.name, shards, engine, _say)
    print(f"{done.summary()}; wrote {options.output}")
    return ExitCode.DONE


def _say(line: str) -> None:
    print(line, flush=True)


def _to_file(options: EncodeOptions) -> int:
    """Writes the tokens of images that fit in memory."""
    from vqdeploy.proof.advance import require_float32
    from vqdeploy.tokens import Tokens, require_format, write_tokens

    output = Path(options.output)
    _require_absent(options, OF_FOLDERS, "a folder as --output")
    require_format(output, TOKEN_FORMATS)
    if options.prove:
        if output.suffix == ".npy":
            raise UsageError(f"{output}: an .npy cannot hold what --prove finds")
        require_float32(Bundle.open(options.bundle))
    with opened(options, output) as codec:
        found = options.read(options.images, codec.spec, codec.preprocessing)
        indices = codec.encode(found.images)
        tokens, counted = Tokens.of(codec, indices, found.names), ""
        if options.prove:
            proof = _proof(options, found.images, indices)
            tokens = dataclasses.replace(
                tokens, proved=proof.proved, rivals=proof.rivals, arithmetic=options.prove
            )
            counted = f", {proof.proved.sum()} proved for {options.prove}"
        write_tokens(output, tokens)
        for line in found.said:
            print(line)
        used = len(set(indices.ravel().tolist()))
        said = f"{indices.size} tokens, {used} different{counted}"
        print(f"{len(indices)} images on {codec.device}: {said}; wrote {output}")
    return ExitCode.DONE


def _proof(options: EncodeOptions, images: Array, indices: Int64) -> Proof:
    """Returns what is proved about the tokens.

    Raises ParityError if the device computed other tokens than those proved.
    """
    from vqdeploy.proof.advance import check_proved

    bundle = Bundle.open(options.bundle)
    spec, params, name = bundle.spec, bundle.oracle().params, str(options.prove)
    proof = prove(spec, params, images, name)
    check_proved(spec, params, images, indices, proof, name).require()
    return proof


COMMAND = Command(
    "encode",
    "turn images into tokens: .npz, .npy, .parquet or a folder of parquet files",
    EncodeOptions,
    run,
)
