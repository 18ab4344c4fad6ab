"""What a board is taken for, which runtime its sessions are opened with, and what to do where one cannot be imported."""

from __future__ import annotations

import msgspec
import pytest

from edgedeploy.backends import device_runtimes, load_backends
from edgedeploy.boards import guess_target, parse_runtime
from edgedeploy.errors import UsageError
from edgedeploy.lab.provision import Installed, advise, choose, unused
from edgedeploy.ondevice.runner import in_ranges, read_clusters, read_survey
from edgedeploy.pipeline import _of_its_kind
from edgedeploy.records.device import Device, DeviceFacts, Interpreter, Survey
from edgedeploy.records.release import CellEntry

CP311 = Interpreter(tag="cp311", abi="cp311", bits=64)
FACTS = DeviceFacts(
    hostname="b", machine="aarch64", system="Linux", kernel="6", os_name="", libc="glibc 2.36", python="3.11.2",
    cpu_model="", isa=("asimd",), cores=4, memory_bytes=8 << 30, boot_id="", interpreter=CP311,
)  # fmt: skip


def survey(board: str, isa: str = "asimd", gib: float = 7.6, machine: str = "aarch64") -> Survey:
    facts = msgspec.structs.replace(
        FACTS, board=board, isa=tuple(isa.split()), memory_bytes=int(gib * 2**30), machine=machine
    )
    return Survey(facts=facts, python="/usr/bin/python3", free_bytes=0)


@pytest.mark.parametrize(
    ("board", "isa", "gib", "machine", "expected"),
    [
        ("Raspberry Pi 4 Model B Rev 1.4", "asimd", 7.6, "aarch64", "raspberry-pi-4"),
        ("Raspberry Pi 5 Model B Rev 1.0", "asimd asimddp", 7.9, "aarch64", "raspberry-pi-5"),
        ("Raspberry Pi 5 Model B Rev 1.0", "asimd", 7.9, "aarch64", "arm64-linux"),
        ("NVIDIA Jetson Orin Nano Developer Kit", "asimd asimddp", 7.4, "aarch64", "jetson-orin-nano-8gb"),
        ("NVIDIA Jetson Orin Nano Developer Kit", "asimd asimddp", 3.6, "aarch64", "jetson-orin"),
        ("NVIDIA Jetson AGX Orin Developer Kit", "asimd asimddp", 61.0, "aarch64", "jetson-agx-orin"),
        ("Radxa ROCK 5B", "asimd asimddp", 15.0, "aarch64", "arm64-linux"),
        ("", "avx2 avx512_vnni", 15.0, "x86_64", "x86-64-vnni"),
        ("", "rv64imafdc", 15.0, "riscv64", ""),
    ],
)
def test_a_board_is_taken_for_the_closest_target(board: str, isa: str, gib: float, machine: str, expected: str) -> None:
    target, reason = guess_target(survey(board, isa, gib, machine))
    assert target == expected
    assert reason


def installed(*names: str) -> tuple[Installed, ...]:
    return tuple(Installed(f"{d}-{v}-{t}-0", d, v, t, 1) for d, v, t in (name.split("/") for name in names))


def test_the_newest_that_fits_the_interpreter_is_used_unless_one_is_pinned() -> None:
    found = installed("onnxruntime/1.9.0/cp311", "onnxruntime/1.20.1/cp311", "onnxruntime/1.31.0/cp39")
    choices = device_runtimes("onnxruntime")
    assert choose(found, choices, FACTS) == found[1]
    assert choose(found, choices, FACTS, version="1.9.0") == found[0]
    assert choose(found, choices, FACTS, version="1.31.0") is None


def test_a_higher_version_of_the_second_choice_does_not_win() -> None:
    found = installed("tflite-runtime/2.14.0/cp311", "ai-edge-litert/2.3.0/cp311")
    choices = device_runtimes("tflite")
    assert choose(found, choices, FACTS) == found[1]
    assert choose(found, choices, FACTS, version="2.14.0") == found[0]
    assert choose(found[:1], choices, FACTS) == found[0]


