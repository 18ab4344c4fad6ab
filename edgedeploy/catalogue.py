"""What exists here: targets, devices, back ends, and what is missing."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edgedeploy.backends import backend, load_backends
from edgedeploy.build import Progress, this_target
from edgedeploy.documents import read_toml
from edgedeploy.errors import EdgedeployError
from edgedeploy.lab import builders, bundle, nvidia
from edgedeploy.lab.conversation import Agent
from edgedeploy.lab.inventory import device as device_of
from edgedeploy.lab.inventory import lab_path, load_lab, open_transport
from edgedeploy.lab.transport import LocalTransport, Transport
from edgedeploy.prepare.identity import installed_version
from edgedeploy.records.device import Device, DeviceFacts
from edgedeploy.records.target import FORMAT, Target, target_files
from edgedeploy.storage import cache_dir, sha256_file

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
    """Reach each device, start the runner, and say what is there."""
    known = devices(lab)
    checks: list[DeviceCheck] = []
    for name in names or tuple(known):
        entry = device(name, lab)
        progress(f"{name}: reaching")
        try:
            with (
                open_transport(name, entry) as transport,
                bundle.connect(transport, entry, device_name=name) as agent,
            ):
                checks.append(DeviceCheck(name, agent.facts, findings=_nvidia_findings(transport, agent)))
        except EdgedeployError as error:
            checks.append(DeviceCheck(name, None, str(error)))
    return checks


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
        "EDGEDEPLOY_LAB",
        "EDGEDEPLOY_TARGETS",
        "EDGEDEPLOY_RESULTS",
        "EDGEDEPLOY_LOG",
    ):
        findings.append((variable, os.environ.get(variable, "not set"), ""))
    return findings


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)
