"""A device that is a place of labgrid: the place is acquired, and then reached over SSH; leaving gives it back.

A place that the person has acquired by hand (labgrid-client acquire) is used as it is, and stays acquired. Inside the
place the device's own lease is taken as everywhere.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

import edgedeploy
from edgedeploy.errors import DeviceBusy, DeviceError, DocumentError, EdgedeployError
from edgedeploy.lab import labgrid, labgrid_guard
from edgedeploy.lab.labgrid import Coordinator, Place, Service
from edgedeploy.lab.ssh import SshTransport
from edgedeploy.records.device import Device

_log = logging.getLogger(__name__)
POLL_S = 2.0  # labgrid-client polls a reservation every 5 s; its answer costs some milliseconds


class PlaceTransport(SshTransport):
    """A connection to the device of a place; a context manager.

    Args:
        name: the device's name in lab.toml.
        device: its entry, with transport "labgrid".
        wait_s: how long to queue for the place while somebody else holds it.
        progress: told who is waited for.
    """

    def __init__(
        self,
        name: str,
        device: Device,
        *,
        wait_s: float = 0.0,
        progress: Callable[[str], None] = lambda text: None,
    ) -> None:
        # Where it is, which SshTransport wants to know first, only the coordinator can say: see __enter__.
        self._name, self._entry, self._wait_s, self._progress = name, device, wait_s, progress
        self._coordinator = Coordinator(device.coordinator, timeout_s=device.connect_timeout_s)
        self.label = label_of(name, device.place, self._coordinator)
        self._leaving = contextlib.ExitStack()

    def __enter__(self) -> PlaceTransport:
        with contextlib.ExitStack() as stack:
            place = stack.enter_context(
                held(self._coordinator, self._entry.place, self._name, wait_s=self._wait_s, progress=self._progress)
            )
            label = label_of(self._name, place.name, self._coordinator)
            super().__init__(self._name, reached_by(self._entry, place, label))
            super().__enter__()
            self._leaving = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._leaving:
            super().__exit__(*exception)


@contextlib.contextmanager
def held(
    coordinator: Coordinator,
    name: str,
    device_name: str,
    *,
    wait_s: float = 0.0,
    progress: Callable[[str], None] = lambda text: None,
) -> Iterator[Place]:
    """Hold a place.

    Args:
        coordinator: of the place.
        name: the place's.
        device_name: of lab.toml, for errors.
        wait_s: how long to queue for it.
        progress: told who is waited for.

    Raises:
        DeviceBusy: somebody else holds it; the text says who.
        DeviceUnreachable: the coordinator cannot be reached.
        DeviceError: its exporter is gone.
        UsageError: there is no such place.
    """
    place = coordinator.place(name)
    label = label_of(device_name, place.name, coordinator)
    _check_resources(place, label)
    if place.holder == labgrid.own_person():
        progress(f"{label}: you acquired the place yourself; it is used, and stays yours")
        yield place
        return
    holder = labgrid.new_holder()
    with _guarded(coordinator, place.name, holder):
        _acquire(coordinator, place.name, holder, device_name, wait_s=wait_s, progress=progress)
        # Its resources may have changed while we waited.
        place = coordinator.place(place.name)
        _check_resources(place, label)
        yield place


@contextlib.contextmanager
def _guarded(coordinator: Coordinator, place: str, holder: str) -> Iterator[None]:
    """Release a place on every way out of the block, and also when this process is killed in it."""
    found = [str(Path(edgedeploy.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    # In a session of its own: Ctrl-C at the terminal is for us, and we tell it.
    guard = subprocess.Popen(
        [sys.executable, "-m", labgrid_guard.__name__, coordinator.address, place, holder],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(found)},
        start_new_session=True,
    )
    assert guard.stdin is not None
    try:
        yield
    finally:
        try:
            coordinator.release(place, holder)
        except EdgedeployError as error:
            # The guard goes on trying without us.
            _log.warning("the place %r is not released yet: %s", place, error)
            guard.stdin.close()
        else:
            with contextlib.suppress(OSError):  # somebody killed the guard; there is nothing left to guard
                guard.stdin.write(labgrid_guard.RELEASED)
            with contextlib.suppress(OSError):
                guard.stdin.close()
            guard.wait()


def _acquire(
    coordinator: Coordinator,
    name: str,
    holder: str,
    device_name: str,
    *,
    wait_s: float,
    progress: Callable[[str], None],
) -> None:
    """Acquire a place, queueing for it where it is taken."""
    label = label_of(device_name, name, coordinator)
    deadline_s = time.monotonic() + wait_s
    if _acquired(coordinator, name, holder):
        return
    if wait_s <= 0:
        place = coordinator.place(name)
        then = f"wait for it (--wait 10m), or: edgedeploy devices release {device_name} --force"
        raise DeviceBusy(f"{label} {coordinator.why_busy(place)}; {then}")
    token = coordinator.reserve(name, holder)
    told = ""
    try:
        while True:
            turn = coordinator.turn(token)
            if turn is None:  # forgotten, since the coordinator restarted or we were asleep: at the end of the queue
                token = coordinator.reserve(name, holder)
            elif turn.is_ours and coordinator.acquire(name, holder):
                return
            place = coordinator.place(name)
            if labgrid.is_dead(place.holder):
                coordinator.release(name, place.holder)
                continue
            why = coordinator.why_busy(place)
            if time.monotonic() >= deadline_s:
                raise DeviceBusy(f"{label} {why}, also after {wait_s:g} s of waiting; try later, or wait for longer")
            queue = f", {turn.position} of {turn.of} in the queue" if turn is not None and turn.of else ""
            if told != (told := f"{label} {why}; waiting{queue}"):
                progress(told)
            time.sleep(min(POLL_S, max(0.0, deadline_s - time.monotonic())))
    finally:
        # One that was granted would keep the place for us for a minute after we have given it back.
        coordinator.cancel(token)


def _acquired(coordinator: Coordinator, name: str, holder: str) -> bool:
    """Acquire a place if it is free, or only a dead process of ours on this machine holds it."""
    if coordinator.acquire(name, holder):
        return True
    other = coordinator.place(name).holder
    if not labgrid.is_dead(other):
        return False
    coordinator.release(name, other)
    return coordinator.acquire(name, holder)


def _check_resources(place: Place, label: str) -> None:
    if place.absent:
        exporter = place.absent[0].partition("/")[0]
        raise DeviceError(
            f"{label}: no connected exporter has {place.absent[0]}; is labgrid-exporter {exporter!r} running?"
        )


def reached_by(entry: Device, place: Place, label: str) -> Device:
    """Return the way to a place's device over SSH: lab.toml first, then labgrid's environment, then the resource.

    Args:
        entry: of lab.toml.
        place: acquired.
        label: how errors name the device.

    Raises:
        DeviceError: the place does not say where its device is.
    """
    driver = _ssh_driver(entry.place)
    user, key = entry.user or driver.get("username", ""), entry.key or driver.get("keyfile", "")
    if entry.host:
        return msgspec.structs.replace(entry, transport="ssh", user=user, key=key)
    service = _service(place, label)
    return msgspec.structs.replace(
        entry,
        transport="ssh",
        host=service.address,
        port=entry.port or service.port,
        user=user or service.user,
        key=key,
        jump=entry.jump or service.jump,
    )


def _service(place: Place, label: str) -> Service:
    """Return the one place where its SSH server can be."""
    then = "export one (labgrid-exporter), or name host, port and user of the device in lab.toml"
    if not place.resources:
        raise DeviceError(f"{label} has no resources; add one (labgrid-client -p {place.name} add-match ...)")
    if not place.services:
        raise DeviceError(f"{label} has no NetworkService that says where its SSH server is; {then}")
    if len(place.services) > 1:
        names = ", ".join(service.name for service in place.services)
        raise DeviceError(
            f"{label} has {len(place.services)} NetworkServices ({names}); name host and port of the one that is meant "
            "in lab.toml"
        )
    if not place.services[0].is_available:
        raise DeviceError(f"{label}: its exporter says that {place.services[0].name} is not available now")
    return place.services[0]


def _ssh_driver(place: str) -> dict[str, str]:
    """Return username and keyfile of the SSHDriver that labgrid's environment file (LG_ENV) has for a place."""
    file = os.environ.get("LG_ENV")
    if not file:
        return {}
    from labgrid.config import Config
    from labgrid.exceptions import InvalidConfigError, NoConfigFoundError
    from labgrid.factory import target_factory

    try:
        config = Config(file)
        targets = [target_factory.normalize_config(target) for target in config.get_targets().values()]
    except (NoConfigFoundError, InvalidConfigError, OSError) as error:
        raise DocumentError(f"labgrid's environment file {file} (named by LG_ENV) cannot be read: {error}") from error
    for resources, drivers in targets:
        if place in resources.get("RemotePlace", {}):
            for arguments, *_ in drivers.get("SSHDriver", {}).values():
                found = {key: str(arguments[key]) for key in ("username", "keyfile") if arguments.get(key)}
                if "keyfile" in found:
                    found["keyfile"] = str(Path(config.resolve_path(found["keyfile"])))
                return found
    return {}


def label_of(device_name: str, place: str, coordinator: Coordinator) -> str:
    """Return how errors name a device before it is reached."""
    return f"device {device_name!r} (place {place!r} of the labgrid coordinator {coordinator.address})"
