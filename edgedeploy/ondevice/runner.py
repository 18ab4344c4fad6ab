"""The runner: everything that happens on the device. One file, standard library only, Python >= 3.8.

Two roles, both speaking one JSON object per line:

* `runner.py agent --root DIR` lives as long as a lease. It answers the host on stdin/stdout and never loads a runtime.
* `runner.py visit --root DIR` is a fresh child of the agent: it loads one session and times it.

`runner.py facts` prints what the device is and ends, without a lease; `runner.py survey` adds what a person wants to
know who has just found the board; both can be read from stdin (`python3 - facts`).
`runner.py lease` says who has the device, and `runner.py watchdog` outlives an agent to undo what that one set.

Both move the protocol away from descriptors 0 and 1 first, so that a runtime that prints from C++ cannot corrupt it.

Commands are {"id": n, "do": ...}; each gets one {"id": n, "event": "answer" | "error", ...}. While a command lasts,
{"event": "heartbeat"} goes out every two seconds, also during a burst: one wake-up of another process in two seconds
is far below what can be measured, and without it the host could not tell a slow model from a dead device.

A job is {"session", "artifact", "inputs": sha256, "options": {...}, "batch": n, "warm_up": {"window", "tolerance",
"cap_s"}, "runtime": name}. Files lie in DIR/objects/<sha256>, an upload in DIR/objects/<sha256>.part until it is
verified; the answers of a model in DIR/outputs/<sha256>; releases of models, for applications of the device, in
DIR/installed/<slot> (see Slot); what was provisioned in DIR/runtimes/<name>: a job that names
one imports from there first. Of what was sent only the files are executed that `allow` names. What takes minutes says
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
import py_compile
import re
import selectors
import shutil
import signal
import stat
import statistics
import struct
import subprocess
import sys
import tarfile
import threading
import time
import traceback

PROTOCOL = 2
HEARTBEAT_S = 2.0
STDERR_LINES = 20
# A part that is older than this belongs to an upload that nobody goes on with.
STALE_PART_S = 86400.0
# The files of a large runtime are a tenth of this, and none of ours is longer than a third of it.
MOST_FILES, MOST_PATH_BYTES, MOST_DEPTH = 50000, 1024, 32
# What is read of a file at once.
PIECE_BYTES = 1 << 20
# The host names a handful of device halves.
MOST_ALLOWED = 1000

SHA256 = re.compile(r"[0-9a-f]{64}")
RUNTIME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._+-]{0,118}[A-Za-z0-9])?")
MODULE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}(?:\.[A-Za-z_][A-Za-z0-9_]{0,63}){0,7}")

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
# Of /proc and /sys the longest is cpuinfo: 2 KiB a processor. Of a text that goes to the host: any name or sentence.
LONGEST_FILE = 1 << 20
LONGEST_TEXT = 4096
MOST_ENTRIES = 4096
MOST_ZONES = 256
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
    return commands, os.fdopen(answers, "w", encoding="utf-8", errors="replace", newline="\n")


def say(answers, **event):
    """Write one event as one line; what is no UTF-8 in the name of a file becomes "?"."""
    answers.write(json.dumps(event, allow_nan=False, ensure_ascii=False, separators=(",", ":")) + "\n")
    answers.flush()


def explain(error):
    """Return (kind, sentence) for an exception that a command ended with."""
    if isinstance(error, Refusal):
        return error.kind, str(error)
    if isinstance(error, LeaseLost):
        return "lease-lost", str(error)
    if isinstance(error, MemoryError):
        return "out-of-memory", "the device ran out of memory" + (": %s" % error if str(error) else "")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "disk-full", "the device's disk is full (%s); free some space there" % error
    if isinstance(error, OSError):
        return "device-io", "the device's operating system refused: %s" % error
    return "internal", "the runner failed, which is a bug: %s" % told(error)


# ---------------------------------------------------------------------------------------------------- the device


def read_text(sysroot, path, most=LONGEST_FILE):
    """Return a small file of /proc or /sys without surrounding blanks, or None where it is not available.

    Args:
        sysroot: where /proc and /sys are.
        path: of a regular file; a pipe is not waited for, and a device not touched.
        most: bytes that are read of it.
    """
    try:
        # Opening a pipe without O_NONBLOCK waits until somebody writes into it.
        place = os.open(os.path.join(sysroot, path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        try:
            if not stat.S_ISREG(os.fstat(place).st_mode):
                return None
            data, part = bytearray(), b"more"
            while part and len(data) < most:
                part = os.read(place, min(most - len(data), 1 << 16))
                data += part
        finally:
            os.close(place)
    except OSError:  # absent, or present and unreadable (a powered-down thermal zone): both mean "not available"
        return None
    return data.decode("utf-8", "replace").strip().strip("\0")


def read_number(sysroot, path, scale=1.0):
    """Return a file's first word as a number times `scale`, or None."""
    words = (read_text(sysroot, path) or "").split()
    return number(words[0], scale) if words else None


def number(text, scale=1.0):
    """Return a text as a number times `scale` that can be meant, or None."""
    try:
        value = float(text) * scale
    except ValueError:
        return None
    return value if abs(value) < 1e18 else None


def read_table(sysroot, path, separator):
    """Return the lines "key SEPARATOR value" of a file as a list of pairs."""
    lines = (read_text(sysroot, path) or "").splitlines()
    return [(key.strip(), value.strip()) for key, mark, value in (line.partition(separator) for line in lines) if mark]


def read_kib(sysroot, path, key):
    """Return "key: n kB" of a file in bytes, or None."""
    for found, value in read_table(sysroot, path, ":"):
        digits = re.match("[0-9]{1,15}(?![0-9])", value)
        if found == key and digits:
            return int(digits.group()) * 1024
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
    return clipped({
        **read_nvidia(sysroot),
        "hostname": read_text(sysroot, "proc/sys/kernel/hostname") or platform.node(),
        "machine": platform.machine(),
        "system": platform.system(),
        "kernel": read_text(sysroot, "proc/sys/kernel/osrelease") or platform.release(),
        "os_name": release.get("PRETTY_NAME", "").strip("\"'"),
        "libc": read_libc(sysroot),
        "python": platform.python_version(),
        "cpu_model": cpu_model(sysroot),
        "isa": features[0].split() if features else [],
        "cores": sum(key == "processor" for key, _ in cpuinfo) or os.cpu_count() or 1,
        "clusters": read_clusters(sysroot),
        "interpreter": read_interpreter(),
        "memory_bytes": read_kib(sysroot, "proc/meminfo", "MemTotal"),
        "boot_id": read_text(sysroot, "proc/sys/kernel/random/boot_id") or "",
    })  # fmt: skip


def clipped(value):
    """Return what was read with every text and every collection cut to what the host takes, as text that can be sent.

    Names of files may hold bytes that are no UTF-8, which Python shows as lone surrogates.
    """
    if isinstance(value, str):
        return value[:LONGEST_TEXT].encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {clipped(key): clipped(inner) for key, inner in list(value.items())[:MOST_ENTRIES]}
    return [clipped(inner) for inner in value[:MOST_ENTRIES]] if isinstance(value, list) else value


def read_libc(sysroot):
    """Return "glibc 2.36" or "musl 1.2.5", or "".

    Not platform.libc_ver() first: it reads the version that the interpreter was linked for, which may be an older one.
    """
    with contextlib.suppress(ValueError, OSError):  # no such name in musl
        if sysroot == "/" and os.confstr("CS_GNU_LIBC_VERSION"):
            return os.confstr("CS_GNU_LIBC_VERSION")
    for loader in sorted(glob.glob(os.path.join(sysroot, "lib/ld-musl-*.so.1"))):
        try:  # it prints its version to stderr, and ends with status 1
            said = subprocess.run(
                [loader], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=5, check=False
            ).stderr
        except (OSError, subprocess.TimeoutExpired):
            said = b""
        found = re.search(rb"Version (\d+(?:\.\d+)+)", said)
        return "musl " + found.group(1).decode() if found else "musl"
    return " ".join(part for part in platform.libc_ver() if part)


def read_interpreter():
    """Return what decides which wheels this interpreter takes, in the words of wheels' names."""
    short = {"cpython": "cp", "pypy": "pp"}.get(sys.implementation.name, sys.implementation.name)
    tag = "%s%d%d" % (short, sys.version_info[0], sys.version_info[1])
    return {"tag": tag, "abi": tag + getattr(sys, "abiflags", ""), "bits": struct.calcsize("P") * 8}


def read_clusters(sysroot):
    """Return the groups of equal cores by what the kernel says of them; empty where it says no clock."""
    groups = {}
    for folder in glob.glob(os.path.join(sysroot, "sys/devices/system/cpu/cpu[0-9]*")):
        max_hz = read_number(folder, "cpufreq/cpuinfo_max_freq", 1e3)
        if max_hz is not None:
            core = int(re.sub("[^0-9]", "", os.path.basename(folder)))
            groups.setdefault((max_hz, read_number(folder, "cpu_capacity") or 0.0), []).append(core)
    ordered = sorted((sorted(cores), max_hz) for (max_hz, _), cores in groups.items())
    return [{"cores": in_ranges(cores), "max_hz": max_hz} for cores, max_hz in ordered]


def in_ranges(numbers):
    """Return sorted numbers as "0-3,6"."""
    ranges = []
    for one in numbers:
        if ranges and ranges[-1][1] == one - 1:
            ranges[-1][1] = one
        else:
            ranges.append([one, one])
    return ",".join(str(first) if first == last else "%d-%d" % (first, last) for first, last in ranges)


def read_survey(root, modules, sysroot="/"):
    """Return the facts, and what a person wants to know of a board before it is used.

    Args:
        root: where files would be kept; its disk is the one that counts.
        modules: "distribution=module", what may be installed for this interpreter.
        sysroot: where /proc and /sys are.
    """
    folder = os.path.abspath(root)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    disk = os.statvfs(folder)
    governors = per_core(sysroot, "scaling_governor") or []
    available = per_core(sysroot, "scaling_available_governors") or [""]
    return {
        "facts": read_facts(sysroot),
        "python": sys.executable,
        "free_bytes": disk.f_bavail * disk.f_frsize,
        "runtimes": {name: version for name, version in map(installed_version, modules) if version},
        "governor": ", ".join(sorted(set(governors))),
        "governors": available[0].split(),
        "temperatures_celsius": read_temperatures(sysroot) or {},
        "is_root": os.geteuid() == 0,
        "has_sudo": ask_status(["sudo", "-n", "true"]) == 0,
    }


def installed_version(named):
    """Return ("distribution", its version) of "distribution=module"; "" where this interpreter does not have it."""
    distribution, _, module = named.partition("=")
    try:
        import importlib.metadata

        return distribution, importlib.metadata.version(distribution)
    except Exception:  # absent, or metadata that cannot be read
        try:
            found = importlib.util.find_spec(module.partition(".")[0])
        except (ImportError, ValueError):
            found = None
        # Boards' images carry runtimes that no package manager has put there.
        return distribution, "of unknown version" if found is not None else ""


def ask_status(argv, timeout_s=5.0):
    """Return the exit status of a program that reads and prints nothing, or None."""
    try:
        return subprocess.run(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=timeout_s,
            check=False,
        ).returncode  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None


def per_core(sysroot, name):
    """Return a cpufreq file's text for every core that has one, in the order of the cores, or None."""
    found = glob.glob(os.path.join(sysroot, "sys/devices/system/cpu/cpu[0-9]*/cpufreq", name))
    found.sort(key=lambda path: [int(number) for number in re.findall(r"/cpu([0-9]+)/", path)[-1:]])
    texts = [read_text("/", os.path.abspath(path)) for path in found]
    return texts if texts and all(texts) else None


def read_temperatures(sysroot):
    """Return thermal zone -> degrees Celsius, or None; zones of one type are told apart by "#2", "#3" ..."""
    zones = {}
    for folder in sorted(glob.glob(os.path.join(sysroot, "sys/class/thermal/thermal_zone*")))[:MOST_ZONES]:
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
    ticks = [number(field) for field in fields[11:13]]
    return sum(ticks) / os.sysconf("SC_CLK_TCK") if len(ticks) == 2 and None not in ticks else None


