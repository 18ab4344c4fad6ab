"""What exists here: targets, devices, back ends, and what is missing."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Literal

import msgspec

import edgedeploy
from edgedeploy.backends import ENTRY_POINT_GROUP, backend, load_backends, session_file
from edgedeploy.build import Progress, this_target
from edgedeploy.documents import read_toml
from edgedeploy.errors import EdgedeployError, UsageError
from edgedeploy.lab import builders, bundle, leases, nvidia, trust
from edgedeploy.lab.conversation import Agent
from edgedeploy.lab.inventory import device as device_of
from edgedeploy.lab.inventory import lab_path, load_lab, open_transport
from edgedeploy.lab.labgrid import Coordinator, Place, told_holder
from edgedeploy.lab.transport import LocalTransport, Transport
from edgedeploy.lab.trust import Trust
from edgedeploy.prepare.identity import installed_version
from edgedeploy.records.device import Device, DeviceFacts
from edgedeploy.records.target import FORMAT, Target, target_files
from edgedeploy.storage import cache_dir, sha256_file, state_dir

# For reading files and starting an interpreter.
FACTS_TIMEOUT_S = 30.0


def targets() -> dict[str, Target]:
    """Return every target as written."""
    return {name: read_toml(path, Target, FORMAT) for name, path in target_files().items()}


def devices(lab: Path | None) -> dict[str, Device]:
    """Return every device of the lab file, and `local`."""
    return dict(load_lab(lab_path(lab)).devices)


def device(name: str, lab: Path | None) -> Device:
    """Return one device; raises UsageError with the likely intended name."""
    return device_of(load_lab(lab_path(lab)), name)


def places(lab: Path | None) -> list[tuple[str, Place, tuple[str, ...]]]:
    """Return (coordinator, place, devices that are it) for every place of the lab file's labgrid coordinators.

    Raises:
        UsageError: the lab file names none.
        DeviceUnreachable: one cannot be reached.
    """
    path = lab_path(lab)
    known = load_lab(path)
    addresses = {known.labgrid_coordinator, *(one.coordinator for one in known.devices.values())} - {""}
    if not addresses:
        raise UsageError(f'{path} names no labgrid coordinator; add labgrid_coordinator = "host:port" at its top')
    found = [(address, place) for address in sorted(addresses) for place in Coordinator(address).places().values()]
    return [
        (address, place, tuple(name for name, one in known.devices.items() if _is_place(one, address, place)))
        for address, place in sorted(found, key=lambda pair: (pair[0], pair[1].name))
    ]


def _is_place(device: Device, address: str, place: Place) -> bool:
    return device.coordinator == address and device.place in (place.name, *place.aliases)


# Of all devices of a lab together: a thousand at some 50 ms each, and those that do not answer.
SURVEY_LIMIT_S = 90.0


def survey(lab: Path | None, *, limit_s: float = SURVEY_LIMIT_S) -> dict[str, leases.Survey]:
    """Return who has each device, or why it does not say; none is taken for it."""
    return leases.survey(devices(lab), lease_of, limit_s=limit_s)


def lease_of(name: str, entry: Device) -> leases.Lease:
    """Return who has a device; of a place of labgrid its coordinator says, so that the place need not be acquired."""
    if entry.transport == "labgrid":
        holder = Coordinator(entry.coordinator, timeout_s=entry.connect_timeout_s).place(entry.place).holder
        state: Literal["held", "free"] = "held" if holder else "free"
        holder = told_holder(holder)
        return leases.Lease(token=0, state=state, holder=holder, held_s=0.0, expires_s=0.0, visits=(), queue=())
    with open_transport(name, entry) as transport:
        return leases.read(transport, entry)


def release_place(entry: Device) -> str:
    """Take a device's place of labgrid away from its holder, and return who that was."""
    return Coordinator(entry.coordinator, timeout_s=entry.connect_timeout_s).force_release(entry.place)


def release(name: str, entry: Device, token: int) -> leases.Lease:
    """Take a device from the holder with that token, whatever it does there."""
    with open_transport(name, entry) as transport:
        return leases.release(transport, entry, token)


