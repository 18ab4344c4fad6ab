"""What a device is set to while it is held: governor, power mode, clocks, cores, and waiting until it is cool."""

from __future__ import annotations

import builtins
import json
import os
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from edgedeploy import pipeline
from edgedeploy.backends import fake
from edgedeploy.lab import visits
from edgedeploy.lab.bundle import connect, ship
from edgedeploy.lab.conversation import Agent
from edgedeploy.lab.transport import LocalTransport
from edgedeploy.ondevice import runner
from edgedeploy.ondevice.runner import Refusal
from edgedeploy.records.device import Device, DeviceSettings
from edgedeploy.records.target import ConditionLimits
from edgedeploy.storage import sha256_file

from .device_trees import tree

POLICIES = ("sys/devices/system/cpu/cpufreq/policy0", "sys/devices/system/cpu/cpufreq/policy4")
ZONE = "sys/class/thermal/thermal_zone0"

NVPMODEL = """\
#!/bin/sh
# Modes 0 to 3 are chosen at once; 4 wants a reboot, which it asks for.
state={root}/mode
case "$1" in
  -q) echo "NV Power Mode: MODE_$(cat $state)"; cat $state;;
  -m) echo "$@" >> {root}/calls
      if [ "$2" = 9 ]; then echo "NVPM ERROR: no such mode" >&2; exit 255; fi
      if [ "$2" = 4 ]; then read answer; [ "$answer" = YES ] || exit 0; fi
      echo "$2" > $state;;
esac
"""
JETSON_CLOCKS = """\
#!/bin/sh
min={root}/{policy}/scaling_min_freq
case "$1" in
  --store) [ -e "$2" ] && exit 1; cat $min > "$2";;
  --restore) cat "$2" > $min;;
  "") cat {root}/{policy}/scaling_max_freq > $min;;
esac
echo "clocks $1" >> {root}/calls
"""


class Jetson:
    """A folder that looks like a board with nvpmodel and jetson_clocks."""

    def __init__(self, folder: Path) -> None:
        files = {f"{policy}/scaling_governor": "schedutil\n" for policy in POLICIES}
        files |= {f"{policy}/scaling_available_governors": "schedutil performance\n" for policy in POLICIES}
        files |= {f"{ZONE}/temp": "45000\n", f"{ZONE}/type": "cpu-thermal\n", "mode": "2\n", "calls": ""}
        files |= {f"sys/devices/system/cpu/cpu0/cpufreq/scaling_{name}_freq": f"{value}\n"
                  for name, value in (("min", 115200), ("max", 1510400))}  # fmt: skip
        self.folder, self.root = folder, tree(folder, files)
        self.tool("nvpmodel", NVPMODEL)
        self.tool("jetson_clocks", JETSON_CLOCKS)

    def tool(self, name: str, text: str) -> None:
        path = self.folder / "usr/sbin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.format(root=self.root, policy="sys/devices/system/cpu/cpu0/cpufreq"))
        path.chmod(0o755)

    def text(self, name: str) -> str:
        return (self.folder / name).read_text().strip()

    @property
    def state(self) -> tuple[str, ...]:
        clock = self.text("sys/devices/system/cpu/cpu0/cpufreq/scaling_min_freq")
        return (*(self.text(f"{policy}/scaling_governor") for policy in POLICIES), self.text("mode"), clock)


AS_IT_WAS = ("schedutil", "schedutil", "2", "115200")


@pytest.fixture
def jetson(tmp_path) -> Jetson:
    return Jetson(tmp_path / "board")


