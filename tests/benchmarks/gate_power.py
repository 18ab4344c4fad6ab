"""What the gate says of candidates that are slower by exactly 0, 2, 3, 5 and 10 %, and what other tools' rules say.

    python -m tests.benchmarks gate_power
    python -m tests.benchmarks gate_power -- --gates 20

One session holds the baseline, the same again, and four slowed sides: in each round every side infers once, in a random
order, so that each of the five gates is of interleaved pairs, as usual; that they share their baseline makes the gates
of one session alike, and does nothing to the shares of one candidate over many sessions. A candidate leaves the session
as soon as its gate is decided, as a gate of its own would end; the last one leaves after 16 blocks. The other rules get
the very visits that our gate judged; rules that compare with a stored baseline get that of the session before.

Each session is appended to a ledger at once, so that it can be stopped and goes on where it was. The raw visits are kept
beside (build/, not in git) for `gate_replays`.
"""

import argparse
import collections
import gzip
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from edgedeploy.build import Built, this_target
from edgedeploy.judge.false_alarms import exact_interval
from edgedeploy.judge.gate import is_decided, judge
from edgedeploy.judge.margin import margin_from_text
from edgedeploy.lab.visits import DUET
from edgedeploy.records.run import Run, Visit
from edgedeploy.records.verdict import Policy
from edgedeploy.results import utc_now
from tests.benchmarks.__main__ import ROOT
from tests.benchmarks.demo_artifact import demo_artifact
from tests.benchmarks.gate_rules import RULES, alarms, medians
from tests.benchmarks.ledger import FOLDER, Ledger
from tests.benchmarks.slowed import Site, block_of, run_of, slowdown, slowed_sides

BASELINE = "baseline"
CHANGES = {"+0 %": 0.0, "+2 %": 0.02, "+3 %": 0.03, "+5 %": 0.05, "+10 %": 0.10}
MARGIN = "+3%"
POLICY = Policy(margins={"latency_p50": margin_from_text("latency_p50", MARGIN)})
RAW = ROOT / "build" / "gate_power"


def one_session(built: Built, number: int, folder: Path, raw: Path, blocks: int) -> dict[str, Any]:
    """Measure until all gates are decided; return what each said, and keep the raw visits."""
    started = time.perf_counter()
    policy = msgspec.structs.replace(POLICY, max_blocks=blocks, min_blocks=min(POLICY.min_blocks, blocks))
    limits = this_target("host").conditions
    taken: dict[str, list[Visit]] = {label: [] for label in (BASELINE, *CHANGES)}
    with slowed_sides(built, {BASELINE: 0.0, **CHANGES}, folder) as site:
        for block in range(blocks):
            undecided = [label for label in CHANGES if not is_decided(*_pair(built, site, taken, label), policy)]
            if not undecided:
                break
            for label, visit in block_of(site, [BASELINE, *undecided], DUET, limits, block=block, seed=number).items():
                taken[label].append(visit)
        said = {label: judge(*_pair(built, site, taken, label), policy) for label in CHANGES}
    really = slowdown(built, list(CHANGES.values()), folder)
    stored = _last_baseline(raw, number)
    keep = raw / f"{number:04}.json.gz"
    keep.parent.mkdir(parents=True, exist_ok=True)
    keep.write_bytes(gzip.compress(msgspec.json.encode(taken)))
    gates = {}
    for label, cell in said.items():
        finding = next(one for one in cell.findings if one.metric == "latency_p50")
        gates[label] = {
            "slowed by": really[CHANGES[label]],
            "decision": finding.decision,
            "units": finding.units,
            "effect": finding.effect,
            "low": finding.low,
            "high": finding.high,
            "rules": alarms(taken[BASELINE][: len(taken[label])], stored, taken[label]) if stored else None,
        }
    return {
        "utc": utc_now(),
        "number": number,
        "gates": gates,
        "blocks": len(taken[BASELINE]),
        "dropped": sum(bool(visit.dropped) for visit in taken[BASELINE]),
        "baseline_s": statistics.median(medians(taken[BASELINE])),
        "seconds": time.perf_counter() - started,
    }


