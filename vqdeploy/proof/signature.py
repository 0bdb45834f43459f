"""Who made a bundle: a detached signature of its manifest in the format of minisign
(https://jedisct1.github.io/minisign/), made by that tool or another of its format.

    minisign -G                               # once: a key pair
    minisign -Sm model-onnx/manifest.json     # writes manifest.json.minisig beside it
    python -m vqdeploy verify model-onnx --public-key minisign.pub

The manifest holds the digests of all other files, so that its signature covers them.
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
"""Its name in a bundle; the manifest does not list it, for it speaks of the manifest."""

BYTES = 2**16
"""The largest file of a key or a signature that is read."""

KEY, PREHASHED, KEY_NUMBER = b"Ed", b"ED", 8
"""How a public key and a signature begin, and the bytes of the key's number that follow."""

COMMENT, TRUSTED = "untrusted comment:", "trusted comment: "


class Signature(NamedTuple):
    """What a signature file says: the number of its key, the signature of the file's BLAKE2b, a
    comment, and the signature of both."""

    number: bytes
    signature: bytes
    comment: bytes
    signature_of_all: bytes


def require_signature(bundle: Bundle, public_key: str) -> str:
    """Holds the manifest that was read to SIGNATURE in the bundle. Returns the comment that was
    signed with it.

    public_key: of minisign: the text of a key or the name of its file.
    Raises UsageError for what is no key, InputError for a signature that is missing, damaged, or of
    another key or manifest, MachineError if ``cryptography`` is not installed.
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
    """The number and the key in a text or a file. Raises UsageError, InputError."""
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
    """Raises ValueError or IndexError for what is no signature."""
    lines = text.splitlines()
    if len(lines) != 4 or not lines[0].startswith(COMMENT) or not lines[2].startswith(TRUSTED):
        raise ValueError("expected four lines")
    start, number, signature = _fields(lines[1], 64)
    if start != PREHASHED:
        raise ValueError("signed in the legacy form; sign again without -l")
    of_all = base64.b64decode(lines[3], validate=True)
    return Signature(number, signature, lines[2].removeprefix(TRUSTED).encode(), of_all)


def _fields(line: str, size: int) -> tuple[bytes, bytes, bytes]:
    """The start, the key's number and ``size`` further bytes of a line. Raises ValueError."""
    content = base64.b64decode(line, validate=True)
    if len(content) != len(KEY) + KEY_NUMBER + size:
        raise ValueError("a line of another length")
    return content[:2], content[2:10], content[10:]