@dataclass(frozen=True, slots=True)
class DeviceCheck:
    """What came of reaching a device.

    Attributes:
        facts: None when it could not be reached; `problem` then says why.
        findings: what it has for TensorRT and lacks; empty where nothing of NVIDIA's is there.
    """

    name: str
    facts: DeviceFacts | None
    problem: str = ""
    findings: tuple[nvidia.Finding, ...] = ()


def check_devices(names: Sequence[str], lab: Path | None, progress: Progress) -> list[DeviceCheck]:
    """Reach devices (none named: all), many at a time, start the runner on each, and say what is there.

    Returns:
        In the order of the names, or of the lab file.

    Raises:
        UsageError: there is no device of a name; none is reached then.
    """
    known = load_lab(lab_path(lab))
    chosen = {name: device_of(known, name) for name in names or known.devices}
    load_backends()  # once, before many threads ask for one

    def check(name: str) -> DeviceCheck:
        progress(f"{name}: reaching")
        return _checked_device(name, chosen[name])

    with ThreadPoolExecutor(min(leases.AT_ONCE, len(chosen))) as pool:
        return list(pool.map(check, chosen))


def _checked_device(name: str, entry: Device) -> DeviceCheck:
    try:
        with (
            open_transport(name, entry) as transport,
            bundle.connect(transport, entry, device_name=name) as agent,
        ):
            return DeviceCheck(name, agent.facts, findings=_nvidia_findings(transport, agent))
    except EdgedeployError as error:
        return DeviceCheck(name, None, str(error))


def _nvidia_findings(transport: Transport, agent: Agent) -> tuple[nvidia.Finding, ...]:
    """Return what a device has for TensorRT: by its files, by nvidia-smi, and by asking its driver in a child there."""
    smi, problem = nvidia.ask_smi(transport)
    facts, asked = agent.facts, [nvidia.Finding("nvidia-smi", "does not answer", problem)] if problem else []
    builder: Path = backend("tensorrt").builder  # type: ignore[attr-defined]  # of back ends that build on a device
    digest = sha256_file(builder)
    try:
        bundle.ship(agent, transport, {digest: builder})
        found = builders.probe(agent, digest)
        facts = nvidia.with_probe(facts, found)
        asked += nvidia.probe_findings(found)
    except EdgedeployError as error:
        asked.append(nvidia.Finding("CUDA driver", "not asked", str(error)))
    return (*nvidia.findings(facts, smi), *asked) if nvidia.is_nvidia(facts) or smi or problem else ()


def _nvidia_here() -> list[nvidia.Finding]:
    """Return what this machine has for TensorRT, without taking its lease: nothing is measured."""
    with LocalTransport("local") as transport:
        try:
            said = transport.run([sys.executable, str(bundle.RUNNER), "facts"], timeout_s=FACTS_TIMEOUT_S)
            facts = msgspec.json.decode(said.stdout, type=DeviceFacts)
        except (EdgedeployError, msgspec.DecodeError) as error:
            return [nvidia.Finding("NVIDIA GPU", "not examined", str(error))]
        smi, problem = nvidia.ask_smi(transport)
    problems = [nvidia.Finding("nvidia-smi", "does not answer", problem)] if problem else []
    return [*nvidia.findings(facts, smi), *problems]


# Part → (distributions that it needs, what it is for).
_PARTS = {
    "torch": (("torch", "onnx", "onnxscript", "onnxslim", "onnxruntime"), "models from PyTorch"),
    "onnxruntime": (("onnx", "onnxslim", "onnxruntime"), "models from ONNX; compiling for ONNX Runtime"),
    "ssh": (("paramiko",), "devices over SSH"),
}


