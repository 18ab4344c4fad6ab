"""What is shipped to a device: files by digest, only those that are missing; the runner first."""

from __future__ import annotations

import contextlib
import datetime
import getpass
import hashlib
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from edgedeploy.errors import DeviceBusy, DeviceError, DeviceUnreachable, TransferError
from edgedeploy.lab import answers
from edgedeploy.lab.conversation import Agent
from edgedeploy.lab.transport import RESUME_BYTES, Transport
from edgedeploy.records.device import Device
from edgedeploy.storage import cache_dir, sha256_file
from edgedeploy.units import format_bytes

RUNNER = Path(__file__).parent.parent / "ondevice" / "runner.py"
OLDEST_PYTHON = (3, 8)
# Lost connections in a row that have not brought a file any further.
_FRUITLESS_RECONNECTS = 3
# What the runner itself writes while it works: its index, a lease, answers of small models.
_SPARE_BYTES = 4 << 20
# How long something lies on a device that nobody uses; where there is no room, for less.
_UNUSED_S, _UNUSED_WHEN_SHORT_S = 90 * 86400.0, 86400.0
# A host that is silent for so long has lost the device; it says something four times as often.
LEASE_S = 60.0


def device_root(device: Device) -> str:
    """Return where files are kept on a device."""
    if device.root:
        return device.root
    return str(cache_dir() / "device") if device.transport == "local" else ".cache/edgedeploy"


def device_python(device: Device) -> str:
    """Return the interpreter that runs the runner and has the runtimes."""
    return device.python or (sys.executable if device.transport == "local" else "python3")


@contextlib.contextmanager
def connect(
    transport: Transport,
    device: Device,
    *,
    device_name: str,
    wait_s: float = 0.0,
    progress: Callable[[str], None] = lambda text: None,
) -> Iterator[Agent]:
    """Start the runner on a device and hold its lease; leaving ends it and everything that it started.

    Args:
        transport: an open way to the device.
        device: how it is set up.
        device_name: its name in lab.toml, for errors.
        wait_s: how long to queue for it when somebody else holds it.
        progress: told who we wait for, and what the device could not be set to.

    Raises:
        DeviceBusy: somebody else holds it, and still did after `wait_s`; the text says who.
        TransferError: the runner did not arrive.
        DeviceError: the runner cannot work there; the text says why.
    """
    agent = _start(transport, device, device_name, wait_s, progress)

    def start_again() -> None:
        # The runner that we have lost holds the device until it notices that.
        fresh = _start(transport, device, device_name, max(wait_s, 2 * LEASE_S), progress)
        agent.take_over(fresh)
        agent.start_again = start_again
        agent.allow(())
        agent.apply(device.settings)

    try:
        agent.apply(device.settings)
        agent.start_again = start_again
        yield agent
    finally:
        agent.close()


def ship(agent: Agent, transport: Transport, files: Mapping[str, Path]) -> tuple[str, ...]:
    """Copy to the device what it does not have yet, and allow it to execute the device halves among it.

    A file is uploaded beside its place and gets its name only after the device has verified its digest, so that an
    upload that was cut off is never trusted; the next one goes on where it ended. When the connection is lost we
    connect again, as long as that brings us further.

    Args:
        agent: the runner there.
        transport: the way for files.
        files: digest → local file; those in Python are device halves.

    Returns:
        The digests that had to be copied.

    Raises:
        TransferError: a file did not arrive whole, or there is no room for it.
        DeviceUnreachable: the connection was lost and did not come back.
    """
    copied: dict[str, None] = {}
    arrived: dict[str, int] = {}
    try:
        _persistently(
            agent,
            transport,
            lambda: _ship(agent, transport, files, copied, arrived),
            lambda: (len(copied), dict(arrived)),
        )
    except TransferError as error:
        error.kind = "not-shipped"
        raise
    return tuple(copied)


