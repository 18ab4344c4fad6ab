"""The seam to a device: run a command, move a file, open a channel. Local is here; SSH is in ssh.py.

Paths on the device are POSIX strings; a relative one is relative to the home directory of the device's user.
Every wait has a limit, and running into it is a DeviceError that says which wait it was.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from edgedeploy.errors import DeviceError, DeviceUnreachable, TransferError, UsageError
from edgedeploy.lab.answers import visible
from edgedeploy.lab.lines import Lines
from edgedeploy.storage import atomic_path
from edgedeploy.units import format_bytes

STDERR_LINES = 20
# Where an upload that was cut off can go on: what came after the last multiple of this is sent again.
RESUME_BYTES = 1 << 20
# What a command may print on each of its streams.
SAID_BYTES = 16 << 20
# What is read of a stream at once; what is kept of a line of stderr.
_CHUNK_BYTES = 1 << 16
_NOISE_BYTES = 1 << 12
# How long a process may take to end after its stdin was closed, before it is killed.
FAREWELL_S = 5.0


@dataclass(frozen=True, slots=True)
class Completed:
    """A finished command on the device.

    Attributes:
        status: exit status; negative: the signal that killed it; None: the device did not say.
    """

    status: int | None
    stdout: bytes
    stderr: bytes


class Channel(Protocol):
    """A running process on the device with lines in and lines out; its stderr is kept aside.

    Closing it ends the process and whatever it started.
    """

    def send_line(self, line: bytes) -> None:
        """Send one line (without its newline). Raises DeviceUnreachable when the other end is gone."""

    def receive_line(self, timeout_s: float) -> bytes | None:
        """Return the next line, or None when nothing came in time.

        Raises:
            DeviceUnreachable: the process ended or the connection was lost; the text says which, with the exit
                status where known.
        """

    def stderr_tail(self) -> str:
        """Return the last 20 lines that the process wrote to stderr."""

    def close(self) -> None:
        """End the process; never raises."""


class Transport(Protocol):
    """A way to one device. A context manager: leaving it closes the connection.

    Attributes:
        label: how errors name the device: "device 'orin-2' (ssh alice@10.0.0.7:22)".
    """

    label: str

    def __enter__(self) -> Transport: ...

    def __exit__(self, *exception: object) -> None: ...

    def is_connected(self) -> bool:
        """Ask whether the device still answers; what was started over a lost connection is lost with it."""

    def reconnect(self) -> None:
        """Connect again, trying for the device's timeout_s; nothing that was started before is reached any more.

        Raises:
            DeviceUnreachable: it did not come back, or is not the same any more.
        """

    def run(self, argv: Sequence[str], *, timeout_s: float, stdin: bytes = b"") -> Completed:
        """Run a command to its end; argv is never joined without quoting.

        Raises:
            DeviceUnreachable: the connection was lost, or the command did not end in time and was killed.
            DeviceError: it printed more than SAID_BYTES.
        """

    def put(self, local: Path, remote: str, *, offset: int = 0) -> None:
        """Copy a file to the device, making parent directories.

        What stands at `remote` may be partial when this raises: put to a temporary name, verify, rename.

        Args:
            local: the whole file.
            remote: where it goes; what stands there is replaced, or gone on with where there is an offset.
            offset: bytes at the start of `remote` that are right already; a multiple of RESUME_BYTES.

        Raises:
            TransferError: disk full, read-only, permission, lost connection: named as such.
        """

    def rename(self, old: str, new: str) -> None:
        """Move a file on the device, replacing what is there, atomically."""

    def remove(self, remote: str) -> None:
        """Delete a file on the device; a missing file is not an error."""

    def get(self, remote: str, local: Path, *, most_bytes: int) -> None:
        """Copy a file from the device, whole or not at all.

        Args:
            remote: the file there.
            local: where it goes; what stands there stays when this raises.
            most_bytes: a longer one is not fetched further than this.

        Raises:
            TransferError: it is longer, cannot be read, or the connection was lost.
        """

    def open_channel(self, argv: Sequence[str]) -> Channel:
        """Start a process on the device and talk to it in lines."""


def why_not(error: OSError) -> str:
    """Say in words why a file could not be moved, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk there is full; free some space or choose another root in lab.toml"
    if error.errno == errno.EROFS:
        return "the file system there is read-only; choose another root in lab.toml"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "permission denied; choose a root that this user may write to in lab.toml"
    return error.strerror or str(error)


def refuse_nul(argv: Sequence[str], label: str) -> None:
    r"""Raise UsageError for a word that no program can be given: everything else is passed on as it is.

    >>> refuse_nul(["cat", "--", "a\n$(b) 'c' -d"], "device 'pi'")
    """
    for word in argv:
        if "\0" in word:
            raise UsageError(f"{label}: {word!r} has a NUL in it, which no command can be given; check lab.toml")


def how_it_ended(status: int) -> str:
    """Say a process's exit status in words."""
    if status >= 0:
        return f"ended with exit status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


