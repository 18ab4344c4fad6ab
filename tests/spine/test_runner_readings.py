"""What the runner reads of a device (from recorded trees), and the tensors that it reads and writes."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import numpy as safetensors

from edgedeploy.ondevice import runner

from .device_trees import conditions, facts, tree

PI_CPU = "".join(
    f"processor\t: {core}\nFeatures\t: fp asimd crc32\nCPU implementer\t: 0x41\nCPU part\t: 0xd08\n\n"
    for core in range(4)
)
PI = {
    "proc/cpuinfo": PI_CPU + "Model\t\t: Raspberry Pi 4 Model B Rev 1.4\n",
    "proc/meminfo": "MemTotal:        3884356 kB\nMemAvailable:    3000000 kB\n",
    "proc/loadavg": "0.52 0.58 0.59 1/467 12345\n",
    "proc/stat": "cpu  1000 20 300 90000 50 4 6 7 0 0\ncpu0 1 2 3\n",
    "proc/sys/kernel/hostname": "pi\n",
    "proc/sys/kernel/osrelease": "6.6.31+rpt-rpi-v8\n",
    "proc/sys/kernel/random/boot_id": "b0\n",
    "etc/os-release": 'NAME="Debian"\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n',
    "sys/firmware/devicetree/base/model": "Raspberry Pi 4 Model B Rev 1.4\0",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "48686\n",
    "sys/class/thermal/thermal_zone1/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone1/temp": "50000\n",
    "sys/class/thermal/thermal_zone2/type": "cv0-thermal\n",
    "sys/class/thermal/thermal_zone2/temp": "-256000\n",
    **{f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq": f"{1500000 + core}\n" for core in range(12)},
    **{f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_governor": "ondemand\n" for core in range(12)},
}


def test_facts_of_a_raspberry_pi(tmp_path):
    said = facts(tree(tmp_path, PI))
    assert said.cpu_model == "Raspberry Pi 4 Model B Rev 1.4 (Cortex-A72)"
    assert (said.hostname, said.kernel, said.boot_id) == ("pi", "6.6.31+rpt-rpi-v8", "b0")
    assert said.os_name == "Debian GNU/Linux 12 (bookworm)"
    assert said.isa == ("fp", "asimd", "crc32")
    assert (said.cores, said.memory_bytes) == (4, 3884356 * 1024)


def test_facts_of_an_x86(tmp_path):
    said = facts(tree(tmp_path, {"proc/cpuinfo": "processor : 0\nmodel name\t: AMD EPYC\nflags\t: avx2 fma\n"}))
    assert (said.cpu_model, said.isa, said.cores) == ("AMD EPYC", ("avx2", "fma"), 1)


def test_facts_that_are_not_there_are_empty_and_never_zero(tmp_path):
    said = facts(str(tmp_path))
    assert (said.cpu_model, said.os_name, said.boot_id, said.isa, said.memory_bytes) == ("", "", "", (), None)
    assert said.cores >= 1


def test_conditions_of_a_raspberry_pi(tmp_path):
    said = conditions(tree(tmp_path, PI))
    assert said.cpu_clocks_hz == tuple(1.5e9 + 1e3 * core for core in range(12))
    assert said.governors == ("ondemand",) * 12
    assert said.temperatures_celsius == pytest.approx({"cpu-thermal": 48.686, "cpu-thermal#2": 50.0})
    assert said.load_1min == 0.52
    assert said.busy_core_s == (1000 + 20 + 300 + 4 + 6) / os.sysconf("SC_CLK_TCK")
    assert said.free_memory_bytes == 3000000 * 1024
    assert said.throttled is None


def test_conditions_that_are_not_there_are_none(tmp_path):
    said = conditions(str(tmp_path))
    assert {name for name in said.__struct_fields__ if getattr(said, name) is not None} == {"monotonic_s"}


def test_garbage_in_proc_is_not_available(tmp_path):
    broken = {"proc/loadavg": "", "proc/stat": "cpu 1 2\n", "proc/meminfo": "MemAvailable: lots\n"}
    said = conditions(tree(tmp_path, broken))
    assert (said.load_1min, said.busy_core_s, said.free_memory_bytes) == (None, None, None)


@pytest.mark.parametrize(
    ("text", "is_throttled"), [("0x0", False), ("50005", True), ("0x50000", False), ("0x4", True), ("what", None)]
)
def test_throttling_now_counts_and_throttling_since_boot_does_not(tmp_path, text, is_throttled):
    root = tree(tmp_path, {"sys/devices/platform/soc/soc:firmware/get_throttled": text + "\n"})
    assert runner.read_throttled(root) is is_throttled


def test_vcgencmd_is_asked_where_the_kernel_has_no_file(tmp_path):
    tool = tmp_path / "vcgencmd"
    tool.write_text('#!/bin/sh\n[ "$1" = get_throttled ] && echo throttled=0x50005\n')
    tool.chmod(0o755)
    assert runner.read_throttled(str(tmp_path), str(tool)) is True
    assert runner.read_throttled(str(tmp_path), str(tmp_path / "not-there")) is None


def test_own_cpu_time_is_read_past_a_strange_process_name(tmp_path):
    line = "42 (a) b (c) R 1 42 42 0 -1 4194304 97 0 0 0 130 20 0 0 20 0 1 0\n"
    root = tree(tmp_path, {"proc/42/stat": line})
    assert runner.read_own_core_s(root, 42) == 150 / os.sysconf("SC_CLK_TCK")
    assert runner.read_own_core_s(root, 43) is None


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (3, "ended with exit status 3"),
        (-signal.SIGSEGV, "was killed by SIGSEGV"),
        (-signal.SIGKILL, "was killed by SIGKILL (often the kernel's out-of-memory killer)"),
        (-99, "was killed by signal 99"),
    ],
)
def test_endings_are_told_in_words(status, words):
    assert runner.how_it_ended(status) == words


def test_full_disk_and_lack_of_memory_have_their_own_kinds():
    assert runner.explain(OSError(errno.ENOSPC, "No space left on device"))[0] == "disk-full"
    assert runner.explain(MemoryError())[0] == "out-of-memory"
    assert runner.explain(OSError(errno.EIO, "I/O error"))[0] == "device-io"
    assert runner.explain(ZeroDivisionError("x")) == (
        "internal",
        "the runner failed, which is a bug: ZeroDivisionError: x",
    )


# ------------------------------------------------------------------------------------------------ tensors

DTYPES = ["float32", "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_batches_of_a_file_are_its_rows_with_the_last_one_repeated(tmp_path_factory, data):
    samples = data.draw(st.integers(1, 9))
    tensors = {}
    for name in data.draw(st.sets(st.sampled_from(["x", "y", "ü"]), min_size=1)):
        shape = (samples, *data.draw(st.lists(st.integers(1, 3), max_size=2)))
        values = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 2, shape)
        tensors[name] = values.astype(data.draw(st.sampled_from(DTYPES)))
    path = tmp_path_factory.mktemp("tensors") / "t"
    safetensors.save_file(tensors, path)
    first, count = data.draw(st.integers(0, samples - 1)), data.draw(st.integers(1, 12))
    batch = runner.TensorFile(str(path)).rows(first, count)
    assert set(batch) == set(tensors)
    for name, (content, dtype, shape) in batch.items():
        picked = tensors[name][[min(first + row, samples - 1) for row in range(count)]]
        assert (content, dtype, shape) == (picked.tobytes(), picked.dtype.name, list(picked.shape))


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=80), cut=st.integers(0, 200), whole=st.booleans())
def test_broken_tensor_files_are_refused_as_bad_input(tmp_path_factory, data, cut, whole):
    good = safetensors.save({"x": np.zeros((3, 4), np.float32)})
    path = tmp_path_factory.mktemp("tensors") / "t"
    path.write_bytes(data if whole else good[: min(cut, len(good) - 1)])
    with pytest.raises(runner.Refusal) as caught:
        runner.TensorFile(str(path))
    assert caught.value.kind == "bad-input"


def write_outputs(path: Path, rows: np.ndarray, batch: int) -> dict[str, np.ndarray]:
    def piece(start):
        part = rows[[min(start + row, len(rows) - 1) for row in range(batch)]]
        return {"y": (part.tobytes(), part.dtype.name, part.shape)}

    file = runner.OutputFile(str(path), len(rows), batch, piece(0))
    for start in range(0, len(rows), batch):
        file.write(start, piece(start))
    file.close()
    return safetensors.load_file(path)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.lists(st.integers(1, 3), max_size=2), st.sampled_from(DTYPES))
def test_outputs_written_batch_by_batch_are_read_back_whole(tmp_path_factory, samples, batch, shape, dtype):
    rows = np.random.default_rng(0).integers(0, 2, (samples, *shape)).astype(dtype)
    read = write_outputs(tmp_path_factory.mktemp("outputs") / "o", rows, batch)
    np.testing.assert_array_equal(read["y"], rows)
    assert read["y"].dtype == rows.dtype


def test_output_without_a_batch_axis_is_one_sample_when_the_batch_is_one(tmp_path):
    answer = {"y": (np.arange(3, dtype=np.float32).tobytes(), "float32", [3])}
    file = runner.OutputFile(str(tmp_path / "o"), 2, 1, answer)
    file.write(0, answer)
    file.write(1, answer)
    file.close()
    np.testing.assert_array_equal(safetensors.load_file(tmp_path / "o")["y"], [[0, 1, 2], [0, 1, 2]])


def test_output_without_a_batch_axis_is_refused_for_a_larger_batch(tmp_path):
    with pytest.raises(runner.Refusal, match=r"shape \[3\], whose first axis is not the batch of 2"):
        runner.OutputFile(str(tmp_path / "o"), 2, 2, {"y": (bytes(12), "float32", [3])})


def test_output_that_changes_its_shape_is_refused(tmp_path):
    file = runner.OutputFile(str(tmp_path / "o"), 2, 1, {"y": (bytes(12), "float32", [1, 3])})
    with pytest.raises(runner.Refusal, match=r"changes its shape from \[1, 3\] to \[1, 2\]"):
        file.write(1, {"y": (bytes(8), "float32", [1, 2])})
    file.close()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_nan_is_found_and_infinity_is_not_nan(dtype):
    values = np.array([np.inf, 1.0, -np.inf], dtype)
    assert not runner.has_nan(values.tobytes(), dtype)
    values[1] = np.nan
    assert runner.has_nan(values.tobytes(), dtype)
    assert not runner.has_nan(b"\xff\xff", "uint8")
