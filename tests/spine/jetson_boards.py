"""Four Jetsons as trees of small files, and what their programs print. Written from documentation; no board was read.

Sources: Jetson Linux Developer Guide (r35.6, r36.3, r38.2), "Platform Power and Performance" and "Tegrastats Utility";
Linux, Documentation/hwmon/ina3221 and Documentation/driver-api/thermal/sysfs-api; for names and formats that these
leave open (devfreq's folders, /var/lib/nvpmodel/status, three figures per rail on Thor) reports in public issue
trackers. All numbers are made up.
"""

RELEASE = (
    "# R{0} (release), REVISION: {1}, GCID: 1, BOARD: generic, EABI: aarch64, DATE: Thu Jan  1 00:00:00 UTC 2026\n"
)


def cpus(count: int, least: int, most: int, now: int) -> dict[str, str]:
    files = {"scaling_min_freq": least, "scaling_max_freq": most, "scaling_cur_freq": now}
    folder = "sys/devices/system/cpu/cpu{}/cpufreq/{}"
    return {folder.format(core, name): f"{kilohertz}\n" for core in range(count) for name, kilohertz in files.items()}


def devfreq(name: str, least: int, most: int, now: int) -> dict[str, str]:
    folder = f"sys/class/devfreq/{name}"
    return {f"{folder}/min_freq": f"{least}\n", f"{folder}/max_freq": f"{most}\n", f"{folder}/cur_freq": f"{now}\n"}


def numbered(folder: str, first: str, second: str, pairs: list[tuple[str, str]]) -> dict[str, str]:
    """Zones or cooling devices: two files each."""
    return {
        f"{folder}{number}/{name}": f"{text}\n"
        for number, pair in enumerate(pairs)
        for name, text in zip((first, second), pair, strict=True)
    }


def package(name: str, version: str, state: str = "install ok installed") -> str:
    return f"Package: {name}\nStatus: {state}\nPriority: standard\nArchitecture: arm64\nVersion: {version}\n\n"


# JetPack 5.1.2. The I2C driver of its kernel still shows rails through hwmon; `old_rails` is how JetPack 4 showed them.
XAVIER = {
    "proc/cpuinfo": "processor : 0\nmodel name : ARMv8 Processor rev 0 (v8l)\nCPU implementer : 0x4e\nCPU part : 0x004\n",
    "sys/firmware/devicetree/base/model": "Jetson-AGX\0",
    "proc/device-tree/model": "Jetson-AGX\0",
    "proc/device-tree/compatible": "nvidia,p2972-0000\0nvidia,tegra194\0",
    "etc/nv_tegra_release": RELEASE.format(35, "4.1"),
    "var/lib/dpkg/status": package("nvidia-jetpack", "5.1.2-b104") + package("libnvinfer8", "8.5.2-1+cuda11.4"),
    "var/lib/nvpmodel/status": "pmode:0003 fmode:quiet\n",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=3 NAME=MODE_30W_ALL >\n",
    "usr/local/cuda/version.json": '{"cuda": {"name": "CUDA SDK", "version": "11.4.19"}}\n',
    "usr/lib/aarch64-linux-gnu/libnvinfer.so.8": "",
    "usr/lib/aarch64-linux-gnu/libnvinfer.so.8.5.2": "",
    "usr/lib/python3.8/dist-packages/tensorrt/__init__.py": '__version__ = "8.5.2.2"\n',
    "usr/lib/python3.8/dist-packages/tensorrt/tensorrt.so": "",
    **cpus(8, 1190400, 2265600, 1190400),
    **devfreq("17000000.gv11b", 114750000, 905250000, 114750000),
    **numbered(
        "sys/class/thermal/thermal_zone",
        "type",
        "temp",
        [("CPU-therm", "34500"), ("GPU-therm", "33000"), ("Tdiode_tegra", "36250"), ("PMIC-Die", "100000")],
    ),
    "sys/class/hwmon/hwmon2/name": "ina3221\n",
    "sys/class/hwmon/hwmon2/in1_label": "GPU\n",
    "sys/class/hwmon/hwmon2/in1_input": "19000\n",
    "sys/class/hwmon/hwmon2/curr1_input": "20\n",
    "sys/class/hwmon/hwmon2/in2_label": "CPU\n",
    "sys/class/hwmon/hwmon2/in2_input": "19000\n",
    "sys/class/hwmon/hwmon2/curr2_input": "40\n",
    "sys/class/hwmon/hwmon2/in7_label": "sum of shunt voltages\n",
}

OLD_RAILS = {
    "sys/bus/i2c/drivers/ina3221x/1-0040/iio:device0/rail_name_0": "GPU\n",
    "sys/bus/i2c/drivers/ina3221x/1-0040/iio:device0/in_power0_input": "1550\n",
    "sys/bus/i2c/drivers/ina3221x/1-0040/iio:device0/rail_name_1": "CPU\n",
    "sys/bus/i2c/drivers/ina3221x/1-0040/iio:device0/in_power1_input": "620\n",
    "sys/bus/i2c/drivers/ina3221x/1-0041/iio_device/rail_name_2": "SYS5V\n",
    "sys/bus/i2c/drivers/ina3221x/1-0041/iio_device/in_power2_input": "2480\n",
}

