"""The runner: everything that happens on the device. One file, standard library only, Python >= 3.8.

Two roles, both speaking one JSON object per line:

* `runner.py agent --root DIR` lives as long as a lease. It answers the host on stdin/stdout and never loads a runtime.
* `runner.py visit --root DIR` is a fresh child of the agent: it loads one session and times it.

A third, `runner.py facts`, prints what the device is and ends; it takes no lease.

Both move the protocol away from descriptors 0 and 1 first, so that a runtime that prints from C++ cannot corrupt it.

Commands are {"id": n, "do": ...}; each gets one {"id": n, "event": "answer" | "error", ...}. While a command lasts,
{"event": "heartbeat"} goes out every two seconds, also during a burst: one wake-up of another process in two seconds
is far below what can be measured, and without it the host could not tell a slow model from a dead device.

A job is {"session", "artifact", "inputs": sha256, "options": {...}, "batch": n, "warm_up": {"window", "tolerance",
"cap_s"}}. Files lie in DIR/objects/<sha256>; the answers of a model in DIR/outputs/<sha256>. What takes minutes says
{"event": "progress", "text", "done", "total"} meanwhile. Tensors are in the safetensors format: a little-endian length,
a JSON header, bytes. Nothing is ever unpickled.
"""

import argparse
import array
import collections
import contextlib
import ctypes
import errno
import fcntl
import gc
import glob
import hashlib
import importlib.machinery
import importlib.util
import json
import math
import os
import platform
import re
import selectors
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import threading
import time
import traceback

PROTOCOL = 1
HEARTBEAT_S = 2.0
STDERR_LINES = 20
# A part that is older than this belongs to an upload whose host has died.
STALE_PART_S = 3600.0

SHA256 = re.compile(r"[0-9a-f]{64}")
PART = re.compile(r"[0-9a-f]{64}\.part-[0-9a-f]+")

# safetensors name -> (our name, bytes per element)
DTYPES = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "I64": ("int64", 8), "I32": ("int32", 4),
    "I16": ("int16", 2), "I8": ("int8", 1), "U8": ("uint8", 1), "BOOL": ("bool", 1),
}  # fmt: skip
SAFETENSORS_NAMES = {name: key for key, (name, _) in DTYPES.items()}

# MIDR part numbers of Arm Ltd. (implementer 0x41), from the Technical Reference Manuals.
ARM_PARTS = {
    0xD03: "Cortex-A53", 0xD04: "Cortex-A35", 0xD05: "Cortex-A55", 0xD07: "Cortex-A57", 0xD08: "Cortex-A72",
    0xD09: "Cortex-A73", 0xD0A: "Cortex-A75", 0xD0B: "Cortex-A76", 0xD0C: "Neoverse-N1", 0xD0D: "Cortex-A77",
    0xD40: "Neoverse-V1", 0xD41: "Cortex-A78", 0xD42: "Cortex-A78AE", 0xD44: "Cortex-X1", 0xD46: "Cortex-A510",
    0xD47: "Cortex-A710", 0xD48: "Cortex-X2", 0xD49: "Neoverse-N2", 0xD4F: "Neoverse-V2", 0xD83: "Neoverse-V3AE",
    0xD84: "Neoverse-V3",
}  # fmt: skip

# Tegra, as the device tree names it -> its GPU's name and compute capability (CUDA C++ Programming Guide).
TEGRA_GPUS = {
    "nvidia,tegra210": ("Tegra X1", "5.3"), "nvidia,tegra186": ("Tegra X2", "6.2"),
    "nvidia,tegra194": ("Xavier", "7.2"), "nvidia,tegra234": ("Orin", "8.7"), "nvidia,tegra264": ("Thor", "11.0"),
}  # fmt: skip
# Release of Jetson Linux -> JetPack (NVIDIA's JetPack archive), for boards without the package nvidia-jetpack.
JETPACKS = {
    "35.1.0": "5.0.2", "35.2.1": "5.1", "35.3.1": "5.1.1", "35.4.1": "5.1.2", "35.5.0": "5.1.3", "35.6.0": "5.1.4",
    "36.3.0": "6.0", "36.4.0": "6.1", "36.4.3": "6.2", "36.4.4": "6.2.1", "38.2.0": "7.0", "38.4.0": "7.1",
}  # fmt: skip
# Programs of boards that say what their kernel does not.
BOARD_TOOLS = ("vcgencmd", "nvpmodel", "jetson_clocks", "tegrastats")


class Refusal(Exception):
    """A command that could not be done; its text is a sentence, `kind` a word for programs."""

    def __init__(self, kind, message, stderr_tail=""):
        super().__init__(message)
        self.kind = kind
        self.stderr_tail = stderr_tail


class HostGone(Exception):
    """The other end of our stdin is closed: nobody is waiting for an answer any more."""


# ---------------------------------------------------------------------------------------------------- the protocol


def own_descriptors():
    """Return (commands, answers): private copies of descriptors 0 and 1, which then become /dev/null and stderr."""
    commands = os.dup(0)
    answers = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return commands, os.fdopen(answers, "w", encoding="utf-8", newline="\n")


def say(answers, **event):
    """Write one event as one line."""
    answers.write(json.dumps(event, allow_nan=False, separators=(",", ":")) + "\n")
    answers.flush()


def explain(error):
    """Return (kind, sentence) for an exception that a command ended with."""
    if isinstance(error, Refusal):
        return error.kind, str(error)
    if isinstance(error, MemoryError):
        return "out-of-memory", "the device ran out of memory" + (": %s" % error if str(error) else "")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "disk-full", "the device's disk is full (%s); free some space there" % error
    if isinstance(error, OSError):
        return "device-io", "the device's operating system refused: %s" % error
    return "internal", "the runner failed, which is a bug: %s" % told(error)


# ---------------------------------------------------------------------------------------------------- the device


def read_text(sysroot, path):
    """Return a small file of /proc or /sys without surrounding blanks, or None where it is not available."""
    try:
        with open(os.path.join(sysroot, path), "rb") as stream:
            return stream.read().decode("utf-8", "replace").strip().strip("\0")
    except OSError:  # absent, or present and unreadable (a powered-down thermal zone): both mean "not available"
        return None


def read_number(sysroot, path, scale=1.0):
    """Return a file's first word as a number times `scale`, or None."""
    words = (read_text(sysroot, path) or "").split()
    return number(words[0], scale) if words else None


def number(text, scale=1.0):
    """Return a text as a finite number times `scale`, or None."""
    try:
        value = float(text) * scale
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def read_table(sysroot, path, separator):
    """Return the lines "key SEPARATOR value" of a file as a list of pairs."""
    lines = (read_text(sysroot, path) or "").splitlines()
    return [(key.strip(), value.strip()) for key, mark, value in (line.partition(separator) for line in lines) if mark]


def read_kib(sysroot, path, key):
    """Return "key: n kB" of a file in bytes, or None."""
    for found, value in read_table(sysroot, path, ":"):
        if found == key and value.split()[:1] and value.split()[0].isdigit():
            return int(value.split()[0]) * 1024
    return None


