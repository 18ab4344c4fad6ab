"""Commands, files and channels over a real connection, and what happens when it breaks."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from edgedeploy.errors import DeviceError, DeviceUnreachable, TransferError
from edgedeploy.lab.ssh import SshTransport
from edgedeploy.storage import sha256_file

if TYPE_CHECKING:
    from conftest import Sshd


@pytest.fixture
def board(sshd: Sshd) -> Iterator[SshTransport]:
    with sshd.transport() as transport:
        yield transport


@pytest.fixture
def big_file(tmp_path: Path) -> Path:
    path = tmp_path / "big"
    path.write_bytes(os.urandom(1 << 20) * 24)
    return path


@pytest.fixture
def small_file(tmp_path: Path) -> Path:
    path = tmp_path / "small"
    path.write_bytes(b"12345")
    return path


def eventually(condition: Callable[[], object], within_s: float = 15.0) -> bool:
    """Wait for something that another process does; false when it did not happen in time."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def is_running(marker: str) -> bool:
    """Say whether any process has the marker in its command line."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):  # the process ended meanwhile
                if marker.encode() in (entry / "cmdline").read_bytes():
                    return True
    return False


# --- run


@pytest.mark.parametrize(
    "word", ["; rm -rf x", "a b", "two\nlines", "$HOME `id` $(id)", 'it\'s "quoted"', "*", "", "-n", "é"]
)
def test_arguments_arrive_as_they_were_given(board: SshTransport, word: str) -> None:
    done = board.run(["printf", "%s|", word, "end"], timeout_s=20)
    assert done.stdout.decode() == f"{word}|end|"


def test_status_and_both_streams_come_back_apart(board: SshTransport) -> None:
    done = board.run(["sh", "-c", "echo out; echo err >&2; exit 7"], timeout_s=20)
    assert (done.status, done.stdout, done.stderr) == (7, b"out\n", b"err\n")


def test_eight_megabytes_on_stderr_and_on_stdin_do_not_block(board: SshTransport) -> None:
    data = b"x" * 8_000_000
    done = board.run(["sh", "-c", "cat >&2; echo done"], timeout_s=60, stdin=data)
    assert (done.status, done.stdout, len(done.stderr)) == (0, b"done\n", len(data))


def test_command_that_ignores_its_input_still_tells_its_status(board: SshTransport) -> None:
    assert board.run(["sh", "-c", "exit 3"], timeout_s=20, stdin=b"x" * 8_000_000).status == 3


def test_missing_program_has_status_127(board: SshTransport) -> None:
    assert board.run(["no-such-program"], timeout_s=20).status == 127


@pytest.mark.parametrize("name", ["KILL", "SEGV", "ILL", "TERM"])
def test_death_by_signal_is_told_by_its_number_and_is_no_lost_connection(board: SshTransport, name: str) -> None:
    assert board.run(["sh", "-c", f"kill -s {name} $$"], timeout_s=20).status == -signal.Signals[f"SIG{name}"]
    assert board.run(["true"], timeout_s=20).status == 0


def test_command_over_its_limit_is_killed_with_what_it_started(board: SshTransport) -> None:
    with pytest.raises(DeviceUnreachable, match=r"did not end within 0\.5 s and was killed"):
        board.run(["sh", "-c", "sleep 3517 & sleep 3518; true"], timeout_s=0.5)
    assert eventually(lambda: not is_running("sleep\x003517") and not is_running("sleep\x003518"))
    assert board.run(["true"], timeout_s=20).status == 0


def test_connection_cut_during_a_command_is_told(sshd: Sshd, board: SshTransport) -> None:
    threading.Timer(0.3, sshd.cut).start()
    with pytest.raises(DeviceUnreachable, match="connection was lost"):
        board.run(["sleep", "5"], timeout_s=20)


def test_frozen_device_runs_into_the_limit_before_a_command_starts(sshd: Sshd) -> None:
    with sshd.transport(timeout_s=1.0) as board:
        board.run(["true"], timeout_s=20)
        sshd.freeze()
        with pytest.raises(DeviceUnreachable, match="silent for 1 s"):
            board.run(["true"], timeout_s=20)


def test_frozen_device_runs_into_the_limit_during_a_command(sshd: Sshd) -> None:
    with sshd.transport(timeout_s=1.0, connect_timeout_s=1.0) as board:
        threading.Timer(0.5, sshd.freeze).start()
        with pytest.raises(DeviceUnreachable, match="within 2 s and could not be killed"):
            board.run(["sleep", "60"], timeout_s=2.0)


# --- files


def test_big_file_survives_the_round_trip(board: SshTransport, big_file: Path, tmp_path: Path) -> None:
    remote = str(tmp_path / "on device" / "deep" / "big.part")
    board.put(big_file, remote)
    board.rename(remote, f"{remote}-done")
    board.get(f"{remote}-done", tmp_path / "back", most_bytes=big_file.stat().st_size)
    assert sha256_file(tmp_path / "back") == sha256_file(big_file)
    assert not Path(remote).exists()
    board.remove(f"{remote}-done")
    board.remove(f"{remote}-done")
    assert not Path(f"{remote}-done").exists()


def test_rename_replaces_what_is_there(board: SshTransport, tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    (tmp_path / "new").write_text("new")
    board.rename(str(tmp_path / "new"), str(tmp_path / "old"))
    assert (tmp_path / "old").read_text() == "new"


def test_relative_paths_start_at_the_home_directory(board: SshTransport, small_file: Path) -> None:
    try:
        board.put(small_file, ".edgedeploy-test/here")
        home = board.run(["sh", "-c", "cd && pwd"], timeout_s=20).stdout.decode().strip()
        assert (Path(home) / ".edgedeploy-test" / "here").stat().st_size == small_file.stat().st_size
    finally:
        board.run(["rm", "-rf", ".edgedeploy-test"], timeout_s=20)


def test_missing_remote_file_leaves_the_local_one_alone(board: SshTransport, tmp_path: Path) -> None:
    local = tmp_path / "local"
    local.write_text("kept")
    with pytest.raises(TransferError, match="there is no /nowhere/x on the device"):
        board.get("/nowhere/x", local, most_bytes=100)
    assert local.read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".part")] == []


def test_full_disk_is_named(board: SshTransport, big_file: Path, small_disk: Path) -> None:
    with pytest.raises(TransferError, match=r"the disk is full: 24 MiB to write in .*small-disk, 0 B left"):
        board.put(big_file, str(small_disk / "big.part"))
    assert [path.name for path in small_disk.iterdir()] in ([], ["big.part"])


def test_read_only_disk_is_named(board: SshTransport, small_file: Path, read_only_disk: Path) -> None:
    with pytest.raises(TransferError, match="read-only file system"):
        board.put(small_file, str(read_only_disk / "new" / "small.part"))


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_directory_without_permission_is_named(board: SshTransport, small_file: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(TransferError, match="permission denied"):
        board.put(small_file, str(tmp_path / "locked" / "small.part"))


def test_file_in_place_of_a_directory_is_named(board: SshTransport, small_file: Path) -> None:
    with pytest.raises(TransferError, match="is not a directory"):
        board.put(small_file, f"{small_file}/below")


@pytest.mark.parametrize("fault", ["cut", "freeze"])
def test_upload_over_a_dying_connection_leaves_only_the_part(
    sshd: Sshd, big_file: Path, tmp_path: Path, fault: str
) -> None:
    remote = tmp_path / "x.part"
    expected = {"cut": "the connection was lost", "freeze": "silent for 1 s"}[fault]

    def strike_when_half_way() -> None:
        if eventually(lambda: remote.exists() and remote.stat().st_size > 1 << 20):
            getattr(sshd, fault)()

    with sshd.transport(timeout_s=1.0) as board:
        watcher = threading.Thread(target=strike_when_half_way)
        watcher.start()
        with pytest.raises(TransferError, match=expected):
            for _ in range(100):  # until it strikes: how fast a copy is, is the machine's business
                board.put(big_file, str(remote))
        watcher.join()
    sshd.thaw()
    assert [path.name for path in tmp_path.glob("x*")] == ["x.part"]


@pytest.mark.parametrize("fault", ["cut", "freeze"])
def test_download_over_a_dying_connection_leaves_nothing(
    sshd: Sshd, big_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], fault: str
) -> None:
    expected = {"cut": "the connection was lost", "freeze": "silent for 1 s"}[fault]

    def strike_when_it_has_begun() -> None:
        if eventually(lambda: list(tmp_path.glob(".back*"))):
            getattr(sshd, fault)()

    with sshd.transport(timeout_s=1.0) as board:
        watcher = threading.Thread(target=strike_when_it_has_begun)
        watcher.start()
        with pytest.raises(TransferError, match=expected):
            for number in range(100):
                board.get(str(big_file), tmp_path / f"back{number}", most_bytes=1 << 30)
        watcher.join()
    sshd.thaw()
    assert list(tmp_path.glob(".back*")) == []
    assert {path.stat().st_size for path in tmp_path.glob("back*")} <= {big_file.stat().st_size}
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("size", [1000, 100_000])
def test_file_that_is_longer_than_expected_is_not_fetched(board: SshTransport, tmp_path: Path, size: int) -> None:
    (tmp_path / "flood").write_bytes(b"x" * size)
    local = tmp_path / "local"
    local.write_text("kept")
    with pytest.raises(TransferError, match=r"longer than the 999 B that were expected"):
        board.get(str(tmp_path / "flood"), local, most_bytes=999)
    assert local.read_text() == "kept"
    board.get(str(tmp_path / "flood"), local, most_bytes=size)
    assert local.stat().st_size == size


def test_file_without_end_is_given_up_at_its_limit(board: SshTransport, tmp_path: Path) -> None:
    with pytest.raises(TransferError, match=r"longer than the 8 MiB"):
        board.get("/dev/zero", tmp_path / "zeros", most_bytes=8 << 20)
    assert list(tmp_path.glob("*zeros*")) == []


def test_upload_goes_on_where_it_was_told_to(board: SshTransport, big_file: Path, tmp_path: Path) -> None:
    data, there = big_file.read_bytes(), tmp_path / "there"
    there.write_bytes(data[: 5 << 20] + b"what was lost on the way")
    board.put(big_file, str(there), offset=5 << 20)
    assert there.read_bytes() == data


def test_device_without_sftp_and_with_a_noisy_shell_gets_and_gives_files(
    sshd: Sshd, home: Path, big_file: Path, tmp_path: Path
) -> None:
    sshd.stop()
    sshd.start(
        options='Subsystem sftp /bin/false\nForceCommand echo welcome to my board; eval "$SSH_ORIGINAL_COMMAND"\n'
    )
    with sshd.transport() as board:
        board.put(big_file, str(tmp_path / "there"))
        board.get(str(tmp_path / "there"), tmp_path / "back", most_bytes=1 << 30)
    assert sha256_file(tmp_path / "there") == sha256_file(tmp_path / "back") == sha256_file(big_file)


def test_device_that_only_runs_a_command_of_its_own_is_told(sshd: Sshd, small_file: Path, tmp_path: Path) -> None:
    sshd.stop()
    sshd.start(options="ForceCommand echo locked\n")
    with sshd.transport() as board, pytest.raises(TransferError, match="something else than what it was asked to"):
        board.put(small_file, str(tmp_path / "never"))
    with sshd.transport() as board, pytest.raises(TransferError, match="something else than what it was asked to"):
        board.get(str(small_file), tmp_path / "never", most_bytes=100)
    assert not (tmp_path / "never").exists()


def test_device_that_opens_one_session_only_is_told(sshd: Sshd, small_file: Path, tmp_path: Path) -> None:
    sshd.stop()
    sshd.start(options="MaxSessions 1\n")
    with sshd.transport() as board:
        channel = board.open_channel(["cat"])
        with pytest.raises(TransferError, match="raise MaxSessions"):
            board.put(small_file, str(tmp_path / "never"))
        channel.close()

        def is_put() -> bool:  # the server takes a moment to see that its one session has ended
            with contextlib.suppress(TransferError):
                board.put(small_file, str(tmp_path / "there"))
                return True
            return False

        assert eventually(is_put)
    assert (tmp_path / "there").read_bytes() == small_file.read_bytes()


# --- channels


def test_lines_go_both_ways_and_stderr_is_kept_aside(board: SshTransport) -> None:
    channel = board.open_channel(["sh", "-c", "echo ready; echo 'a warning' >&2; exec cat"])
    assert channel.receive_line(20) == b"ready"
    for line in (b"one", b"x" * 3_000_000, b"", b'{"a": 1}'):
        channel.send_line(line)
        assert channel.receive_line(20) == line
    assert channel.receive_line(0.05) is None
    assert eventually(lambda: channel.stderr_tail() == "a warning")
    channel.close()


def test_stderr_tail_is_bounded(board: SshTransport) -> None:
    channel = board.open_channel(["sh", "-c", "seq 100000 >&2; printf unfinished >&2"])
    with pytest.raises(DeviceUnreachable):
        channel.receive_line(20)
    assert channel.stderr_tail().split("\n") == [*(str(n) for n in range(99982, 100001)), "unfinished"]
    channel.close()


def test_stderr_cannot_command_the_terminal(board: SshTransport) -> None:
    channel = board.open_channel(["sh", "-c", "printf '\\033[2J\\033]0;owned\\007 a\\rb\\n' >&2"])
    with pytest.raises(DeviceUnreachable):
        channel.receive_line(20)
    assert channel.stderr_tail() == r"\x1b[2J\x1b]0;owned\x07 a\rb"
    channel.close()


@pytest.mark.parametrize("stream", ["", " >&2"])
def test_command_that_floods_is_stopped_by_a_limit(board: SshTransport, stream: str) -> None:
    with pytest.raises(DeviceError, match="printed more than 16 MiB"):
        board.run(["sh", "-c", f"head -c 20000000 /dev/zero{stream}"], timeout_s=60)


def test_process_that_ends_says_its_status(board: SshTransport) -> None:
    channel = board.open_channel(["sh", "-c", "echo last; exit 5"])
    assert channel.receive_line(20) == b"last"
    for _ in range(2):
        with pytest.raises(DeviceUnreachable, match="ended with exit status 5"):
            channel.receive_line(20)
    with pytest.raises(DeviceUnreachable, match="ended with exit status 5"):
        for _ in range(100):
            channel.send_line(b"x" * 100_000)
    channel.close()


def test_process_killed_by_a_signal_is_told_from_a_lost_connection(sshd: Sshd, board: SshTransport) -> None:
    killed = board.open_channel(["sh", "-c", "kill -9 $$"])
    with pytest.raises(DeviceUnreachable, match=r"was killed by SIGKILL \(often the kernel's out-of-memory killer\)"):
        killed.receive_line(20)
    lost = board.open_channel(["cat"])
    sshd.cut()
    with pytest.raises(DeviceUnreachable, match="connection was lost"):
        lost.receive_line(20)
    killed.close()
    lost.close()


def test_closing_ends_a_process_that_reads_its_stdin(board: SshTransport) -> None:
    channel = board.open_channel(["sh", "-c", "cat; true edgedeploy-3519"])
    assert eventually(lambda: is_running("edgedeploy-3519"))
    channel.close()
    assert eventually(lambda: not is_running("edgedeploy-3519"))


def test_closing_kills_a_process_that_does_not_and_what_it_started(board: SshTransport) -> None:
    channel = board.open_channel(["sh", "-c", "sleep 3520 & sleep 3521; true"])
    assert eventually(lambda: is_running("sleep\x003520") and is_running("sleep\x003521"))
    channel.close()
    assert eventually(lambda: not is_running("sleep\x003520") and not is_running("sleep\x003521"))


def test_closing_over_a_frozen_connection_comes_back(sshd: Sshd) -> None:
    with sshd.transport(timeout_s=1.0, connect_timeout_s=1.0) as board:
        channel = board.open_channel(["cat"])
        sshd.freeze()
        channel.close()
    sshd.thaw()
