"""From a bare board to a device of the lab: it is looked at, written into lab.toml, and given its runtimes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from edgedeploy.backends import device_runtimes, load_backends
from edgedeploy.build import Progress
from edgedeploy.documents import closest, read_toml
from edgedeploy.errors import DeviceError, UsageError
from edgedeploy.lab import answers, bundle, entries, hostkeys, provision, wheels
from edgedeploy.lab.inventory import device as device_of
from edgedeploy.lab.inventory import is_name, lab_path, load_lab, open_transport
from edgedeploy.lab.provision import Installed
from edgedeploy.lab.ssh_config import parse_address, route
from edgedeploy.lab.transport import Transport
from edgedeploy.records.device import Device, Survey
from edgedeploy.records.runtime import DeviceRuntime
from edgedeploy.records.target import FORMAT as TARGET_FORMAT
from edgedeploy.records.target import Target, is_target, load_target, target_files
from edgedeploy.storage import config_dir

KNOWN_HOSTS = "known_hosts"
_PYTHONS = ("python3", *(f"python3.{minor}" for minor in range(14, 7, -1)))
# Prints "<name> <major> <minor>" of interpreters until one is new enough; the names are arguments: none is shell text.
_FIND_PYTHONS = """\
said='import sys; print(sys.argv[1], *sys.version_info[:2]); sys.exit(sys.version_info < (3, 8))'
for name; do command -v -- "$name" >/dev/null 2>&1 && "$name" -c "$said" "$name" && exit 0; done; exit 0"""
# Starting eight interpreters on a slow card, and reading some files.
_SURVEY_TIMEOUT_S = 120.0
_MOST_BYTES = 1 << 20
# A board's memory is sold as 8 GB of which the system shows somewhat less, and firmware has taken a part.
_LEAST_SHARE_OF_MEMORY = 0.8


# --- devices add


@dataclass(frozen=True, slots=True, kw_only=True)
class AddRequest:
    """A board that becomes a device of the lab.

    Attributes:
        name: what it will be called; address: "[user@]host[:port]".
        lab: the lab file; None: the person's.
        key: a private key file; jump: as in lab.toml; python: the interpreter there; "": found.
        target: a kind of device; "": guessed.
        fingerprint: "SHA256:..." of its host key; "": known already, or asked for.
        replace: an entry of that name gives way.
    """

    name: str
    address: str
    lab: Path | None = None
    key: str = ""
    jump: str = ""
    python: str = ""
    target: str = ""
    fingerprint: str = ""
    replace: bool = False


@dataclass(frozen=True, slots=True)
class Added:
    """A device that was added, and what it is.

    Attributes:
        target_reason: why it is taken for that kind of device.
        next: the command to go on with.
    """

    name: str
    lab: Path
    device: Device
    survey: Survey
    trusted: tuple[hostkeys.Trusted, ...]
    target_reason: str
    next: str


def add(request: AddRequest, accept: Callable[[hostkeys.Stranger], bool], progress: Progress) -> Added:
    """Log in to a board, see what it is, and write it into lab.toml.

    Args:
        request: which board.
        accept: asked about a host key that nobody knows; says whether it is the board's.
        progress: told what happens.

    Raises:
        UsageError: the name or the address cannot be meant, or the name is taken.
        DeviceUnreachable: it cannot be reached, or its host key was not accepted.
        DeviceError: there is no Python that the runner could use.
    """
    path = _lab_to_write(request.lab)
    entry = _entry(request, path)
    known_hosts = path.parent.absolute() / KNOWN_HOSTS
    reached = msgspec.structs.replace(entry, known_hosts=str(known_hosts))
    transport = open_transport(request.name, reached)
    progress(f"{request.name}: looking at its host key")
    trusted = hostkeys.vouch(
        route(reached),
        route(msgspec.structs.replace(entry, known_hosts="")),
        transport.label,
        known_hosts,
        accept=accept,
        fingerprint=request.fingerprint,
        connect_timeout_s=entry.connect_timeout_s,
        silence_s=entry.timeout_s,
    )
    with transport:
        progress(f"{request.name}: looking at what it is")
        python = request.python or find_python(transport, entry)
        survey = take_survey(transport, msgspec.structs.replace(reached, python=python))
    target, reason = (request.target, "it was named") if request.target else guess_target(survey)
    entry = msgspec.structs.replace(entry, python="" if python == "python3" else python, target=target)
    entries.add_entry(path, request.name, entry, replace=request.replace)
    return Added(request.name, path, entry, survey, trusted, reason, _next_command(request, entry, survey))


def remove(name: str, lab: Path | None) -> Path:
    """Remove a device from lab.toml and return the file; raises UsageError when it has none of that name."""
    path = lab_path(lab)
    entries.remove_entry(path, name)
    return path


def _lab_to_write(explicit: Path | None) -> Path:
    """Return where lab.toml is or will be: the flag's, else EDGEDEPLOY_LAB's, else the person's."""
    named = os.environ.get("EDGEDEPLOY_LAB")
    if explicit is not None:
        return explicit
    return Path(named).expanduser() if named else config_dir() / "lab.toml"


