# ruff: noqa: PTH100, PTH101, PTH103, PTH104, PTH118, PTH120, PTH123, T201, UP006, UP035, UP045
"""Verifies a bundle with its signer's public key alone: standard library and the openssl program, Python >= 3.8.

    python3 check.py BUNDLE --key KEY.pub [--machine aarch64] [--min-sequence 7] [--extract DIR [--cell CELL]] [--json]

The exit code says it: 0 verified, 1 refused (there is evidence against it), 2 wrong usage, 3 could not be checked.

A bundle is a POSIX tar. Its first member is the signature, which is checked before anything else is believed; the
second is the manifest, whose digest was signed; and the manifest names every other member, in order, with size and
digest. So each header is known before it is read, and is compared byte for byte with the one that belongs there: a
link, a device, an extended header, another owner, a hidden name or anything else that a tar can say is none of them.
Nothing is held in memory but the manifest and the signature, and no code of a bundle is ever run.

The signature is that of OpenSSF's model-signing: a Sigstore bundle with a DSSE envelope around an in-toto statement
that lists every member except itself; `model_signing verify key` takes the unpacked bundle as it is.
"""

import argparse
import base64
import binascii
import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from typing import Any, BinaryIO, Dict, Iterable, List, NoReturn, Optional, Sequence, Set, Tuple

SIGNATURE, MANIFEST = "signature.json", "manifest.json"
FAMILY, NEWEST = "edgedeploy.bundle", 1
BLOCK = 512
# Two blocks of zeros, as POSIX demands, and nothing behind them.
END = bytes(2 * BLOCK)
# Names that mean the same on every file system, fit into the oldest header and hide nothing.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*(?:/[A-Za-z0-9_][A-Za-z0-9._+-]*)*")
MOST_NAME_BYTES = 100
MOST_MEMBERS = 4096
# What eleven octal digits can say.
MOST_MEMBER_BYTES = 8**11 - 1
MOST_BYTES = 64 << 30
MOST_JSON_BYTES = 4 << 20
# A signature of ours has nine brackets; what nests deeper or lists more was written to hurt a reader.
_SIGNATURE_BRACKETS, _MANIFEST_BRACKETS = 64, 200_000
_DIGITS = 20
_CHUNK = 1 << 20
_MOST_KEY_BYTES = 64 << 10
_OPENSSL_S = 60.0

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"
# SubjectPublicKeyInfo of an uncompressed point on P-256 (RFC 5480): all of it before the two coordinates.
_P256 = bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d03010703420004")
_OTHER_KEYS = (
    (bytes.fromhex("06092a864886f70d010101"), "an RSA key"),
    (bytes.fromhex("06092a864886f70d01010a"), "an RSA-PSS key"),
    (bytes.fromhex("06032b6570"), "an Ed25519 key"),
    (bytes.fromhex("06032b6571"), "an Ed448 key"),
    (bytes.fromhex("06072a8648ce380401"), "a DSA key"),
    (bytes.fromhex("06072a8648ce3d02010608"), "a compressed point or a damaged one on P-256"),
    (bytes.fromhex("06072a8648ce3d0201"), "an EC key on another curve"),
)
_KINDS = {
    b"\0": "a file in the way of tars before POSIX",
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"5": "a directory",
    b"6": "a FIFO",
    b"7": "a contiguous file",
    b"x": "an extended header",
    b"g": "an extended header",
    b"L": "GNU's long name",
    b"K": "GNU's long link name",
    b"S": "GNU's sparse file",
}
_COMPRESSED = (
    (b"\x1f\x8b", "gzip"),
    (b"\xfd7zXZ\0", "xz"),
    (b"BZh", "bzip2"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"PK\x03\x04", "zip"),
)


class Complaint(Exception):
    """A bundle is not taken; the text is a sentence."""

    exit_code = 1


class Refused(Complaint):
    """There is evidence against the bundle: it was changed, or it is not what was asked for."""


class Misused(Complaint):
    """What was asked for cannot be meant: a file that is not there, a key of another kind."""

    exit_code = 2


class NotChecked(Complaint):
    """Nothing was found against the bundle, and nothing for it: a means of checking is missing."""

    exit_code = 3


class Verified:
    """A bundle that holds.

    Attributes:
        path: the file; size_bytes: its length.
        manifest: manifest.json, parsed and checked as far as this program reads it.
        manifest_sha256: its digest.
        key_sha256: of the public key in its DER form.
        places: member → (offset of its first byte in the file, length, sha256).
    """

    def __init__(
        self,
        path: str,
        size_bytes: int,
        manifest: Dict[str, Any],
        manifest_sha256: str,
        key_sha256: str,
        places: Dict[str, Tuple[int, int, str]],
    ) -> None:
        self.path, self.size_bytes = path, size_bytes
        self.manifest, self.manifest_sha256 = manifest, manifest_sha256
        self.key_sha256, self.places = key_sha256, places