# JetPack 6.2, after jetson_clocks, read by root: one clock only, and the memory's is seen.
AGX_ORIN = {
    "proc/cpuinfo": "processor : 0\nmodel name : ARMv8 Processor rev 1 (v8l)\nCPU implementer : 0x41\nCPU part : 0xd42\n",
    "sys/firmware/devicetree/base/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
    "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p3737-0000+p3701-0005\0nvidia,p3701-0005\0nvidia,tegra234\0",
    "proc/driver/nvidia/version": (
        "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build  (builder@host)\n"
        "GCC version:  gcc version 11.4.0\n"
    ),
    "etc/nv_tegra_release": RELEASE.format(36, "4.3"),
    "var/lib/dpkg/status": package("nvidia-jetpack", "6.2+b77") + package("libnvinfer10", "10.3.0.30-1+cuda12.5"),
    "var/lib/nvpmodel/status": "pmode:0000\n",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=2 NAME=MODE_30W >\n",
    "usr/local/cuda/version.json": '{"cuda": {"version": "12.6.68"}}\n',
    "usr/lib/aarch64-linux-gnu/libnvinfer.so.10.3.0": "",
    "usr/lib/python3.10/dist-packages/tensorrt/__init__.py": '__version__ = "10.3.0"\n',
    "usr/lib/python3.10/dist-packages/tensorrt/tensorrt.so": "",
    "usr/lib/python3.10/dist-packages/tensorrt-10.3.0.dist-info/WHEEL": "Tag: cp310-none-linux_aarch64\n",
    **cpus(12, 2201600, 2201600, 2201600),
    **devfreq("17000000.gpu", 1300500000, 1300500000, 1300500000),
    **devfreq("15340000.vic", 115200000, 729600000, 729600000),
    "sys/kernel/debug/bpmp/debug/clk/emc/rate": "3199000000\n",
    **numbered(
        "sys/class/thermal/thermal_zone",
        "type",
        "temp",
        [("cpu-thermal", "52500"), ("gpu-thermal", "49000"), ("cv0-thermal", "-256000"), ("tj-thermal", "52500")],
    ),
    **numbered(
        "sys/class/thermal/cooling_device",
        "type",
        "cur_state",
        [("pwm-fan", "2"), ("cpu-throttle-alert", "0"), ("gpu-throttle-alert", "0"), ("hot-surface-alert", "0")],
    ),
    "sys/class/hwmon/hwmon0/name": "pwmfan\n",
    "sys/class/hwmon/hwmon0/pwm1": "51\n",
    "sys/class/hwmon/hwmon1/name": "pwm_tach\n",
    "sys/class/hwmon/hwmon1/rpm": "1786\n",
    "sys/class/hwmon/hwmon3/name": "ina3221\n",
    "sys/class/hwmon/hwmon3/in1_label": "VDD_GPU_SOC\n",
    "sys/class/hwmon/hwmon3/in1_input": "19120\n",
    "sys/class/hwmon/hwmon3/curr1_input": "125\n",
    "sys/class/hwmon/hwmon3/in2_label": "VDD_CPU_CV\n",
    "sys/class/hwmon/hwmon3/in2_input": "19120\n",
    "sys/class/hwmon/hwmon3/curr2_input": "84\n",
    "sys/class/hwmon/hwmon4/name": "ina3221\n",
    "sys/class/hwmon/hwmon4/in1_label": "NC\n",
    "sys/class/hwmon/hwmon4/in1_input": "0\n",
    "sys/class/hwmon/hwmon4/curr1_input": "0\n",
    "sys/class/hwmon/hwmon5/name": "soctherm_oc\n",
    "sys/class/hwmon/hwmon5/oc1_event_cnt": "0\n",
    "sys/class/hwmon/hwmon5/oc1_throt_en": "1\n",
    "sys/class/hwmon/hwmon5/oc2_event_cnt": "9\n",
    "sys/class/hwmon/hwmon5/oc2_throt_en": "0\n",
    "sys/class/hwmon/hwmon5/oc3_event_cnt": "27\n",
    "sys/class/hwmon/hwmon5/oc3_throt_en": "1\n",
}

# JetPack 6.1 without its package, throttled, and with TensorRT for a Python of its own beside the system's.
ORIN_NANO = {
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0003\0nvidia,tegra234\0",
    "etc/nv_tegra_release": RELEASE.format(36, "4.0"),
    "var/lib/dpkg/status": package("nvidia-jetpack", "5.1-b1", "deinstall ok config-files"),
    **cpus(6, 729600, 1510400, 1510400),
    **devfreq("17000000.ga10b", 306000000, 624750000, 306000000),
    **numbered(
        "sys/class/thermal/cooling_device",
        "type",
        "cur_state",
        [("cpufreq-cpu0", "0"), ("gpu-throttle-alert", "1"), ("pwm-fan", "3")],
    ),
    "sys/class/hwmon/hwmon1/name": "ina3221\n",
    "sys/class/hwmon/hwmon1/in1_label": "VDD_IN\n",
    "sys/class/hwmon/hwmon1/in1_input": "5016\n",
    "sys/class/hwmon/hwmon1/curr1_input": "1000\n",
    "usr/lib/python3.10/dist-packages/numpy/__init__.py": "",
    "usr/local/lib/python3.12/site-packages/tensorrt_bindings/__init__.py": '__version__ = "10.3.0"\n',
    "usr/local/lib/python3.12/site-packages/tensorrt_bindings/tensorrt.so": "",
}