@pytest.fixture
def kept(tmp_path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


def settings_of(jetson: Jetson, kept: Path) -> runner.Settings:
    return runner.Settings(str(kept), jetson.root, runner.find_tools(jetson.root))


# ------------------------------------------------------------------------------------------------ set and undone


def test_everything_is_set_and_undone(jetson, kept):
    said = settings_of(jetson, kept).apply({"governor": "performance", "power_mode": 0, "fixed_clocks": True})
    assert said == {
        "applied": {"governor": "performance", "power_mode": "MODE_0 (0)", "fixed_clocks": "fixed"},
        "refused": {},
    }
    assert jetson.state == ("performance", "performance", "0", "1510400")
    assert runner.restore_settings(str(kept), jetson.root) == []
    assert jetson.state == AS_IT_WAS
    assert not (kept / "restore.json").exists()
    assert runner.restore_settings(str(kept), jetson.root) == []


def test_what_was_there_is_on_the_disk_before_anything_is_set(jetson, kept, monkeypatch):
    seen = []

    def look(path, value, sudo, sysroot="/"):
        seen.append(json.loads((kept / "restore.json").read_text())["entries"])
        raise Refusal("not-permitted", "no")

    monkeypatch.setattr(runner, "write_value", look)
    with pytest.raises(Refusal):
        settings_of(jetson, kept).set_governor("performance", sudo=False)
    assert [entry["was"] for entry in seen[0]] == ["schedutil", "schedutil"]


def test_what_is_set_already_is_left_alone(jetson, kept):
    said = settings_of(jetson, kept).apply({"governor": "schedutil", "power_mode": 2})
    assert said["applied"] == {"governor": "schedutil", "power_mode": "MODE_2 (2)"}
    assert not (kept / "restore.json").exists()
    assert jetson.text("calls") == ""


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        ({"governor": "turbo"}, "no governor 'turbo'; it has: schedutil, performance"),
        ({"power_mode": 9}, "`.*nvpmodel -m 9` failed: NVPM ERROR: no such mode"),
        ({"power_mode": 4}, r"says 'MODE_2 \(2\)' after mode 4 was chosen; a mode that needs a reboot"),
        ({"cpu_affinity": "4000"}, r"core 4000 is not among those that user .* may use \("),
        ({"cpu_affinity": "2-"}, "'2-' are no cores"),
    ],
)
def test_what_cannot_be_set_is_refused_with_a_sentence_and_nothing_changes(jetson, kept, wanted, text):
    said = settings_of(jetson, kept).apply(wanted)
    assert said["applied"] == {}
    (name,) = wanted
    assert re.search(text, said["refused"][name])
    runner.restore_settings(str(kept), jetson.root)
    assert jetson.state == AS_IT_WAS


@pytest.mark.parametrize(("name", "value"), [("governor", "performance"), ("power_mode", 0), ("fixed_clocks", True)])
def test_board_that_has_no_such_thing_says_so(tmp_path, kept, name, value):
    bare = tmp_path / "bare"
    bare.mkdir()
    said = runner.Settings(str(kept), str(bare), runner.find_tools(str(bare))).apply({name: value})
    assert f"leave {name} out of lab.toml" in said["refused"][name]


def test_policies_are_all_set_or_none(jetson, kept, monkeypatch):
    write = runner.write_value

    def refuse_the_second(path, value, sudo, sysroot="/"):
        if "policy4" in path:
            raise Refusal("not-permitted", "no")
        write(path, value, sudo, sysroot)

    monkeypatch.setattr(runner, "write_value", refuse_the_second)
    assert "governor" in settings_of(jetson, kept).apply({"governor": "performance"})["refused"]
    assert jetson.state == AS_IT_WAS


class PlainUser:
    """What an ordinary user may not do, as root plays it: /sys is closed, and sudo is in the board's folder."""

    def __init__(self, jetson: Jetson, monkeypatch) -> None:
        monkeypatch.setattr(runner.os, "geteuid", lambda: 1000)
        monkeypatch.setenv("USER", "ada")

        def closed(path, mode="r", **options):
            if "scaling_governor" in str(path) and "w" in mode:
                raise PermissionError(13, "Permission denied", path)
            return builtins.open(path, mode, **options)  # noqa: PTH123 - it stands for this very function

        monkeypatch.setattr(runner, "open", closed, raising=False)
        self.jetson = jetson

    def may_sudo(self, sudo: str) -> None:
        (self.jetson.folder / "usr/bin").mkdir(parents=True)
        path = self.jetson.folder / "usr/bin/sudo"
        path.write_text(
            f'#!/bin/sh\n[ "$1" = -n ] || exit 9\nshift\necho "sudo $*" >> {self.jetson.root}/calls\n{sudo}\n'
        )
        path.chmod(0o755)


def test_user_who_may_not_is_told_what_would_allow_it(jetson, kept, monkeypatch):
    PlainUser(jetson, monkeypatch)
    said = settings_of(jetson, kept).apply({"governor": "performance"})
    for part in ("may not be written by user ada", "sudo = true", f"tee {jetson.root}/{POLICIES[0]}/scaling_governor"):
        assert part in said["refused"]["governor"]


def test_user_whose_sudo_asks_for_a_password_is_told_what_would_allow_it(jetson, kept, monkeypatch):
    PlainUser(jetson, monkeypatch).may_sudo("echo 'sudo: a password is required' >&2; exit 1")
    said = settings_of(jetson, kept).apply({"governor": "performance", "sudo": True})
    for part in ("sudo: a password is required", "without a password"):
        assert part in said["refused"]["governor"]


