"""What all devices for tests have in common: how they are reached, and what they can do."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from edgedeploy.lab.ssh import SshTransport
from edgedeploy.records.device import Device

from .cache import TestbedError

LOOPBACK = "127.0.0.1"


@dataclass(kw_only=True, eq=False)
class Board(ABC):
    """A device for tests, as a context manager: entering starts it, leaving leaves nothing behind.

    Attributes:
        name: in lab.toml.
        host, port, user, key, known_hosts: how it is reached.
        python: the interpreter there.
        root: where files are kept there; relative to the home directory.
        lease_dir: where the lease is kept there; empty: the runner's choice.
        capabilities: what tests may rely on, of "aarch64", "identity", "own-kernel", "reboot", "power-cut", "cable", "freeze",
            "cut", "netem".
    """

    name: str
    host: str = LOOPBACK
    port: int = 0
    user: str = "pi"
    key: Path = Path()
    known_hosts: Path = Path()
    python: str = "python3"
    root: str = ""
    lease_dir: str = ""
    capabilities: frozenset[str] = frozenset()

    @abstractmethod
    def start(self) -> object:
        """Start it and return when it lets people in. Raises TestbedError."""

    @abstractmethod
    def stop(self) -> None:
        """End it and everything that runs on it; twice is once."""

    @abstractmethod
    def freeze(self) -> None:
        """Let it say nothing any more, while its connections stay open."""

    @abstractmethod
    def thaw(self) -> None:
        """Let it go on where it was frozen."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def settings(self) -> dict[str, Any]:
        """Return the fields of its record."""
        said = {"python": self.python, "root": self.root, "lease_dir": self.lease_dir}
        return {
            "host": self.host,
            "port": self.port,
            "user": self.user,
            "key": str(self.key),
            "known_hosts": str(self.known_hosts),
            **{name: text for name, text in said.items() if text},
            "timeout_s": 20.0,
            "connect_timeout_s": 10.0,
        }

    def device(self, **changes: object) -> Device:
        """Return its record, with some fields changed."""
        return Device(transport="ssh", **{**self.settings(), **changes})

    def entry(self, **changes: object) -> str:
        """Return its table of lab.toml, with some fields changed."""
        fields = {"transport": "ssh", **self.settings(), **changes}
        lines = [f"{name} = {_toml(value)}" for name, value in fields.items()]
        return "\n".join([f"[devices.{self.name}]", *lines, ""])

    def transport(self, **changes: object) -> SshTransport:
        """Return our way to it, not yet connected."""
        return SshTransport(self.name, self.device(**changes))

    def ssh(self, *argv: str, user: str = "", stdin: bytes = b"", timeout_s: float = 60.0) -> str:
        """Run a command there by OpenSSH's client, not by our transport, and return what it prints.

        Raises:
            TestbedError: it failed; the text has what it printed.
        """
        done = self._ssh(argv, user=user or self.user, stdin=stdin, timeout_s=timeout_s)
        if done.returncode != 0:
            said = (done.stderr or done.stdout).decode(errors="replace").strip()
            raise TestbedError(f"{self.name}: {' '.join(argv)!r:.100} ended with {done.returncode}: {said[-500:]}")
        return done.stdout.decode(errors="replace")

    def _ssh(
        self, argv: Sequence[str], *, user: str, stdin: bytes = b"", timeout_s: float
    ) -> subprocess.CompletedProcess[bytes]:
        import shlex

        options = [
            "BatchMode=yes",
            "IdentitiesOnly=yes",
            "IdentityAgent=none",
            "StrictHostKeyChecking=yes",
            f"UserKnownHostsFile={self.known_hosts}",
            f"ConnectTimeout={max(1, int(timeout_s))}",
            "KexAlgorithms=curve25519-sha256",  # the default is heavy for an emulated processor
        ]
        command = ["ssh", "-F", "none", "-q", "-i", str(self.key), "-p", str(self.port)]
        command += [word for option in options for word in ("-o", option)]
        command += [f"{user}@{self.host}", "--", shlex.join(argv)]
        return subprocess.run(command, input=stdin, capture_output=True, timeout=timeout_s, check=False)


def _toml(value: object) -> str:
    """Return a value as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_toml(one)}" for name, one in value.items()) + " }"
    return repr(value) if isinstance(value, (int, float)) else '"' + str(value).replace("\\", "\\\\") + '"'


def free_port() -> int:
    """Return a port of the loopback that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def is_taken(port: int) -> bool:
    """Return whether somebody listens at a port of the loopback."""
    with socket.socket() as probe:
        return probe.connect_ex((LOOPBACK, port)) == 0


def wait_until(holds: Callable[[], bool], *, timeout_s: float, what: Callable[[], str]) -> None:
    """Wait for a condition.

    Raises:
        TestbedError: it did not come true in time; `what` says what was waited for.
    """
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            raise TestbedError(f"{what()}, not within {timeout_s:g} s")
        time.sleep(0.01)


def new_key(path: Path, kind: str = "ed25519", passphrase: str = "") -> Path:
    """Return a private key file, made on first use."""
    if not path.exists():
        subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-C", path.name, "-f", path], check=True)
    return path


def known_host(port: int, key: Path) -> str:
    """Return the line of known_hosts that trusts a host key at a port of the loopback."""
    kind, text = Path(f"{key}.pub").read_text().split()[:2]
    return f"[{LOOPBACK}]:{port} {kind} {text}\n"


@contextlib.contextmanager
def all_started(boards: Sequence[Board]) -> Iterator[Sequence[Board]]:
    """Start several devices; leaving stops those that were started."""
    with contextlib.ExitStack() as stack:
        for board in boards:
            stack.enter_context(board)
        yield boards


def am_root() -> bool:
    """Return whether we may build trees with owners and mount them."""
    return os.geteuid() == 0
