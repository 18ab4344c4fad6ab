"""The device half of the spine through a real SSH server, with the fake runtime: what works, and how it fails."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgedeploy.backends import backend, session_file
from edgedeploy.errors import DeviceBusy, DeviceError, DeviceUnreachable, TransferError, VisitFailed
from edgedeploy.lab import bundle, visits
from edgedeploy.lab.conversation import Agent
from edgedeploy.lab.transport import Transport
from edgedeploy.records.compression import CompressionReport
from edgedeploy.records.device import Device
from edgedeploy.records.model import Model, TensorSpec
from edgedeploy.records.target import Target
from edgedeploy.storage import sha256_file

if TYPE_CHECKING:
    from conftest import Sshd

QUICK = visits.Schedule(bursts_per_visit=2, samples_per_burst=3, warm_up_window=2, warm_up_cap_s=0.05)


@dataclass
class Board:
    """A device behind SSH, and a side to measure on it."""

    sshd: Sshd
    root: Path
    side: visits.Side
    files: dict[str, Path]

    def device(self, **changes: object) -> Device:
        return self.sshd.device(**{"python": sys.executable, "root": str(self.root), "timeout_s": 10.0, **changes})

    @contextlib.contextmanager
    def connected(self, **changes: object) -> Iterator[tuple[Transport, Agent]]:
        transport = self.sshd.transport(**{"python": sys.executable, "root": str(self.root), **changes})
        with transport, bundle.connect(transport, self.device(**changes), device_name="board") as agent:
            yield transport, agent

    def processes(self) -> list[int]:
        """Return the numbers of the processes on the device that have to do with us."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):  # the process ended meanwhile
                    if str(self.root).encode() in (entry / "cmdline").read_bytes():
                        found.append(int(entry.name))
        return found

    def is_left_clean(self, within_s: float = 10.0) -> bool:
        deadline_s = time.monotonic() + within_s
        while self.processes():
            if time.monotonic() > deadline_s:
                return False
            time.sleep(0.02)
        return True


@pytest.fixture
def board(sshd: Sshd, tmp_path: Path) -> Board:
    fake = backend("fake")
    spec = TensorSpec(name="x", dtype="float32", shape=("batch", 4))
    report = CompressionReport(parameters=0, nonzero_parameters=0, macs=None, initializer_bytes=0, operators={})
    scores = TensorSpec(name="scores", dtype="float32", shape=("batch", 3))
    model = Model(path="", sha256="0" * 64, source="", opset=17, inputs=(spec,), outputs=(scores,), compression=report)
    target = Target(format="edgedeploy.target/1", name="any", description="")
    fake.compile(model, target, fake.options(duration_us=50.0), tmp_path / "artifact")
    save_file({"x": np.arange(40, dtype=np.float32).reshape(10, 4)}, tmp_path / "inputs")
    files = {sha256_file(path): path for path in (session_file("fake"), tmp_path / "artifact", tmp_path / "inputs")}
    session, artifact, inputs = files
    side = visits.Side(
        cell="toy", artifact_sha256=artifact, session_sha256=session, options={}, inputs_sha256=inputs, batch=1
    )
    return Board(sshd, tmp_path / "on-device", side, files)


def with_options(side: visits.Side, **options: float | bool) -> visits.Side:
    return replace(side, options=options)


def measure(agent: Agent, *sides: visits.Side, schedule: visits.Schedule = QUICK) -> list[visits.Measured]:
    return visits.measure_block(agent, sides, schedule, block=0, seed=1)


def test_everything_works_and_the_second_time_nothing_is_sent(board: Board, tmp_path: Path) -> None:
    with board.connected() as (transport, agent):
        assert set(bundle.ship(agent, transport, board.files)) == set(board.files)
        one, two = measure(agent, board.side, replace(board.side, cell="other"))
        assert [len(burst.samples_s) for burst in one.visit.bursts + two.visit.bursts] == [3, 3, 3, 3]
        assert visits.measure_memory(agent, board.side).peak_rss_bytes > 0
        outputs = visits.compute_outputs(agent, transport, board.side, tmp_path / "outputs")
        assert outputs.samples == 10
        assert load_file(tmp_path / "outputs")["scores"].shape == (10, 3)
    assert board.is_left_clean()
    with board.connected() as (transport, agent):
        assert bundle.ship(agent, transport, board.files) == ()


def test_runtime_that_prints_on_stdout_does_no_harm(board: Board) -> None:
    with board.connected() as (transport, agent):
        bundle.ship(agent, transport, board.files)
        (measured,) = measure(agent, with_options(board.side, print_noise=True))
        assert not measured.visit.dropped


def test_greeting_of_the_login_shell_does_no_harm(board: Board) -> None:
    # internal-sftp cannot be forced through a shell; sftp-server can, as a noisy .bashrc would be.
    board.sshd.stop()
    board.sshd.start(
        options="Subsystem sftp internal-sftp\n"
        'ForceCommand case "$SSH_ORIGINAL_COMMAND" in internal-sftp) exec /usr/lib/openssh/sftp-server;; esac; '
        'echo "Welcome!"; echo motd >&2; sh -c "$SSH_ORIGINAL_COMMAND"\n'
    )
    if not Path("/usr/lib/openssh/sftp-server").exists():
        pytest.skip("needs OpenSSH's sftp-server as a program")
    with board.connected() as (transport, agent):
        bundle.ship(agent, transport, board.files)
        assert len(measure(agent, board.side)) == 1
    assert board.is_left_clean()


