"""The plain device: a real OpenSSH server on 127.0.0.1 with keys of its own, run by whoever runs the tests."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

from .board import Board, free_port, known_host, new_key, wait_until
from .cache import RunFolder, TestbedError
from .kept import Kept, name_of, offspring

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin:/sbin")
# A bash that sshd starts reads ~/.bashrc unless it is told that another shell has: what a person has there takes time, and
# killing it leaves locks behind.
NO_BASHRC = "SetEnv SHLVL=1\n"
SFTP = "Subsystem sftp internal-sftp\n"
START_TIMEOUT_S = 20.0


class Server(Board):
    """A device behind an sshd of this machine, whose death and freezing can be arranged."""

    def listener(self) -> int:
        """Return the process number of the sshd that listens."""
        raise NotImplementedError

    def sessions(self) -> list[int]:
        """Return the process numbers of the server's children, and theirs: one branch per connection."""
        return offspring(self.listener())

    def own_sessions(self) -> list[int]:
        """Return only the sshd processes among the sessions, not what people run in them."""
        return [number for number in self.sessions() if name_of(number).startswith("sshd")]

    def cut(self) -> None:
        """Kill every connection, not what runs in it."""
        send(self.own_sessions(), signal.SIGKILL)

    def freeze(self) -> None:
        """Stop the server and its connections, not what runs in them; the kernel still acknowledges."""
        send([self.listener(), *self.own_sessions()], signal.SIGSTOP)

    def thaw(self) -> None:
        """Let the server and its connections go on."""
        send([self.listener(), *self.own_sessions()], signal.SIGCONT)


class Plain(Server):
    """An SSH server whose death, freezing and change of identity can be arranged, with a root and a lease of its own.

    Its keys: "host" (its own), "client" (which it lets in), and any other name for a stranger's.

    Args:
        folder: where its keys, its log and its root are; it must not exist. None: one that is deleted when it stops.
    """

    def __init__(self, folder: Path | None = None, *, name: str = "board") -> None:
        if SSHD is None:
            raise TestbedError("there is no sshd here; install openssh-server")
        self._run_folder = RunFolder("plain") if folder is None else None
        if self._run_folder is not None:
            folder = self._run_folder.path / name
        assert folder is not None
        folder.mkdir(mode=0o700)
        self.folder = folder
        super().__init__(
            name=name,
            port=free_port(),
            user=getpass.getuser(),
            key=self.new_key("client"),
            known_hosts=folder / "known_hosts",
            root=str(folder / "root"),
            lease_dir=str(folder / "lease"),
            capabilities=frozenset({"cut", "freeze"}),
        )
        (folder / "lease").mkdir()
        shutil.copy(f"{self.key}.pub", folder / "authorized_keys")
        self.accept("host")
        self.sshd: Kept | None = None

    def new_key(self, name: str, kind: str = "ed25519", passphrase: str = "") -> Path:
        """Return a private key file, made on first use."""
        return new_key(self.folder / name, kind, passphrase)

    def accept(self, host_key: str) -> None:
        """Make a host key the one that is known."""
        self.known_hosts.write_text(known_host(self.port, self.new_key(host_key)))

    def start(self, host_key: str = "host", options: str = SFTP, prefix: Sequence[str] = ()) -> None:
        """Start the server.

        Args:
            host_key: which key it has; "host" is the known one.
            options: more lines of sshd_config; without the usual ones there is no SFTP.
            prefix: a command that runs the server, ("ip", "netns", "exec", "lab").
        """
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # root's sshd insists on its privilege separation directory
        config = self.folder / "sshd_config"
        config.write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self.new_key(host_key)}\nPidFile none\n"
            f"AuthorizedKeysFile {self.folder / 'authorized_keys'}\nStrictModes no\nUsePAM no\nUseDNS no\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin yes\nMaxStartups 100\n"
            f"{options}{NO_BASHRC}"
        )
        self.sshd = Kept([*prefix, str(SSHD), "-D", "-e", "-f", config], self.folder / "sshd.log")
        wait_for_listener(self.sshd)

    def listener(self) -> int:
        """Return the process number of the sshd that listens."""
        assert self.sshd is not None
        return self.sshd.pid

    def stop(self) -> None:
        """End the server and everything that runs in its sessions; twice is once."""
        if self.sshd is not None:
            self.thaw()
            send(self.sessions(), signal.SIGKILL)
            self.sshd.stop()
            self.sshd = None

    def __exit__(self, *exception: object) -> None:
        self.stop()
        if self._run_folder is not None:
            self._run_folder.close()


def wait_for_listener(server: Kept) -> None:
    """Wait until a server says that it listens.

    Raises:
        TestbedError: it ended instead; the text has its last lines.
    """

    def listens() -> bool:
        if b"Server listening" in server.log.read_bytes():
            return True
        if not server.is_alive():
            raise TestbedError(f"sshd does not start: {server.said()}")
        return False

    wait_until(listens, timeout_s=START_TIMEOUT_S, what=lambda: f"sshd does not listen: {server.said()}")


def send(processes: Sequence[int], number: signal.Signals) -> None:
    """Send a signal to those processes that still live."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)
