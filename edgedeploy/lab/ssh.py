"""The way to a device over SSH: run, put, get, open a channel; every wait has a limit.

What runs on the device is started as the leader of its own process group and says its number first, so that it can be
ended from here: closing an SSH channel alone leaves the process running. A process whose connection is lost cannot be
reached any more: it must end by itself when its stdin closes, which our runner does.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import queue
import re
import shlex
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from edgedeploy.errors import DeviceError, DeviceUnreachable, TransferError
from edgedeploy.lab.ssh_config import route
from edgedeploy.lab.ssh_login import log_in, log_out
from edgedeploy.lab.transport import Completed
from edgedeploy.records.device import Device
from edgedeploy.storage import atomic_path
from edgedeploy.units import format_bytes

if TYPE_CHECKING:
    import paramiko

_log = logging.getLogger(__name__)
_CHUNK_BYTES = 1 << 15  # one SSH packet
_READ_BYTES = 1 << 17  # per SFTP request; larger ones gain little, and OpenSSH answers at most 256 KiB at once
_TAIL_LINES = 20
_LOST = "the connection was lost (was the device switched off, rebooted, or its sshd stopped?)"
_FAREWELL_S = 3.0  # for a process to end after its stdin closed, and for a dead connection to show

# $$ stays the same through both execs, and sshd made it the leader of a session, hence of a process group.
_START = "exec sh -c 'echo edgedeploy-pid $$ >&2; exec \"$@\"' sh "
_STARTED = re.compile(rb"edgedeploy-pid (\d+)\n")

# SFTP says "Failure" for a full disk, a read-only one and much else: ask the device in plain words.
_WHY_NOT_WRITTEN = """LC_ALL=C; export LC_ALL; d=$1
while [ ! -d "$d" ]; do [ -e "$d" ] && echo "$d is not a directory" >&2; d=$(dirname -- "$d"); done
probe=$d/.edgedeploy-probe-$$
dd if=/dev/zero of="$probe" bs=4096 count=1 2>&1 | grep probe >&2; rm -f -- "$probe"
df -Pk -- "$d" | tail -n 1"""


class SshTransport:
    """A connection to one device; a context manager.

    Args:
        name: the device's name in lab.toml.
        device: its entry, with transport "ssh".
        config: the person's OpenSSH configuration; None: ~/.ssh/config.
    """

    def __init__(self, name: str, device: Device, config: Path | None = None) -> None:
        self._device = device
        self._route = route(device, config)
        via = "".join(f" via {hop}" for hop in self._route[:-1])
        self.label = f"device {name!r} (ssh {self._route[-1]}{via})"
        self._connections: list[paramiko.Transport] = []
        self._sftp: paramiko.SFTPClient | None = None

    def __enter__(self) -> SshTransport:
        self._connections = log_in(
            self._route,
            self.label,
            connect_timeout_s=self._device.connect_timeout_s,
            silence_s=self._device.timeout_s,
        )
        return self

    def __exit__(self, *exception: object) -> None:
        log_out(self._connections)
        self._connections, self._sftp = [], None

    def run(self, argv: Sequence[str], *, timeout_s: float, stdin: bytes = b"") -> Completed:
        """Run a command to its end.

        Raises:
            DeviceUnreachable: the connection was lost, or the command did not end in time and was killed.
        """
        deadline = time.monotonic() + timeout_s
        channel = self._start(argv)
        stdout, stderr = bytearray(), bytearray()
        # All three at once: a command that fills one pipe while we wait on another would never end.
        _in_background(_feed, channel, stdin)
        readers = [
            _in_background(_drain, channel.recv, stdout.extend),
            _in_background(_drain, channel.recv_stderr, stderr.extend),
        ]
        try:
            channel.status_event.wait(max(0.0, deadline - time.monotonic()))
            for reader in readers:
                reader.join(max(0.0, deadline - time.monotonic()))
            if not channel.status_event.is_set() or any(reader.is_alive() for reader in readers):
                killed = "was killed" if self._kill(_process_number(stderr)) else "could not be killed"
                raise DeviceUnreachable(
                    f"{self.label}: `{shlex.join(argv)}` did not end within {timeout_s:g} s and {killed}; is the "
                    "device overloaded or frozen?"
                )
            status: int | None = channel.exit_status
            if status == -1:  # paramiko's word for "no status came": killed by a signal, or the connection is gone
                status = None
                if not self._is_connected():
                    raise DeviceUnreachable(f"{self.label}: the connection was lost during `{shlex.join(argv)}`")
            return Completed(status, bytes(stdout), _STARTED.sub(b"", bytes(stderr), count=1))
        finally:
            self._close(channel)

    def put(self, local: Path, remote: str) -> None:
        """Copy a file to the device, making parent directories; see `Transport.put`."""
        size_bytes = local.stat().st_size
        with (
            local.open("rb") as stream,
            self._files(f"{local} did not arrive as {remote}", remote, size_bytes) as (sftp, alive),
        ):
            _make_directories(sftp, PurePosixPath(remote).parent)
            # confirm=True: one stat, and an OSError when the size on the device differs.
            sftp.putfo(stream, remote, size_bytes, callback=lambda *_: alive(), confirm=True)

    def get(self, remote: str, local: Path) -> None:
        """Copy a file from the device, whole or not at all; see `Transport.get`."""
        with (
            atomic_path(local) as part,
            part.open("wb") as stream,
            self._files(f"{remote} could not be copied to {local}", remote) as (sftp, alive),
            sftp.open(
                remote, "rb"
            ) as source,  # not getfo: its read-ahead thread prints a traceback on a cut connection
        ):
            source.MAX_REQUEST_SIZE = _READ_BYTES
            while data := source.read(_READ_BYTES):
                stream.write(data)
                alive()

    def rename(self, old: str, new: str) -> None:
        """Move a file on the device, replacing what is there, atomically."""
        with self._files(f"{old} could not be renamed to {new}", old, 0) as (sftp, _):
            sftp.posix_rename(old, new)

    def remove(self, remote: str) -> None:
        """Delete a file on the device; a missing file is not an error."""
        with (
            self._files(f"{remote} could not be deleted", remote, 0) as (sftp, _),
            contextlib.suppress(FileNotFoundError),
        ):
            sftp.remove(remote)

    def open_channel(self, argv: Sequence[str]) -> SshChannel:
        """Start a process on the device and talk to it in lines; it must end when its stdin closes."""
        return SshChannel(self, self._start(argv))

    # --- the connection

    @property
    def _connection(self) -> paramiko.Transport:
        assert self._connections, "the transport is used outside its with block"
        return self._connections[-1]

    def _start(self, argv: Sequence[str]) -> paramiko.Channel:
        """Start a process without waiting for it."""
        import paramiko

        try:
            with self._patience(f"`{argv[0]}` was started"):
                channel = self._connection.open_session(timeout=self._device.connect_timeout_s)
                channel.exec_command(_START + shlex.join(argv))
        except paramiko.ChannelException as error:
            raise DeviceUnreachable(
                f"{self.label} does not open another session ({error.text}); raise MaxSessions in its sshd_config"
            ) from error
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise DeviceUnreachable(
                f"{self.label}: `{argv[0]}` could not be started: {self._why(error, '')}"
            ) from error
        return channel

    def _is_connected(self) -> bool:
        """Ask the server for any answer: a connection that was just cut still looks active for a moment."""
        import paramiko

        try:
            with self._patience("it was asked whether it is still there", self._device.connect_timeout_s):
                self._connection.global_request("keepalive@openssh.com", wait=True)
        except (DeviceUnreachable, EOFError, OSError, paramiko.SSHException):
            return False
        return self._connection.is_active()

    def _kill(self, process: int | None) -> bool:
        """End a process group on the device; what cannot be reached must end at its closed stdin.

        Returns:
            Whether the device said that it was done.
        """
        import paramiko

        if process is None or not self._connection.is_active():
            return False
        # sshd made it the leader of a group; after the "||" for SSH servers that do not.
        kill = f"kill -s KILL -- -{process} 2>/dev/null || kill -s KILL {process}"
        try:
            with self._patience("a process was killed", self._device.connect_timeout_s):
                channel = self._connection.open_session(timeout=self._device.connect_timeout_s)
                channel.exec_command(kill)
                channel.status_event.wait(self._device.connect_timeout_s)
                channel.close()
        except (DeviceUnreachable, EOFError, OSError, paramiko.SSHException) as error:
            _log.warning("%s: process %s could not be killed: %s", self.label, process, error)
            return False
        return channel.exit_status == 0

    def _close(self, channel: paramiko.Channel) -> None:
        import paramiko

        try:
            with self._patience("a channel was closed", self._device.connect_timeout_s):
                channel.close()
        except (DeviceUnreachable, EOFError, OSError, paramiko.SSHException) as error:
            _log.debug("%s: closing a channel: %s", self.label, error)  # closed all the same, by the other end

    @contextlib.contextmanager
    def _patience(self, what: str, limit_s: float = 0.0) -> Iterator[Callable[[], None]]:
        """Give up the connection when the block makes no progress for too long.

        Several of paramiko's waits (exec, opening SFTP, sending into a full socket) have no limit of their own; closing
        the connection ends them all. The block calls what it is given whenever something moved.

        Args:
            what: what went on, as in "went silent while ...".
            limit_s: 0: the device's timeout_s.
        """
        limit_s = limit_s or self._device.timeout_s
        connection = self._connection
        last_sign_s = time.monotonic()
        done, expired = threading.Event(), threading.Event()

        def alive() -> None:
            nonlocal last_sign_s
            last_sign_s = time.monotonic()

        def watch() -> None:
            while not done.wait(max(0.0, last_sign_s + limit_s - time.monotonic())):
                if time.monotonic() >= last_sign_s + limit_s:
                    expired.set()
                    connection.close()
                    return

        watcher = _in_background(watch)
        try:
            yield alive
        except Exception as error:
            if expired.is_set():
                raise DeviceUnreachable(self._went_silent(what, limit_s)) from error
            raise
        finally:
            done.set()
            watcher.join()
        if expired.is_set():
            raise DeviceUnreachable(self._went_silent(what, limit_s))

    def _went_silent(self, what: str, limit_s: float) -> str:
        return f"{self.label} went silent for {limit_s:g} s while {what} (is it frozen, or the network down?)"

    # --- files

    @contextlib.contextmanager
    def _files(
        self, failure: str, remote: str, written_bytes: int | None = None
    ) -> Iterator[tuple[paramiko.SFTPClient, Callable[[], None]]]:
        """Give SFTP and a sign-of-life function to the block, and turn what goes wrong into a TransferError.

        Args:
            failure: the error's first half, as in "x did not arrive as y".
            remote: the file on the device.
            written_bytes: how much the block writes on the device; None: it only reads.
        """
        import paramiko

        try:
            with self._patience("we worked on its files") as alive:
                yield self._open_sftp(), alive
        except (DeviceUnreachable, EOFError, OSError, paramiko.SSHException) as error:
            raise TransferError(f"{self.label}: {failure}: {self._why(error, remote, written_bytes)}") from error

    def _open_sftp(self) -> paramiko.SFTPClient:
        import paramiko

        if self._sftp is not None:
            return self._sftp
        try:
            sftp = paramiko.SFTPClient.from_transport(self._connection)
        except paramiko.SFTPError as error:
            raise TransferError(
                f"{self.label}: SFTP does not start, because the login shell prints something ({error}); let .bashrc "
                "and the like print only in interactive shells"
            ) from error
        except paramiko.SSHException as error:
            if not self._connection.is_active():
                raise
            raise TransferError(
                f"{self.label} has no SFTP ({error}); enable `Subsystem sftp internal-sftp` in its sshd_config, or "
                "install openssh-sftp-server"
            ) from error
        assert sftp is not None
        self._sftp = sftp
        return sftp

    def _why(self, error: Exception, remote: str, written_bytes: int | None = None) -> str:
        """Say what a failure of paramiko means; for a failed write, ask the device."""
        if isinstance(error, DeviceUnreachable):
            return str(error).removeprefix(f"{self.label} ")
        if isinstance(error, EOFError) or not self._connection.is_active():
            return _LOST
        if isinstance(error, FileNotFoundError) and not written_bytes:
            return f"there is no {remote} on the device"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            return f"it cannot be written here: {error.strerror}"  # SFTP itself has no such codes
        if isinstance(error, OSError) and written_bytes is not None:
            return self._why_not_written(error, str(PurePosixPath(remote).parent), written_bytes)
        if isinstance(error, PermissionError):
            return f"permission denied: {self._route[-1].user!r} may not read it"
        return f"the SSH server says only {str(error) or type(error).__name__!r}"

    def _why_not_written(self, error: OSError, folder: str, written_bytes: int) -> str:
        asked = self.run(["sh", "-c", _WHY_NOT_WRITTEN, "sh", folder], timeout_s=self._device.timeout_s)
        words = asked.stderr.decode(errors="replace").strip()
        fields = asked.stdout.decode(errors="replace").split()
        free_bytes = int(fields[3]) * 1024 if len(fields) > 5 and fields[3].isdigit() else None
        if "Read-only file system" in words:
            return f"{folder} is on a read-only file system; remount it, or set another root in lab.toml"
        if "Permission denied" in words or isinstance(error, PermissionError):
            user = self._route[-1].user
            return f"permission denied: {user!r} may not write in {folder}; set another root in lab.toml"
        if (
            "No space" in words
            or "quota" in words
            or (not words and free_bytes is not None and free_bytes < written_bytes)
        ):
            free = "" if free_bytes is None else f", {format_bytes(free_bytes)} left"
            return f"the disk is full: {format_bytes(written_bytes)} to write in {folder}{free}; make room there"
        return "; ".join(part for part in (error.strerror or str(error), words) if part)


class SshChannel:
    """A running process on the device with lines in and lines out; its stderr is kept aside.

    Closing it closes the process's stdin, gives it a moment to end, and kills its process group otherwise.
    """

    def __init__(self, transport: SshTransport, channel: paramiko.Channel) -> None:
        self._transport = transport
        self._channel = channel
        self._lines: queue.Queue[bytes | None] = queue.Queue()  # None: the end
        self._process: int | None = None
        self._tail: deque[bytes] = deque(maxlen=_TAIL_LINES)
        self._unfinished = b""
        _in_background(self._read_stdout)
        self._stderr_reader = _in_background(_drain, channel.recv_stderr, self._keep_stderr)

    def send_line(self, line: bytes) -> None:
        """Send one line (without its newline)."""
        transport = self._transport
        try:
            with transport._patience("a line was sent to it"):
                self._channel.sendall(line + b"\n")
        except (OSError, EOFError) as error:
            raise DeviceUnreachable(f"{transport.label}: {self._ending()}") from error

    def receive_line(self, timeout_s: float) -> bytes | None:
        """Return the next line, or None when nothing came in time."""
        try:
            line = self._lines.get(timeout=max(timeout_s, 0.0))
        except queue.Empty:
            return None
        if line is None:
            self._lines.put(None)  # whoever asks again gets the same answer
            raise DeviceUnreachable(f"{self._transport.label}: {self._ending()}")
        return line

    def stderr_tail(self) -> str:
        """Return the last 20 lines that the process wrote to stderr."""
        if self._channel.closed or self._channel.eof_received:
            self._stderr_reader.join(_FAREWELL_S)
        lines = [*self._tail, self._unfinished] if self._unfinished else [*self._tail]
        return b"\n".join(lines[-_TAIL_LINES:]).decode(errors="replace")

    def close(self) -> None:
        """End the process; never raises."""
        transport = self._transport
        if self._channel.closed:
            return
        try:
            if not self._channel.status_event.is_set():
                with transport._patience("its stdin was closed"):
                    self._channel.shutdown_write()
                if not self._channel.status_event.wait(_FAREWELL_S):
                    transport._kill(self._process)
        except (DeviceError, EOFError, OSError) as error:
            _log.warning("%s: the process could not be told to end: %s", transport.label, error)
        transport._close(self._channel)

    def _read_stdout(self) -> None:
        parts: list[bytes] = []  # of an unfinished line; tensors make lines of many megabytes

        def keep(data: bytes) -> None:
            *ends, rest = data.split(b"\n")
            for end in ends:
                self._lines.put(b"".join([*parts, end]))
                parts.clear()
            parts.append(rest)

        _drain(self._channel.recv, keep)
        self._lines.put(None)

    def _keep_stderr(self, data: bytes) -> None:
        *lines, self._unfinished = (self._unfinished + data).split(b"\n")
        for line in lines:
            if self._process is None and (number := _process_number(line + b"\n")):
                self._process = number
            else:
                self._tail.append(line)

    def _ending(self) -> str:
        """Say how a process without output ended: by itself, by a signal, or only from our point of view."""
        self._channel.status_event.wait(_FAREWELL_S)
        if not self._channel.status_event.is_set():
            return "the process closed its stdout but still runs"
        status = self._channel.exit_status
        if status >= 0:
            return f"the process ended with status {status}"
        if not self._transport._is_connected():
            return _LOST
        return "the process was killed by a signal (out of memory?)"


def _make_directories(sftp: paramiko.SFTPClient, directory: PurePosixPath) -> None:
    try:
        sftp.stat(str(directory))
    except FileNotFoundError:
        _make_directories(sftp, directory.parent)
        sftp.mkdir(str(directory))


def _in_background(target: Callable[..., None], *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=target, args=arguments, daemon=True)
    thread.start()
    return thread


def _feed(channel: paramiko.Channel, stdin: bytes) -> None:
    import paramiko

    # A command may end without reading its input; then its status, not our broken pipe, is the answer.
    with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
        channel.sendall(stdin)
        channel.shutdown_write()


def _drain(receive: Callable[[int], bytes], keep: Callable[[bytes], None]) -> None:
    """Read a stream to its end; a lost connection is an end too, and whoever waits for the process finds out why."""
    import paramiko

    with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
        while data := receive(_CHUNK_BYTES):
            keep(data)


def _process_number(stderr: bytes | bytearray) -> int | None:
    r"""Return what `_START` said.

    >>> _process_number(b"noise of a login shell\nedgedeploy-pid 42\n")
    42
    """
    match = _STARTED.search(stderr)
    return int(match[1]) if match else None
