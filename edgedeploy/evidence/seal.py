"""Keys and signatures of bundles: EC P-256, in the format of OpenSSF's model-signing."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedeploy.errors import BackendMissing, UsageError
from edgedeploy.evidence import check
from edgedeploy.storage import sha256_bytes

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

# A PEM file of one key; what is larger is something else.
_MOST_KEY_BYTES = 64 << 10


def new_key(path: Path, passphrase: str = "") -> tuple[Path, Path]:
    """Make a key pair: KEY.pem for the signer alone, and KEY.pub.pem for everybody; return both paths.

    Args:
        path: where the private key goes; neither file may exist.
        passphrase: encrypts it; "": it is protected by its permissions (0600) only.

    Raises:
        UsageError: a file exists.
    """
    _demand_cryptography()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    public = path.with_name(f"{path.stem}.pub{path.suffix or '.pem'}")
    for one in (path, public):
        if os.path.lexists(one):
            raise UsageError(f"{one} exists, and a key is never overwritten; name another file")
    key = ec.generate_private_key(ec.SECP256R1())
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(passphrase.encode()) if passphrase else serialization.NoEncryption(),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_new(path, secret, 0o600)
    _write_new(public, check.pem_of(_der(key)), 0o644)
    return path, public


def load_key(path: Path, passphrase: str = "") -> EllipticCurvePrivateKey:
    """Read a private key.

    Raises:
        UsageError: it is not there, is encrypted with another passphrase, or is no private EC key on P-256.
    """
    _demand_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        with path.open("rb") as stream:
            data = stream.read(_MOST_KEY_BYTES)
    except OSError as error:
        raise UsageError(f"the key {path} cannot be read: {error.strerror or error}") from error
    if b"-----BEGIN PUBLIC KEY-----" in data:
        raise UsageError(f"{path} is a public key, which verifies; sign with the private one")
    try:
        key = serialization.load_pem_private_key(data, passphrase.encode() if passphrase else None)
    except TypeError as error:
        if passphrase:
            raise UsageError(f"{path} is not encrypted; leave --passphrase out") from error
        raise UsageError(f"{path} is encrypted; say where its passphrase is, such as --passphrase prompt") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        then = "the passphrase is wrong, or the file is damaged" if passphrase else "it is no private key in PEM form"
        raise UsageError(f"{path} cannot be used to sign: {then}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise UsageError(f"{path} is a key of another kind; bundles are signed with EC keys on P-256 (--new-key)")
    return key


def is_encrypted(path: Path) -> bool:
    """Say whether a private key's file asks for a passphrase."""
    try:
        with path.open("rb") as stream:
            head = stream.read(_MOST_KEY_BYTES)
    except OSError:
        return False
    return b"-----BEGIN ENCRYPTED PRIVATE KEY-----" in head or b"Proc-Type: 4,ENCRYPTED" in head


def signature(name: str, digests: Mapping[str, str], key: EllipticCurvePrivateKey) -> bytes:
    """Return signature.json over every member of a bundle.

    The statement is that of model-signing 1.x, so that `model_signing verify key` takes the unpacked bundle. Signing is
    deterministic (RFC 6979): the same content and key give the same bytes. Where the installed OpenSSL cannot do that
    (before 3.2; the wheels of cryptography bring a newer one) the signature is another one each time, and as good.

    Args:
        name: of the release; digests: member → sha256, without the signature itself.
        key: the signer's.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    # As model-signing orders paths: part by part.
    ordered = sorted(digests, key=lambda path: path.split("/"))
    resources = [{"name": path, "algorithm": "sha256", "digest": digests[path]} for path in ordered]
    statement = {
        "_type": check.STATEMENT_TYPE,
        "subject": [
            {
                "name": name,
                "digest": {"sha256": sha256_bytes(b"".join(bytes.fromhex(digests[path]) for path in ordered))},
            }
        ],
        "predicateType": check.PREDICATE_TYPE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": [check.SIGNATURE],
            },
            "resources": resources,
        },
    }
    payload = _compact(statement)
    try:
        algorithm = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)
    except UnsupportedAlgorithm:
        algorithm = ec.ECDSA(hashes.SHA256())
    signed = key.sign(check.pae(payload), algorithm)
    return _compact(
        {
            "mediaType": check.MEDIA_TYPE,
            "verificationMaterial": {
                "publicKey": {"hint": sha256_bytes(check.pem_of(_der(key)))},
                "tlogEntries": [],
            },
            "dsseEnvelope": {
                "payload": base64.b64encode(payload).decode(),
                "payloadType": check.PAYLOAD_TYPE,
                "signatures": [{"sig": base64.b64encode(signed).decode(), "keyid": ""}],
            },
        }
    )


def key_sha256(key: EllipticCurvePrivateKey) -> str:
    """Return the digest of the public half in its DER form, by which people recognise a key."""
    return sha256_bytes(_der(key))


def _der(key: EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _compact(document: dict[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def _write_new(path: Path, data: bytes, mode: int) -> None:
    """Write a file that must not exist, readable by whom its mode says from the first moment on."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    except FileExistsError as error:
        raise UsageError(f"{path} exists, and a key is never overwritten; name another file") from error
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _demand_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise BackendMissing(
            "cryptography, which signs bundles, is not installed here; pip install 'edgedeploy[evidence]'"
        ) from error