def _entry(request: AddRequest, path: Path) -> Device:
    """Return the entry as far as it is known before the board is reached; an entry that it replaces keeps the rest."""
    if not is_name(request.name):
        raise UsageError(
            f"{request.name!r} cannot be a device's name; it consists of letters, digits, '.', '_' and '-'"
        )
    before = entries.read_entry(path, request.name)
    if before is not None and not request.replace:
        raise UsageError(
            f"{path} has a device {request.name!r} already; choose another name, or replace it with --replace"
        )
    if request.target and request.target not in target_files():
        raise UsageError(
            f"there is no target {request.target!r}{closest(request.target, target_files())} (known: "
            f"{', '.join(target_files())})"
        )
    if request.fingerprint and not re.fullmatch(r"SHA256:[A-Za-z0-9+/]{43}", request.fingerprint):
        raise UsageError(
            f"{request.fingerprint!r} is not a fingerprint; it is SHA256: and 43 letters, as `ssh-keygen -lf "
            "/etc/ssh/ssh_host_ed25519_key.pub` prints it on the device"
        )
    user, host, port = parse_address(request.address, "the address")
    if any(word.startswith("-") or not word.isprintable() for word in (user, host, request.python)):
        raise UsageError(f"the address {request.address!r} is not one like user@host:port")
    known = before if before is not None and before.transport == "ssh" else Device(transport="ssh")
    return msgspec.structs.replace(
        known,
        host=host,
        port=port,
        user=user,
        key=str(Path(request.key).expanduser().absolute()) if request.key else known.key,
        jump=request.jump or known.jump,
        known_hosts=KNOWN_HOSTS,
    )


def _next_command(request: AddRequest, entry: Device, survey: Survey) -> str:
    lab = f" --lab {request.lab}" if request.lab is not None else ""
    if entry.target:
        allowed = read_toml(target_files()[entry.target], Target, TARGET_FORMAT).backends
        for name in allowed:
            choices = device_runtimes(name)
            if choices and not any(one.distribution in survey.runtimes for one in choices):
                return f"edgedeploy devices provision {request.name} --runtime {name}{lab}"
    return f"edgedeploy devices check {request.name}{lab}"