def test_sudo_sets_and_undoes_where_it_is_asked_for(jetson, kept, monkeypatch):
    PlainUser(jetson, monkeypatch).may_sudo('exec "$@"')
    said = settings_of(jetson, kept).apply({"governor": "performance", "power_mode": 1, "sudo": True})
    assert said["refused"] == {}
    assert jetson.state[:3] == ("performance", "performance", "1")
    assert runner.restore_settings(str(kept), jetson.root) == []
    assert jetson.state == AS_IT_WAS
    assert jetson.text("calls").count("sudo tee") == 4
    assert jetson.text("calls").count("nvpmodel -m") == 2


def test_what_cannot_be_undone_stays_written_down_for_the_next_agent(jetson, kept):
    settings_of(jetson, kept).apply({"governor": "performance", "power_mode": 0})
    jetson.tool("nvpmodel", NVPMODEL.replace("  -m)", "  -m) exit 3;;\n  -x)"))
    (problem,) = runner.restore_settings(str(kept), jetson.root)
    assert "power_mode could not be restored" in problem
    assert jetson.state == ("schedutil", "schedutil", "0", "115200")
    jetson.tool("nvpmodel", NVPMODEL)
    assert runner.restore_settings(str(kept), jetson.root, is_leftover=True) == []
    assert jetson.state == AS_IT_WAS


def test_after_a_reboot_only_what_outlives_it_is_undone(jetson, kept):
    settings_of(jetson, kept).apply({"governor": "performance", "power_mode": 0, "fixed_clocks": True})
    document = json.loads((kept / "restore.json").read_text())
    (kept / "restore.json").write_text(json.dumps({**document, "boot_id": "an earlier one"}))
    assert runner.restore_settings(str(kept), jetson.root, is_leftover=True) == []
    assert jetson.state == ("performance", "performance", "2", "1510400")


def test_torn_notes_are_kept_aside_and_told(jetson, kept):
    (kept / "restore.json").write_text('{"entries": [')
    (problem,) = runner.restore_settings(str(kept), jetson.root)
    assert "cannot be read" in problem
    assert (kept / "restore.json.bad").exists()


# ------------------------------------------------------------------------------------------------ measuring with them

SESSION = Path(fake.__file__).with_name("session.py")
QUICK = visits.Schedule(bursts_per_visit=2, samples_per_burst=2, warm_up_window=2, warm_up_tolerance=1e9)


class Bench:
    """A board on this machine that a block can be measured on."""

    def __init__(self, folder: Path, jetson: Jetson) -> None:
        self.folder, self.jetson, self.said = folder, jetson, []
        options = {name: field.default for name, field in fake.Options.__dataclass_fields__.items()}
        artifact = {"format": "edgedeploy.fake/1", "model_sha256": "", "inputs": {"x": ["float32", "batch", 4]},
                    "outputs": {"y": ["float32", "batch", 3]}, "operators": {}, "options": options}  # fmt: skip
        (folder / "artifact").write_text(json.dumps(artifact))
        save_file({"x": np.zeros((2, 4), np.float32)}, folder / "inputs")
        self.files = {sha256_file(path): path for path in (folder / "artifact", SESSION, folder / "inputs")}
        self.side = visits.Side("dense", *list(self.files)[:2], {}, list(self.files)[2])

    def connect(self, **settings):
        class Board(LocalTransport):
            def open_channel(board, argv):
                return super().open_channel([*argv, "--sysroot", self.jetson.root])

        self.transport = Board("bench")
        lease_dir = str(self.folder / "lease")
        device = Device(
            transport="local", root=str(self.folder / "root"), lease_dir=lease_dir, settings=DeviceSettings(**settings)
        )
        return connect(self.transport, device, device_name="bench", progress=self.said.append)

    def measure(self, agent: Agent) -> visits.Measured:
        ship(agent, self.transport, self.files)
        (measured,) = visits.measure_block(agent, [self.side], QUICK, block=0, seed=0)
        return measured


@pytest.fixture
def bench(tmp_path, jetson) -> Bench:
    return Bench(tmp_path, jetson)