def header(name: str, size_bytes: int) -> bytes:
    """Return the one header that a member of this name and size may have: ustar, 0644, nobody's, from 1970."""
    fields = (
        name.encode("ascii").ljust(MOST_NAME_BYTES, b"\0"),
        b"0000644\0",
        b"0000000\0",
        b"0000000\0",
        b"%011o\0" % size_bytes,
        b"00000000000\0",
        b" " * 8,
        b"0",
        bytes(100),
        b"ustar\x0000",
        bytes(32),
        bytes(32),
        b"0000000\0",
        b"0000000\0",
        bytes(155 + 12),
    )
    block = b"".join(fields)
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def padding(size_bytes: int) -> int:
    """Return how many zeros follow a member of this size."""
    return -size_bytes % BLOCK


def name_problem(name: str) -> str:
    """Say what is wrong with a member's name; "" for nothing.

    >>> name_problem("artifacts/0a/model.onnx"), name_problem("../x")
    ('', 'leaves the bundle with ".."')
    """
    if name.startswith("/"):
        return "is absolute"
    if ".." in name.split("/"):
        return 'leaves the bundle with ".."'
    if not NAME.fullmatch(name):
        return "has characters or empty parts that no member of a bundle has"
    if len(name) > MOST_NAME_BYTES:
        return f"is longer than {MOST_NAME_BYTES} bytes"
    return ""


def verify(
    path: str,
    key: str,
    *,
    machine: str = "",
    isa: Optional[Iterable[str]] = None,
    cell: str = "",
    min_sequence: Optional[int] = None,
    openssl: str = "openssl",
) -> Verified:
    """Read a bundle once, from its first byte to its last, and return what it holds.

    Args:
        path: the bundle.
        key: the signer's public key, PEM.
        machine: `uname -m` of the device: a cell must be for it; "": any will do.
        isa: features of the device's processor; None: nobody asks.
        cell: the cell that must be there, and be for that machine.
        min_sequence: refuse a release before this one.
        openssl: the program that checks signatures.

    Raises:
        Refused: the bundle was changed, or is not what was asked for.
        Misused: a file cannot be read, or the key is of another kind.
        NotChecked: openssl is missing, or the bundle is newer than this program.
    """
    der = public_key(key)
    try:
        with open(path, "rb") as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise Misused(f"{path} is not a file")
            found = _read(_Source(stream, path, status.st_size), der, openssl)
    except OSError as error:
        raise Misused(f"{path} cannot be read: {error.strerror or error}") from error
    _demand_sequence(found, min_sequence)
    fitting(found.manifest, machine=machine, isa=isa, cell=cell)
    return found


def fitting(
    manifest: Dict[str, Any], *, machine: str = "", isa: Optional[Iterable[str]] = None, cell: str = ""
) -> List[Dict[str, Any]]:
    """Return the cells that a device can take, those for the most features first.

    Raises:
        Refused: there is none.
        Misused: no cell has this name.
    """
    cells = [one for one in manifest["cells"] if not cell or one["cell"] == cell]
    if not cells:
        known = ", ".join(_shown(one["cell"]) for one in manifest["cells"])
        raise Misused(f"the bundle has no cell {_shown(cell)} (it has: {known})")
    features = None if isa is None else set(isa)
    fits = [one for one in cells if not _misfit(one["requires"], machine, features)]
    if not fits:
        why = "; ".join(
            "{} {}".format(_shown(one["cell"]), _misfit(one["requires"], machine, features)) for one in cells
        )
        raise Refused(f"the bundle has nothing for this device: {why}")
    return sorted(fits, key=lambda one: -len(one["requires"].get("isa", ())))


def needed(one: Dict[str, Any]) -> List[str]:
    """Return the members that a cell is used with: its artifact's folder, and the device half of its runtime."""
    named = (one["artifact"], one["manifest"], one.get("golden_inputs"), one.get("golden_outputs"), one["session"])
    return [name for name in named if name]


def member(found: Verified, name: str) -> bytes:
    """Return a small member of a verified bundle, checked once more as it is read."""
    offset, size_bytes, sha256 = found.places[name]
    if size_bytes > MOST_JSON_BYTES:
        raise Refused(f"{name} is larger than a document of a bundle may be")
    with open(found.path, "rb") as stream:
        stream.seek(offset)
        data = stream.read(size_bytes)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise Refused(f"{found.path} changed while it was read")
    return data