def fetch(agent: Agent, transport: Transport, folder: str, sha256: str, size_bytes: int, local: Path) -> None:
    """Copy a file from the device, whole or not at all; a lost connection is made again.

    Args:
        agent: the runner there.
        transport: the way for files.
        folder: "objects" or "outputs".
        sha256: what it is, which is also its name there: no path comes from the device.
        size_bytes: how long it is.
        local: where it goes.

    Raises:
        TransferError: it did not arrive, or something else did.
        DeviceUnreachable: the connection was lost and did not come back.
    """
    remote = f"{agent.root}/{folder}/{sha256}"
    _persistently(agent, transport, lambda: transport.get(remote, local, most_bytes=size_bytes), lambda: None)
    found = sha256_file(local)
    if found != sha256:
        local.unlink()
        raise TransferError(
            f"{agent.label}: {local.name} arrived with the digest {found} instead of {sha256}; try again"
        )


def _persistently(agent: Agent, transport: Transport, step: Callable[[], None], reached: Callable[[], object]) -> None:
    """Do a step; when the connection is lost meanwhile, connect again and do the rest of it.

    Args:
        agent: the runner there, which is started anew.
        transport: the way there.
        step: goes on with what it has not done yet.
        reached: says how far the step has come: whether trying again leads anywhere.
    """
    failures, before = 0, reached()
    while True:
        try:
            if failures:
                agent.start_again()
            step()
            return
        except (TransferError, DeviceUnreachable):
            failures = 1 if reached() != before else failures + 1
            before = reached()
            if failures > _FRUITLESS_RECONNECTS or transport.is_connected():
                raise
        agent.progress(f"{agent.name}: the connection was lost while files were moved; connecting again")
        transport.reconnect()


def _ship(
    agent: Agent, transport: Transport, files: Mapping[str, Path], copied: dict[str, None], arrived: dict[str, int]
) -> None:
    """Copy what is missing now.

    Args:
        copied: gains the digests of what was copied.
        arrived: gains what the device had of a file when we went on with it.
    """
    if device_halves := [digest for digest, path in files.items() if path.suffix == ".py"]:
        agent.allow(device_halves)
    said = answers.read(agent.ask("have", digests=list(files), now_s=time.time()), answers.Missing, agent.label, "have")
    missing = [digest for digest in files if digest in said.missing]
    if not missing:
        return
    begun = {digest: _arrived(agent, digest, files[digest]) for digest in missing if digest in said.parts}
    arrived.update(begun)
    wanted_bytes = sum(files[digest].stat().st_size - begun.get(digest, 0) for digest in missing)
    _make_room(agent, wanted_bytes, said.free_bytes)
    for digest in missing:
        _upload(agent, transport, digest, files[digest], begun.get(digest, 0))
        copied[digest] = None


def _arrived(agent: Agent, digest: str, local: Path) -> int:
    """Return how many bytes at the start of a file lie on the device already, from where an upload can go on."""
    there = answers.read(agent.ask("part", sha256=digest), answers.Part, agent.label, "part")
    if not 0 < there.size_bytes <= local.stat().st_size or there.sha256 != _sha256_start(local, there.size_bytes):
        return 0
    return there.size_bytes // RESUME_BYTES * RESUME_BYTES


def _sha256_start(path: Path, size_bytes: int) -> str:
    """Return the digest of the first bytes of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while size_bytes and (data := stream.read(min(size_bytes, RESUME_BYTES))):
            digest.update(data)
            size_bytes -= len(data)
    return digest.hexdigest()


def _make_room(agent: Agent, wanted_bytes: int, free_bytes: int) -> None:
    """Delete what nobody uses any more, sooner where there is no room, and raise a TransferError where none is made."""
    is_short = free_bytes < wanted_bytes + _SPARE_BYTES
    agent.ask("clean", unused_s=_UNUSED_WHEN_SHORT_S if is_short else _UNUSED_S, now_s=time.time())
    if not is_short:
        return
    free_bytes = answers.read(agent.ask("space"), answers.Space, agent.label, "space").free_bytes
    if free_bytes < wanted_bytes + _SPARE_BYTES:
        raise TransferError(
            f"{agent.label}: the disk is full: {format_bytes(wanted_bytes)} are to be sent to {agent.root}, and only "
            f"{format_bytes(free_bytes)} are free there; make room, or set another root in lab.toml"
        )


def _upload(agent: Agent, transport: Transport, digest: str, local: Path, offset: int) -> None:
    """Copy one file from an offset on, and have the device verify it."""
    part = f"{digest}.part"
    try:
        transport.put(local, f"{agent.root}/objects/{part}", offset=offset)
    except TransferError:
        if transport.is_connected():  # a full disk: what arrived only fills it; a lost connection: it is gone on with
            with contextlib.suppress(DeviceError):  # the first error is the one to tell
                transport.remove(f"{agent.root}/objects/{part}")
        raise
    try:
        agent.commit(part, digest)
    except TransferError:
        if not offset:
            raise
        _upload(agent, transport, digest, local, 0)  # what lay there was changed after we had looked at it


def lease_dir(device: Device) -> str:
    """Return where the users of a device keep the lease that they share; "": the runner's choice."""
    return device.lease_dir or (os.environ.get("EDGEDEPLOY_LEASE_DIR", "") if device.transport == "local" else "")


