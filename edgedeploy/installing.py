"""A bundle's artifact in place on a device: checked here and there, replayed there, switched to in one step, and back.

The device checks by itself, with the program that we bring (`evidence/check.py`), never with one from the bundle. What
it unpacked has a folder of its own beside the one that is used; only when it answers its golden inputs is it switched
to.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from edgedeploy import golden
from edgedeploy.backends import device_runtimes, session_file, session_options
from edgedeploy.build import MANIFEST, Built, load_artifact
from edgedeploy.documents import closest
from edgedeploy.errors import BundleRefused, DeviceError, DocumentError, ToolchainError, UsageError, VisitFailed
from edgedeploy.lab import answers, provision
from edgedeploy.lab.bundle import connect, ship
from edgedeploy.lab.conversation import Agent
from edgedeploy.lab.inventory import device as device_of
from edgedeploy.lab.inventory import lab_path, load_lab, open_transport
from edgedeploy.lab.provision import Installed, version_key
from edgedeploy.lab.transport import Transport
from edgedeploy.lab.visits import Side
from edgedeploy.records.bundle import Bundle, BundledCell
from edgedeploy.records.device import Device, DeviceFacts
from edgedeploy.records.installation import (
    BundleOnDevice,
    CellReplay,
    Installation,
    InstalledRelease,
    InstalledSlot,
    RolledBack,
)
from edgedeploy.storage import sha256_bytes, sha256_file
from edgedeploy.units import format_bytes

Progress = Callable[[str], None]

# The program that checks bundles, here and on devices.
CHECK = Path(__file__).parent / "evidence" / "check.py"
SLOT = "default"
# Unpacking and hashing hundreds of megabytes on a slow card, and starting a Python there.
_CHECK_TIMEOUT_S = 1800.0
# Of a bundle's manifest; the demo's has 10 KiB.
_MANIFEST_BYTES = 16 << 20
# The bundle's manifest, the receipt, folders.
_SPARE_BYTES = 20 << 20
# How the program ends.
_REFUSED, _MISUSED = 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class InstallRequest:
    """What is installed where.

    Attributes:
        bundle, key: files; the key is the signer's public one.
        device_name: in the inventory; device: its entry.
        cell: "": the one of the bundle's that fits the device best.
        slot: what an application of the device finds its model by.
        min_sequence: the oldest release that is taken.
        allow_downgrade: take one that is older than what is installed.
        wait_s: how long to queue for a device that somebody else holds.
    """

    bundle: Path
    key: Path
    device_name: str
    device: Device
    cell: str = ""
    slot: str = SLOT
    min_sequence: int = 0
    allow_downgrade: bool = False
    wait_s: float = 0.0


class _Release(msgspec.Struct, frozen=True):
    """A release as a device tells of it."""

    release: answers.Text
    bundle: answers.Text
    version: answers.Text
    sequence: answers.Count
    cell: answers.Text
    file: answers.Text
    sha256: answers.Text
    manifest_sha256: answers.Text
    size_bytes: answers.Count = 0


class _Slot(msgspec.Struct, frozen=True):
    """A slot as a device tells of it."""

    slot: answers.Text
    path: answers.Text
    used: Annotated[tuple[answers.Text, ...], msgspec.Meta(max_length=2)]
    problem: answers.Text
    releases: Annotated[tuple[_Release, ...], msgspec.Meta(max_length=1000)]


class _Placed(msgspec.Struct, frozen=True):
    slots: Annotated[tuple[_Slot, ...], msgspec.Meta(max_length=1000)]


class _Switched(msgspec.Struct, frozen=True):
    used: Annotated[tuple[answers.Text, ...], msgspec.Meta(min_length=1, max_length=2)]
    left: answers.Text = ""


# ---------------------------------------------------------------- the verbs


def install(request: InstallRequest, progress: Progress) -> Installation:
    """Put a bundle's artifact for a device in place there.

    Until it is switched to, which is one step, what is installed stays what it is, whatever fails and whenever the
    power goes. What was used before is kept for `rollback`, older releases are deleted.

    Raises:
        BundleRefused: there is evidence against the bundle, by this machine's check or by the device's.
        UsageError: no cell of it is for the device, several are, or it is older than what is installed.
        FidelityError: its answers on the device are not its golden ones; nothing was switched.
        DeviceError: the device cannot be reached, cannot check the bundle, or has no room for it.
    """
    bundle = check_here(request.bundle, request.key, min_sequence=request.min_sequence)
    with _reached(request.device_name, request.device, request.wait_s, progress) as (agent, transport):
        site = _Site(
            request.bundle, request.key, bundle, request.device_name, request.device, agent, transport, progress
        )
        before = _slots(agent).get(request.slot)
        _demand_newer(request, bundle, before)
        cell = site.choose(request.cell)
        with _unpacked_here(request.bundle, request.key, cell) as built:
            progress(f"{request.device_name}: sending {bundle.name} {bundle.version}")
            sent = site.ship()
            site.demand_room(cell)
            progress(f"{request.device_name}: checking it there, and unpacking {cell.cell}")
            placed = _release_of(
                site.ask("place", cell, built, slot=request.slot, min_sequence=request.min_sequence,
                         allow_downgrade=request.allow_downgrade),
                agent,
                "place",
            )  # fmt: skip
            used = before.used if before else ""
            try:
                replay = site.replay(cell, built)
            except BaseException:
                _withdraw(agent, request.slot, placed.release, before)
                raise
        progress(f"{request.device_name}: switching {request.slot} to {placed.release}")
        answer = agent.ask("switch", slot=request.slot, release=placed.release)
        answers.read(answer, _Switched, agent.label, "switch")
        now = _slots(agent)[request.slot]
        transport.remove(f"{agent.root}/objects/{sent}")  # what it held lies unpacked
        return Installation(
            device=request.device_name,
            slot=request.slot,
            path=now.path,
            installed=_named(now, now.used),
            replaced=now.previous,
            is_new=used != now.used,
            replay=replay,
        )


def rollback(
    device_name: str, device: Device, progress: Progress, *, slot: str = SLOT, wait_s: float = 0.0
) -> RolledBack:
    """Have a device use what it used before the last installation.

    Raises:
        DeviceError: nothing was used before, or it is not whole any more; or the device cannot be reached.
    """
    with _reached(device_name, device, wait_s, progress) as (agent, _):
        before = _slots(agent).get(slot)
        switched = answers.read(agent.ask("rollback", slot=slot), _Switched, agent.label, "rollback")
        now = _slots(agent)[slot]
        left = before or now
        return RolledBack(
            device=device_name, slot=slot, used=_named(now, switched.used[0]), left=_named(left, switched.left)
        )


def installed(
    device_name: str, device: Device, progress: Progress, *, wait_s: float = 0.0
) -> tuple[InstalledSlot, ...]:
    """Return what is installed on a device."""
    with _reached(device_name, device, wait_s, progress) as (agent, _):
        return tuple(_slots(agent).values())


def verify_on_device(
    bundle: Path,
    key: Path,
    device_name: str,
    lab: Path | None,
    wait_s: float,
    progress: Progress,
    *,
    min_sequence: int = 0,
) -> BundleOnDevice:
    """Have a device check a bundle by itself, and answer the golden inputs of the cells that are for it.

    Args:
        bundle, key: files; the key is the signer's public one.
        device_name: in the lab file.
        lab: the lab file; None: the person's own.
        wait_s: how long to queue for the device when somebody else holds it.
        progress: told what happens.
        min_sequence: the oldest release that is taken.

    Raises:
        BundleRefused: there is evidence against the bundle, or no cell of it is for this device.
        FidelityError: an artifact's answers there are not its golden ones.
        DeviceError: the device cannot be reached, or cannot check the bundle.
    """
    device = device_of(load_lab(lab_path(lab)), device_name)
    manifest = check_here(bundle, key, min_sequence=min_sequence)
    with _reached(device_name, device, wait_s, progress) as (agent, transport):
        site = _Site(bundle, key, manifest, device_name, device, agent, transport, progress)
        unfit = site.unfit()
        progress(f"{device_name}: sending {manifest.name} {manifest.version}")
        sent = site.ship()
        progress(f"{device_name}: checking it there")
        replays, seconds = list[CellReplay](), list[float]()
        for cell in (cell for cell in manifest.cells if cell.cell not in unfit):
            with _unpacked_here(bundle, key, cell) as built:
                if built.artifact.golden is not None:
                    seconds.append(site.checked(cell, built, min_sequence))
                replays.append(site.replay(cell, built))
        if not seconds:
            seconds.append(site.checked(None, None, min_sequence))
        transport.remove(f"{agent.root}/objects/{sent}")
        return BundleOnDevice(
            device=device_name,
            machine=agent.facts.machine,
            bundle=manifest.name,
            version=manifest.version,
            sequence=manifest.sequence,
            cells=tuple(replays),
            unfit=tuple(f"{name}: {why}" for name, why in unfit.items()),
            seconds=seconds[0],
        )


# ---------------------------------------------------------------- the bundle, here


def check_here(bundle: Path, key: Path, *, min_sequence: int = 0) -> Bundle:
    """Check a bundle on this machine as a device does, and return its manifest.

    Raises:
        BundleRefused: there is evidence against it.
        UsageError: a file does not exist, or is no bundle or key.
        ToolchainError: it cannot be checked here, such as without openssl.
    """
    told = _run_check(bundle, key, ["--min-sequence", str(min_sequence)])
    data = read_member(bundle, MANIFEST, _MANIFEST_BYTES)
    if sha256_bytes(data) != told.manifest_sha256:
        raise BundleRefused(f"{bundle} changed while it was read")
    try:
        return msgspec.json.decode(data, type=Bundle)
    except (msgspec.DecodeError, ValueError) as error:  # signed, and yet not what a manifest of this format is
        raise DocumentError(f"the manifest of {bundle} cannot be used: {error}") from error


def unpack_here(bundle: Path, key: Path, cell: BundledCell, folder: Path) -> Built:
    """Check a bundle once more while a cell's artifact is unpacked from it.

    Args:
        bundle, key: files.
        cell: of the bundle.
        folder: that does not exist yet.
    """
    _run_check(bundle, key, [f"--cell={cell.cell}", "--extract", str(folder)])
    built = load_artifact((folder / cell.manifest).parent)
    artifact, said = built.artifact, (Path(cell.artifact).name, cell.sha256, cell.requires.backend)
    if (artifact.file, artifact.sha256, artifact.recipe.backend) != said:
        raise BundleRefused(f"{bundle}: the artifact of cell {cell.cell!r} is not the one that its manifest says")
    return built


def read_member(bundle: Path, name: str, most_bytes: int) -> bytes:
    """Return a member of a bundle that was checked.

    Raises:
        DocumentError: it has none of that name, or one that is too large.
    """
    try:
        with tarfile.open(bundle, "r:") as archive:
            for member in archive:
                if member.name == name and member.isreg() and member.size <= most_bytes:
                    stream = archive.extractfile(member)
                    assert stream is not None, "a plain file has bytes"
                    return stream.read()
    except (OSError, tarfile.TarError) as error:
        raise DocumentError(f"{bundle} cannot be read: {error}") from error
    raise DocumentError(f"{bundle} has no member {name} of at most {most_bytes} bytes")


class _Checked(msgspec.Struct, frozen=True):
    """What the program that checks bundles tells."""

    manifest_sha256: str = ""
    reason: str = ""


def _run_check(bundle: Path, key: Path, options: Sequence[str]) -> _Checked:
    words = [str(bundle.absolute()), "--key", str(key.absolute()), "--json", *options]
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(CHECK), *words], capture_output=True, timeout=_CHECK_TIMEOUT_S, check=False
        )
        told = msgspec.json.decode(done.stdout, type=_Checked)
    except subprocess.TimeoutExpired as error:
        raise ToolchainError(f"checking {bundle} did not end within {_CHECK_TIMEOUT_S:g} s") from error
    except msgspec.DecodeError as error:
        said = done.stderr.decode("utf-8", "replace").strip()[-1000:]
        raise ToolchainError(
            f"{bundle} could not be checked: the program ended with {done.returncode}: {said}"
        ) from error
    if done.returncode != 0:
        reason = answers.visible(told.reason)
        if done.returncode == _MISUSED:
            raise UsageError(reason)
        kind = BundleRefused if done.returncode == _REFUSED else ToolchainError
        raise kind(f"{bundle}: {reason}")
    return told


@contextlib.contextmanager
def _unpacked_here(bundle: Path, key: Path, cell: BundledCell) -> Iterator[Built]:
    with tempfile.TemporaryDirectory(prefix="edgedeploy-") as folder:
        yield unpack_here(bundle, key, cell, Path(folder) / "cell")


# ---------------------------------------------------------------- the device


@contextlib.contextmanager
def _reached(device_name: str, device: Device, wait_s: float, progress: Progress) -> Iterator[tuple[Agent, Transport]]:
    with open_transport(device_name, device, wait_s=wait_s, progress=progress) as transport:
        progress(f"{device_name}: connecting")
        with connect(transport, device, device_name=device_name, wait_s=wait_s, progress=progress) as agent:
            yield agent, transport


@dataclass(frozen=True, slots=True)
class _Site:
    """A bundle and the device that it is for."""

    file: Path
    key: Path
    bundle: Bundle
    device_name: str
    device: Device
    agent: Agent
    transport: Transport
    progress: Progress

    def unfit(self) -> dict[str, str]:
        """Return the cells that are not for this device, each with the reason."""
        runtimes = provision.installed(self.agent)
        found = {
            cell.cell: why_unfit(cell, self.agent.facts, self._version(cell, runtimes)) for cell in self.bundle.cells
        }
        return {name: why for name, why in found.items() if why}

    def choose(self, named: str) -> BundledCell:
        """Return the cell that is installed.

        Raises:
            UsageError: none fits, or several fit equally well.
        """
        cells = {cell.cell: cell for cell in self.bundle.cells}
        if named and named not in cells:
            raise UsageError(f"{self.file} has no cell {named!r}{closest(named, cells)} (it has: {', '.join(cells)})")
        unfit = self.unfit()
        if named:
            if named in unfit:
                raise UsageError(f"cell {named!r} is not for {self.agent.label}: {unfit[named]}")
            return cells[named]
        return best_of([cell for cell in self.bundle.cells if cell.cell not in unfit], unfit, self.agent.label)

    def ship(self) -> str:
        """Send the bundle, the key and the program that checks; return what the bundle is called there."""
        digests = {sha256_file(path): path for path in (CHECK, self.key, self.file)}
        ship(self.agent, self.transport, digests)
        return sha256_file(self.file)

    def demand_room(self, cell: BundledCell) -> None:
        """Raise a DeviceError where the device has no room for what is unpacked."""
        names = (cell.artifact, cell.manifest, cell.golden_inputs, cell.golden_outputs, cell.session)
        wanted = sum(self.bundle.files[name].size_bytes for name in names if name) + _SPARE_BYTES
        free = answers.read(self.agent.ask("space"), answers.Space, self.agent.label, "space").free_bytes
        if free < wanted:
            raise DeviceError(
                f"{self.agent.label}: unpacking {cell.cell} takes {format_bytes(wanted)} and {format_bytes(free)} are "
                f"free on its disk; nothing was changed there: free some space, or choose another root in lab.toml"
            )

    def ask(
        self, verb: str, cell: BundledCell | None, built: Built | None, *, min_sequence: int, **fields: Any
    ) -> dict[str, Any]:
        """Have the device check the bundle and unpack a cell of it.

        Raises:
            BundleRefused: the device has evidence against the bundle.
            DeviceError: it could not check it, or has no room.
        """
        kept = built.artifact.golden if built else None
        job = {
            "program": sha256_file(CHECK),
            "bundle": sha256_file(self.file),
            "key": sha256_file(self.key),
            "cell": cell.cell if cell else "",
            "min_sequence": min_sequence,
            "keep": [built.artifact.sha256, kept.inputs_sha256] if built and kept else [],
        }
        try:
            return self.agent.ask(verb, visit="check", job=job, timeout_s=_CHECK_TIMEOUT_S, **fields)
        except VisitFailed as error:
            if error.kind == "refused":
                raise BundleRefused(f"{error}; nothing on the device was changed") from error
            raise

    def checked(self, cell: BundledCell | None, built: Built | None, min_sequence: int) -> float:
        """Have the device check the bundle, keep what sessions need of a cell, and return how long that took."""
        started_s = time.monotonic()
        self.ask("check_bundle", cell, built, min_sequence=min_sequence)
        return time.monotonic() - started_s

    def replay(self, cell: BundledCell, built: Built) -> CellReplay:
        """Have the artifact answer its golden inputs on the device, where its runtime is there.

        Raises:
            FidelityError: its answers are others.
            DeviceError: it crashed, hung, or does not load there.
        """
        artifact = built.artifact
        if artifact.golden is None:
            return CellReplay(cell=cell.cell, note=f"{artifact.recipe.backend} computes nothing that could be compared")
        session = session_file(artifact.recipe.backend)
        found = provision.installed(self.agent)
        chosen = self._runtime(cell, found)
        side = Side(
            cell=cell.cell,
            artifact_sha256=artifact.sha256,
            session_sha256=sha256_file(session),
            options=session_options(artifact),
            inputs_sha256=artifact.golden.inputs_sha256,
            batch=artifact.golden.batch,
            runtime=chosen.name if chosen else "",
        )
        self.progress(f"{self.device_name}: {cell.cell}: comparing its answers with the golden ones")
        ship(self.agent, self.transport, {side.session_sha256: session})
        where = f"{artifact.name} on {self.device_name}"
        try:
            return CellReplay(
                cell=cell.cell,
                golden=golden.replay(self.agent, self.transport, side, artifact.golden, built.folder, where=where),
            )
        except VisitFailed as error:
            if error.kind != "missing-runtime":
                raise
            why = str(error).split("\n")[0]
            return CellReplay(cell=cell.cell, note=f"its answers were not compared, for want of a runtime: {why}")

    def _runtime(self, cell: BundledCell, found: Sequence[Installed]) -> Installed | None:
        """Return the provisioned runtime that the cell's session is opened with."""
        backend = cell.requires.backend
        pinned = self.device.runtimes.get(backend, "")
        return provision.choose(found, device_runtimes(backend), self.agent.facts, version=pinned)

    def _version(self, cell: BundledCell, found: Sequence[Installed]) -> str:
        """Return the version of the provisioned runtime; "" where the device brings its own, or none."""
        chosen = self._runtime(cell, found)
        return chosen.version if chosen else ""