def extract(found: Verified, names: Iterable[str], folder: str) -> List[str]:
    """Write members of a verified bundle into a new folder, under their names, and return the paths.

    Each is checked once more as it is written; the folder appears only when it is whole and on the disk.

    Raises:
        Misused: the folder exists, or cannot be made.
        Refused: the file changed since it was verified.
    """
    chosen = sorted(set(names))
    if os.path.lexists(folder):
        raise Misused(f"{folder} exists; name a folder that does not")
    try:
        parent = os.path.dirname(os.path.abspath(folder))
        work = tempfile.mkdtemp(prefix=".bundle-", dir=parent)
    except OSError as error:
        raise Misused(f"{folder} cannot be made: {error.strerror or error}") from error
    try:
        with open(found.path, "rb") as stream:
            for name in chosen:
                _write_member(found, stream, name, os.path.join(work, *name.split("/")))
        for root, _, _ in os.walk(work, topdown=False):
            _sync(root)
        os.chmod(work, 0o755)  # noqa: S103 - as a folder that somebody makes, and not as a secret one
        os.rename(work, folder)
        _sync(parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return [os.path.join(folder, *name.split("/")) for name in chosen]


def public_key(path: str) -> bytes:
    """Return the DER form of a public key on P-256.

    Raises:
        Misused: the file is not there, or holds something else; the sentence says what.
    """
    try:
        with open(path, "rb") as stream:
            text = stream.read(_MOST_KEY_BYTES + 1)
    except OSError as error:
        raise Misused(f"the key {path} cannot be read: {error.strerror or error}") from error
    if len(text) > _MOST_KEY_BYTES:
        raise Misused(f"{path} is too large to be a public key")
    if b"PRIVATE KEY-----" in text:
        raise Misused(
            f"{path} is a private key, which stays with the signer; give the public one (openssl pkey -in {path} "
            f"-pubout)"
        )
    if b"-----BEGIN CERTIFICATE" in text:
        raise Misused(f"{path} is a certificate; give the public key (openssl x509 -in {path} -noout -pubkey)")
    pem = re.search(rb"-----BEGIN PUBLIC KEY-----([A-Za-z0-9+/=\s]+)-----END PUBLIC KEY-----", text)
    if pem is None:
        raise Misused(f"{path} is no public key in PEM form (-----BEGIN PUBLIC KEY-----)")
    try:
        der = base64.b64decode(b"".join(pem[1].split()), validate=True)
    except binascii.Error:
        raise Misused(f"{path} is a damaged public key: its base64 does not decode") from None
    if der.startswith(_P256) and len(der) == len(_P256) + 64:
        return der
    kind = next((name for oid, name in _OTHER_KEYS if oid in der[:40]), "a key of an unknown kind")
    raise Misused(f"{path} is {kind}; bundles are signed with EC keys on P-256 (edgedeploy bundle --new-key)")


def pem_of(der: bytes) -> bytes:
    """Return a public key as every program writes it in PEM; its digest is model-signing's hint."""
    text = base64.b64encode(der)
    lines = [text[start : start + 64] for start in range(0, len(text), 64)]
    return b"\n".join([b"-----BEGIN PUBLIC KEY-----", *lines, b"-----END PUBLIC KEY-----", b""])


def pae(payload: bytes) -> bytes:
    """Return what is signed of a payload: DSSE's pre-authentication encoding, version 1."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def signed_digests(data: bytes, der: bytes, openssl: str = "openssl") -> Tuple[str, Dict[str, str]]:
    """Check a signature, and return the name of what it signs and the digest of each member.

    Args:
        data: signature.json.
        der: the public key.
        openssl: the program.

    Raises:
        Refused: it is not that key's signature, or signs something else.
        NotChecked: openssl cannot be run, or it is signed in a way that needs more than a key.
    """
    payload, signature = _envelope(data, der)
    if not _holds(der, signature, pae(payload), openssl):
        raise Refused("the signature is not that of this key over this content: it was changed, or signed by others")
    return _resources(_parsed(payload, "the signed statement", _MANIFEST_BRACKETS))


# ---------------------------------------------------------------- reading


class _Source:
    """A bundle's bytes, in order."""

    def __init__(self, stream: BinaryIO, path: str, size_bytes: int) -> None:
        self._stream, self.path, self.size_bytes = stream, path, size_bytes
        self.offset = 0

    def take(self, count: int, what: str) -> bytes:
        """Return exactly so many bytes."""
        data = self._stream.read(count)
        if len(data) < count:
            self._end_early(count - len(data), what)
        self.offset += count
        return data

    def digest(self, count: int, what: str) -> str:
        """Return the digest of so many bytes, of which few are held at a time."""
        digest = hashlib.sha256()
        left = count
        while left:
            data = self._stream.read(min(left, _CHUNK))
            if not data:
                self._end_early(left, what)
            digest.update(data)
            left -= len(data)
        self.offset += count
        return digest.hexdigest()

    def _end_early(self, missing: int, what: str) -> NoReturn:
        raise Refused(f"{self.path} is truncated: it ends {missing} bytes before the end of {what}")

    def left(self) -> int:
        """Return how many bytes follow."""
        return max(0, self.size_bytes - self.offset)


def _read(source: _Source, der: bytes, openssl: str) -> Verified:
    first = source.take(BLOCK, "its first header")
    for magic, kind in _COMPRESSED:
        if first.startswith(magic):
            raise Refused(f"{source.path} is compressed ({kind}), and a bundle never is")
    if first == header(MANIFEST, _declared_size(first)):
        raise Refused(f"{source.path} is not signed: it begins with its manifest")
    signature = _document(source, first, SIGNATURE)
    name, digests = signed_digests(signature, der, openssl)
    if MANIFEST not in digests:
        raise Refused(f"what was signed has no {MANIFEST}: it is no bundle")
    data = _document(source, source.take(BLOCK, "the manifest's header"), MANIFEST)
    offset = source.offset - len(data) - padding(len(data))
    manifest_sha256 = hashlib.sha256(data).hexdigest()
    if manifest_sha256 != digests[MANIFEST]:
        raise Refused(f"{MANIFEST} is not the one that was signed: its digest differs")
    manifest = _manifest(_parsed(data, MANIFEST, _MANIFEST_BRACKETS))
    if manifest["name"] != name:
        raise Refused(
            "manifest and signature disagree about the name: {} and {}".format(_shown(manifest["name"]), _shown(name))
        )
    files = manifest["files"]
    _demand_agreement(files, digests)
    places = {MANIFEST: (offset, len(data), manifest_sha256)}
    places.update(_members(source, files))
    if source.take(len(END), "its two closing blocks") != END:
        raise Refused(f"{source.path} goes on behind its last member with something that its manifest does not list")
    if source.left() or source._stream.read(1):
        raise Refused(f"something follows the end of {source.path} ({max(1, source.left())} B)")
    key_sha256 = hashlib.sha256(der).hexdigest()
    return Verified(source.path, source.offset, manifest, manifest_sha256, key_sha256, places)


def _members(source: _Source, files: Dict[str, Any]) -> Dict[str, Tuple[int, int, str]]:
    """Read every member that the manifest lists, in order, and return where each lies."""
    places: Dict[str, Tuple[int, int, str]] = {}
    for name in sorted(files):
        size_bytes, sha256 = files[name]["size_bytes"], files[name]["sha256"]
        block = source.take(BLOCK, f"the header of {name}")
        if block != header(name, size_bytes):
            _complain(block, name, size_bytes, set(files), set(places), source.left())
        places[name] = (source.offset, size_bytes, sha256)
        if source.digest(size_bytes, name) != sha256:
            raise Refused(f"{name} was changed: its digest is not the one that was signed")
        if source.take(padding(size_bytes), name).strip(b"\0"):
            raise Refused(f"something is hidden in the padding behind {name}")
    return places


def _document(source: _Source, block: bytes, name: str) -> bytes:
    """Return one of the two members whose size is not known before."""
    size_bytes = _declared_size(block)
    if block != header(name, size_bytes):
        _complain(block, name, size_bytes, {SIGNATURE, MANIFEST}, set(), source.left())
    if size_bytes > MOST_JSON_BYTES:
        raise Refused(f"{name} says that it has {size_bytes} bytes; no bundle's has more than {MOST_JSON_BYTES}")
    data = source.take(size_bytes, name)
    if source.take(padding(size_bytes), name).strip(b"\0"):
        raise Refused(f"something is hidden in the padding behind {name}")
    return data


def _declared_size(block: bytes) -> int:
    """Return the size in a header, or 0 where there is none that could be right."""
    text = block[124:135]
    return int(text, 8) if re.fullmatch(rb"[0-7]{11}", text) else 0


def _complain(block: bytes, name: str, size_bytes: int, known: Set[str], seen: Set[str], left: int) -> NoReturn:
    """Say how a header differs from the one of `name` that belongs there."""
    if not block.strip(b"\0"):
        raise Refused(f"{name} is missing: the bundle ends where it should begin")
    if block[257:262] != b"ustar" or block[148:156] != b"%06o\0 " % sum(block[:148] + b" " * 8 + block[156:]):
        raise Refused(f"the header where {name} should begin is damaged, or no header at all")
    short, _, hidden = block[:100].partition(b"\0")
    prefix = block[345:500].rstrip(b"\0")
    raw = prefix + b"/" + short if prefix else short
    found = raw.decode("ascii", "backslashreplace")
    kind = block[156:157]
    if kind != b"0":
        what = _KINDS.get(kind, "a member of unknown kind {!r}".format(kind.decode("latin-1")))
        raise Refused(f"{_shown(found)} is {what}; a bundle holds plain files only")
    if problem := name_problem(found):
        raise Refused(f"the name of member {_shown(found)} {problem}")
    if hidden.strip(b"\0"):
        raise Refused(f"something is hidden behind the name of {_shown(found)}")
    if found in seen:
        raise Refused(f"{found} is there twice")
    if found != name and found in known:
        raise Refused(f"{name} is missing, or not in its place: {found} stands there")
    if found != name:
        folded = [one for one in known if one.lower() == found.lower()]
        like = f" (it lists {folded[0]}, which some file systems take for the same)" if folded else ""
        raise Refused(f"{found} is not what the manifest lists{like}; {name} belongs there")
    declared = _declared_size(block)
    if declared > left:
        raise Refused(f"{name} says that it has {declared} bytes, more than the file goes on for")
    if declared != size_bytes:
        raise Refused(f"{name} says that it has {declared} bytes, and its manifest says {size_bytes}")
    raise Refused(f"the header of {name} says something about owner, mode or time that no bundle says")


# ---------------------------------------------------------------- signature


def _envelope(data: bytes, der: bytes) -> Tuple[bytes, bytes]:
    """Return payload and signature of a Sigstore bundle that is meant for this key."""
    document = _parsed(data, SIGNATURE, _SIGNATURE_BRACKETS)
    if json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() != data:
        raise Refused(f"{SIGNATURE} has blanks or spellings that were not there when it was written")
    _demand_keys(document, SIGNATURE, {"mediaType", "verificationMaterial", "dsseEnvelope"})
    if document["mediaType"] != MEDIA_TYPE:
        raise NotChecked(f"{SIGNATURE} is of another kind than {MEDIA_TYPE}")
    material = document["verificationMaterial"]
    if isinstance(material, dict) and ({"certificate", "x509CertificateChain"} & set(material)):
        raise NotChecked("the bundle is signed with a certificate, and this program knows keys only")
    _demand_keys(material, "verificationMaterial", {"publicKey"}, {"tlogEntries"})
    if material.get("tlogEntries", []) != []:
        raise NotChecked("the signature names a transparency log, which is not looked up here")
    _demand_keys(material["publicKey"], "publicKey", {"hint"})
    hint = material["publicKey"]["hint"]
    if hint != hashlib.sha256(pem_of(der)).hexdigest():
        raise Refused(f"the bundle is signed with another key: its hint is {_shown(hint)}")
    envelope = document["dsseEnvelope"]
    _demand_keys(envelope, "dsseEnvelope", {"payload", "payloadType", "signatures"})
    signatures = envelope["signatures"]
    if envelope["payloadType"] != PAYLOAD_TYPE or not isinstance(signatures, list) or len(signatures) != 1:
        raise Refused(f"{SIGNATURE} is not one signature of one in-toto statement")
    _demand_keys(signatures[0], "the signature", {"sig"}, {"keyid"})
    if signatures[0].get("keyid", "") != "":
        raise Refused(f"{SIGNATURE} names a key that nobody asked for")
    signature = _decoded(signatures[0]["sig"], "the signature")
    if not _is_ecdsa(signature):
        raise Refused("the signature is none that a key on P-256 can make: it was changed")
    return _decoded(envelope["payload"], "the signed statement"), signature


def _holds(der: bytes, signature: bytes, message: bytes, openssl: str) -> bool:
    """Say whether openssl takes a signature; the two versions in use, 1.1.1 and 3, say it alike."""
    program = shutil.which(openssl)
    if program is None:
        raise NotChecked(
            f"there is no program {openssl} here to check the signature with; install OpenSSL 1.1.1 or newer (apt "
            "install openssl, apk add openssl), or name it with --openssl"
        )
    with tempfile.TemporaryDirectory(prefix="edgedeploy-") as folder:
        key, sig = os.path.join(folder, "key.pem"), os.path.join(folder, "signature")
        with open(key, "wb") as stream:
            stream.write(pem_of(der))
        with open(sig, "wb") as stream:
            stream.write(signature)
        try:
            done = subprocess.run(
                [program, "dgst", "-sha256", "-verify", key, "-signature", sig],
                input=message,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=_OPENSSL_S,
                env={**os.environ, "LC_ALL": "C"},
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NotChecked(f"{program} could not check the signature: {error}") from error
    said = done.stdout.decode("utf-8", "replace").strip()
    if done.returncode == 0 and said == "Verified OK":
        return True
    if done.returncode == 1 and said.lower().startswith("verification failure"):
        return False
    raise NotChecked(f"{program} could not check the signature, and says: {_shown(said[:200])}")


def _resources(statement: Any) -> Tuple[str, Dict[str, str]]:
    """Return name and digests of a signed statement: its signer is trusted, and may have meant something else."""
    try:
        if statement["_type"] != STATEMENT_TYPE or statement["predicateType"] != PREDICATE_TYPE:
            raise Refused(f"the key signed something else than files: {_shown(statement['predicateType'])}")
        (subject,) = statement["subject"]
        predicate = statement["predicate"]
        manner = predicate["serialization"]
        if (manner["method"], manner["hash_type"], manner["allow_symlinks"]) != ("files", "sha256", False):
            raise Refused("the files are signed in another way than whole, by SHA-256, without links")
        joined = hashlib.sha256()
        digests: Dict[str, str] = {}
        for one in predicate["resources"]:
            if one["algorithm"] != "sha256" or not _is_digest(one["digest"]) or name_problem(one["name"]):
                raise Refused(f"the signed statement names a file in a way that no bundle does: {_shown(one)}")
            if one["name"] in digests:
                raise Refused(f"the signed statement names {one['name']} twice")
            digests[one["name"]] = one["digest"]
            joined.update(bytes.fromhex(one["digest"]))
        if subject["digest"]["sha256"] != joined.hexdigest():
            raise Refused("the signed statement contradicts itself: its sum is not that of its files")
        return str(subject["name"]), digests
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Refused("the signed statement is not one about files") from None


def _is_ecdsa(data: bytes) -> bool:
    """Say whether bytes are a SEQUENCE of two positive INTEGERs of at most 256 bits, in DER and in nothing else."""
    if len(data) < 8 or data[0] != 0x30 or data[1] != len(data) - 2 or len(data) > 72:
        return False
    at = 2
    for _ in range(2):
        if at + 2 > len(data) or data[at] != 0x02:
            return False
        length = data[at + 1]
        number = data[at + 2 : at + 2 + length]
        if not 1 <= length <= 33 or len(number) != length or number[0] & 0x80 or not number.strip(b"\0"):
            return False
        if length > 1 and number[0] == 0 and not number[1] & 0x80:
            return False
        at += 2 + length
    return at == len(data)


def _decoded(text: Any, what: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise Refused(f"{what} does not decode: it was changed") from None
    if base64.b64encode(data).decode() != text:
        raise Refused(f"{what} is spelt in another way than when it was written")
    return data


# ---------------------------------------------------------------- documents


def _parsed(data: bytes, what: str, brackets: int) -> Any:
    """Parse JSON that may be made to hurt: size, nesting, long numbers, a key twice."""
    if len(data) > MOST_JSON_BYTES or data.count(b"{") + data.count(b"[") > brackets:
        raise Refused(f"{what} is larger, or has more parts, than any bundle's")

    def short(text: str) -> int:
        if len(text) > _DIGITS:
            raise ValueError(f"a number of {len(text)} digits")
        return int(text)

    def real(text: str) -> float:
        if len(text) > 2 * _DIGITS:
            raise ValueError(f"a number of {len(text)} characters")
        return float(text)

    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=short,
            parse_float=real,
            parse_constant=_refuse_constant,
        )
    except (ValueError, RecursionError) as error:
        raise Refused(f"{what} cannot be read: {_shown(str(error)[:200])}") from error


def _object(pairs: Sequence[Tuple[str, Any]]) -> Dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _manifest(document: Any) -> Dict[str, Any]:
    """Return the manifest if it has what is read of it here; it is signed, so that this is about mistakes."""
    if not isinstance(document, dict) or not isinstance(document.get("format"), str):
        raise Refused(f"{MANIFEST} names no format")
    family, _, version = document["format"].partition("/")
    if family != FAMILY or not re.fullmatch(r"[0-9]{1,9}", version):
        raise Refused(f"{MANIFEST} is a document of another kind: {_shown(document['format'])}")
    if int(version) > NEWEST:
        raise NotChecked(f"the bundle is an {document['format']}, written by a newer edgedeploy; upgrade")
    wanted = {"name": str, "version": str, "sequence": int, "decision": str, "created": str, "files": dict}
    for key, kind in wanted.items():
        if not isinstance(document.get(key), kind) or isinstance(document[key], bool):
            raise Refused(f"{MANIFEST} has no proper {key}")
    demand_files(document["files"])
    if not isinstance(document.get("cells"), list) or not document["cells"]:
        raise Refused(f"{MANIFEST} lists no cells")
    for one in document["cells"]:
        _demand_cell(one, document["files"])
    return document


def demand_files(files: Dict[str, Any]) -> None:
    """Refuse a list of members that no file system could hold side by side, or that is too large."""
    if len(files) > MOST_MEMBERS:
        raise Refused(f"the bundle has {len(files)} members; {MOST_MEMBERS} are the most")
    total = 0
    for name, one in files.items():
        if problem := name_problem(name):
            raise Refused(f"the name of member {_shown(name)} {problem}")
        size_bytes = one.get("size_bytes") if isinstance(one, dict) else None
        if not isinstance(size_bytes, int) or isinstance(size_bytes, bool) or not _is_digest(one.get("sha256")):
            raise Refused(f"{MANIFEST} gives {name} no proper size and digest")
        if not 0 <= size_bytes <= MOST_MEMBER_BYTES:
            raise Refused(f"{name} has {size_bytes} bytes; {MOST_MEMBER_BYTES} are the most")
        total += size_bytes
    if total > MOST_BYTES:
        raise Refused(f"the bundle unpacks to {total} bytes; {MOST_BYTES} are the most")
    if {SIGNATURE, MANIFEST} & set(files):
        raise Refused(f"{MANIFEST} lists itself, or the signature")
    folded: Dict[str, str] = {}
    for name in sorted([*files, SIGNATURE, MANIFEST]):
        if (twin := folded.setdefault(name.lower(), name)) != name:
            raise Refused(f"{twin} and {name} are the same on some file systems")
    for name in files:
        parts = name.split("/")
        if any("/".join(parts[:count]) in files for count in range(1, len(parts))):
            raise Refused(f"{name} lies in a folder that is a file")


def _demand_cell(one: Any, files: Dict[str, Any]) -> None:
    """Check of a cell what is read here: a device is chosen by it."""
    requires = one.get("requires") if isinstance(one, dict) else None
    if not isinstance(requires, dict) or not isinstance(one.get("cell"), str):
        raise Refused(f"{MANIFEST} has a cell that says not what it needs")
    texts = [requires.get("machine", ""), one.get("target", ""), one.get("precision", ""), one.get("summary", "")]
    lists = [requires.get("isa", []), requires.get("any_isa", [])]
    words = [word for words in lists if isinstance(words, list) for word in words]
    if not all(isinstance(text, str) for text in [*texts, *words]) or not all(isinstance(it, list) for it in lists):
        raise Refused(f"{MANIFEST} says of cell {_shown(one['cell'])} nothing proper")
    for key in ("artifact", "manifest", "session", "golden_inputs", "golden_outputs"):
        name = one.get(key, "")
        if not isinstance(name, str) or (name and name not in files) or not (name or key.startswith("golden")):
            raise Refused(f"cell {_shown(one['cell'])} names as its {key} what is not in the bundle")


def _demand_agreement(files: Dict[str, Any], digests: Dict[str, str]) -> None:
    listed = {name: one["sha256"] for name, one in files.items()}
    signed = {name: digest for name, digest in digests.items() if name != MANIFEST}
    differing = sorted(name for name in set(listed) | set(signed) if listed.get(name) != signed.get(name))
    if differing:
        raise Refused(f"manifest and signature disagree about {differing[0]}")


def _demand_sequence(found: Verified, least: Optional[int]) -> None:
    has = found.manifest["sequence"]
    if least is not None and has < least:
        raise Refused(f"the bundle is older than allowed: its sequence is {has}, and at least {least} is demanded")


def _demand_keys(found: Any, what: str, required: Set[str], optional: Iterable[str] = ()) -> None:
    if not isinstance(found, dict) or not required <= set(found) <= required | set(optional):
        raise Refused(f"{what} does not have the parts that one of a bundle has")


def _misfit(requires: Dict[str, Any], machine: str, isa: Optional[Set[str]]) -> str:
    """Say why a device cannot take a cell; "" where it can."""
    wanted = requires.get("machine", "")
    if machine and wanted and wanted != machine:
        return f"is for {wanted}, not for {machine}"
    if isa is None:
        return ""
    lacking = [one for one in requires.get("isa", ()) if one not in isa]
    if lacking:
        return f"needs a processor with {', '.join(lacking)}"
    options = requires.get("any_isa", ())
    if options and not isa.intersection(options):
        return f"needs a processor with one of {', '.join(options)}"
    return ""


def _is_digest(text: Any) -> bool:
    return isinstance(text, str) and re.fullmatch(r"[0-9a-f]{64}", text) is not None


def _shown(text: Any) -> str:
    """Return a word of a stranger's so that it cannot move a terminal's cursor."""
    return ascii(text)[:300]


# ---------------------------------------------------------------- writing


def _write_member(found: Verified, stream: BinaryIO, name: str, path: str) -> None:
    offset, size_bytes, sha256 = found.places[name]
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    stream.seek(offset)
    digest = hashlib.sha256()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o644)
    with os.fdopen(descriptor, "wb") as out:
        left = size_bytes
        while left:
            data = stream.read(min(left, _CHUNK))
            if not data:
                break
            digest.update(data)
            out.write(data)
            left -= len(data)
        out.flush()
        os.fsync(out.fileno())
    if digest.hexdigest() != sha256:
        raise Refused(f"{found.path} changed while it was unpacked")


def _sync(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot do it for folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------- command line


def report(found: Verified, cells: Sequence[Dict[str, Any]]) -> Dict[str, Any]:
    """Return what is told of a verified bundle."""
    manifest = found.manifest
    return {
        "format": "edgedeploy.check/1",
        "verified": True,
        "bundle": found.path,
        "name": manifest["name"],
        "version": manifest["version"],
        "sequence": manifest["sequence"],
        "decision": manifest["decision"],
        "created": manifest["created"],
        "key_sha256": found.key_sha256,
        "manifest_sha256": found.manifest_sha256,
        "cells": [
            {
                "cell": one["cell"],
                "role": one.get("role", "candidate"),
                "target": one.get("target", ""),
                "precision": one.get("precision", ""),
                "requires": one["requires"],
                "artifact": one["artifact"],
                "sha256": manifest["files"][one["artifact"]]["sha256"],
                "needed": needed(one),
                "summary": one.get("summary", ""),
            }
            for one in cells
        ],
    }


def _text(told: Dict[str, Any]) -> str:
    lines = [
        f"{told['bundle']}: verified",
        f"  {told['name']} {told['version']}, sequence {told['sequence']}",
        f"  {told['decision']}, judged {told['created']}",
        f"  signed with the key {told['key_sha256']}",
    ]
    for one in told["cells"]:
        where = one["requires"].get("machine") or "any machine"
        lines.append(f"  {one['cell']}: {one['target']} {one['precision']}, {where}")
        lines += [f"    {one['summary']}"] if one["summary"] else []
    return "\n".join(_plain(line) for line in lines)


def _plain(text: str) -> str:
    return "".join(one if one.isprintable() else "?" for one in text)[:300]


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="check.py",
        description="Verify an evidence bundle with its signer's public key alone.",
        epilog="Exit codes: 0 verified, 1 refused, 2 wrong usage, 3 could not be checked.",
    )
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("--key", required=True, metavar="KEY.pub", help="the signer's public key, PEM")
    parser.add_argument("--machine", default="", help="a cell must be for it, as uname -m says")
    parser.add_argument("--isa", metavar="A,B", help="features of the processor, as /proc/cpuinfo spells them")
    parser.add_argument("--cell", default="", help="the cell that is wanted")
    parser.add_argument("--min-sequence", type=int, metavar="N", help="refuse a release before this one")
    parser.add_argument(
        "--extract", default="", metavar="DIR", help="then unpack into this new folder; with --cell, only that"
    )
    parser.add_argument("--openssl", default="openssl", metavar="PROGRAM")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    given = parser.parse_args(arguments)
    try:
        isa = None if given.isa is None else [one for one in given.isa.split(",") if one]
        found = verify(
            given.bundle,
            given.key,
            machine=given.machine,
            isa=isa,
            cell=given.cell,
            min_sequence=given.min_sequence,
            openssl=given.openssl,
        )
        cells = fitting(found.manifest, machine=given.machine, isa=isa, cell=given.cell)
        told = report(found, cells)
        if given.extract:
            names = [*needed(cells[0]), MANIFEST] if given.cell else list(found.places)
            told["extracted"] = extract(found, names, given.extract)
    except (Complaint, OSError) as error:
        code = error.exit_code if isinstance(error, Complaint) else NotChecked.exit_code
        word = {1: "refused", 2: "cannot be asked", 3: "not checked"}[code]
        if given.json:
            told = {"format": "edgedeploy.check/1", "verified": False, "outcome": word, "reason": str(error)}
            print(json.dumps(told, indent=1))
        print(f"{_plain(given.bundle)}: {word}: {error}", file=sys.stderr)
        return code
    print(json.dumps(told, indent=1) if given.json else _text(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
