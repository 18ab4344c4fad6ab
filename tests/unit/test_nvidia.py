"""What is told of a device's GPU and TensorRT: each part, and what to do where one is missing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from edgedeploy import catalogue
from edgedeploy.cli import run
from edgedeploy.errors import DeviceUnreachable
from edgedeploy.lab import nvidia
from edgedeploy.lab.transport import Completed
from edgedeploy.records.device import Gpu, TensorRTBindings
from edgedeploy.render.figures import condition_facts, gpu_facts
from tests.backends.emulated_tensorrt import device_python
from tests.emulated.stubs import build_stubs

from .render_samples import FACTS, NO_CONDITIONS, make_run

ORIN = replace(
    FACTS,
    python="3.10.12",
    board="NVIDIA Jetson AGX Orin Developer Kit",
    l4t="36.4.3",
    jetpack="6.2",
    gpus=(Gpu(name="Orin", compute_capability="8.7"),),
    gpu_driver="540.4.0",
    cuda="12.6.68",
    tensorrt="10.3.0",
    tensorrt_bindings=(TensorRTBindings(python="3.10", version="10.3.0", folder="/usr/lib/python3.10/dist-packages"),),
)


def told(facts, smi=None) -> dict[str, tuple[str, str]]:
    return {one.part: (one.state, one.next) for one in nvidia.findings(facts, smi)}


def test_whole_jetson_lacks_nothing():
    said = told(ORIN)
    assert {then for _, then in said.values()} == {""}
    assert said["NVIDIA GPU"][0] == "Orin (compute capability 8.7)"
    assert said["JetPack"][0] == "6.2 (Jetson Linux 36.4.3)"
    assert said["TensorRT in Python"][0] == "for Python 3.10 in /usr/lib/python3.10/dist-packages"


def test_bindings_for_another_python_name_the_line_of_lab_toml():
    state, then = told(replace(ORIN, python="3.8.10"))["TensorRT in Python"]
    assert "for Python 3.10" in state
    assert then == 'the runner\'s is Python 3.8: set python = "python3.10" of this device in lab.toml'


@pytest.mark.parametrize(
    ("lacking", "part", "then"),
    [
        ({"tensorrt": "", "tensorrt_bindings": ()}, "TensorRT", "sudo apt install nvidia-jetpack"),
        ({"tensorrt_bindings": ()}, "TensorRT in Python", "sudo apt install python3-libnvinfer"),
        ({"cuda": ""}, "CUDA", "sudo apt install nvidia-jetpack"),
        ({"jetpack": ""}, "JetPack", "sudo apt install nvidia-jetpack"),
        ({"gpus": ()}, "NVIDIA GPU", "--runtime nvidia"),
        ({"tensorrt": "8.2.1"}, "TensorRT", "update to JetPack 5.1 or later"),
        ({"l4t": "", "gpu_driver": ""}, "GPU driver", "--gpus all"),
        ({"l4t": "", "tensorrt": "", "tensorrt_bindings": ()}, "TensorRT", "pip install tensorrt"),
    ],
)
def test_each_missing_part_comes_with_what_to_do(lacking, part, then):
    assert then in told(replace(ORIN, **lacking))[part][1]


def test_driver_that_is_part_of_jetson_linux_is_not_missing():
    assert told(replace(ORIN, gpu_driver="", l4t="35.4.1"))["GPU driver"] == ("that of Jetson Linux 35.4.1", "")


def test_machine_without_anything_of_nvidias_says_which_back_end_needs_none():
    assert not nvidia.is_nvidia(FACTS)
    said = told(FACTS)
    assert list(said) == ["NVIDIA GPU"]
    assert "tensorrt_rtx builds without one" in said["NVIDIA GPU"][1]


def test_card_gets_memory_and_capability_from_nvidia_smi():
    smi = nvidia.parse_smi("NVIDIA H200, 570.86.15, 143771, 9.0\nNVIDIA H200, 570.86.15, 143771, 9.0\n")
    server = replace(FACTS, gpus=(Gpu(name="NVIDIA H200"), Gpu(name="NVIDIA H200")))
    said = told(server, smi)
    assert said["NVIDIA GPU"][0].count("NVIDIA H200 (compute capability 9.0, 140 GiB)") == 2
    assert said["GPU driver"] == ("570.86.15", "")


def test_nvidia_smi_of_a_jetson_takes_nothing_away():
    smi = nvidia.parse_smi("Orin (nvgpu), 540.4.0, [N/A], [N/A]")
    assert told(ORIN, smi)["NVIDIA GPU"][0] == "Orin (nvgpu) (compute capability 8.7)"


@settings(max_examples=100, deadline=None)
@given(
    st.text() | st.lists(st.sampled_from(["H200", "570.86", "9.0", "143771", ",", "\n", "[N/A]", "²"])).map(" ".join)
)
def test_nvidia_smi_may_print_anything(text):
    smi = nvidia.parse_smi(text)
    assert smi is None or (smi.driver and smi.gpus and all(gpu.name for gpu in smi.gpus))


class Machine:
    """A device on which one program is there, or none."""

    def __init__(self, answers: Sequence[Completed | DeviceUnreachable]) -> None:
        self.answers, self.asked = list(answers), []

    def run(self, argv, *, timeout_s, stdin=b""):
        self.asked.append(argv)
        answer = self.answers.pop(0)
        if isinstance(answer, DeviceUnreachable):
            raise answer
        return answer


def test_older_driver_is_asked_without_the_field_that_it_does_not_know():
    machine = Machine(
        [
            Completed(2, b'Field "compute_cap" is not a valid field to query.\n', b""),
            Completed(0, b"Tesla T4, 450.80.02, 15109\n", b""),
        ]
    )
    smi, problem = nvidia.ask_smi(machine)
    assert (smi.gpus, problem) == ((Gpu(name="Tesla T4", memory_bytes=15109 * 2**20),), "")
    assert "compute_cap" not in " ".join(machine.asked[1])


def test_nvidia_smi_that_is_missing_fails_or_hangs_is_a_sentence():
    assert nvidia.ask_smi(Machine([Completed(127, b"", b"not found")])) == (None, "")
    failed = Completed(9, b"NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", b"")
    assert "couldn't communicate" in nvidia.ask_smi(Machine([failed, failed]))[1]
    hung = DeviceUnreachable("nvidia-smi did not end within 15 s and was killed")
    assert nvidia.ask_smi(Machine([hung])) == (None, str(hung))


def test_answer_of_the_driver_counts():
    (answers,) = nvidia.probe_findings(
        {"driver": "", "cuda_driver": "12.6", "devices": [{"name": "Orin", "compute_capability": "8.7"}]}
    )
    assert (answers.state, answers.next) == ("answers, for CUDA 12.6: Orin (compute capability 8.7)", "")
    (silent,) = nvidia.probe_findings({"driver": "there is no libcuda.so.1; install the driver"})
    assert (silent.state, silent.next) == ("does not answer", "there is no libcuda.so.1; install the driver")
    (blind,) = nvidia.probe_findings({"driver": "", "cuda_driver": "12.6", "devices": []})
    assert "CUDA_VISIBLE_DEVICES" in blind.next
    lacks = nvidia.probe_findings({"devices": [{}, 3], "tensorrt_problem": "no module"})[1]
    assert (lacks.state, lacks.next) == ("does not load", "no module")


def test_what_the_builder_found_completes_what_files_say():
    found = {
        "driver": "",
        "driver_version": "570.86.15",
        "devices": [{"name": "NVIDIA H200", "compute_capability": "9.0", "memory_bytes": 140 * 2**30}],
        "tensorrt": "10.13.3",
    }
    facts = nvidia.with_probe(FACTS, found)
    assert facts.gpus == (Gpu(name="NVIDIA H200", compute_capability="9.0", memory_bytes=140 * 2**30),)
    assert facts.gpu_driver == "570.86.15"
    assert [(one.python, one.version) for one in facts.tensorrt_bindings] == [("3.11", "10.13.3")]
    assert nvidia.with_probe(ORIN, {"tensorrt": "10.3.0"}) == ORIN
    assert nvidia.with_probe(FACTS, {"driver": "none", "devices": "garbage"}) == FACTS


# ------------------------------------------------------------------------------------------------ in reports


def test_board_without_sensors_adds_no_rows():
    assert gpu_facts(FACTS) == []
    labels = {label for label, _ in condition_facts(make_run("baseline", blocks=1))}
    assert not labels & {"power mode", "clocks fixed", "GPU clock", "memory clock", "fan"}


def test_power_clocks_and_limits_are_shown():
    run = make_run("baseline", blocks=2)
    cool = replace(NO_CONDITIONS, power_mode="MAXN (0)", clocks_fixed=True, gpu_clock_hz=1.3005e9, fan_rpm=1786.0)
    cool = replace(cool, throttled=False, rails_w={"VDD_GPU_SOC": 2.34}, emc_clock_hz=3.199e9)
    hot = replace(cool, throttled=True, throttle_reasons=("gpu-throttle-alert",), rails_w={"VDD_GPU_SOC": 31.0})
    rows = dict(condition_facts(replace(run, visits=tuple(replace(one, before=cool, after=hot) for one in run.visits))))
    assert rows["power mode"] == "MAXN (0)"
    assert rows["clocks fixed"] == "yes"
    assert rows["GPU clock"] == "1.30 GHz"
    assert rows["memory clock"] == "3.20 GHz"
    assert rows["power of VDD_GPU_SOC"] == "2.3 W – 31.0 W"
    assert rows["fan"] == "1786 rpm"
    looks = 2 * len(run.visits)
    assert rows["throttled"] == f"yes, in {looks // 2} of {looks} looks (gpu-throttle-alert)"


def test_gpu_and_tensorrt_are_shown():
    rows = dict(gpu_facts(ORIN))
    assert rows["JetPack"] == "6.2 (Jetson Linux 36.4.3)"
    assert rows["GPU"] == "Orin (sm_87)"
    assert rows["TensorRT"] == "10.3.0, bindings for Python 3.10"


# ------------------------------------------------------------------------------------------------ the commands


def lab_with_bindings(tmp_path: Path) -> Path:
    """A device whose Python has a module for TensorRT, and no driver."""
    module = tmp_path / "modules" / "tensorrt"
    module.mkdir(parents=True)
    (module / "tensorrt.so").touch()
    (module / "__init__.py").write_text('__version__ = "10.3.0"\nraise ImportError("libnvinfer.so.10: not there")\n')
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "modules"} exec python3 "$@"\n')
    python.chmod(0o755)
    lab = tmp_path / "lab.toml"
    root = tmp_path / "root"
    lab.write_text(
        f'format = "edgedeploy.lab/1"\n[devices.board]\ntransport = "local"\npython = "{python}"\nroot = "{root}"\n'
    )
    return lab


def test_devices_check_asks_the_driver_and_says_what_is_missing(tmp_path, capsys):
    lab = lab_with_bindings(tmp_path)
    assert run(["devices", "check", "board", "--lab", str(lab), "--json", "--quiet"]) == 0
    (device,) = json.loads(capsys.readouterr().out)["devices"]
    parts = {one["part"]: one for one in device["findings"]}
    assert parts["TensorRT"]["state"] == "10.3.0, by its Python module"
    assert str(tmp_path / "modules") in parts["TensorRT in Python"]["state"]
    assert parts["CUDA driver"]["state"].startswith(("does not answer", "answers"))


def test_device_whose_driver_answers_is_told_with_its_gpu(tmp_path, capsys):
    libraries = build_stubs(tmp_path / "libraries")
    device_python(tmp_path / "python", "10.3.0", libraries)
    lab = tmp_path / "lab.toml"
    lab.write_text(
        f'format = "edgedeploy.lab/1"\n[devices.board]\ntransport = "local"\n'
        f'python = "{tmp_path / "python"}"\nroot = "{tmp_path / "root"}"\n'
    )
    assert run(["devices", "check", "board", "--lab", str(lab), "--json", "--quiet"]) == 0
    (device,) = json.loads(capsys.readouterr().out)["devices"]
    parts = {one["part"]: one["state"] for one in device["findings"]}
    assert parts["CUDA driver"].startswith("answers, for CUDA ")
    assert "compute capability" in parts["NVIDIA GPU"]
    assert parts["GPU driver"] != "missing"
    assert parts["TensorRT"] == "10.3.0, by its Python module"


def test_devices_check_prints_findings_below_their_device(tmp_path, capsys):
    assert run(["devices", "check", "board", "--lab", str(lab_with_bindings(tmp_path)), "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "TensorRT in Python" in printed
    assert "CUDA driver" in printed
    assert "Traceback" not in printed


def test_builder_that_crashes_is_a_finding_and_no_failure(tmp_path, capsys, monkeypatch):
    builder = tmp_path / "builder.py"
    builder.write_text("import os\ndef probe():\n    os.abort()\n")
    monkeypatch.setattr(catalogue.load_backends()[0]["tensorrt"], "builder", builder, raising=False)
    assert run(["devices", "check", "board", "--lab", str(lab_with_bindings(tmp_path)), "--json", "--quiet"]) == 0
    (device,) = json.loads(capsys.readouterr().out)["devices"]
    (asked,) = (one for one in device["findings"] if one["part"] == "CUDA driver")
    assert asked["state"] == "not asked"
    assert "SIGABRT" in asked["next"]


def test_doctor_says_what_this_machine_has_for_tensorrt(capsys):
    assert run(["doctor", "--json"]) == 0
    assert "NVIDIA GPU" in [one["part"] for one in json.loads(capsys.readouterr().out)["findings"]]


def test_doctor_does_not_fail_where_the_facts_cannot_be_read(monkeypatch, tmp_path):
    broken = tmp_path / "runner.py"
    broken.write_text("print('[1, 2]')\n")
    monkeypatch.setattr(catalogue.bundle, "RUNNER", broken)
    (finding,) = (one for one in catalogue.examine(None) if one[0] == "NVIDIA GPU")
    assert finding[1] == "not examined"
