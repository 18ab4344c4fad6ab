"""What makes a device look like a Raspberry Pi 4 or a Jetson Orin Nano: /proc/cpuinfo, /sys and the boards' programs.

Written from the formats that their documentation describes, not recorded on boards; the figures are made up. Values lie in
plain files: a test that changes one heats, throttles or cools the board.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["pi4", "orin"]


@dataclass(frozen=True, slots=True)
class Cluster:
    """Cores that share a clock."""

    first: int
    count: int
    least_khz: int
    most_khz: int
    now_khz: int

    def cores(self) -> range:
        """Return their numbers."""
        return range(self.first, self.first + self.count)


@dataclass(frozen=True, slots=True)
class Model:
    """One kind of board."""

    name: str
    compatible: tuple[str, ...]
    part: str
    features: str
    bogo_mips: str
    revision: int
    clusters: tuple[Cluster, ...]
    governor: str
    driver: str
    zones: dict[str, int]

    @property
    def cores(self) -> int:
        """Return how many there are."""
        return sum(cluster.count for cluster in self.clusters)


MODELS: dict[str, Model] = {
    "pi4": Model(
        name="Raspberry Pi 4 Model B Rev 1.4",
        compatible=("raspberrypi,4-model-b", "brcm,bcm2711"),
        part="0xd08",
        features="fp asimd evtstrm crc32 cpuid",
        bogo_mips="108.00",
        revision=3,
        clusters=(Cluster(0, 4, 600000, 1800000, 1500000),),
        governor="ondemand",
        driver="cpufreq-dt",
        zones={"cpu-thermal": 48686},
    ),
    "orin": Model(
        name="NVIDIA Jetson Orin Nano Developer Kit",
        compatible=("nvidia,p3768-0000+p3767-0005", "nvidia,p3767-0005", "nvidia,tegra234"),
        part="0xd42",
        features="fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp uscat "
        "ilrcpc flagm paca pacg",
        bogo_mips="62.50",
        revision=1,
        clusters=(Cluster(0, 4, 115200, 1510400, 1510400), Cluster(4, 2, 115200, 1510400, 729600)),
        governor="schedutil",
        driver="tegra194",
        zones={
            "cpu-thermal": 51250,
            "gpu-thermal": 49500,
            "cv0-thermal": -256000,  # its rail is off
            "soc0-thermal": 50031,
            "tj-thermal": 51250,
        },
    ),
}
GOVERNORS = "conservative ondemand userspace powersave performance schedutil"
THROTTLED = "sys/devices/platform/soc/soc:firmware/get_throttled"
RAILS = (("VDD_IN", 5016, 1080), ("VDD_CPU_GPU_CV", 5016, 320), ("VDD_SOC", 5016, 288))
GPU = "sys/class/devfreq/17000000.gpu"

VCGENCMD = """\
#!/bin/sh
# As the Raspberry Pi's: what there is is read from /sys.
zone=/sys/class/thermal/thermal_zone0/temp
case "$1" in
    get_throttled) echo "throttled=0x$(cat /sys/devices/platform/soc/soc:firmware/get_throttled)" ;;
    measure_temp) t=$(cat $zone); echo "temp=$((t / 1000)).$((t % 1000 / 100))'C" ;;
    measure_clock) echo "frequency(48)=$(cat /sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq)000" ;;
    measure_volts) echo "volt=0.8500V" ;;
    *) echo 'error=1 error_msg="Command not registered"'; exit 1 ;;
esac
"""
TEGRASTATS = """\
#!/bin/sh
# A line as JetPack 6 prints it, every interval.
interval=1000
while [ $# -gt 0 ]; do
    case "$1" in --interval) interval=$2; shift ;; esac
    shift
done
degrees() { t=$(cat "/sys/class/thermal/thermal_zone$1/temp"); echo "$((t / 1000)).$((t % 1000 / 10))C"; }
while :; do
    echo "$(date '+%m-%d-%Y %H:%M:%S') RAM 2461/7620MB (lfb 4x4MB) SWAP 0/3810MB (cached 0MB)" \\
        "CPU [3%@1510,0%@1510,1%@1510,0%@1510,0%@729,0%@729] EMC_FREQ 0%@2133 GR3D_FREQ 0%@[305] NVDEC off NVJPG off" \\
        "VIC off OFA off APE 174 cpu@$(degrees 0) gpu@$(degrees 1) soc0@$(degrees 3) tj@$(degrees 4)" \\
        "VDD_IN 5417mW/5417mW VDD_CPU_GPU_CV 1605mW/1605mW VDD_SOC 1444mW/1444mW"
    sleep "$(awk "BEGIN { print $interval / 1000 }")"
