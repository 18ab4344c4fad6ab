"""One physical unit and how to reach it; what the runner says about it."""

from __future__ import annotations

from typing import Literal

from edgedeploy.documents import Record

# History of edgedeploy.lab:
#   1 (0.1.0)  first version
FORMAT = "edgedeploy.lab/1"


class DeviceSettings(Record, frozen=True, kw_only=True):
    """What a device is set to while we hold it; what was there before is restored afterwards, whatever happens.

    Attributes:
        governor: of every core that has one, "performance"; empty: as it is.
        power_mode: the number that nvpmodel -m takes; None: as it is.
        fixed_clocks: jetson_clocks, undone afterwards.
        cpu_affinity: the cores that visits run on, "4-7" or "0,2"; empty: all.
        start_below_celsius: a visit waits until the hottest zone is cooler than this; None: it does not wait.
        cooling_cap_s: the longest such wait; the visit then starts, and its record says so.
        sudo: ask `sudo -n` where we may not write; it must not ask for a password.
    """

    governor: str = ""
    power_mode: int | None = None
    fixed_clocks: bool = False
    cpu_affinity: str = ""
    start_below_celsius: float | None = None
    cooling_cap_s: float = 120.0
    sudo: bool = False


class Device(Record, frozen=True, kw_only=True):
    """An entry of lab.toml.

    Attributes:
        target: the kind of device that it is, a target's name; cells with device = "any" go to devices of their target.
        place: of labgrid, whose coordinator says host, port and user; for transport "labgrid".
        coordinator: "host:port" of the place's; empty: labgrid_coordinator of the lab file.
        lease_dir: where the device's users keep the lease that they share; empty: the runner's choice.
        settings: what it is set to while we hold it.
        sentinel: whether a small model that never changes is visited at both ends of each session there.
        runtimes: back end → version of the provisioned runtime that is used; else the newest, or what its Python has.
        host: name, address or alias of ~/.ssh/config; for transport "ssh".
        key: a private key file; empty: the agent and the usual key files.
        jump: "user@host:port" of a jump host; empty: what ~/.ssh/config says.
        known_hosts: a known_hosts file; empty: the person's own.
        python: the interpreter that has the runtime, on the device; empty: python3 (ssh) or this one (local).
        root: where we keep files on the device; relative to the home directory.
        timeout_s: the longest silence before the device counts as lost.
        connect_timeout_s: the longest wait for a connection.
    """

    transport: Literal["local", "ssh", "labgrid"]
    target: str = ""
    host: str = ""
    port: int = 0
    user: str = ""
    key: str = ""
    jump: str = ""
    known_hosts: str = ""
    python: str = ""
    root: str = ""
    place: str = ""
    coordinator: str = ""
    lease_dir: str = ""
    settings: DeviceSettings = DeviceSettings()
    sentinel: bool = True
    runtimes: dict[str, str] = {}
    description: str = ""
    timeout_s: float = 60.0
    connect_timeout_s: float = 10.0


class Lab(Record, frozen=True, kw_only=True):
    """lab.toml: device name → device.

    Attributes:
        labgrid_coordinator: "host:port" of the coordinator that devices with transport "labgrid" are places of.
    """

    format: str = FORMAT
    labgrid_coordinator: str = ""
    devices: dict[str, Device] = {}


class Gpu(Record, frozen=True, kw_only=True):
    """One NVIDIA GPU.

    Attributes:
        name: the driver's, or for one that is part of a chip the chip's ("Orin").
        compute_capability: "8.7"; "" where it is not said.
        memory_bytes: its own; None where it is not said, or shared with the processor.
    """

    name: str
    compute_capability: str = ""
    memory_bytes: int | None = None


class TensorRTBindings(Record, frozen=True, kw_only=True):
    """Python's module for TensorRT; it works in one version of Python alone.

    Attributes:
        python: "3.10"; "" where neither its folder nor its wheel says.
        version: TensorRT's.
        folder: where the module is.
    """

    python: str
    version: str
    folder: str


class Cluster(Record, frozen=True, kw_only=True):
    """Cores that are alike.

    Attributes:
        cores: their numbers, "0-3".
        max_hz: the highest clock that the kernel would give them.
    """

    cores: str
    max_hz: float


class Interpreter(Record, frozen=True, kw_only=True):
    """What decides which wheels a device's Python takes, in the words of wheels' names.

    Attributes:
        tag: implementation and version, "cp311".
        abi: "cp311", "cp313t".
        bits: of a pointer: 32 on a 64-bit kernel where the system's programs are 32-bit.
    """

    tag: str = ""
    abi: str = ""
    bits: int = 0


class DeviceFacts(Record, frozen=True, kw_only=True):
    """What the runner says a device is; an empty or None value means "not available", never zero.

    Attributes:
        clusters: groups of equal cores; empty where the kernel says no clock.
        interpreter: which Python runs the runner, as far as wheels go.
        board: what the device tree calls the machine; "" on x86.
        l4t: release of Jetson Linux, "36.4.3".
        jetpack: "6.2"; by the package nvidia-jetpack, else by the release.
        gpus: as far as files say it; no driver is loaded for it.
        gpu_driver: version of the kernel's module.
        cuda: version of the toolkit in /usr/local/cuda.
        tensorrt: version of the library libnvinfer where the linker looks.
        tensorrt_bindings: Python modules for TensorRT that were found, for whichever Python.
    """

    hostname: str
    machine: str
    system: str
    kernel: str
    os_name: str
    libc: str
    python: str
    cpu_model: str
    isa: tuple[str, ...]
    cores: int
    memory_bytes: int | None
    boot_id: str
    clusters: tuple[Cluster, ...] = ()
    interpreter: Interpreter = Interpreter()
    board: str = ""
    l4t: str = ""
    jetpack: str = ""
    gpus: tuple[Gpu, ...] = ()
    gpu_driver: str = ""
    cuda: str = ""
    tensorrt: str = ""
    tensorrt_bindings: tuple[TensorRTBindings, ...] = ()


class Survey(Record, frozen=True, kw_only=True):
    """What a board is before it is used: printed once, when it is added.

    Attributes:
        python: the interpreter's path there.
        free_bytes: on the disk where files are kept.
        runtimes: distribution → version, of what its Python can already import.
        governor: of its cores now; governors: those that it has. Empty: not available.
        temperatures_celsius: of its thermal zones now; empty: not available.
        has_sudo: `sudo -n` works without a password.
    """

    facts: DeviceFacts
    python: str
    free_bytes: int
    runtimes: dict[str, str] = {}
    governor: str = ""
    governors: tuple[str, ...] = ()
    temperatures_celsius: dict[str, float] = {}
    is_root: bool = False
    has_sudo: bool = False
