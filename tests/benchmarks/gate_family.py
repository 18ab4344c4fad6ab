"""How often a whole gate is wrong: 4 cells x 9 metrics, classes, limits, stored baselines.

Simulated, with the real judge: `gate_on_local` measures a real device. Each figure is the share of gates that decided
something that is wrong, beside its nominal rate.
"""

import argparse
import json
import math
import sys
import time
from collections import Counter

import numpy as np
from msgspec.structs import replace

from edgedeploy.judge.classes import judge_class_accuracy
from edgedeploy.judge.family import ErrorRate
from edgedeploy.judge.gate import judge, judge_gate
from edgedeploy.judge.margin import margin_from_text
from edgedeploy.records.device import DeviceFacts
from edgedeploy.records.run import ArtifactReference, Boundary, Burst, Conditions, MemoryVisit, Outputs, Run, Visit
from edgedeploy.records.verdict import Policy

TEXTS = {
    "accuracy": "-1pt",
    "class_accuracy": "-5pt",
    "latency_p50": "+5%",
    "latency_p95": "+5%",
    "latency_p99": "+5%",
    "first_inference": "+5%",
    "load_time": "+5%",
    "peak_memory": "+5%",
    "artifact_size": "+0%",
}
POLICY = Policy(margins={metric: margin_from_text(metric, text) for metric, text in TEXTS.items()})
CELLS, QUESTIONS, CLASSES = 4, 2000, 10
SAMPLES = (280, 12, 8)  # their largest are the median, the 95th and the 99th percentile of 300
NOWHERE = Conditions(monotonic_s=0.0)
FACTS = DeviceFacts(
    hostname="", machine="", system="", kernel="", os_name="", libc="", python="", cpu_model="", isa=(), cores=1,
    memory_bytes=None, boot_id="",
)  # fmt: skip
ARTIFACT = ArtifactReference(
    name="a", sha256="", size_bytes=1000, key="", model="m", target="t", backend="b", precision="fp32", options={}
)