def cpu_model(sysroot):
    """Return the processor's name: what x86 says itself, or board and core of an Arm, or ""."""
    cpu = {}
    for key, value in read_table(sysroot, "proc/cpuinfo", ":"):
        cpu.setdefault(key, value)
    if not cpu.get("model name", "ARM").startswith("ARM"):  # "ARMv8 Processor rev 1 (v8l)" says nothing
        return cpu["model name"]
    board = read_text(sysroot, "sys/firmware/devicetree/base/model") or cpu.get("Model", "")
    core = ""
    if cpu.get("CPU implementer") == "0x41" and "CPU part" in cpu:
        known = {"0x%03x" % part: name for part, name in ARM_PARTS.items()}
        core = known.get(cpu["CPU part"].lower(), "Arm part " + cpu["CPU part"])
    if cpu.get("CPU implementer") == "0x4e":  # NVIDIA
        core = {"0x003": "Denver 2", "0x004": "Carmel"}.get(cpu.get("CPU part"), "")
    return "%s (%s)" % (board, core) if board and core else board or core


def read_facts(sysroot="/"):
    """Return what the device is, in the words of the host's record DeviceFacts."""
    cpuinfo = read_table(sysroot, "proc/cpuinfo", ":")
    features = [value for key, value in cpuinfo if key in ("flags", "Features")]
    release = dict(read_table(sysroot, "etc/os-release", "="))
    return {
        **read_nvidia(sysroot),
        "hostname": read_text(sysroot, "proc/sys/kernel/hostname") or platform.node(),
        "machine": platform.machine(),
        "system": platform.system(),
        "kernel": read_text(sysroot, "proc/sys/kernel/osrelease") or platform.release(),
        "os_name": release.get("PRETTY_NAME", "").strip("\"'"),
        "libc": " ".join(part for part in platform.libc_ver() if part),
        "python": platform.python_version(),
        "cpu_model": cpu_model(sysroot),
        "isa": features[0].split() if features else [],
        "cores": sum(key == "processor" for key, _ in cpuinfo) or os.cpu_count() or 1,
        "memory_bytes": read_kib(sysroot, "proc/meminfo", "MemTotal"),
        "boot_id": read_text(sysroot, "proc/sys/kernel/random/boot_id") or "",
    }


def per_core(sysroot, name):
    """Return a cpufreq file's text for every core that has one, in the order of the cores, or None."""
    found = glob.glob(os.path.join(sysroot, "sys/devices/system/cpu/cpu[0-9]*/cpufreq", name))
    found.sort(key=lambda path: int(re.findall(r"/cpu(\d+)/", path)[-1]))
    texts = [read_text("/", os.path.abspath(path)) for path in found]
    return texts if texts and all(texts) else None


def read_temperatures(sysroot):
    """Return thermal zone -> degrees Celsius, or None; zones of one type are told apart by "#2", "#3" ..."""
    zones = {}
    for folder in sorted(glob.glob(os.path.join(sysroot, "sys/class/thermal/thermal_zone*"))):
        celsius = read_number(folder, "temp", 1e-3)
        # Tegra says -256 °C of a sensor whose rail is off; 0 °C is a zone that is not wired up on several boards.
        if celsius is None or celsius <= -200:
            continue
        kind = read_text(folder, "type") or os.path.basename(folder)
        # A placeholder of Jetson's device trees: the chip only interrupts, and the zone always says 50 or 100 °C.
        if kind == "PMIC-Die":
            continue
        count = sum(name.split("#")[0] == kind for name in zones)
        zones[kind if not count else "%s#%d" % (kind, count + 1)] = celsius
    return zones or None


def read_throttled(sysroot, vcgencmd=None):
    """Return whether the board says that it is throttled or under-voltage now; None where no board says so.

    Args:
        sysroot: where /sys is.
        vcgencmd: the Raspberry Pi's tool, where there is one; the kernel's file is asked first.
    """
    text = read_text(sysroot, "sys/devices/platform/soc/soc:firmware/get_throttled")
    if text is None and vcgencmd:
        try:
            said = subprocess.run([vcgencmd, "get_throttled"], stdout=subprocess.PIPE, timeout=2, check=False).stdout
        except (OSError, subprocess.TimeoutExpired):
            return None
        text = said.decode("utf-8", "replace").partition("=")[2].strip()
    try:
        # Bits 0-3: under-voltage, frequency capped, throttled, soft temperature limit; bits 16-19: since boot.
        return bool(int(text, 16) & 0xF) if text else None
    except ValueError:
        return None


def read_busy_core_s(sysroot):
    """Return the CPU time that all processes have used since boot, or None."""
    words = (read_text(sysroot, "proc/stat") or "").split("\n")[0].split()
    if len(words) < 8 or words[0] != "cpu":
        return None
    ticks = [number(word) for word in words[1:8]]
    if None in ticks:
        return None
    user, nice, system, _idle, _iowait, irq, softirq = ticks
    # A kernel that keeps this file for compatibility only (a sandbox) says 0: not available.
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK") or None


def read_own_core_s(sysroot, pid):
    """Return the CPU time that one process has used, or None."""
    fields = (read_text(sysroot, "proc/%d/stat" % pid) or "").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if len(fields) > 12 else None


def read_nvidia(sysroot):
    """Return what there is for TensorRT, as far as files say it: no driver is loaded and no program is run."""
    compatible = (read_text(sysroot, "proc/device-tree/compatible") or "").split("\0")
    tegra = next((TEGRA_GPUS[name] for name in compatible if name in TEGRA_GPUS), None)
    gpus = [{"name": tegra[0], "compute_capability": tegra[1], "memory_bytes": None}] if tegra else []
    for path in sorted(glob.glob(os.path.join(sysroot, "proc/driver/nvidia/gpus/*/information"))):
        name = dict(read_table("/", os.path.abspath(path), ":")).get("Model", "")
        gpus += [{"name": name, "compute_capability": "", "memory_bytes": None}] if name and not tegra else []
    driver = re.search(
        r"Kernel Module\b[^\n]*?\s(\d+(?:\.\d+)+)", read_text(sysroot, "proc/driver/nvidia/version") or ""
    )
    l4t = parse_l4t(read_text(sysroot, "etc/nv_tegra_release") or "")
    packages = dpkg_versions(read_text(sysroot, "var/lib/dpkg/status") or "", r"nvidia-jetpack|libnvinfer\d+")
    return {
        "board": read_text(sysroot, "proc/device-tree/model") or "",
        "l4t": l4t,
        "jetpack": packages.pop("nvidia-jetpack", "") or JETPACKS.get(l4t, ""),
        "gpus": gpus,
        "gpu_driver": driver.group(1) if driver else "",
        "cuda": read_cuda(sysroot),
        "tensorrt": read_libnvinfer(sysroot) or max(packages.values(), key=version_key, default=""),
        "tensorrt_bindings": read_bindings(sysroot, sys.path if sysroot == "/" else ()),
    }


def parse_l4t(text):
    """Return "36.4.3" of the first line of /etc/nv_tegra_release, or ""."""
    found = re.search(r"R(\d+) \(release\), REVISION: (\d+(?:\.\d+)*)", text)
    return "%s.%s" % found.groups() if found else ""


def version_key(version):
    """Return what versions are ordered by."""
    return [int(part) for part in re.findall(r"\d{1,9}", version)]


def dpkg_versions(status, pattern):
    """Return package -> upstream version of the installed packages whose whole name fits, from dpkg's status file."""
    versions = {}
    for stanza in status.split("\n\n"):
        name = re.match(r"\s*Package: (%s)\n" % pattern, stanza)
        version = re.search(r"^Version: (?:\d+:)?([0-9.]+)", stanza, re.MULTILINE)
        if name and version and re.search(r"^Status: .* installed$", stanza, re.MULTILINE):
            versions[name.group(1)] = version.group(1)
    return versions


