"""Whose host keys are trusted: a new server's key is shown, and trusted when the person says that it is the device's.

Nothing is learnt silently. What is accepted goes to a file beside lab.toml; the person's own known_hosts are read, and
never written.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgedeploy.errors import DeviceUnreachable, DocumentError, UsageError
from edgedeploy.lab.ssh_config import Hop
from edgedeploy.lab.ssh_login import check_host_key, known_keys, shown_key

if TYPE_CHECKING:
    import paramiko

# Types of host key that OpenSSH makes; a server has one of each, and a person may have noted any one's fingerprint.
_KINDS = ("ssh-ed25519", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521", "ssh-rsa")
# What would be something else in a line of known_hosts: a list, a pattern, a marker, a hash.
_NAME = re.compile(r"[^\s,*?!|#@\x00-\x20\x7f]+")


@dataclass(frozen=True, slots=True)
class Stranger:
    """A server whose key nobody has vouched for.

    Attributes:
        who: how it is called: the device, or a jump host on the way to it.
        address: "host:port".
        kind: "ssh-ed25519".
        fingerprint: "SHA256:...", as ssh prints it.
    """

    who: str
    address: str
    kind: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Trusted:
    """A server whose key is known now, and why.

    Attributes:
        reason: it was "known" beside lab.toml, "copied" from the person's own known_hosts, had the "fingerprint" that
            the person gave, or was "accepted".
    """

    address: str
    kind: str
    fingerprint: str
    reason: Literal["known", "copied", "fingerprint", "accepted"]


def vouch(
    route: Sequence[Hop],
    person: Sequence[Hop],
    label: str,
    file: Path,
    *,
    accept: Callable[[Stranger], bool],
    fingerprint: str = "",
    connect_timeout_s: float,
    silence_s: float,
) -> tuple[Trusted, ...]:
    """See that the key of every server on the way to a device is in `file`: jump hosts first, then the device's.

    Args:
        route: the servers on the way, with `file` as their known_hosts.
        person: the same servers, with the known_hosts that ssh would read.
        label: how errors name the device.
        file: where accepted keys are kept.
        accept: asked about a key that nobody knows; says whether it is the server's.
        fingerprint: of the device's key as the person has it from the device itself: nothing is asked then.
        connect_timeout_s: the limit of each step of connecting.
        silence_s: how long the kernel waits for an answer on a dead link.

    Raises:
        DeviceUnreachable: a server cannot be reached, shows another key than is known, or was not accepted.
    """
    trusted = []
    for number, (hop, theirs) in enumerate(zip(route, person, strict=True)):
        who = label if hop is route[-1] else f"the jump host {hop} of {label}"
        if _NAME.fullmatch(hop.host_key_name) is None:
            raise UsageError(f"{hop.host_key_name!r} cannot be a host's name in a known_hosts file; write an address")
        wanted = fingerprint if hop is route[-1] else ""
        here, there = known_keys(hop), known_keys(theirs)
        key = _key_of(
            route[: number + 1], who, wanted, [one.get_name() for one in (*here, *there)], connect_timeout_s, silence_s
        )
        stranger = Stranger(who, f"{hop.host}:{hop.port}", key.get_name(), key.fingerprint)
        reason = _reason(key, stranger, hop, theirs, here, there, wanted, accept)
        if reason != "known":
            add_known_host(file, hop.host_key_name, key)
        trusted.append(Trusted(stranger.address, stranger.kind, stranger.fingerprint, reason))
    return tuple(trusted)


def _key_of(
    route: Sequence[Hop], who: str, fingerprint: str, kinds: Sequence[str], connect_timeout_s: float, silence_s: float
) -> paramiko.PKey:
    """Return a server's host key: of a known type, or the one with a given fingerprint."""

    def show(first: Sequence[str]) -> paramiko.PKey:
        return shown_key(route, who, connect_timeout_s=connect_timeout_s, silence_s=silence_s, kinds=first)

    key = show(kinds)
    shown = {key.get_name(): key.fingerprint}
    if not fingerprint or key.fingerprint == fingerprint:
        return key
    for kind in _KINDS:
        if kind in shown:
            continue
        key = show([kind])
        if key.fingerprint == fingerprint:
            return key
        shown[key.get_name()] = key.fingerprint
    listed = ", ".join(f"{kind} {text}" for kind, text in shown.items())
    raise DeviceUnreachable(
        f"{who} has no host key with the fingerprint {fingerprint}; it shows {listed}. Either the fingerprint is of "
        "another device, or somebody is listening in; nothing was sent to it"
    )


def _reason(
    key: paramiko.PKey,
    stranger: Stranger,
    hop: Hop,
    theirs: Hop,
    here: Sequence[paramiko.PKey],
    there: Sequence[paramiko.PKey],
    fingerprint: str,
    accept: Callable[[Stranger], bool],
) -> Literal["known", "copied", "fingerprint", "accepted"]:
    """Say why a key is trusted; raises DeviceUnreachable where it is not."""
    # A marker @revoked anywhere counts, and so does another key that the person knows this server by.
    both = dataclasses.replace(hop, known_hosts=(*hop.known_hosts, *theirs.known_hosts))
    if here:
        check_host_key(key, here, both, stranger.who)
        return "known"
    if there:
        check_host_key(key, there, dataclasses.replace(both, known_hosts=theirs.known_hosts), stranger.who)
        return "copied"
    check_host_key(key, [key], both, stranger.who)
    if fingerprint:
        return "fingerprint"
    if not accept(stranger):
        raise DeviceUnreachable(
            f"{stranger.who} shows the {stranger.kind} key {stranger.fingerprint}, which was not accepted; nothing was "
            "written"
        )
    return "accepted"


def add_known_host(file: Path, name: str, key: paramiko.PKey) -> None:
    """Add a line to a file of known hosts, which is made where there is none."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DocumentError(f"the file of known hosts {file} cannot be written: {error.strerror}") from error
    with os.fdopen(handle, "r+b") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        before = stream.read()
        start = b"" if not before or before.endswith(b"\n") else b"\n"
        stream.write(start + f"{name} {key.get_name()} {key.get_base64()}\n".encode())
