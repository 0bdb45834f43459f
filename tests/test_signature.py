"""A detached signature of a bundle's manifest, in the format of minisign."""

import base64
import hashlib
import shutil
import sys

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support import sign

from vqdeploy.bundle import Bundle
from vqdeploy.proof.signature import SIGNATURE, require_signature
from vqref.errors import InputError, MachineError, UsageError

KEY = "RWSygKCY3U6mtfvPL5hE0L6WXhd8WrYgcltN4bLMw4KKVSTPe5zgm2bj"
SIGNED = b'{"a":1}\n'
BY_MINISIGN = """untrusted comment: signature from minisign secret key
RUSygKCY3U6mtcxO3N6kcM9q5mCsZjZdKXNpc5aD+eOgQMDh/bldg4vygJBLq003/iCZJ9RU3IYscOpma+pHYhy1HiZTZ/df5AI=
trusted comment: bundle of a test
jpn2U3NfOzHx9GkM3dj26TW8AI2s6ZoGuVE58Dy8z6cSIsqzb0UW5YlBVdd3c90EpQAFLhuNt6ql0r8ScqcSCA==
"""
"""Made by minisign 0.11."""

LEGACY = """untrusted comment: signature from minisign secret key
RWSygKCY3U6mtcnbrl5GNO91A0CdC+OGPK0Bh/rYe8hgigBKojMwOD8IRqCQEGISES9rOJZ2j1xNUYkf3tbZme2b4g5A6Bexegk=
trusted comment: timestamp:1795553693	file:manifest.json
dmyT/D6fYa6kA9yQA4zC+a8DRI57Shc7S/NMfvpIDrDP+uEr/5fOUMu4ENDYyvMKTFiCR6WckBaqoiCbz38ODg==
"""


def holding(folder, signature: str, content: bytes = SIGNED) -> Bundle:
    (folder / SIGNATURE).write_text(signature)
    return Bundle(folder, {}, None, None, content)


def test_a_signature_that_minisign_made_is_read(tmp_path):
    (tmp_path / "minisign.pub").write_text(f"untrusted comment: minisign public key\n{KEY}\n")
    bundle = holding(tmp_path, BY_MINISIGN)
    for key in (KEY, str(tmp_path / "minisign.pub")):
        assert require_signature(bundle, key) == "bundle of a test"


def test_another_manifest_comment_or_key_is_refused(tmp_path):
    with pytest.raises(InputError, match="not the signature of this manifest"):
        require_signature(holding(tmp_path, BY_MINISIGN, b'{"a":2}\n'), KEY)
    other = BY_MINISIGN.replace("bundle of a test", "bundle of the test")
    with pytest.raises(InputError, match="not the signature of this manifest"):
        require_signature(holding(tmp_path, other), KEY)
    key = base64.b64encode(b"Ed" + bytes(8) + bytes(range(32))).decode()
    with pytest.raises(InputError, match="signed with another key, number b5a64edd98a080b2"):
        require_signature(holding(tmp_path, BY_MINISIGN), key)


NO_SIGNATURES = {
    "empty": "",
    "cut": BY_MINISIGN[:200],
    "legacy": LEGACY,
    "not base64": BY_MINISIGN.replace("RUSy", "R%Sy"),
    "short": BY_MINISIGN.replace("RUSygKCY", "RUSy"),
}


@pytest.mark.parametrize("kind", NO_SIGNATURES)
def test_what_is_no_signature_is_refused_with_one_line(tmp_path, kind):
    with pytest.raises(InputError, match="not a signature of minisign"):
        require_signature(holding(tmp_path, NO_SIGNATURES[kind]), KEY)


def test_what_is_no_key_is_refused_and_a_missing_signature_named(tmp_path):
    bundle = holding(tmp_path, BY_MINISIGN)
    for key in ("", "RWSy", "nowhere.pub", KEY[:-4] + "%%%%"):
        with pytest.raises(UsageError, match="neither a key of minisign nor its file"):
            require_signature(bundle, key)
    (tmp_path / SIGNATURE).unlink()
    with pytest.raises(InputError, match=r"manifest\.json\.minisig: No such file"):
        require_signature(bundle, KEY)


def test_verify_refuses_a_bundle_that_was_made_anew_after_it_was_signed(
    bundle, tmp_path, run, refused
):
    folder, private = shutil.copytree(bundle, tmp_path / "b"), Ed25519PrivateKey.generate()
    digest = hashlib.blake2b((folder / "manifest.json").read_bytes()).digest()
    signature = private.sign(digest)
    lines = [
        "untrusted comment: of a test",
        base64.b64encode(b"ED" + b"12345678" + signature).decode(),
        "trusted comment: mine",
        base64.b64encode(private.sign(signature + b"mine")).decode(),
    ]
    (folder / SIGNATURE).write_text("\n".join(lines))
    key = base64.b64encode(b"Ed" + b"12345678" + private.public_key().public_bytes_raw()).decode()
    done = run("-m", "vqdeploy", "verify", folder, "--device", "cpu", "--public-key", key)
    assert done.returncode == 0, done.stderr
    sign(folder, lambda manifest: manifest["training"].update(epochs=2))
    line = refused(3, "-m", "vqdeploy", "verify", folder, "--public-key", key)
    assert "not the signature of this manifest by this key" in line


def test_without_cryptography_one_line_says_which_install_brings_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(MachineError, match=r"pip install 'portable-vqvae\[sign\]'"):
        require_signature(holding(tmp_path, BY_MINISIGN), KEY)
