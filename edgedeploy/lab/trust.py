"""What is trusted on the way to a device and on this machine, why, and where that is weak. Reads; reaches nothing."""

from __future__ import annotations

import base64
import dataclasses
import grp
import hashlib
import os
import pwd
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgedeploy.errors import EdgedeployError
from edgedeploy.lab.bundle import device_python, device_root, lease_dir
from edgedeploy.lab.ssh_config import Hop, route
from edgedeploy.lab.ssh_login import known_keys
from edgedeploy.records.device import Device

_SYSTEM = Path("/etc/ssh")
_USUAL_KEYS = ("id_ed25519", "id_ecdsa", "id_rsa")

# Variable → what whoever sets it decides.
VARIABLES = {
    "EDGEDEPLOY_LAB": "which devices there are, and the keys by which they are known",
    "EDGEDEPLOY_TARGETS": "what may be compiled for which device",
    "EDGEDEPLOY_CACHE_DIR": "where artifacts are taken from that were built before",
    "EDGEDEPLOY_STATE_DIR": "where the journal of unfinished work is read from",
    "EDGEDEPLOY_TOOLS_DIR": "which interpreters run the converters",
    "EDGEDEPLOY_LEASE_DIR": "where this machine's lease lies; another folder is another lease",
    "SSH_AUTH_SOCK": "which keys log us in",
    "HOME": "whose ~/.ssh and settings are read",
    "XDG_CONFIG_HOME": "whose lab.toml is read",
    "XDG_CACHE_HOME": "where artifacts are taken from that were built before",
    "XDG_STATE_HOME": "where the journal of unfinished work is read from",
    "PATH": "which programs pip, ssh-keygen and the converters are",
    "PYTHONPATH": "which Python code runs here",
    "PYTHONHOME": "which Python code runs here",
    "LD_PRELOAD": "which machine code runs here",
    "LD_LIBRARY_PATH": "which machine code runs here",
    "PIP_INDEX_URL": "where the wheels of provisioned runtimes come from",
    "PIP_EXTRA_INDEX_URL": "where the wheels of provisioned runtimes come from",
    "PIP_FIND_LINKS": "where the wheels of provisioned runtimes come from",
    "PIP_TRUSTED_HOST": "which package index need not prove its identity",
    "PIP_CONFIG_FILE": "where the wheels of provisioned runtimes come from",
    "EDGEDEPLOY_WHEELHOUSE": "where the wheels of provisioned runtimes come from",
    "LG_ENV": "as whom, and with which key, we log in to labgrid's places",
    "DASK_SCHEDULER_ADDRESS": "which machines run our tasks, and therefore our code",
}
# Set on every machine; named only where they are something unusual.
_ALWAYS_SET = ("HOME", "PATH")
_ALARMING = ("LD_PRELOAD", "PIP_TRUSTED_HOST", "PYTHONPATH", "PYTHONHOME")

NOT_PROTECTED = (
    "Root on a device can lie about every number, answer and reading. What comes back is parsed within limits and "
    "cannot harm this machine, but nothing proves that it is true.",
    "Whoever may log in to a device as its user can change what lies in our folder there between two sessions. Files "
    "that are executed are hashed and compared before each use; a runtime that the device's own Python imports is not.",
    "Any account on a device can take its lease and keep others waiting. The lease orders people who mean well; it "
    "keeps nobody out.",
    "A model's own Python code, a back end of a plugin and a file under --trust-pickle run here with all your rights.",
    "Wheels of a provisioned runtime are what pip's package index gives; nothing here knows what they should be.",
    "A private key without a passphrase is as safe as the file that it lies in.",
    "A scheduler of Dask, and a coordinator of labgrid, that does not use TLS believes everybody who can reach it; "
    "tasks are pickled, so who controls the scheduler runs code on this machine.",
    "A jump host sees when and how much is sent to a device, and can cut the connection; it cannot read or change it.",
    "Nobody is told when a device is stolen: take its key out of known_hosts, and ours out of its authorized_keys.",
)


@dataclass(frozen=True, slots=True)
class Trust:
    """One thing that is relied on.

    Attributes:
        subject: a device's name, or "this machine".
        part: "host key", "login key", "lab file" ...
        what: the thing itself: a fingerprint, a file, an address.
        why: how it came to be trusted.
        weakness: who else could make it something else, and what to do; "" where nothing is found.
    """

    subject: str
    part: str
    what: str
    why: str
    weakness: str = ""


