"""Signed bundles for tests, from artifact folders alone: whatever version, machine and members a test needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgedeploy import golden, installing
from edgedeploy.backends import session_file
from edgedeploy.build import MANIFEST, load_artifact
from edgedeploy.documents import encode_json
from edgedeploy.evidence import check
from edgedeploy.evidence.gather import Source, digests_of
from edgedeploy.evidence.pack import write_archive
from edgedeploy.evidence.seal import load_key, signature
from edgedeploy.records.bundle import Bundle, BundledCell, BundledFile, DeviceDemand, RuntimeDemand
from edgedeploy.records.verdict import Policy
from edgedeploy.storage import sha256_bytes

KEEP: Callable[[Bundle], Bundle] = lambda bundle: bundle  # noqa: E731 - a default with a name


def bundle_of(
    artifacts: Mapping[str, Path],
    key: Path,
    out: Path,
    *,
    version: str = "1.0.0",
    sequence: int = 1,
    machine: str = "",
    isa: Mapping[str, tuple[str, ...]] | None = None,
    versions: str = "",
    extra: Mapping[str, bytes] | None = None,
    changed: Callable[[Bundle], Bundle] = KEEP,
) -> Path:
    """Write a bundle.

    Args:
        artifacts: cell → folder that `compile` wrote.
        key: the signer's private key.
        out: the file.
        machine, versions: that every cell demands; isa: cell → processor features.
        extra: further members.
        changed: what becomes of the manifest before it is signed.
    """
    members: dict[str, Source] = dict(extra or {})
    cells = [
        _cell(members, name, folder, machine, (isa or {}).get(name, ()), versions) for name, folder in artifacts.items()
    ]
    files = {name: BundledFile(sha256=sha256, size_bytes=size) for name, (sha256, size) in digests_of(members).items()}
    bundle = changed(
        Bundle(
            name="tiny",
            version=version,
            sequence=sequence,
            created="2026-11-22T00:00:00Z",
            decision="PASS",
            policy=Policy(margins={}),
            edgedeploy="0",
            runner=cells[0].session,
            cells=tuple(cells),
            files=files,
        )
    )
    manifest = encode_json(bundle)
    digests = {**{name: one.sha256 for name, one in bundle.files.items()}, check.MANIFEST: sha256_bytes(manifest)}
    signed = signature(bundle.name, digests, load_key(key))
    ordered = {check.SIGNATURE: signed, check.MANIFEST: manifest, **{name: members[name] for name in sorted(members)}}
    write_archive(out, ordered, bundle.files)
    return out


def _cell(
    members: dict[str, Source], name: str, folder: Path, machine: str, isa: tuple[str, ...], versions: str
) -> BundledCell:
    artifact = load_artifact(folder).artifact
    inside = f"artifacts/{artifact.sha256[:16]}-{artifact.key[:8]}"
    names = [artifact.file, MANIFEST, *([golden.INPUTS, golden.OUTPUTS] if artifact.golden else [])]
    members |= {f"{inside}/{one}": folder / one for one in names}
    backend = artifact.recipe.backend
    members[f"sessions/{backend}.py"] = session_file(backend)
    return BundledCell(
        cell=name,
        model=artifact.recipe.model,
        target=artifact.recipe.target,
        precision=artifact.recipe.precision,
        device="local",
        requires=DeviceDemand(
            machine=machine, isa=isa, backend=backend, runtime=RuntimeDemand(name=backend, versions=versions)
        ),
        artifact=f"{inside}/{artifact.file}",
        manifest=f"{inside}/{MANIFEST}",
        sha256=artifact.sha256,
        golden_inputs=f"{inside}/{golden.INPUTS}" if artifact.golden else "",
        golden_outputs=f"{inside}/{golden.OUTPUTS}" if artifact.golden else "",
        session=f"sessions/{backend}.py",
        run="",
        inputs=artifact.inputs,
        outputs=artifact.outputs,
    )


def with_cells(**changes: Any) -> Callable[[Bundle], Bundle]:
    """Return what changes every cell of a manifest."""
    return lambda bundle: msgspec.structs.replace(
        bundle, cells=tuple(msgspec.structs.replace(cell, **changes) for cell in bundle.cells)
    )


def forged(genuine: Path, at: bytes, out: Path) -> Path:
    """Write a bundle in which one bit is another one, where these bytes are found last."""
    data = bytearray(genuine.read_bytes())
    data[data.rindex(at)] ^= 1
    out.write_bytes(bytes(data))
    return out


def believe(patch: pytest.MonkeyPatch, genuine: Path, path: Path) -> None:
    """Have this machine take a bundle for the one that it was forged from, so that the device is asked alone."""

    def instead(bundle: Path) -> Path:
        return genuine if bundle == path else bundle

    run_check, read_member = installing._run_check, installing.read_member
    patch.setattr(installing, "_run_check", lambda bundle, *rest: run_check(instead(bundle), *rest))
    patch.setattr(installing, "read_member", lambda bundle, *rest: read_member(instead(bundle), *rest))
