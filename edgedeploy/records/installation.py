"""What is installed on a device, what came of installing and of checking a bundle there, and of building it again."""

from __future__ import annotations

from typing import Literal

from edgedeploy.documents import Record
from edgedeploy.records.model import Fidelity


class InstalledRelease(Record, frozen=True, kw_only=True):
    """One release in a slot of a device.

    Attributes:
        release: its folder's name, "<sequence>-<start of the bundle's digest>".
        bundle, version, sequence, cell: what the bundle says.
        file: the model's, in the release's folder.
        sha256: of that file.
        manifest_sha256: of the manifest of the bundle that it came in, which is the bundle's identity.
        size_bytes: of everything in the folder.
    """

    release: str
    bundle: str
    version: str
    sequence: int
    cell: str
    file: str
    sha256: str
    manifest_sha256: str
    size_bytes: int = 0


class InstalledSlot(Record, frozen=True, kw_only=True):
    """What one application of a device uses.

    Attributes:
        path: of the slot's folder on the device; `current` in it names the release that is used.
        used: the release that is used; previous: the one that `rollback` goes back to. "": none.
        problem: why it is not known which one is used; "" where it is.
    """

    slot: str
    path: str
    used: str
    previous: str
    releases: tuple[InstalledRelease, ...]
    problem: str = ""


class CellReplay(Record, frozen=True, kw_only=True):
    """A bundle's cell on a device.

    Attributes:
        cell: its name in the bundle.
        golden: how its answers to the golden inputs compare there; None where they were not asked for.
        note: why not; "" where they were.
    """

    cell: str
    golden: Fidelity | None = None
    note: str = ""


class Installation(Record, frozen=True, kw_only=True):
    """What `install` did.

    Attributes:
        installed: the release that is used now.
        path: of the slot's folder on the device.
        replaced: the release that was used before, which `rollback` goes back to; "": none.
        is_new: whether it was not used before.
        replay: its answers to the golden inputs on the device.
    """

    device: str
    slot: str
    path: str
    installed: InstalledRelease
    replaced: str
    is_new: bool
    replay: CellReplay


class RolledBack(Record, frozen=True, kw_only=True):
    """What `rollback` did: `used` is used now, `left` was before."""

    device: str
    slot: str
    used: InstalledRelease
    left: InstalledRelease


class BundleOnDevice(Record, frozen=True, kw_only=True):
    """A bundle that a device has checked by itself.

    Attributes:
        machine: the device's, as it says.
        cells: of the bundle that are for this device.
        unfit: of the others, "cell: why it is not for this device".
        seconds: of checking there, sending apart.
    """

    device: str
    machine: str
    bundle: str
    version: str
    sequence: int
    cells: tuple[CellReplay, ...]
    unfit: tuple[str, ...]
    seconds: float


# "identical": the same bytes; "equal": other bytes whose answers to the golden inputs agree within what the golden
# comparison allows; "same kit": of what is built on a device, its kit; "differs": none of these; "not built": its note
# says why.
Sameness = Literal["identical", "equal", "same kit", "differs", "not built"]


class ReproducedCell(Record, frozen=True, kw_only=True):
    """One artifact of a bundle beside what its recipe makes today.

    Attributes:
        artifact: its name.
        then_sha256, now_sha256: of both files; "" where nothing was built.
        largest: the largest difference of their answers to the golden inputs; None where they were not compared.
        unit: what `largest` counts: "LSB" (steps of the output's grid) or "of the largest value".
        changes: what differs between the recipe then and now, "package: version then, version now".
        note: why it is no better than it is; "" where there is nothing to say.
    """

    cell: str
    artifact: str
    state: Sameness
    then_sha256: str
    now_sha256: str = ""
    largest: float | None = None
    unit: str = ""
    changes: tuple[str, ...] = ()
    note: str = ""


class Reproduction(Record, frozen=True, kw_only=True):
    """A bundle built again: `is_reproduced` when no artifact differs and all could be built."""

    bundle: str
    version: str
    release: str
    cells: tuple[ReproducedCell, ...]
    is_reproduced: bool