HERE = "this machine"


def of_device(name: str, device: Device, config: Path | None = None) -> list[Trust]:
    """Return what is trusted when a device is used.

    Args:
        name: in lab.toml.
        device: its entry.
        config: the person's OpenSSH configuration; None: ~/.ssh/config.
    """
    return [*_way(name, device, config), *_on_device(name, device)]


def _way(name: str, device: Device, config: Path | None) -> Iterator[Trust]:
    if device.transport == "local":
        yield Trust(name, "way", "a process of your own on this machine", "no network is used")
        return
    if device.transport == "labgrid":
        yield Trust(
            name,
            "coordinator",
            device.coordinator,
            f"lab.toml names it; it decides which host, port and user the place {device.place!r} is",
            "it is asked without TLS: whoever can answer in its place chooses the host; only a host key in known_hosts "
            "keeps a wrong one out",
        )
        return
    try:
        hops = route(device, config)
    except EdgedeployError as error:
        yield Trust(name, "way", "none", "its way cannot be found", str(error))
        return
    for number, hop in enumerate(hops, start=1):
        who = "host key" if hop is hops[-1] else f"jump host {number}: host key"
        yield from _host_keys(name, who, hop)
        part = "login key" if hop is hops[-1] else f"jump host {number}: login key"
        yield from _login_keys(name, part, hop)


def _host_keys(name: str, part: str, hop: Hop) -> Iterator[Trust]:
    """Yield the keys that a server may show, each with the file that vouches for it."""
    known = 0
    for file in hop.known_hosts:
        try:
            keys = known_keys(dataclasses.replace(hop, known_hosts=(file,)))
        except EdgedeployError as error:
            yield Trust(name, part, str(file), "it cannot be read, so that we do not connect", str(error))
            known += 1
            continue
        for key in keys:
            known += 1
            what = f"{hop.host_key_name} is {key.get_name()} {key.fingerprint}"
            yield Trust(name, part, what, f"{file} says so: {_learnt(file)}", weakness_of(file))
    if not known:
        files = ", ".join(str(file) for file in hop.known_hosts)
        yield Trust(
            name,
            part,
            f"none of {hop.host_key_name} is known",
            f"no line in {files}; we do not connect until there is one",
            "compare the fingerprint that the next attempt shows with the one on the device itself before accepting it",
        )


def _learnt(file: Path) -> str:
    """Say how lines come into a file of known hosts."""
    if file.is_relative_to(_SYSTEM):
        return "this machine's administrator wrote it"
    if file.is_relative_to(Path.home() / ".ssh"):
        return "you accepted it with ssh"
    return "you accepted it when the device was added, or wrote it there"


def _login_keys(name: str, part: str, hop: Hop) -> Iterator[Trust]:
    """Yield the private keys that are offered to a server."""
    agent = os.environ.get("SSH_AUTH_SOCK", "")
    if agent and not hop.keys:
        why = f"no key is named: every key of the agent is offered to {hop}, which thereby learns your public keys"
        yield Trust(name, part, f"the agent at {agent}", why, weakness_of(Path(agent)))
    usual = [one for one in _usual_keys() if one.exists()]
    if not (agent or hop.keys or usual):
        yield Trust(name, part, "none", f"no key is named, and there is none to offer to {hop}")
    for file in hop.keys or usual:
        why = f"{'lab.toml or ssh itself names it' if hop.keys else 'ssh uses this name'}; it is offered to {hop}"
        if not file.exists():
            yield Trust(name, part, str(file), why, "it does not exist; name another as key in lab.toml")
        else:
            yield Trust(name, part, f"{file}{_fingerprint(file)}", why, weakness_of(file, is_secret=True))


def _usual_keys() -> list[Path]:
    return [Path.home() / ".ssh" / name for name in _USUAL_KEYS]


def _fingerprint(file: Path) -> str:
    """Return " (ssh-ed25519 SHA256:...)" of the .pub file beside a private key, or ""."""
    try:
        kind, text, *_ = file.with_name(f"{file.name}.pub").read_text(encoding="utf-8").split()
        blob = base64.b64decode(text, validate=True)
    except (OSError, ValueError):
        return ""
    digest = base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")
    return f" ({kind} SHA256:{digest})"