def read_cuda(sysroot):
    """Return the version of the CUDA toolkit that /usr/local/cuda is, or ""."""
    try:
        return str(json.loads(read_text(sysroot, "usr/local/cuda/version.json") or "{}")["cuda"]["version"])
    except (ValueError, KeyError, TypeError, RecursionError):
        old = re.search(r"CUDA Version (\d[\d.]*)", read_text(sysroot, "usr/local/cuda/version.txt") or "")
    folders = [os.path.basename(path) for path in glob.glob(os.path.join(sysroot, "usr/local/cuda-[0-9]*"))]
    return old.group(1) if old else max((name[len("cuda-") :] for name in folders), key=version_key, default="")


def read_libnvinfer(sysroot):
    """Return the version of the newest libnvinfer where the linker looks, by the name of its file, or ""."""
    folders = [
        "usr/lib/*-linux-gnu",
        "usr/lib",
        "usr/lib64",
        "usr/local/lib",
        "usr/local/tensorrt/lib",
        "opt/tensorrt/lib",
    ]
    paths = [path for folder in folders for path in glob.glob(os.path.join(sysroot, folder, "libnvinfer.so.*"))]
    found = [re.search(r"libnvinfer\.so\.(\d+(?:\.\d+)+)$", path) for path in paths]
    return max((match.group(1) for match in found if match), key=version_key, default="")


def read_bindings(sysroot, search_path=()):
    """Return where Python's module for TensorRT is: for which Python, of which version, in which folder.

    Args:
        sysroot: where /usr is.
        search_path: further folders, where this interpreter looks.
    """
    patterns = ["usr/lib/python3*/*-packages", "usr/local/lib/python3*/*-packages"]
    folders = [path for pattern in patterns for path in glob.glob(os.path.join(sysroot, pattern))]
    bindings, seen = [], set()
    for folder in [*sorted(folders), *filter(None, search_path)]:
        for module in ("tensorrt", "tensorrt_bindings"):
            place = os.path.realpath(os.path.join(folder, module))
            if place in seen or not glob.glob(os.path.join(glob.escape(place), "tensorrt*.so")):
                continue
            seen.add(place)
            version = re.search(r"""__version__ = ["']([^"']+)""", read_text(place, "__init__.py") or "")
            bindings.append({
                "python": python_of(folder),
                "version": version.group(1) if version else "",
                "folder": folder,
            })  # fmt: skip
    return bindings


def python_of(folder):
    """Return the Python that a folder of modules is for: by a wheel of TensorRT in it, else by its name, else ""."""
    for wheel in glob.glob(os.path.join(glob.escape(folder), "tensorrt*.dist-info", "WHEEL")):
        tag = re.search(r"^Tag: cp3(\d+)-", read_text("/", os.path.abspath(wheel)) or "", re.MULTILINE)
        if tag:
            return "3." + tag.group(1)
    named = re.findall(r"/python(3\.\d+)/", folder)
    return named[-1] if named else ""


def read_throttle_reasons(sysroot):
    """Return the kernel's thermal limits that hold now, by the names of its cooling devices; None where it has none.

    A fan is no limit. A state of 0 is full speed (Linux, Documentation/driver-api/thermal/sysfs-api.rst); Jetsons have
    "cpu-throttle-alert", "gpu-throttle-alert" ... for the limits that their firmware sets.
    """
    states = {}
    for folder in sorted(glob.glob(os.path.join(sysroot, "sys/class/thermal/cooling_device*"))):
        kind, state = read_text(folder, "type") or "", read_number(folder, "cur_state")
        if state is not None and re.search(r"throttle-alert$|-balanced$|^(thermal-)?(cpufreq|devfreq)", kind):
            states[kind] = max(state, states.get(kind, 0.0))
    return [kind for kind, state in states.items() if state > 0] if states else None


def read_throttle_events(sysroot):
    """Return how often since boot the power supply's guards slowed the board down, or None.

    On Orin oc1 is under-voltage, oc2 the average current and oc3 the instantaneous current (Jetson Linux Developer
    Guide, "Platform Power and Performance"); a guard that only counts is left out.
    """
    events = {}
    for path in sorted(glob.glob(os.path.join(sysroot, "sys/class/hwmon/hwmon*/oc[0-9]*_event_cnt"))):
        folder, name = os.path.split(path)
        guard = name.partition("_")[0]
        count = read_number(folder, name)
        if count is not None and read_number(folder, guard + "_throt_en") != 0:
            events[guard] = events.get(guard, 0) + int(count)
    return events or None


def find_tools():
    """Return the programs of BOARD_TOOLS that are here; a shell over SSH often does not look into /usr/sbin."""
    places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/bin"])
    found = {name: shutil.which(name, path=places) for name in BOARD_TOOLS}
    return {name: path for name, path in found.items() if path}


def ask_tool(argv, timeout_s=5.0):
    """Return what a program prints, or "" when it fails or takes too long."""
    try:
        said = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              timeout=timeout_s, check=True)  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return said.stdout.decode("utf-8", "replace")


def read_board(sysroot, tools):
    """Return power, clocks and fan of a board. Programs are asked only for what the files of a Jetson do not say."""
    gpu = gpu_devfreq(sysroot)
    found = {
        "power_mode": read_power_mode(sysroot, tools.get("nvpmodel")),
        "gpu_clock_hz": read_number(gpu, "cur_freq") if gpu else None,
        "emc_clock_hz": read_emc(sysroot),
        "rails_w": read_rails(sysroot),
        "clocks_fixed": read_clocks_fixed(sysroot, gpu),
        **read_fan(sysroot),
    }
    if read_text(sysroot, "etc/nv_tegra_release") is None:
        return found
    if gpu is None and "jetson_clocks" in tools and os.geteuid() == 0:  # it answers root alone
        said = parse_jetson_clocks(ask_tool([tools["jetson_clocks"], "--show"]))
        found.update((key, said[key]) for key in said if found[key] is None)
    if (found["rails_w"] is None or found["gpu_clock_hz"] is None) and "tegrastats" in tools:
        said = parse_tegrastats(sample_tegrastats(tools["tegrastats"]))
        keys = ("gpu_clock_hz", "emc_clock_hz", "rails_w")
        found.update((key, said[key]) for key in keys if found[key] is None and key in said)
    return found


def gpu_devfreq(sysroot):
    """Return the folder of the GPU's clock, or None: 17000000.ga10b, 17000000.gpu, gpu-gpc-0 (gpu-nvd is its video)."""
    for folder in sorted(glob.glob(os.path.join(sysroot, "sys/class/devfreq/*"))):
        if re.search(r"gpu|gv11b|gp10b|ga10b|gm20b", os.path.basename(folder)) and "nvd" not in os.path.basename(
            folder
        ):
            return folder
    return None


def read_emc(sysroot):
    """Return the clock of the memory's controller in hertz, or None: most kernels tell root alone."""
    for path in ("sys/kernel/debug/bpmp/debug/clk/emc/rate", "sys/kernel/debug/clk/emc/clk_rate",
                 "sys/class/devfreq/bwmgr/cur_freq"):  # fmt: skip
        hertz = read_number(sysroot, path)
        if hertz is not None:
            return hertz
    return None