def examine(lab: Path | None) -> list[tuple[str, str, str]]:
    """Return (part, state, what to do next or "") for everything that a person may miss."""
    findings = [("Python", sys.version.split()[0], "")]
    for extra, (distributions, purpose) in _PARTS.items():
        found_versions = {name: installed_version(name) for name in distributions}
        absent = [name for name, version in found_versions.items() if version is None]
        versions = ", ".join(f"{name} {version}" for name, version in found_versions.items() if version)
        fix = f"pip install 'edgedeploy[{extra}]'  ({purpose})" if absent else ""
        findings.append((f"extra {extra}", f"missing: {', '.join(absent)}" if absent else versions, fix))
    found, broken = load_backends()
    for name, one in sorted(found.items()):
        reason = one.missing()
        findings.append((f"back end {name}", "cannot compile here" if reason else "ready", reason or ""))
    findings += [(f"back end {name}", "broken plugin", problem) for name, problem in sorted(broken.items())]
    findings.append(("target host", f"is {this_target('host').name}", ""))
    findings += [(one.part, one.state, one.next) for one in _nvidia_here()]
    try:
        path = lab_path(lab)
        count = len(load_lab(path).devices)
        findings.append(
            ("lab", f"{path}: {count} devices" if path.exists() else f"{path}: not written; only local", "")
        )
    except EdgedeployError as error:
        findings.append(("lab", "unusable", str(error)))
    free = shutil.disk_usage(_existing(cache_dir())).free
    findings.append(("cache", f"{cache_dir()} ({free // 2**20} MiB free)", ""))
    for variable in (
        "EDGEDEPLOY_CACHE_DIR",
        "EDGEDEPLOY_STATE_DIR",
        "EDGEDEPLOY_LEASE_DIR",
        "EDGEDEPLOY_LAB",
        "EDGEDEPLOY_TARGETS",
        "EDGEDEPLOY_RESULTS",
        "EDGEDEPLOY_LOG",
    ):
        findings.append((variable, os.environ.get(variable, "not set"), ""))
    return findings


def security(lab: Path | None) -> list[Trust]:
    """Return what is trusted on this machine and on the way to every device of the lab; reaches nothing.

    Raises:
        DocumentError: the lab file cannot be read.
    """
    path = lab_path(lab)
    found = load_lab(path)
    config, package = Path.home() / ".ssh" / "config", Path(edgedeploy.__file__).parent
    here = [
        trust.of_path("lab file", path, "it says which devices there are, how they are known and as whom we log in"),
        trust.of_path(
            "ssh configuration", config, "it may name hosts, keys and jump hosts; ProxyCommand is refused, never run"
        ),
        trust.of_path("own code", package, "it is what you installed"),
        trust.of_path("cache", cache_dir(), "artifacts that were built before are taken from it by their digests"),
        trust.of_path("state", state_dir(), "the journal of unfinished work is read from it"),
        *(_executed(what, file) for what, file in _device_halves()),
        *_plugins(),
        Trust(trust.HERE, "pickles", "none", "code in a file is run only under --trust-pickle, each time anew"),
        *trust.of_environment(os.environ),
    ]
    return [*here, *(one for name, entry in found.devices.items() for one in trust.of_device(name, entry))]


def _device_halves() -> list[tuple[str, Path]]:
    """Return every file of ours that may be executed on a device."""
    found, _ = load_backends()
    files = [("runner", bundle.RUNNER)]
    for name, one in sorted(found.items()):
        files.append((f"session of {name}", session_file(name)))
        if (builder := getattr(one, "builder", None)) is not None:
            files.append((f"builder of {name}", Path(builder)))
    return files


def _executed(what: str, file: Path) -> Trust:
    why = "a device executes only what the holder of its lease names by digest; this file is sent from here"
    return Trust(
        trust.HERE, f"runs on devices: {what}", f"sha256 {sha256_file(file)} ({file})", why, trust.weakness_of(file)
    )


def _plugins() -> list[Trust]:
    """Return the back ends that other packages bring: their code runs here, and their sessions on devices."""
    return [
        Trust(
            trust.HERE,
            f"back end {point.name}",
            f"{point.value} of {point.dist.name} {point.dist.version}" if point.dist else point.value,
            f"a package that is installed here says that it is one (entry point {ENTRY_POINT_GROUP})",
            "its code runs with all your rights: uninstall it unless you know whose it is",
        )
        for point in entry_points(group=ENTRY_POINT_GROUP)
    ]


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)