def _home() -> Path:
    """Return what relative paths start from; a service's user may have a home directory that does not exist."""
    return Path.home() if Path.home().is_dir() else Path("/")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and the group that it leads."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class LocalChannel:
    """A process on this machine, in lines."""

    def __init__(self, label: str, argv: Sequence[str]) -> None:
        self._label = label
        refuse_nul(argv, label)
        try:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=_home(),
                start_new_session=True,  # Ctrl-C is for us; the process ends because we close its stdin
            )
        except OSError as error:
            raise DeviceUnreachable(f"{label}: {argv[0]} cannot be started: {error.strerror or error}") from error
        self._lines = Lines()
        self._stderr: collections.deque[str] = collections.deque(maxlen=STDERR_LINES)
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._readers = [
            threading.Thread(target=self._read_lines, args=(self._process.stdout,), daemon=True),
            threading.Thread(target=self._read_stderr, args=(self._process.stderr,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _read_lines(self, stream: IO[bytes]) -> None:
        while data := os.read(stream.fileno(), _CHUNK_BYTES):
            self._lines.feed(data)
        self._lines.end()

    def _read_stderr(self, stream: IO[bytes]) -> None:
        while line := stream.readline(_NOISE_BYTES):
            self._stderr.append(line.decode("utf-8", "replace").rstrip())

    def send_line(self, line: bytes) -> None:
        """Send one line (without its newline). Raises DeviceUnreachable when the other end is gone."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + b"\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError) as error:
            raise DeviceUnreachable(f"{self._label}: the runner {self._ending()}") from error

    def receive_line(self, timeout_s: float) -> bytes | None:
        """Return the next line, or None when nothing came in time; raises DeviceUnreachable when there is none."""
        try:
            return self._lines.get(timeout_s)
        except EOFError as error:
            if self._lines.problem:
                raise DeviceError(f"{self._label}: {self._lines.problem}") from error
            raise DeviceUnreachable(f"{self._label}: the runner {self._ending()}") from error

    def _ending(self) -> str:
        try:
            return how_it_ended(self._process.wait(timeout=1.0))
        except subprocess.TimeoutExpired:
            return "closed its end of the conversation"

    def stderr_tail(self) -> str:
        """Return the last 20 lines that the process wrote to stderr."""
        if self._process.poll() is not None:
            self._readers[1].join(timeout=1.0)  # what it said last may still be on its way
        return visible("\n".join(self._stderr))

    def close(self) -> None:
        """End the process: ask by closing its stdin, then kill it and its group."""
        assert self._process.stdin is not None
        self._lines.end()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=FAREWELL_S)
        _end(self._process)
        for reader, stream in zip(self._readers, (self._process.stdout, self._process.stderr), strict=True):
            reader.join(timeout=1.0)
            if stream is not None and not reader.is_alive():
                stream.close()


class LocalTransport:
    """The machine we run on as a device: no sshd, same interface."""

    def __init__(self, name: str) -> None:
        self.label = f"device {name!r} (local)"

    def __enter__(self) -> LocalTransport:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def is_connected(self) -> bool:
        """Say that this machine answers itself."""
        return True

    def reconnect(self) -> None:
        """Do nothing: there is no connection to lose."""

    def run(self, argv: Sequence[str], *, timeout_s: float, stdin: bytes = b"") -> Completed:
        """Run a command to its end; a program that does not exist gives status 127, as in a shell.

        Raises:
            DeviceUnreachable: it did not end in time; it and what it started are dead then.
        """
        refuse_nul(argv, self.label)
        try:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=_home(),
                start_new_session=True,
            )
        except OSError as error:
            return Completed(127, b"", f"{argv[0]}: {error.strerror or error}\n".encode())
        try:
            stdout, stderr = process.communicate(stdin, timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            message = f"{self.label}: {argv[0]} did not end within {timeout_s:g} s and was killed"
            raise DeviceUnreachable(message) from error
        finally:
            if process.returncode is None:
                _end(process)
        if max(len(stdout), len(stderr)) > SAID_BYTES:
            raise DeviceError(f"{self.label}: {argv[0]} printed more than {format_bytes(SAID_BYTES)}")
        return Completed(process.returncode, stdout, stderr)

    def put(self, local: Path, remote: str, *, offset: int = 0) -> None:
        """Copy a file, making parent directories; it may be partial when this raises."""
        target = self._path(remote)
        with self._telling(f"cannot write {target}"):
            target.parent.mkdir(parents=True, exist_ok=True)
            with local.open("rb") as source, target.open("r+b" if offset else "wb") as stream:
                source.seek(offset)
                stream.seek(offset)
                shutil.copyfileobj(source, stream, RESUME_BYTES)
                stream.truncate()

    def rename(self, old: str, new: str) -> None:
        """Move a file, replacing what is there, atomically."""
        with self._telling(f"cannot rename {self._path(old)}"):
            self._path(old).replace(self._path(new))

    def remove(self, remote: str) -> None:
        """Delete a file; a missing file is not an error."""
        with self._telling(f"cannot delete {self._path(remote)}"):
            self._path(remote).unlink(missing_ok=True)

    def get(self, remote: str, local: Path, *, most_bytes: int) -> None:
        """Copy a file from the device, whole or not at all."""
        source = self._path(remote)
        with self._telling(f"cannot copy {source} to {local}"), atomic_path(local) as part:
            if (size_bytes := source.stat().st_size) > most_bytes:
                raise TransferError(
                    f"{self.label}: {source} has {format_bytes(size_bytes)}, and no more than "
                    f"{format_bytes(most_bytes)} were expected"
                )
            shutil.copyfile(source, part)

    def open_channel(self, argv: Sequence[str]) -> Channel:
        """Start a process and talk to it in lines."""
        return LocalChannel(self.label, argv)

    def _path(self, remote: str) -> Path:
        return _home() / remote

    @contextlib.contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TransferError(f"{self.label}: {what}: {why_not(error)}") from error