def read_clocks_fixed(sysroot, gpu):
    """Return whether least and greatest clock of every core, and of the GPU, are one, as jetson_clocks makes them."""
    bounds = [per_core(sysroot, name) for name in ("scaling_min_freq", "scaling_max_freq")]
    if None in bounds:
        return None
    gpu_bounds = [read_number(gpu, name) for name in ("min_freq", "max_freq")] if gpu else [None, None]
    return bounds[0] == bounds[1] and gpu_bounds[0] == gpu_bounds[1]


def read_rails(sysroot):
    """Return supply rail -> watts, or None.

    A current is measured with its sign, and the idle rail of an INA3221 may come out below zero.
    """
    rails = {}
    places = ["sys/class/hwmon/hwmon*", "sys/bus/i2c/drivers/ina3221*/*/hwmon/hwmon*"]
    for folder in sorted(path for place in places for path in glob.glob(os.path.join(sysroot, place))):
        chip = read_text(folder, "name") or ""
        if not chip.startswith("ina"):
            continue
        for channel in (1, 2, 3):
            label = read_text(folder, "in%d_label" % channel)
            millivolt, milliampere = (read_number(folder, form % channel) for form in ("in%d_input", "curr%d_input"))
            if label and label != "NC" and millivolt is not None and milliampere is not None:
                rails.setdefault(label, millivolt * milliampere * 1e-6)
        total = read_number(folder, "power1_input", 1e-6)
        if total is not None:  # an INA238 measures one rail: the board's input
            rails.setdefault(read_text(folder, "in1_label") or chip, total)
    for path in sorted(glob.glob(os.path.join(sysroot, "sys/bus/i2c/drivers/ina3221x/*/iio*device*/rail_name_*"))):
        folder, name = os.path.split(path)  # Jetson Linux up to 32.x
        label, watts = read_text(folder, name), read_number(folder, "in_power%s_input" % name.rpartition("_")[2], 1e-3)
        if label and label != "NC" and watts is not None:
            rails.setdefault(label, watts)
    return rails or None


def read_fan(sysroot):
    """Return the fan's speed in turns a minute and the share of full drive that it gets; None where not said."""
    speed, drive = None, None
    for folder in sorted(glob.glob(os.path.join(sysroot, "sys/class/hwmon/hwmon*"))):
        if "fan" in (read_text(folder, "name") or ""):
            drive = read_number(folder, "pwm1", 1 / 255) if drive is None else drive
        for name in ("rpm", "fan1_input"):
            speed = read_number(folder, name) if speed is None else speed
    return {"fan_rpm": speed, "fan_drive": drive}


def read_power_mode(sysroot, nvpmodel=None):
    """Return the power mode that was chosen, "MODE_30W (2)", or None where there is none.

    Args:
        sysroot: where nvpmodel keeps what was chosen last, and what its modes are called.
        nvpmodel: the program, asked where the file is not there.
    """
    chosen = re.search(r"pmode:\s*(\d{1,6})", read_text(sysroot, "var/lib/nvpmodel/status") or "")
    if chosen:
        modes = re.findall(
            r"POWER_MODEL\s+ID=(\d{1,6})\s+NAME=([^\s>]+)", read_text(sysroot, "etc/nvpmodel.conf") or ""
        )
        name = {int(mode): name for mode, name in modes}.get(int(chosen.group(1)), "mode")
        return "%s (%d)" % (name, int(chosen.group(1)))
    return parse_nvpmodel(ask_tool([nvpmodel, "-q"])) if nvpmodel else None


def parse_nvpmodel(text):
    """Return "MODE_30W (2)" of what `nvpmodel -q` prints, or None."""
    said = re.search(r"NV Power Mode:[ \t]*(\S+)(?:\s+(\d{1,6})\s*$)?", text, re.MULTILINE)
    if not said:
        return None
    return "%s (%d)" % (said.group(1), int(said.group(2))) if said.group(2) else said.group(1)


def parse_jetson_clocks(text):
    """Return clocks_fixed, gpu_clock_hz, emc_clock_hz and power_mode as far as `jetson_clocks --show` printed them."""
    said, fixed = {}, []
    for unit, least, most, now in re.findall(
        r"^\s*(cpu\d+|GPU|EMC)\b:?.*?MinFreq=(\d+) MaxFreq=(\d+) CurrentFreq=(\d+)", text, re.MULTILINE
    ):
        if unit == "EMC":
            said["emc_clock_hz"] = number(now)
            continue
        fixed.append(least == most)
        if unit == "GPU":
            said["gpu_clock_hz"] = number(now)
    if fixed:
        said["clocks_fixed"] = all(fixed)
    mode = parse_nvpmodel(text)
    return dict(said, power_mode=mode) if mode else said