done
"""
NVPMODEL = """\
#!/bin/sh
# The power modes of a Jetson: -q says which, -m N chooses; only root may.
status=/var/lib/nvpmodel/status
case "$1" in
    -q)
        id=$(sed 's/^pmode:0*\\([0-9][0-9]*\\).*/\\1/' $status)
        name=$(sed -n "s/.*POWER_MODEL ID=$id NAME=\\([^ >]*\\).*/\\1/p" /etc/nvpmodel.conf)
        printf 'NV Power Mode: %s\\n%s\\n' "$name" "$id" ;;
    -m)
        grep -q "POWER_MODEL ID=$2 " /etc/nvpmodel.conf || { echo "NVPM ERROR: Error in parsing mode $2" >&2; exit 1; }
        printf 'pmode:%04d\\n' "$2" > $status || { echo "NVPM ERROR: run as root" >&2; exit 1; } ;;
    *) echo "usage: nvpmodel -q | -m MODE" >&2; exit 1 ;;
esac
"""
JETSON_CLOCKS = """\
#!/bin/sh
# The clocks of a Jetson: without arguments each is fixed to its greatest; --store, --restore and --show as NVIDIA's.
policies=$(echo /sys/devices/system/cpu/cpufreq/policy*)
gpu=/sys/class/devfreq/17000000.gpu
[ "$(id -u)" = 0 ] || { echo "Run as root" >&2; exit 1; }
case "$1" in
    --store) for p in $policies; do echo "$p/scaling_min_freq:$(cat $p/scaling_min_freq)"; done > "${2:-/root/l4t_dfs.conf}"
        echo "$gpu/min_freq:$(cat $gpu/min_freq)" >> "${2:-/root/l4t_dfs.conf}" ;;
    --restore) while IFS=: read -r file value; do echo "$value" > "$file"; done < "${2:-/root/l4t_dfs.conf}" ;;
    --show)
        for p in $policies; do
            for c in $(cat $p/affected_cpus); do
                echo "cpu$c: Online=1 Governor=$(cat $p/scaling_governor) MinFreq=$(cat $p/scaling_min_freq)" \\
                    "MaxFreq=$(cat $p/scaling_max_freq) CurrentFreq=$(cat $p/scaling_cur_freq) IdleStates: WFI=1 c7=1"
            done
        done
        echo "GPU MinFreq=$(cat $gpu/min_freq) MaxFreq=$(cat $gpu/max_freq) CurrentFreq=$(cat $gpu/cur_freq)" ;;
    "") for p in $policies; do cat $p/scaling_max_freq > $p/scaling_min_freq; cat $p/scaling_max_freq > $p/scaling_cur_freq; done
        cat $gpu/max_freq > $gpu/min_freq; cat $gpu/max_freq > $gpu/cur_freq ;;
    *) echo "Unknown option: $1" >&2; exit 1 ;;
