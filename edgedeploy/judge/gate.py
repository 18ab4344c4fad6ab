"""Rules and findings → PASS, FAIL or INCONCLUSIVE. Pure. How metrics and cells share the error rate is in family.py."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from edgedeploy.errors import UsageError
from edgedeploy.judge.accuracy import judge_accuracy
from edgedeploy.judge.boundaries import unlike_copies
from edgedeploy.judge.family import ErrorRate, Judge, step_down, step_down_cells
from edgedeploy.judge.footprint import judge_artifact_size, judge_peak_memory
from edgedeploy.judge.speed import (
    LATENCY_METRICS,
    LatencyEvidence,
    LatencyMetric,
    can_more_blocks_decide,
    judge_latency,
    latency_evidence,
)
from edgedeploy.records.run import Run
from edgedeploy.records.verdict import CellVerdict, Decision, Finding, Metric, Policy, Verdict

# The order in which findings are told: accuracy first, for a fast wrong model never passes.
_ORDER: tuple[Metric, ...] = ("accuracy", "latency_p50", "latency_p95", "peak_memory", "artifact_size")


def judge(baseline: Run, candidate: Run, policy: Policy, *, cells: int = 1) -> CellVerdict:
    """Judge one candidate against its baseline.

    Args:
        baseline: the run to be compared with.
        candidate: the run in question.
        policy: margins, error rate and looks.
        cells: how many cells the gate judges in all; each gets an equal share of the error rate.

    Raises:
        UsageError: the policy's numbers cannot be meant.
    """
    _check(policy)
    share = ErrorRate(policy.error_rate, policy.error_rate).share(cells, failed=0, passed=0)
    evidence = _evidence(baseline, candidate, policy)
    return _cell_verdict(evidence, policy, _replay(evidence, policy, share, {}))


def judge_gate(name: str, pairs: Sequence[tuple[Run, Run]], policy: Policy, *, judged_utc: str) -> Verdict:
    """Judge every (baseline, candidate) of a gate, all together within one error rate.

    What `judge` decides for a cell with `cells=len(pairs)` stays decided here; a cell that passes in everything leaves
    its share to the others, which may decide more.

    Args:
        name: of the gate.
        pairs: one for each cell.
        policy: margins, error rate and looks.
        judged_utc: written into the verdict.

    Raises:
        UsageError: the policy's numbers cannot be meant.
    """
    _check(policy)
    gathered = [_evidence(baseline, candidate, policy) for baseline, candidate in pairs]
    findings = step_down_cells(
        [functools.partial(_replay, evidence, policy) for evidence in gathered],
        ErrorRate(policy.error_rate, policy.error_rate),
    )
    cells = tuple(_cell_verdict(evidence, policy, found) for evidence, found in zip(gathered, findings, strict=True))
    return Verdict(
        name=name,
        decision=combine(cell.decision for cell in cells),
        cells=cells,
        policy=policy,
        judged_utc=judged_utc,
    )


def is_decided(baseline: Run, candidate: Run, policy: Policy, *, cells: int = 1) -> bool:
    """Say whether measuring further blocks cannot change the cell's verdict.

    Asked after the outputs and after each block. What is decided at a look stays decided, because `judge` replays the
    looks in order; a cell that fails in any metric needs no more latency, whatever that would be.
    """
    verdict = judge(baseline, candidate, policy, cells=cells)
    if verdict.decision == "FAIL":
        return True
    undecided = {finding.metric for finding in verdict.findings if finding.decision == "INCONCLUSIVE"}
    latencies = _evidence(baseline, candidate, policy).latencies
    if all(latency.margin is None for latency in latencies.values()):
        # Latency is only reported: the blocks of the first look are enough, and none helps where it cannot be compared.
        return all(
            latency.refusal is not None or len(latency.blocks.outcomes) >= policy.min_blocks
            for latency in latencies.values()
        )
    return not any(
        metric in undecided and can_more_blocks_decide(latency, policy) for metric, latency in latencies.items()
    )


def combine(decisions: Iterable[Decision]) -> Decision:
    """Return the worst decision; of none, INCONCLUSIVE: nothing was shown.

    >>> combine(["PASS", "INCONCLUSIVE"]), combine(["INCONCLUSIVE", "FAIL"]), combine([])
    ('INCONCLUSIVE', 'FAIL', 'INCONCLUSIVE')
    """
    found = set(decisions)
    if "FAIL" in found:
        return "FAIL"
    return "PASS" if found == {"PASS"} else "INCONCLUSIVE"


@dataclass(frozen=True, slots=True)
class _Evidence:
    """Two runs, and what they say about latency."""

    baseline: Run
    candidate: Run
    latencies: Mapping[LatencyMetric, LatencyEvidence]


def _evidence(baseline: Run, candidate: Run, policy: Policy) -> _Evidence:
    return _Evidence(
        baseline,
        candidate,
        {
            metric: latency_evidence(metric, baseline, candidate, policy.margins.get(metric))
            for metric in LATENCY_METRICS
        },
    )


def _replay(
    evidence: _Evidence, policy: Policy, error_rate: ErrorRate, settled: Mapping[Metric, Finding]
) -> dict[Metric, Finding]:
    """Judge a cell after each block as it was measured, so that stopping early or late gives the same decisions."""
    measured = max(len(latency.blocks.outcomes) for latency in evidence.latencies.values())
    findings = dict(settled)
    for blocks in range(min(policy.min_blocks, measured), measured + 1):
        judges = _judges(evidence, blocks, policy)
        findings = step_down(
            {metric: judge for metric, judge in judges.items() if metric in policy.margins}, error_rate, findings
        )
    return findings


def _judges(evidence: _Evidence, blocks: int, policy: Policy) -> dict[Metric, Judge]:
    """Return how each metric that is estimated, not counted, is judged when so many blocks have been measured."""
    baseline, candidate, margins = evidence.baseline, evidence.candidate, policy.margins
    judges: dict[Metric, Judge] = {
        "accuracy": lambda rate: judge_accuracy(
            baseline.outputs, candidate.outputs, margins.get("accuracy"), error_rate=rate
        ),
        "peak_memory": lambda rate: judge_peak_memory(baseline, candidate, margins.get("peak_memory"), error_rate=rate),
    }
    for metric, latency in evidence.latencies.items():
        judges[metric] = functools.partial(_judge_latency_at, latency.until(blocks), policy)
    return judges


def _judge_latency_at(latency: LatencyEvidence, policy: Policy, error_rate: ErrorRate) -> Finding:
    return judge_latency(latency, policy, error_rate=error_rate)


def _cell_verdict(evidence: _Evidence, policy: Policy, judged: Mapping[Metric, Finding]) -> CellVerdict:
    baseline, candidate = evidence.baseline, evidence.candidate
    findings = dict(judged)
    findings["artifact_size"] = judge_artifact_size(baseline, candidate, policy.margins.get("artifact_size"))
    everything = max(len(latency.blocks.outcomes) for latency in evidence.latencies.values())
    for metric, judge_metric in _judges(evidence, everything, policy).items():
        if metric not in findings:  # reported without a margin, in no family
            findings[metric] = judge_metric(ErrorRate(policy.error_rate, policy.error_rate))
    told = tuple(findings[metric] for metric in _ORDER)
    return CellVerdict(
        cell=candidate.cell,
        baseline_cell=baseline.cell,
        device=candidate.device,
        target=candidate.artifact.target,
        decision=combine(finding.decision for finding in told if finding.margin is not None),
        findings=told,
        notes=_notes(baseline, candidate, policy),
    )


def _notes(baseline: Run, candidate: Run, policy: Policy) -> tuple[str, ...]:
    notes = [] if policy.margins else ["the policy has no margin, so nothing was judged"]
    notes += unlike_copies(baseline, candidate)
    for side, run in (("baseline", baseline), ("candidate", candidate)):
        unsteady = sum(not visit.is_steady for visit in run.visits if not visit.dropped)
        if unsteady:
            notes.append(f"{unsteady} of {len(run.visits)} visits of the {side} never warmed up to a steady state")
        if run.outputs is not None and run.outputs.is_repeatable is False:
            notes.append(f"the {side} gave different outputs for the same samples when it was run again")
    return tuple(notes)


def _check(policy: Policy) -> None:
    if not 0 < policy.error_rate < 0.5:
        raise UsageError(f"the policy's error_rate is {policy.error_rate}; give one between 0 and 0.5, such as 0.05")
    if not 2 <= policy.min_blocks <= policy.max_blocks:
        raise UsageError(
            f"the policy's min_blocks is {policy.min_blocks} and max_blocks {policy.max_blocks}; demand "
            "2 <= min_blocks <= max_blocks"
        )