def _start(
    transport: Transport, device: Device, device_name: str, wait_s: float, progress: Callable[[str], None]
) -> Agent:
    """Return a greeted agent. Starting is tried first: the runner is already there every time but the first."""
    digest = sha256_file(RUNNER)

    def greeted() -> Agent:
        return _greeted(transport, device, digest, device_name=device_name, wait_s=wait_s, progress=progress)

    try:
        return greeted()
    except DeviceBusy:
        raise
    except DeviceError:  # not there yet, or not whole: send it, then the second attempt tells what is wrong
        _check_python(transport, device, device_name)
        _push_runner(transport, f"{device_root(device)}/objects/{digest}")
    return greeted()


def _greeted(
    transport: Transport,
    device: Device,
    digest: str,
    *,
    device_name: str,
    wait_s: float,
    progress: Callable[[str], None],
) -> Agent:
    """Start the runner, wait until it has the device, and for its hello."""
    root = device_root(device)
    argv = [device_python(device), f"{root}/objects/{digest}", "agent", "--root", root, "--holder", holder_words()]
    argv += ["--lease-s", f"{LEASE_S:g}", "--wait-s", f"{wait_s:g}"]
    argv += ["--lease-dir", lease_dir(device)] if lease_dir(device) else []
    agent = Agent(
        transport.open_channel(argv),
        label=transport.label,
        root=root,
        silence_s=device.timeout_s,
        name=device_name,
        progress=progress,
    )
    try:
        found = agent.greet().runner_sha256
        if found != digest:
            raise DeviceError(
                f"{transport.label}: the runner there is not ours (its digest is {found}, ours is {digest}); "
                f"delete {root}/objects on the device"
            )
    except BaseException:
        agent.close()
        raise
    return agent


def _check_python(transport: Transport, device: Device, device_name: str) -> None:
    """Raise a sentence when the device's Python is missing or too old."""
    python = device_python(device)
    said = transport.run(
        [python, "-c", "import sys; print(*sys.version_info[:2])"], timeout_s=max(device.timeout_s, 10.0)
    )
    then = f'install Python 3.8 or newer there, or name one as python = "..." of device {device_name!r} in lab.toml'
    if said.status == 127:
        raise DeviceError(f"{transport.label} has no {python}; {then}")
    words = said.stdout.decode("utf-8", "replace").split()[-2:]
    if said.status != 0 or len(words) != 2 or not all(word.isdigit() for word in words):
        if said.status == 0:
            printed = answers.visible(said.stdout.decode("utf-8", "replace"))[:400].strip() or "nothing"
            raise DeviceError(
                f"{transport.label} does not run what it is asked to run (ForceCommand, or a login shell of its own?): "
                f"asked for the version of {python}, it says: {printed}"
            )
        text = said.stderr.decode("utf-8", "replace").strip()[-400:] or f"exit status {said.status}"
        raise DeviceError(f"{transport.label}: {python} does not work there ({text}); {then}")
    if (int(words[0]), int(words[1])) < OLDEST_PYTHON:
        raise DeviceError(f"{transport.label}: {python} is Python {'.'.join(words)}, too old for the runner; {then}")


def _push_runner(transport: Transport, remote: str) -> None:
    """Send the runner, whole or not at all."""
    part = f"{remote}.part-{secrets.token_hex(4)}"
    try:
        transport.put(RUNNER, part)
        transport.rename(part, remote)
    except DeviceError:
        with contextlib.suppress(DeviceError):  # the first error is the one to tell
            transport.remove(part)
        raise


def holder_words() -> str:
    """Say who we are, for others who want the device."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        user = f"uid {os.getuid()}"
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return f"{user}@{socket.gethostname()} (process {os.getpid()}, since {now})"
