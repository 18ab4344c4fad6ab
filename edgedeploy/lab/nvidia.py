"""What a device has for TensorRT and what it lacks, each lack with what to do. Pure, but for one question to it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from edgedeploy.errors import DeviceUnreachable
from edgedeploy.lab.transport import Transport
from edgedeploy.records.device import DeviceFacts, Gpu, TensorRTBindings
from edgedeploy.units import format_bytes

# The first version with tensors by name and execute_async_v3, on which the session is built.
OLDEST_TENSORRT = (8, 5)
SMI_TIMEOUT_S = 15.0
# Fields of `nvidia-smi --query-gpu`; drivers before 510 know no compute_cap.
_SMI_FIELDS = ("name", "driver_version", "memory.total", "compute_cap")


@dataclass(frozen=True, slots=True)
class Finding:
    """One part, what it is, and what a person can do about it ("" where nothing is to be done)."""

    part: str
    state: str
    next: str = ""


@dataclass(frozen=True, slots=True)
class Smi:
    """What nvidia-smi says."""

    driver: str
    gpus: tuple[Gpu, ...]


def parse_smi(text: str) -> Smi | None:
    """Return what `nvidia-smi --query-gpu=name,driver_version,memory.total[,compute_cap]` printed, or None.

    Args:
        text: its CSV without header and units; memory is in MiB, and what is not known is "[N/A]".

    >>> parse_smi("NVIDIA H200, 570.86.15, 143771, 9.0").gpus[0].compute_capability
    '9.0'
    """
    gpus, drivers = [], []
    for line in text.splitlines():
        name, *rest = (field.strip() for field in line.split(","))
        driver, memory, capability = (*rest, "", "", "")[:3]
        if not name or not re.fullmatch(r"\d+(\.\d+)+", driver):
            continue
        known = capability if re.fullmatch(r"\d+\.\d+", capability) else ""
        size = int(memory) * 2**20 if re.fullmatch(r"[0-9]{1,9}", memory) else None
        gpus.append(Gpu(name=name, compute_capability=known, memory_bytes=size))
        drivers.append(driver)
    return Smi(drivers[0], tuple(gpus)) if gpus else None


def ask_smi(transport: Transport) -> tuple[Smi | None, str]:
    """Ask nvidia-smi on a device; return what it says and what went wrong ("" also where it is not installed)."""
    problem = ""
    for fields in (_SMI_FIELDS, _SMI_FIELDS[:-1]):
        argv = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
        try:
            said = transport.run(argv, timeout_s=SMI_TIMEOUT_S)
        except DeviceUnreachable as error:
            return None, str(error)
        if said.status == 127:
            return None, ""
        text = said.stdout.decode("utf-8", "replace")
        if said.status == 0:
            return parse_smi(text), ""
        problem = " ".join((text or said.stderr.decode("utf-8", "replace")).split())[:200] or f"status {said.status}"
    return None, f"nvidia-smi failed: {problem}"


def is_nvidia(facts: DeviceFacts) -> bool:
    """Return whether anything of NVIDIA's is on a device."""
    return bool(facts.gpus or facts.gpu_driver or facts.l4t or facts.tensorrt or facts.tensorrt_bindings)


def findings(facts: DeviceFacts, smi: Smi | None = None) -> list[Finding]:
    """Return what a device has for TensorRT and what to do about each part that it lacks.

    Args:
        facts: what the runner read of files there.
        smi: what nvidia-smi said there; it alone knows memory and compute capability of a card.
    """
    if not is_nvidia(facts) and smi is None:
        return [
            Finding(
                "NVIDIA GPU",
                "none seen here",
                "engines of the back end tensorrt are built on a device that has one (--device); "
                "tensorrt_rtx builds without one",
            )
        ]
    parts = [_gpu(facts, smi), _driver(facts, smi)]
    if facts.l4t:
        parts.append(_jetpack(facts))
    return [*parts, _cuda(facts), _tensorrt(facts), _bindings(facts)]


def with_probe(facts: DeviceFacts, found: Mapping[str, Any]) -> DeviceFacts:
    """Return the facts with what a builder found on the device beside them: it has asked the driver and the module.

    Args:
        facts: what the runner read of files.
        found: the builder's table, see `probe_findings`; "tensorrt" is the version in the runner's Python.
    """
    gpus = tuple(_probed_gpu(one) for one in _devices(found))
    version = str(found.get("tensorrt") or "")
    runs = _minor(facts.python)
    own = TensorRTBindings(python=runs, version=version, folder="the runner's own Python")
    is_known = not version or any(one.python in ("", runs) for one in facts.tensorrt_bindings)
    return msgspec.structs.replace(
        facts,
        gpus=merged_gpus(facts.gpus, gpus),
        gpu_driver=facts.gpu_driver or str(found.get("driver_version") or ("of unknown version" if gpus else "")),
        tensorrt_bindings=facts.tensorrt_bindings if is_known else (*facts.tensorrt_bindings, own),
    )