# JetPack 7.0. Its GPU has a clock for the graphics clusters and one for video, and an INA238 measures the input.
THOR = {
    "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p4071-0000+p3834-0008\0nvidia,tegra264\0",
    "proc/driver/nvidia/version": (
        "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  580.00  Release Build  (builder@host)\n"
    ),
    "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA Thor\nGPU UUID: \t GPU-0\n",
    "etc/nv_tegra_release": RELEASE.format(38, "2.0"),
    "var/lib/nvpmodel/status": "pmode:0001\n",
    "usr/lib/aarch64-linux-gnu/libnvinfer.so.10.13.3": "",
    **cpus(14, 972000, 2601000, 972000),
    **devfreq("gpu-gpc-0", 306000000, 1575000000, 1575000000),
    **devfreq("gpu-nvd-0", 306000000, 1692000000, 306000000),
    **devfreq("bwmgr", 665600000, 4266000000, 4266000000),
    "sys/class/hwmon/hwmon2/name": "ina238\n",
    "sys/class/hwmon/hwmon2/in1_label": "VIN\n",
    "sys/class/hwmon/hwmon2/power1_input": "15004000\n",
    "sys/class/hwmon/hwmon3/name": "ina3221\n",
    "sys/class/hwmon/hwmon3/in1_label": "VDD_GPU\n",
    "sys/class/hwmon/hwmon3/in1_input": "19600\n",
    "sys/class/hwmon/hwmon3/curr1_input": "-20\n",
}

# A server with a card; no Jetson.
SERVER = {
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Wed Jan 22 2025\n",
    "proc/driver/nvidia/gpus/0000:17:00.0/information": "Model: \t\t NVIDIA H200\nIRQ:   \t\t 90\n",
    "usr/local/cuda-12.8/bin/nvcc": "",
    "usr/local/cuda-9.2/bin/nvcc": "",
}

TEGRASTATS_XAVIER = (
    "RAM 2690/15822MB (lfb 6x1MB) SWAP 479/7911MB (cached 3MB) CPU [3%@1904,7%@1906,off,off] EMC_FREQ 0%@1600 "
    "GR3D_FREQ 5%@510 VIC_FREQ 601 APE 150 AUX@39C CPU@39.5C PMIC@50C GPU 620mW/620mW CPU 465mW/465mW"
)
TEGRASTATS_ORIN = (
    "11-22-2026 10:36:27 RAM 4321/62801MB (lfb 1759x4MB) SWAP 19/31400MB (cached 0MB) CPU [0%@729,12%@2201,off] "
    "EMC_FREQ 3%@2133 GR3D_FREQ 41%@[1300,1300] VIC off APE 174 cv0@-256C cpu@44.562C tj@44.343C "
    "VDD_GPU_SOC 2340mW/2340mW VDD_CPU_CV 390mW/390mW VIN_SYS_5V0 4025mW/4025mW NC 0mW/0mW"
)
TEGRASTATS_ORIN_WITHOUT_ROOT = (
    "RAM 1224/15368MB (lfb 8x4MB) CPU [1%@729,off] GR3D_FREQ 88% tj@43.5C VDD_IN 4319mW/4319mW"
)
TEGRASTATS_THOR = (
    "11-22-2026 20:58:23 RAM 3429/125749MB (lfb 120x4MB) CPU [0%,5%,off]@2601 EMC_FREQ @4266 "
    "GR3D_FREQ @[1574,1574,1574] cpu@49.75C/51.75C gpu@51.218C/52.218C VDD_GPU -392mW/-392mW/6330mW "
    "VIN 28906mW/14453mW/28906mW"
)

JETSON_CLOCKS = """\
SOC family:tegra234  Machine:NVIDIA Jetson AGX Orin Developer Kit
Online CPUs: 0-1
cpu0:  Online=1 Governor=schedutil MinFreq={cpu} MaxFreq=2201600 CurrentFreq=2201600 IdleStates: WFI=1 c7=1
cpu1:  Online=1 Governor=schedutil MinFreq={cpu} MaxFreq=2201600 CurrentFreq=2188800 IdleStates: WFI=1 c7=1
GPU MinFreq={gpu} MaxFreq=1300500000 CurrentFreq=1300500000
Active GPU TPCs: 8
EMC MinFreq=204000000 MaxFreq=3199000000 CurrentFreq=2133000000 FreqOverride=0
DLA0_CORE:   Online=1 MinFreq=0 MaxFreq=1600000000 CurrentFreq=1600000000
FAN Dynamic Speed Control=nvfancontrol hwmon0_pwm1=65
NV Power Mode: MODE_30W
"""