def test_connection_cut_during_a_visit_is_told_and_leaves_no_process(board: Board) -> None:
    with pytest.raises(DeviceUnreachable) as caught, board.connected() as (transport, agent):
        bundle.ship(agent, transport, board.files)
        slow = with_options(board.side, duration_us=400_000)
        threading.Timer(1.5, board.sshd.cut).start()
        measure(agent, slow, schedule=replace(QUICK, bursts_per_visit=50))
    assert "device 'board'" in str(caught.value)
    assert "toy block 0.0" in str(caught.value)
    assert "connection was lost" in str(caught.value)
    assert caught.value.exit_code == 3
    assert board.is_left_clean()


def test_hanging_session_is_killed_and_the_device_goes_on(board: Board) -> None:
    with board.connected() as (transport, agent):
        bundle.ship(agent, transport, board.files)
        with pytest.raises(VisitFailed, match=r"toy block 0\.0.* no answer within 1 s") as caught:
            measure(agent, with_options(board.side, hang_after=1), schedule=replace(QUICK, open_timeout_s=1.0))
        assert caught.value.kind == "timeout"
        assert len(measure(agent, board.side)) == 1
    assert board.is_left_clean()


def test_crashing_session_names_its_signal(board: Board) -> None:
    with board.connected() as (transport, agent):
        bundle.ship(agent, transport, board.files)
        with pytest.raises(VisitFailed, match=r"toy block 0\.0.*SIGSEGV"):
            measure(agent, with_options(board.side, crash_after=1))


def test_hanging_runner_is_told_by_its_silence_and_killed(board: Board) -> None:
    with pytest.raises(DeviceUnreachable, match="fell silent"), board.connected(timeout_s=3.0) as (transport, agent):
        bundle.ship(agent, transport, board.files)
        for process in board.processes():
            if b"\0watchdog\0" not in Path(f"/proc/{process}/cmdline").read_bytes():
                os.kill(process, signal.SIGSTOP)
        measure(agent, board.side)
    assert board.is_left_clean()


def test_killed_runner_is_told_from_a_lost_connection(board: Board) -> None:
    with pytest.raises(DeviceUnreachable, match="killed by SIGKILL"), board.connected() as (transport, agent):
        bundle.ship(agent, transport, board.files)
        for process in board.processes():
            os.kill(process, signal.SIGKILL)
        measure(agent, board.side)


def test_python_without_the_runtime_says_what_to_install(board: Board, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    session = session_file("onnxruntime")
    side = replace(board.side, session_sha256=sha256_file(session))
    with board.connected(python=str(tmp_path / "bare" / "bin" / "python")) as (transport, agent):
        bundle.ship(agent, transport, {**board.files, sha256_file(session): session})
        with pytest.raises(VisitFailed, match=r"bare/bin/python .* has no module .*lab\.toml") as caught:
            measure(agent, side)
        assert caught.value.kind == "missing-runtime"
    assert board.is_left_clean()


def test_device_without_that_python_says_so(board: Board) -> None:
    with (
        pytest.raises(DeviceError, match=r"has no /nowhere/python.*device 'board' in lab\.toml"),
        board.connected(python="/nowhere/python"),
    ):
        pass


def test_device_in_use_names_its_holder(board: Board) -> None:
    with board.connected(), pytest.raises(DeviceBusy, match=f"process {os.getpid()}"), board.connected():
        pass
    with board.connected():
        pass


def test_full_disk_is_named_and_leaves_nothing(board: Board, small_disk: Path, tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.write_bytes(os.urandom(16 << 20))
    board.root = small_disk / "root"
    with board.connected() as (transport, agent):
        with pytest.raises(TransferError, match="the disk is full"):
            bundle.ship(agent, transport, {sha256_file(big): big})
        assert bundle.ship(agent, transport, board.files)  # there is room again
        assert len(measure(agent, board.side)) == 1


def test_read_only_root_is_named(board: Board, read_only_disk: Path) -> None:
    board.root = read_only_disk / "root"
    with pytest.raises(TransferError, match="read-only file system"), board.connected():
        pass


def test_upload_that_was_cut_off_is_gone_on_with_over_a_new_connection(board: Board, tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.write_bytes(os.urandom(1 << 20) * 24)
    digest = sha256_file(big)
    objects = board.root / "objects"

    def strike_when_half_way() -> None:
        while not any(part.stat().st_size > 1 << 20 for part in objects.glob(f"{digest}*")):
            time.sleep(0.002)
        board.sshd.cut()

    with board.connected() as (transport, agent):
        watcher = threading.Thread(target=strike_when_half_way, daemon=True)
        watcher.start()
        assert bundle.ship(agent, transport, {digest: big}) == (digest,)
        watcher.join()
        assert sha256_file(objects / digest) == digest
    assert board.is_left_clean()


def test_half_an_object_under_its_full_name_is_never_trusted(board: Board) -> None:
    with board.connected() as (transport, agent):
        bundle.ship(agent, transport, board.files)
    victim = board.root / "objects" / board.side.artifact_sha256
    victim.write_bytes(victim.read_bytes()[:10])
    with board.connected() as (transport, agent):
        assert bundle.ship(agent, transport, board.files) == (board.side.artifact_sha256,)
        assert len(measure(agent, board.side)) == 1


def test_half_a_runner_is_replaced(board: Board) -> None:
    with board.connected():
        pass
    (runner,) = (board.root / "objects").iterdir()
    whole = runner.read_bytes()
    runner.write_bytes(whole[: len(whole) // 2])
    with board.connected() as (transport, agent):
        bundle.ship(agent, transport, board.files)
    assert runner.read_bytes() == whole
