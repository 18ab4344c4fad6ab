"""The devices are what they claim to be, and nothing of them stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edgedeploy.lab.bundle import RUNNER
from edgedeploy.lab.inventory import load_lab
from tests.testbed.board import Board, all_started, is_taken, wait_until
from tests.testbed.cache import TestbedError, cache
from tests.testbed.hybrid import Hybrid
from tests.testbed.kept import offspring, state_of
from tests.testbed.plain import Plain
from tests.testbed.vm import Vm

ROOT = Path(__file__).parent.parent.parent
OWNER = """
import sys, time
from tests.testbed.hybrid import Hybrid
from tests.testbed.plain import Plain
from tests.testbed.vm import Vm
boards = [Plain(), Hybrid(), Vm()]
for board in boards:
    board.start()
    print(board.port, flush=True)
print("ready", flush=True)
time.sleep(600)
"""


def facts(board: Board) -> dict[str, Any]:
    """What the runner says the device is."""
    said = board.ssh(board.python, "-", "facts", stdin=RUNNER.read_bytes())
    found: dict[str, Any] = json.loads(said.strip().splitlines()[-1])
    return found


def test_hybrid_is_an_arm_board_to_our_runner(hybrid: Hybrid) -> None:
    found = facts(hybrid)
    assert found["machine"] == "aarch64"
    assert found["cpu_model"] == "Raspberry Pi 4 Model B Rev 1.4 (Cortex-A72)"
    assert found["cores"] == 4
    assert "asimd" in found["isa"]
    assert "Debian" in str(found["os_name"])
    assert found["hostname"] == "pi4"


def test_orin_is_told_from_a_pi(orin: Hybrid) -> None:
    found = facts(orin)
    assert "Orin Nano" in str(found["cpu_model"])
    assert found["l4t"] == "36.4.3"
    assert found["cores"] == 6
    assert "asimddp" in found["isa"]


def test_hybrid_shows_only_its_own_processes_and_lets_only_root_change_settings(hybrid: Hybrid) -> None:
    assert hybrid.ssh("id", "-un").strip() == "pi"
    assert hybrid.ssh("id", "-un", user="root").strip() == "root"
    assert 1 <= hybrid.ssh("ps", "-e").count("sshd") <= 4
    governor = "/sys/devices/system/cpu/cpufreq/policy0/scaling_governor"
    with pytest.raises(TestbedError, match="Permission denied"):
        hybrid.ssh("tee", governor, stdin=b"performance\n")
    hybrid.ssh("tee", governor, stdin=b"performance\n", user="root")
    assert hybrid.identity.governors() == ["performance"]
    hybrid.ssh("tee", governor, stdin=b"ondemand\n", user="root")


def test_hybrid_gets_hot_and_throttled_when_a_test_wants_it(hybrid: Hybrid) -> None:
    hybrid.identity.heat(85.5)
    hybrid.identity.throttle(0x50005)
    assert hybrid.ssh("vcgencmd", "measure_temp").strip() == "temp=85.5'C"
    assert hybrid.ssh("vcgencmd", "get_throttled").strip() == "throttled=0x50005"
    hybrid.identity.heat(48.7)
    hybrid.identity.throttle(0)
    assert hybrid.ssh("vcgencmd", "get_throttled").strip() == "throttled=0x0"


def test_orin_changes_power_mode_and_clocks(orin: Hybrid) -> None:
    assert orin.ssh("nvpmodel", "-q") == "NV Power Mode: 15W\n0\n"
    orin.ssh("nvpmodel", "-m", "2")
    assert orin.ssh("nvpmodel", "-q") == "NV Power Mode: MAXN_SUPER\n2\n"
    orin.ssh("nvpmodel", "-m", "0")
    before = orin.ssh("jetson_clocks", "--show")
    orin.ssh("jetson_clocks", "--store", "/root/clocks")
    orin.ssh("jetson_clocks")
    assert "MinFreq=1510400 MaxFreq=1510400" in orin.ssh("jetson_clocks", "--show")
    orin.ssh("jetson_clocks", "--restore", "/root/clocks")
    assert [line.split("CurrentFreq")[0] for line in orin.ssh("jetson_clocks", "--show").splitlines()] == [
        line.split("CurrentFreq")[0] for line in before.splitlines()
    ]
    line = orin.ssh("sh", "-c", "tegrastats --interval 50 | head -n 1")
    assert "GR3D_FREQ" in line
    assert "tj@51.25C" in line


def test_hybrid_that_was_cut_lets_people_in_again(hybrid: Hybrid) -> None:
    before = hybrid.ssh("cat", "/proc/sys/kernel/random/boot_id")
    with hybrid.transport() as transport:
        assert transport.run(["uname", "-m"], timeout_s=30).stdout == b"aarch64\n"
        hybrid.cut()
        wait_until(lambda: not hybrid.own_sessions(), timeout_s=10, what=lambda: "sessions live")
    assert hybrid.ssh("cat", "/proc/sys/kernel/random/boot_id") == before


def test_small_disk_of_a_hybrid_device_is_full_soon() -> None:
    with Hybrid(disk_bytes=8 << 20) as board, pytest.raises(TestbedError, match="No space left"):
        board.ssh("dd", "if=/dev/zero", "of=large", "bs=1M", "count=20")


def test_payload_is_seen_on_both_kinds(tmp_path: Path) -> None:
    payload = tmp_path / "payload"
    payload.mkdir()
    (payload / "word").write_text("carried\n")
    with Hybrid(payload=payload) as board:
        assert board.ssh("cat", "/opt/edge/word") == "carried\n"
    with Vm(payload=payload) as board:
        assert board.ssh("cat", "/opt/edge/word") == "carried\n"


def test_virtual_machine_has_a_kernel_a_clock_and_a_memory_of_its_own(vm: Vm) -> None:
    machine, release, boot_id, clock_s, memory = vm.ssh(
        "sh",
        "-c",
        "uname -m; uname -r; cat /proc/sys/kernel/random/boot_id; date +%s; grep MemTotal /proc/meminfo",
    ).splitlines()
    assert machine == "aarch64"
    assert release != os.uname().release
    assert boot_id != Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert abs(float(clock_s) - time.time()) < 60
    assert 900 << 10 < int(memory.split()[1]) <= 1 << 20


def test_virtual_machine_survives_freezing_and_a_pulled_cable(vm: Vm) -> None:
    for end, begin in ((vm.freeze, vm.thaw), (vm.unplug, vm.plug)):
        end()
        with pytest.raises((TestbedError, subprocess.TimeoutExpired)):
            vm.ssh("true", timeout_s=2)
        begin()
        assert vm.ssh("echo", "back").strip() == "back"


def test_virtual_machine_looks_like_a_board_until_a_power_cut_which_loses_what_was_not_synced(vm: Vm) -> None:
    before = vm.boot_id()
    vm.identify("pi4").heat(81.0)
    vm.throttle()
    said = vm.ssh("sh", "-c", "vcgencmd measure_temp; vcgencmd get_throttled; /sbin/tc qdisc show dev eth0")
    assert said.splitlines()[:2] == ["temp=81.0'C", "throttled=0x50005"]
    link = "/sbin/tc qdisc replace dev eth0 root netem delay 20ms && /sbin/tc qdisc show dev eth0"
    assert "netem" in vm.ssh("sh", "-c", f"{link}; echo kept > kept; sync; echo lost > lost", user="root")
    vm.power_cut()
    vm.wait_until_up()
    said = vm.ssh("sh", "-c", "cat kept; ls lost; ls /sys/class/thermal; /sbin/tc qdisc show dev eth0", user="root")
    assert said.splitlines()[0] == "kept"
    assert "netem" not in said
    assert "lost" not in said
    assert "thermal_zone" not in said
    assert vm.boot_id() != before


def test_sixteen_plain_devices_run_at_once(tmp_path: Path) -> None:
    boards = [Plain(tmp_path / f"board{number}", name=f"board{number}") for number in range(16)]
    with all_started(boards):
        assert len({board.port for board in boards}) == 16
        assert len({(board.root, board.lease_dir) for board in boards}) == 16
        assert [board.ssh("echo", board.name).strip() for board in boards[::5]] == [
            "board0",
            "board5",
            "board10",
            "board15",
        ]
    assert not any(is_taken(board.port) for board in boards)


def test_entries_make_a_lab_file(tmp_path: Path, hybrid: Hybrid, vm: Vm, plain: Plain) -> None:
    path = tmp_path / "lab.toml"
    boards: list[Board] = [hybrid, vm, plain]
    path.write_text('format = "edgedeploy.lab/1"\n\n' + "\n".join(board.entry(target="any") for board in boards))
    devices = load_lab(path).devices
    for board in boards:
        assert devices[board.name] == board.device(target="any")


def test_nothing_stays_when_devices_stop() -> None:
    mounts = Path("/proc/self/mountinfo").read_text()
    others = set(offspring(os.getpid()))
    with Hybrid() as board, Vm() as machine:
        ports = [board.port, machine.port]
        folders = [board.known_hosts.parent, machine.known_hosts.parent]
        board.ssh("sh", "-c", "sleep 300 </dev/null >/dev/null 2>&1 &")
        processes = set(offspring(os.getpid())) - others
    assert len(processes) >= 5
    assert [process for process in processes if state_of(process) not in {"", "Z", "X"}] == []
    _expect_nothing(ports, folders, mounts)


def test_nothing_stays_when_the_owner_is_killed() -> None:
    mounts = Path("/proc/self/mountinfo").read_text()
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, cwd=ROOT, text=True) as owner:
        assert owner.stdout is not None
        *ports, ready = (owner.stdout.readline().strip() for _ in range(4))
        assert ready == "ready"
        processes = offspring(owner.pid)
        owner.send_signal(signal.SIGKILL)
    assert len(processes) >= 6
    wait_until(
        lambda: all(state_of(process) in {"", "Z", "X"} for process in processes),
        timeout_s=20,
        what=lambda: f"of {processes} some live",
    )
    _expect_nothing([int(port) for port in ports], [], mounts)
    # Its folders are deleted by the next device that starts.
    with Plain():
        assert len(list((cache() / "run").glob("vm-*"))) <= 1


def _expect_nothing(ports: list[int], folders: list[Path], mounts: str) -> None:
    assert [port for port in ports if is_taken(port)] == []
    assert [folder for folder in folders if folder.exists()] == []
    assert Path("/proc/self/mountinfo").read_text() == mounts
    assert not Path("/proc/sys/fs/binfmt_misc/edge-aarch64").exists()