def run_of(side: str, levels_s: np.ndarray, peaks: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> Run:
    """Return a run: a row of levels is a visit's median, 95th and 99th percentile, first inference and loading."""
    visits = tuple(
        Visit(
            block=block,
            position=0,
            load_s=row[4],
            first_inference_s=row[3],
            warm_up_samples_s=(),
            is_steady=True,
            bursts=(Burst(pair=0, samples_s=tuple(np.repeat(row[:3], SAMPLES).tolist())),),
            before=NOWHERE,
            after=NOWHERE,
        )
        for block, row in enumerate(levels_s.tolist())
    )
    return Run(
        session="s",
        cell=side,
        side="baseline" if side == "baseline" else "candidate",
        artifact=ARTIFACT,
        device="d",
        facts=FACTS,
        runtime="",
        boundary=Boundary(includes_input_copy=False, includes_output_copy=False, threads=1, batch=1),
        schedule="",
        started_utc="2026-11-22T00:00:00Z",
        visits=visits,
        memory=tuple(MemoryVisit(peak_rss_bytes=round(peak), import_rss_bytes=1) for peak in peaks),
        outputs=outputs_of(scores, labels),
        edgedeploy="",
        runner_sha256="",
    )


def outputs_of(scores: np.ndarray, labels: np.ndarray) -> Outputs:
    """Return answers that scored so."""
    return Outputs(
        dataset="d",
        dataset_sha256="d",
        samples=len(scores),
        sha256="",
        metric="top1",
        scores=tuple(scores.tolist()),
        value=float(scores.mean()),
        labels=tuple(labels.tolist()),
    )


def answers(
    random: np.random.Generator, labels: np.ndarray, drops: np.ndarray, churn: float = 0.01
) -> list[np.ndarray]:
    """Return both sides' scores, where a share `churn` is gained and that and the sample's drop is lost."""
    chance = random.random(len(labels))
    before, after = np.ones(len(labels)), np.ones(len(labels))
    before[chance < churn] = 0.0
    after[(chance >= churn) & (chance < 2 * churn + drops)] = 0.0
    return [before, after]


def pair_on_the_margin(random: np.random.Generator) -> tuple[Run, Run]:
    """Return two runs, the second of which is worse in every metric by its margin exactly.

    The metrics of a block share half of its noise. One class of ten drops by 5 points and the others so that all
    together drop by 1.
    """
    labels = np.arange(QUESTIONS) % CLASSES
    drops = np.where(labels == 0, 0.05, (0.01 - 0.05 / CLASSES) / (1 - 1 / CLASSES))
    sides = []
    for side, scores in zip(("baseline", "candidate"), answers(random, labels, drops), strict=True):
        factor = 1.05 if side == "candidate" else 1.0
        noise = random.normal(0, 0.01, (POLICY.max_blocks, 1)) + random.normal(0, 0.01, (POLICY.max_blocks, 5))
        levels_s = np.array([0.004, 0.006, 0.009, 0.02, 0.1]) * factor * np.exp(noise)
        levels_s[:, 1:3] = np.maximum.accumulate(levels_s[:, :3], axis=1)[:, 1:]
        sides.append(run_of(side, levels_s, 6e7 * factor * np.exp(random.normal(0, 0.005, 3)), scores, labels))
    return sides[0], sides[1]


def family(random: np.random.Generator, gates: int) -> dict[str, float]:
    """Return how often gates of 4 cells, each of whose metrics lies on its margin, call any FAIL, or any PASS."""
    found: Counter[str] = Counter()
    started_s = time.perf_counter()
    for number in range(gates):
        pairs = [pair_on_the_margin(random) for _ in range(CELLS)]
        verdict = judge_gate("g", pairs, POLICY, judged_utc="")
        estimated = [one for cell in verdict.cells for one in cell.findings if one.metric != "artifact_size"]
        found.update({one.decision for one in estimated})
        found.update({f"{one.metric} {one.decision}" for one in estimated if one.decision != "INCONCLUSIVE"})
        if (number + 1) % 10 == 0:
            print(f"{number + 1}/{gates} gates", file=sys.stderr, flush=True)
    seconds = (time.perf_counter() - started_s) / gates
    wrong = {decision: found[decision] / gates for decision in ("FAIL", "PASS")}
    by_metric = {name: count for name, count in sorted(found.items()) if " " in name}
    return {"gates": gates, "nominal": POLICY.error_rate, **wrong, "gates with": by_metric, "seconds_per_gate": seconds}


def classes(random: np.random.Generator, gates: int) -> dict[str, dict[str, float]]:
    """Return the shares of decisions on ten classes of 20 to 400 samples, by how much the largest or smallest drops."""
    sizes = [20, 40, 60, 80, 100, 150, 200, 250, 300, 400]
    labels = np.repeat(np.arange(len(sizes)), sizes)
    margin, rate = margin_from_text("class_accuracy", "-5pt"), ErrorRate(0.05, 0.05)
    shares: dict[str, dict[str, float]] = {}
    for name, label, drop in (
        ("no drop", 9, 0.0),
        ("all classes on the margin", -1, 0.05),
        ("largest on the margin", 9, 0.05),
        ("60 samples on the margin", 2, 0.05),
        ("largest drops 15 pt", 9, 0.15),
        ("20 samples drop 60 pt", 0, 0.60),
    ):
        drops = np.where((labels == label) | (label < 0), drop, 0.0)
        decisions: Counter[str] = Counter()
        for _ in range(gates):
            before, after = (outputs_of(scores, labels) for scores in answers(random, labels, drops))
            finding = judge_class_accuracy(before, after, margin, error_rate=rate, small_at=0.05)
            decisions[finding.decision] += 1
        shares[name] = {decision: decisions[decision] / gates for decision in ("PASS", "FAIL", "INCONCLUSIVE")}
    return shares


def latency_only(side: str, levels_s: np.ndarray) -> Run:
    """Return a run of which only the median latency is looked at."""
    nothing = np.zeros(0)
    run = run_of(side, np.repeat(levels_s[:, None], 5, axis=1), nothing, np.ones(1), np.zeros(1, int))
    return replace(run, outputs=None)


def series(random: np.random.Generator, count: int, spread: float, correlation: float) -> np.ndarray:
    """Return a stationary AR(1) series with this standard deviation."""
    values = random.normal(0, spread, count)
    for place in range(1, count):
        values[place] = correlation * values[place - 1] + math.sqrt(1 - correlation**2) * values[place]
    return values


def limits(random: np.random.Generator, gates: int) -> dict[str, dict[str, float]]:
    """Return the decisions on a candidate whose level is its limit, by how much each visit depends on the one before."""
    policy = Policy(margins={"latency_p50": margin_from_text("latency_p50", "<= 5ms")})
    shares = {}
    for correlation in (0.0, 0.3, 0.7):
        decisions: Counter[str] = Counter()
        for _ in range(gates):
            levels_s = 0.005 * np.exp(series(random, policy.max_blocks, 0.05, correlation))
            run = latency_only("candidate", levels_s)
            decisions[judge(latency_only("baseline", levels_s), run, policy).decision] += 1
        shares[f"lag-1 correlation {correlation:g}"] = {one: decisions[one] / gates for one in ("PASS", "FAIL")}
    return shares


def stored(random: np.random.Generator, gates: int) -> dict[str, dict[str, float]]:
    """Return the decisions on a change of the margin exactly, across sessions that differ as the passport says, or more.

    A PASS is allowed by name here; without that there is none.
    """
    policy = Policy(margins={"latency_p50": margin_from_text("latency_p50", "+5%")}, allow_stored_pass=True)
    shares = {}
    for name, known, true in (("noise as known", 0.03, 0.03), ("twice the noise known", 0.03, 0.06)):
        decisions: Counter[str] = Counter()
        for _ in range(gates):
            sides = [
                latency_only(side, 0.004 * factor * np.exp(random.normal(0, true) + random.normal(0, 0.02, 8)))
                for side, factor in (("baseline", 1.0), ("candidate", 1.05))
            ]
            old = replace(sides[0], session="last week")
            decisions[judge(old, sides[1], policy, noise=known).decision] += 1
        shares[name] = {one: decisions[one] / gates for one in ("PASS", "FAIL")}
    return shares


def main() -> None:
    """Print every rate as one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--gates", type=int, default=200, help="whole gates of 4 cells; ten times as many of the others"
    )
    gates = parser.parse_args().gates
    random = np.random.default_rng(20261122)
    figures = {
        "classes": classes(random, 5 * gates),
        "limit, on it": limits(random, 5 * gates),
        "stored baseline, on the margin": stored(random, 5 * gates),
        "family, all on the margin": family(random, gates),
        "standard_error_of_5_percent": math.sqrt(0.05 * 0.95 / gates),
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