def find_python(transport: Transport, device: Device) -> str:
    """Return the first interpreter of a board that the runner can use: python3, else the newest python3.x.

    Raises:
        DeviceError: there is none.
    """
    said = transport.run(["sh", "-c", _FIND_PYTHONS, "sh", *_PYTHONS], timeout_s=_SURVEY_TIMEOUT_S)
    found: dict[str, tuple[int, int]] = {}
    for line in said.stdout[:_MOST_BYTES].decode("utf-8", "replace").splitlines():
        words = line.split()
        if len(words) == 3 and words[0] in _PYTHONS and all(re.fullmatch(r"\d{1,3}", word) for word in words[1:]):
            found[words[0]] = (int(words[1]), int(words[2]))
    for name, version in found.items():
        if version >= bundle.OLDEST_PYTHON:
            return name
    oldest = ".".join(map(str, bundle.OLDEST_PYTHON))
    listed = ", ".join(f"{name} is {major}.{minor}" for name, (major, minor) in found.items()) or "it has none"
    raise DeviceError(
        f"{transport.label} has no Python {oldest} or newer that can be found by name ({listed}); install one there "
        "(Debian: apt install python3), or name one with --python"
    )


def take_survey(transport: Transport, device: Device) -> Survey:
    """Return what a board is; nothing is written there, and no lease is taken.

    Raises:
        DeviceError: its Python does not run the runner.
    """
    modules = [f"{one.distribution}={one.module}" for name in load_backends()[0] for one in device_runtimes(name)]
    python, root = bundle.device_python(device), bundle.device_root(device)
    argv = [python, "-", "survey", "--root", root, *modules]
    said = transport.run(argv, timeout_s=_SURVEY_TIMEOUT_S, stdin=bundle.RUNNER.read_bytes())
    # A login shell may print before us; what we asked for is the last line.
    lines = said.stdout[-_MOST_BYTES:].splitlines()
    if said.status != 0 or not lines:
        tail = said.stderr[-2000:].decode("utf-8", "replace").strip().splitlines()[-1:]
        why = answers.told(tail[0]) if tail else f"exit status {said.status}"
        raise DeviceError(
            f"{transport.label}: {python} does not run edgedeploy's runner there ({why}); name another interpreter "
            "with --python"
        )
    try:
        fields = msgspec.json.decode(lines[-1], type=dict[str, object])
    except msgspec.DecodeError as error:
        raise DeviceError(
            f"{transport.label}: what {python} printed is not what the runner says ({error}); is it really Python?"
        ) from error
    return answers.read(fields, Survey, transport.label, "survey")


def guess_target(survey: Survey) -> tuple[str, str]:
    """Return the kind of device that a board is, and why; ("", why not) where none fits.

    A target whose name's words are all in the name of the board ("raspberry-pi-5") comes first, the most words win;
    then what the target `host` says of the processor.
    """
    facts = survey.facts
    board = set(re.findall(r"[a-z]+|\d+", facts.board.lower()))
    fitting = {
        name: target
        for name, path in target_files().items()
        if (target := read_toml(path, Target, TARGET_FORMAT)).machine
        and is_target(target, machine=facts.machine, isa=facts.isa)
    }
    named = [name for name in fitting if board and _is_of(name, board, facts.memory_bytes)]
    if named:
        name = max(named, key=lambda one: (len(one.split("-")), one))
        return name, f"the board calls itself {facts.board}"
    try:
        name = load_target("host", machine=facts.machine, isa=facts.isa).name
    except UsageError:
        return "", f"no target is for {facts.machine}; name one with --target, or write one: targets/*.toml"
    unlike = f", and no target is called like {facts.board}" if board else ""
    return name, f"its processor is {facts.machine}{unlike}"


def _is_of(target: str, board: set[str], memory_bytes: int | None) -> bool:
    """Say whether every word of a target's name is in the board's; "8gb" means its memory."""
    for word in target.split("-"):
        if size := re.fullmatch(r"(\d+)gb", word):
            share = (memory_bytes or 0) / (int(size[1]) * 2**30)
            if not _LEAST_SHARE_OF_MEMORY <= share <= 1:
                return False
        elif word not in board:
            return False
    return True


# --- devices provision


@dataclass(frozen=True, slots=True)
class Provided:
    """A runtime that is on the device now.

    Attributes:
        says: the version that the module says of itself; "" where it was there already, or says none.
        note: what a person should know about the choice of version.
    """

    backend: str
    runtime: Installed
    was_missing: bool
    says: str = ""
    note: str = ""


