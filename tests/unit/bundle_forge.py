"""Bundles made by hand, sound or forged: every way to write one wrongly, with or without the signer's key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from edgedeploy.evidence import check, seal

FOLDER = "artifacts/00112233445566aa"
FILES = {
    f"{FOLDER}/golden-inputs.safetensors": b"in" * 40,
    f"{FOLDER}/golden-outputs.safetensors": b"out" * 30,
    f"{FOLDER}/manifest.json": b"{}\n",
    f"{FOLDER}/model.onnx": bytes(range(256)) * 5,
    "card/LICENSE": b"as you like\n",
    "evidence/verdict.json": b'{"decision": "PASS"}\n',
    "runner/edgedeploy_runner.py": b"",
    "sessions/onnxruntime.py": b"import os\n" * 52,  # 520 bytes: one block and a little
}


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def cell(name: str = "int8", **changes: Any) -> dict[str, Any]:
    return {
        "cell": name,
        "target": "raspberry-pi-5",
        "precision": "int8",
        "requires": {"machine": "aarch64", "isa": ["asimd", "asimddp"], "any_isa": []},
        "artifact": f"{FOLDER}/model.onnx",
        "manifest": f"{FOLDER}/manifest.json",
        "golden_inputs": f"{FOLDER}/golden-inputs.safetensors",
        "golden_outputs": f"{FOLDER}/golden-outputs.safetensors",
        "session": "sessions/onnxruntime.py",
        "summary": "latency p50 -31.20 % [-33.10 %, -29.40 %], margin +5%: PASS",
        **changes,
    }


def manifest(members: Mapping[str, bytes], **changes: Any) -> dict[str, Any]:
    return {
        "format": "edgedeploy.bundle/1",
        "name": "demo",
        "version": "1.4.0",
        "sequence": 7,
        "created": "2026-11-22T09:14:05Z",
        "decision": "PASS",
        "cells": [cell()],
        "files": {name: {"sha256": sha256(data), "size_bytes": len(data)} for name, data in sorted(members.items())},
        **changes,
    }


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def member(name: str, data: bytes, header: bytes | None = None) -> bytes:
    return (header or check.header(name, len(data))) + data + bytes(check.padding(len(data)))


def retyped(block: bytes, **fields: Any) -> bytes:
    """Return a header with other fields and a right checksum."""
    places = {"name": (0, 100), "mode": (100, 8), "uid": (108, 8), "size": (124, 12), "mtime": (136, 12)}
    places |= {"type": (156, 1), "link": (157, 100), "uname": (265, 32), "prefix": (345, 155)}
    data = bytearray(block)
    for key, value in fields.items():
        start, length = places[key]
        data[start : start + length] = value.ljust(length, b"\0")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data)
    return bytes(data)


@dataclass
class Forge:
    """A bundle that can be wrong at any one place.

    Attributes:
        signs: what is signed, given the digests of all members; None: nothing.
        digests: what the signed statement says instead of the truth.
        changed: what becomes of the archive's parts, a list of bytes: signature, manifest, members, end.
    """

    key: ec.EllipticCurvePrivateKey
    files: dict[str, bytes] = field(default_factory=lambda: dict(FILES))
    manifest: dict[str, Any] = field(default_factory=dict)
    raw_manifest: bytes | None = None
    digests: dict[str, str | None] = field(default_factory=dict)
    signature: Callable[[bytes], bytes] = lambda data: data
    changed: Callable[[list[bytes]], list[bytes]] = lambda parts: parts

    def bytes(self) -> bytes:
        document = manifest(self.files, **self.manifest)
        data = self.raw_manifest if self.raw_manifest is not None else json.dumps(document).encode()
        truth = {name: one["sha256"] for name, one in document["files"].items()}
        said = {**truth, check.MANIFEST: sha256(data), **self.digests}
        signed = seal.signature(document["name"], {name: one for name, one in said.items() if one}, self.key)
        parts = [
            member(check.SIGNATURE, self.signature(signed)),
            member(check.MANIFEST, data),
            *(member(name, self.files[name]) for name in sorted(self.files)),
            check.END,
        ]
        return b"".join(self.changed(parts))

    def write(self, folder: Path) -> Path:
        path = folder / "forged.edb.tar"
        path.write_bytes(self.bytes())
        return path
