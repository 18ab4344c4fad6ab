"""Who has which device, asked without taking it, and taking it away from a holder by force."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

from edgedeploy.errors import DeviceBusy, DeviceError, EdgedeployError
from edgedeploy.lab import answers
from edgedeploy.lab.bundle import RUNNER, device_python, holder_words, lease_dir
from edgedeploy.lab.transport import Transport
from edgedeploy.records.device import Device

# Starting an interpreter and reading one file; under emulation, or on a busy single core, that takes seconds.
READ_TIMEOUT_S = 30.0
# A holder's watchdog has some seconds to end it and to undo what it set.
RELEASE_TIMEOUT_S = 60.0
# Connections that are made at the same time: each is a thread here and a key exchange, which is arithmetic.
AT_ONCE = 32


class Lease(msgspec.Struct, frozen=True):
    """What a device says of its lease.

    Attributes:
        token: of the present holder, or of the last one.
        state: "ending" while what a holder had set is being undone.
        holder: its own words for itself; "" when the device is free.
        held_s: since when; expires_s: until when, unless it renews.
        visits: what it runs at the moment.
        queue: who waits, first come first served.
        path: the file that all users of the device share.
        released: whether it was taken from its holder just now; has_ended: whether nothing of that holder's is left.
    """

    token: answers.Count
    state: Literal["free", "held", "ending"]
    holder: answers.Text
    held_s: answers.Seconds
    expires_s: answers.Seconds
    visits: Annotated[tuple[answers.Text, ...], msgspec.Meta(max_length=100)]
    queue: Annotated[tuple[answers.Text, ...], msgspec.Meta(max_length=1000)]
    path: answers.Text = ""
    released: bool = False
    has_ended: bool = False


class _Problem(msgspec.Struct, frozen=True):
    """Why a device cannot say who has it."""

    problem: answers.Text


def read(transport: Transport, device: Device) -> Lease:
    """Return who has a device. The runner is read from stdin, so that it need not have been there before.

    Raises:
        DeviceError: it cannot be reached, or does not say.
    """
    return _asked(transport, device, [], READ_TIMEOUT_S)


def release(transport: Transport, device: Device, token: int) -> Lease:
    """Take a device away from the holder with that token: it can start nothing there any more.

    Raises:
        DeviceBusy: somebody else has it by now.
        DeviceError: it cannot be reached, or does not say.
    """
    found = _asked(transport, device, ["--release", str(token), "--by", holder_words()], RELEASE_TIMEOUT_S)
    if not found.released:
        holder = f"{answers.visible(found.holder)} holds it now" if found.holder else "it is free now"
        raise DeviceBusy(f"{transport.label} was not released: its holder has changed meanwhile, and {holder}")
    return found


def _asked(transport: Transport, device: Device, options: Sequence[str], timeout_s: float) -> Lease:
    folder = lease_dir(device)
    argv = [device_python(device), "-", "lease", *(["--lease-dir", folder] if folder else []), *options]
    said = transport.run(argv, timeout_s=timeout_s, stdin=RUNNER.read_bytes())
    for line in said.stdout.splitlines()[-20:]:  # a login shell may greet before it
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict) and found.pop("event", "") == "lease":
            if "problem" in found:
                problem = answers.read(found, _Problem, transport.label, "lease").problem
                raise DeviceError(f"{transport.label} cannot say who has it: {answers.visible(problem)}")
            return answers.read(found, Lease, transport.label, "lease")
    tail = answers.visible(said.stderr.decode("utf-8", "replace").strip()[-200:]) or f"exit status {said.status}"
    python = device_python(device)
    raise DeviceError(f"{transport.label}: {python} does not run the runner there ({tail}); Python 3.8 or newer does")


Asking = Callable[[str, Device], Lease]


@dataclass(frozen=True, slots=True)
class Survey:
    """What came of asking one device: its lease, or why there is none."""

    lease: Lease | None
    problem: str = ""


def survey(devices: Mapping[str, Device], asking: Asking, *, limit_s: float) -> dict[str, Survey]:
    """Ask many devices at the same time who has them.

    Args:
        devices: name → entry.
        asking: reaches one device and returns its lease.
        limit_s: after which no device is waited for any more; those that have not answered are not reached.

    Returns:
        In the order of `devices`.
    """
    waiting: queue.SimpleQueue[tuple[str, Device]] = queue.SimpleQueue()
    answered: queue.SimpleQueue[tuple[str, Survey]] = queue.SimpleQueue()
    for item in devices.items():
        waiting.put(item)

    def work() -> None:
        while True:
            try:
                name, device = waiting.get_nowait()
            except queue.Empty:
                return
            answered.put((name, _surveyed(name, device, asking)))

    # Daemons: one that is stuck in a connection must not keep the command from ending.
    for _ in range(min(AT_ONCE, len(devices))):
        threading.Thread(target=work, daemon=True).start()
    late = Survey(None, f"no answer within {limit_s:g} s")
    found = dict.fromkeys(devices, late)
    deadline_s = time.monotonic() + limit_s
    for _ in devices:
        try:
            name, one = answered.get(timeout=max(0.0, deadline_s - time.monotonic()))
        except queue.Empty:
            break
        found[name] = one
    return found


def _surveyed(name: str, device: Device, asking: Asking) -> Survey:
    try:
        return Survey(asking(name, device))
    except EdgedeployError as error:
        return Survey(None, str(error).split("\n")[0])
