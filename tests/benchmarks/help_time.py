"""How long `edgedeploy --help` takes, beside importing the two libraries that any such program needs."""

import json
import statistics
import subprocess
import sys
import time

ROUNDS = 15


def seconds(*arguments: str) -> float:
    """Return the wall time of one fresh interpreter."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
    return time.perf_counter() - started


ours, reference = [], []
for _ in range(ROUNDS):
    ours.append(seconds("-m", "edgedeploy", "--help"))
    reference.append(seconds("-c", "import click, rich"))
print(
    json.dumps(
        {
            "rounds": ROUNDS,
            "help_median_s": statistics.median(ours),
            "import_click_rich_median_s": statistics.median(reference),
            "ratio": statistics.median(ours) / statistics.median(reference),
        }
    )
)
