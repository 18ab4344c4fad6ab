"""What the runner reads of NVIDIA boards, from trees written from documentation, and of garbage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgedeploy.lab import visits
from edgedeploy.ondevice import runner
from edgedeploy.records.device import DeviceFacts, Gpu
from edgedeploy.records.run import Conditions, Visit
from edgedeploy.records.target import ConditionLimits

from . import jetson_boards as boards
from .device_trees import conditions, facts, tree

BOARDS = [boards.XAVIER, boards.AGX_ORIN, boards.ORIN_NANO, boards.THOR, boards.SERVER]


def program(path: Path, text: str) -> str:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


# ------------------------------------------------------------------------------------------------ facts


@pytest.mark.parametrize(
    ("files", "board", "l4t", "jetpack", "gpu", "capability", "tensorrt"),
    [
        (boards.XAVIER, "Jetson-AGX", "35.4.1", "5.1.2", "Xavier", "7.2", "8.5.2"),
        (boards.AGX_ORIN, "NVIDIA Jetson AGX Orin Developer Kit", "36.4.3", "6.2", "Orin", "8.7", "10.3.0"),
        (boards.ORIN_NANO, "NVIDIA Jetson Orin Nano Developer Kit", "36.4.0", "6.1", "Orin", "8.7", ""),
        (boards.THOR, "NVIDIA Jetson AGX Thor Developer Kit", "38.2.0", "7.0", "Thor", "11.0", "10.13.3"),
    ],
    ids=["xavier", "agx-orin", "orin-nano", "thor"],
)
def test_facts_of_a_jetson(tmp_path, files, board, l4t, jetpack, gpu, capability, tensorrt):
    said = facts(tree(tmp_path, files))
    assert (said.board, said.l4t, said.jetpack, said.tensorrt) == (board, l4t, jetpack, tensorrt)
    # A chip's GPU has no memory of its own.
    assert said.gpus == (Gpu(name=gpu, compute_capability=capability, memory_bytes=None),)


def test_processor_of_a_jetson_is_its_board_and_core(tmp_path):
    assert facts(tree(tmp_path / "xavier", boards.XAVIER)).cpu_model == "Jetson-AGX (Carmel)"
    orin = facts(tree(tmp_path / "orin", boards.AGX_ORIN)).cpu_model
    assert orin == "NVIDIA Jetson AGX Orin Developer Kit (Cortex-A78AE)"


def test_driver_and_cuda_are_read_from_files(tmp_path):
    orin = facts(tree(tmp_path / "orin", boards.AGX_ORIN))
    assert (orin.gpu_driver, orin.cuda) == ("540.4.0", "12.6.68")
    server = facts(tree(tmp_path / "server", boards.SERVER))
    assert (server.gpu_driver, server.cuda) == ("570.86.15", "12.8")
    assert server.gpus == (Gpu(name="NVIDIA H200"),)
    assert (server.board, server.l4t, server.jetpack) == ("", "", "")


def test_bindings_are_told_with_the_python_that_they_are_for(tmp_path):
    xavier, orin, nano = (
        facts(tree(tmp_path / name, files)).tensorrt_bindings
        for name, files in (("xavier", boards.XAVIER), ("orin", boards.AGX_ORIN), ("nano", boards.ORIN_NANO))
    )
    assert [(one.python, one.version) for one in xavier] == [("3.8", "8.5.2.2")]
    assert [(one.python, one.version) for one in orin] == [("3.10", "10.3.0")]
    assert [(one.python, one.version) for one in nano] == [("3.12", "10.3.0")]
    assert nano[0].folder.endswith("usr/local/lib/python3.12/site-packages")


def test_bindings_of_the_runners_own_environment_are_found_and_their_wheel_says_the_python(tmp_path):
    tree(
        tmp_path / "env",
        {
            "tensorrt_bindings/tensorrt.so": "",
            "tensorrt_bindings/__init__.py": "__version__ = '11.4.0'\n",
            "tensorrt_cu13_bindings-11.4.0.dist-info/WHEEL": "Tag: cp311-none-manylinux_2_28_x86_64\n",
        },
    )
    assert runner.read_bindings(str(tmp_path / "none"), [str(tmp_path / "env")]) == [
        {"python": "3.11", "version": "11.4.0", "folder": str(tmp_path / "env")}
    ]


def test_folder_without_the_compiled_module_is_no_binding(tmp_path):
    root = tree(tmp_path, {"usr/lib/python3.10/dist-packages/tensorrt/__init__.py": "__version__ = '10.3.0'\n"})
    assert runner.read_bindings(root) == []


def test_package_that_was_removed_is_not_installed():
    status = boards.ORIN_NANO["var/lib/dpkg/status"] + boards.package("libnvinfer10", "1:10.3.0.30-1+cuda12.5")
    assert runner.dpkg_versions(status, r"nvidia-jetpack|libnvinfer\d+") == {"libnvinfer10": "10.3.0.30"}


def test_facts_role_prints_one_object_and_takes_no_lease():
    said = subprocess.run([sys.executable, runner.__file__, "facts"], capture_output=True, check=True, timeout=30)
    assert msgspec.convert(json.loads(said.stdout), DeviceFacts).python == ".".join(map(str, sys.version_info[:3]))


# ------------------------------------------------------------------------------------------------ conditions


def test_conditions_of_an_agx_orin_after_jetson_clocks(tmp_path):
    said = conditions(tree(tmp_path, boards.AGX_ORIN))
    assert said.power_mode == "MAXN (0)"
    assert said.clocks_fixed is True
    assert (said.gpu_clock_hz, said.emc_clock_hz) == (1300500000.0, 3199000000.0)
    assert said.rails_w == pytest.approx({"VDD_GPU_SOC": 2.39, "VDD_CPU_CV": 1.60608})
    assert (said.fan_rpm, said.fan_drive) == (1786.0, pytest.approx(0.2))
    assert (said.throttled, said.throttle_reasons) == (False, ())
    # oc2 only counts: its guard slows nothing down.
    assert said.throttle_events == {"oc1": 0, "oc3": 27}
    assert set(said.temperatures_celsius) == {"cpu-thermal", "gpu-thermal", "tj-thermal"}


def test_conditions_of_a_xavier(tmp_path):
    said = conditions(tree(tmp_path, boards.XAVIER))
    assert said.power_mode == "MODE_30W_ALL (3)"
    assert said.clocks_fixed is False
    assert (said.gpu_clock_hz, said.emc_clock_hz) == (114750000.0, None)
    assert said.rails_w == pytest.approx({"GPU": 0.38, "CPU": 0.76})
    assert (said.throttled, said.throttle_reasons, said.throttle_events) == (None, None, None)
    # PMIC-Die always says 100 °C, which would drop every visit.
    assert max(said.temperatures_celsius.values()) == 36.25


def test_rails_of_jetpack_4(tmp_path):
    said = conditions(tree(tmp_path, boards.OLD_RAILS))
    assert said.rails_w == pytest.approx({"GPU": 1.55, "CPU": 0.62, "SYS5V": 2.48})


def test_thermal_limit_that_holds_is_named_and_a_fan_is_none(tmp_path):
    said = conditions(tree(tmp_path, boards.ORIN_NANO))
    assert (said.throttled, said.throttle_reasons) == (True, ("gpu-throttle-alert",))
    assert (said.power_mode, said.clocks_fixed) == (None, False)


def test_conditions_of_a_thor(tmp_path):
    said = conditions(tree(tmp_path, boards.THOR))
    assert (said.gpu_clock_hz, said.emc_clock_hz) == (1575000000.0, 4266000000.0)
    assert said.rails_w == pytest.approx({"VIN": 15.004, "VDD_GPU": -0.392})
    assert said.power_mode == "mode (1)"


def test_what_is_not_there_is_none_and_never_zero(tmp_path):
    said = conditions(str(tmp_path))
    assert {name for name in said.__struct_fields__ if getattr(said, name) is not None} == {"monotonic_s"}


def test_nvpmodel_is_asked_where_its_file_is_not_there(tmp_path):
    tool = program(tmp_path / "nvpmodel", 'echo "NV Fan Mode:quiet"; echo "NV Power Mode: MODE_15W"; echo 2\n')
    assert runner.read_power_mode(str(tmp_path), tool) == "MODE_15W (2)"
    assert runner.read_power_mode(str(tmp_path), str(tmp_path / "none")) is None


def test_tegrastats_is_asked_for_what_the_files_of_a_jetson_do_not_say(tmp_path):
    tool = program(tmp_path / "tegrastats", f'while :; do echo "{boards.TEGRASTATS_ORIN}"; sleep 0.05; done\n')
    bare = tree(tmp_path / "bare", {"etc/nv_tegra_release": boards.RELEASE.format(36, "4.3")})
    said = conditions(bare, {"tegrastats": tool})
    assert (said.gpu_clock_hz, said.emc_clock_hz, said.rails_w["VDD_CPU_CV"]) == (1.3e9, 2.133e9, 0.39)
    whole = conditions(tree(tmp_path / "whole", boards.AGX_ORIN), {"tegrastats": tool})
    assert "VIN_SYS_5V0" not in whole.rails_w


def test_tegrastats_that_says_nothing_is_given_up(tmp_path):
    assert runner.sample_tegrastats(program(tmp_path / "silent", "exec sleep 60\n"), timeout_s=0.1) == ""
    assert runner.sample_tegrastats(program(tmp_path / "ended", "exit 1\n")) == ""
    assert runner.sample_tegrastats(str(tmp_path / "none")) == ""


def test_jetson_clocks_is_asked_by_root_where_the_gpus_clock_has_no_folder(tmp_path, monkeypatch):
    tool = program(tmp_path / "jetson_clocks", f"cat <<.\n{boards.JETSON_CLOCKS.format(cpu=729600, gpu=306000000)}.\n")
    bare = tree(tmp_path / "bare", {"etc/nv_tegra_release": boards.RELEASE.format(36, "4.3")})
    monkeypatch.setattr(runner.os, "geteuid", lambda: 0)
    said = conditions(bare, {"jetson_clocks": tool})
    assert (said.gpu_clock_hz, said.emc_clock_hz, said.clocks_fixed) == (1300500000.0, 2133000000.0, False)
    assert said.power_mode == "MODE_30W"
    monkeypatch.setattr(runner.os, "geteuid", lambda: 1000)
    assert conditions(bare, {"jetson_clocks": tool}).gpu_clock_hz is None


# ------------------------------------------------------------------------------------------------ what programs print


def test_tegrastats_of_a_xavier():
    said = runner.parse_tegrastats(boards.TEGRASTATS_XAVIER)
    assert (said["ram_used_bytes"], said["ram_total_bytes"]) == (2690 * 2**20, 15822 * 2**20)
    assert said["cpu_clocks_hz"] == [1.904e9, 1.906e9]
    assert (said["gpu_load"], said["gpu_clock_hz"]) == (pytest.approx(0.05), 5.1e8)
    assert said["temperatures_celsius"] == {"AUX": 39.0, "CPU": 39.5, "PMIC": 50.0}
    assert said["rails_w"] == {"GPU": 0.62, "CPU": 0.465}


def test_tegrastats_of_an_orin():
    said = runner.parse_tegrastats(boards.TEGRASTATS_ORIN)
    assert (said["emc_load"], said["emc_clock_hz"]) == (pytest.approx(0.03), 2.133e9)
    assert (said["gpu_load"], said["gpu_clock_hz"]) == (pytest.approx(0.41), 1.3e9)
    assert said["temperatures_celsius"] == {"cpu": 44.562, "tj": 44.343}
    assert said["rails_w"] == {"VDD_GPU_SOC": 2.34, "VDD_CPU_CV": 0.39, "VIN_SYS_5V0": pytest.approx(4.025)}


def test_tegrastats_without_root_says_no_clocks():
    said = runner.parse_tegrastats(boards.TEGRASTATS_ORIN_WITHOUT_ROOT)
    assert said["gpu_load"] == pytest.approx(0.88)
    assert not {"gpu_clock_hz", "emc_clock_hz", "emc_load"} & set(said)


def test_tegrastats_of_a_thor():
    said = runner.parse_tegrastats(boards.TEGRASTATS_THOR)
    assert said["cpu_clocks_hz"] == [2.601e9, 2.601e9]
    assert (said["gpu_clock_hz"], said["emc_clock_hz"]) == (1.574e9, 4.266e9)
    assert not {"gpu_load", "emc_load"} & set(said)
    assert said["rails_w"] == {"VDD_GPU": pytest.approx(-0.392), "VIN": pytest.approx(28.906)}
    assert said["temperatures_celsius"] == {"cpu": 49.75, "gpu": 51.218}


@pytest.mark.parametrize(("cpu", "gpu", "fixed"), [(2201600, 1300500000, True), (2201600, 306000000, False)])
def test_jetson_clocks_says_whether_clocks_are_fixed(cpu, gpu, fixed):
    said = runner.parse_jetson_clocks(boards.JETSON_CLOCKS.format(cpu=cpu, gpu=gpu))
    assert said == {
        "clocks_fixed": fixed,
        "gpu_clock_hz": 1300500000.0,
        "emc_clock_hz": 2133000000.0,
        "power_mode": "MODE_30W",
    }


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("NVPM WARN: fan mode is not set!\nNV Power Mode: MAXN\n0\n", "MAXN (0)"),
        ("NV Power Mode: MODE_15W", "MODE_15W"),
        ("NVPM ERROR: Error opening /var/lib/nvpmodel/status\n", None),
        ("NV Power Mode:\n2\n", None),
        ("", None),
    ],
)
def test_nvpmodel_is_understood(text, mode):
    assert runner.parse_nvpmodel(text) == mode


FRAGMENTS = sorted(
    {
        word
        for line in (
            boards.TEGRASTATS_XAVIER,
            boards.TEGRASTATS_ORIN,
            boards.TEGRASTATS_THOR,
            boards.JETSON_CLOCKS,
            boards.package("libnvinfer10", "10.3"),
            boards.RELEASE,
        )
        for word in line.split()
    }
)
GARBAGE = st.one_of(
    st.text(max_size=80),
    st.lists(st.sampled_from([*FRAGMENTS, "9" * 400, "\n", "\n\n", "-", "nan"])).map(" ".join),
)


@settings(max_examples=200, deadline=None)
@example(text="RAM 1/" + "9" * 400 + "MB EMC_FREQ 9%@" + "9" * 400)
@given(text=GARBAGE)
def test_no_parser_stumbles_over_garbage_and_all_numbers_are_finite(text):
    said = [
        runner.parse_tegrastats(text),
        runner.parse_jetson_clocks(text),
        runner.parse_nvpmodel(text),
        runner.parse_l4t(text),
        runner.dpkg_versions(text, ".*"),
        runner.version_key(text),
        runner.number(text),
    ]
    json.dumps(said, allow_nan=False)


PATHS = sorted(set().union(*BOARDS, {"proc/cpuinfo", "proc/stat", "proc/loadavg", "proc/meminfo", "etc/os-release"}))


@settings(max_examples=60, deadline=None)
@given(files=st.dictionaries(st.sampled_from(PATHS), st.binary(max_size=40) | GARBAGE.map(str.encode), max_size=12))
@example(files={"proc/cpuinfo": b"CPU implementer : 0x41\nCPU part : 0xzz", "proc/stat": b"cpu 1 2 3 x 5 6 7 8"})
@example(files={"sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": b"<unknown>"})
@example(files={"sys/class/hwmon/hwmon3/oc1_event_cnt": b"inf", "sys/class/hwmon/hwmon3/rpm": b"nan"})
@example(files={"usr/local/cuda/version.json": b"[" * 100000})
def test_a_device_full_of_garbage_is_still_described(tmp_path_factory, files):
    root = tmp_path_factory.mktemp("garbage")
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    facts(str(root))
    json.dumps(runner.read_conditions(str(root)), allow_nan=False)


# ------------------------------------------------------------------------------------------------ what is dropped

NOW = Conditions(monotonic_s=0.0)


def marked(before: Conditions, after: Conditions) -> str:
    visit = Visit(
        block=0,
        position=0,
        load_s=1.0,
        first_inference_s=1.0,
        warm_up_samples_s=(),
        is_steady=True,
        bursts=(),
        before=before,
        after=after,
    )
    return visits.mark(visit, ConditionLimits()).dropped


def with_events(**counts: int) -> Conditions:
    return Conditions(monotonic_s=0.0, throttled=False, throttle_reasons=(), throttle_events=counts)


def test_visit_during_which_a_guard_slowed_the_board_down_is_dropped():
    assert marked(with_events(oc1=0, oc3=27), with_events(oc1=0, oc3=28)) == "the device was throttled (oc3)"


def test_guards_that_acted_before_the_visit_do_not_count():
    assert marked(with_events(oc3=27), with_events(oc3=27)) == ""
    assert marked(NOW, with_events(oc3=27)) == ""
    assert marked(with_events(oc3=27), NOW) == ""


def test_visit_under_a_thermal_limit_is_dropped_by_its_name():
    hot = Conditions(monotonic_s=0.0, throttled=True, throttle_reasons=("gpu-throttle-alert",))
    assert marked(hot, NOW) == "the device was throttled (gpu-throttle-alert)"
    assert marked(NOW, Conditions(monotonic_s=0.0, throttled=True)) == "the device was throttled"
