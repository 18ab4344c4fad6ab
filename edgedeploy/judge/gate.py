"""Rules and findings → PASS, FAIL or INCONCLUSIVE. Pure. How metrics and cells share the error rate is in family.py."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgedeploy.errors import UsageError
from edgedeploy.judge.accuracy import judge_accuracy
from edgedeploy.judge.boundaries import unlike_copies
from edgedeploy.judge.classes import judge_class_accuracy
from edgedeploy.judge.family import ErrorRate, Judge, combine, step_down, step_down_cells
from edgedeploy.judge.footprint import judge_artifact_size, judge_peak_memory
from edgedeploy.judge.planning import policy_of
from edgedeploy.judge.speed import (
    LATENCY_METRICS,
    LatencyEvidence,
    LatencyMetric,
    can_more_blocks_decide,
    judge_latency,
    latency_evidence,
)
from edgedeploy.judge.stored import is_stored_pair, judge_stored_latency
from edgedeploy.records.run import Run
from edgedeploy.records.verdict import CellVerdict, Finding, Metric, Policy, Verdict

__all__ = ["combine", "is_decided", "judge", "judge_gate"]

# The order in which findings are told: accuracy first, for a fast wrong model never passes.
_ORDER: tuple[Metric, ...] = ("accuracy", "class_accuracy", *LATENCY_METRICS, "peak_memory", "artifact_size")
# What is not told unless it is judged, or there is something to tell.
_DISPENSABLE: tuple[Metric, ...] = ("class_accuracy", "latency_p99")


def judge(baseline: Run, candidate: Run, policy: Policy, *, cells: int = 1, noise: float | None = None) -> CellVerdict:
    """Judge one candidate against its baseline.

    Args:
        baseline: the run to be compared with.
        candidate: the run in question.
        policy: margins, error rate and looks.
        cells: how many cells the gate judges in all; each gets an equal share of the error rate.
        noise: run-to-run CV of the device, by which two sessions' latencies are held against each other; None: unknown.

    Raises:
        UsageError: the policy's numbers cannot be meant.
    """
    _check(policy)
    share = ErrorRate(policy.error_rate, policy.error_rate).share(cells, failed=0, passed=0)
    evidence = _evidence(baseline, candidate, policy, noise)
    return _cell_verdict(evidence, _replay(evidence, share, {}))


def judge_gate(
    name: str,
    pairs: Sequence[tuple[Run, Run]],
    policy: Policy,
    *,
    judged_utc: str,
    noises: Mapping[str, float] | None = None,
) -> Verdict:
    """Judge every (baseline, candidate) of a gate, all together within one error rate.

    What `judge` decides for a cell with `cells=len(pairs)` stays decided here; a cell that passes in everything leaves
    its share to the others, which may decide more.

    Args:
        name: of the gate.
        pairs: one for each cell.
        policy: margins, error rate and looks.
        judged_utc: written into the verdict.
        noises: device → its run-to-run CV, where that is known.

    Raises:
        UsageError: the policy's numbers cannot be meant.
    """
    _check(policy)
    gathered = [
        _evidence(baseline, candidate, policy, (noises or {}).get(candidate.device)) for baseline, candidate in pairs
    ]
    findings = step_down_cells(
        [functools.partial(_replay, evidence) for evidence in gathered],
        ErrorRate(policy.error_rate, policy.error_rate),
    )
    cells = tuple(_cell_verdict(evidence, found) for evidence, found in zip(gathered, findings, strict=True))
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
    _check(policy)
    share = ErrorRate(policy.error_rate, policy.error_rate).share(cells, failed=0, passed=0)
    evidence = _evidence(baseline, candidate, policy, None)
    verdict = _cell_verdict(evidence, _replay(evidence, share, {}))
    if verdict.decision == "FAIL":
        return True
    undecided = {finding.metric for finding in verdict.findings if finding.decision == "INCONCLUSIVE"}
    latencies = evidence.latencies
    if all(latency.margin is None for latency in latencies.values()):
        # Latency is only reported: the blocks of the first look are enough, and none helps where it cannot be compared.
        return all(
            latency.refusal is not None or len(latency.blocks.outcomes) >= policy.min_blocks
            for latency in latencies.values()
        )
    return not any(
        metric in undecided and can_more_blocks_decide(latency, evidence.policy)
        for metric, latency in latencies.items()
    )


@dataclass(frozen=True, slots=True)
class _Evidence:
    """Two runs, and what they say about latency.

    Attributes:
        policy: of this cell, with its own last look.
        noise: run-to-run CV of the device.
        is_stored: they were measured in different sessions, and are alike otherwise.
    """

    baseline: Run
    candidate: Run
    policy: Policy
    latencies: Mapping[LatencyMetric, LatencyEvidence]
    noise: float | None
    is_stored: bool


def _evidence(baseline: Run, candidate: Run, policy: Policy, noise: float | None) -> _Evidence:
    policy = policy_of(policy, candidate.cell)
    return _Evidence(
        baseline,
        candidate,
        policy,
        {
            metric: latency_evidence(metric, baseline, candidate, policy.margins.get(metric))
            for metric in LATENCY_METRICS
        },
        noise,
        is_stored_pair(baseline, candidate),
    )


def _replay(evidence: _Evidence, error_rate: ErrorRate, settled: Mapping[Metric, Finding]) -> dict[Metric, Finding]:
    """Judge a cell after each block as it was measured, so that stopping early or late gives the same decisions."""
    policy = evidence.policy
    measured = max(latency.measured for latency in evidence.latencies.values())
    findings = dict(settled)
    for blocks in range(min(policy.min_blocks, measured), measured + 1):
        judges = _judges(evidence, blocks)
        findings = step_down(
            {metric: judge for metric, judge in judges.items() if metric in policy.margins}, error_rate, findings
        )
    return findings


def _judges(evidence: _Evidence, blocks: int) -> dict[Metric, Judge]:
    """Return how each metric that is estimated, not counted, is judged when so many blocks have been measured."""
    baseline, candidate, policy = evidence.baseline, evidence.candidate, evidence.policy
    margins = policy.margins
    judges: dict[Metric, Judge] = {
        "accuracy": lambda rate: judge_accuracy(
            baseline.outputs, candidate.outputs, margins.get("accuracy"), error_rate=rate
        ),
        "class_accuracy": lambda rate: judge_class_accuracy(
            baseline.outputs,
            candidate.outputs,
            margins.get("class_accuracy"),
            error_rate=rate,
            small_at=policy.error_rate,
        ),
        "peak_memory": lambda rate: judge_peak_memory(baseline, candidate, margins.get("peak_memory"), error_rate=rate),
    }
    for metric, latency in evidence.latencies.items():
        judges[metric] = functools.partial(_judge_latency_at, evidence, latency.until(blocks))
    return judges


def _judge_latency_at(evidence: _Evidence, latency: LatencyEvidence, error_rate: ErrorRate) -> Finding:
    if evidence.is_stored:
        return judge_stored_latency(
            latency,
            evidence.baseline,
            evidence.candidate,
            evidence.policy,
            noise=evidence.noise,
            error_rate=error_rate,
        )
    return judge_latency(latency, evidence.policy, error_rate=error_rate)


def _cell_verdict(evidence: _Evidence, judged: Mapping[Metric, Finding]) -> CellVerdict:
    baseline, candidate, policy = evidence.baseline, evidence.candidate, evidence.policy
    findings = dict(judged)
    findings["artifact_size"] = judge_artifact_size(baseline, candidate, policy.margins.get("artifact_size"))
    everything = max(latency.measured for latency in evidence.latencies.values())
    for metric, judge_metric in _judges(evidence, everything).items():
        if metric not in findings:  # reported without a margin, in no family
            findings[metric] = judge_metric(ErrorRate(policy.error_rate, policy.error_rate))
    told = tuple(findings[metric] for metric in _ORDER if not _is_void(findings[metric]))
    return CellVerdict(
        cell=candidate.cell,
        baseline_cell=baseline.cell,
        device=candidate.device,
        target=candidate.artifact.target,
        decision=combine(finding.decision for finding in told if finding.margin is not None),
        findings=told,
        notes=_notes(baseline, candidate, policy),
    )


def _is_void(finding: Finding) -> bool:
    """Say whether a finding is neither a judgement nor a figure."""
    return finding.metric in _DISPENSABLE and finding.margin is None and finding.effect is None


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
