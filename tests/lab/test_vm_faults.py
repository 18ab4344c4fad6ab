"""Faults that only a machine with its own kernel, power and cable can have: the right sentence, and all is well after.

Each is made while a visit computes; after it the same device measures again, and nothing of the old visit is left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from safetensors.numpy import save

from edgedeploy.backends import session_file
from edgedeploy.backends.fake import Options
from edgedeploy.errors import DeviceError, DeviceUnreachable, TransferError, VisitFailed
from edgedeploy.journal import SessionStep, history, journals
from edgedeploy.lab import bundle, health
from edgedeploy.lab.conversation import Agent
from edgedeploy.lab.visits import Measured, Schedule, Side, measure_block
from edgedeploy.records.session import BlockEnded
from edgedeploy.records.target import ConditionLimits
from edgedeploy.storage import sha256_file
from tests.testbed.board import wait_until
from tests.testbed.cache import TestbedError
from tests.testbed.vm import Vm

# Some 2 s on an idle machine; none of it measures anything but whether it can.
QUICK = Schedule(bursts_per_visit=2, samples_per_burst=30, lead_in=0, warm_up_cap_s=0.1, warm_up_window=2)
# A visit that computes until something happens to it.
ENDLESS = Schedule(bursts_per_visit=1, samples_per_burst=100_000, lead_in=0, warm_up_cap_s=0.1, warm_up_window=2)
OPTIONS = {**dataclasses.asdict(Options()), "duration_us": 5000.0}
# Starting an emulated interpreter is silent for long; what has once spoken sends a heartbeat every 2 s.
START_S, SILENCE_S = 60.0, 8.0
RECOVERY_S = 180.0


@dataclass
class Bench:
    """The machine, and a side of the fake back end to measure on it."""

    vm: Vm
    folder: Path
    files: dict[str, Path] = field(default_factory=dict)

    def side(self, **options: object) -> Side:
        """Give a side whose files are in `files`."""
        import numpy as np

        artifact, inputs = self.folder / "artifact.fake", self.folder / "inputs.safetensors"
        shape = ["batch", 4]
        artifact.write_text(
            json.dumps(
                {
                    "format": "edgedeploy.fake/1",
                    "inputs": {"x": ["float32", *shape]},
                    "outputs": {"y": ["float32", *shape]},
                    "options": OPTIONS,
                }
            )
        )
        inputs.write_bytes(save({"x": np.ones((1, 4), np.float32)}))
        files = {sha256_file(path): path for path in (artifact, inputs, session_file("fake"))}
        self.files |= files
        artifact_sha256, inputs_sha256, session_sha256 = files
        return Side("fake", artifact_sha256, session_sha256, options, inputs_sha256)

    @contextlib.contextmanager
    def agent(self, wait_s: float = 0.0, **changes: object) -> Iterator[tuple[Agent, object]]:
        """Connect, and send what a visit needs."""
        device = self.vm.device(**{"timeout_s": START_S, "connect_timeout_s": 20.0, **changes})
        with (
            self.vm.transport(**{"timeout_s": START_S, "connect_timeout_s": 20.0, **changes}) as transport,
            bundle.connect(transport, device, device_name="vm", wait_s=wait_s) as agent,
        ):
            self.side()
            bundle.ship(agent, transport, self.files)
            yield agent, transport

    def interrupted_by(self, fault: Callable[[], object], kind: type[DeviceError] = DeviceUnreachable) -> str:
        """Start a visit, make the fault while it computes, and return the sentence that its user sees."""
        with pytest.raises(kind) as caught, self.agent() as (agent, _):
            agent._silence_s = SILENCE_S
            computing = threading.Event()
            send = agent._channel.send_line

            def watched(line: bytes) -> None:
                send(line)
                if b'"do": "bursts"' in line:
                    computing.set()

            agent._channel.send_line = watched  # type: ignore[method-assign]
            failed: list[BaseException] = []
            is_over: list[bool] = []

            def act() -> None:
                computing.wait()
                try:
                    if not is_over:
                        fault()
                except BaseException as error:  # noqa: BLE001 - told to the test below
                    failed.append(error)

            acting = threading.Thread(target=act)
            acting.start()
            try:
                measure_block(agent, [self.side()], ENDLESS, block=0, seed=0)
            finally:
                is_over.append(True)
                computing.set()  # the visit may have failed before it computed
                acting.join(RECOVERY_S)
                assert not failed, failed
        return str(caught.value)

    def measure(self, wait_s: float = RECOVERY_S, **changes: object) -> Measured:
        """Measure a visit as if nothing had been."""
        with self.agent(wait_s, **changes) as (agent, _):
            return measured_on(agent, self.side())

    def is_well(self) -> None:
        """See that the device measures, and that no visit of before is still there."""
        wait_until(lambda: not self.visits(), timeout_s=RECOVERY_S, what=lambda: f"still there: {self.visits()}")
        assert not self.measure().visit.dropped

    def visits(self) -> str:
        """Return the processes of visits on the device."""
        return self.as_root("pgrep -f '[o]bjects/[0-9a-f]* visit' || true")

    def as_root(self, script: str) -> str:
        """Run a script there."""
        return self.vm.ssh("sh", "-c", script, user="root").strip()


def measured_on(agent: Agent, side: Side) -> Measured:
    (measured,) = measure_block(agent, [side], QUICK, block=0, seed=0)
    assert [len(burst.samples_s) for burst in measured.visit.bursts] == [30, 30]
    return measured


@pytest.fixture(scope="module")
def machine() -> Iterator[Vm]:
    """Give a machine of our own: what is done to it is nothing for others."""
    vm = Vm(user="pi")
    try:
        vm.start()
    except TestbedError as error:
        if os.environ.get("EDGEDEPLOY_TEST_LAB") == "require":
            raise
        pytest.skip(str(error))
    yield vm
    vm.stop()


@pytest.fixture
def bench(machine: Vm, tmp_path: Path) -> Bench:
    """Give the machine as its snapshot has it."""
    machine.qmp.monitor("loadvm ready")
    machine.wait_until_up()
    return Bench(machine, tmp_path)


@pytest.mark.parametrize("fault", ["power_cut", pytest.param("reboot", marks=pytest.mark.long)])
def test_power_cut_or_reboot_in_a_visit_is_told_and_the_device_is_free_as_soon_as_it_is_up(bench, fault):
    before = bench.vm.boot_id()
    told = bench.interrupted_by(getattr(bench.vm, fault))
    assert re.search("device 'vm'.*(the connection was lost|fell silent|went silent)", told), told
    bench.vm.wait_until_up()
    assert bench.vm.boot_id() != before
    bench.is_well()


@pytest.mark.parametrize(
    ("fault", "remedy"), [("unplug", "plug"), pytest.param("freeze", "thaw", marks=pytest.mark.long)]
)
def test_cable_or_processor_that_stops_in_a_visit_is_told_by_its_silence(bench, fault, remedy):
    told = bench.interrupted_by(getattr(bench.vm, fault))
    getattr(bench.vm, remedy)()
    assert re.search(r"fell silent during bursts in visit .*check its power and network", told), told
    bench.vm.wait_until_up()
    bench.is_well()


@pytest.mark.long
def test_session_of_sshd_that_is_killed_in_a_visit_is_told_and_leaves_no_orphan(bench):
    told = bench.interrupted_by(lambda: bench.as_root("pkill -KILL -f '[s]shd: pi@notty'"))
    assert re.search("the connection was lost .*, during bursts in visit", told), told
    bench.is_well()


def test_visit_that_eats_all_memory_is_killed_and_the_next_one_in_the_same_session_measures(bench):
    with bench.agent() as (agent, _):
        with pytest.raises(
            VisitFailed, match=r"killed by SIGKILL \(often the kernel's out-of-memory killer\)"
        ) as caught:
            measure_block(agent, [bench.side(leak_bytes=64 << 20)], ENDLESS, block=0, seed=0)
        assert caught.value.kind == "died"
        measured_on(agent, bench.side())
    assert "Killed process" in bench.as_root("dmesg")


@pytest.mark.long
def test_visit_that_outgrows_its_control_group_is_killed_and_the_device_goes_on(bench):
    bench.as_root(
        "cd /sys/fs/cgroup && echo +memory > cgroup.subtree_control && mkdir small && echo 67108864 > small/memory.max"
    )
    with bench.agent() as (agent, _):
        # The agent and all that it starts from now on.
        bench.as_root(
            "for one in $(pgrep -f '[o]bjects/[0-9a-f]* agent'); do echo $one > /sys/fs/cgroup/small/cgroup.procs; done"
        )
        with pytest.raises(VisitFailed, match="killed by SIGKILL"):
            measure_block(agent, [bench.side(leak_bytes=4 << 20)], ENDLESS, block=0, seed=0)
        assert int(re.search(r"oom_kill (\d+)", bench.as_root("cat /sys/fs/cgroup/small/memory.events"))[1]) >= 1
        measured_on(agent, bench.side())


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "says"), [("size=1m", r"full|free|room|space"), ("ro", r"read-only")], ids=["full", "read-only"]
)
def test_disk_that_takes_nothing_is_told_with_what_to_do(bench, options, says):
    bench.as_root(f"mkdir /home/pi/disk && mount -t tmpfs -o {options},mode=777 tmpfs /home/pi/disk")
    large = bench.folder / "large"
    large.write_bytes(os.urandom(2 << 20))
    with (
        pytest.raises((TransferError, DeviceError), match=says),
        bench.agent(root="/home/pi/disk/root") as (agent, way),
    ):
        bundle.ship(agent, way, {sha256_file(large): large})
    bench.is_well()  # in its usual place


@pytest.mark.long
def test_clock_that_is_wrong_is_told_and_its_jump_in_a_visit_changes_no_number(bench):
    bench.as_root("date -s '2001-01-01 00:00:00'")
    device = bench.vm.device(timeout_s=START_S)
    found = health.check("vm", device, ConditionLimits(max_foreign_load=1000.0))
    assert not found.lasting
    assert any("clock" in note for note in found.notes), found.notes
    with bench.agent() as (agent, _):
        jumped = threading.Thread(target=bench.as_root, args=("date -s '2031-01-01 00:00:00'",))
        jumped.start()
        (measured,) = measure_block(
            agent,
            [bench.side(duration_us=20_000.0)],
            Schedule(bursts_per_visit=3, samples_per_burst=50, lead_in=0, warm_up_cap_s=0.1, warm_up_window=2),
            block=0,
            seed=0,
        )
        jumped.join(RECOVERY_S)
        assert bench.as_root("date +%Y") == "2031"
        assert all(0.0 < sample_s < 60.0 for burst in measured.visit.bursts for sample_s in burst.samples_s)
        measured_on(agent, bench.side())  # the lease has outlived thirty years


@pytest.mark.long
def test_bad_link_is_slow_and_nothing_is_lost(bench):
    bench.as_root("/sbin/tc qdisc replace dev eth0 root netem delay 100ms 20ms loss 3%")
    assert "netem" in bench.as_root("/sbin/tc qdisc show dev eth0")
    assert not bench.measure().visit.dropped


# --- a whole run

TARGET = """\
format = "edgedeploy.target/1"
name = "fake-board"
description = "a board that exists only in tests"