def test_only_what_no_session_would_be_opened_with_is_unused() -> None:
    found = installed("onnxruntime/1.9.0/cp311", "onnxruntime/1.20.1/cp311", "mnn/3.6.1/cp311", "mnn/3.6.1/cp39")
    every = {name: device_runtimes(name) for name in load_backends()[0]}
    assert unused(found, every, FACTS, {}) == (found[0], found[3])
    assert unused(found, every, FACTS, {"onnxruntime": "1.9.0"}) == (found[1], found[3])


def test_a_runtime_is_named_by_its_back_end_or_by_its_distribution() -> None:
    assert parse_runtime("onnxruntime==1.20.1")[::2] == ("onnxruntime", "1.20.1")
    backend, choices, _ = parse_runtime("tflite_runtime")
    assert (backend, [one.distribution for one in choices]) == ("tflite", ["tflite-runtime"])
    assert len(parse_runtime("tflite")[1]) == 2
    for text, said in (
        ("onxruntime", 'did you mean "onnxruntime"'),
        ("tensorrt", "not brought by wheels"),
        ("onnxruntime==1.2;x", "does not name a version"),
        ("onnxruntime>=1", "no runtime"),
    ):
        with pytest.raises(UsageError, match=said):
            parse_runtime(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("the process was killed by SIGILL", "not all known to this processor"),
        ("libgomp.so.1: cannot open shared object file: No such file", "apt install libgomp1"),
        ("libstdc++.so.6: cannot open shared object file", "apt install libstdc++6"),
        ("/lib/libm.so.6: version `GLIBC_2.35' not found (required by x.so)", "older than the runtime was built for"),
        ("x.so: wrong ELF class: ELFCLASS32", "another processor"),
        ("A module that was compiled using NumPy 1.x cannot be run in NumPy 2.0", "older numpy"),
        ("the process was killed by SIGKILL", "memory"),
        ("ImportError: something else", "by other means"),
    ],
)
def test_a_runtime_that_cannot_be_imported_comes_with_advice(text: str, said: str) -> None:
    assert said in advise(text, "onnxruntime")


def test_clusters_are_cores_of_one_clock_and_capacity(tmp_path) -> None:
    for core, (khz, capacity) in enumerate([(1800000, 400)] * 4 + [(2400000, 1024)] * 2 + [(2400000, 1000)]):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{core}"
        (folder / "cpufreq").mkdir(parents=True)
        (folder / "cpufreq/cpuinfo_max_freq").write_text(f"{khz}\n")
        (folder / "cpu_capacity").write_text(f"{capacity}\n")
    assert read_clusters(str(tmp_path)) == [
        {"cores": "0-3", "max_hz": 1.8e9}, {"cores": "4-5", "max_hz": 2.4e9}, {"cores": "6", "max_hz": 2.4e9}
    ]  # fmt: skip
    assert read_clusters(str(tmp_path / "none")) == []


def test_ranges_of_cores() -> None:
    assert in_ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"


def test_a_survey_of_this_machine_is_a_record(tmp_path) -> None:
    said = read_survey(str(tmp_path / "not" / "there"), ["msgspec=msgspec", "absent-thing=absent_thing"])
    record = msgspec.convert(said, Survey)
    assert list(record.runtimes) == ["msgspec"]
    assert record.free_bytes > 0
    assert record.facts.interpreter.tag.startswith("cp3")


@pytest.mark.parametrize(
    ("target", "device", "expected"),
    [
        ("host", Device(transport="ssh", host="h", target="raspberry-pi-4"), "raspberry-pi-4"),
        ("host", Device(transport="ssh", host="h"), "host"),
        ("host", Device(transport="local", target="raspberry-pi-4"), "host"),
        ("host", None, "host"),
        ("jetson-orin", Device(transport="ssh", host="h", target="raspberry-pi-4"), "jetson-orin"),
    ],
)
def test_a_cell_for_whatever_this_machine_is_is_built_for_the_device_it_goes_to(
    target: str, device: Device | None, expected: str
) -> None:
    cell = CellEntry(name="c", model="m", target=target, backend="onnxruntime", precision="fp32")
    assert _of_its_kind(cell, device).target == expected
