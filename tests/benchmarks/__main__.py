"""make bench: run every benchmark, one after another, and keep what each says in bench_results/figures/.

    python -m tests.benchmarks            all
    python -m tests.benchmarks NAME...    some
    python -m tests.benchmarks NAME -- --labelled SET.npz    one, with options of its own

Figures are ratios or counts measured side by side in one run; nothing here asserts a time.
"""

import json
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FIGURES = ROOT / "bench_results" / "figures"
# In the order of how long they take; the first needs the quietest machine least.
NAMES = (
    "help_time",
    "second_compile",
    "plain_loop",
    "history_changes",
    "history_ten_thousand",
    "dashboard_ten_thousand",
    "litert_cross_check",
    "efficientnet_lite0",
    "mobilenet_v2",
    "tensorrt_rtx_layers",
    "lab_overhead",
    "lab_transfer",
    "lab_sixteen",
    "lab_first_number",
    "lab_int8_bits",
    "lab_peak_rss",
    "bundle_on_arm",
    "calibration_memory",
    "gate_error_rates",
    "gate_family",
    "gate_on_local",
    "aa_gates",
    "gate_power",
    "gate_replays",
)


def cpu_model() -> str:
    """Return what /proc/cpuinfo calls this machine's processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def main(names: tuple[str, ...], options: tuple[str, ...]) -> int:
    """Run the benchmarks, each with these options, and return the number of those that failed."""
    failed = 0
    FIGURES.mkdir(parents=True, exist_ok=True)
    for name in names:
        print(f"== {name}", flush=True)
        command = [sys.executable, "-m", f"tests.benchmarks.{name}", *options]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        print(done.stdout)
        if done.returncode != 0:
            failed += 1
            continue
        # Packages print when they load weights: the figures start at the first line that starts a JSON object.
        document = {
            "format": "edgedeploy.figures/1",
            # Where a file lies on this machine says nothing to others.
            "command": " ".join(
                ["python -m tests.benchmarks", name, *(["--"] if options else []), *(Path(one).name for one in options)]
            ),
            "measured_utc": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "machine": f"{cpu_model()}, {platform.machine()}, Python {platform.python_version()}",
            "figures": json.loads(re.split(r"^(?=\{)", done.stdout, maxsplit=1, flags=re.MULTILINE)[-1]),
        }
        (FIGURES / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    return failed


if __name__ == "__main__":
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    sys.exit(main(tuple(given[:end]) or NAMES, tuple(given[end + 1 :])))