def read_device_tree(sysroot, name):
    """Return what the root of the device tree says, or ""; a container often sees one of its two places alone."""
    for place in ("proc/device-tree", "sys/firmware/devicetree/base"):
        text = read_text(sysroot, os.path.join(place, name))
        if text:
            return text
    return ""


def read_nvidia(sysroot):
    """Return what there is for TensorRT, as far as files say it: no driver is loaded and no program is run."""
    compatible = read_device_tree(sysroot, "compatible").split("\0")
    tegra = next((TEGRA_GPUS[name] for name in compatible if name in TEGRA_GPUS), None)
    gpus = [{"name": tegra[0], "compute_capability": tegra[1], "memory_bytes": None}] if tegra else []
    for path in sorted(glob.glob(os.path.join(sysroot, "proc/driver/nvidia/gpus/*/information"))):
        name = dict(read_table("/", os.path.abspath(path), ":")).get("Model", "")
        gpus += [{"name": name, "compute_capability": "", "memory_bytes": None}] if name and not tegra else []
    driver = re.search(
        r"Kernel Module\b[^\n]*?\s(\d+(?:\.\d+)+)", read_text(sysroot, "proc/driver/nvidia/version", LONGEST_TEXT) or ""
    )
    l4t = parse_l4t(read_text(sysroot, "etc/nv_tegra_release") or "")
    packages = dpkg_versions(read_text(sysroot, "var/lib/dpkg/status", 1 << 25) or "", r"nvidia-jetpack|libnvinfer\d+")
    return {
        "board": read_device_tree(sysroot, "model"),
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


def find_tool(name, sysroot="/"):
    """Return a program of the device, or None; a shell over SSH often does not look into /usr/sbin."""
    places = [os.path.join(sysroot, folder) for folder in ("usr/sbin", "usr/bin")]
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", "")] * (sysroot == "/") + places))


def find_tools(sysroot="/"):
    """Return the programs of BOARD_TOOLS that are here."""
    found = {name: find_tool(name, sysroot) for name in BOARD_TOOLS}
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
    return clipped({
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
    })  # fmt: skip


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


def runtime_path(root, name):
    """Return where an installed runtime is, or would be.

    Raises:
        Refusal: not a name that a runtime may have.
    """
    if not isinstance(name, str) or not RUNTIME.fullmatch(name) or name.endswith(".part"):
        raise Refusal("bad-command", "%.200r is not a name that a runtime may have" % (name,))
    return os.path.join(root, "runtimes", name)


def use_runtime(root, name):
    """Have this process import from an installed runtime first; an empty name or None changes nothing.

    Raises:
        Refusal: it is not here.
    """
    if not name:
        return
    path = runtime_path(root, name)
    if not os.path.isdir(path):
        raise Refusal("missing-runtime", "the runtime %s is not installed on the device; provision it again" % name)
    sys.path.insert(0, os.path.abspath(path))


def free_bytes(folder):
    """Return what this user may still write on a folder's disk."""
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def write_whole(path, document, is_synced=False):
    """Write JSON whole or not at all: a full disk leaves what was there, and no half file.

    Args:
        path: of the file.
        document: what it says.
        is_synced: whether its bytes are on the disk when it gets its name.
    """
    part = path + ".part"
    try:
        with open(part, "w", encoding="utf-8") as stream:
            json.dump(document, stream)
            if is_synced:
                stream.flush()
                os.fsync(stream.fileno())
        os.replace(part, path)
    except OSError:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            os.unlink(part)
        raise


def sync_folder(folder):
    """Have the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def tree_bytes(folder):
    """Return the size of all files below a folder."""
    return sum(os.lstat(os.path.join(place, name)).st_size for place, _, names in os.walk(folder) for name in names)


class Store:
    """What hosts have sent, what was installed from it and what was computed, each with its last use.

    A file that was verified is not read again as long as its size, times and inode are what they were then: reading
    200 MB takes seconds on a board. The date of a use is the host's word, because many boards have no clock that runs
    while they are off; without one nothing is dated.
    """

    def __init__(self, root):
        self.root = root
        self.now_s = None
        self.index_path = os.path.join(root, "index.json")
        self.entries = self.read_index()
        self.is_changed = False

    def read_index(self):
        """Return {"objects/<sha256>" ...: {"is": [size, mtime_ns, ctime_ns, inode] or None, "used_s": n or None}}."""
        try:
            with open(self.index_path, encoding="utf-8") as stream:
                found = json.load(stream)
        except (OSError, ValueError, RecursionError):  # none yet, or torn by a power cut: everything is read once more
            return {}
        if not isinstance(found, dict) or not all(
            isinstance(entry, dict) and {"is", "used_s"} <= set(entry) for entry in found.values()
        ):
            return {}
        return found

    def write_index(self):
        """Keep what is known, if it has changed."""
        if not self.is_changed:
            return
        write_whole(self.index_path, self.entries)
        self.is_changed = False

    def path(self, name):
        """Return where "objects/<sha256>" and the like are."""
        return os.path.join(self.root, name)

    def note(self, name, **facts):
        """Keep facts of a file or runtime, and that it was used now."""
        entry = self.entries.setdefault(name, {"is": None, "used_s": None})
        if self.now_s is not None:
            facts["used_s"] = self.now_s
        if any(entry[key] != value for key, value in facts.items()):
            entry.update(facts)
            self.is_changed = True

    def forget(self, name):
        """Drop what is known of a file."""
        self.is_changed = self.entries.pop(name, None) is not None or self.is_changed

    def identity(self, path):
        """Return what changes whenever a file does."""
        found = os.stat(path)
        return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]

    def has(self, digest, beat):
        """Return whether an object is here and whole; one that is not what its name says is deleted."""
        name = "objects/" + digest
        try:
            path = object_path(self.root, digest)
        except Refusal as refusal:
            if refusal.kind != "missing-object":
                raise
            self.forget(name)
            return False
        before = self.identity(path)
        if self.entries.get(name, {}).get("is") != before:
            if digest_of(path, beat) != digest:
                os.unlink(path)
                self.forget(name)
                return False
            if self.identity(path) != before:  # it was written to while it was read
                return False
        self.note(name, **{"is": before})
        return True

    def part_path(self, digest):
        """Return where the upload of an object lies until it is verified."""
        if not isinstance(digest, str) or not SHA256.fullmatch(digest):
            raise Refusal("bad-command", "%.200r is not a SHA-256 digest" % (digest,))
        return os.path.join(self.root, "objects", digest + ".part")

    def commit(self, digest, beat):
        """Give an upload its name, if it is what it should be."""
        part = self.part_path(digest)
        if not os.path.isfile(part):
            raise Refusal("missing-object", "the upload of %s is not on the device" % digest)
        found = digest_of(part, beat)
        if found != digest:
            size = os.path.getsize(part)
            os.unlink(part)
            raise Refusal(
                "corrupt-upload",
                "the upload of %s arrived as something else (%d bytes, digest %s); it was deleted; send it again"
                % (digest, size, found),
            )
        with open(part, "rb") as stream:
            os.fsync(stream.fileno())
        path = os.path.join(self.root, "objects", digest)
        os.replace(part, path)
        sync_folder(os.path.dirname(path))
        self.note("objects/" + digest, **{"is": self.identity(path)})

    def unused(self, unused_s, kept):
        """Return the names of what was not used for a while; what was never dated counts from now.

        A date in the future comes from a host whose clock was wrong: it is set right and counts from now as well.
        """
        found = []
        for folder in ("objects", "outputs", "runtimes"):
            for name in sorted(os.listdir(self.path(folder))):
                full = "%s/%s" % (folder, name)
                used_s = self.entries.get(full, {}).get("used_s")
                if full in kept or name.endswith(".part"):
                    continue
                if used_s is None or used_s > self.now_s:
                    self.note(full)
                elif self.now_s - used_s >= unused_s:
                    found.append(full)
        for name in [name for name in self.entries if not os.path.lexists(self.path(name))]:
            self.forget(name)
        return found

    def remove(self, name):
        """Delete a file or an installed runtime; return how large it was."""
        path = self.path(name)
        self.forget(name)
        if os.path.isdir(path) and not os.path.islink(path):
            size = tree_bytes(path)
            # Renamed first: a tree that is half deleted must not look installed.
            os.replace(path, path + ".part")
            shutil.rmtree(path + ".part")
            return size
        size = os.lstat(path).st_size
        os.unlink(path)
        return size


def unpack(tar_path, folder, beat):
    """Unpack a tar of folders, files and links that stay inside, into an empty folder of ours.

    Nothing of a member counts but its name, its bytes and whether it is executable. Compressed and sparse ones are
    refused, so that what comes out is never larger than what was sent.

    Raises:
        Refusal: it is no such tar; `folder` is then to be deleted.
    """
    folders = {""}
    names = set()
    try:
        with tarfile.open(tar_path, "r:") as archive:
            for count, member in enumerate(archive, start=1):
                if count > MOST_FILES:
                    raise Refusal("bad-archive", "the archive has more than %d members" % MOST_FILES)
                beat()
                name = member_name(member)
                if not name:
                    continue
                make_folders(folder, os.path.dirname(name), folders, names)
                if member.isdir():
                    make_folders(folder, name, folders, names)
                    continue
                if name in names or name in folders:
                    raise Refusal("bad-archive", "the archive has %.200r twice" % name)
                names.add(name)
                unpack_member(archive, member, os.path.join(folder, name), beat)
    except (tarfile.TarError, UnicodeError, ValueError, EOFError, OverflowError, RecursionError) as error:
        raise Refusal("bad-archive", "the archive is not a whole tar file: %s" % told(error)) from error


def member_name(member):
    """Return a member's name without "./"; "" for the folder itself.

    Raises:
        Refusal: it leads out of the folder, or no ordinary file has such a name.
    """
    try:
        size = len(os.fsencode(member.name))
    except UnicodeError:
        size = MOST_PATH_BYTES + 1
    words = [word for word in member.name.split("/") if word not in ("", ".")]
    if member.name.startswith("/") or ".." in words or "\0" in member.name:
        raise Refusal("bad-archive", "the archive's member %.200r leads out of its folder" % member.name)
    if size > MOST_PATH_BYTES or len(words) > MOST_DEPTH or any(len(os.fsencode(word)) > 255 for word in words):
        raise Refusal("bad-archive", "the name of the archive's member %.200r is too long" % member.name)
    return "/".join(words)


def make_folders(folder, name, folders, names):
    """Make a folder and those above it, each of them a real one: never through a link that the archive brought."""
    path = ""
    for word in name.split("/") if name else ():
        path = "%s/%s" % (path, word) if path else word
        if path in names:
            raise Refusal("bad-archive", "the archive's member %.200r is a file and a folder" % path)
        if path not in folders:
            if len(folders) >= MOST_FILES:
                raise Refusal("bad-archive", "the archive has more than %d folders" % MOST_FILES)
            os.mkdir(os.path.join(folder, path), 0o755)
            folders.add(path)


def unpack_member(archive, member, path, beat):
    """Write one file or link; `path` does not exist yet."""
    if member.issym():
        target = member.linkname
        # Without ".." no chain of links can lead up, whatever the links on its way point to.
        if not target or target.startswith("/") or ".." in target.split("/") or "\0" in target:
            raise Refusal("bad-archive", "the archive's link %.200r leads out of its folder" % member.name)
        if len(target) > MOST_PATH_BYTES:
            raise Refusal("bad-archive", "the target of the archive's link %.200r is too long" % member.name)
        os.symlink(target, path)
        return
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        raise Refusal("bad-archive", "the archive's member %.200r is not a file, a folder or a link" % member.name)
    source, left = archive.extractfile(member), member.size
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with open(os.open(path, flags, 0o755 if member.mode & 0o100 else 0o644), "wb") as stream:
        while left > 0:
            piece = source.read(min(left, PIECE_BYTES))
            if not piece:
                raise Refusal("bad-archive", "the archive ends in the middle of %.200r" % member.name)
            stream.write(piece)
            left -= len(piece)
            beat()


# ---------------------------------------------------------------------------------------------------- what is installed


# What an application finds its model by, and what a release of it is called. Small letters: FAT knows no others.
SLOT = re.compile(r"[a-z0-9](?:[a-z0-9_-]{0,62}[a-z0-9])?")
RELEASE = re.compile(r"(0|[1-9][0-9]{0,17})-[0-9a-f]{8}(?:\.[1-9][0-9]?)?")
POINTER, RECEIPT = "current", "installed.json"
# The one that is used and the one to go back to.
KEPT_RELEASES = 2
MOST_SLOTS = 100
# A file of a release is a model, its manifest, golden samples; a bundle's manifest names a few per cell.
MOST_RELEASE_FILES = 1000
MOST_DOCUMENT_BYTES = 16 << 20
# How the program that checks bundles ends, and what that means here.
CHECK_REFUSALS = {1: "refused", 2: "bad-command", 3: "not-checked"}


class Slot:
    """What is installed for one application: releases, and a file that says which of them is used.

    Below DIR/installed/<slot>:

    * releases/<sequence>-<digest>/ is whole from the moment it has this name: its files were on the disk before.
      installed.json in it says what it is and what its files are.
    * current is a text of one or two lines, "releases/<name>": the first is the one that is used, the second the one
      to go back to. It is replaced by a rename, so that whoever reads it finds the old text or the new one.
    * staging (and .bundle-*) is what has no name yet, trash what has none any more; they go with the next installation.

    A file and no symbolic link: FAT has none, and who has read a name once goes on with the files of one release,
    whatever is installed meanwhile.
    """

    def __init__(self, root, name):
        if not isinstance(name, str) or not SLOT.fullmatch(name):
            raise Refusal(
                "bad-command",
                "%.100r is not the name of a slot: small letters, digits, '-' and '_', at most 64 of them" % (name,),
            )
        self.name, self.path = name, os.path.join(root, "installed", name)
        self.releases = os.path.join(self.path, "releases")

    def make(self):
        """Make the folders; their names are on the disk afterwards."""
        made, folder = [], self.releases
        while not os.path.isdir(folder):
            made.append(folder)
            folder = os.path.dirname(folder)
        for folder in reversed(made):
            os.mkdir(folder, 0o700)
            sync_folder(os.path.dirname(folder))

    def clear(self):
        """Delete what has no name yet or none any more: of an installation that was cut off."""
        left = glob.glob(os.path.join(glob.escape(self.path), ".bundle-*"))
        for path in [os.path.join(self.path, "staging"), os.path.join(self.path, "trash"), *left]:
            shutil.rmtree(path, ignore_errors=True)

    def release(self, name):
        """Return the folder of a release.

        Raises:
            Refusal: no release may be called so, or there is none.
        """
        if not isinstance(name, str) or not RELEASE.fullmatch(name):
            raise Refusal("bad-command", "%.100r is not the name of a release" % (name,))
        path = os.path.join(self.releases, name)
        if not os.path.isdir(path):
            raise Refusal("not-installed", "the release %s is not in slot %s of the device" % (name, self.name))
        return path

    def pointed(self):
        """Return the releases that `current` names: the one that is used first; empty where nothing is installed.

        Raises:
            Refusal: it does not say what it should, or names what is not there.
        """
        path = os.path.join(self.path, POINTER)
        if not os.path.lexists(path):
            return []
        text = read_text(self.path, POINTER, LONGEST_TEXT) or ""
        names = [line[len("releases/") :] for line in text.splitlines() if line.startswith("releases/")]
        try:
            for name in names:
                self.release(name)
        except Refusal:
            names = []
        if not 1 <= len(names) <= KEPT_RELEASES or len(names) != len(text.splitlines()):
            raise Refusal(
                "damaged",
                "%s on the device does not say which release is used: it holds %.200r; delete it there, and install "
                "again" % (path, text),
            )
        return names

    def point(self, names):
        """Have `current` name these releases, in one step that a power cut does not halve."""
        path = os.path.join(self.path, POINTER)
        part = path + ".part"
        try:
            with open(part, "w", encoding="ascii", newline="\n") as stream:
                stream.write("".join("releases/%s\n" % name for name in names))
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(part, path)
        except OSError:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                os.unlink(part)
            raise
        sync_folder(self.path)

    def names(self):
        """Return every release that is here."""
        found = os.listdir(self.releases) if os.path.isdir(self.releases) else []
        return sorted(name for name in found if RELEASE.fullmatch(name))

    def remove(self, name):
        """Delete a release; it has lost its name before its first file goes."""
        trash = os.path.join(self.path, "trash")
        shutil.rmtree(trash, ignore_errors=True)
        os.rename(self.release(name), trash)
        sync_folder(self.releases)
        shutil.rmtree(trash)

    def prune(self):
        """Delete the releases that `current` does not name."""
        kept = self.pointed()
        for name in self.names():
            if name not in kept:
                self.remove(name)

    def settle(self, folder, receipt, beat):
        """Give what was unpacked and is on the disk its name, and return that.

        One of the same bundle that is here already stays, unless it was damaged: then it stays too, for it may be in
        use, and the new one has another name.
        """
        called = "%d-%s" % (receipt["sequence"], receipt["manifest_sha256"][:8])
        for number in range(1, 100):
            name = called if number == 1 else "%s.%d" % (called, number)
            path = os.path.join(self.releases, name)
            if not os.path.lexists(path):
                os.rename(folder, path)
                sync_folder(self.releases)
                return name
            if self.receipt(name) == receipt and not damage_of(path, receipt["files"], beat):
                return name
        raise Refusal("device-io", "slot %s has a hundred releases called %s; delete some there" % (self.name, called))

    def receipt(self, name):
        """Return what installed.json of a release says; {} where it says nothing."""
        return read_document(self.release(name), RECEIPT)


def told_release(name, receipt):
    """Return what the host is told of a release."""
    words = ("bundle", "version", "cell", "file", "sha256", "manifest_sha256")
    return dict(
        {word: str(receipt.get(word) or "")[:1000] for word in words},
        release=name,
        sequence=int(name.partition("-")[0]),
    )


def read_document(folder, name):
    """Return a JSON object that a file holds; {} where it holds none."""
    try:
        found = json.loads(read_text(folder, name, MOST_DOCUMENT_BYTES) or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def described_files(folder, beat=lambda: None):
    """Return {"a/b": [sha256, size]} of everything below a folder.

    Raises:
        Refusal: something there is neither a file nor a folder, or there is too much.
    """
    found = {}
    for place, folders, names in os.walk(folder):
        folders.sort()
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        for name in sorted(names) + links:
            path = os.path.join(place, name)
            if not stat.S_ISREG(os.lstat(path).st_mode):
                raise Refusal("bad-archive", "%s is not a plain file" % path)
            if len(found) >= MOST_RELEASE_FILES:
                raise Refusal("bad-archive", "%s holds more than %d files" % (folder, MOST_RELEASE_FILES))
            relative = os.path.relpath(path, folder).replace(os.sep, "/")
            found[relative] = [digest_of(path, beat), os.path.getsize(path)]
    return found


def damage_of(folder, files, beat=lambda: None):
    """Return which of the files that a receipt names are not what it says; "" when all are."""
    if not isinstance(files, dict) or not files:
        return RECEIPT
    for name in sorted(files):
        path = os.path.join(folder, member_name(tarfile.TarInfo(name)))
        if not os.path.isfile(path) or [digest_of(path, beat), os.path.getsize(path)] != files[name]:
            return name
    return ""


def sync_tree(folder, beat=lambda: None):
    """Have everything below a folder survive a power cut."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            descriptor = os.open(os.path.join(place, name), os.O_RDONLY | os.O_NOFOLLOW)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            beat()
        sync_folder(place)


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


class VerifiedLoader(importlib.machinery.SourceFileLoader):
    """Executes the very bytes whose digest was checked, whatever happens to their file meanwhile."""

    def __init__(self, path, digest):
        super().__init__("edgedeploy_device_half", path)
        with open(path, "rb") as stream:
            self.source = stream.read()
        if hashlib.sha256(self.source).hexdigest() != digest:
            raise Refusal("corrupt-object", "the object %s on the device is not what its name says" % digest)

    def get_code(self, fullname):
        """Return the checked bytes compiled."""
        return compile(self.source, self.path, "exec", dont_inherit=True)


def load_object(root, digest):
    """Return the module of a device half that was sent here.

    Raises:
        Refusal: it is not here or not whole, or this interpreter does not have the runtime.
    """
    path = object_path(root, digest)
    return load_device_half(path, VerifiedLoader(path, digest))


def load_device_half(path, loader=None):
    """Return the module of a session.py or builder.py, importing its runtime.

    Args:
        path: of the file.
        loader: what reads it, where that is not to be left to Python.

    Raises:
        Refusal: this interpreter does not have the runtime.
    """
    loader = loader or importlib.machinery.SourceFileLoader("edgedeploy_device_half", path)
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
        artifact, inputs = (object_path(self.root, job[key]) for key in ("artifact", "inputs"))
        use_runtime(self.root, job.get("runtime"))
        self.batch = int(job["batch"])
        self.inputs = TensorFile(inputs)
        first_batch = self.inputs.rows(0, self.batch)
        started_s = time.perf_counter()
        session_class = load_object(self.root, job["session"]).Session
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
        return {"found": load_object(self.root, builder).probe()}

    def try_runtime(self, name, module):
        """Import a module from an installed runtime; what was compiled for it is kept, so that visits start faster."""
        use_runtime(self.root, name)
        sys.dont_write_bytecode, sys.pycache_prefix = False, None
        try:
            found = importlib.import_module(module)
        except Exception as error:
            raise Refusal("missing-runtime", "%s of %s cannot be imported: %s" % (module, name, told(error))) from error
        inside = os.path.realpath(runtime_path(self.root, name)) + os.sep
        places = [getattr(found, "__file__", None), *getattr(found, "__path__", ())]
        if not any(place and os.path.realpath(place).startswith(inside) for place in places):
            raise Refusal("missing-runtime", "the runtime %s has no module %s" % (name, module))
        return {"version": str(getattr(found, "__version__", ""))[:100]}

    def build(self, job):
        """Have a builder make files from shipped ones; each that it made gets its digest for a name.

        A job is {"builder": sha256, "files": {name: sha256}, "options": {...}}. A builder has probe() -> dict and
        build(files, options, folder, tell) -> (report, {name: file in folder}); tell(text, done=None, total=None) may
        be called from any thread.
        """
        use_runtime(self.root, job.get("runtime"))
        builder = load_object(self.root, job["builder"])
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

    def check(self, job, folder=""):
        """Check a bundle with the program that was sent for it; unpack what it has of one cell.

        A job is {"program", "bundle", "key": sha256, "cell": "", "min_sequence": n, "keep": [sha256 ...]}: without a
        cell nothing is unpacked. The program is given the bundle, the key and what this machine is, and ends with 0
        when the signature holds and the bundle is for us.

        Args:
            job: see above; files that `keep` names become objects, for the sessions of this host.
            folder: where the cell is unpacked to; "": it is deleted when the answer is given.

        Returns:
            The release's receipt, and where below `folder` its files are; None and "" without a cell.

        Raises:
            Refusal: "refused" when there is evidence against the bundle, "not-checked" when it could not be checked.
        """
        kept = folder or os.path.join(self.root, "building", str(os.getpid()))
        os.makedirs(os.path.dirname(kept), 0o700, exist_ok=True)
        try:
            told = self.checked_bundle(job, kept)
            if not job.get("cell"):
                return {"receipt": None, "folder": ""}
            inside, receipt = self.received(told, kept)
            for name, (digest, _) in receipt["files"].items():
                if digest in job.get("keep", ()):
                    self.adopt(os.path.join(kept, inside, name), digest)
            return {"receipt": receipt, "folder": inside}
        finally:
            if not folder:
                shutil.rmtree(kept, ignore_errors=True)

    def checked_bundle(self, job, folder):
        """Run the program that checks bundles, and return what it tells of this one."""
        program, bundle, key = (object_path(self.root, job[name]) for name in ("program", "bundle", "key"))
        # Its bytes and not its file: what is executed is what was checked.
        source = VerifiedLoader(program, job["program"]).source
        isa = read_facts()["isa"]
        argv = [sys.executable, "-I", "-S", "-", os.path.abspath(bundle), "--key", os.path.abspath(key), "--json"]
        argv += ["--machine", platform.machine(), "--min-sequence", str(int(job.get("min_sequence") or 0))]
        argv += ["--isa=" + ",".join(isa)] if isa else []
        argv += ["--cell=%s" % job["cell"], "--extract", os.path.abspath(folder)] if job.get("cell") else []
        done = subprocess.run(argv, input=source, stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False)
        try:
            told = json.loads(done.stdout.decode("utf-8"))
            if done.returncode == 0:
                return told
            kind, reason = CHECK_REFUSALS[done.returncode], str(told["reason"])
        except (ValueError, KeyError, TypeError):
            kind = "not-checked"
            tail = done.stderr.decode("utf-8", "replace").strip()[-LONGEST_TEXT:]
            reason = "the program that checks bundles %s: %s" % (how_it_ended(done.returncode), tail)
        raise Refusal(kind, reason)

    def received(self, told, folder):
        """Write down what was unpacked of a cell, and have it survive a power cut.

        Returns:
            Where below `folder` its files are, and the receipt that lies beside them.
        """
        (cell,) = told["cells"]
        inside = os.path.dirname(member_name(tarfile.TarInfo(cell["artifact"])))
        place = os.path.join(folder, inside)
        receipt = {
            "format": "edgedeploy.installed/1", "bundle": told["name"], "version": told["version"],
            "sequence": int(told["sequence"]), "manifest_sha256": told["manifest_sha256"], "cell": cell["cell"],
            "file": os.path.basename(cell["artifact"]), "sha256": cell["sha256"], "files": described_files(place),
        }  # fmt: skip
        with open(os.path.join(place, RECEIPT), "w", encoding="utf-8") as stream:
            json.dump(receipt, stream, indent=1)
        sync_tree(place)
        return inside, receipt

    def adopt(self, path, digest):
        """Make a file an object too; the same bytes on the disk where its file system lets them have two names."""
        kept = os.path.join(self.root, "objects", digest)
        if os.path.isfile(kept) and digest_of(kept) == digest:
            return
        part = kept + ".part"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
        try:
            os.link(path, part)
        except OSError:  # FAT has one name for a file
            shutil.copyfile(path, part)
        os.replace(part, kept)

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


def serve_visit(root, parent, cores):
    """Play the role of a visit: answer the agent's commands until it closes our stdin."""
    die_with_parent(parent)
    if cores:
        os.sched_setaffinity(0, parse_cores(cores))
    commands, answers = own_descriptors()
    child = VisitChild(root, answers)
    verbs = {"open": child.open, "burst": child.burst, "memory": child.memory, "outputs": child.outputs,
             "profile": child.profile, "probe": child.probe, "build": child.build, "close": child.close,
             "try_runtime": child.try_runtime, "check": child.check}  # fmt: skip
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


# ---------------------------------------------------------------------------------------------------- the lease


LEASE_FILE = "edgedeploy.lease"
# Where every user of a device may write, most short-lived first; a reboot may clear it, and a lease ends with it.
LEASE_PLACES = ("/run/lock", "/dev/shm", "/tmp")  # noqa: S108 - shared on purpose; opened as protected_regular asks
# One page: the kernel writes it whole, or not at all, however the writer dies.
LEASE_BYTES = 4096
MOST_WAITING = 12
# Who asks often enough disturbs who measures; who asks seldom waits longer than needed.
WAITING_POLL_S = 0.5
# A waiter that has not asked for so long is frozen, and is passed over.
WAITER_SILENT_S = 10.0
# The file is locked for microseconds; longer means that somebody was stopped with the lock in his hand.
LEASE_LOCK_S = 5.0
# A device that is about to be free is worth so much waiting even without --wait-s.
ENDING_S = 5.0
# jetson_clocks --restore and nvpmodel take seconds.
RESTORE_S = 30.0
# No lease is longer; a record that says so is not one of ours.
LONGEST_LEASE_S = 86400.0


class LeaseLost(Exception):
    """The device was ours and is no more; the text says why."""


def boot_clock_s():
    """Return the seconds since boot, sleep included: no setting of the clock changes it."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def started_at(pid):
    """Return when a process started, in ticks since boot: with its number it names one process; 0 where not said."""
    fields = (read_text("/", "proc/%d/stat" % pid) or "").rpartition(")")[2].split()
    return int(fields[19]) if len(fields) > 19 else 0


def is_alive(pid, start):
    """Say whether a process still runs, and is still the one that started then."""
    fields = (read_text("/", "proc/%d/stat" % pid) or "").rpartition(")")[2].split()
    if len(fields) > 19:
        return fields[0] not in "ZX" and start in (0, int(fields[19]))
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's, and /proc is mounted so that it does not show
        return True
    return True


def pid_space():
    """Return what tells containers apart: a process number means nothing in another one."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def short_words(text, most):
    """Return a text without control characters, in at most so many bytes."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in str(text))
    return shown.encode("utf-8", "replace")[:most].decode("utf-8", "ignore")


def lease_path(folder=""):
    """Return the file that all users of this device share.

    Args:
        folder: where it is; made where missing. Empty: the first place that any user may write to, which is the same
            for all of them.

    Raises:
        Refusal: there is no such place.
    """
    if folder:
        if not os.path.isdir(folder):
            os.makedirs(folder, exist_ok=True)
            os.chmod(folder, 0o1777)  # noqa: S103 - all users of the device share it, and none deletes another's file
        return os.path.join(os.path.abspath(folder), LEASE_FILE)
    for place in LEASE_PLACES:
        try:
            mode = os.stat(place).st_mode
        except OSError:
            continue
        if stat.S_ISDIR(mode) and mode & 0o1002 == 0o1002 and os.access(place, os.W_OK):
            return os.path.join(place, LEASE_FILE)
    raise Refusal(
        "lease-unusable",
        "none of %s is writable for all users, so that the device cannot be leased; name a folder as "
        'lease_dir = "..." of this device in lab.toml' % ", ".join(LEASE_PLACES),
    )


HOLDER_FIELDS = {
    "who": str, "pid": int, "start": int, "space": str, "watchdog": list, "since_s": (int, float),
    "expires_s": (int, float), "grace_s": (int, float), "is_ending": bool, "visits": list,
}  # fmt: skip
WAITER_FIELDS = {"ticket": int, "who": str, "pid": int, "start": int, "space": str, "seen_s": (int, float)}


def has_fields(entry, fields):
    """Say whether an entry of the record is what we write: anybody on the device can write something else."""
    if not isinstance(entry, dict) or set(entry) != set(fields):
        return False
    if not all(isinstance(entry[name], kind) for name, kind in fields.items()):
        return False
    numbers = [entry["pid"], entry["start"], *entry.get("watchdog", [])]
    return all(isinstance(one, int) and 0 <= one < 1 << 53 for one in numbers) and entry["pid"] > 0


def parse_lease(data, boot_id):
    """Return a record from the bytes of the file; what is not one counts as nobody's."""
    try:
        found = json.loads(data.partition(b"\n")[0].decode("utf-8"))
        record = {name: found[name] for name in ("token", "tickets", "boot_id", "holder", "queue", "fence")}
        counts = [record["token"], record["tickets"]]
        is_ours = (
            all(isinstance(one, int) and 0 <= one < 1 << 53 for one in counts)
            and (record["holder"] is None or has_fields(record["holder"], HOLDER_FIELDS))
            and isinstance(record["queue"], list)
            and all(has_fields(one, WAITER_FIELDS) for one in record["queue"])
            and (record["fence"] is None or has_words(record["fence"]))
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_ours = False
    if not is_ours:
        return {"token": 0, "tickets": 0, "boot_id": boot_id, "holder": None, "queue": [], "fence": None}
    if record["boot_id"] != boot_id:
        record.update(boot_id=boot_id, holder=None, queue=[], fence=None)
    return record


def has_words(fence):
    """Say whether a fence is [token, who raised it]."""
    return isinstance(fence, list) and len(fence) == 2 and isinstance(fence[0], int) and isinstance(fence[1], str)


class Lease:
    """Who has the device: a record in a file that all its users share, changed under a lock of microseconds.

    The token grows with every holder. Times are on the boot clock. A holder whose process is gone has lost the device;
    one that does not renew loses it at its expiry. While the watchdog of a holder still undoes what that one set, the
    device is not free yet.
    """

    def __init__(self, path):
        self.path = path
        self.boot_id = read_text("/", "proc/sys/kernel/random/boot_id") or ""
        self.pid, self.start, self.space = os.getpid(), started_at(os.getpid()), pid_space()
        self.token, self.seconds, self.expires_s = 0, 0.0, 0.0
        self.who, self.watchdog, self.visits = "", [], []

    @contextlib.contextmanager
    def guarded(self):
        """Give the record to this process alone; what is changed in it is written at the end."""
        file = self.locked()
        try:
            data = os.pread(file, LEASE_BYTES, 0)
            record = parse_lease(data, self.boot_id)
            before = json.dumps(record)
            yield record
            if json.dumps(record) != before:
                text = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8") + b"\n"
                if len(text) > LEASE_BYTES:
                    raise Refusal("lease-unusable", "too many wait for the device; try again later")
                os.pwrite(file, text, 0)
                os.ftruncate(file, len(text))
        finally:
            os.close(file)

    def locked(self):
        """Return the file, open and locked by us."""
        deadline_s = boot_clock_s() + LEASE_LOCK_S
        while True:
            file = self.opened()
            try:
                while True:
                    try:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        if boot_clock_s() >= deadline_s:
                            raise Refusal(
                                "lease-unusable",
                                "another process has kept %s locked for %g s; find it with: fuser %s"
                                % (self.path, LEASE_LOCK_S, self.path),
                            ) from None
                        time.sleep(0.001)
                if os.path.samestat(os.fstat(file), os.stat(self.path)):
                    return file
            except FileNotFoundError:
                pass
            except BaseException:
                os.close(file)
                raise
            os.close(file)  # it was deleted between our opening and our locking it

    def opened(self):
        """Return the file, open; made for everybody where it is missing."""
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        while True:
            try:
                # Without O_CREAT, which fs.protected_regular forbids on a file of another user.
                file = os.open(self.path, flags)
            except FileNotFoundError:
                umask = os.umask(0)
                try:
                    file = os.open(self.path, flags | os.O_CREAT | os.O_EXCL, 0o666)
                except FileExistsError:
                    continue
                finally:
                    os.umask(umask)
            except OSError as error:
                raise Refusal(
                    "lease-unusable",
                    'the lease %s cannot be opened (%s); delete it, or name another folder as lease_dir = "..." of '
                    "this device in lab.toml" % (self.path, error.strerror),
                ) from error
            if stat.S_ISREG(os.fstat(file).st_mode):
                return file
            os.close(file)
            raise Refusal("lease-unusable", "%s is not a file; delete it" % self.path)

    def knows(self, entry):
        """Say whether the process of an entry is alive, as far as we can tell: in another container it may be."""
        return entry["space"] != self.space or is_alive(entry["pid"], entry["start"])

    def hindrance(self, holder):
        """Return "" when a holder is none any more, "ending" when it is about to be, "held" otherwise."""
        if holder is None:
            return ""
        left_s = holder["expires_s"] - boot_clock_s()
        if not -max(0.0, holder["grace_s"]) < left_s <= LONGEST_LEASE_S:
            return ""
        if holder["space"] == self.space:
            agent_lives = is_alive(holder["pid"], holder["start"])
            if not (len(holder["watchdog"]) == 2 and is_alive(*holder["watchdog"])):
                return "held" if agent_lives and left_s > 0 else ""
            if not agent_lives:
                return "ending"
        return "ending" if left_s <= 0 or holder["is_ending"] else "held"

    def is_mine(self, record):
        """Say whether a record names us with our token."""
        holder = record["holder"]
        return (
            holder is not None
            and record["token"] == self.token
            and (holder["pid"], holder["start"], holder["space"]) == (self.pid, self.start, self.space)
        )

    def grace_s(self):
        """Return how long after our expiry our watchdog has to begin cleaning up before the device goes to others."""
        return max(0.5, min(15.0, self.seconds / 4))

    def entry(self):
        """Return ourselves as a holder."""
        now_s = boot_clock_s()
        return {
            "who": self.who, "pid": self.pid, "start": self.start, "space": self.space, "watchdog": self.watchdog,
            "since_s": now_s, "expires_s": now_s + self.seconds, "grace_s": self.grace_s(),
            "is_ending": False, "visits": [],
        }  # fmt: skip

    def take(self, who, seconds, ticket=None):
        """Take the device, if it is free and it is our turn.

        Args:
            who: us, for others.
            seconds: how long the lease lasts unless it is renewed.
            ticket: our number in the queue, or None.

        Returns:
            None when we have it, else {"holder", "expires_s", "state", "position", "of"}.
        """
        self.who, self.seconds = short_words(who, 200), seconds
        with self.guarded() as record:
            self.sweep(record, ticket)
            queue, state = record["queue"], self.hindrance(record["holder"])
            tickets = [one["ticket"] for one in queue]
            position = tickets.index(ticket) if ticket in tickets else len(tickets)
            if not state and position == 0:
                record.update(token=record["token"] + 1, holder=self.entry(), queue=queue[1:])
                self.token, self.expires_s = record["token"], record["holder"]["expires_s"]
                return None
            if state:
                words, left_s = record["holder"]["who"], record["holder"]["expires_s"] - boot_clock_s()
            else:
                words, left_s = queue[0]["who"] + ", who is first in the queue", 0.0
            return {
                "holder": words, "expires_s": max(0.0, left_s), "state": state or "queue", "position": position + 1,
                "of": max(position + 1, len(queue)),
            }  # fmt: skip

    def sweep(self, record, ticket=None):
        """Take waiters out of the queue that are gone or frozen; note that our own is not."""
        now_s = boot_clock_s()
        for one in record["queue"]:
            if one["ticket"] == ticket:
                one["seen_s"] = now_s
        record["queue"] = [
            one for one in record["queue"] if self.knows(one) and 0 <= now_s - one["seen_s"] < WAITER_SILENT_S
        ]

    def queue_up(self, who):
        """Go to the end of the queue; return our ticket.

        Raises:
            Refusal: too many wait already.
        """
        with self.guarded() as record:
            self.sweep(record)
            if len(record["queue"]) >= MOST_WAITING:
                raise Refusal("busy", "%d others wait for the device already; try again later" % MOST_WAITING)
            ticket = record["tickets"] = record["tickets"] + 1
            record["queue"].append({
                "ticket": ticket, "who": short_words(who, 100), "pid": self.pid, "start": self.start,
                "space": self.space, "seen_s": boot_clock_s(),
            })  # fmt: skip
            return ticket

    def leave_queue(self, ticket):
        """Take our ticket out of the queue."""
        with self.guarded() as record:
            record["queue"] = [one for one in record["queue"] if one["ticket"] != ticket]

    def has_ticket(self, ticket):
        """Say whether we are still in the queue: who was frozen is not."""
        with self.guarded() as record:
            return any(one["ticket"] == ticket for one in record["queue"])

    def renew(self, **changes):
        """Keep the device for another while, and note what is new about us.

        Raises:
            LeaseLost: it is ours no more.
        """
        with self.guarded() as record:
            if not self.is_mine(record):
                if record["token"]:
                    raise LeaseLost(self.why_lost(record))
                # Somebody has deleted the file: we have it, and say so again.
                record.update(token=self.token, holder=self.entry())
            holder = record["holder"]
            holder.update(changes, watchdog=self.watchdog, visits=[short_words(name, 60) for name in self.visits[:4]])
            self.expires_s = holder["expires_s"] = boot_clock_s() + self.seconds

    def check(self):
        """Raise LeaseLost when the device is ours no more."""
        with self.guarded() as record:
            if not self.is_mine(record) and record["token"]:
                raise LeaseLost(self.why_lost(record))

    def why_lost(self, record):
        """Say in a sentence why the device is ours no more."""
        if record["fence"] is not None and record["fence"][0] == self.token:
            return "the device was taken from this session by force, by %s; nothing more is done there for it" % (
                short_words(record["fence"][1], 200)
            )
        taker = " and it went to %s" % short_words(record["holder"]["who"], 200) if record["holder"] else ""
        return (
            "this session was not heard of for more than %g s, so that its lease of the device ended%s; nothing more "
            "is done there for it" % (self.seconds, taker)
        )

    def give_back(self):
        """Give the device back, if it is ours."""
        with self.guarded() as record:
            if self.is_mine(record):
                record["holder"] = None

    def fence(self, token, by):
        """Take the device from whoever holds it with that token; return the holder, or None when it has changed."""
        with self.guarded() as record:
            holder = record["holder"]
            if holder is None or record["token"] != token:
                return None
            record.update(token=token + 1, fence=[token, short_words(by, 200)])
            holder.update(expires_s=min(holder["expires_s"], boot_clock_s()), is_ending=True)
            return dict(holder)

    def state(self):
        """Return what others may know."""
        with self.guarded() as record:
            self.sweep(record)
            holder, now_s = record["holder"], boot_clock_s()
            state = self.hindrance(holder)
            shown = {"path": self.path, "token": record["token"], "state": state or "free", "holder": "", "held_s": 0.0,
                     "expires_s": 0.0, "visits": [], "queue": [one["who"] for one in record["queue"]]}  # fmt: skip
            if state:
                shown.update(holder=holder["who"], held_s=max(0.0, now_s - holder["since_s"]),
                             expires_s=max(0.0, holder["expires_s"] - now_s), visits=holder["visits"])  # fmt: skip
            return shown


def wait_for_lease(lease, who, seconds, wait_s, commands, answers):
    """Take the device, queueing for it where somebody else has it.

    Returns:
        (None, what the host said meanwhile) when we have it, else ({"holder", "expires_s"}, b"").

    Raises:
        HostGone: nobody wants it any more.
    """
    other = lease.take(who, seconds)
    if other is None:
        return None, b""
    deadline_s, told_s, said, ticket = boot_clock_s() + wait_s, 0.0, b"", None
    ending_s = boot_clock_s() + ENDING_S
    if wait_s > 0:
        ticket = lease.queue_up(who)
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(commands, selectors.EVENT_READ)
            while True:
                now_s = boot_clock_s()
                if ticket is not None and not lease.has_ticket(ticket):
                    ticket = lease.queue_up(who)
                other = lease.take(who, seconds, ticket)
                if other is None:
                    ticket = None
                    return None, said
                may_wait = now_s < deadline_s or (other["state"] == "ending" and now_s < ending_s)
                if not may_wait:
                    return {key: other[key] for key in ("holder", "expires_s")}, b""
                if wait_s > 0 and now_s >= told_s:
                    told_s = now_s + HEARTBEAT_S
                    shown = {key: other[key] for key in ("holder", "expires_s", "position", "of")}
                    say(answers, event="waiting", **shown)
                poll_s = WAITING_POLL_S if other["state"] == "held" else 0.05
                if selector.select(poll_s):
                    data = os.read(commands, 65536)
                    if not data:
                        raise HostGone
                    said += data
    finally:
        if ticket is not None:
            lease.leave_queue(ticket)


def serve_lease(folder, release, by):
    """Play the role that says who has the device, and that takes it away from a holder; it takes no lease."""
    try:
        lease = Lease(lease_path(folder))
        answer = {}
        if release is not None:
            answer = release_by_force(lease, release, by)
        shown = dict(lease.state(), **answer)
    except (Refusal, OSError) as error:
        kind, message = explain(error)
        shown = {"problem": message, "kind": kind}
    print(json.dumps(dict(shown, event="lease")))
    return 0


def release_by_force(lease, token, by):
    """Fence a holder; wait until its watchdog has ended it and undone what it set, or say that nobody did."""
    holder = lease.fence(token, by)
    if holder is None:
        return {"released": False, "has_ended": False}
    deadline_s = boot_clock_s() + 2 * WATCH_S + ENDING_S
    has_watchdog = len(holder["watchdog"]) == 2 and is_alive(*holder["watchdog"])
    if not has_watchdog and holder["space"] == lease.space and is_agent(holder["pid"], holder["start"]):
        with contextlib.suppress(OSError):  # not permitted: another user's; it finds out at its next step
            os.kill(holder["pid"], signal.SIGTERM)
    while boot_clock_s() < deadline_s:
        with lease.guarded() as record:
            current = record["holder"]
        if current is None or (current["pid"], current["start"]) != (holder["pid"], holder["start"]):
            return {"released": True, "has_ended": True}
        if holder["space"] == lease.space and not is_alive(holder["pid"], holder["start"]) and not has_watchdog:
            return {"released": True, "has_ended": True}
        time.sleep(0.05)
    return {"released": True, "has_ended": False}


def is_agent(pid, start):
    """Say whether a process is an agent: anybody on the device can write any number into the record."""
    words = (read_text("/", "proc/%d/cmdline" % pid) or "").split("\0")
    return "agent" in words and "--holder" in words and is_alive(pid, start)


# ---------------------------------------------------------------------------------------------------- the watchdog


# How soon a watchdog sees that its agent's lease was taken away: one wake-up, of microseconds.
WATCH_S = 2.0
# How long an agent may take to end its visits when its lease is lost, before it is killed.
LAST_WORDS_S = 3.0


class Watchdog:
    """The agent's end of its watchdog: a process that outlives it, ends its visits and undoes what it set."""

    def __init__(self, root, lease, sysroot):
        self.lease, self.visits = lease, {}
        self.argv = [
            sys.executable, "-S", program(root), "watchdog", "--root", os.path.abspath(root), "--lease",
            lease.path, "--token", str(lease.token), "--agent", str(lease.pid), "--start", str(lease.start),
            "--lease-s", "%g" % lease.seconds, "--sysroot", sysroot,
        ]  # fmt: skip
        self.launch()

    def launch(self):
        """Start it, and tell it and the lease of each other."""
        read_end, self.pipe = os.pipe()
        try:
            self.process = subprocess.Popen(
                self.argv,
                stdin=read_end,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,  # who hangs up on us does not reach it
            )
        finally:
            os.close(read_end)
        os.set_blocking(self.pipe, False)
        self.lease.watchdog = [self.process.pid, started_at(self.process.pid)]
        self.lease.renew()
        for pid, start in self.visits.items():
            os.write(self.pipe, b"+ %d %d\n" % (pid, start))

    def tell(self, text):
        """Say something to it; one that was killed or frozen is replaced."""
        try:
            os.write(self.pipe, text)
        except (BrokenPipeError, BlockingIOError):
            self.replace()

    def replace(self):
        """Start another one."""
        self.dismiss()
        self.launch()

    def watch(self, pid):
        """Have it end the group of a process, should we die."""
        self.visits[pid] = started_at(pid)
        self.tell(b"+ %d %d\n" % (pid, self.visits[pid]))

    def forget(self, pid):
        """Have it leave alone what has ended."""
        if self.visits.pop(pid, None) is not None:
            self.tell(b"- %d 0\n" % pid)

    def check(self):
        """See that it lives."""
        if self.process.poll() is not None:
            self.replace()

    def dismiss(self):
        """End it: there is nothing left to undo."""
        self.process.kill()
        self.process.wait()
        os.close(self.pipe)


def serve_watchdog(root, lease, sysroot):
    """Play the role of the watchdog: wait for the agent's end or the loss of its lease, then clean up after it.

    Args:
        root: where the agent keeps its files.
        lease: the agent's, by process and token.
        sysroot: where /sys is.
    """
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    visits, unfinished, is_over, deadline_s = {}, b"", False, None
    watch_s = max(0.05, min(WATCH_S, lease.grace_s() / 4))
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        while not is_over:
            if selector.select(watch_s if deadline_s is None else max(0.0, deadline_s - boot_clock_s())):
                data = os.read(0, 65536)
                *lines, unfinished = (unfinished + data).split(b"\n")
                for line in lines:
                    mark, pid, start = line.split()
                    visits[int(pid)] = int(start)
                    if mark == b"-":
                        del visits[int(pid)]
                    is_over = is_over or mark == b"!"  # it has lost its lease, and knows
                is_over = is_over or not data
            elif deadline_s is not None:
                if is_alive(lease.pid, lease.start):
                    os.kill(lease.pid, signal.SIGKILL)
                is_over = True
            elif is_failing(lease):
                # It may still tell its host why. One that is stopped cannot.
                deadline_s = boot_clock_s() + LAST_WORDS_S
                with contextlib.suppress(ProcessLookupError):
                    os.kill(lease.pid, signal.SIGUSR1)
    visits.pop(0, None)
    for pid, start in visits.items():
        # A leader that is gone may have left others of its group; one with the number of another is not ours.
        if started_at(pid) in (0, start):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
    restore_after(root, lease, sysroot)
    return 0


def is_failing(lease):
    """Say whether an agent has lost its lease, or has let it expire; then the device is kept until all is undone."""
    try:
        with lease.guarded() as record:
            holder = record["holder"]
            if record["token"] == 0:  # deleted: the agent writes it again
                return False
            if lease.is_mine(record) and boot_clock_s() < holder["expires_s"] + holder["grace_s"] / 2:
                return False
            if holder is not None and (holder["pid"], holder["start"]) == (lease.pid, lease.start):
                record["token"] += 1
                holder.update(expires_s=boot_clock_s(), grace_s=RESTORE_S, is_ending=True)
            return True
    except (Refusal, OSError):  # seen again in two seconds
        return False


def restore_after(root, lease, sysroot):
    """Undo what an agent set, unless somebody else has the device by now, who must not be disturbed."""
    with lease.guarded() as record:
        holder = record["holder"]
        is_agents = holder is not None and (holder["pid"], holder["start"]) == (lease.pid, lease.start)
        if holder is None or is_agents:
            lease.pid, lease.start = os.getpid(), started_at(os.getpid())
            lease.seconds, lease.who = RESTORE_S, holder["who"] if holder else "an earlier session"
            lease.token = record["token"] + 1
            record.update(token=lease.token, holder=dict(lease.entry(), is_ending=True))
    if lease.pid == os.getpid():
        try:
            restore_settings(root, sysroot)
        finally:
            lease.give_back()


# ---------------------------------------------------------------------------------------------------- settings


RESTORE_FILE = "restore.json"
CLOCKS_FILE = "jetson_clocks.store"
TOOL_TIMEOUT_S = 30.0
# What would let us do what only root may.
HOW_TO_PERMIT = (
    "set sudo = true in the settings of this device in lab.toml, with a rule in its sudoers that lets user %s run `%s` "
    "without a password, or connect as root"
)


def user_name():
    """Return who we are on the device."""
    return "root" if os.geteuid() == 0 else os.environ.get("USER") or "number %d" % os.geteuid()


def run_privileged(argv, sudo, stdin=b"", sysroot="/"):
    """Run a program that may need root; return what it printed.

    Args:
        argv: the program and its arguments.
        sudo: ask `sudo -n` when we are not root.
        stdin: what it reads.
        sysroot: where sudo is.

    Raises:
        Refusal: it failed or took too long; the text says what would allow it.
    """
    asked = argv
    if sudo and os.geteuid() != 0:
        tool = find_tool("sudo", sysroot)
        if tool is None:
            raise Refusal("not-permitted", "there is no sudo on the device; connect as root")
        asked = [tool, "-n", *argv]
    try:
        done = subprocess.run(asked, input=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              timeout=TOOL_TIMEOUT_S, check=False)  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise Refusal("timeout", "`%s` did not end within %g s" % (" ".join(argv), TOOL_TIMEOUT_S)) from error
    if done.returncode != 0:
        said = (done.stderr + done.stdout).decode("utf-8", "replace").split("\n")
        words = short_words(" ".join(line.strip() for line in said if line.strip()), 300)
        words = words or how_it_ended(done.returncode)
        then = "" if os.geteuid() == 0 else "; " + HOW_TO_PERMIT % (user_name(), " ".join(argv))
        raise Refusal("not-permitted", "`%s` failed: %s%s" % (" ".join(argv), words, then))
    return done.stdout.decode("utf-8", "replace")


def write_value(path, value, sudo, sysroot="/"):
    """Write a file of /sys and see that the kernel took the value.

    Raises:
        Refusal: it may not be written, or the kernel refused.
    """
    try:
        with open(path, "w", encoding="utf-8") as stream:
            stream.write(value)
    except PermissionError as error:
        if not sudo:
            what = "%s may not be written by user %s; " % (path, user_name())
            raise Refusal("not-permitted", what + HOW_TO_PERMIT % (user_name(), "tee " + path)) from error
        run_privileged(["tee", path], sudo, value.encode("utf-8"), sysroot)
    except OSError as error:
        raise Refusal("not-permitted", "the kernel refused %r for %s: %s" % (value, path, error.strerror)) from error
    found = read_text("/", path)
    if found != value:
        raise Refusal("not-permitted", "%s says %r after %r was written to it" % (path, found, value))


def governor_files(sysroot):
    """Return the file of every cpufreq policy, or of every core where the kernel has no policies' folder."""
    folder = os.path.join(sysroot, "sys/devices/system/cpu")
    for pattern in ("cpufreq/policy[0-9]*", "cpu[0-9]*/cpufreq"):
        found = sorted(glob.glob(os.path.join(folder, pattern, "scaling_governor")))
        if found:
            return [os.path.abspath(path) for path in found]
    return []


def parse_cores(text):
    """Return the cores of "4-7" or "0,2"; raises ValueError."""
    cores = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        low, high = int(first), int(last if dash else first)
        if not 0 <= low <= high < 4096:
            raise ValueError(part)
        cores.update(range(low, high + 1))
    return sorted(cores)


def mode_number(mode):
    """Return 2 of "MODE_30W (2)", or None."""
    found = re.search(r"\((\d+)\)$", mode or "")
    return int(found.group(1)) if found else None


class Settings:
    """What the device is set to while we hold it. What was there before is on the disk before anything is set."""

    def __init__(self, root, sysroot, tools):
        self.root, self.sysroot, self.tools = root, sysroot, tools
        self.entries = []
        self.cores = []

    def apply(self, wanted):
        """Set what is wanted, as far as it can be; return {"applied": {...}, "refused": {setting: sentence}}."""
        verbs = (("power_mode", self.set_power_mode), ("governor", self.set_governor),
                 ("fixed_clocks", self.fix_clocks), ("cpu_affinity", self.set_affinity))  # fmt: skip
        applied, refused = {}, {}
        for name, verb in verbs:
            if wanted.get(name) is None or wanted[name] is False or wanted[name] == "":  # power mode 0 is one
                continue
            try:
                applied[name] = verb(wanted[name], bool(wanted.get("sudo")))
            except (Refusal, OSError) as error:
                refused[name] = explain(error)[1]
        return {"applied": applied, "refused": refused}

    def note(self, *entries):
        """Write down how it was, for whoever cleans up after us."""
        self.entries += entries
        write_restore(self.root, self.entries)

    def set_governor(self, value, sudo):
        """Set the governor of every policy."""
        files = governor_files(self.sysroot)
        if not files:
            raise Refusal("not-available", "this kernel has no cpufreq governors; leave governor out of lab.toml")
        for path in files:
            known = (read_text(os.path.dirname(path), "scaling_available_governors") or value).split()
            if value not in known:
                raise Refusal("not-available", "there is no governor %r; it has: %s" % (value, ", ".join(known)))
        was = {path: read_text("/", path) for path in files}
        entries = [{"setting": "governor", "path": path, "was": was[path], "set": value, "sudo": sudo}
                   for path in files if was[path] not in (value, None)]  # fmt: skip
        if entries:
            self.note(*entries)
        try:
            for entry in entries:
                write_value(entry["path"], value, sudo, self.sysroot)
        except Refusal:
            for entry in entries:  # one policy must not differ from the others
                restore_entry(entry, self.sysroot, self.tools, is_leftover=False)
            raise
        return value

    def set_power_mode(self, value, sudo):
        """Have nvpmodel choose a mode."""
        tool = self.tools.get("nvpmodel")
        if tool is None:
            raise Refusal("not-available", "there is no nvpmodel on the device; leave power_mode out of lab.toml")
        was = mode_number(parse_nvpmodel(ask_tool([tool, "-q"], TOOL_TIMEOUT_S)))
        if was is None:
            raise Refusal("not-available", "nvpmodel -q does not say its mode, so that it could not be restored")
        if was != value:
            self.note({"setting": "power_mode", "was": was, "set": value, "sudo": sudo})
            # Modes that need a reboot ask for it; without a terminal to say yes they keep the mode that is.
            run_privileged([tool, "-m", str(value)], sudo, b"no\n", self.sysroot)
        now = parse_nvpmodel(ask_tool([tool, "-q"], TOOL_TIMEOUT_S))
        if mode_number(now) != value:
            raise Refusal(
                "not-available",
                "nvpmodel says %r after mode %d was chosen; a mode that needs a reboot must be chosen by hand"
                % (now, value),
            )
        return now

    def fix_clocks(self, _value, sudo):
        """Have jetson_clocks fix all clocks at their greatest."""
        tool = self.tools.get("jetson_clocks")
        if tool is None:
            raise Refusal("not-available", "there is no jetson_clocks on it; leave fixed_clocks out of lab.toml")
        if not read_clocks_fixed(self.sysroot, gpu_devfreq(self.sysroot)):
            store = os.path.join(os.path.abspath(self.root), CLOCKS_FILE)
            with contextlib.suppress(FileNotFoundError):  # it would ask whether to overwrite it
                os.unlink(store)
            run_privileged([tool, "--store", store], sudo, sysroot=self.sysroot)
            self.note({"setting": "fixed_clocks", "store": store, "sudo": sudo})
            run_privileged([tool], sudo, sysroot=self.sysroot)
        return "fixed"

    def set_affinity(self, value, _sudo):
        """Have visits run on these cores alone."""
        if not hasattr(os, "sched_setaffinity"):
            raise Refusal("not-available", "this system does not bind processes to cores")
        try:
            cores, there = parse_cores(value), os.sched_getaffinity(0)
        except ValueError as error:
            raise Refusal("bad-command", '%r are no cores; "4-7" or "0,2" is meant' % value) from error
        absent = [core for core in cores if core not in there]
        if absent:
            raise Refusal(
                "not-available",
                "core %d is not among those that user %s may use (%s)"
                % (absent[0], user_name(), ", ".join(map(str, sorted(there)))),
            )
        self.cores = cores
        return value


def write_restore(root, entries):
    """Write down what is to be undone, so that it is on the disk when we return."""
    document = {"boot_id": read_text("/", "proc/sys/kernel/random/boot_id") or "", "entries": entries}
    write_whole(os.path.join(root, RESTORE_FILE), document, is_synced=True)
    sync_folder(root)


def restore_settings(root, sysroot, is_leftover=False):
    """Undo what is written down; what cannot be undone stays written down for the next agent.

    Args:
        root: where the agent keeps its files.
        sysroot: where /sys is.
        is_leftover: of an earlier session: what somebody has changed since stays as it is.

    Returns:
        Sentences about what could not be undone.
    """
    path = os.path.join(root, RESTORE_FILE)
    try:
        with open(path, encoding="utf-8") as stream:
            document = json.load(stream)
        entries, boot_id = list(document["entries"]), document["boot_id"]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError):
        os.replace(path, path + ".bad")
        return ["%s cannot be read, so that nothing could be undone; it is kept as %s.bad" % (path, path)]
    has_rebooted = boot_id != (read_text("/", "proc/sys/kernel/random/boot_id") or "")
    tools, problems, left = find_tools(sysroot), [], []
    for entry in reversed(entries):
        # Only nvpmodel's mode outlives a reboot.
        if has_rebooted and entry["setting"] != "power_mode":
            continue
        try:
            restore_entry(entry, sysroot, tools, is_leftover)
        except (Refusal, OSError) as error:
            problems.append("%s could not be restored: %s" % (entry["setting"], explain(error)[1]))
            left.insert(0, entry)
    if left:
        write_restore(root, left)
    else:
        os.unlink(path)
    return problems


def restore_entry(entry, sysroot, tools, is_leftover):
    """Undo one thing that was set."""
    if entry["setting"] == "governor":
        now = read_text("/", entry["path"])
        if now != entry["was"] and not (is_leftover and now != entry["set"]):
            write_value(entry["path"], entry["was"], entry["sudo"], sysroot)
    elif entry["setting"] == "power_mode" and "nvpmodel" in tools:
        now = mode_number(parse_nvpmodel(ask_tool([tools["nvpmodel"], "-q"], TOOL_TIMEOUT_S)))
        if now != entry["was"] and not (is_leftover and now != entry["set"]):
            run_privileged([tools["nvpmodel"], "-m", str(entry["was"])], entry["sudo"], b"no\n", sysroot)
    elif entry["setting"] == "fixed_clocks" and "jetson_clocks" in tools:
        has_changed = read_clocks_fixed(sysroot, gpu_devfreq(sysroot)) is False
        if not (is_leftover and has_changed):
            run_privileged([tools["jetson_clocks"], "--restore", entry["store"]], entry["sudo"], sysroot=sysroot)


# ---------------------------------------------------------------------------------------------------- the agent


class Child:
    """The agent's end of a visit: its process, its unread lines and the end of its stderr."""

    def __init__(self, root, selector, cores, watchdog):
        self.selector, self.watchdog = selector, watchdog
        self.lines = collections.deque()
        self.unfinished = b""
        self.noise = b""
        self.is_silent = False
        argv = [sys.executable, program(root), "visit", "--root", root, "--parent", str(os.getpid())]
        self.process = subprocess.Popen(
            [*argv, "--cores", ",".join(map(str, cores))] if cores else argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a group of its own: what a runtime starts dies with it
        )
        watchdog.watch(self.process.pid)
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
        self.watchdog.forget(self.process.pid)
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
    hint = {
        "SIGKILL": " (often the kernel's out-of-memory killer)",
        "SIGILL": " (an instruction that this processor does not have)",
    }.get(name, "")
    return "was killed by %s%s" % (name, hint)


class Agent:
    """Answers the host: keeps files, starts visits, relays their answers, and lets none of them live on."""

    def __init__(self, root, commands, answers, lease, watchdog, sysroot):
        self.root, self.answers, self.sysroot = root, answers, sysroot
        self.lease, self.watchdog, self.lost = lease, watchdog, None
        self.tools = find_tools(sysroot)
        self.settings = Settings(root, sysroot, self.tools)
        self.children = {}
        self.store = Store(root)
        self.allowed = set()
        self.inbox = collections.deque()
        self.unfinished = b""
        self.current_id = None
        self.next_beat_s = 0.0
        self.selector = selectors.DefaultSelector()
        self.selector.register(commands, selectors.EVENT_READ, self.hear_host)
        alarm, sound = os.pipe()
        for descriptor in (alarm, sound):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(sound, warn_on_full_buffer=False)
        signal.signal(signal.SIGUSR1, lambda received, frame: None)
        self.selector.register(alarm, selectors.EVENT_READ, self.hear_watchdog)

    def hear_host(self, data):
        """Take what the host sent; whatever it is, it renews the lease."""
        if not data:
            raise HostGone
        *lines, self.unfinished = (self.unfinished + data).split(b"\n")
        self.inbox.extend(line for line in lines if b'"renew"' not in line or json.loads(line)["do"] != "renew")
        if self.lost is None and self.lease.expires_s - boot_clock_s() < self.lease.seconds * 7 / 8:
            self.keep()
            self.watchdog.check()

    def hear_watchdog(self, _data):
        """See whether the device is still ours: its watchdog says that it is not."""
        if self.lost is None:
            self.check()

    def keep(self):
        """Renew the lease, and write down which visits run."""
        self.lease.visits = list(self.children)
        try:
            self.lease.renew()
        except LeaseLost as error:
            self.lose(error)
            raise

    def check(self):
        """See that the device is still ours: whoever was frozen or cut off finds out here."""
        if self.lost is not None:
            raise LeaseLost(self.lost)
        try:
            self.lease.check()
        except LeaseLost as error:
            self.lose(error)
            raise

    def lose(self, error):
        """End what runs; the watchdog undoes what was set, if nobody else has the device yet."""
        self.lost = str(error)
        self.kill_children()
        self.watchdog.tell(b"! 0 0\n")
        # For as long as its host may want to hear it.
        self.lease.expires_s = boot_clock_s() + self.lease.seconds

    def kill_children(self):
        """End every visit."""
        while self.children:
            self.children.popitem()[1].kill()

    def turn(self, timeout_s):
        """Wait for the host or a child to say something, and take it.

        Raises:
            HostGone: the host is gone, or was silent for as long as the lease lasts: its network may have vanished
                without a word, and then nobody closes our stdin.
            LeaseLost: the device is ours no more.
        """
        found = self.selector.select(min(timeout_s, max(0.0, self.lease.expires_s - boot_clock_s())))
        # Who was stopped and goes on comes out of select with nothing, though something waits to be read.
        for key, _ in found or self.selector.select(0):
            key.data(os.read(key.fd, 65536))
        if boot_clock_s() >= self.lease.expires_s:
            raise HostGone

    def beat(self):
        """Hear the host, and show it that we live, at most every HEARTBEAT_S, while it waits for an answer."""
        self.turn(0)
        if time.monotonic() >= self.next_beat_s:
            self.next_beat_s = time.monotonic() + HEARTBEAT_S
            say(self.answers, event="heartbeat")

    def greet(self):
        """Say hello."""
        say(
            self.answers,
            event="hello",
            protocol=PROTOCOL,
            runner_sha256=digest_of(os.path.abspath(__file__)),
            python=sys.executable,
            facts=read_facts(self.sysroot),
            lease={"token": self.lease.token, "seconds": self.lease.seconds},
        )

    def serve(self, early):
        """Answer commands until the host says bye, goes away, or is silent for too long.

        Args:
            early: what the host has said before we had the device.
        """
        verbs = {"have": self.have, "commit": self.commit, "conditions": self.conditions, "open": self.open,
                 "bursts": self.bursts, "memory": self.memory, "outputs": self.outputs, "profile": self.profile,
                 "probe": self.probe, "build": self.build, "close": self.close, "allow": self.allow,
                 "part": self.part, "space": self.space, "clean": self.clean, "install": self.install,
                 "runtimes": self.runtimes, "remove_runtime": self.remove_runtime,
                 "try_runtime": self.try_runtime, "set": self.set, "cool": self.cool,
                 "check_bundle": self.check_bundle, "place": self.place, "placed": self.placed,
                 "switch": self.switch, "rollback": self.rollback, "withdraw": self.withdraw}  # fmt: skip
        try:
            self.greet()
            if early:
                self.hear_host(early)
            while True:
                try:
                    command = self.next_command()
                except LeaseLost:  # told with the answer to the next command
                    continue
                number, verb = command.pop("id", None), command.pop("do", None)
                self.next_beat_s = time.monotonic() + HEARTBEAT_S
                if verb == "bye":
                    say(self.answers, id=number, event="answer")
                    return
                try:
                    if verb not in verbs:
                        raise Refusal("bad-command", "the runner knows no command %r" % (verb,))
                    self.check()
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
            self.end()

    def end(self):
        """End the visits, undo what was set, and give the device back."""
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # one is enough: what follows must not be interrupted
        self.kill_children()
        if self.lost is None:
            try:
                self.lease.renew(is_ending=True)
            except LeaseLost as error:
                self.lose(error)
        if self.lost is not None:
            return
        for problem in restore_settings(self.root, self.sysroot):
            print(problem, file=sys.stderr)
        clear_builds(self.root)
        self.lease.give_back()
        self.watchdog.dismiss()

    def set(self, settings):
        """Set the device as asked, as far as it can be; all of it is undone when the host goes, however it goes."""
        return self.settings.apply(settings)

    def cool(self, below_celsius, cap_s):
        """Wait until the hottest zone is cooler than asked, or until `cap_s` has passed."""
        started_s = told_s = time.monotonic()
        while True:
            zones = read_temperatures(self.sysroot)
            hottest = max(zones.values()) if zones else None
            waited_s = time.monotonic() - started_s
            is_cool = None if hottest is None else hottest < below_celsius
            if is_cool is not False or waited_s >= cap_s:
                return {"celsius": hottest, "waited_s": waited_s, "reached": is_cool}
            if time.monotonic() >= told_s:
                told_s = time.monotonic() + HEARTBEAT_S
                text = "waiting for the device to cool from %.1f to %g degrees Celsius" % (hottest, below_celsius)
                say(self.answers, event="progress", text=text, done=None, total=None)
            self.turn(max(0.0, min(1.0, cap_s - waited_s)))

    def next_command(self):
        """Return the host's next command."""
        while not self.inbox:
            self.turn(LONGEST_LEASE_S)
        return json.loads(self.inbox.popleft().decode("utf-8"))

    def allow(self, digests):
        """Add to the files that may be executed here until the host goes away: device halves, by digest."""
        named = {os.path.basename(self.store.part_path(digest))[: -len(".part")] for digest in digests}
        if len(self.allowed | named) > MOST_ALLOWED:
            raise Refusal("bad-command", "the runner executes at most %d different files" % MOST_ALLOWED)
        self.allowed |= named
        return {}

    def check_allowed(self, digest):
        """Refuse to execute what the host has not named."""
        if digest not in self.allowed:
            raise Refusal(
                "not-allowed",
                "the object %.64s is not on the list of files that this host allows to be executed" % (digest,),
            )

    def have(self, digests, now_s=None):
        """Say which objects are missing, which of them have begun to arrive, and how much room there is.

        Args:
            digests: an object that is not what its name says is deleted and counts as missing.
            now_s: the host's clock, seconds since 1970: what is asked for counts as used then.
        """
        self.store.now_s = now_s
        missing = [digest for digest in digests if not self.store.has(digest, self.beat)]
        self.store.write_index()
        begun = [digest for digest in missing if os.path.isfile(self.store.part_path(digest))]
        return dict(self.space(), missing=missing, parts=begun)

    def part(self, sha256):
        """Say what has arrived of an object: how much, and the digest of it."""
        path = self.store.part_path(sha256)
        if not os.path.isfile(path):
            return {"size_bytes": 0, "sha256": hashlib.sha256().hexdigest()}
        return {"size_bytes": os.path.getsize(path), "sha256": digest_of(path, self.beat)}

    def space(self):
        """Say how much may still be written where objects are kept."""
        return {"free_bytes": free_bytes(self.root)}

    def commit(self, part, sha256):
        """Give an uploaded part its name, if it is what it should be."""
        if part != os.path.basename(self.store.part_path(sha256)):
            raise Refusal("bad-command", "%.200r is not the name of the part of %s" % (part, sha256))
        self.store.commit(sha256, self.beat)
        self.store.write_index()
        return {}

    def clean(self, unused_s, now_s):
        """Delete what was not used for a while: objects, outputs and runtimes.

        Args:
            unused_s: at least an hour, so that nothing of this session goes.
            now_s: the host's clock.
        """
        if not unused_s >= 3600:
            raise Refusal("bad-command", "nothing is deleted that was used within the last hour")
        self.store.now_s = now_s
        kept = {"objects/" + os.path.basename(__file__)}
        removed = {name: self.store.remove(name) for name in self.store.unused(unused_s, kept)}
        self.store.write_index()
        return {"removed": len(removed), "freed_bytes": sum(removed.values())}

    def install(self, tar, name):
        """Unpack an uploaded tar as a runtime, whole or not at all; one that is there already stays as it is."""
        path = runtime_path(self.root, name)
        if not os.path.isdir(path):
            if not self.store.has(tar, self.beat):
                raise Refusal("missing-object", "the object %s is not on the device; ship it first" % tar)
            source = object_path(self.root, tar)
            wanted, free = os.path.getsize(source), free_bytes(self.root)
            if wanted > free:
                raise Refusal(
                    "disk-full",
                    "unpacking %s takes %d bytes and %d are free on the device's disk; free some space there"
                    % (name, wanted, free),
                )
            part = path + ".part"
            shutil.rmtree(part, ignore_errors=True)
            os.mkdir(part, 0o700)
            try:
                unpack(source, part, self.beat)
                os.sync()  # hundreds of files at once: an fsync of each takes minutes on a card
                os.replace(part, path)
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise
            sync_folder(os.path.dirname(path))
        self.store.note("runtimes/" + name)
        self.store.write_index()
        return {"size_bytes": tree_bytes(path)}

    def runtimes(self):
        """Say which runtimes are installed."""
        names = sorted(name for name in os.listdir(self.store.path("runtimes")) if RUNTIME.fullmatch(name))
        return {
            "runtimes": [
                {"name": name, "size_bytes": tree_bytes(runtime_path(self.root, name))}
                for name in names
                if not name.endswith(".part")
            ]
        }

    def remove_runtime(self, name):
        """Delete an installed runtime; a missing one is not an error."""
        freed = self.store.remove("runtimes/" + name) if os.path.isdir(runtime_path(self.root, name)) else 0
        self.store.write_index()
        return {"freed_bytes": freed}

    def try_runtime(self, name, module, timeout_s=300.0):
        """Import a module of an installed runtime in a process of its own, which may well crash."""
        if not isinstance(module, str) or not MODULE.fullmatch(module):
            raise Refusal("bad-command", "%.200r is not the name of a module" % (module,))
        runtime_path(self.root, name)
        return self.alone("try " + name, {"do": "try_runtime", "name": name, "module": module}, timeout_s)

    def checked(self, job, key):
        """Return a job whose device half may be executed, after noting that its runtime is used."""
        self.check_allowed(job.get(key))
        if job.get("runtime") and os.path.isdir(runtime_path(self.root, job["runtime"])):
            self.store.note("runtimes/" + job["runtime"])
        return job

    def conditions(self, visits=()):
        """Return the device's state, and the CPU time that the named visits have used."""
        pids = {visit: self.child(visit).process.pid for visit in visits}
        return {
            "conditions": read_conditions(self.sysroot, self.tools),
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
        self.children[visit] = Child(self.root, self.selector, self.settings.cores, self.watchdog)
        self.keep()

    def open(self, visit, job, timeout_s):
        """Start a visit: load, first inference, warm-up."""
        self.checked(job, "session")
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
        return self.alone(visit, {"do": "memory", "job": self.checked(job, "session"), "count": count}, timeout_s)

    def profile(self, visit, job, count, timeout_s):
        """Have operators timed one by one, in a visit of its own."""
        return self.alone(visit, {"do": "profile", "job": self.checked(job, "session"), "count": count}, timeout_s)

    def outputs(self, visit, job, timeout_s):
        """Compute the outputs of all samples in a visit of its own."""
        return self.alone(visit, {"do": "outputs", "job": self.checked(job, "session")}, timeout_s)

    def probe(self, visit, builder, timeout_s):
        """Ask a builder what is here, in a process of its own: a runtime without a driver may crash."""
        self.check_allowed(builder)
        return self.alone(visit, {"do": "probe", "builder": builder}, timeout_s)

    def build(self, visit, job, timeout_s):
        """Have a builder make files, in a process of its own."""
        return self.alone(visit, {"do": "build", "job": self.checked(job, "builder")}, timeout_s)

    def check_bundle(self, visit, job, timeout_s):
        """Check a bundle and keep what is asked for of one cell, in a process of its own."""
        return self.alone(visit, {"do": "check", "job": self.checked(job, "program")}, timeout_s)

    def place(self, visit, slot, job, timeout_s, allow_downgrade=False):
        """Check a bundle and put what it has of a cell beside what is installed; nothing uses it yet.

        What is older than what is used is refused, whatever the host has made of it.
        """
        place = Slot(self.root, slot)
        place.make()
        place.clear()
        used = place.pointed()
        if used and not allow_downgrade:
            job = dict(job, min_sequence=max(int(job.get("min_sequence") or 0), int(used[0].partition("-")[0])))
        staging = os.path.join(place.path, "staging")
        command = {"do": "check", "job": self.checked(job, "program"), "folder": staging}
        answer = self.alone(visit, command, timeout_s)
        if not isinstance(answer["receipt"], dict):
            raise Refusal("bad-command", "the host has not said which cell of the bundle is to be placed")
        self.check()
        name = place.settle(os.path.join(staging, answer["folder"]), answer["receipt"], self.beat)
        place.clear()
        return told_release(name, answer["receipt"])

    def placed(self):
        """Say what is installed."""
        folder = os.path.join(self.root, "installed")
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        return {"slots": [self.told_slot(name) for name in names if SLOT.fullmatch(name)][:MOST_SLOTS]}

    def told_slot(self, name):
        """Say what is installed in a slot, and what is wrong with it."""
        place = Slot(self.root, name)
        try:
            used, problem = place.pointed(), ""
        except Refusal as refusal:
            used, problem = [], str(refusal)
        return {
            "slot": name,
            "path": os.path.abspath(place.path),
            "used": used,
            "problem": problem,
            "releases": [
                dict(told_release(one, place.receipt(one)), size_bytes=tree_bytes(place.release(one)))
                for one in place.names()
            ],
        }

    def switch(self, slot, release):
        """Have a release be the one that is used, in one step; the one that was used is kept, older ones go."""
        place = Slot(self.root, slot)
        self.demand_whole(place, release)
        before = place.pointed()
        names = [release, *(name for name in before if name != release)][:KEPT_RELEASES]
        if names != before:
            place.point(names)
        place.prune()
        return {"used": names}

    def rollback(self, slot):
        """Have the release be used that was used before."""
        place = Slot(self.root, slot)
        before = place.pointed()
        if len(before) < 2:
            has = "has %s and nothing before it to go back to" % before[0] if before else "has nothing installed"
            raise Refusal("nothing-before", "slot %s of the device %s" % (slot, has))
        self.demand_whole(place, before[1])
        place.point(before[1:])
        return {"used": before[1:], "left": before[0]}

    def demand_whole(self, place, release):
        """Refuse to use a release of which a file is not what it was when it was installed."""
        damaged = damage_of(place.release(release), place.receipt(release).get("files"), self.beat)
        if damaged:
            raise Refusal(
                "damaged",
                "%s of release %s in slot %s is not what was installed; nothing was switched: install it again"
                % (damaged, release, place.name),
            )
        self.check()  # reading may have taken longer than we had the device

    def withdraw(self, slot, release):
        """Delete a release that is not used, nor the one to go back to."""
        place = Slot(self.root, slot)
        if release in place.pointed():
            raise Refusal("bad-command", "release %s of slot %s is used" % (release, slot))
        place.remove(release)
        return {}

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
    for folder in (root, *(os.path.join(root, name) for name in ("objects", "outputs", "runtimes"))):
        os.makedirs(folder, mode=0o700, exist_ok=True)
    try:
        os.chmod(root, 0o700)
    except PermissionError as error:
        raise Refusal("device-io", "%s belongs to another user; choose another root in lab.toml" % root) from error
    for part in glob.glob(os.path.join(root, "*", "*.part*")):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - os.path.getmtime(part) > STALE_PART_S:
                shutil.rmtree(part) if os.path.isdir(part) else os.unlink(part)


def program(root):
    """Return what a child of the agent is started with: this file compiled, where `compile_program` could do that."""
    path = compiled_path(root)
    return path if os.path.isfile(path) else os.path.abspath(__file__)


def compiled_path(root):
    """Return where this file is kept compiled; its name says of which file, and by which Python."""
    own = os.stat(os.path.abspath(__file__))
    parts = (os.path.abspath(__file__), own.st_size, own.st_mtime_ns, own.st_ino, sys.implementation.cache_tag)
    name = hashlib.sha256(repr(parts).encode("utf-8")).hexdigest()[:16]
    return os.path.abspath(os.path.join(root, "compiled", name + ".pyc"))


def compile_program(root):
    """Compile this file once: each process of a visit would do so again, for 60 ms on a PC and much more on a board."""
    path = compiled_path(root)
    with contextlib.suppress(OSError), open(path, "rb") as stream:
        if stream.read(4) == importlib.util.MAGIC_NUMBER:
            return
    shutil.rmtree(os.path.dirname(path), ignore_errors=True)
    os.makedirs(os.path.dirname(path), mode=0o700)
    with contextlib.suppress(OSError):  # a full disk: visits start all the same, from the source
        part = path + ".part"
        py_compile.compile(os.path.abspath(__file__), part, doraise=True)
        with open(part, "rb") as stream:  # else a power cut leaves the name and nothing behind it, for good
            os.fsync(stream.fileno())
        os.replace(part, path)


def clear_builds(root):
    """Delete what builds left that were cut off; only who has the lease may."""
    shutil.rmtree(os.path.join(root, "building"), ignore_errors=True)


def serve_agent(given):
    """Play the role of the agent, with the command line's options."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _frame: sys.exit(128 + received))
    commands, answers = own_descriptors()
    root, lease = given.root, None
    try:
        lease = Lease(lease_path(given.lease_dir))
        other, early = wait_for_lease(lease, given.holder, given.lease_s, given.wait_s, commands, answers)
        if other is not None:
            say(answers, event="busy", **other)
            return 1
        prepare_root(root)
        compile_program(root)
        for problem in restore_settings(root, given.sysroot, is_leftover=True):
            print(problem, file=sys.stderr)
        clear_builds(root)
        agent = Agent(root, commands, answers, lease, Watchdog(root, lease, given.sysroot), given.sysroot)
    except HostGone:
        return 0
    except (Refusal, LeaseLost, OSError) as error:
        if lease is not None:
            lease.give_back()
        kind, message = explain(error)
        say(answers, event="error", id=None, kind=kind, message=message, stderr_tail="")
        return 1
    with contextlib.suppress(HostGone, BrokenPipeError):
        agent.serve(early)
    return 0


def main():
    """Play the role that the command line asks for."""
    parser = argparse.ArgumentParser(description="edgedeploy's runner; started by edgedeploy, not by hand")
    roles = parser.add_subparsers(dest="role", required=True)
    agent = roles.add_parser("agent")
    agent.add_argument("--root", required=True)
    agent.add_argument("--holder", default="somebody")
    agent.add_argument("--lease-s", type=float, default=60.0)
    agent.add_argument("--wait-s", type=float, default=0.0)
    agent.add_argument("--lease-dir", default="")
    agent.add_argument("--sysroot", default="/")
    watchdog = roles.add_parser("watchdog")
    for flag in ("--root", "--lease", "--sysroot"):
        watchdog.add_argument(flag, required=True)
    for flag in ("--token", "--agent", "--start"):
        watchdog.add_argument(flag, type=int, required=True)
    watchdog.add_argument("--lease-s", type=float, required=True)
    lease = roles.add_parser("lease")
    lease.add_argument("--lease-dir", default="")
    lease.add_argument("--release", type=int, metavar="TOKEN")
    lease.add_argument("--by", default="somebody")
    visit = roles.add_parser("visit")
    visit.add_argument("--root", required=True)
    visit.add_argument("--parent", type=int, required=True)
    visit.add_argument("--cores", default="")
    roles.add_parser("facts")
    survey = roles.add_parser("survey")
    survey.add_argument("--root", required=True)
    survey.add_argument("modules", nargs="*")
    given = parser.parse_args()
    if given.role == "facts":
        print(json.dumps(read_facts()))
        return 0
    if given.role == "survey":
        print(json.dumps(read_survey(given.root, given.modules)))
        return 0
    if given.role == "agent":
        return serve_agent(given)
    if given.role == "watchdog":
        owner = Lease(given.lease)
        owner.pid, owner.start, owner.token, owner.seconds = given.agent, given.start, given.token, given.lease_s
        return serve_watchdog(given.root, owner, given.sysroot)
    if given.role == "lease":
        return serve_lease(given.lease_dir, given.release, given.by)
    return serve_visit(given.root, given.parent, given.cores)


if __name__ == "__main__":
    sys.exit(main())
