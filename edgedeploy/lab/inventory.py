"""Which devices exist: lab.toml of this site, and `local`, which always does."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import msgspec

from edgedeploy.documents import closest, line_of, read_toml
from edgedeploy.errors import DocumentError, UsageError
from edgedeploy.lab.places import PlaceTransport
from edgedeploy.lab.ssh import SshTransport
from edgedeploy.lab.transport import LocalTransport, Transport
from edgedeploy.records.device import FORMAT, Device, DeviceSettings, Lab
from edgedeploy.storage import config_dir

LOCAL = "local"
_EMBEDDED = Device(transport="local", description="this machine")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# What ends as a word of a command, an address or a path.
_WORDS = ("host", "user", "key", "jump", "known_hosts", "python", "root", "lease_dir", "place")
_ONLY_SSH = ("host", "port", "user", "key", "jump", "known_hosts")


def lab_path(explicit: Path | None) -> Path:
    """Return where lab.toml is: the flag's, else EDGEDEPLOY_LAB's, else the person's; only the last may be missing.

    Raises:
        DocumentError: a file that was asked for does not exist.
    """
    named = os.environ.get("EDGEDEPLOY_LAB")
    if explicit is None and not named:
        return config_dir() / "lab.toml"
    path = explicit if explicit is not None else Path(named or "").expanduser()
    if not path.exists():
        who = "" if explicit is not None else " (named by EDGEDEPLOY_LAB)"
        raise DocumentError(f"the lab file {path}{who} does not exist")
    return path


def load_lab(path: Path) -> Lab:
    """Read lab.toml and add `local`; a missing file is a lab with nothing else.

    Relative `key` and `known_hosts` are relative to the file.

    Raises:
        DocumentError: naming file and line.
    """
    if not path.exists():
        return Lab(devices={LOCAL: _EMBEDDED})
    lab = read_toml(path, Lab, FORMAT)
    devices = {name: _checked(path, name, _placed(lab, entry)) for name, entry in lab.devices.items()}
    return msgspec.structs.replace(lab, devices={LOCAL: _EMBEDDED, **devices})


def is_name(text: str) -> bool:
    """Say whether a device may be called so."""
    return _NAME.fullmatch(text) is not None


def device(lab: Lab, name: str) -> Device:
    """Return one device.

    Raises:
        UsageError: no such device; naming the likely intended one.
    """
    if name not in lab.devices:
        known = ", ".join(sorted(lab.devices))
        raise UsageError(
            f"there is no device {name!r} in the lab{closest(name, lab.devices)} (known: {known}; add others "
            "to lab.toml)"
        )
    return lab.devices[name]


def open_transport(
    name: str,
    device: Device,
    *,
    wait_s: float = 0.0,
    progress: Callable[[str], None] = lambda text: None,
) -> Transport:
    """Return the way to a device, not yet connected: entering it connects.

    Args:
        name: the device's name in lab.toml.
        device: its entry.
        wait_s: how long to queue for what must be had before the device is reached, a place of labgrid.
        progress: told who is waited for.
    """
    if device.transport == "local":
        return LocalTransport(name)
    if device.transport == "labgrid":
        return PlaceTransport(name, device, wait_s=wait_s, progress=progress)
    return SshTransport(name, device)


def _placed(lab: Lab, entry: Device) -> Device:
    """Return a labgrid device with its coordinator."""
    if entry.transport != "labgrid":
        return entry
    return msgspec.structs.replace(entry, coordinator=entry.coordinator or lab.labgrid_coordinator)


def _settings_problem(settings: DeviceSettings) -> str:
    """Say what cannot be meant in a device's settings; "" when all can. The device says what it cannot be set to."""
    if settings.governor and not re.fullmatch("[a-z][a-z_0-9-]{0,30}", settings.governor):
        return f'governor = {settings.governor!r} is no governor of cpufreq, such as "performance"'
    if settings.cpu_affinity and not re.fullmatch(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*", settings.cpu_affinity):
        return f'cpu_affinity = {settings.cpu_affinity!r}: cores are meant, such as "4-7" or "0,2"'
    if settings.power_mode is not None and not 0 <= settings.power_mode < 1000:
        return f"power_mode = {settings.power_mode}: the number that nvpmodel -m takes is meant"
    if settings.start_below_celsius is not None and not -50 < settings.start_below_celsius < 1000:
        return f"start_below_celsius = {settings.start_below_celsius:g} is no temperature of a processor"
    if not 0 <= settings.cooling_cap_s <= 3000:
        return f"cooling_cap_s = {settings.cooling_cap_s:g}: seconds from 0 to 3000 are meant"
    return ""


def _checked(path: Path, name: str, entry: Device) -> Device:
    """Return the entry with its files' paths absolute."""

    def refuse(key: str, reason: str) -> DocumentError:
        return DocumentError(f"device {name!r} in {line_of(path, 'devices', name, key)}: {reason}")

    if not is_name(name):
        raise refuse("", "a device's name consists of letters, digits, '.', '_' and '-'")
    if name == LOCAL and entry.transport != "local":
        raise refuse("transport", f"{LOCAL!r} is always this machine; give a device behind ssh another name")
    if entry.transport == "local":
        for key in _ONLY_SSH:
            if getattr(entry, key):
                raise refuse(key, f'{key} means nothing with transport = "local"; is transport = "ssh" meant?')
    elif entry.transport == "labgrid":
        if not entry.place:
            raise refuse("", 'transport = "labgrid" needs place = the name of a place (labgrid-client places)')
        if not entry.coordinator:
            reason = f'the place {entry.place!r} needs labgrid_coordinator = "host:port" at the top of the lab file'
            raise refuse("place", reason)
    elif not entry.host:
        raise refuse("host", 'transport = "ssh" needs host = a name, an address or an alias of ~/.ssh/config')
    if entry.transport != "labgrid":
        for key in ("place", "coordinator"):
            if getattr(entry, key):
                raise refuse(key, f'{key} means nothing with transport = "{entry.transport}"; is "labgrid" meant?')
    for key in _WORDS:
        if not getattr(entry, key).isprintable():
            raise refuse(key, f"{key} holds a control character, such as a line break or a NUL")
        if getattr(entry, key).startswith("-"):
            raise refuse(key, f"{key} starts with a dash, which programs take for an option; write ./- if it is a path")
    if not 0 <= entry.port <= 65535:
        raise refuse("port", f"{entry.port} is not a port; ports are 1 to 65535")
    for key in ("timeout_s", "connect_timeout_s"):
        if not 0 < getattr(entry, key) < float("inf"):
            raise refuse(key, f"{key} must be a number of seconds above 0")
    if problem := _settings_problem(entry.settings):
        raise refuse("settings", problem)
    if entry.root.startswith("~"):
        raise refuse("root", f"root = {entry.root!r}: leave out the ~/; a relative path starts at the home directory")
    try:
        files = {
            key: str(path.parent.absolute() / Path(getattr(entry, key)).expanduser())
            for key in ("key", "known_hosts")
            if getattr(entry, key)
        }
    except RuntimeError as error:  # ~somebody who has no account here
        raise refuse("key", f"key or known_hosts cannot be found: {error}") from error
    return msgspec.structs.replace(entry, **files)