def _pair(built: Built, site: Site, taken: dict[str, list[Visit]], label: str) -> tuple[Run, Run]:
    """Return a candidate's run, and the baseline's of the blocks in which that candidate was measured."""
    candidate = taken[label]
    baseline = taken[BASELINE][: len(candidate)]
    return (
        run_of(built, site, BASELINE, baseline, "s", is_baseline=True),
        run_of(built, site, label, candidate, "s", is_baseline=False),
    )


def _last_baseline(raw: Path, number: int) -> list[Visit] | None:
    """Return the baseline visits of the session before; None for the first session."""
    path = raw / f"{number - 1:04}.json.gz"
    return raw_visits(path)[BASELINE] if path.is_file() else None


def raw_visits(path: Path) -> dict[str, list[Visit]]:
    """Return the visits of a session, by label."""
    return msgspec.json.decode(gzip.decompress(path.read_bytes()), type=dict[str, list[Visit]])


def figures_of(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the shares of each decision, and of each other rule's alarms, for every candidate."""
    shares: dict[str, Any] = {}
    for label in CHANGES:
        gates = [one["gates"][label] for one in outcomes]
        decisions = collections.Counter(gate["decision"] for gate in gates)
        told = [gate["rules"] for gate in gates if gate["rules"] is not None]
        effects = [gate["effect"] for gate in gates if gate["effect"] is not None]
        shares[label] = {
            "gates": len(gates),
            "this gate": {name: decisions[name] / len(gates) for name in ("FAIL", "INCONCLUSIVE", "PASS")},
            "this gate, FAIL, 95 % interval": exact_interval(decisions["FAIL"], len(gates)),
            "mean change within one process": statistics.fmean(gate["slowed by"] for gate in gates),
            "median change seen": statistics.median(effects) if effects else None,
            "median blocks used": statistics.median(gate["units"] for gate in gates),
            "alarms of other rules": {name: statistics.fmean(one[name] for one in told) for name in RULES if told},
        }
    levels = [float(one["baseline_s"]) for one in outcomes]
    return {
        "margin": MARGIN,
        "error_rate": POLICY.error_rate,
        "candidates": shares,
        "sessions": len(outcomes),
        "blocks that did not count": sum(one["dropped"] for one in outcomes),
        "CV of the baseline between sessions": statistics.stdev(levels) / statistics.fmean(levels)
        if len(levels) > 1
        else None,
        "median seconds per session of five gates": statistics.median(one["seconds"] for one in outcomes),
        "median baseline_s": statistics.median(levels),
        "first": outcomes[0]["utc"],
        "last": outcomes[-1]["utc"],
    }


def main() -> None:
    """Measure until the ledger holds as many sessions as were asked for, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gates", type=int, default=100, help="sessions; each is a gate of every candidate")
    parser.add_argument("--ledger", type=Path, default=FOLDER / "gate_power.jsonl")
    parser.add_argument("--raw", type=Path, default=RAW)
    parser.add_argument("--blocks", type=int, default=POLICY.max_blocks)
    parser.add_argument("--minutes", type=float, default=0.0, help="stop after so long; 0: no limit")
    given = parser.parse_args()
    ledger, started = Ledger(given.ledger), time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        built = demo_artifact(Path(temporary))
        while (done := len(ledger.read())) < given.gates:
            if given.minutes and time.monotonic() - started > 60 * given.minutes:
                break
            outcome = one_session(built, done, Path(temporary), given.raw, given.blocks)
            ledger.append(outcome)
            words = ", ".join(f"{label} {gate['decision']}" for label, gate in outcome["gates"].items())
            print(f"{done + 1} of {given.gates}: {words}", file=sys.stderr, flush=True)
    print(json.dumps(figures_of(ledger.read())))


if __name__ == "__main__":
    main()
