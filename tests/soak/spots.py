"""The devices of the soak: each behind a link of its own, with a disk that can be full and a /sys that can be throttled."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

from tests.testbed.badlink import BadLink
from tests.testbed.board import am_root, wait_until
from tests.testbed.cache import TestbedError
from tests.testbed.hybrid import Hybrid
from tests.testbed.identity import Identity
from tests.testbed.plain import Plain, Server

# A device that says nothing for so long counts as lost; some faults last longer, some do not.
SILENCE_S = 6.0
# Free space that a device must have is 64 MiB; the rest is for what an hour of rounds uploads.
DISK_BYTES = 512 << 20
SETTINGS = {"governor": "performance"}


class Spot(ABC):
    """A device, the way to it, and what tells whether it was left as it was found."""

    def __init__(self, board: Server, root: str, lease_dir: str) -> None:
        self.board, self.root, self.lease_dir = board, root, lease_dir
        self.name = board.name
        self._filler = Path()

    def begin(self) -> None:
        """Look at what is to be found again at the end; the device runs by now."""
        self.link = BadLink(self.board.port)
        self.governors = self.identity.governors()

    @property
    @abstractmethod
    def identity(self) -> Identity:
        """Return what the device's /sys says."""

    @abstractmethod
    def file(self, path: str) -> Path:
        """Return where a file of the device is seen from here."""

    @property
    def has_disk(self) -> bool:
        """Return whether its disk can be filled without harm to others."""
        return True

    def entry(self) -> str:
        """Return its table of lab.toml."""
        fields = {**self.link.settings(self.board), "root": self.root, "lease_dir": self.lease_dir}
        return self.board.entry(
            target="fake-board", timeout_s=SILENCE_S, connect_timeout_s=SILENCE_S, settings=SETTINGS, **fields
        )

    def processes(self, role: str = "") -> list[int]:
        """Return the processes on the device that are ours: all, or those of one role of the runner."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):  # it ended meanwhile
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    if self.root.encode() in b" ".join(words) and (not role or role.encode() in words):
                        found.append(int(entry.name))
        return found

    def send(self, role: str, number: signal.Signals) -> list[int]:
        """Send a signal to the processes of a role and return which."""
        processes = self.processes(role)
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)
        return processes

    def fill_disk(self) -> None:
        """Leave no byte on the device's disk."""
        self._filler = self.file(self.root).parent / "filler"
        with self._filler.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
            while True:
                stream.write(bytes(1 << 20))

    def free_disk(self) -> None:
        """Take that back."""
        self._filler.unlink(missing_ok=True)

    def holder(self) -> str:
        """Return who has the lease, from its file; "" for nobody."""
        path = self.file(self.lease_dir) / "edgedeploy.lease"
        held = json.loads(path.read_bytes().partition(b"\n")[0])["holder"] if path.exists() else None
        return held["who"] if held else ""

    def leftovers(self) -> list[str]:
        """Return what is not as it should be on a device that nobody uses."""
        found = [f"{self.name}: the process {one} is still there: {_command(one)}" for one in self.processes()]
        if holder := self.holder():
            found.append(f"{self.name}: it is still leased to {holder}")
        if self.identity.governors() != self.governors:
            found.append(f"{self.name}: its governors are {self.identity.governors()}, and were {self.governors}")
        root = self.file(self.root)
        if (root / "restore.json").exists():
            found.append(f"{self.name}: restore.json is still there")
        for path in root.rglob("*") if root.is_dir() else ():
            if path.name.endswith(".part") and (path.parent / path.name.removesuffix(".part")).exists():
                found.append(f"{self.name}: {path.name} is an upload of what is there")
            elif re.search(r"\.part-|\.tmp", path.name):
                found.append(f"{self.name}: {path.relative_to(root)} is a half file")
        return found

    def parts(self) -> list[Path]:
        """Return the uploads that were cut off and can be gone on with."""
        root = self.file(self.root)
        return sorted(root.rglob("*.part")) if root.is_dir() else []

    def close(self) -> None:
        """End it."""
        self.link.close()
        self.board.stop()


class PlainSpot(Spot):
    """An sshd of this machine; its /sys is a folder, and where we are root, its disk a file system of its own."""

    def __init__(self, folder: Path, name: str) -> None:
        self._board = Plain(folder / name, name=name)
        self._identity = Identity("pi4", folder / f"{name}-sysroot")
        (self._identity.folder / "proc").symlink_to("/proc")
        self._disk = folder / f"{name}-disk"
        self._disk.mkdir()
        self._has_disk = am_root() and _mount(self._disk)
        super().__init__(self._board, str(self._disk / "root"), self._board.lease_dir)
        self._board.python = str(_python_of(self._identity.folder))
        self._board.start()
        self.begin()

    @property
    def identity(self) -> Identity:
        return self._identity

    @property
    def has_disk(self) -> bool:
        return self._has_disk

    def file(self, path: str) -> Path:
        return Path(path)

    def close(self) -> None:
        super().close()
        if self._has_disk:
            subprocess.run(["umount", "-l", str(self._disk)], check=True)


class HybridSpot(Spot):
    """An aarch64 user space that looks like a Raspberry Pi; root, who may set its governor."""

    def __init__(self, name: str) -> None:
        self._board = Hybrid("pi4", name=name, user="root")
        self._board.start()
        own = f"/root/soak-{secrets.token_hex(4)}"  # its processes are seen among those of all devices here
        super().__init__(self._board, f"{own}/root", f"{own}/lease")
        self.begin()

    @property
    def identity(self) -> Identity:
        return self._board.identity

    @property
    def has_disk(self) -> bool:
        return False  # as large as the overlay that it shares with all it runs

    def file(self, path: str) -> Path:
        return self._board.path(path)


def wait_for_peace(spots: Iterable[Spot], timeout_s: float) -> list[str]:
    """Wait until nothing is left of those who measured; return what still is."""
    found: list[str] = []

    def is_quiet() -> bool:
        found[:] = [text for spot in spots for text in spot.leftovers()]
        return not found

    with contextlib.suppress(TestbedError):
        wait_until(is_quiet, timeout_s=timeout_s, what=lambda: "; ".join(found))
    return found


def _python_of(sysroot: Path) -> Path:
    """Write an interpreter whose runner looks at another /proc and /sys."""
    path = sysroot / "python"
    python = shlex.quote(sys.executable)
    told = f'case " $* " in *" agent --root "*) exec {python} "$@" --sysroot {shlex.quote(str(sysroot))};; esac\n'
    path.write_text(f'#!/bin/sh\n{told}exec {python} "$@"\n')
    path.chmod(0o755)
    return path


def _mount(folder: Path) -> bool:
    """Give a folder a file system of its own, in memory; return whether that may be done here."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=0700", "tmpfs", str(folder)]
    return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0


def _command(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]
    except OSError:
        return "it has just ended"
