"""The hybrid device: this machine's sshd in front of an arm64 Debian whose programs run under qemu, looking like a board."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path

from .board import am_root, free_port, known_host, wait_until
from .cache import RunFolder, TestbedError
from .identity import Identity, Kind
from .kept import Kept, name_of, offspring, state_of
from .plain import START_TIMEOUT_S, Server, wait_for_listener
from .tools import HYBRID, install, program
from .tree import keys, tree

# Linux 6.7 gave every user namespace a binfmt_misc of its own: nothing is registered for the whole machine.
PRIVATE_BINFMT = (6, 7)
# Dot products came with Armv8.2, which a Pi 4 does not have; `max` would have everything.
CPUS = {"pi4": "cortex-a72", "orin": "cortex-a76"}
CONFIG = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {host_key}
PidFile none
AuthorizedKeysFile /mnt/authorized_keys
StrictModes no
UsePAM no
UseDNS no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
PrintMotd no
MaxStartups 100
Subsystem sftp internal-sftp
ChrootDirectory /mnt/device
SetEnv QEMU_CPU={cpu} LANG=C.UTF-8
"""


def why_not() -> str:
    """Return why hybrid devices cannot be had here, and what to do; "" where they can."""
    if sys.platform != "linux":
        return "hybrid devices need Linux"
    if not am_root():
        return "hybrid devices need root, to mount an arm64 tree: run as root"
    return ""


def build() -> None:
    """Make everything that a hybrid device needs. Raises TestbedError."""
    if reason := why_not():
        raise TestbedError(reason)
    install(HYBRID)
    keys()
    tree()


class Hybrid(Server):
    """An aarch64 user space that looks like a board; kernel, clock and memory are this machine's.

    Its root file system is an overlay in memory, so that all it ever wrote is gone when it stops. Root and "pi" are let in;
    as on a board, only root may write to /sys.

    Args:
        kind: which board.
        user: who we log in as.
        payload: a folder that is seen as /opt/edge.
        disk_bytes: how much can be written in all.
        tmp_bytes: how large /tmp is.
    """

    def __init__(
        self,
        kind: Kind = "pi4",
        *,
        name: str = "",
        user: str = "pi",
        payload: Path | None = None,
        disk_bytes: int = 3 << 30,
        tmp_bytes: int = 64 << 20,
    ) -> None:
        super().__init__(name=name or kind, user=user, capabilities=frozenset({"aarch64", "identity", "cut", "freeze"}))
        self.kind = kind
        self._payload, self._disk_bytes, self._tmp_bytes = payload, disk_bytes, tmp_bytes
        self._server: Kept | None = None
        self._run_folder: RunFolder | None = None

    def start(self) -> None:
        """Start it; what the cache lacks is built before, which takes minutes."""
        build()
        self._run_folder = RunFolder("hybrid")
        folder = self._run_folder.path
        self.identity = Identity(self.kind, folder / "board")
        pair = keys()
        self.key, self.port = pair.client, free_port()
        self.known_hosts = folder / "known_hosts"
        self.known_hosts.write_text(known_host(self.port, pair.host))
        config = folder / "sshd_config"
        config.write_text(CONFIG.format(port=self.port, host_key=pair.host, cpu=CPUS[self.kind]))
        spec = {
            "tree": str(tree().root),
            "board": str(self.identity.folder),
            "qemu": program("qemu-aarch64-static"),
            "private_binfmt": _has_private_binfmt(),
            "disk_bytes": self._disk_bytes,
            "tmp_bytes": self._tmp_bytes,
            "payload": str(self._payload.absolute()) if self._payload else "",
            "authorized_key": f"{pair.client}.pub",
            "hostname": self.kind,
            "sshd": program("sshd"),
            "config": str(config),
        }
        (folder / "spec.json").write_text(json.dumps(spec))
        launcher = Path(__file__).with_name("namespace.py")
        self._server = Kept([sys.executable, "-I", "-S", launcher, folder / "spec.json"], folder / "sshd.log")
        try:
            wait_for_listener(self._server)
        except TestbedError:
            self.stop()
            raise

    def stop(self) -> None:
        """End it: its first process takes all others with it, and its mounts."""
        if self._server is not None:
            processes = offspring(self._server.pid)
            self._server.stop()
            wait_until(
                lambda: all(state_of(process) in {"", "Z", "X"} for process in processes),
                timeout_s=START_TIMEOUT_S,
                what=lambda: "processes of the hybrid device still live",
            )
            self._server = None
        if self._run_folder is not None:
            self._run_folder.close()
            self._run_folder = None

    def listener(self) -> int:
        """Return the process number of the sshd that listens: the device's first process."""
        assert self._server is not None
        return next(number for number in offspring(self._server.pid) if name_of(number) == "sshd")

    def path(self, name: str) -> Path:
        """Return where a file of the device, "/home/pi/notes", is seen from here while it runs."""
        return Path(f"/proc/{self.listener()}/root/mnt/device") / name.lstrip("/")


def _has_private_binfmt() -> bool:
    """Return whether arm64 programs can be registered for one device alone.

    Raises:
        TestbedError: the kernel is too old for it, and nobody has registered them for the machine.
    """
    release = tuple(int(word) for word in platform.release().split("-")[0].split(".")[:2])
    if release >= PRIVATE_BINFMT:
        return True
    registered = Path("/proc/sys/fs/binfmt_misc/qemu-aarch64")
    # F: the interpreter was opened when it was registered; else it would be looked for in the arm64 tree.
    if registered.exists() and any(
        line.startswith("flags:") and "F" in line for line in registered.read_text().splitlines()
    ):
        return False
    raise TestbedError(
        f"Linux {os.uname().release} does not run aarch64 programs: install qemu-user-static and binfmt-support, which "
        "register them, or use Linux 6.7 or newer"
    )