esac
"""
NVPMODEL_CONF = "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=1 NAME=25W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n"
NV_TEGRA_RELEASE = (
    "# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic, EABI: aarch64, DATE: Thu Jan  1 00:00:00 UTC 2026\n"
)


class Identity:
    """A board's files, and the ways in which a test changes what the board says.

    Under `folder`: cpuinfo and boot_id (of /proc), sys (is /sys), files (are laid over the device's file system).
    """

    def __init__(self, kind: Kind, folder: Path) -> None:
        self.kind = kind
        self.folder = folder
        self.model = MODELS[kind]
        for name, text in _files(kind, self.model).items():
            self._write(name, text)
        for policy, core in _links(self.model):
            link = folder / f"sys/devices/system/cpu/cpu{core}/cpufreq"
            link.symlink_to(f"../cpufreq/policy{policy}")
        if kind == "orin":
            hwmon = folder / "sys/class/hwmon/hwmon1"
            hwmon.parent.mkdir(parents=True)
            hwmon.symlink_to("../../bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1")
        for program in (folder / "files/usr/local/bin").iterdir():
            program.chmod(0o755)

    def heat(self, celsius: float, zone: int = 0) -> None:
        """Set a thermal zone's temperature; cooling is heating to less."""
        self._write(f"sys/class/thermal/thermal_zone{zone}/temp", f"{round(celsius * 1000)}\n")

    def throttle(self, bits: int = 0x50005) -> None:
        """Throttle the board, or with 0 end it: a Pi by its firmware's bits, an Orin by its cooling device."""
        if self.kind == "pi4":
            self._write(THROTTLED, f"{bits:x}\n")
        else:
            self._write("sys/class/thermal/cooling_device0/cur_state", f"{bool(bits):d}\n")

    def governors(self) -> list[str]:
        """Return the governor of every cluster."""
        folder = self.folder / "sys/devices/system/cpu/cpufreq"
        return [path.read_text().strip() for path in sorted(folder.glob("policy*/scaling_governor"))]

    def renew_boot_id(self) -> None:
        """Have a boot_id as after a reboot; the device's running processes see it too."""
        self._write("boot_id", f"{uuid.uuid4()}\n")

    def _write(self, name: str, text: str) -> None:
        """Write in place: the file itself may be bound into a running device."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _links(model: Model) -> list[tuple[int, int]]:
    """Return (policy, core) of every core."""
    return [(cluster.first, core) for cluster in model.clusters for core in cluster.cores()]


def _files(kind: Kind, model: Model) -> dict[str, str]:
    """Return path → text."""
    files = {
        "cpuinfo": _cpuinfo(kind, model),
        "boot_id": f"{uuid.uuid4()}\n",
        "files/etc/hostname": f"{kind}\n",
        "sys/firmware/devicetree/base/model": f"{model.name}\0",
        "sys/firmware/devicetree/base/compatible": "".join(f"{name}\0" for name in model.compatible),
        **_cpus(model),
        **_zones(model),
    }
    if kind == "pi4":
        return {**files, THROTTLED: "0\n", "files/usr/local/bin/vcgencmd": VCGENCMD}
    hwmon = "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1"
    files[f"{hwmon}/name"] = "ina3221\n"
    for number, (label, millivolt, milliampere) in enumerate(RAILS, start=1):
        files[f"{hwmon}/in{number}_label"] = f"{label}\n"
        files[f"{hwmon}/in{number}_input"] = f"{millivolt}\n"
        files[f"{hwmon}/curr{number}_input"] = f"{milliampere}\n"
        files[f"{hwmon}/curr{number}_crit"] = "4000\n"
    return {
        **files,
        f"{GPU}/min_freq": "306000000\n",
        f"{GPU}/max_freq": "624750000\n",
        f"{GPU}/cur_freq": "306000000\n",
        "files/usr/local/bin/tegrastats": TEGRASTATS,
        "files/usr/local/bin/nvpmodel": NVPMODEL,
        "files/usr/local/bin/jetson_clocks": JETSON_CLOCKS,
        "files/etc/nvpmodel.conf": NVPMODEL_CONF,
        "files/etc/nv_tegra_release": NV_TEGRA_RELEASE,
        "files/var/lib/nvpmodel/status": "pmode:0000\n",
    }


def _cpus(model: Model) -> dict[str, str]:
    """Return /sys/devices/system/cpu without its links."""
    folder = "sys/devices/system/cpu"
    everyone = f"0-{model.cores - 1}\n"
    files = {f"{folder}/{name}": everyone for name in ("possible", "present", "online")}
    files[f"{folder}/kernel_max"] = "255\n"
    for cluster in model.clusters:
        cores = " ".join(map(str, cluster.cores()))
        values = {
            "scaling_governor": model.governor,
            "scaling_available_governors": GOVERNORS,
            "scaling_driver": model.driver,
            "scaling_cur_freq": cluster.now_khz,
            "scaling_min_freq": cluster.least_khz,
            "scaling_max_freq": cluster.most_khz,
            "cpuinfo_min_freq": cluster.least_khz,
            "cpuinfo_max_freq": cluster.most_khz,
            "affected_cpus": cores,
            "related_cpus": cores,
        }
        siblings = f"{cluster.first}-{cluster.first + cluster.count - 1}"
        for name, value in values.items():
            files[f"{folder}/cpufreq/policy{cluster.first}/{name}"] = f"{value}\n"
        for core in cluster.cores():
            files[f"{folder}/cpu{core}/online"] = "1\n"
            files[f"{folder}/cpu{core}/cpu_capacity"] = "1024\n"
            topology = {
                "core_id": core,
                "physical_package_id": 0,
                "core_siblings_list": everyone.strip(),
                "cluster_cpus_list": siblings,
                "thread_siblings_list": core,
            }
            files |= {f"{folder}/cpu{core}/topology/{name}": f"{value}\n" for name, value in topology.items()}
    return files


def _zones(model: Model) -> dict[str, str]:
    """Return /sys/class/thermal."""
    folder = "sys/class/thermal"
    files = {
        f"{folder}/cooling_device0/type": "cpufreq-cpu0\n",
        f"{folder}/cooling_device0/cur_state": "0\n",
        f"{folder}/cooling_device0/max_state": "4\n",
    }
    for number, (kind, millicelsius) in enumerate(model.zones.items()):
        values = {"type": kind, "temp": millicelsius, "trip_point_0_temp": 80000, "trip_point_0_type": "passive"}
        files |= {f"{folder}/thermal_zone{number}/{name}": f"{value}\n" for name, value in values.items()}
    return files


def _cpuinfo(kind: Kind, model: Model) -> str:
    """Return /proc/cpuinfo."""
    cores = "".join(
        f"processor\t: {core}\nBogoMIPS\t: {model.bogo_mips}\nFeatures\t: {model.features}\nCPU implementer\t: 0x41\n"
        f"CPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: {model.part}\nCPU revision\t: {model.revision}\n\n"
        for core in range(model.cores)
    )
    if kind == "orin":
        return cores
    return f"{cores}Hardware\t: BCM2835\nRevision\t: c03114\nSerial\t\t: 100000000deadbef\nModel\t\t: {model.name}\n"