def sample_tegrastats(path, timeout_s=3.0):
    """Return one line of tegrastats, which prints one every interval for ever; "" when none came in time."""
    try:
        process = subprocess.Popen([path, "--interval", "100"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.DEVNULL)  # fmt: skip
    except OSError:
        return ""
    text, deadline_s = b"", time.monotonic() + timeout_s
    with process, selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while b"\n" not in text and selector.select(max(0.0, deadline_s - time.monotonic())):
            part = os.read(process.stdout.fileno(), 65536)
            if not part:
                break
            text += part
        process.kill()
    return text.partition(b"\n")[0].decode("utf-8", "replace")


def parse_tegrastats(line):
    """Return what a line of tegrastats says, as far as it is there, in SI units.

    Keys: ram_used_bytes, ram_total_bytes, cpu_clocks_hz (of the cores that are on), gpu_load, gpu_clock_hz, emc_load,
    emc_clock_hz, temperatures_celsius, rails_w. A load without root comes without its clock, and a clock with no load
    as "@4266". A rail is "now/average" or "now/average/peak"; a sensor whose rail is off says -256 °C.
    """
    said = {}
    memory = re.search(r"\bRAM (\d+)/(\d+)MB", line)
    if memory:
        used, total = (number(text, 2.0**20) for text in memory.groups())
        if used is not None and total is not None:
            said.update(ram_used_bytes=used, ram_total_bytes=total)
    cores = re.search(r"\bCPU \[([^\]]*)\](?:@(\d+))?", line)
    if cores:
        clocks = re.findall(r"%@(\d+)", cores.group(1)) or [cores.group(2)] * cores.group(1).count("%")
        said["cpu_clocks_hz"] = [number(clock, 1e6) for clock in clocks if clock]
    for unit, name in (("gpu", "GR3D_FREQ"), ("emc", "EMC_FREQ")):
        found = re.search(r"\b%s (?:(\d+)%%)?(?:@\[?(\d+))?" % name, line)
        load, clock = found.groups() if found else (None, None)
        said[unit + "_load"] = number(load, 1e-2) if load else None
        said[unit + "_clock_hz"] = number(clock, 1e6) if clock else None
    celsius = {zone: number(text) for zone, text in re.findall(r"\b(\w+)@(-?\d+(?:\.\d+)?)C\b", line)}
    said["temperatures_celsius"] = {
        zone: value for zone, value in celsius.items() if value is not None and value > -200
    }
    watts = {rail: number(text, 1e-3) for rail, text in re.findall(r"\b([A-Z]\w*) (-?\d+)mW\b", line) if rail != "NC"}
    said["rails_w"] = {rail: value for rail, value in watts.items() if value is not None}
    return {key: value for key, value in said.items() if value not in (None, {}, [])}


def read_conditions(sysroot="/", tools=None):
    """Return the device's state now, in the words of the host's record Conditions (without own_core_s).

    Args:
        sysroot: where /proc and /sys are.
        tools: the programs of BOARD_TOOLS that are there: name -> path.
    """
    tools = tools or {}
    clocks = [number(clock, 1e3) for clock in per_core(sysroot, "scaling_cur_freq") or [""]]
    reasons = read_throttle_reasons(sysroot)
    flags = [flag for flag in (read_throttled(sysroot, tools.get("vcgencmd")), reasons) if flag is not None]
    return {
        **read_board(sysroot, tools),
        "monotonic_s": time.monotonic(),
        "cpu_clocks_hz": None if None in clocks else clocks,
        "governors": per_core(sysroot, "scaling_governor"),
        "temperatures_celsius": read_temperatures(sysroot),
        "throttled": any(flags) if flags else None,
        "throttle_reasons": reasons,
        "throttle_events": read_throttle_events(sysroot),
        "load_1min": read_number(sysroot, "proc/loadavg"),
        "busy_core_s": read_busy_core_s(sysroot),
        "free_memory_bytes": read_kib(sysroot, "proc/meminfo", "MemAvailable"),
    }


# ---------------------------------------------------------------------------------------------------- files


def digest_of(path, beat=lambda: None):
    """Return a file's SHA-256; `beat` is called now and then, because a large file on a slow card takes a while."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for chunk in iter(lambda: stream.read(1 << 20), b""):
            digest.update(chunk)
            beat()
    return digest.hexdigest()


def object_path(root, digest):
    """Return where an object is.

    Raises:
        Refusal: not a digest, or not here.
    """
    if not isinstance(digest, str) or not SHA256.fullmatch(digest):
        raise Refusal("bad-command", "%r is not a SHA-256 digest" % (digest,))
    path = os.path.join(root, "objects", digest)
    if not os.path.isfile(path):
        raise Refusal("missing-object", "the object %s is not on the device; ship it first" % digest)
    return path


class TensorFile:
    """A safetensors file with one tensor per model input; the first axis of each counts samples."""

    def __init__(self, path):
        self.stream = open(path, "rb")  # noqa: SIM115 - kept open as long as the visit lives
        try:
            (length,) = struct.unpack("<Q", self.stream.read(8))
            header = json.loads(self.stream.read(length).decode("utf-8"))
            self.base = 8 + length
            self.tensors = {}
            for name, entry in header.items():
                if name != "__metadata__":
                    dtype, size = DTYPES[entry["dtype"]]
                    shape, (begin, end) = [int(n) for n in entry["shape"]], entry["data_offsets"]
                    if (
                        end - begin != size * math.prod(shape)
                        or end + self.base > os.fstat(self.stream.fileno()).st_size
                    ):
                        raise ValueError("tensor %r does not fill its place" % name)  # fmt: skip
                    self.tensors[name] = (dtype, size, shape, begin)
        except (struct.error, ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError) as error:
            self.stream.close()
            raise Refusal("bad-input", "the inputs file is not a whole safetensors file: %r" % error) from error
        counts = sorted({shape[0] if shape else 0 for _, _, shape, _ in self.tensors.values()})
        if len(counts) != 1 or counts[0] < 1:
            raise Refusal("bad-input", "the inputs must have the same number of samples, at least 1, not %s" % counts)
        self.samples = counts[0]

    def rows(self, first, count):
        """Return {name: (bytes, dtype, shape)} of `count` samples; past the end the last one is repeated.

        Raises:
            Refusal: an input holds NaN, which would make every later comparison meaningless.
        """
        real = min(count, self.samples - first)
        batch = {}
        for name, (dtype, size, shape, begin) in self.tensors.items():
            stride = size * math.prod(shape[1:])
            self.stream.seek(self.base + begin + first * stride)
            data = self.stream.read(real * stride)
            data += data[(real - 1) * stride :] * (count - real)
            if has_nan(data, dtype):
                raise Refusal(
                    "bad-input",
                    "input %r holds NaN in its samples %d to %d; fix the data" % (name, first, first + real - 1),
                )
            batch[name] = (data, dtype, [count] + shape[1:])  # noqa: RUF005 - reads as a shape
        return batch


def has_nan(data, dtype):
    """Return whether an array of floats holds NaN."""
    if dtype == "float16":
        values = struct.unpack("<%de" % (len(data) // 2), data)
    elif dtype in ("float32", "float64"):
        values = array.array("f" if dtype == "float32" else "d", data)
    else:
        return False
    total = sum(values)  # at C speed; NaN stays NaN, and so does inf - inf, which is legal
    return total != total and any(value != value for value in values)  # noqa: PLR0124 - the test for NaN


class OutputFile:
    """A safetensors file that is written batch by batch, so that memory stays bounded."""

    def __init__(self, path, samples, batch, first):
        """Lay the file out by the outputs of the first batch: {name: (bytes, dtype, shape)}."""
        self.samples, self.batch = samples, batch
        self.rows = {}
        header, end = {}, 0
        for name, (data, dtype, shape) in first.items():
            # A fixed batch of one may come out without a batch axis; then every output is one sample.
            row = list(shape[1:]) if shape and shape[0] == batch else list(shape) if batch == 1 else None
            if row is None:
                raise Refusal(
                    "bad-output",
                    "output %r has the shape %s, whose first axis is not the batch of %d; measure with batch 1"
                    % (name, list(shape), batch),
                )
            stride = len(data) // batch
            self.rows[name] = (dtype, list(shape), stride, end)
            header[name] = {
                "dtype": SAFETENSORS_NAMES[dtype],
                "shape": [samples] + row,  # noqa: RUF005 - reads as a shape
                "data_offsets": [end, end + samples * stride],
            }
            end += samples * stride
        text = json.dumps(header).encode("utf-8")
        text += b" " * (-len(text) % 8)
        self.base = 8 + len(text)
        self.stream = open(path, "wb")  # noqa: SIM115 - closed by close()
        self.stream.write(struct.pack("<Q", len(text)) + text)

    def write(self, first, outputs):
        """Write the outputs of the batch that starts at sample `first`."""
        for name, (data, dtype, shape) in outputs.items():
            known_dtype, known_shape, stride, begin = self.rows[name]
            if (dtype, list(shape)) != (known_dtype, known_shape):
                raise Refusal(
                    "bad-output",
                    "output %r changes its shape from %s to %s between samples" % (name, known_shape, list(shape)),
                )
            self.stream.seek(self.base + begin + first * stride)
            self.stream.write(data[: min(self.batch, self.samples - first) * stride])

    def close(self):
        """Write everything out to the disk."""
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.stream.close()


# ---------------------------------------------------------------------------------------------------- a visit


def load_device_half(path):
    """Return the module of a session.py or builder.py, importing its runtime.

    Raises:
        Refusal: this interpreter does not have the runtime.
    """
    loader = importlib.machinery.SourceFileLoader("edgedeploy_device_half", path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    sys.modules[loader.name] = module
    sys.dont_write_bytecode = True  # the file's name is its digest; no cache may appear beside it
    here = "%s (Python %s)" % (sys.executable, platform.python_version())
    then = 'install it for that interpreter, or name the one that has it as python = "..." of this device in lab.toml'
    try:
        loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise Refusal("missing-runtime", "%s has no module %r; %s" % (here, error.name, then)) from error
    except Exception as error:
        what = str(error) if getattr(error, "says_what_to_do", False) else "%s; %s" % (told(error), then)
        raise Refusal("missing-runtime", "%s cannot load the runtime: %s" % (here, what)) from error
    return module


def told(error):
    """Return an exception's type and text in one line."""
    return "%s: %s" % (type(error).__name__, " ".join(str(error).split()))


class VisitChild:
    """One loaded session, or one builder at work, in a process of its own."""

    def __init__(self, root, answers):
        self.root, self.answers = root, answers
        self.session = None
        self.closing = contextlib.ExitStack()
        self.telling = threading.Lock()

    def load(self, job):
        """Import the runtime, load the artifact, bind the first batch and infer once; return what it took."""
        session_path, artifact, inputs = (object_path(self.root, job[key]) for key in ("session", "artifact", "inputs"))
        self.batch = int(job["batch"])
        self.inputs = TensorFile(inputs)
        first_batch = self.inputs.rows(0, self.batch)
        started_s = time.perf_counter()
        session_class = load_device_half(session_path).Session
        imported_s = time.perf_counter()
        self.import_rss_bytes = read_kib("/", "proc/self/status", "VmHWM")
        try:
            load_started_s = time.perf_counter()
            self.session = self.closing.enter_context(session_class(artifact, job["options"]))
            loaded_s = time.perf_counter()
        except MemoryError:
            raise
        except Exception as error:
            raise Refusal("bad-artifact", "the runtime could not load the artifact: %s" % told(error)) from error
        self.bind(first_batch)
        first_ns = self.timed(1)[0]
        # What was allocated so far is never looked at again; while we time, nothing is collected at all.
        gc.collect()
        gc.freeze()
        gc.disable()
        return {
            "runtime": self.session.runtime,
            "boundary": dict(self.session.boundary(), batch=self.batch),
            "import_s": imported_s - started_s,
            "load_s": loaded_s - load_started_s,
            "first_inference_ns": first_ns,
        }

    def bind(self, batch):
        """Hand a batch to the session."""
        try:
            self.session.bind(batch)
        except (ValueError, TypeError, KeyError) as error:
            raise Refusal("bad-input", "the artifact does not take these inputs: %s" % told(error)) from error
        except RuntimeError as error:
            raise Refusal("runtime-error", "the runtime failed while it took its inputs: %s" % told(error)) from error

    def timed(self, count, lead_in=0):
        """Return the nanoseconds of each of `count` inferences after `lead_in` that are not counted.

        Nothing but the inference and one read of the clock happens between two samples.
        """
        infer, clock = self.session.infer, time.perf_counter_ns
        samples_ns = [0] * count
        try:
            for _ in range(lead_in):
                infer()
            for number in range(count):
                start = clock()
                infer()
                samples_ns[number] = clock() - start
        except MemoryError:
            raise
        except Exception as error:
            raise Refusal("runtime-error", "the runtime failed while it computed: %s" % told(error)) from error
        return samples_ns

    def warm_up(self, window, tolerance, cap_s):
        """Infer until two adjacent windows' medians agree, or until `cap_s` has passed.

        Returns:
            (samples_ns, is_steady).
        """
        samples_ns = []
        deadline_s = time.monotonic() + cap_s
        while time.monotonic() < deadline_s:
            samples_ns += self.timed(1)
            if len(samples_ns) % window == 0 and len(samples_ns) >= 2 * window:
                before = statistics.median(samples_ns[-2 * window : -window])
                after = statistics.median(samples_ns[-window:])
                if abs(after - before) <= tolerance * min(before, after):
                    return samples_ns, True
        return samples_ns, False

    def open(self, job):
        """Load, infer once and warm up."""
        answer = self.load(job)
        samples_ns, is_steady = self.warm_up(**job["warm_up"])
        return dict(answer, warm_up_ns=samples_ns, is_steady=is_steady)

    def burst(self, count, lead_in):
        """Time consecutive inferences."""
        return {"samples_ns": self.timed(count, lead_in)}

    def memory(self, job, count):
        """Return the kernel's high-water marks after importing the runtime and after `count` inferences."""
        answer = self.load(job)
        self.timed(count)
        peak_rss_bytes = read_kib("/", "proc/self/status", "VmHWM")
        if peak_rss_bytes is None or self.import_rss_bytes is None:
            raise Refusal("not-available", "the device's kernel does not say VmHWM in /proc/self/status")
        return dict(answer, peak_rss_bytes=peak_rss_bytes, import_rss_bytes=self.import_rss_bytes)

    def profile(self, job, count):
        """Return what each operator takes, as the runtime says; watching them makes an inference slower."""
        answer = self.load(job)
        if not hasattr(self.session, "profile"):
            raise Refusal("not-available", "%s does not say what single operators take" % answer["runtime"])
        try:
            layers = self.session.profile(count)
        except NotImplementedError as error:
            raise Refusal("not-available", str(error)) from error
        except RuntimeError as error:
            raise Refusal("runtime-error", "the runtime failed while it was watched: %s" % told(error)) from error
        return dict(answer, layers=[{"name": name, "kind": kind, "p50_s": p50_s} for name, kind, p50_s in layers])

    def outputs(self, job):
        """Run every sample once, batch by batch, and write the answers to outputs/<sha256>."""
        answer = self.load(job)
        gc.enable()
        part = os.path.join(self.root, "outputs", "%d.part" % os.getpid())
        try:
            is_repeatable = self.write_outputs(part)
            digest = digest_of(part)
            path = os.path.join(self.root, "outputs", digest)
            os.replace(part, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part)
            raise
        return dict(
            answer,
            sha256=digest,
            path=path,
            size_bytes=os.path.getsize(path),
            samples=self.inputs.samples,
            is_repeatable=is_repeatable,
        )

    def write_outputs(self, part):
        """Write the outputs of all samples; return whether the first batch gave the same bytes a second time."""
        first = self.answers_to(0)
        is_repeatable = self.answers_to(0) == first
        file = OutputFile(part, self.inputs.samples, self.batch, first)
        for start in range(0, self.inputs.samples, self.batch):
            file.write(start, self.answers_to(start) if start else first)
        file.close()
        return is_repeatable

    def answers_to(self, start):
        """Return the outputs for the batch that starts at sample `start`; a short last batch is filled up."""
        self.bind(self.inputs.rows(start, self.batch))
        self.timed(1)
        return self.session.outputs()

    def probe(self, builder):
        """Ask a builder what is here."""
        return {"found": load_device_half(object_path(self.root, builder)).probe()}

    def build(self, job):
        """Have a builder make files from shipped ones; each that it made gets its digest for a name.

        A job is {"builder": sha256, "files": {name: sha256}, "options": {...}}. A builder has probe() -> dict and
        build(files, options, folder, tell) -> (report, {name: file in folder}); tell(text, done=None, total=None) may
        be called from any thread.
        """
        builder = load_device_half(object_path(self.root, job["builder"]))
        files = {name: object_path(self.root, digest) for name, digest in job["files"].items()}
        folder = os.path.join(self.root, "building", str(os.getpid()))
        os.makedirs(folder)
        try:
            report, made = builder.build(files, job["options"], folder, self.tell)
            return {"report": report, "made": {name: self.keep(os.path.join(folder, made[name])) for name in made}}
        except (MemoryError, OSError):
            raise
        except Exception as error:
            raise Refusal(getattr(error, "kind", "build-failed"), str(error) or told(error)) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def keep(self, path):
        """Move a file to the objects; return its digest and size."""
        digest = digest_of(path)
        kept = os.path.join(self.root, "objects", digest)
        os.replace(path, kept)
        return {"sha256": digest, "size_bytes": os.path.getsize(kept)}

    def tell(self, text, done=None, total=None):
        """Send progress to the host, between a command and its answer."""
        with self.telling:
            say(self.answers, event="progress", text=text, done=done, total=total)

    def close(self):
        """Close the session."""
        self.closing.close()
        return {}


def die_with_parent(parent):
    """Ask the kernel to kill us when the agent dies, however it dies."""
    if sys.platform.startswith("linux"):
        pr_set_pdeathsig = 1  # linux/prctl.h
        if ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it died before we asked
        sys.exit(1)


def serve_visit(root, parent):
    """Play the role of a visit: answer the agent's commands until it closes our stdin."""
    die_with_parent(parent)
    commands, answers = own_descriptors()
    child = VisitChild(root, answers)
    verbs = {"open": child.open, "burst": child.burst, "memory": child.memory, "outputs": child.outputs,
             "profile": child.profile, "probe": child.probe, "build": child.build, "close": child.close}  # fmt: skip
    with os.fdopen(commands, "r", encoding="utf-8") as lines:
        for line in lines:
            command = json.loads(line)
            try:
                answer = verbs[command.pop("do")](**command)
            except Exception as error:
                kind, message = explain(error)
                if kind == "internal":
                    traceback.print_exc()
                say(answers, event="error", kind=kind, message=message)
            else:
                say(answers, event="answer", **answer)


# ---------------------------------------------------------------------------------------------------- the agent


class Child:
    """The agent's end of a visit: its process, its unread lines and the end of its stderr."""

    def __init__(self, root, selector):
        self.selector = selector
        self.lines = collections.deque()
        self.unfinished = b""
        self.noise = b""
        self.is_silent = False
        self.process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), "visit", "--root", root, "--parent", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a group of its own: what a runtime starts dies with it
        )
        selector.register(self.process.stdout, selectors.EVENT_READ, self.hear_answer)
        selector.register(self.process.stderr, selectors.EVENT_READ, self.hear_noise)

    def hear_answer(self, data):
        """Take what came on its protocol pipe; nothing means that it has ended."""
        if not data:
            self.is_silent = True
            self.selector.unregister(self.process.stdout)
            return
        *lines, self.unfinished = (self.unfinished + data).split(b"\n")
        self.lines.extend(lines)

    def hear_noise(self, data):
        """Keep the end of what it prints."""
        if not data:
            self.selector.unregister(self.process.stderr)
        self.noise = (self.noise + data)[-16384:]

    def stderr_tail(self):
        """Return the last lines that it printed."""
        return "\n".join(self.noise.decode("utf-8", "replace").splitlines()[-STDERR_LINES:])

    def tell(self, command):
        """Send a command; a child that is gone shows by its silence."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(command).encode("utf-8") + b"\n")
            self.process.stdin.flush()

    def kill(self):
        """End it and everything that it started, and take back its descriptors; return its exit status."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        status = self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            with contextlib.suppress(KeyError, ValueError):
                self.selector.unregister(stream)
            stream.close()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        return status