def _devices(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    devices = found.get("devices")
    return [one for one in devices if isinstance(one, Mapping)] if isinstance(devices, list) else []


def _probed_gpu(told: Mapping[str, Any]) -> Gpu:
    memory = told.get("memory_bytes")
    return Gpu(
        name=str(told.get("name") or "a GPU without a name"),
        compute_capability=str(told.get("compute_capability") or ""),
        memory_bytes=memory if isinstance(memory, int) and memory > 0 else None,
    )


def probe_findings(found: Mapping[str, Any]) -> list[Finding]:
    """Return what a builder, which asks the driver in a child on the device, says: the one answer that counts.

    Args:
        found: its table: "driver" ("" or why it does not answer), "cuda_driver", "devices", "tensorrt_problem".
    """
    if problem := str(found.get("driver") or ""):
        return [Finding("CUDA driver", "does not answer", problem)]
    lacks = str(found.get("tensorrt_problem") or "")
    parts = [Finding("TensorRT's module", "does not load", lacks)] if lacks else []
    names = [_gpu_text(_probed_gpu(one)) for one in _devices(found)]
    state = f"answers, for CUDA {found.get('cuda_driver') or 'of an unknown version'}: {', '.join(names) or 'no GPU'}"
    then = "" if names else "see that the GPU is visible (CUDA_VISIBLE_DEVICES)"
    return [Finding("CUDA driver", state, then), *parts]


def _gpu(facts: DeviceFacts, smi: Smi | None) -> Finding:
    gpus = merged_gpus(facts.gpus, smi.gpus if smi else ())
    if not gpus:
        then = "put one in, or in a container start it with --gpus all (on a Jetson: --runtime nvidia)"
        return Finding("NVIDIA GPU", "none seen", then)
    return Finding("NVIDIA GPU", ", ".join(_gpu_text(gpu) for gpu in gpus))


def merged_gpus(from_files: Sequence[Gpu], from_smi: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """Return the GPUs that files and nvidia-smi name, each with what either knows of it."""
    if not from_files or not from_smi or len(from_files) != len(from_smi):
        return tuple(from_smi or from_files)
    return tuple(
        Gpu(
            name=told.name,
            compute_capability=told.compute_capability or read.compute_capability,
            memory_bytes=read.memory_bytes if told.memory_bytes is None else told.memory_bytes,
        )
        for read, told in zip(from_files, from_smi, strict=True)
    )


def _gpu_text(gpu: Gpu) -> str:
    capability = f"compute capability {gpu.compute_capability}" if gpu.compute_capability else ""
    memory = format_bytes(gpu.memory_bytes) if gpu.memory_bytes is not None else ""
    details = ", ".join(part for part in (capability, memory) if part)
    return f"{gpu.name} ({details})" if details else gpu.name


def _driver(facts: DeviceFacts, smi: Smi | None) -> Finding:
    version = (smi.driver if smi else "") or facts.gpu_driver
    if version:
        return Finding("GPU driver", version)
    if facts.l4t:
        return Finding("GPU driver", f"that of Jetson Linux {facts.l4t}")
    then = "install NVIDIA's driver; in a container, start it with --gpus all"
    return Finding("GPU driver", "missing", then)


def _jetpack(facts: DeviceFacts) -> Finding:
    if facts.jetpack:
        return Finding("JetPack", f"{facts.jetpack} (Jetson Linux {facts.l4t})")
    return Finding("JetPack", f"not known for Jetson Linux {facts.l4t}", "sudo apt install nvidia-jetpack")


def _cuda(facts: DeviceFacts) -> Finding:
    if facts.cuda:
        return Finding("CUDA", facts.cuda)
    then = (
        "sudo apt install nvidia-jetpack"
        if facts.l4t
        else "nothing where libcudart comes with a Python package; else install the CUDA runtime"
    )
    return Finding("CUDA", "nothing in /usr/local/cuda", then)


def _tensorrt(facts: DeviceFacts) -> Finding:
    by_module = max((one.version for one in facts.tensorrt_bindings), key=_numbers, default="")
    version = facts.tensorrt or by_module
    if not version:
        then = "sudo apt install nvidia-jetpack" if facts.l4t else "pip install tensorrt, or use NVIDIA's container"
        return Finding("TensorRT", "missing", then)
    if _numbers(version)[:2] < OLDEST_TENSORRT:
        then = "update to JetPack 5.1 or later" if facts.l4t else "update TensorRT"
        return Finding("TensorRT", f"{version}, too old: {'.'.join(map(str, OLDEST_TENSORRT))} is the least", then)
    return Finding("TensorRT", version if facts.tensorrt else f"{version}, by its Python module")


def _bindings(facts: DeviceFacts) -> Finding:
    part = "TensorRT in Python"
    runs = _minor(facts.python)
    if not facts.tensorrt_bindings:
        then = "sudo apt install python3-libnvinfer" if facts.l4t else "pip install tensorrt"
        return Finding(part, f"no module (the runner's is Python {runs})", then)
    state = ", ".join(f"for Python {one.python or 'unknown'} in {one.folder}" for one in facts.tensorrt_bindings)
    pythons = sorted({one.python for one in facts.tensorrt_bindings if one.python}, key=_numbers)
    if runs in pythons or any(not one.python for one in facts.tensorrt_bindings):
        return Finding(part, state)
    then = f'the runner\'s is Python {runs}: set python = "python{pythons[-1]}" of this device in lab.toml'
    return Finding(part, state, then)


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"[0-9]{1,9}", version))
