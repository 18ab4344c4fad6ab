"""A bad link in user space: a TCP proxy on 127.0.0.1 that delays, narrows, stalls, cuts, or forgets to tell one end."""

from __future__ import annotations

import contextlib
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

from .board import LOOPBACK, Board

CHUNK_BYTES = 1 << 14
# What is under way at most per direction, as in a router's queue; it also bounds what a stalled link remembers.
QUEUED_CHUNKS = 256
CONNECT_TIMEOUT_S = 10.0
# How often whoever waits looks whether its connection has been ended: a socket in use is closed only when it is let go.
TICK_S = 0.05
# Closing with no time to linger is a RST.
RESET = struct.pack("ii", 1, 0)
How = Literal["fin", "rst"]
Way = Literal["up", "down"]


@dataclass(eq=False)
class _Connection:
    """A connection's two ends."""

    near: socket.socket
    far: socket.socket
    is_over: threading.Event = field(default_factory=threading.Event)
    ended: int = 0


class BadLink:
    """A link whose faults are arranged; a context manager.

    Args:
        port: of the device; host: its address.
        delay_s: added in each direction.
        rate: bytes per second in each direction, of all connections together; 0: unlimited.
        cut_after: bytes towards the device, of all connections together, after which the link is cut once.
        how: the end is told ("fin") or the connection is reset ("rst").
    """

    def __init__(
        self,
        port: int,
        host: str = LOOPBACK,
        *,
        delay_s: float = 0.0,
        rate: float = 0.0,
        cut_after: int | None = None,
        how: How = "rst",
    ) -> None:
        self.delay_s, self.rate, self.how = delay_s, rate, how
        self._target = (host, port)
        self._lock = threading.Lock()
        self._cut_after = cut_after
        self._sent: dict[Way, int] = {"up": 0, "down": 0}
        self._free_from_s: dict[Way, float] = {"up": 0.0, "down": 0.0}
        self._flows = threading.Event()
        self._flows.set()
        self._connections: list[_Connection] = []
        self._listener = socket.create_server((LOOPBACK, 0))
        self.port: int = self._listener.getsockname()[1]
        self._in_background(self._accept, self._listener)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def bytes_up(self) -> int:
        """Return how much went towards the device."""
        return self._sent["up"]

    @property
    def bytes_down(self) -> int:
        """Return how much came from the device."""
        return self._sent["down"]

    @property
    def connections(self) -> int:
        """Return how many are open."""
        with self._lock:
            return len(self._connections)

    def known_hosts(self, board: Board) -> Path:
        """Return a file that knows the device's host key at the link's port."""
        path = board.known_hosts.with_name(f"known_hosts-{self.port}")
        path.write_text(board.known_hosts.read_text().replace(f"]:{board.port} ", f"]:{self.port} "))
        return path

    def settings(self, board: Board) -> dict[str, object]:
        """Return what board.device() and board.transport() take to go through the link."""
        return {"port": self.port, "known_hosts": str(self.known_hosts(board))}

    def stall(self) -> None:
        """Let nothing through any more, both ways; connections stay open."""
        self._flows.clear()

    def resume(self) -> None:
        """Let everything through again, also what was under way."""
        self._flows.set()

    def cut_after(self, more_bytes: int) -> None:
        """Cut the link once after so many more bytes towards the device."""
        with self._lock:
            self._cut_after = self._sent["up"] + more_bytes

    def cut(self, how: How | None = None) -> None:
        """End every connection at both ends; new ones are let through."""
        for connection in self._taken():
            for end in (connection.near, connection.far):
                _close(end, how or self.how)

    def half_open(self) -> None:
        """End every connection at the device's end alone: the near end hears nothing of it, ever."""
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.is_over.set()
            _close(connection.far, self.how)

    def refuse(self) -> None:
        """Refuse new connections, as a device does whose sshd does not run; those that are there stay."""
        _close_listener(self._listener)

    def admit(self) -> None:
        """Let new connections through again."""
        self._listener = socket.create_server((LOOPBACK, self.port))
        self._in_background(self._accept, self._listener)

    def close(self) -> None:
        """End everything; twice is once."""
        _close_listener(self._listener)
        self.cut("fin")
        self._flows.set()

    @staticmethod
    def _in_background(target: Callable[..., None], *arguments: object) -> None:
        threading.Thread(target=target, args=arguments, daemon=True).start()

    def _taken(self) -> list[_Connection]:
        """Return all connections, which count as ended from now on."""
        with self._lock:
            taken, self._connections = self._connections, []
        for connection in taken:
            connection.is_over.set()
        return taken

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:  # closed
                return
            try:
                far = socket.create_connection(self._target, timeout=CONNECT_TIMEOUT_S)
            except OSError:
                _close(near, "rst")
                continue
            for end in (near, far):
                end.settimeout(TICK_S)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = _Connection(near, far)
            with self._lock:
                self._connections.append(connection)
            ways: tuple[tuple[socket.socket, socket.socket, Way], ...] = ((near, far, "up"), (far, near, "down"))
            for source, sink, way in ways:
                chunks: queue.Queue[tuple[float, bytes]] = queue.Queue(QUEUED_CHUNKS)
                self._in_background(self._read, connection, source, chunks, way)
                self._in_background(self._write, connection, sink, chunks)

    def _read(
        self, connection: _Connection, source: socket.socket, chunks: queue.Queue[tuple[float, bytes]], way: Way
    ) -> None:
        """Take what comes and say when it arrives; an empty chunk is the end."""
        data = b"-"
        while data and not connection.is_over.is_set():
            try:
                data = source.recv(CHUNK_BYTES)
            except TimeoutError:
                continue
            except OSError:  # reset, or closed by a fault of ours
                data = b""
            arrives_s = self._arrival_s(len(data), way)
            while not connection.is_over.is_set():
                with contextlib.suppress(queue.Full):
                    chunks.put((arrives_s, data), timeout=TICK_S)
                    break
            if way == "up" and self._is_due():
                self.cut()

    def _arrival_s(self, size: int, way: Way) -> float:
        """Return when so many bytes have passed a link of our rate, after all that were before them."""
        with self._lock:
            start_s = max(time.monotonic(), self._free_from_s[way])
            self._free_from_s[way] = start_s + (size / self.rate if self.rate else 0.0)
            self._sent[way] += size
            return self._free_from_s[way] + self.delay_s

    def _is_due(self) -> bool:
        """Return, once, whether so much has gone up that the link is to be cut."""
        with self._lock:
            if self._cut_after is None or self._sent["up"] < self._cut_after:
                return False
            self._cut_after = None
            return True

    def _write(self, connection: _Connection, sink: socket.socket, chunks: queue.Queue[tuple[float, bytes]]) -> None:
        """Hand over what has arrived, unless the link is stalled or the connection over."""
        is_over = connection.is_over
        while not is_over.is_set():
            try:
                arrives_s, data = chunks.get(timeout=TICK_S)
            except queue.Empty:
                continue
            is_over.wait(max(0.0, arrives_s - time.monotonic()))
            while not self._flows.wait(TICK_S) and not is_over.is_set():
                pass
            if not data:
                self._end(connection, sink)
                return
            with contextlib.suppress(OSError):  # the other end is gone: its reader says so
                _send_all(sink, data, is_over)

    def _end(self, connection: _Connection, sink: socket.socket) -> None:
        """Tell one end that the other one has nothing more to say; when both have been told, it is over."""
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
        with self._lock:
            connection.ended += 1
            if connection.ended < 2 or connection not in self._connections:
                return
            self._connections.remove(connection)
        connection.is_over.set()
        connection.near.close()
        connection.far.close()


def _send_all(sink: socket.socket, data: bytes, is_over: threading.Event) -> None:
    """Send everything, or as much as goes until the connection is over."""
    while data and not is_over.is_set():
        with contextlib.suppress(TimeoutError):
            data = data[sink.send(data) :]


def _close(end: socket.socket, how: How) -> None:
    with contextlib.suppress(OSError):
        if how == "rst":
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        else:
            end.shutdown(socket.SHUT_RDWR)
    end.close()


def _close_listener(listener: socket.socket) -> None:
    """Close it so that whoever waits in accept() hears of it."""
    with contextlib.suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)
    listener.close()