def how_it_ended(status):
    """Say an exit status in words."""
    if status >= 0:
        return "ended with exit status %d" % status
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = "signal %d" % -status
    hint = " (often the kernel's out-of-memory killer)" if name == "SIGKILL" else ""
    return "was killed by %s%s" % (name, hint)


class Agent:
    """Answers the host: keeps files, starts visits, relays their answers, and lets none of them live on."""

    def __init__(self, root, commands, answers, idle_s):
        self.root, self.answers, self.idle_s = root, answers, idle_s
        self.tools = find_tools()
        self.children = {}
        self.inbox = collections.deque()
        self.unfinished = b""
        self.current_id = None
        self.next_beat_s = 0.0
        self.selector = selectors.DefaultSelector()
        self.selector.register(commands, selectors.EVENT_READ, self.hear_host)

    def hear_host(self, data):
        """Take what the host sent."""
        if not data:
            raise HostGone
        *lines, self.unfinished = (self.unfinished + data).split(b"\n")
        self.inbox.extend(lines)

    def turn(self, timeout_s):
        """Wait for the host or a child to say something, and take it."""
        for key, _ in self.selector.select(timeout_s):
            key.data(os.read(key.fd, 65536))

    def beat(self):
        """Show the host that we live, at most every HEARTBEAT_S, while it waits for an answer."""
        if time.monotonic() >= self.next_beat_s:
            self.next_beat_s = time.monotonic() + HEARTBEAT_S
            say(self.answers, event="heartbeat")

    def serve(self):
        """Answer commands until the host says bye, goes away, or is silent for too long."""
        verbs = {"have": self.have, "commit": self.commit, "conditions": self.conditions, "open": self.open,
                 "bursts": self.bursts, "memory": self.memory, "outputs": self.outputs, "profile": self.profile,
                 "probe": self.probe, "build": self.build, "close": self.close}  # fmt: skip
        try:
            while True:
                command = self.next_command()
                number, verb = command.pop("id", None), command.pop("do", None)
                self.next_beat_s = time.monotonic() + HEARTBEAT_S
                if verb == "bye":
                    say(self.answers, id=number, event="answer")
                    return
                try:
                    if verb not in verbs:
                        raise Refusal("bad-command", "the runner knows no command %r" % (verb,))
                    answer = verbs[verb](**command)
                except HostGone:
                    raise
                except Exception as error:
                    kind, message = explain(error)
                    tail = getattr(error, "stderr_tail", "")
                    if kind == "internal":
                        tail = traceback.format_exc()
                    say(self.answers, id=number, event="error", kind=kind, message=message, stderr_tail=tail)
                else:
                    say(self.answers, id=number, event="answer", **answer)
        finally:
            for child in self.children.values():
                child.kill()

    def next_command(self):
        """Return the host's next command.

        A host whose network vanished without a word never closes our stdin: after `idle_s` we give the device back.
        """
        deadline_s = time.monotonic() + self.idle_s
        while not self.inbox:
            if time.monotonic() >= deadline_s:
                raise HostGone
            self.turn(deadline_s - time.monotonic())
        return json.loads(self.inbox.popleft().decode("utf-8"))

    def have(self, digests):
        """Say which objects are missing; one that is not what its name says is deleted and counts as missing."""
        missing = []
        for digest in digests:
            try:
                path = object_path(self.root, digest)
            except Refusal as refusal:
                if refusal.kind != "missing-object":
                    raise
                missing.append(digest)
                continue
            if digest_of(path, self.beat) != digest:
                os.unlink(path)
                missing.append(digest)
        return {"missing": missing}

    def commit(self, part, sha256):
        """Give an uploaded part its name, if it is what it should be."""
        if not PART.fullmatch(part) or not SHA256.fullmatch(sha256):
            raise Refusal("bad-command", "%r is not the name of a part" % (part,))
        path = os.path.join(self.root, "objects", part)
        if not os.path.isfile(path):
            raise Refusal("missing-object", "the upload %s is not on the device" % part)
        found = digest_of(path, self.beat)
        if found != sha256:
            size = os.path.getsize(path)
            os.unlink(path)
            raise Refusal(
                "corrupt-upload",
                "the upload of %s arrived as something else (%d bytes, digest %s); it was deleted; send it again"
                % (sha256, size, found),
            )
        os.replace(path, os.path.join(self.root, "objects", sha256))
        return {}

    def conditions(self, visits=()):
        """Return the device's state, and the CPU time that the named visits have used."""
        pids = {visit: self.child(visit).process.pid for visit in visits}
        return {
            "conditions": read_conditions("/", self.tools),
            "own_core_s": {visit: read_own_core_s("/", pid) for visit, pid in pids.items()},
        }

    def child(self, visit):
        """Return an open visit."""
        if visit not in self.children:
            raise Refusal("bad-command", "there is no open visit %r" % (visit,))
        return self.children[visit]

    def start(self, visit):
        """Start a fresh process for a visit."""
        if visit in self.children:
            raise Refusal("bad-command", "the visit %r is open already" % (visit,))
        self.children[visit] = Child(self.root, self.selector)

    def open(self, visit, job, timeout_s):
        """Start a visit: load, first inference, warm-up."""
        self.start(visit)
        return self.ask(visit, {"do": "open", "job": job}, timeout_s)

    def bursts(self, visits, count, lead_in, timeout_s):
        """Time bursts of open visits in the order given, without the host between two of them.

        A visit may be named often: so that two sides alternate within milliseconds, however far away the host is.
        """
        command = {"do": "burst", "count": count, "lead_in": lead_in}
        samples_ns = []
        for visit in visits:
            try:
                samples_ns.append(self.ask(visit, command, timeout_s)["samples_ns"])
            except Refusal as refusal:
                refusal.args = ("visit %r: %s" % (visit, refusal),)
                raise
        return {"samples_ns": samples_ns}

    def memory(self, visit, job, count, timeout_s):
        """Measure memory in a visit of its own."""
        return self.alone(visit, {"do": "memory", "job": job, "count": count}, timeout_s)

    def profile(self, visit, job, count, timeout_s):
        """Have operators timed one by one, in a visit of its own."""
        return self.alone(visit, {"do": "profile", "job": job, "count": count}, timeout_s)

    def outputs(self, visit, job, timeout_s):
        """Compute the outputs of all samples in a visit of its own."""
        return self.alone(visit, {"do": "outputs", "job": job}, timeout_s)

    def probe(self, visit, builder, timeout_s):
        """Ask a builder what is here, in a process of its own: a runtime without a driver may crash."""
        return self.alone(visit, {"do": "probe", "builder": builder}, timeout_s)

    def build(self, visit, job, timeout_s):
        """Have a builder make files, in a process of its own."""
        return self.alone(visit, {"do": "build", "job": job}, timeout_s)

    def alone(self, visit, command, timeout_s):
        """Start a visit for one command."""
        self.start(visit)
        answer = self.ask(visit, command, timeout_s)
        self.children.pop(visit).kill()
        return answer

    def close(self, visit, timeout_s):
        """Close a visit and see that its process ends; say how it did."""
        self.ask(visit, {"do": "close"}, timeout_s)
        child = self.children.pop(visit)
        child.process.stdin.close()
        try:
            status = child.process.wait(timeout=min(timeout_s, 5.0))
            how = how_it_ended(status)
        except subprocess.TimeoutExpired:
            how = "did not end by itself and was killed"
        child.kill()
        return {"how": how}

    def ask(self, visit, command, timeout_s):
        """Relay a command to a visit and return its answer; a visit that refuses, dies or hangs is over."""
        child = self.child(visit)
        child.tell(command)
        deadline_s = time.monotonic() + timeout_s
        try:
            while True:
                while not child.lines:
                    left_s = deadline_s - time.monotonic()
                    if child.is_silent:
                        raise self.obituary(child)
                    if left_s <= 0:
                        raise Refusal("timeout", "no answer within %g s; the process was killed" % timeout_s)
                    self.turn(min(left_s, HEARTBEAT_S))
                    self.beat()
                answer = json.loads(child.lines.popleft().decode("utf-8"))
                event = answer.pop("event")
                if event == "error":
                    raise Refusal(answer["kind"], answer["message"])
                if event != "progress":
                    return answer
                say(self.answers, event=event, **answer)
        except Refusal as refusal:
            self.last_words(child)
            refusal.stderr_tail = child.stderr_tail()
            child.kill()
            del self.children[visit]
            raise

    def last_words(self, child):
        """Read what a child printed before it fell silent."""
        for _ in range(64):  # a child that never stops printing must not hold us
            before = child.noise
            self.turn(0.02)
            if child.noise == before:
                return

    def obituary(self, child):
        """Return the refusal that says how a child died."""
        try:
            return Refusal("died", "the process " + how_it_ended(child.process.wait(timeout=2.0)))
        except subprocess.TimeoutExpired:
            return Refusal("died", "the process closed its end of the conversation without ending; it was killed")


