"""Wheels made by hand, byte for byte: right ones, and ones that are wrong in a chosen way."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path


def record_line(name: str, data: bytes) -> str:
    """Return a file's line of RECORD."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(data)}"


def write_wheel(
    folder: Path,
    name: str,
    version: str,
    files: Mapping[str, bytes],
    *,
    tag: str = "py3-none-any",
    requires: Sequence[str] = (),
    unsigned: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a wheel (PyPA binary distribution format).

    Args:
        folder: where; it is made.
        name: of the distribution; version: its.
        files: by name, all in RECORD.
        tag: of the file's name.
        requires: what it depends on.
        unsigned: files that RECORD does not name, or whose bytes are others than RECORD says.
    """
    folder.mkdir(exist_ok=True)
    stem = f"{name.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    demands = "".join(f"Requires-Dist: {one}\n" for one in requires)
    whole = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{demands}".encode(),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n".encode(),
    }
    record = "".join(f"{record_line(one, data)}\n" for one, data in whole.items()) + f"{info}/RECORD,,\n"
    path = folder / f"{stem}-{tag}.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for one, data in {**whole, f"{info}/RECORD": record.encode(), **(unsigned or {})}.items():
            archive.writestr(one, data)
    return path
