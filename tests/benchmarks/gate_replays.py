"""The noisy case: what our gate and other tools' rules say where visits vary by 10, 20 and 30 % from one to the next.

    python -m tests.benchmarks gate_replays

Resampled from the visits that `gate_power` kept: a replayed session is a run of 16 successive blocks of all recorded
ones, begun at a random block and taken round (a circular block bootstrap, Politis & Romano 1992), so that what drifts
from block to block is kept, and no block counts twice. The log deviations of the visits' levels from their session's
median are stretched by one factor, so that their CV becomes 10, 20 or 30 %; samples within a visit move with its level.
That is the noise model: what a visit shares with its partner, and what it does not, are stretched alike. Candidates are
the recorded "+0 %" side times an exact factor. A stored baseline is that of another replayed session.
"""

import argparse
import collections
import json
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edgedeploy.judge.family import ErrorRate
from edgedeploy.judge.speed import LatencyEvidence, blocks_of, judge_latency
from edgedeploy.records.run import Burst, Visit
from tests.benchmarks.gate_power import BASELINE, MARGIN, POLICY, RAW, raw_visits
from tests.benchmarks.gate_rules import RULES, alarms, medians

SAME = "+0 %"
CVS = (0.10, 0.20, 0.30)
CHANGES = (0.0, 0.03, 0.05, 0.10, 0.20)


@dataclass(frozen=True, slots=True)
class Recorded:
    """One recorded block: the baseline, the same artifact again, and the middle log level of their session."""

    baseline: Visit
    same: Visit
    middle: float


def recorded(raw: Path) -> list[Recorded]:
    """Return the recorded blocks in the order of time, without those that a disturbed machine dropped."""
    found = []
    for path in sorted(raw.glob("*.json.gz")):
        sides = raw_visits(path)
        counted = [
            (old, new)
            for old, new in zip(sides[BASELINE], sides[SAME], strict=False)  # who is decided leaves the session
            if not (old.dropped or new.dropped)
        ]
        if counted:
            middle = statistics.median(math.log(level) for pair in counted for level in medians(pair))
            found += [Recorded(old, new, middle) for old, new in counted]
    return found


def spread_of(blocks: Sequence[Recorded]) -> float:
    """Return the standard deviation of log levels within sessions: what their CV is stretched from."""
    return statistics.stdev(
        math.log(level) - block.middle for block in blocks for level in medians((block.baseline, block.same))
    )


def stretched(visit: Visit, middle: float, factor: float, change: float, block: int) -> Visit:
    """Return a visit whose distance from its session's middle is stretched, slowed by an exact factor."""
    (level,) = medians([visit])
    by = math.exp((factor - 1) * (math.log(level) - middle)) * (1 + change)
    bursts = tuple(
        Burst(pair=burst.pair, samples_s=tuple(sample_s * by for sample_s in burst.samples_s)) for burst in visit.bursts
    )
    return msgspec.structs.replace(visit, bursts=bursts, block=block)


def replayed(
    blocks: Sequence[Recorded], order: random.Random, factor: float, change: float
) -> tuple[list[Visit], list[Visit]]:
    """Return baseline and candidate of successive blocks from a random one on, round and round, none of them twice."""
    first = order.randrange(len(blocks))
    chosen = [blocks[(first + place) % len(blocks)] for place in range(POLICY.max_blocks)]
    return (
        [stretched(one.baseline, one.middle, factor, 0.0, place) for place, one in enumerate(chosen)],
        [stretched(one.same, one.middle, factor, change, place) for place, one in enumerate(chosen)],
    )


def shares(blocks: Sequence[Recorded], factor: float, change: float, gates: int, seed: int) -> dict[str, object]:
    """Return what was said in how many replayed gates."""
    order, decisions, told = random.Random(seed), collections.Counter(), collections.Counter()
    margin = POLICY.margins["latency_p50"]
    for _ in range(gates):
        baseline, candidate = replayed(blocks, order, factor, change)
        stored, _again = replayed(blocks, order, factor, 0.0)
        evidence = LatencyEvidence(
            metric="latency_p50",
            margin=margin,
            blocks=blocks_of("latency_p50", baseline, candidate, is_relative=True),
            refusal=None,
            baseline_s=None,
            candidate_s=None,
        )
        rate = ErrorRate(POLICY.error_rate, POLICY.error_rate)
        decisions[judge_latency(evidence, POLICY, error_rate=rate).decision] += 1
        told.update(name for name, is_alarm in (alarms(baseline, stored, candidate) or {}).items() if is_alarm)
    return {
        "this gate": {name: decisions[name] / gates for name in ("FAIL", "INCONCLUSIVE", "PASS")},
        "alarms of other rules": {name: told[name] / gates for name in RULES},
    }


def main() -> None:
    """Replay, and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gates", type=int, default=300, help="replayed gates for each CV and change")
    parser.add_argument("--raw", type=Path, default=RAW)
    given = parser.parse_args()
    blocks = recorded(given.raw)
    if len(blocks) < POLICY.max_blocks:
        raise SystemExit(
            f"{given.raw} holds {len(blocks)} recorded blocks that count, and a replayed gate takes {POLICY.max_blocks} "
            f"different ones; first: python -m tests.benchmarks gate_power"
        )
    spread = spread_of(blocks)
    figures = {
        "margin": MARGIN,
        "error_rate": POLICY.error_rate,
        "recorded blocks": len(blocks),
        "recorded CV of visits within sessions": spread,
        "gates for each share": given.gates,
        "CV of visits": {
            f"{cv:.0%}": {
                f"{change:+.0%}": shares(blocks, cv / spread, change, given.gates, seed=number)
                for number, change in enumerate(CHANGES)
            }
            for cv in CVS
        },
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
