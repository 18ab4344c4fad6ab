"""A device on this machine whose leases, processes and governor can be looked at; for tests of who has it."""

from __future__ import annotations

import contextlib
import os
import signal
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edgedeploy.lab import leases
from edgedeploy.lab.bundle import connect, ship
from edgedeploy.lab.conversation import Agent
from edgedeploy.lab.transport import LocalTransport
from edgedeploy.records.device import Device, DeviceSettings
from edgedeploy.storage import sha256_bytes

from .device_trees import tree

GOVERNOR = "sys/devices/system/cpu/cpufreq/policy0/scaling_governor"
BOARD = {
    GOVERNOR: "ondemand\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_available_governors": "ondemand performance powersave\n",
}


class Board(LocalTransport):
    """This machine as a device whose /sys is a folder."""

    def __init__(self, name: str, sysroot: str) -> None:
        super().__init__(name)
        self.sysroot = sysroot

    def open_channel(self, argv):
        return super().open_channel([*argv, "--sysroot", self.sysroot])


@dataclass(frozen=True)
class Bench:
    """A device on this machine with a governor that can be set."""

    folder: Path
    device: Device
    transport: Board

    def connect(
        self, *, root: str = "", governor: str = "performance", **options
    ) -> contextlib.AbstractContextManager[Agent]:
        settings = DeviceSettings(governor=governor)
        device = msgspec.structs.replace(self.device, settings=settings, root=root or self.device.root)
        return connect(self.transport, device, device_name="bench", **options)

    @property
    def governor(self) -> str:
        return (self.folder / "board" / GOVERNOR).read_text().strip()

    def lease(self) -> leases.Lease:
        return leases.read(LocalTransport("bench"), self.device)

    def processes(self, role: str = "") -> list[int]:
        """Return the processes of the device that play a role; all that have to do with it without one."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                words = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
            except (FileNotFoundError, ProcessLookupError):
                continue
            if str(self.folder).encode() in words and f"\0{role}".encode() in words and int(entry.name) != os.getpid():
                found.append(int(entry.name))
        return found

    def send(self, role: str, number: signal.Signals) -> list[int]:
        pids = self.processes(role)
        for pid in pids:
            os.kill(pid, number)
        return pids


def becomes(fact: Callable[[], bool], within_s: float = 20.0) -> bool:
    """Wait until something is so."""
    deadline_s = time.monotonic() + within_s
    while not fact():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.01)
    return True


SLEEPING = """
    import subprocess, sys
    class Session:
        runtime = "sleeper 1"
        def __init__(self, artifact, options):
            subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(1000)", artifact])
        def __enter__(self): return self
        def __exit__(self, *exc): pass
        def boundary(self): return {"threads": 1, "includes_input_copy": False, "includes_output_copy": False}
        def bind(self, inputs): pass
        def infer(self): pass
        def outputs(self): return {}
"""


def start_visit(bench: Bench, agent: Agent) -> None:
    """Open a visit whose session has started a process of its own."""
    samples = b"\x40" + bytes(7) + b'{"x":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]}}'.ljust(64) + bytes(4)
    contents = {"session": textwrap.dedent(SLEEPING).encode(), "artifact": b"an artifact", "inputs": samples}
    job: dict[str, object] = {"options": {}, "batch": 1, "warm_up": {"window": 1, "tolerance": 9.0, "cap_s": 0.1}}
    files = {}
    for name, content in contents.items():
        (bench.folder / name).write_bytes(content)
        job[name] = sha256_bytes(content)
        files[sha256_bytes(content)] = bench.folder / name
    ship(agent, bench.transport, files)
    agent.ask("allow", digests=[job["session"]])
    agent.ask("open", visit="dense block 3", job=job, timeout_s=20)
    # What has forked and not yet become another program still looks like what forked.
    assert becomes(lambda: len(bench.processes("visit")) == len(bench.processes("import time")) == 1)


def bench_in(folder: Path) -> Iterator[Bench]:
    """Give a bench, and end what is left of it."""
    bench = Bench(
        folder,
        Device(transport="local", root=str(folder / "root"), timeout_s=20.0, lease_dir=str(folder / "lease")),
        Board("bench", tree(folder / "board", BOARD)),
    )
    yield bench
    for pid in bench.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