@dataclass(slots=True)
class Provisioned:
    """What a device has now, and what was done.

    Attributes:
        used: back end → name of the runtime that its sessions are opened with.
    """

    device: str
    provided: list[Provided] = field(default_factory=list)
    removed: list[Installed] = field(default_factory=list)
    installed: tuple[Installed, ...] = ()
    used: dict[str, str] = field(default_factory=dict)


def parse_runtime(text: str) -> tuple[str, tuple[DeviceRuntime, ...], str]:
    """Return (back end, distributions to choose from, version or "") of "onnxruntime==1.20.1" or "tflite-runtime".

    Raises:
        UsageError: no back end and no runtime of one is called so.
    """
    name, equals, version = text.partition("==")
    if equals and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+!-]*", version):
        raise UsageError(f"{text!r} does not name a version; write it like onnxruntime==1.20.1")
    found, _ = load_backends()
    every = {backend: device_runtimes(backend) for backend in found}
    if every.get(name):
        return name, every[name], version
    for backend, choices in every.items():
        for one in choices:
            if wheels.normalized(one.distribution) == wheels.normalized(name):
                return backend, (one,), version
    if name in every:
        raise UsageError(f"the runtime of {name} is not brought by wheels; the device's own system has to have it")
    known = {
        one: None
        for backend, choices in every.items()
        for one in (backend, *(c.distribution for c in choices))
        if choices
    }
    raise UsageError(f"there is no runtime {name!r}{closest(name, known)} (known: {', '.join(sorted(known))})")


def provision_device(
    name: str,
    lab: Path | None,
    asked: Sequence[str],
    progress: Progress,
    *,
    prune: bool = False,
    upgrade: bool = False,
    wait_s: float = 0.0,
) -> Provisioned:
    """Install what is missing of the runtimes that are asked for, each in a folder of its own.

    Args:
        name: the device's.
        lab: the lab file; None: the person's.
        asked: back ends or distributions, "onnxruntime" or "onnxruntime==1.20.1".
        progress: told what happens.
        prune: remove what no session would be opened with.
        upgrade: ask the package index again, although the cache has an answer.
        wait_s: how long to queue for the device.

    Raises:
        DeviceError: the board cannot have it; naming what is possible.
        ToolchainError: the wheels cannot be fetched.
    """
    device = device_of(load_lab(lab_path(lab)), name)
    wanted = [parse_runtime(text) for text in asked]
    done = Provisioned(name)
    with open_transport(name, device, wait_s=wait_s, progress=progress) as transport:
        progress(f"{name}: connecting")
        with bundle.connect(transport, device, device_name=name, wait_s=wait_s, progress=progress) as agent:
            found = {one.name: one for one in provision.installed(agent)}
            for backend, choices, version in wanted:
                prefix, tar = wheels.make_prefix(
                    choices, wheels.platform_of(agent.facts), version=version, is_renewed=upgrade, progress=progress
                )
                says, is_missing = "", prefix.name not in found
                if is_missing:
                    says = provision.install(agent, transport, prefix, tar, progress)
                    found = {one.name: one for one in provision.installed(agent)}
                done.provided.append(Provided(backend, found[prefix.name], is_missing, says, prefix.note))
            every = {one: device_runtimes(one) for one in load_backends()[0]}
            if prune:
                done.removed = list(provision.unused(found.values(), every, agent.facts, device.runtimes))
                provision.remove(agent, [one.name for one in done.removed])
            gone = {one.name for one in done.removed}
            done.installed = tuple(one for one in found.values() if one.name not in gone)
            for backend, choices in every.items():
                pinned = device.runtimes.get(backend, "")
                if used := provision.choose(done.installed, choices, agent.facts, version=pinned):
                    done.used[backend] = used.name
    return done
