"""Uploads over links that break often, by halves, or for good; the quick ones are in tests/ssh/test_resume.py."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgedeploy.errors import DeviceUnreachable, TransferError
from edgedeploy.lab import bundle
from edgedeploy.storage import sha256_file
from tests.testbed.badlink import BadLink
from tests.testbed.hybrid import Hybrid
from tests.testbed.plain import Plain

MIB = 1 << 20
SIZE = 24 * MIB


@pytest.fixture
def big_file(tmp_path: Path) -> Path:
    path = tmp_path / "big"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def link(plain: Plain) -> Iterator[BadLink]:
    with BadLink(plain.port) as link:
        yield link


def eventually(condition: Callable[[], object], within_s: float = 30.0) -> bool:
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def settings(plain: Plain, link: BadLink, tmp_path: Path, **changes: object) -> dict[str, object]:
    return {
        **link.settings(plain), "python": sys.executable, "root": str(tmp_path / "root"), "timeout_s": 20.0,
        "lease_dir": str(tmp_path / "lease"), **changes,
    }  # fmt: skip


def is_whole(tmp_path: Path, big_file: Path) -> bool:
    return sha256_file(tmp_path / "root" / "objects" / sha256_file(big_file)) == sha256_file(big_file)


def test_upload_survives_a_link_that_breaks_again_and_again(
    plain: Plain, link: BadLink, big_file: Path, tmp_path: Path
) -> None:
    given = settings(plain, link, tmp_path)
    every = 7 * MIB

    def told(text: str) -> None:
        if "connection was lost" in text:
            breaks.append(link.bytes_up)
            link.cut_after(every)

    breaks: list[int] = []
    with (
        plain.transport(**given) as transport,
        bundle.connect(transport, plain.device(**given), device_name="board", progress=told) as agent,
    ):
        link.cut_after(every)
        bundle.ship(agent, transport, {sha256_file(big_file): big_file})
    assert len(breaks) >= 3
    assert is_whole(tmp_path, big_file)


def test_upload_over_a_connection_that_only_the_device_has_ended_goes_on(
    plain: Plain, link: BadLink, big_file: Path, tmp_path: Path
) -> None:
    given = settings(plain, link, tmp_path, timeout_s=3.0, connect_timeout_s=5.0)
    part = tmp_path / "root" / "objects" / f"{sha256_file(big_file)}.part"

    def strike() -> None:
        if eventually(lambda: part.exists() and part.stat().st_size > 2 * MIB):
            link.half_open()

    with (
        plain.transport(**given) as transport,
        bundle.connect(transport, plain.device(**given), device_name="board") as agent,
    ):
        link.rate = 20 * MIB
        watcher = threading.Thread(target=strike, daemon=True)
        watcher.start()
        bundle.ship(agent, transport, {sha256_file(big_file): big_file})
        watcher.join()
    assert is_whole(tmp_path, big_file)


def test_device_that_does_not_come_back_is_told_and_keeps_what_it_has(
    plain: Plain, link: BadLink, big_file: Path, tmp_path: Path
) -> None:
    given = settings(plain, link, tmp_path)
    part = tmp_path / "root" / "objects" / f"{sha256_file(big_file)}.part"
    with (
        plain.transport(**given) as transport,
        bundle.connect(transport, plain.device(**given), device_name="board") as agent,
    ):
        transport._device = plain.device(**settings(plain, link, tmp_path, timeout_s=2.0))
        link.rate = 20 * MIB
        threading.Timer(0.5, lambda: (link.refuse(), link.cut())).start()
        with pytest.raises(DeviceUnreachable, match="refused the connection"):
            bundle.ship(agent, transport, {sha256_file(big_file): big_file})
    left = part.stat().st_size if part.exists() else 0
    link.admit()
    link.rate = 0
    before = link.bytes_up
    with (
        plain.transport(**given) as transport,
        bundle.connect(transport, plain.device(**given), device_name="board") as agent,
    ):
        bundle.ship(agent, transport, {sha256_file(big_file): big_file})
    assert is_whole(tmp_path, big_file)
    assert link.bytes_up - before < SIZE - left + 3 * MIB


def test_files_go_to_an_aarch64_board_and_back(hybrid: Hybrid, big_file: Path, tmp_path: Path) -> None:
    with hybrid.transport() as transport:
        there = "broken links/big"  # below the home directory
        transport.put(big_file, there)
        transport.put(big_file, there, offset=10 * MIB)
        transport.get(there, tmp_path / "back", most_bytes=SIZE)
        assert sha256_file(tmp_path / "back") == sha256_file(big_file)
        transport.rename(there, f"{there}-2")
        with pytest.raises(TransferError, match="there is no "):
            transport.get(there, tmp_path / "back", most_bytes=SIZE)
        transport.remove(f"{there}-2")
        assert transport.run(["sh", "-c", "kill -s SEGV $$"], timeout_s=20).status == -signal.SIGSEGV
