"""The bad link of the tests does what it says: else tests of faults would test nothing."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.testbed.badlink import BadLink
from tests.testbed.board import wait_until


@pytest.fixture
def echo() -> Iterator[int]:
    """A server that sends back what it gets."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    stream, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=(stream,), daemon=True).start()

        def answer(stream: socket.socket) -> None:
            with stream, contextlib.suppress(OSError):
                while data := stream.recv(4096):
                    stream.sendall(data)

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def through(link: BadLink) -> socket.socket:
    return socket.create_connection(("127.0.0.1", link.port), timeout=10)


def asked(stream: socket.socket, data: bytes) -> bytes:
    stream.sendall(data)
    found = b""
    while len(found) < len(data) and (more := stream.recv(4096)):
        found += more
    return found


def test_link_carries_everything_and_forgets_connections_that_ended(echo: int) -> None:
    with BadLink(echo) as link:
        with through(link) as stream:
            assert asked(stream, b"x" * 100_000) == b"x" * 100_000
            assert (link.connections, link.bytes_up, link.bytes_down) == (1, 100_000, 100_000)
        wait_until(lambda: link.connections == 0, timeout_s=10, what=lambda: "a connection stays")


def test_delay_is_added_in_each_direction(echo: int) -> None:
    with BadLink(echo, delay_s=0.05) as link, through(link) as stream:
        started_s = time.monotonic()
        asked(stream, b"x")
        assert time.monotonic() - started_s >= 0.1


def test_rate_bounds_what_gets_through(echo: int) -> None:
    with BadLink(echo, rate=400_000) as link, through(link) as stream:
        started_s = time.monotonic()
        asked(stream, b"x" * 100_000)
        assert time.monotonic() - started_s >= 0.25


@pytest.mark.parametrize("how", ["fin", "rst"])
def test_link_is_cut_once_after_so_many_bytes(echo: int, how: str) -> None:
    with BadLink(echo, cut_after=50_000, how=how) as link:  # type: ignore[arg-type]  # both words are
        with through(link) as stream:
            if how == "rst":
                with pytest.raises(ConnectionError):
                    while asked(stream, b"x" * 10_000):
                        pass
            else:
                with contextlib.suppress(ConnectionError):  # what we send after the end is answered by a reset
                    while asked(stream, b"x" * 10_000):
                        pass
        assert link.bytes_up < 90_000
        with through(link) as stream:
            assert asked(stream, b"y" * 100_000) == b"y" * 100_000


def test_stalled_link_carries_nothing_and_then_everything(echo: int) -> None:
    with BadLink(echo) as link, through(link) as stream:
        assert asked(stream, b"1") == b"1"
        link.stall()
        stream.sendall(b"2")
        stream.settimeout(0.2)
        with pytest.raises(TimeoutError):
            stream.recv(1)
        link.resume()
        stream.settimeout(10)
        assert stream.recv(1) == b"2"


def test_half_open_connection_says_nothing_ever(echo: int) -> None:
    with BadLink(echo) as link, through(link) as stream:
        assert asked(stream, b"1") == b"1"
        link.half_open()
        stream.sendall(b"2")
        stream.settimeout(0.3)
        with pytest.raises(TimeoutError):
            stream.recv(1)


def test_link_refuses_and_admits(echo: int) -> None:
    with BadLink(echo) as link:
        link.refuse()
        with pytest.raises(ConnectionRefusedError):
            through(link)
        link.admit()
        with through(link) as stream:
            assert asked(stream, b"1") == b"1"
