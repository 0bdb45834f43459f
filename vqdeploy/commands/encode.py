"""``vqdeploy encode``: images to tokens."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from vqdeploy.bundle import Bundle
from vqdeploy.commands.shared import BundleOptions, PicturesOptions, opened
from vqref.agreement.advance import Proof, prove
from vqref.agreement.arithmetics import ARITHMETICS
from vqref.errors import ExitCode, UsageError
from vqref.host.commandline import Command, option
from vqref.validation import Array, Int64


@dataclass(frozen=True, kw_only=True)
class EncodeOptions(PicturesOptions, BundleOptions):
    """The images, and the file for their tokens."""

    images: Path = option(type=Path, help="a picture, a folder of them, .npz, .npy or IDX")
    output: Path = option(
        "--output", default=Path("tokens.npz"), type=Path, metavar="FILE", help="where to"
    )
    prove: str | None = option(
        "--prove",
        default=None,
        choices=tuple(ARITHMETICS),
        metavar="NAME",
        help="write of each token whether it is the same on every machine that computes in "
        f"{', '.join(ARITHMETICS)}; takes about as long as the oracle (default: do not)",
    )


def run(options: EncodeOptions) -> int:
    from vqdeploy.proof.advance import require_float32
    from vqdeploy.tokens import TOKEN_FORMATS, Tokens, require_format, write_tokens

    require_format(options.output, TOKEN_FORMATS)
    if options.prove:
        if options.output.suffix == ".npy":
            raise UsageError(f"{options.output}: an .npy has no room for what --prove finds")
        require_float32(Bundle.open(options.bundle))
    with opened(options, options.output) as codec:
        found = options.read(options.images, codec.spec, codec.preprocessing)
        indices = codec.encode(found.images)
        tokens, counted = Tokens.of(codec, indices, found.names), ""
        if options.prove:
            proof = _proof(options, found.images, indices)
            tokens = dataclasses.replace(
                tokens, proved=proof.proved, rivals=proof.rivals, arithmetic=options.prove
            )
            counted = f", {proof.proved.sum()} proved for {options.prove}"
        write_tokens(options.output, tokens)
        for line in found.said:
            print(line)
        used = len(set(indices.ravel().tolist()))
        said = f"{indices.size} tokens, {used} different{counted}"
        print(f"{len(indices)} images on {codec.device}: {said}; wrote {options.output}")
    return ExitCode.DONE


def _proof(options: EncodeOptions, images: Array, indices: Int64) -> Proof:
    """What is proved of the tokens. Raises ParityError if the device gave others than those."""
    from vqdeploy.proof.advance import check_proved

    bundle = Bundle.open(options.bundle)
    spec, params, name = bundle.spec, bundle.oracle().params, str(options.prove)
    proof = prove(spec, params, images, name)
    check_proved(spec, params, images, indices, proof, name).require()
    return proof


COMMAND = Command(
    "encode",
    "images to tokens: a folder or a file to .npz, .npy or .parquet",
    EncodeOptions,
    run,
)