def why_unfit(cell: BundledCell, facts: DeviceFacts, runtime_version: str) -> str:
    """Say why a cell is not for a device; "" where it is, as far as the device says what it is.

    Args:
        cell: of the bundle.
        facts: of the device; what it does not say is not held against the cell, except its machine.
        runtime_version: of the runtime that is provisioned there; "": not known.
    """
    wanted = cell.requires
    if wanted.machine and wanted.machine != facts.machine:
        return f"it is for {wanted.machine}, and the device is {facts.machine or 'of an unknown kind'}"
    if missing := [feature for feature in wanted.isa if feature not in facts.isa]:
        return f"it needs the processor features {', '.join(missing)}, which the device does not have"
    if wanted.any_isa and not set(wanted.any_isa) & set(facts.isa):
        return f"it needs one of the processor features {', '.join(wanted.any_isa)}, and the device has none of them"
    if runtime_version and not satisfies(runtime_version, wanted.runtime.versions):
        return (
            f"it was measured on {wanted.runtime.name} {wanted.runtime.measured}, which holds for "
            f"{wanted.runtime.versions}, and the device has {runtime_version}"
        )
    if wanted.fingerprint is not None:
        return _why_another_gpu(cell, facts)
    return ""


def _why_another_gpu(cell: BundledCell, facts: DeviceFacts) -> str:
    """Say how a device differs from the one that an artifact was built on; its runtime looks once more, and closer."""
    tied = cell.requires.fingerprint
    assert tied is not None, "the caller has looked"
    gpu = facts.gpus[0] if facts.gpus else None
    if gpu is None:
        return f"it is tied to {tied.gpu} with compute capability {tied.compute_capability}, and the device has no GPU"
    pairs = (
        ("compute capability", tied.compute_capability, gpu.compute_capability),
        ("TensorRT", tied.tensorrt, facts.tensorrt),
        ("JetPack", tied.jetpack, facts.jetpack),
    )
    for what, then, now in pairs:
        if then and now and then != now and not now.startswith(f"{then}."):
            return f"it is tied to {what} {then}, and the device has {now}"
    return ""