def prepare_root(root):
    """Make the directories, ours alone; clear away what dead uploads left.

    Raises:
        Refusal: the directory cannot be made private: others could change what we execute.
    """
    for folder in (root, os.path.join(root, "objects"), os.path.join(root, "outputs")):
        os.makedirs(folder, mode=0o700, exist_ok=True)
    try:
        os.chmod(root, 0o700)
    except PermissionError as error:
        raise Refusal("device-io", "%s belongs to another user; choose another root in lab.toml" % root) from error
    for part in glob.glob(os.path.join(root, "*", "*.part*")):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - os.path.getmtime(part) > STALE_PART_S:
                os.unlink(part)


def clear_builds(root):
    """Delete what builds left that were cut off; only who has the lease may."""
    shutil.rmtree(os.path.join(root, "building"), ignore_errors=True)


def take_lease(root, holder):
    """Take the device for us and write down who holds it; the kernel gives it back when we die.

    Returns:
        (descriptor, ""), or (None, the holder's words) when another agent has it.
    """
    lease = os.open(os.path.join(root, "lease"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None, os.pread(lease, 4096, 0).decode("utf-8", "replace") or "somebody who has not said a name yet"
    os.ftruncate(lease, 0)
    os.pwrite(lease, holder.encode("utf-8"), 0)
    return lease, ""


def serve_agent(root, holder, idle_s):
    """Play the role of the agent."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _frame: sys.exit(128 + received))
    commands, answers = own_descriptors()
    try:
        prepare_root(root)
        lease, other = take_lease(root, holder)
    except (Refusal, OSError) as error:
        kind, message = explain(error)
        say(answers, event="error", id=None, kind=kind, message=message, stderr_tail="")
        return 1
    if lease is None:
        say(answers, event="busy", holder=other)
        return 1
    clear_builds(root)
    say(
        answers,
        event="hello",
        protocol=PROTOCOL,
        runner_sha256=digest_of(os.path.abspath(__file__)),
        python=sys.executable,
        facts=read_facts(),
    )
    with contextlib.suppress(HostGone, BrokenPipeError):
        Agent(root, commands, answers, idle_s).serve()
    clear_builds(root)
    os.close(lease)
    return 0


def main():
    """Play the role that the command line asks for."""
    parser = argparse.ArgumentParser(description="edgedeploy's runner; started by edgedeploy, not by hand")
    roles = parser.add_subparsers(dest="role", required=True)
    agent = roles.add_parser("agent")
    agent.add_argument("--root", required=True)
    agent.add_argument("--holder", default="somebody")
    agent.add_argument("--idle-s", type=float, default=3600.0)
    visit = roles.add_parser("visit")
    visit.add_argument("--root", required=True)
    visit.add_argument("--parent", type=int, required=True)
    roles.add_parser("facts")
    given = parser.parse_args()
    if given.role == "facts":
        print(json.dumps(read_facts()))
        return 0
    if given.role == "agent":
        return serve_agent(given.root, given.holder, given.idle_s)
    return serve_visit(given.root, given.parent)


if __name__ == "__main__":
    sys.exit(main())
