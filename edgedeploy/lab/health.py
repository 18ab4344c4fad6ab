"""Which devices are fit to measure on: a check before the first cell, and the quarantine of those that failed."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec

from edgedeploy.documents import Record, read_json, write_json
from edgedeploy.errors import DeviceBusy, DeviceError, DeviceUnreachable
from edgedeploy.lab import bundle
from edgedeploy.lab.conversation import Agent
from edgedeploy.lab.inventory import open_transport
from edgedeploy.lab.transport import Transport
from edgedeploy.lab.visits import load_of_others
from edgedeploy.records.device import Device
from edgedeploy.records.run import Conditions
from edgedeploy.records.target import ConditionLimits
from edgedeploy.storage import state_dir
from edgedeploy.units import format_bytes

# History of edgedeploy.quarantine:
#   1 (0.1.0)  first version
FORMAT = "edgedeploy.quarantine/1"

# The runner, a device half, a small artifact and its inputs.
LEAST_FREE_BYTES = 64 << 20
# A clock that is further away than this was never set; we use none of the device's dates, people and tools do.
MOST_CLOCK_OFFSET_S = 300.0
# Over a shorter time the load of others cannot be told, for kernels count in ticks of 10 ms.
_LOAD_SPAN_S = 0.25
_FACTS_TIMEOUT_S = 30.0
_REASON_CHARACTERS = 500

# Prints the clock and the free bytes where files are kept, or will be.
_CLOCK_AND_DISK = """
import json, os, shutil, sys, time
place = os.path.abspath(sys.argv[1])
while not os.path.isdir(place):
    place = os.path.dirname(place)
print(json.dumps([time.time(), shutil.disk_usage(place).free]))
"""


class Quarantined(Record, frozen=True, kw_only=True):
    """Why a device is not used.

    Attributes:
        by: "person" holds until lifted; the others end when the device is needed and passes its check again.
    """

    why: str
    since_utc: str
    by: Literal["person", "health check", "run"]


class _Quarantine(Record, frozen=True, kw_only=True):
    """The file: device name → why."""

    format: str = FORMAT
    devices: dict[str, Quarantined] = {}


def quarantined() -> dict[str, Quarantined]:
    """Return the devices that are not to be used, and why."""
    path = _path()
    return dict(read_json(path, _Quarantine, FORMAT).devices) if path.exists() else {}


def quarantine(name: str, why: str, by: Literal["person", "health check", "run"] = "person") -> Quarantined:
    """Keep a device out of every run until `lift`; what a person said is not replaced by what we found."""
    since_utc = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    entry = Quarantined(why=why[:_REASON_CHARACTERS], since_utc=since_utc, by=by)
    with _changing() as devices:
        if by == "person" or name not in devices or devices[name].by != "person":
            devices[name] = entry
        return devices[name]


def lift(name: str) -> bool:
    """Let a device be used again; return whether it was in quarantine."""
    with _changing() as devices:
        return devices.pop(name, None) is not None


def _path() -> Path:
    return state_dir() / "quarantine.json"


@contextlib.contextmanager
def _changing() -> Iterator[dict[str, Quarantined]]:
    """Give the devices to be changed, one process at a time, and write them whole or not at all."""
    path = _path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        devices = quarantined()
        yield devices
        write_json(path, _Quarantine(devices=devices))


@dataclass(frozen=True, slots=True)
class Health:
    """What a check found.

    Attributes:
        lasting: faults that do not go away by themselves: the device is of no use until somebody looks at it.
        passing: states in which no number counts, and which pass: load, heat.
        notes: what is odd and does no harm to numbers.
    """

    lasting: tuple[str, ...] = ()
    passing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def check(
    name: str,
    device: Device,
    limits: ConditionLimits,
    progress: Callable[[str], None] = lambda text: None,
    *,
    wait_s: float = 0.0,
) -> Health:
    """Reach a device, start the runner there and look whether numbers from it would count.

    Args:
        name, device: in the inventory.
        limits: of the target that is measured for.
        progress: told what happens.
        wait_s: how long to queue for it when somebody else holds it.

    Raises:
        DeviceBusy: somebody else holds it; nothing is said about its health.
    """
    progress(f"{name}: looking whether it is fit")
    try:
        with (
            open_transport(name, device) as transport,
            bundle.connect(transport, device, device_name=name, wait_s=wait_s, progress=progress) as agent,
        ):
            return examine(agent, transport, device, limits)
    except DeviceBusy:
        raise
    except DeviceUnreachable as error:
        return Health(lasting=(f"it cannot be reached: {error}",))
    except DeviceError as error:
        return Health(lasting=(f"the runner does not work there: {error}",))


def examine(agent: Agent, transport: Transport, device: Device, limits: ConditionLimits) -> Health:
    """Return the health of a device whose runner is up."""
    lasting, notes = _clock_and_disk(transport, device)
    before = agent.conditions()[""]
    if before.busy_core_s is not None:
        time.sleep(_LOAD_SPAN_S)
    return Health(tuple(lasting), tuple(_passing(before, agent.conditions()[""], limits)), tuple(notes))


def _clock_and_disk(transport: Transport, device: Device) -> tuple[list[str], list[str]]:
    """Return (faults, notes) about the device's disk and clock."""
    argv = [bundle.device_python(device), "-c", _CLOCK_AND_DISK, bundle.device_root(device)]
    asked_s = time.time()
    said = transport.run(argv, timeout_s=_FACTS_TIMEOUT_S)
    try:
        clock_s, free_bytes = msgspec.json.decode(
            said.stdout[-200:].strip().rpartition(b"\n")[2], type=tuple[float, int]
        )
    except msgspec.DecodeError:
        text = said.stderr.decode("utf-8", "replace").strip()[-200:] or f"exit status {said.status}"
        return [f"its Python does not say how much disk is free ({text})"], []
    faults, notes = [], []
    if free_bytes < LEAST_FREE_BYTES:
        faults.append(
            f"only {format_bytes(max(free_bytes, 0))} are free where files are kept ({bundle.device_root(device)}), "
            f"and {format_bytes(LEAST_FREE_BYTES)} are needed at least; free some space there"
        )
    offset_s = clock_s - (asked_s + time.time()) / 2
    if abs(offset_s) > MOST_CLOCK_OFFSET_S:
        way = "ahead of" if offset_s > 0 else "behind"
        notes.append(f"its clock is {abs(offset_s):.0f} s {way} ours; set it (numbers do not depend on it)")
    return faults, notes


def _passing(before: Conditions, now: Conditions, limits: ConditionLimits) -> list[str]:
    """Return the states in which a visit that began now would not count."""
    found = []
    if now.throttled or now.throttle_reasons:
        names = ", ".join(now.throttle_reasons or ())
        found.append(f"it is throttled ({names})" if names else "it is throttled")
    zones = now.temperatures_celsius or {}
    hottest = max(zones, key=lambda zone: zones[zone], default="")
    if hottest and zones[hottest] > limits.max_temperature_celsius:
        found.append(f"{hottest} has {zones[hottest]:.0f} °C, and {limits.max_temperature_celsius:g} °C is the limit")
    load = load_of_others(before, [msgspec.structs.replace(now, own_core_s=0.0)])
    if load is not None and load > limits.max_foreign_load:
        found.append(f"other processes use {load:.1f} cores, and {limits.max_foreign_load:g} is the limit")
    return found