def satisfies(version: str, versions: str) -> bool:
    """Say whether a version is in a range.

    >>> satisfies("1.23.2", ">=1.20,<2"), satisfies("2.0", ">=1.20,<2"), satisfies("10.3.0", "==10.3.0")
    (True, False, True)
    >>> satisfies("1.0", "")
    True
    """
    tests: dict[str, Callable[[object, object], bool]] = {
        ">=": lambda one, other: one >= other,  # type: ignore[operator]  # both are what versions are ordered by
        "<=": lambda one, other: one <= other,  # type: ignore[operator]
        "==": lambda one, other: one == other,
        "!=": lambda one, other: one != other,
        ">": lambda one, other: one > other,  # type: ignore[operator]
        "<": lambda one, other: one < other,  # type: ignore[operator]
    }
    for part in filter(None, (word.strip() for word in versions.split(","))):
        sign = next((sign for sign in tests if part.startswith(sign)), None)
        if sign is None or not tests[sign](version_key(version), version_key(part.removeprefix(sign).strip())):
            return False
    return True


def best_of(fitting: Sequence[BundledCell], unfit: dict[str, str], label: str) -> BundledCell:
    """Return the cell that asks most of a device among those that fit it: it was made for such a device.

    A baseline is there to be compared with, so that it is never what is meant.

    Raises:
        UsageError: none fits, or several are equally specific.
    """
    candidates = [cell for cell in fitting if cell.role == "candidate"]
    if not candidates:
        why = "; ".join(f"{name}: {reason}" for name, reason in unfit.items()) or "it holds nothing but baselines"
        raise UsageError(f"nothing in the bundle is for {label}: {why}")
    most = max(map(_specificity, candidates))
    best = [cell for cell in candidates if _specificity(cell) == most]
    if len(best) > 1:
        raise UsageError(
            f"{len(best)} cells of the bundle fit {label} equally well; say which one with --cell: "
            f"{', '.join(cell.cell for cell in best)}"
        )
    return best[0]


