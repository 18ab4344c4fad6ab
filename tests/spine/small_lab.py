"""A lab of devices on this machine, each with files and a lease of its own, and a release file with as many cells."""

import os
import signal
from collections.abc import Iterable
from pathlib import Path

import pytest

from edgedeploy import measure
from edgedeploy.lab.visits import Schedule

# Two bursts of thirty inferences of 50 µs: what is tested here is who measures what, not how fast it is.
QUICK = Schedule(bursts_per_visit=2, samples_per_burst=30, lead_in=0, warm_up_cap_s=0.2)


def measure_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every measurement of a test take a moment."""
    monkeypatch.setattr(measure, "_usual_schedule", lambda sides: QUICK)
    monkeypatch.setattr(measure, "MEMORY_VISITS", 1)


def write_lab(place: Path, names: Iterable[str], **more: dict[str, str]) -> Path:
    """Write lab.toml; `more` is what single devices have beside the usual: b={"python": "/none"}."""
    text = 'format = "edgedeploy.lab/1"\n'
    for name in names:
        entry = {
            "transport": "local",
            "target": "fake-board",
            "root": str(place / "devices" / name),
            "lease_dir": str(place / "leases" / name),
            **more.get(name, {}),
        }
        (place / "leases" / name).mkdir(parents=True, exist_ok=True)
        text += f"[devices.{name}]\n" + "".join(f'{key} = "{value}"\n' for key, value in entry.items() if value)
    path = place / "lab.toml"
    path.write_text(text)
    return path


def write_release(place: Path, cells: dict[str, str], *, blocks: int = 2, duration_us: float = 50.0) -> Path:
    """Write a release file with a candidate cell for each name, on the device that it is mapped to."""

    def cell(name: str, device: str, microseconds: float, baseline: str) -> str:
        return (
            f'[[cells]]\nname = "{name}"\nmodel = "tiny"\ntarget = "fake-board"\nbackend = "fake"\nprecision = "fp32"\n'
            f'device = "{device}"\nbaseline = "{baseline}"\noptions = {{ duration_us = {microseconds} }}\n'
        )

    bases = {device: f"base-{device}" for device in cells.values()}
    text = 'format = "edgedeploy.release/1"\nname = "tiny"\n[models.tiny]\nsource = "tiny.onnx"\n'
    text += "".join(cell(name, device, duration_us, name) for device, name in bases.items())
    for number, (name, device) in enumerate(cells.items(), start=1):
        text += cell(name, device, duration_us + number, bases[device])
    text += f'[gate]\nbaseline = "{next(iter(bases.values()))}"\nmin_blocks = {blocks}\nmax_blocks = {blocks}\n'
    text += '[gate.margins]\nlatency_p50 = "+5%"\n'
    path = place / "edgedeploy.toml"
    path.write_text(text)
    return path


def runners(root: Path) -> list[int]:
    """Return the processes of the agents that work in a device's folder."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"agent" in words and str(root).encode() in words:
            found.append(int(folder.name))
    return found


def kill_runner(root: Path) -> None:
    """Kill the agent of a device as a power cut would."""
    for process in runners(root):
        os.kill(process, signal.SIGKILL)
