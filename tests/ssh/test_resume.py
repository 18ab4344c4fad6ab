"""Uploads over links that break: they go on where they ended, over a new connection or from a new process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import paramiko
import pytest

from edgedeploy.errors import DeviceError, LoginRefused, TransferError
from edgedeploy.lab import bundle
from edgedeploy.lab.ssh import SshTransport
from edgedeploy.storage import sha256_file
from tests.testbed.badlink import BadLink

if TYPE_CHECKING:
    from conftest import Sshd

MIB = 1 << 20
SIZE = 24 * MIB


@pytest.fixture
def big_file(tmp_path: Path) -> Path:
    path = tmp_path / "big"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def link(sshd: Sshd) -> Iterator[BadLink]:
    with BadLink(sshd.port) as link:
        yield link


def eventually(condition: Callable[[], object], within_s: float = 30.0) -> bool:
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def settings(sshd: Sshd, link: BadLink, tmp_path: Path, **changes: object) -> dict[str, object]:
    return {
        **link.settings(sshd), "python": sys.executable, "root": str(tmp_path / "root"), "timeout_s": 20.0,
        "lease_dir": str(tmp_path / "lease"), **changes,
    }  # fmt: skip


def is_whole(tmp_path: Path, big_file: Path) -> bool:
    return sha256_file(tmp_path / "root" / "objects" / sha256_file(big_file)) == sha256_file(big_file)


@pytest.mark.parametrize("how", ["fin", "rst"])
def test_upload_goes_on_over_a_new_connection(
    sshd: Sshd, link: BadLink, big_file: Path, tmp_path: Path, how: str
) -> None:
    link.how = how
    given = settings(sshd, link, tmp_path)
    told: list[str] = []
    with (
        sshd.transport(**given) as transport,
        bundle.connect(transport, sshd.device(**given), device_name="board", progress=told.append) as agent,
    ):
        bundle.ship(agent, transport, {})
        before = link.bytes_up
        link.cut_after(16 * MIB)
        assert bundle.ship(agent, transport, {sha256_file(big_file): big_file}) == (sha256_file(big_file),)
        # From the start again would be 40 MiB; a few of those that were under way are lost.
        assert link.bytes_up - before < 36 * MIB
        assert agent.missing([sha256_file(big_file)]) == ()
    assert is_whole(tmp_path, big_file)
    assert told == ["board: the connection was lost while files were moved; connecting again"]


def test_other_host_key_after_a_broken_link_is_refused_at_once(sshd: Sshd, link: BadLink, tmp_path: Path) -> None:
    with sshd.transport(**settings(sshd, link, tmp_path)) as transport:
        link.cut()
        assert not transport.is_connected()
        sshd.stop()
        sshd.start(host_key="other")
        started = time.monotonic()
        with pytest.raises(LoginRefused, match="HAS CHANGED"):
            transport.reconnect()
        assert time.monotonic() - started < 15.0


HOST = """
import sys
from pathlib import Path
from edgedeploy.lab import bundle
from edgedeploy.lab.ssh import SshTransport
from edgedeploy.records.device import Device
from edgedeploy.storage import sha256_file
import msgspec
device, big = msgspec.json.decode(sys.argv[1], type=Device), Path(sys.argv[2])
with SshTransport("board", device) as transport, bundle.connect(transport, device, device_name="board") as agent:
    bundle.ship(agent, transport, {sha256_file(big): big})
