"""A real OpenSSH server on 127.0.0.1 at a free port, with its own keys, run by whoever runs the tests."""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgedeploy.lab.ssh import SshTransport
from edgedeploy.records.device import Device

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin:/sbin")
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.ssh)
            if SSHD is None:
                item.add_marker(pytest.mark.skip(reason="no sshd here; install openssh-server"))


class Sshd:
    """An SSH server whose death, freezing and change of identity can be arranged.

    Its keys: "host" (its own), "client" (which it lets in), and any other name for a stranger's.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700)
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        shutil.copy(f"{self.key('client')}.pub", folder / "authorized_keys")
        self.known_hosts = folder / "known_hosts"
        self.accept("host")
        self.process: subprocess.Popen[bytes] | None = None

    def key(self, name: str, kind: str = "ed25519", passphrase: str = "") -> Path:
        """Return a private key file, made on first use."""
        path = self.folder / name
        if not path.exists():
            subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-f", path], check=True)
        return path

    def accept(self, host_key: str) -> None:
        kind, key = Path(f"{self.key(host_key)}.pub").read_text().split()[:2]
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {kind} {key}\n")

    def start(self, host_key: str = "host", options: str = "Subsystem sftp internal-sftp\n") -> None:
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # root's sshd insists on its privilege separation directory
        config = self.folder / "sshd_config"
        config.write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self.key(host_key)}\nPidFile none\n"
            f"AuthorizedKeysFile {self.folder / 'authorized_keys'}\nStrictModes no\nUsePAM no\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin yes\n"
            f"{options}"
        )
        log = self.folder / "sshd.log"
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [SSHD, "-D", "-e", "-f", config], stdin=subprocess.DEVNULL, stdout=stream, stderr=stream
            )
        while b"Server listening" not in log.read_bytes():
            if self.process.poll() is not None:
                raise RuntimeError(f"sshd does not start: {log.read_text()}")
            time.sleep(0.005)

    def sessions(self) -> list[int]:
        """Return the process numbers of the server's children, and theirs: one branch per connection."""
        assert self.process is not None
        found, todo = [], [self.process.pid]
        while todo:
            with contextlib.suppress(OSError):  # the process ended meanwhile
                for task in Path(f"/proc/{todo.pop()}/task").glob("*/children"):
                    children = [int(child) for child in task.read_text().split()]
                    found += children
                    todo += children
        return found

    def own_sessions(self) -> list[int]:
        """Return only the sshd processes among the sessions, not what people run in them."""
        return [number for number in self.sessions() if name_of(number).startswith("sshd")]

    def cut(self) -> None:
        """Kill every connection, not what runs in it."""
        self._signal(self.own_sessions(), signal.SIGKILL)

    def freeze(self) -> None:
        assert self.process is not None
        self._signal([self.process.pid, *self.own_sessions()], signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.process is not None
        self._signal([self.process.pid, *self.own_sessions()], signal.SIGCONT)

    def stop(self) -> None:
        if self.process is not None:
            self.thaw()
            self._signal([*self.sessions(), self.process.pid], signal.SIGKILL)
            self.process.wait()
            self.process = None

    def device(self, **changes: object) -> Device:
        settings: dict[str, object] = {
            "host": "127.0.0.1",
            "port": self.port,
            "user": getpass.getuser(),
            "key": str(self.key("client")),
            "known_hosts": str(self.known_hosts),
            "timeout_s": 20.0,
            "connect_timeout_s": 10.0,
        }
        return Device(transport="ssh", **{**settings, **changes})

    def transport(self, **changes: object) -> SshTransport:
        return SshTransport("board", self.device(**changes))

    @staticmethod
    def _signal(processes: list[int], number: signal.Signals) -> None:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)


def name_of(process: int) -> str:
    try:
        return Path(f"/proc/{process}/comm").read_text().strip()
    except OSError:
        return ""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Hide the person's own keys, known hosts, configuration and agent."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return home


@pytest.fixture
def sshd(tmp_path: Path, home: Path) -> Iterator[Sshd]:
    server = Sshd(tmp_path / "sshd")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def second_sshd(tmp_path: Path, home: Path) -> Iterator[Sshd]:
    server = Sshd(tmp_path / "second")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An 8 MiB file system of its own."""
    yield from _mounted(tmp_path / "small-disk", "size=8m")


@pytest.fixture
def read_only_disk(tmp_path: Path) -> Iterator[Path]:
    yield from _mounted(tmp_path / "readonly", "ro")


def _mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {tried.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