def _on_device(name: str, device: Device) -> Iterator[Trust]:
    root, settings = device_root(device), device.settings
    yield Trust(name, "interpreter", device_python(device), "lab.toml names it, or it is the first in its PATH there")
    yield Trust(
        name,
        "folder",
        root,
        "ours alone there (mode 0700); what is executed is hashed and compared with what we sent before each use",
        weakness_of(Path(root)) if device.transport == "local" else "",
    )
    if lease_dir(device):
        yield Trust(name, "lease", lease_dir(device), "lab.toml or EDGEDEPLOY_LEASE_DIR names the folder")
    wanted = [
        text
        for text, is_wanted in (
            (f"governor {settings.governor}", bool(settings.governor)),
            (f"power mode {settings.power_mode}", settings.power_mode is not None),
            ("fixed clocks", settings.fixed_clocks),
        )
        if is_wanted
    ]
    if settings.sudo:
        yield Trust(
            name,
            "sudo",
            f"`sudo -n` there for: {', '.join(wanted) or 'nothing yet'}",
            "lab.toml allows it (settings.sudo = true)",
            "a user who may become root without a password is root: allow the commands that are needed in sudoers, and "
            "no others",
        )
    for backend, version in sorted(device.runtimes.items()):
        yield Trust(name, "runtime", f"{backend} {version}", "lab.toml names the version; devices provision sent it")


def of_environment(variables: Mapping[str, str]) -> list[Trust]:
    """Return the environment variables that decide what is trusted and are set here.

    >>> [one.what for one in of_environment({"PIP_INDEX_URL": "https://me:secret@example.org/simple"})]
    ['PIP_INDEX_URL=https://…@example.org/simple']
    """
    return [
        Trust(
            HERE,
            "environment",
            f"{name}={_without_password(variables[name])}",
            f"it decides {VARIABLES[name]}",
            "unset it, unless it was you who set it" if name in _ALARMING else "",
        )
        for name in VARIABLES
        if variables.get(name) and name not in _ALWAYS_SET
    ]


def _without_password(text: str) -> str:
    return re.sub(r"://[^/@\s]*@", "://…@", text)


def of_path(part: str, path: Path, why: str, *, is_secret: bool = False) -> Trust:
    """Return that a file or folder of this machine is trusted, and who else could change it."""
    there = "" if path.exists() else " (not there yet)"
    return Trust(HERE, part, f"{path}{there}", why, weakness_of(path, is_secret=is_secret))


def weakness_of(path: Path, *, is_secret: bool = False) -> str:
    """Say who besides its owner and root could change what is at a path, or read it where it is secret; "" for nobody.

    Args:
        path: a file or folder; the folders on the way count too: who may rename may replace.
        is_secret: nobody else may even read it.
    """
    place = Path(os.path.realpath(path))
    for one in (place, *place.parents):
        try:
            found = one.stat()
        except FileNotFoundError:
            continue
        except OSError as error:
            return f"{one} cannot be examined: {error.strerror}"
        if found.st_uid not in (0, os.geteuid()):
            return f"{one} belongs to {_user(found.st_uid)}, who can change it; use a place of your own"
        # In a sticky folder (/tmp) only the owner of a file may rename it.
        is_sticky = stat.S_ISDIR(found.st_mode) and bool(found.st_mode & stat.S_ISVTX) and one != place
        if found.st_mode & stat.S_IWOTH and not is_sticky:
            return f"everybody here can change {one} (mode {found.st_mode & 0o7777:04o}); chmod o-w it"
        if found.st_mode & stat.S_IWGRP and not is_sticky and not _is_own_group(found.st_gid):
            group = _group(found.st_gid)
            return f"the group {group} can change {one} (mode {found.st_mode & 0o7777:04o}); chmod g-w it"
        if is_secret and one == place and found.st_mode & 0o077:
            return f"others can read {one} (mode {found.st_mode & 0o7777:04o}), a private key; chmod 600 it"
    return ""


def _is_own_group(number: int) -> bool:
    """Say whether a group has nobody in it but us: many systems give each person one."""
    try:
        members = set(grp.getgrgid(number).gr_mem)
        me = pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return number == me.pw_gid and members <= {me.pw_name}


def _user(number: int) -> str:
    try:
        return f"the user {pwd.getpwuid(number).pw_name!r}"
    except KeyError:
        return f"the user number {number}"


def _group(number: int) -> str:
    try:
        return repr(grp.getgrgid(number).gr_name)
    except KeyError:
        return f"number {number}"