[backends.fake]
precisions = ["fp32"]

[conditions]
max_foreign_load = 1000.0
"""
CELL = """
[[cells]]
name = "{name}"
model = "tiny"
target = "fake-board"
backend = "fake"
precision = "fp32"
device = "vm"
options = {{ duration_us = {duration_us} }}
"""
RELEASE = f"""\
format = "edgedeploy.release/1"
name = "tiny"
[models.tiny]
source = "tiny.onnx"
{CELL.format(name="shipped", duration_us=4000.0)}
{CELL.format(name="candidate", duration_us=1000.0)}
[gate]
baseline = "shipped"
min_blocks = 2
max_blocks = 2
[gate.margins]
latency_p50 = "+20%"
"""


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a folder with a release file, its model and its target."""
    onnx = pytest.importorskip("onnx", reason="compiling needs onnx: pip install 'edgedeploy[onnxruntime]'")
    monkeypatch.setenv("EDGEDEPLOY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("EDGEDEPLOY_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    helper, shape = onnx.helper, ["batch", 4]
    graph = helper.make_graph(
        [helper.make_node("Relu", ["image"], ["scores"], name="relu")],
        "tiny",
        [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "tiny.onnx")
    (tmp_path / "targets").mkdir()
    (tmp_path / "targets/fake-board.toml").write_text(TARGET)
    (tmp_path / "edgedeploy.toml").write_text(RELEASE)
    return tmp_path


@pytest.mark.long
def test_run_whose_host_is_killed_and_whose_device_loses_power_goes_on_and_measures_nothing_twice(bench, release):
    entry = bench.vm.entry(timeout_s=START_S, connect_timeout_s=20.0)
    (release / "lab.toml").write_text('format = "edgedeploy.lab/1"\n' + entry)
    command = [sys.executable, "-m", "edgedeploy", "run", "edgedeploy.toml", "--lab", "lab.toml"]
    log = release / "first.log"
    with log.open("wb") as stream:
        host = subprocess.Popen(command, cwd=release, stdout=stream, stderr=stream)
    try:
        wait_until(
            lambda: "block 2 of at most 2" in log.read_text() or host.poll() is not None,
            timeout_s=400.0,
            what=log.read_text,
        )
        assert host.poll() is None, log.read_text()
    finally:
        host.send_signal(signal.SIGKILL)
        host.wait()
    bench.vm.power_cut()
    bench.vm.wait_until_up()
    done = subprocess.run(
        [*command[:4], "--resume"], cwd=release, capture_output=True, text=True, timeout=500, check=False
    )
    # 4: an emulated processor is too noisy to decide on; never 3.
    assert done.returncode in (0, 4), done.stderr
    (journal,) = journals()
    blocks = [
        line.did.block for line in journal.lines() if isinstance(line, SessionStep) and isinstance(line.did, BlockEnded)
    ]
    assert sorted(blocks) == [0, 1]
    found = history(journal)
    assert found.is_over
    assert set(found.stored) == {"candidate"}
    runs = [json.loads(Path(file).read_text()) for file in found.stored["candidate"].files]
    for run in runs:
        assert [visit["block"] for visit in run["visits"]] == [0, 1]
        assert any("boot" in event or "again" in event or "continued" in event for event in run["events"]), run[
            "events"
        ]
