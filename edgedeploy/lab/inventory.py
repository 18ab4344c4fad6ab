"""Which devices exist: lab.toml of this site, and `local`, which always does."""

from __future__ import annotations

import os
import re
from pathlib import Path

import msgspec

from edgedeploy.documents import closest, line_of, read_toml
from edgedeploy.errors import DocumentError, UsageError
from edgedeploy.lab.ssh import SshTransport
from edgedeploy.lab.transport import LocalTransport, Transport
from edgedeploy.records.device import FORMAT, Device, Lab
from edgedeploy.storage import config_dir

LOCAL = "local"
_EMBEDDED = Device(transport="local", description="this machine")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
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
    devices = {name: _checked(path, name, entry) for name, entry in lab.devices.items()}
    return msgspec.structs.replace(lab, devices={LOCAL: _EMBEDDED, **devices})


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


def open_transport(name: str, device: Device) -> Transport:
    """Return the way to a device, not yet connected: entering it connects."""
    return LocalTransport(name) if device.transport == "local" else SshTransport(name, device)


def _checked(path: Path, name: str, entry: Device) -> Device:
    """Return the entry with its files' paths absolute."""

    def refuse(key: str, reason: str) -> DocumentError:
        return DocumentError(f"device {name!r} in {line_of(path, 'devices', name, key)}: {reason}")

    if _NAME.fullmatch(name) is None:
        raise refuse("", "a device's name consists of letters, digits, '.', '_' and '-'")
    if name == LOCAL and entry.transport != "local":
        raise refuse("transport", f"{LOCAL!r} is always this machine; give a device behind ssh another name")
    if entry.transport == "local":
        for key in _ONLY_SSH:
            if getattr(entry, key):
                raise refuse(key, f'{key} means nothing with transport = "local"; is transport = "ssh" meant?')
    elif not entry.host:
        raise refuse("host", 'transport = "ssh" needs host = a name, an address or an alias of ~/.ssh/config')
    if not 0 <= entry.port <= 65535:
        raise refuse("port", f"{entry.port} is not a port; ports are 1 to 65535")
    for key in ("timeout_s", "connect_timeout_s"):
        if not 0 < getattr(entry, key) < float("inf"):
            raise refuse(key, f"{key} must be a number of seconds above 0")
    if entry.root.startswith("~"):
        raise refuse("root", f"root = {entry.root!r}: leave out the ~/; a relative path starts at the home directory")
    files = {
        key: str(path.parent.absolute() / Path(getattr(entry, key)).expanduser())
        for key in ("key", "known_hosts")
        if getattr(entry, key)
    }
    return msgspec.structs.replace(entry, **files)