"""


def test_upload_of_a_host_that_was_killed_is_gone_on_with_by_the_next(
    sshd: Sshd, link: BadLink, big_file: Path, tmp_path: Path
) -> None:
    import msgspec

    given = settings(sshd, link, tmp_path)
    part = tmp_path / "root" / "objects" / f"{sha256_file(big_file)}.part"
    link.rate = 10 * MIB
    device = msgspec.json.encode(sshd.device(**given)).decode()
    host = subprocess.Popen([sys.executable, "-c", textwrap.dedent(HOST), device, str(big_file)])
    try:
        assert eventually(lambda: part.exists() and part.stat().st_size > 6 * MIB, 60.0)
    finally:
        host.kill()
        assert host.wait() == -signal.SIGKILL
    link.rate = 0
    before = link.bytes_up
    with (
        sshd.transport(**given) as transport,
        bundle.connect(transport, sshd.device(**given), device_name="board", wait_s=60.0) as agent,
    ):
        bundle.ship(agent, transport, {sha256_file(big_file): big_file})
    assert is_whole(tmp_path, big_file)
    assert link.bytes_up - before < SIZE - 4 * MIB


def test_unchanged_files_are_not_sent_again_nor_read_there(
    sshd: Sshd, link: BadLink, big_file: Path, tmp_path: Path
) -> None:
    given = settings(sshd, link, tmp_path)
    for turn in range(2):
        with (
            sshd.transport(**given) as transport,
            bundle.connect(transport, sshd.device(**given), device_name="board") as agent,
        ):
            before = link.bytes_up
            sent = bundle.ship(agent, transport, {sha256_file(big_file): big_file})
            assert len(sent) == (0 if turn else 1)
            assert turn == 0 or link.bytes_up - before < 10_000


# --- a server that keeps no rules


def test_server_that_sends_more_than_it_may_is_cut_off(sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its window is 100 kB as far as we are concerned, and it thinks it has more: a server that ignores the window."""
    opened = paramiko.Transport.open_session

    def open_session(self: paramiko.Transport, *arguments: object, **named: object) -> paramiko.Channel:
        channel = opened(self, *arguments, **named)
        channel.in_window_size = 100_000
        return channel

    monkeypatch.setattr(paramiko.Transport, "open_session", open_session)
    with sshd.transport(timeout_s=5.0) as board:
        channel = board._start(["sh", "-c", "cat /dev/zero"])
        assert eventually(lambda: not channel.transport.is_active())
        assert len(channel.in_buffer) < 4 * MIB
        with pytest.raises(DeviceError):
            board.run(["true"], timeout_s=5.0)


def test_fast_cipher_is_chosen_where_the_server_has_it(sshd: Sshd) -> None:
    with sshd.transport() as board:
        assert board._connection.local_cipher == board._connection.remote_cipher == "aes128-gcm@openssh.com"
    sshd.stop()
    sshd.start(options="Ciphers aes256-ctr\n")
    with sshd.transport() as board:
        assert board._connection.local_cipher == "aes256-ctr"


def test_slow_link_has_little_under_way(sshd: Sshd, link: BadLink, tmp_path: Path) -> None:
    """Else what keeps the lease would stand behind megabytes of a file for longer than the lease lasts."""
    small = tmp_path / "small"
    small.write_bytes(os.urandom(2 * MIB))
    link.rate = 0.5 * MIB
    with sshd.transport(**settings(sshd, link, tmp_path)) as transport:
        done = threading.Event()

        def put() -> None:
            transport.put(small, str(tmp_path / "there"))
            done.set()

        threading.Thread(target=put, daemon=True).start()
        assert eventually(lambda: (tmp_path / "there").exists() and (tmp_path / "there").stat().st_size > MIB // 2)
        assert not done.is_set()
        # What has gone into the link and has not come out of it: two seconds' worth and a packet or two.
        assert link.bytes_up - (tmp_path / "there").stat().st_size < 1.5 * MIB
        assert done.wait(30.0)
    assert (tmp_path / "there").read_bytes() == small.read_bytes()


def test_transfer_error_names_what_did_not_arrive(sshd: Sshd, tmp_path: Path) -> None:
    with (
        SshTransport("board", sshd.device()) as board,
        pytest.raises(TransferError, match=r"the file here: No such file"),
    ):
        board.put(tmp_path / "nowhere", str(tmp_path / "there"))
