"""The virtual machine: an arm64 computer of its own, with kernel, memory, disk, clock, cable and power switch."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Self

from .board import Board, free_port, is_taken, known_host, wait_until
from .cache import RunFolder, TestbedError, made_whole, only_one
from .identity import THROTTLED, Kind
from .image import Image, image, overlay, payload_drive
from .kept import Kept
from .qmp import Qmp
from .tools import VM, install, program
from .tree import keys, tree

BOOT_TIMEOUT_S = 180.0  # 8 s on an idle machine
ANSWER_TIMEOUT_S = 30.0
APPEND = "console=ttyAMA0 loglevel=4 panic=1 random.trust_cpu=on random.trust_bootloader=on mitigations=off"
# A Pi 4's core. `max` would take four times as long to boot, for its pointer authentication.
CPU = "cortex-a72"


def build(*, memory_mib: int = 1024, cores: int = 1, cpu: str = CPU) -> Image:
    """Make everything that a virtual machine starts from, the snapshot too. Raises TestbedError."""
    made = build_image()
    with only_one("snapshot"):
        ready = made.snapshot(cpu, memory_mib, cores)
        if not ready.exists():
            with made_whole(ready) as part:
                _take_snapshot(part, memory_mib=memory_mib, cores=cores, cpu=cpu)
    return made


def build_image() -> Image:
    """Make kernel, initrd and disk. Raises TestbedError."""
    install(VM)
    return image(tree(), keys())


class Vm(Board):
    """An aarch64 machine with its own kernel.

    Root and "pi" are let in. From a snapshot it is up in seconds; its clock is set then, unless `stale_clock`.

    Args:
        user: who we log in as.
        memory_mib: its memory; QEMU itself needs no more than that.
        cores: of its processor.
        cpu: QEMU's name of it.
        snapshot: start from the snapshot of a running machine, which is taken on first use; else boot.
        payload: a folder that is seen as /opt/edge, of at most 1 GiB.
        stale_clock: leave the clock where the snapshot has it.
    """

    def __init__(
        self,
        *,
        name: str = "vm",
        user: str = "pi",
        memory_mib: int = 1024,
        cores: int = 1,
        cpu: str = CPU,
        snapshot: bool = True,
        payload: Path | None = None,
        stale_clock: bool = False,
    ) -> None:
        super().__init__(
            name=name,
            user=user,
            capabilities=frozenset({"aarch64", "own-kernel", "reboot", "power-cut", "cable", "freeze", "netem"}),
        )
        self.memory_mib, self.cores, self.cpu = memory_mib, cores, cpu
        self._snapshot, self._payload, self._stale_clock = snapshot, payload, stale_clock
        self._qemu: Kept | None = None
        self._qmp: Qmp | None = None
        self._run_folder: RunFolder | None = None

    def start(self) -> None:
        """Start it and wait until it answers; what the cache lacks is built before, which takes minutes."""
        made = build(memory_mib=self.memory_mib, cores=self.cores, cpu=self.cpu) if self._snapshot else build_image()
        self._run_folder = RunFolder("vm")
        folder = self._run_folder.path
        try:
            if self._snapshot:
                ready = made.snapshot(self.cpu, self.memory_mib, self.cores)
                subprocess.run(["cp", "--reflink=auto", "--sparse=always", ready, folder / "disk.qcow2"], check=True)
            else:
                overlay(made.disk, folder / "disk.qcow2")
            payload_drive(self._payload, folder / "payload.img")
            self._power_on(made, folder)
            self.wait_until_up()
            if self._payload is not None:
                self.ssh("payload", user="root")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Pull the plug and throw the disk away; twice is once."""
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None
        if self._qemu is not None:
            self._qemu.stop()
            self._qemu = None
        if self._run_folder is not None:
            self._run_folder.close()
            self._run_folder = None

    @property
    def qmp(self) -> Qmp:
        """Return the control channel."""
        assert self._qmp is not None, "the machine does not run"
        return self._qmp

    @property
    def console(self) -> Path:
        """Return the log of what the kernel and the init process print."""
        assert self._run_folder is not None, "the machine does not run"
        return self._run_folder.path / "console.log"

    def freeze(self) -> None:
        """Halt its processor: it acknowledges nothing, and its clock stands still."""
        self.qmp.execute("stop")

    def thaw(self) -> None:
        """Let its processor go on."""
        self.qmp.execute("cont")

    def unplug(self) -> None:
        """Pull the network cable: connections stay open and carry nothing."""
        self.qmp.execute("set_link", name="net", up=False)

    def plug(self) -> None:
        """Put the network cable back."""
        self.qmp.execute("set_link", name="net", up=True)

    def power_cut(self) -> None:
        """Reset it as if the power had failed for a moment; what was not synced is lost. It boots again."""
        self.qmp.execute("system_reset")

    def reboot(self) -> None:
        """Have it reboot in good order; returns when it began."""
        self.ssh("sh", "-c", "(sleep 0.2; reboot) </dev/null >/dev/null 2>&1 &", user="root")
        self.qmp.wait_for("RESET", timeout_s=BOOT_TIMEOUT_S)

    def wait_until_up(self) -> None:
        """Wait until it lets people in, and set its clock.

        Raises:
            TestbedError: it did not come up in time; the text has the end of its console.
        """
        # An emulated sshd needs a second of a whole core per connection, and works on those that we gave up: on a busy
        # machine short attempts would keep it busy for ever.
        patience_s = itertools.accumulate(itertools.repeat(2.0), lambda last_s, factor: min(last_s * factor, 60.0))
        wait_until(lambda: self._greets(next(patience_s)), timeout_s=BOOT_TIMEOUT_S, what=self._why_not_up)
        clock = ("true",) if self._stale_clock else ("date", "-s", f"@{time.time():.3f}")
        self.ssh(*clock, user="root", timeout_s=BOOT_TIMEOUT_S)

    def boot_id(self) -> str:
        """Return the name of its current run."""
        return self.ssh("cat", "/proc/sys/kernel/random/boot_id").strip()

    def identify(self, kind: Kind) -> Self:
        """Make it look like a board until it reboots: /proc/cpuinfo, /sys and the board's programs."""
        self.ssh("identify", kind, user="root")
        return self

    def heat(self, celsius: float, zone: int = 0) -> None:
        """Set a thermal zone's temperature of a machine that looks like a board."""
        self._write(f"/sys/class/thermal/thermal_zone{zone}/temp", f"{round(celsius * 1000)}\n")

    def throttle(self, bits: int = 0x50005) -> None:
        """Throttle a machine that looks like a Pi, or with 0 end it."""
        self._write(f"/{THROTTLED}", f"{bits:x}\n")

    def _write(self, name: str, text: str) -> None:
        self.ssh("tee", name, user="root", stdin=text.encode())

    def _power_on(self, made: Image, folder: Path) -> None:
        pair = keys()
        self.key, self.port, self.known_hosts = pair.client, free_port(), folder / "known_hosts"
        self.known_hosts.write_text(known_host(self.port, pair.host))
        self._qmp = Qmp()
        self._qemu = Kept(
            self._command(made, folder, self._qmp.theirs), folder / "qemu.log", pass_fds=[self._qmp.theirs.fileno()]
        )
        wait_until(lambda: is_taken(self.port), timeout_s=ANSWER_TIMEOUT_S, what=self._why_not_up)
        self._qmp.greet()

    def _command(self, made: Image, folder: Path, control: socket.socket) -> list[str | Path]:
        """Return QEMU's command line."""
        threads = "multi" if self.cores > 1 else "single"
        network = f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{self.port}-10.0.2.15:22"
        disk = f"if=none,id=disk,file={_escaped(folder)}/disk.qcow2,format=qcow2,cache=unsafe"
        payload = f"if=none,id=payload,file={_escaped(folder)}/payload.img,format=raw,readonly=on"
        command: list[str | Path] = [program("qemu-system-aarch64"), "-M", "virt", "-cpu", self.cpu, "-nodefaults"]
        command += ["-accel", f"tcg,thread={threads},tb-size=256", "-smp", str(self.cores), "-m", str(self.memory_mib)]
        command += ["-display", "none", "-kernel", made.kernel, "-initrd", made.initrd, "-append", APPEND]
        command += ["-drive", disk, "-device", "virtio-blk-device,drive=disk,serial=root"]
        command += ["-drive", payload, "-device", "virtio-blk-device,drive=payload,serial=payload"]
        command += ["-netdev", network, "-device", "virtio-net-device,netdev=net", "-device", "virtio-rng-device"]
        command += ["-serial", f"file:{folder}/console.log"]
        command += ["-chardev", f"socket,id=control,fd={control.fileno()}", "-mon", "chardev=control,mode=control"]
        return [*command, *(["-loadvm", "ready"] if self._snapshot else [])]

    def _greets(self, patience_s: float) -> bool:
        """Return whether the machine's sshd speaks in time; QEMU itself accepts connections long before."""
        assert self._qemu is not None
        if not self._qemu.is_alive():
            raise TestbedError(f"QEMU ended: {self._qemu.said()}")
        with (
            contextlib.suppress(OSError),
            socket.create_connection((self.host, self.port), timeout=patience_s) as stream,
        ):
            return stream.recv(4) == b"SSH-"
        return False

    def _why_not_up(self) -> str:
        assert self._qemu is not None
        console = self.console.read_text(errors="replace")[-1000:] if self.console.exists() else ""
        return f"the virtual machine does not answer; QEMU: {self._qemu.said()!r}; its console: {console!r}"


def _escaped(path: Path) -> str:
    """Return a path as QEMU's options take it."""
    return str(path).replace(",", ",,")


def _take_snapshot(path: Path, *, memory_mib: int, cores: int, cpu: str) -> None:
    """Boot a machine and keep its disk together with its memory."""
    with Vm(memory_mib=memory_mib, cores=cores, cpu=cpu, snapshot=False) as machine:
        machine.ssh("sync", user="root")
        machine.qmp.monitor("savevm ready")
        qemu = machine._qemu
        assert qemu is not None
        qemu.signal(signal.SIGTERM)  # it closes the disk's file properly
        wait_until(lambda: not qemu.is_alive(), timeout_s=ANSWER_TIMEOUT_S, what=lambda: "QEMU does not end")
        shutil.move(machine.console.with_name("disk.qcow2"), path)
