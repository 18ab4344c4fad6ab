"""How often the gate says FAIL on `local` although nothing has changed: the demo's artifact against itself.

    python -m tests.benchmarks aa_gates
    python -m tests.benchmarks aa_gates -- --gates 20

Each outcome is appended to a ledger at once, so that it can be stopped and goes on where it was; the figures are of all
that the ledger holds of this machine. Blocks in which other processes used a core do not count, as in any gate: where
the machine is never quiet, gates end INCONCLUSIVE, which is told beside the rate.
"""

import argparse
import collections
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from edgedeploy import pipeline
from edgedeploy.judge.false_alarms import CONFIDENCE, exact_interval
from edgedeploy.results import utc_now
from tests.benchmarks.demo_artifact import EVALUATION, demo_artifact
from tests.benchmarks.ledger import FOLDER, Ledger

MARGINS = ("accuracy=-1pt", "latency_p50=+3%", "peak_memory=+10%", "artifact_size=+0%")


def one_gate(artifact: Path, seed: int, results: Path) -> dict[str, object]:
    """Gate once, and return what it said and how long that took."""
    started = time.perf_counter()
    outcome = pipeline.gate(
        artifact,
        baseline=artifact,
        margins=MARGINS,
        evaluation=EVALUATION,
        seed=seed,
        results=results,
        is_explained=False,
    )
    (cell,) = outcome.verdict.cells
    latency = next(finding for finding in cell.findings if finding.metric == "latency_p50")
    candidate = outcome.runs[cell.candidate_run]
    return {
        "utc": utc_now(),
        "seed": seed,
        "decision": outcome.verdict.decision,
        "failed": [finding.metric for finding in cell.findings if finding.decision == "FAIL"],
        "undecided": [finding.metric for finding in cell.findings if finding.decision == "INCONCLUSIVE"],
        "latency": latency.decision,
        "effect": latency.effect,
        "blocks": len(candidate.visits),
        "dropped": sum(bool(visit.dropped) for visit in candidate.visits),
        "seconds": time.perf_counter() - started,
    }


def figures_of(outcomes: list[dict[str, object]]) -> dict[str, object]:
    """Return the shares of each decision, the false-alarm rate with its interval, and what a decision took."""
    gates = len(outcomes)
    decisions = collections.Counter(str(one["decision"]) for one in outcomes)
    latencies = collections.Counter(str(one["latency"]) for one in outcomes)
    low, high = exact_interval(decisions["FAIL"], gates)
    return {
        "margins": list(MARGINS),
        "gates": gates,
        "decisions": dict(decisions),
        "decisions of latency p50": dict(latencies),
        "false FAIL rate": decisions["FAIL"] / gates,
        f"false FAIL rate, {CONFIDENCE:.0%} interval": [low, high],
        "metrics that failed": dict(collections.Counter(name for one in outcomes for name in one["failed"])),
        "metrics undecided": dict(collections.Counter(name for one in outcomes for name in one["undecided"])),
        "median seconds per decision": statistics.median(float(one["seconds"]) for one in outcomes),
        "median blocks per decision": statistics.median(int(one["blocks"]) for one in outcomes),
        "blocks that did not count": sum(int(one["dropped"]) for one in outcomes),
        "first": outcomes[0]["utc"],
        "last": outcomes[-1]["utc"],
    }


def main() -> None:
    """Gate until the ledger holds as many as were asked for, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gates", type=int, default=200)
    parser.add_argument("--ledger", type=Path, default=FOLDER / "aa_gates.jsonl")
    parser.add_argument("--minutes", type=float, default=0.0, help="stop after so long; 0: no limit")
    given = parser.parse_args()
    ledger, started = Ledger(given.ledger), time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        artifact = demo_artifact(Path(temporary)).folder
        while (done := len(ledger.read())) < given.gates:
            if given.minutes and time.monotonic() - started > 60 * given.minutes:
                break
            outcome = one_gate(artifact, done, Path(temporary) / "results")
            ledger.append(outcome)
            print(f"{done + 1} of {given.gates}: {outcome['decision']}", file=sys.stderr, flush=True)
    print(json.dumps(figures_of(ledger.read())))


if __name__ == "__main__":
    main()