def test_session_sets_the_device_and_leaves_it_as_it_was(bench, jetson):
    core = min(os.sched_getaffinity(0))
    with bench.connect(governor="performance", power_mode=0, cpu_affinity=str(core)) as agent:
        assert agent.settings_applied == {
            "governor": "performance",
            "power_mode": "MODE_0 (0)",
            "cpu_affinity": str(core),
        }
        assert jetson.state[:3] == ("performance", "performance", "0")
        ship(agent, bench.transport, bench.files)
        job = visits._job(bench.side, QUICK)
        agent.ask("open", visit="v", job=job, timeout_s=20)
        (visit,) = [
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and b"\0visit\0--root\0%s" % str(bench.folder).encode() in cmdline(entry)
        ]
        assert os.sched_getaffinity(visit) == {core}
        assert os.sched_getaffinity(os.getpid()) != {core} or os.cpu_count() == 1
    assert jetson.state == AS_IT_WAS


def cmdline(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def test_what_was_refused_is_told_and_recorded(bench):
    with bench.connect(governor="turbo") as agent:
        assert agent.settings_applied == {}
        assert "no governor 'turbo'" in agent.settings_refused["governor"]
    assert any(said.startswith("bench: governor stays as it is: there is no governor 'turbo'") for said in bench.said)


def test_block_waits_until_the_device_is_cool(bench, jetson):
    zone = jetson.folder / ZONE / "temp"
    zone.write_text("70000\n")

    def cool_down() -> None:
        while not bench.said:
            time.sleep(0.01)
        zone.write_text("49000\n")

    cooling = threading.Thread(target=cool_down)
    cooling.start()
    with bench.connect(start_below_celsius=50.0, cooling_cap_s=30.0) as agent:
        visit = bench.measure(agent).visit
    cooling.join()
    assert visit.is_cool is True
    assert 0 < visit.cooled_s < 30
    assert visit.before.temperatures_celsius == {"cpu-thermal": 49.0}
    assert bench.said == ["bench: waiting for the device to cool from 70.0 to 50 degrees Celsius"]


def test_device_that_stays_hot_is_measured_at_the_cap_and_the_visit_says_so(bench, jetson):
    (jetson.folder / ZONE / "temp").write_text("70000\n")
    with bench.connect(start_below_celsius=50.0, cooling_cap_s=0.1) as agent:
        visit = bench.measure(agent).visit
    assert (visit.is_cool, visit.cooled_s >= 0.1) == (False, True)


def test_device_without_a_thermal_zone_is_not_waited_for(bench, jetson):
    (jetson.folder / ZONE / "temp").unlink()
    with bench.connect(start_below_celsius=50.0) as agent:
        visit = bench.measure(agent).visit
    assert visit.is_cool is None
    assert visit.cooled_s < 5


THROTTLED = {
    "a Raspberry Pi that is under-voltage": {"sys/devices/platform/soc/soc:firmware/get_throttled": "50005\n"},
    "a Jetson whose firmware holds its clocks": {"sys/class/thermal/cooling_device0/type": "cpu-throttle-alert\n",
                                                 "sys/class/thermal/cooling_device0/cur_state": "1\n"},
    "a board that is too hot": {f"{ZONE}/temp": "99000\n"},
}  # fmt: skip


@pytest.mark.parametrize("files", THROTTLED.values(), ids=THROTTLED)
def test_visit_on_a_device_that_is_held_down_does_not_count(bench, jetson, files):
    with bench.connect() as agent:
        ship(agent, bench.transport, bench.files)
        well = visits.mark(bench.measure(agent).visit, ConditionLimits(max_foreign_load=1e9))
        tree(jetson.folder, files)
        held_down = visits.mark(bench.measure(agent).visit, ConditionLimits(max_foreign_load=1e9))
    assert well.dropped == ""
    assert "throttled" in held_down.dropped or "hotter than" in held_down.dropped


def test_run_says_what_was_set_and_what_was_not(place, compiled):
    core = min(os.sched_getaffinity(0))
    (place / "lab.toml").write_text(
        'format = "edgedeploy.lab/1"\n[devices.bench]\ntransport = "local"\n'
        f'[devices.bench.settings]\ngovernor = "no-such-governor"\ncpu_affinity = "{core}"\nstart_below_celsius = 900.0\n'
    )
    said = []
    run, _ = pipeline.bench(
        compiled("tiny", duration_us=20), device="bench", lab="lab.toml", visits=1, progress=said.append
    )
    assert run.settings_applied == {"cpu_affinity": str(core)}
    assert "governor" in run.settings_refused["governor"]
    assert run.visits[0].cooled_s is not None
    assert any("bench: governor stays as it is" in text for text in said)
