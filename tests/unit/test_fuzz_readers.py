"""Whatever lies under /proc, /sys, /etc and /usr of a device: its readers never raise, never wait, never send too much."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgedeploy.lab import answers
from edgedeploy.ondevice import runner
from edgedeploy.records.device import DeviceFacts
from edgedeploy.records.run import Conditions

# Every file that a reader opens, with a text that it understands.
PATHS = {
    "proc/cpuinfo": "processor : 0\nCPU implementer : 0x41\nCPU part : 0xd08\nFeatures : fp asimd\nModel : Pi\n",
    "proc/meminfo": "MemTotal: 100 kB\nMemAvailable: 50 kB\n",
    "proc/loadavg": "0.5 0.5 0.5 1/4 5\n",
    "proc/stat": "cpu 1 2 3 4 5 6 7 8\n",
    "proc/7/stat": "7 (x) S" + " 1" * 40,
    "proc/sys/kernel/hostname": "pi\n",
    "proc/sys/kernel/osrelease": "6.1\n",
    "proc/sys/kernel/random/boot_id": "b\n",
    "proc/device-tree/compatible": "nvidia,tegra234\0",
    "proc/device-tree/model": "Orin\0",
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu\n",
    "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: RTX\n",
    "etc/os-release": 'PRETTY_NAME="Debian"\n',
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID\n",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=2 NAME=MODE_30W >\n",
    "var/lib/nvpmodel/status": "pmode:0002\n",
    "var/lib/dpkg/status": "Package: nvidia-jetpack\nStatus: install ok installed\nVersion: 6.2\n\n",
    "usr/local/cuda/version.json": '{"cuda": {"version": "12.6"}}',
    "usr/local/cuda/version.txt": "CUDA Version 10.2\n",
    "usr/lib/aarch64-linux-gnu/libnvinfer.so.10.3.0": "",
    "usr/lib/python3.10/dist-packages/tensorrt/__init__.py": '__version__ = "10.3"\n',
    "usr/lib/python3.10/dist-packages/tensorrt/tensorrt.so": "",
    "usr/lib/python3.10/dist-packages/tensorrt-10.3.dist-info/WHEEL": "Tag: cp310-none\n",
    "sys/firmware/devicetree/base/model": "Pi 4\0",
    "sys/class/thermal/thermal_zone0/temp": "48000\n",
    "sys/class/thermal/thermal_zone0/type": "cpu\n",
    "sys/class/thermal/cooling_device0/type": "cpu-throttle-alert\n",
    "sys/class/thermal/cooling_device0/cur_state": "1\n",
    "sys/class/hwmon/hwmon0/name": "ina3221\n",
    "sys/class/hwmon/hwmon0/in1_label": "VDD\n",
    "sys/class/hwmon/hwmon0/in1_input": "5000\n",
    "sys/class/hwmon/hwmon0/curr1_input": "100\n",
    "sys/class/hwmon/hwmon0/power1_input": "100\n",
    "sys/class/hwmon/hwmon0/oc1_event_cnt": "3\n",
    "sys/class/hwmon/hwmon0/oc1_throt_en": "1\n",
    "sys/class/hwmon/hwmon1/name": "pwmfan\n",
    "sys/class/hwmon/hwmon1/pwm1": "120\n",
    "sys/class/hwmon/hwmon1/rpm": "1200\n",
    "sys/class/devfreq/17000000.gpu/cur_freq": "300000000\n",
    "sys/class/devfreq/bwmgr/cur_freq": "300000000\n",
    "sys/kernel/debug/bpmp/debug/clk/emc/rate": "1\n",
    "sys/bus/i2c/drivers/ina3221x/1-40/iio:device0/rail_name_0": "VDD\n",
    "sys/bus/i2c/drivers/ina3221x/1-40/iio:device0/in_power0_input": "100\n",
    "sys/devices/platform/soc/soc:firmware/get_throttled": "50005\n",
    "sys/devices/system/cpu/cpu0/cpu_capacity": "1024\n",
    **{
        f"sys/devices/system/cpu/{core}/cpufreq/{name}": "1500000\n"
        for core in ("cpu0", "cpu1x", "cpu3")
        for name in ("scaling_cur_freq", "scaling_min_freq", "scaling_max_freq", "cpuinfo_max_freq")
    },
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
}


def place(path: Path, kind: str, data: bytes) -> None:
    with suppress(NotADirectoryError, FileExistsError):  # another one's hostile parent stands in the way
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "loop":
            path.symlink_to(path.name)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "socket":
            with suppress(OSError), socket.socket(socket.AF_UNIX) as listener:  # a path may be too long for one
                listener.bind(str(path))
        elif kind == "endless":
            path.write_bytes(data)
            os.truncate(path, 1 << 40)
        else:
            path.write_bytes(data)
            path.chmod(0 if kind == "unreadable" else 0o600)


contents = st.one_of(
    st.binary(max_size=80),
    st.sampled_from(
        [b"9" * 5000, b"-" + b"9" * 400, "²".encode(), b"1e999", b"nan", b"0x" + b"f" * 9000, b"\0\0\0", b"[" * 90_000,
         b"{" * 90_000, b'{"cuda": {"version": ' + b"9" * 5000 + b"}}", b": : :\n" * 5000, b"\n\n" * 30_000,
         b"Kernel Module 1 " * 60_000, b"pmode: " * 9000, b"Package: libnvinfer8\n" * 9000, b"\xed\xa0\x80"]
    ),
)  # fmt: skip
KINDS = ("bytes", "bytes", "bytes", "understood", "pipe", "folder", "loop", "device", "socket", "endless", "unreadable")
hostile_trees = st.dictionaries(
    st.sampled_from(sorted(PATHS)), st.tuples(st.sampled_from(KINDS), contents), min_size=1, max_size=25
)


def made(folder: str, tree: dict[str, tuple[str, bytes]]) -> str:
    for path, text in PATHS.items():
        kind, data = tree.get(path, ("understood", b""))
        place(Path(folder) / path, kind, text.encode() if kind == "understood" else data)
    return folder


def readings(root: str) -> tuple[DeviceFacts, Conditions]:
    """Read everything, and let the host take it as it takes what comes over the wire."""
    facts, now = runner.read_facts(root), runner.read_conditions(root)
    for said in (facts, now):
        wire = json.dumps(said, allow_nan=False, ensure_ascii=False).encode("utf-8")
        assert answers.bounded(msgspec.json.decode(wire)) == said
    return msgspec.convert(facts, DeviceFacts), msgspec.convert(now, Conditions)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=60)
@given(hostile_trees)
def test_readers_never_raise_never_wait_and_never_send_what_the_host_refuses(tree):
    with tempfile.TemporaryDirectory() as folder:
        root = made(folder, tree)
        started_s = time.monotonic()
        facts, now = readings(root)
        runner.read_own_core_s(root, 7)
        runner.read_clusters(root)
        assert time.monotonic() - started_s < 20.0
        assert msgspec.json.decode(msgspec.json.encode(facts), type=DeviceFacts) == facts
        assert msgspec.json.decode(msgspec.json.encode(now), type=Conditions) == now


@pytest.mark.parametrize("kind", sorted({*KINDS} - {"bytes", "understood"}))
def test_tree_in_which_every_file_is_hostile_reads_as_not_available(kind, tmp_path):
    if kind == "unreadable" and os.geteuid() == 0:
        pytest.skip("root may read everything")
    facts, now = readings(made(str(tmp_path), dict.fromkeys(PATHS, (kind, b""))))
    assert (facts.cpu_model, facts.isa, facts.memory_bytes) == ("", (), None)
    assert (now.temperatures_celsius, now.throttled, now.load_1min) == (None, None, None)


def test_the_same_tree_unspoilt_is_understood(tmp_path):
    facts, now = readings(made(str(tmp_path), {}))
    assert (facts.cpu_model, facts.l4t, facts.cuda, facts.tensorrt) == ("Pi 4 (Cortex-A72)", "36.4.3", "12.6", "10.3.0")
    assert now.temperatures_celsius == {"cpu": 48.0}
    assert now.throttled
    assert now.rails_w == {"VDD": 0.5}


def test_names_that_are_no_text_and_thousands_of_zones_still_reach_the_host(tmp_path):
    zones = tmp_path / "sys/class/thermal"
    for number in range(1000):
        (zones / f"thermal_zone{number}").mkdir(parents=True)
        (zones / f"thermal_zone{number}/temp").write_text("50000")
    odd = zones / os.fsdecode(b"thermal_zone\xff")
    odd.mkdir()
    (odd / "temp").write_text("1000")
    _, now = readings(str(tmp_path))
    assert now.temperatures_celsius is not None
    assert 1 <= len(now.temperatures_celsius) <= runner.MOST_ZONES


def test_text_of_a_file_is_cut_to_what_the_host_takes(tmp_path):
    name = tmp_path / "proc/sys/kernel/hostname"
    name.parent.mkdir(parents=True)
    name.write_text("h" * 100_000)
    facts, _ = readings(str(tmp_path))
    assert facts.hostname == "h" * runner.LONGEST_TEXT


def test_message_with_a_name_that_is_no_text_is_a_line_that_the_host_takes(tmp_path):
    path = tmp_path / "said"
    with path.open("w", encoding="utf-8", errors="replace") as stream:
        runner.say(stream, event="error", id=1, kind="x", message=os.fsdecode(b"no \xff here"))
    assert msgspec.json.decode(path.read_bytes())["message"] == "no ? here"
