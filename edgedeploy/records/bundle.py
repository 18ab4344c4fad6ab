"""An evidence bundle's manifest: what it holds, for which devices, and what was decided about it."""

from __future__ import annotations

from typing import Literal

from edgedeploy.documents import Record
from edgedeploy.records.artifact import Fingerprint
from edgedeploy.records.model import Fidelity, TensorSpec
from edgedeploy.records.target import Precision
from edgedeploy.records.verdict import Decision, Policy

# History of edgedeploy.bundle:
#   1 (0.2.0)  first version
FORMAT = "edgedeploy.bundle/1"

# History of edgedeploy.lock:
#   1 (0.2.0)  first version
LOCK_FORMAT = "edgedeploy.lock/1"


class BundledFile(Record, frozen=True, kw_only=True):
    """One member of the archive."""

    sha256: str
    size_bytes: int


class RuntimeDemand(Record, frozen=True, kw_only=True):
    """The runtime that an artifact was measured on, and which versions its evidence is taken to hold for.

    Attributes:
        name: as the device half calls it, "onnxruntime".
        measured: its version there; "" where it does not say.
        versions: ">=1.23.2,<2", or "==10.3.0" for an artifact that is tied to its version; "": any.
    """

    name: str
    measured: str = ""
    versions: str = ""


class DeviceDemand(Record, frozen=True, kw_only=True):
    """What a device must be, for an artifact to be installed on it.

    Attributes:
        machine: as `uname -m` says it; "": any.
        isa: features that its processor must have, as /proc/cpuinfo spells them; any_isa: of these, at least one.
        fingerprint: GPU and versions that the artifact is tied to; None where it is tied to none.
    """

    machine: str
    isa: tuple[str, ...] = ()
    any_isa: tuple[str, ...] = ()
    backend: str
    runtime: RuntimeDemand
    fingerprint: Fingerprint | None = None


class BundledCell(Record, frozen=True, kw_only=True):
    """One artifact of the release. Every path is a member of the archive.

    Attributes:
        role: a baseline is there to be compared with, not to be installed.
        decision: of the gate on this cell; None for a baseline.
        device: that it was measured on.
        artifact: the binary; manifest: its manifest.json, in the same folder.
        sha256: of the binary.
        golden_inputs, golden_outputs: "" where the runtime computes nothing.
        session: the device half that it was measured with.
        run: the raw measurement.
        inputs, outputs: the contract that an application programs against.
        summary: the finding that a reader looks at first, in words.
    """

    cell: str
    role: Literal["candidate", "baseline"] = "candidate"
    baseline_cell: str = ""
    decision: Decision | None = None
    model: str
    target: str
    precision: Precision
    device: str
    requires: DeviceDemand
    artifact: str
    manifest: str
    sha256: str
    golden_inputs: str = ""
    golden_outputs: str = ""
    session: str
    run: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    summary: str = ""


class Bundle(Record, frozen=True, kw_only=True):
    """manifest.json of a bundle: everything that a device or a person needs to choose and to check.

    Attributes:
        version: of the release, as its maker calls it.
        sequence: grows with each release, so that a device can refuse an older one.
        created: when the verdict was judged; packing knows no clock.
        edgedeploy: version that packed it.
        runner: the device half that drives sessions.
        absent: what a reader might look for and does not find, each with the reason.
        files: every member except this one and the signature.
    """

    format: str = FORMAT
    name: str
    version: str
    sequence: int
    created: str
    decision: Decision
    policy: Policy
    edgedeploy: str
    runner: str
    cells: tuple[BundledCell, ...]
    absent: tuple[str, ...] = ()
    files: dict[str, BundledFile]


class Ingredients(Record, frozen=True, kw_only=True):
    """What one artifact was made from and judged on, by digest, and by which versions of which tools.

    Attributes:
        key: digest of the recipe, which stands in the artifact's own manifest.
        toolchain: package → version of everything that touched the bytes.
    """

    cell: str
    key: str
    model: str
    model_sha256: str
    weights_sha256: str
    calibration: str
    calibration_sha256: str
    evaluation: str
    evaluation_sha256: str
    target: str
    target_sha256: str
    toolchain: dict[str, str]


class Lock(Record, frozen=True, kw_only=True):
    """evidence/lock.json: what is needed to make every artifact of the bundle again."""

    format: str = LOCK_FORMAT
    edgedeploy: str
    artifacts: tuple[Ingredients, ...]


class Replay(Record, frozen=True, kw_only=True):
    """A cell's artifact asked for its golden answers once more.

    Attributes:
        fidelity: its answers beside the golden ones; None where it was not asked.
        reason: why it was not asked.
    """

    cell: str
    fidelity: Fidelity | None = None
    reason: str = ""


class BundleVerification(Record, frozen=True, kw_only=True):
    """What verifying a bundle showed; one that does not verify is an error instead.

    Attributes:
        key_sha256: of the signer's public key (its DER form).
        manifest_sha256: of manifest.json, which is the bundle's identity: every other byte follows from it.
        machine: that at least one cell had to be for; "" where nobody asked.
        session_differs: back ends whose installed device half is not the one of the bundle.
        is_rejudged: whether the verdict was judged again from the raw runs in the bundle, and came out the same.
        not_rejudged: why it was not; "" where it was.
    """

    file: str
    size_bytes: int
    key_sha256: str
    manifest_sha256: str
    bundle: Bundle
    machine: str = ""
    replays: tuple[Replay, ...] = ()
    session_differs: tuple[str, ...] = ()
    is_rejudged: bool = False
    not_rejudged: str = ""
