"""Checks who made a bundle, by a detached signature of its manifest.

The signature has the format of minisign (https://jedisct1.github.io/minisign/). That tool makes
it, or another tool that writes the format.

    minisign -G                               # once: a key pair
    minisign -Sm model-onnx/manifest.json     # writes manifest.json.minisig beside it
    python -m vqdeploy verify model-onnx --public-key minisign.pub

The manifest holds the digests of all other files, so its signature covers them too.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import NamedTuple

from vqdeploy.bundle import MANIFEST, Bundle
from vqref.errors import InputError, UsageError
from vqref.host.extras import missing
from vqref.host.files import read_bytes

SIGNATURE = f"{MANIFEST}.minisig"
"""The signature's name in a bundle. It signs the manifest, so the manifest cannot list it."""

BYTES = 2**16
"""The largest file of a key or a signature that is read, in bytes."""

KEY, PREHASHED, KEY_NUMBER = b"Ed", b"ED", 8
"""The first bytes of a public key and of a signature, and the size of the key's number that follows
them."""

COMMENT, TRUSTED = "untrusted comment:", "trusted comment: "


class Signature(NamedTuple):
    """The content of a signature file.

    number: the key's number. signature: of the BLAKE2b digest of the signed file.
    signature_of_all: of the signature and the comment.
    """

    number: bytes
    signature: bytes
    comment: bytes
    signature_of_all: bytes


def require_signature(bundle: Bundle, public_key: str) -> str:
    """Checks the manifest against SIGNATURE in the bundle, and returns the signed comment.

    public_key: minisign's public key, as text or as the name of its file.

    Raises UsageError if that is not a key. Raises InputError if the signature is missing, damaged,
    or of another key or manifest. Raises MachineError if ``cryptography`` is not installed.
    """
    path = bundle.path / SIGNATURE
    number, key = _public_key(public_key)
    try:
        found = _parse(read_bytes(path, BYTES).decode())
    except (ValueError, IndexError) as error:
        raise InputError(f"{path}: not a signature of minisign: {error}") from None
    if found.number != number:
        raise InputError(f"{path}: signed with another key, number {found.number[::-1].hex()}")
    digest = hashlib.blake2b(bundle.content).digest()
    _require(path, key, found.signature, digest)
    _require(path, key, found.signature_of_all, found.signature + found.comment)
    return found.comment.decode()


def _require(path: Path, key: bytes, signature: bytes, message: bytes) -> None:
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ModuleNotFoundError as error:
        raise missing(error) or error from None
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, message)
    except (InvalidSignature, ValueError):
        raise InputError(f"{path}: not the signature of this manifest by this key") from None


def _public_key(given: str) -> tuple[bytes, bytes]:
    """Returns the number and the key in a text or a file. Raises UsageError, InputError."""
    text = given
    if len(given) < 1000 and Path(given).is_file():
        text = read_bytes(Path(given), BYTES).decode(errors="replace")
    lines = [line for line in text.splitlines() if line and not line.startswith(COMMENT)]
    try:
        start, number, key = _fields(lines[0], 32)
        if start != KEY:
            raise ValueError
    except (ValueError, IndexError):
        raise UsageError(
            f"--public-key: {given!r:.60} is neither a key of minisign nor its file"
        ) from None
    return number, key


def _parse(text: str) -> Signature:
    """Parses a signature file. Raises ValueError or IndexError if it is not one."""
    lines = text.splitlines()
    if len(lines) != 4 or not lines[0].startswith(COMMENT) or not lines[2].startswith(TRUSTED):
        raise ValueError("expected four lines")
    start, number, signature = _fields(lines[1], 64)
    if start != PREHASHED:
        raise ValueError("signed in the legacy form; sign again without -l")
    of_all = base64.b64decode(lines[3], validate=True)
    return Signature(number, signature, lines[2].removeprefix(TRUSTED).encode(), of_all)


def _fields(line: str, size: int) -> tuple[bytes, bytes, bytes]:
    """Returns the start, the key's number and the ``size`` bytes after it. Raises ValueError."""
    content = base64.b64decode(line, validate=True)
    if len(content) != len(KEY) + KEY_NUMBER + size:
        raise ValueError("a line has the wrong length")
    return content[:2], content[2:10], content[10:]