def _specificity(cell: BundledCell) -> tuple[int, int, int]:
    wanted = cell.requires
    return wanted.fingerprint is not None, len(wanted.isa) + bool(wanted.any_isa), bool(wanted.machine)


def _demand_newer(request: InstallRequest, bundle: Bundle, before: InstalledSlot | None) -> None:
    """Refuse what is older than what is installed; the device looks once more, under its lease."""
    if before is None or not before.used or request.allow_downgrade:
        return
    used = _named(before, before.used)
    if bundle.sequence < used.sequence:
        raise UsageError(
            f"{bundle.name} {bundle.version} (sequence {bundle.sequence}) is older than {used.bundle} {used.version} "
            f"(sequence {used.sequence}), which slot {request.slot} of {request.device_name} has; to go back to what "
            f"was there before: edgedeploy rollback; to install it all the same: --allow-downgrade"
        )


def _withdraw(agent: Agent, slot: str, release: str, before: InstalledSlot | None) -> None:
    """Delete what was placed and is not to be used."""
    if before is not None and release in (before.used, before.previous):
        return
    with contextlib.suppress(DeviceError):  # the first error is the one to tell; the next installation deletes it
        agent.ask("withdraw", slot=slot, release=release)


def _slots(agent: Agent) -> dict[str, InstalledSlot]:
    said = answers.read(agent.ask("placed"), _Placed, agent.label, "placed")
    return {
        one.slot: InstalledSlot(
            slot=one.slot,
            path=answers.visible(one.path),
            used=one.used[0] if one.used else "",
            previous=one.used[1] if len(one.used) > 1 else "",
            releases=tuple(_recorded(release) for release in one.releases),
            problem=answers.visible(one.problem),
        )
        for one in said.slots
    }


def _release_of(answer: dict[str, object], agent: Agent, what: str) -> InstalledRelease:
    return _recorded(answers.read(answer, _Release, agent.label, what))


def _recorded(one: _Release) -> InstalledRelease:
    words: dict[str, Any] = {name: answers.visible(str(value)) for name, value in msgspec.structs.asdict(one).items()}
    return InstalledRelease(**{**words, "sequence": one.sequence, "size_bytes": one.size_bytes})


def _named(slot: InstalledSlot, name: str) -> InstalledRelease:
    """Return a release of a slot."""
    found = next((one for one in slot.releases if one.release == name), None)
    if found is None:
        raise DeviceError(f"slot {slot.slot} of the device says that it uses {name}, which is not among its releases")
    return found
