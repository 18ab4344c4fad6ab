"""The way to a device over SSH: run, put, get, open a channel; every wait has a limit.

What runs on the device is started as the leader of its own process group and says its number first, so that it can be
ended from here: closing an SSH channel alone leaves the process running. A process whose connection is lost cannot be
reached any more: it must end by itself when its stdin closes, which our runner does.

Files go through the stdin and stdout of `dd` and `cat` and not through SFTP: that is faster (100 MiB: 0.8 s instead of
1.7 s, scp 1.0 s), needs nothing of the server but what the runner needs anyway, and what fails there says why in words.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import re
import secrets
import shlex
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO

from edgedeploy.errors import DeviceError, DeviceUnreachable, LoginRefused, TransferError
from edgedeploy.lab.answers import visible
from edgedeploy.lab.lines import Lines
from edgedeploy.lab.ssh_config import route
from edgedeploy.lab.ssh_login import log_in, log_out
from edgedeploy.lab.transport import RESUME_BYTES, SAID_BYTES, Completed, how_it_ended, refuse_nul
from edgedeploy.records.device import Device
from edgedeploy.storage import atomic_path
from edgedeploy.units import format_bytes

if TYPE_CHECKING:
    import paramiko

_log = logging.getLogger(__name__)
_CHUNK_BYTES = 1 << 15  # one SSH packet
_PACKET_BYTES = _CHUNK_BYTES - 64  # what paramiko puts into one of OpenSSH's largest packets; more is split unevenly
_WINDOW_BYTES = 4 << 20  # on its way from the device at most: 100 MB/s over a round trip of 40 ms
_READ_BYTES = 1 << 17
_UNDER_WAY_S = 2.0  # as much as the link takes in this time is on its way to the device at most ...
_UNDER_WAY_BYTES = 256 << 10  # ... but this, so that what keeps the lease does not stand in line behind a file
_NOISE_BEFORE_FILE_BYTES = 1 << 16
_TAIL_LINES = 20
_NOISE_BYTES = 1 << 12  # what is kept of a line of stderr
_LOST = "the connection was lost (was the device switched off, rebooted, or its sshd stopped?)"
_FAREWELL_S = 3.0  # for a process to end after its stdin closed, and for a dead connection to show

# $$ stays the same through both execs, and sshd made it the leader of a session, hence of a process group.
_START = "exec sh -c 'echo edgedeploy-pid $$ >&2; exec \"$@\"' sh "
_STARTED = re.compile(rb"edgedeploy-pid (\d{1,10})\n")

# $1: folder, $2: file, $3: where to go on, in RESUME_BYTES. dd writes each byte to its own place, so that it does no
# harm when a process of a lost connection still writes there: it writes the same.
_RECEIVE = f"""LC_ALL=C; export LC_ALL; umask 077
mkdir -p -- "$1" || exit
[ "$3" != 0 ] || : > "$2" || exit
dd of="$2" bs={RESUME_BYTES} seek="$3" conv=notrunc && exit
status=$?; df -Pk -- "$1" | tail -n 1; exit $status"""
# $1: a line that no login shell prints, $2: file.
_SEND = 'LC_ALL=C; export LC_ALL; printf "%s\\n" "$1"; exec cat -- "$2"'


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
        self._connections = []

    def reconnect(self) -> None:
        """Connect again, trying for the device's timeout_s; see `Transport.reconnect`."""
        deadline = time.monotonic() + self._device.timeout_s
        pause_s = 0.25
        while True:
            self.__exit__()
            try:
                self.__enter__()
                return
            except LoginRefused:
                raise
            except DeviceUnreachable:
                if time.monotonic() + pause_s > deadline:
                    raise
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 5.0)

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
            _in_background(_drain, channel.recv, _keeper(stdout)),
            _in_background(_drain, channel.recv_stderr, _keeper(stderr)),
        ]
        try:
            channel.status_event.wait(max(0.0, deadline - time.monotonic()))
            for reader in readers:
                reader.join(max(0.0, deadline - time.monotonic()))
            if not channel.status_event.is_set() or any(reader.is_alive() for reader in readers):
                while _process_number(stderr) is None and not channel.status_event.wait(0.01):
                    if time.monotonic() > deadline + _FAREWELL_S:  # it has not even been started
                        break
                killed = "was killed" if self._kill(_process_number(stderr)) else "could not be killed"
                raise DeviceUnreachable(
                    f"{self.label}: `{shlex.join(argv)}` did not end within {timeout_s:g} s and {killed}; is the "
                    "device overloaded or frozen?"
                )
            status = _status(channel)
            if status is None and not self.is_connected():
                raise DeviceUnreachable(f"{self.label}: the connection was lost during `{shlex.join(argv)}`")
            if max(len(stdout), len(stderr)) > SAID_BYTES:
                raise DeviceError(f"{self.label}: `{shlex.join(argv)}` printed more than {format_bytes(SAID_BYTES)}")
            return Completed(status, bytes(stdout), _STARTED.sub(b"", bytes(stderr), count=1))
        finally:
            self._close(channel)

    def put(self, local: Path, remote: str, *, offset: int = 0) -> None:
        """Copy a file to the device, making parent directories; see `Transport.put`."""
        folder = str(PurePosixPath(remote).parent)
        argv = ["sh", "-c", _RECEIVE, "sh", folder, remote, str(offset // RESUME_BYTES)]
        failure = f"{local} did not arrive as {remote}"
        with self._telling(failure), local.open("rb") as stream:
            stream.seek(offset)
            status, said, words = self._exchange(failure, argv, partial(_pour, stream))
        if status != 0:
            why = self._why_not_written(words, folder, local.stat().st_size, said)
            raise TransferError(f"{self.label}: {failure}: {why}")

    def get(self, remote: str, local: Path, *, most_bytes: int) -> None:
        """Copy a file from the device, whole or not at all; see `Transport.get`."""
        mark = secrets.token_hex(16).encode()
        argv = ["sh", "-c", _SEND, "sh", mark.decode(), remote]
        failure = f"{remote} could not be copied to {local}"
        with self._telling(failure), atomic_path(local) as part:
            with part.open("wb") as stream:

                def take(channel: paramiko.Channel, alive: Callable[[], None]) -> bytes:
                    got_bytes = 0
                    for data in _after(mark + b"\n", channel):
                        got_bytes += len(data)
                        if got_bytes > most_bytes:
                            raise TransferError(
                                f"{self.label}: {failure}: it is longer than the {format_bytes(most_bytes)} that were "
                                "expected"
                            )
                        stream.write(data)
                        alive()
                    return b""

                status, _, words = self._exchange(failure, argv, take)
            if status != 0:
                raise TransferError(f"{self.label}: {failure}: {self._why_not_read(words, remote)}")

    def rename(self, old: str, new: str) -> None:
        """Move a file on the device, replacing what is there, atomically."""
        self._change(f"{old} could not be renamed to {new}", ["mv", "-f", "--", old, new], old)

    def remove(self, remote: str) -> None:
        """Delete a file on the device; a missing file is not an error."""
        self._change(f"{remote} could not be deleted", ["rm", "-f", "--", remote], remote)

    def open_channel(self, argv: Sequence[str]) -> SshChannel:
        """Start a process on the device and talk to it in lines; it must end when its stdin closes."""
        return SshChannel(self, self._start(argv))

    # --- the connection

    @property
    def _connection(self) -> paramiko.Transport:
        if not self._connections:
            raise DeviceUnreachable(f"{self.label} is not connected: the connection was lost, or was never made")
        return self._connections[-1]

    def _start(self, argv: Sequence[str], window_bytes: int | None = None) -> paramiko.Channel:
        """Start a process without waiting for it."""
        import paramiko

        refuse_nul(argv, self.label)
        try:
            with self._patience(f"`{argv[0]}` was started"):
                channel = self._connection.open_session(window_bytes, timeout=self._device.connect_timeout_s)
                channel.exec_command(_START + shlex.join(argv))
        except paramiko.ChannelException as error:
            raise DeviceUnreachable(
                f"{self.label} does not open another session ({error.text}); raise MaxSessions in its sshd_config"
            ) from error
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise DeviceUnreachable(f"{self.label}: `{argv[0]}` could not be started: {self._why(error)}") from error
        return channel

    def is_connected(self) -> bool:
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
    def _telling(self, failure: str) -> Iterator[None]:
        """Turn what goes wrong in the block into a TransferError.

        Args:
            failure: its first half, as in "x did not arrive as y".
        """
        import paramiko

        try:
            yield
        except (DeviceUnreachable, EOFError, OSError, paramiko.SSHException) as error:
            raise TransferError(f"{self.label}: {failure}: {self._why(error)}") from error

    def _exchange(
        self, failure: str, argv: Sequence[str], move: Callable[[paramiko.Channel, Callable[[], None]], bytes]
    ) -> tuple[int | None, str, str]:
        """Start a process, move a file through it, and wait for its end.

        Args:
            failure: as in `_telling`.
            argv: the process.
            move: is given the channel and what to call whenever something moved; returns what it read besides.

        Returns:
            Its status, and what it printed on stdout (as far as `move` says it) and on stderr.

        Raises:
            TransferError: it was not our process that was started.
            DeviceUnreachable, OSError, EOFError, SSHException: the connection was lost, or a file here failed.
        """
        stderr = bytearray()
        with self._patience("we worked on its files") as alive:
            channel = self._start(argv, _WINDOW_BYTES)
            try:
                reader = _in_background(_drain, channel.recv_stderr, _keeper(stderr))
                said = move(channel, alive)
                channel.status_event.wait(self._device.timeout_s)
                reader.join(_FAREWELL_S)
                status = _status(channel)
            finally:
                self._close(channel)
        if status is None and not self.is_connected():
            raise EOFError
        if _STARTED.search(stderr) is None:
            raise TransferError(
                f"{self.label}: {failure}: its SSH server does something else than what it was asked to "
                f"(ForceCommand?); it says: {visible(said[:200].decode(errors='replace')).strip() or 'nothing'}"
            )
        words = _STARTED.sub(b"", bytes(stderr), count=1)[-_NOISE_BYTES:].decode(errors="replace")
        if status is not None and status < 0:
            words = f"the program there {how_it_ended(status)}"
        return status, said[-_NOISE_BYTES:].decode(errors="replace"), visible(words.strip())

    def _change(self, failure: str, argv: Sequence[str], remote: str) -> None:
        """Run a command that changes a file."""
        with self._telling(failure):
            done = self.run(["env", "LC_ALL=C", *argv], timeout_s=self._device.timeout_s)
        if done.status != 0:
            words = visible(done.stderr[-_NOISE_BYTES:].decode(errors="replace").strip())
            why = self._why_not_written(words, str(PurePosixPath(remote).parent), 0, "")
            raise TransferError(f"{self.label}: {failure}: {why}")

    def _why(self, error: Exception) -> str:
        """Say what a failure of the connection, or of a file here, means."""
        if isinstance(error, DeviceUnreachable):
            return str(error).removeprefix(f"{self.label} ").removeprefix(f"{self.label}: ")
        if isinstance(error, EOFError) or not self._connection.is_active():
            return _LOST
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"the disk here is full ({error.strerror}); make room"
        if isinstance(error, OSError) and error.strerror:
            return f"the file here: {error.strerror}"
        return f"the SSH server says only {str(error) or type(error).__name__!r}"

    def _why_not_read(self, words: str, remote: str) -> str:
        """Say why a file there could not be read; words are the device's."""
        if "No such file" in words:
            return f"there is no {remote} on the device"
        if "Permission denied" in words:
            return f"permission denied: {self._route[-1].user!r} may not read it"
        return words or "the device does not say why"

    def _why_not_written(self, words: str, folder: str, wanted_bytes: int, said: str) -> str:
        """Say why something there could not be written.

        Args:
            words: what the programs there printed.
            folder: where it was to be written.
            wanted_bytes: how much.
            said: the line of `df -Pk` about the folder, or "".
        """
        if "Read-only file system" in words:
            return f"{folder} is on a read-only file system; remount it, or set another root in lab.toml"
        if "Permission denied" in words or "Operation not permitted" in words:
            user = self._route[-1].user
            return f"permission denied: {user!r} may not write in {folder}; set another root in lab.toml"
        if "No space" in words or "quota" in words.lower():
            fields = said.split()
            is_known = len(fields) > 5 and re.fullmatch("[0-9]{1,15}", fields[3]) is not None
            free = f", {format_bytes(int(fields[3]) * 1024)} left" if is_known else ""
            return f"the disk is full: {format_bytes(wanted_bytes)} to write in {folder}{free}; make room there"
        if "Not a directory" in words or "File exists" in words:
            return f"{folder} is not a directory; set another root in lab.toml"
        return words or "the device does not say why"


class SshChannel:
    """A running process on the device with lines in and lines out; its stderr is kept aside.

    Closing it closes the process's stdin, gives it a moment to end, and kills its process group otherwise.
    """

    def __init__(self, transport: SshTransport, channel: paramiko.Channel) -> None:
        self._transport = transport
        self._channel = channel
        self._lines = Lines()
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
            return self._lines.get(timeout_s)
        except EOFError as error:
            if self._lines.problem:
                raise DeviceError(f"{self._transport.label}: {self._lines.problem}") from error
            raise DeviceUnreachable(f"{self._transport.label}: {self._ending()}") from error

    def stderr_tail(self) -> str:
        """Return the last 20 lines that the process wrote to stderr."""
        if self._channel.closed or self._channel.eof_received:
            self._stderr_reader.join(_FAREWELL_S)
        lines = [*self._tail, self._unfinished] if self._unfinished else [*self._tail]
        return visible(b"\n".join(lines[-_TAIL_LINES:]).decode(errors="replace"))

    def close(self) -> None:
        """End the process; never raises."""
        transport = self._transport
        self._lines.end()
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
        _drain(self._channel.recv, self._lines.feed)
        self._lines.end()

    def _keep_stderr(self, data: bytes) -> None:
        *lines, unfinished = (self._unfinished + data).split(b"\n")
        self._unfinished = unfinished[-_NOISE_BYTES:]
        for line in lines:
            if self._process is None and (number := _process_number(line + b"\n")):
                self._process = number
            else:
                self._tail.append(line[-_NOISE_BYTES:])

    def _ending(self) -> str:
        """Say how a process without output ended: by itself, by a signal, or only from our point of view."""
        self._channel.status_event.wait(_FAREWELL_S)
        if not self._channel.status_event.is_set():
            return "the process closed its stdout but still runs"
        status = _status(self._channel)
        if status is not None:
            hint = " (often the kernel's out-of-memory killer)" if status == -signal.SIGKILL else ""
            return f"the process {how_it_ended(status)}{hint}"
        if not self._transport.is_connected():
            return _LOST
        return "the process ended, and its SSH server does not say how"


def _in_background(target: Callable[..., None], *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=target, args=arguments, daemon=True)
    thread.start()
    return thread


def _status(channel: paramiko.Channel) -> int | None:
    """Return how a process ended: its status, negative: the signal that killed it, or None when nobody has said."""
    from edgedeploy.lab.ssh_connection import exit_signal

    if channel.exit_status >= 0:
        return channel.exit_status
    number = exit_signal(channel)
    return None if number is None else -number


def _pour(stream: BinaryIO, channel: paramiko.Channel, alive: Callable[[], None]) -> bytes:
    """Send a file to a process's stdin and close it; return what the process prints when it is not content."""
    window_bytes, sent_bytes, started_s = channel.out_window_size, 0, time.monotonic()
    while data := stream.read(_PACKET_BYTES):
        try:
            channel.sendall(data)
        except OSError:  # it does not read on: what it prints, and its status, say why
            break
        alive()
        sent_bytes += len(data)
        while True:
            waiting_bytes = window_bytes - channel.out_window_size
            rate = (sent_bytes - waiting_bytes) / max(time.monotonic() - started_s, 1e-3)
            if waiting_bytes <= max(_UNDER_WAY_BYTES, rate * _UNDER_WAY_S) or channel.status_event.wait(0.005):
                break
    with contextlib.suppress(OSError, EOFError):
        channel.shutdown_write()
    waiting_bytes = -1
    while not channel.status_event.wait(0.05):  # what is on its way still moves
        if channel.out_window_size != waiting_bytes:
            waiting_bytes = channel.out_window_size
            alive()
    said = bytearray()
    _drain(channel.recv, _keeper(said))
    return bytes(said)


def _after(mark: bytes, channel: paramiko.Channel) -> Iterator[bytes]:
    """Yield what a process prints after a mark; what a login shell prints before it is no file's."""
    noise = b""
    while mark not in noise and len(noise) <= _NOISE_BEFORE_FILE_BYTES:
        data = channel.recv(_READ_BYTES)
        if not data:
            return
        noise += data
    yield noise.partition(mark)[2]
    while data := channel.recv(_READ_BYTES):
        yield data


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


def _keeper(kept: bytearray) -> Callable[[bytes], None]:
    """Return what appends to `kept` until that is one byte too long, and ignores the rest."""

    def keep(data: bytes) -> None:
        kept.extend(data[: SAID_BYTES + 1 - len(kept)])

    return keep


def _process_number(stderr: bytes | bytearray) -> int | None:
    r"""Return what `_START` said.

    >>> _process_number(b"noise of a login shell\nedgedeploy-pid 42\n")
    42
    """
    match = _STARTED.search(stderr)
    return int(match[1]) if match else None
