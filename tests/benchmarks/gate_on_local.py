"""How often the real gate on `local` is wrong: 40 times an artifact against itself, 40 times one that is 10 % slower.

The slower one is a chain of 22 convolutions against 20; its true slowdown is measured in the same run, over all bursts
of all gates.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from edgedeploy import pipeline
from edgedeploy.outcomes import Outcome
from tests.benchmarks.models import chain

MARGINS = ["latency_p50=+5%"]


def gates(count: int, baseline: Path, candidate: Path, label: str) -> dict[str, object]:
    """Gate `count` times and count what it said."""
    decisions: Counter[str] = Counter()
    seconds, blocks, ratios = [], [], []
    for number in range(count):
        started = time.perf_counter()
        outcome = pipeline.gate(str(candidate), baseline=str(baseline), margins=MARGINS, seed=number)
        seconds.append(time.perf_counter() - started)
        decisions[outcome.verdict.decision] += 1
        old, new = _sides(outcome)
        blocks.append(len(old.visits))
        ratios += [
            math.log(_median(new_visit) / _median(old_visit))
            for old_visit, new_visit in zip(old.visits, new.visits, strict=True)
            if not old_visit.dropped and not new_visit.dropped
        ]
        print(f"{label} {number + 1}/{count}: {outcome.verdict.decision}", file=sys.stderr, flush=True)
    return {
        "gates": count,
        "decisions": dict(decisions),
        "median_seconds_per_decision": statistics.median(seconds),
        "median_blocks_per_decision": statistics.median(blocks),
        "median_change_over_all_blocks": math.expm1(statistics.median(ratios)) if ratios else None,
        "block_ratio_sd": statistics.stdev(ratios) if len(ratios) > 1 else None,
    }


def _sides(outcome: Outcome) -> tuple[object, object]:
    cell = outcome.verdict.cells[0]
    return outcome.runs[cell.baseline_run], outcome.runs[cell.candidate_run]


def _median(visit: object) -> float:
    return statistics.median(sample for burst in visit.bursts for sample in burst.samples_s)


def main() -> None:
    """Run both series."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gates", type=int, default=40)
    count = parser.parse_args().gates
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)
        os.environ["EDGEDEPLOY_CACHE_DIR"] = f"{temporary}/cache"
        fast, slow = (
            pipeline.compile(str(chain(layers, Path(f"chain_{layers}.onnx"))), output=Path(f"out_{layers}")).folder
            for layers in (20, 22)
        )
        figures = {
            "margin": MARGINS[0],
            "same artifact": gates(count, fast, fast, "A/A"),
            "10 % slower": gates(count, fast, slow, "slower"),
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
