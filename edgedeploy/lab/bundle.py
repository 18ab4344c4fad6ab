"""What is shipped to a device: files by digest, only those that are missing; the runner first."""

from __future__ import annotations

import contextlib
import datetime
import getpass
import os
import secrets
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from edgedeploy.errors import DeviceBusy, DeviceError, TransferError
from edgedeploy.lab.conversation import Agent
from edgedeploy.lab.transport import Transport
from edgedeploy.records.device import Device
from edgedeploy.storage import cache_dir, sha256_file

RUNNER = Path(__file__).parent.parent / "ondevice" / "runner.py"
OLDEST_PYTHON = (3, 8)


def device_root(device: Device) -> str:
    """Return where files are kept on a device."""
    if device.root:
        return device.root
    return ".cache/edgedeploy" if device.transport == "ssh" else str(cache_dir() / "device")


def device_python(device: Device) -> str:
    """Return the interpreter that runs the runner and has the runtimes."""
    return device.python or ("python3" if device.transport == "ssh" else sys.executable)


@contextlib.contextmanager
def connect(transport: Transport, device: Device, *, device_name: str) -> Iterator[Agent]:
    """Start the runner on a device and hold its lease; leaving ends it and everything that it started.

    Args:
        transport: an open way to the device.
        device: how it is set up.
        device_name: its name in lab.toml, for errors.

    Raises:
        DeviceBusy: somebody else holds it; the text says who.
        TransferError: the runner did not arrive.
        DeviceError: the runner cannot work there; the text says why.
    """
    agent = _start(transport, device, device_name)
    try:
        yield agent
    finally:
        agent.close()


def ship(agent: Agent, transport: Transport, files: Mapping[str, Path]) -> tuple[str, ...]:
    """Copy to the device what it does not have yet.

    A file is uploaded under a temporary name and gets its own only after the device has verified its digest, so an
    upload that was cut off is never trusted.

    Args:
        agent: the runner there.
        transport: the way for files.
        files: digest → local file.

    Returns:
        The digests that had to be copied.

    Raises:
        TransferError: a file did not arrive whole.
    """
    missing = agent.missing(list(files))
    for digest in missing:
        part = f"{digest}.part-{secrets.token_hex(4)}"
        remote = f"{agent.root}/objects/{part}"
        try:
            transport.put(files[digest], remote)
        except TransferError:
            with contextlib.suppress(DeviceError):  # the first error is the one to tell
                transport.remove(remote)
            raise
        agent.commit(part, digest)
    return missing


def _start(transport: Transport, device: Device, device_name: str) -> Agent:
    """Return a greeted agent. Starting is tried first: the runner is already there every time but the first."""
    digest = sha256_file(RUNNER)
    try:
        return _greeted(transport, device, digest)
    except DeviceBusy:
        raise
    except DeviceError:  # not there yet, or not whole: send it, then the second attempt tells what is wrong
        _check_python(transport, device, device_name)
        _push_runner(transport, f"{device_root(device)}/objects/{digest}")
    return _greeted(transport, device, digest)


def _greeted(transport: Transport, device: Device, digest: str) -> Agent:
    """Start the runner and wait for its hello."""
    root = device_root(device)
    argv = [device_python(device), f"{root}/objects/{digest}", "agent", "--root", root, "--holder", _holder()]
    agent = Agent(transport.open_channel(argv), label=transport.label, root=root, silence_s=device.timeout_s)
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


def _holder() -> str:
    """Say who we are, for others who want the device."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        user = f"uid {os.getuid()}"
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return f"{user}@{socket.gethostname()} (process {os.getpid()}, since {now})"
