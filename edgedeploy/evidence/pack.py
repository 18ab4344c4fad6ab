"""Writes a bundle: the archive, its manifest and its signature; the same inputs give the same bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import edgedeploy
from edgedeploy.documents import encode_json, to_builtins
from edgedeploy.errors import DocumentError, UsageError
from edgedeploy.evidence import check
from edgedeploy.evidence.gather import (
    LICENSE,
    LOCK,
    RUNNER_MEMBER,
    SBOM,
    Contents,
    PackRequest,
    Source,
    digests_of,
    gather,
    ingredients,
)
from edgedeploy.evidence.sbom import sbom
from edgedeploy.evidence.seal import key_sha256, signature
from edgedeploy.records.bundle import Bundle, BundledFile, Lock
from edgedeploy.storage import atomic_path, sha256_bytes
from edgedeploy.units import format_bytes

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

SUFFIX = ".edb.tar"
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Packed:
    """A bundle that was written.

    Attributes:
        key_sha256: of the signer's public key; "": it is not signed.
        is_sbom_checked: whether the bill of materials was checked against its schema.
    """

    path: Path
    bundle: Bundle
    sha256: str
    size_bytes: int
    key_sha256: str
    is_sbom_checked: bool


def pack(
    request: PackRequest,
    out: Path,
    key: EllipticCurvePrivateKey | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Packed:
    """Write everything that a verdict rests on into one file.

    Args:
        request: what is packed.
        out: the file; it appears whole or not at all.
        key: of the signer; None: nobody signs, and nobody can verify it.
        progress: told what happens.

    Raises:
        UsageError: there is no verdict, it is not allowed, or something that it rests on is gone.
        BackendMissing: the extra `evidence` is not installed here.
    """
    contents = gather(request)
    progress(f"packing {len(contents.members)} files of {contents.verdict.name}")
    bundle, manifest, is_checked = _manifest(request, contents)
    members: dict[str, Source] = {check.MANIFEST: manifest}
    if key is not None:
        digests = {name: one.sha256 for name, one in bundle.files.items()}
        signed = signature(bundle.name, {**digests, check.MANIFEST: sha256_bytes(manifest)}, key)
        members = {check.SIGNATURE: signed, **members}
    members |= {name: contents.members[name] for name in sorted(contents.members)}
    with atomic_path(out) as part:
        sha256, size_bytes = write_archive(part, members, bundle.files)
    progress(f"wrote {out} ({format_bytes(size_bytes)})")
    return Packed(out, bundle, sha256, size_bytes, key_sha256(key) if key is not None else "", is_checked)


def write_archive(path: Path, members: Mapping[str, Source], expected: Mapping[str, BundledFile]) -> tuple[str, int]:
    """Write members in their order; return the archive's digest and size.

    Args:
        path: the archive.
        members: name → content.
        expected: what the manifest says of them; a file that was changed since is an error.
    """
    digest, written = hashlib.sha256(), 0
    with path.open("wb") as stream:

        def put(data: bytes) -> None:
            nonlocal written
            stream.write(data)
            digest.update(data)
            written += len(data)

        for name, source in members.items():
            if isinstance(source, bytes):
                put(check.header(name, len(source)))
                put(source)
                put(bytes(check.padding(len(source))))
                continue
            promised = expected[name]
            put(check.header(name, promised.size_bytes))
            with source.open("rb") as content:
                if _copy(content, put) != promised.sha256:
                    raise DocumentError(f"{source} was changed while it was packed; pack again")
            put(bytes(check.padding(promised.size_bytes)))
        put(check.END)
    return digest.hexdigest(), written


def _copy(content: BinaryIO, put: Callable[[bytes], None]) -> str:
    digest = hashlib.sha256()
    while data := content.read(_CHUNK):
        put(data)
        digest.update(data)
    return digest.hexdigest()


def _manifest(request: PackRequest, contents: Contents) -> tuple[Bundle, bytes, bool]:
    """Add what is made of everything else: lock, bill of materials; then list it all."""
    verdict = contents.verdict
    lock = Lock(
        edgedeploy=edgedeploy.__version__, artifacts=tuple(ingredients(measured) for measured in contents.measured)
    )
    contents.add(LOCK, encode_json(lock))
    license_ = contents.members.get(LICENSE)
    told = digests_of(contents.members)
    listing = "".join(f"{sha256}  {name}\n" for name, (sha256, _) in told.items())
    document, is_checked = sbom(
        verdict,
        request.version,
        contents.measured,
        license_text=license_.read_text(encoding="utf-8", errors="replace") if isinstance(license_, Path) else "",
        content_sha256=sha256_bytes(f"{verdict.name} {request.version} {request.sequence}\n{listing}".encode()),
    )
    contents.add(SBOM, document)
    files = {
        name: BundledFile(sha256=sha256, size_bytes=size)
        for name, (sha256, size) in digests_of(contents.members).items()
    }
    bundle = Bundle(
        name=verdict.name,
        version=request.version,
        sequence=request.sequence,
        created=verdict.judged_utc,
        decision=verdict.decision,
        policy=verdict.policy,
        edgedeploy=edgedeploy.__version__,
        runner=RUNNER_MEMBER,
        cells=tuple(measured.cell for measured in contents.measured),
        absent=tuple(contents.absent),
        files=files,
    )
    data = encode_json(bundle)
    _demand_takable(bundle, data)
    return bundle, data, is_checked


def _demand_takable(bundle: Bundle, manifest: bytes) -> None:
    """Refuse to write what the verifier would not take."""
    if len(manifest) > check.MOST_JSON_BYTES:
        raise UsageError(f"the bundle's manifest would have {len(manifest)} bytes; pack fewer cells at a time")
    try:
        check.demand_files(to_builtins(bundle)["files"])
    except check.Refused as error:
        raise UsageError(f"this cannot be a bundle: {error}") from error
