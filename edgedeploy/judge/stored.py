"""A latency against one of another session: what stored numbers can and cannot show. Pure.

Nothing cancels what happened to the device between the two sessions, so the interval is widened: each session as a
whole is taken to lie off by the device's run-to-run noise (a CV, from its passport), however many visits it has:

    variance = cv² + cv² + variance of the baseline's mean + variance of the candidate's mean     (of logarithms)

with the degrees of freedom of Welch & Satterthwaite (Welch 1947, Biometrika 34:28), for which the CV counts as known.
That is more than a CV among visits of one session alone would add to a mean of several, on purpose: a passport is made
in one session, and days differ by more than that (the visits of one session on a shared machine had a CV of 2 %, those
of an afternoon 17 %). Even so the noise may be larger than the passport knows; a change that is shown against it may be
called FAIL, but not PASS: that takes the two artifacts interleaved, or a policy that allows it by name.
"""

from __future__ import annotations

import math
import statistics

from edgedeploy.judge.estimate import Estimate
from edgedeploy.judge.family import ErrorRate
from edgedeploy.judge.limit import share_of_part, with_limit, without_limit
from edgedeploy.judge.speed import (
    LatencyEvidence,
    LatencyMetric,
    change_conclusion,
    counted_visits,
    judge_own_level,
    level_s,
    refused_latency,
    why_no_level,
    why_not_interleaved,
    why_other_device,
    why_unlike,
)
from edgedeploy.records.run import Run
from edgedeploy.records.verdict import Decision, Finding, Margin, Policy

# A spread of two values has one degree of freedom; three show whether there is one.
MIN_VISITS = 3


def is_stored_pair(baseline: Run, candidate: Run) -> bool:
    """Say whether two runs are alike in everything but the session, so that only drift keeps them from comparison."""
    return (
        why_other_device(baseline, candidate) is None
        and why_not_interleaved(baseline, candidate) is not None
        and why_unlike(baseline, candidate) is None
    )


def judge_stored_latency(
    evidence: LatencyEvidence,
    baseline: Run,
    candidate: Run,
    policy: Policy,
    *,
    noise: float | None,
    error_rate: ErrorRate,
) -> Finding:
    """Judge one latency metric of two sessions; a limit on the candidate itself is judged as ever.

    Args:
        evidence: of the metric, for its limit and for display.
        baseline, candidate: alike but for the session (`is_stored_pair`).
        policy: its limit's looks, and whether a PASS is allowed.
        noise: run-to-run CV of the device, a fraction; None: nobody knows it.
        error_rate: of this metric.
    """
    margin = evidence.margin
    share = share_of_part(margin, error_rate)
    change = _judge_change(
        evidence, baseline, candidate, without_limit(margin), noise, share, is_allowed=policy.allow_stored_pass
    )
    if margin is None or margin.limit is None:
        return change
    return with_limit(change, judge_own_level(evidence, policy, share), margin)


def _judge_change(
    evidence: LatencyEvidence,
    baseline: Run,
    candidate: Run,
    margin: Margin | None,
    noise: float | None,
    error_rate: ErrorRate,
    *,
    is_allowed: bool,
) -> Finding:
    apart = why_not_interleaved(baseline, candidate)
    assert apart is not None, "runs of one session are judged by their blocks"
    levels = [_logarithms(evidence.metric, run) for run in (baseline, candidate)]
    refusal = _why_not(evidence.metric, baseline, candidate, levels, noise, *apart)
    if refusal is not None:
        return refused_latency(evidence, *refusal, is_stored=True)
    assert noise is not None, "its absence is refused"
    estimate = estimate_across_sessions(levels[0], levels[1], noise)
    before_s, after_s = (math.exp(statistics.fmean(side)) for side in levels)
    is_relative = margin is None or margin.kind == "relative"
    low, high = estimate.low(error_rate.wrong_fail), estimate.high(error_rate.wrong_pass)
    counts = (
        f"{apart[0]}; {len(levels[0])} visits of the baseline and {len(levels[1])} of the candidate, the interval "
        f"widened by {candidate.device}'s run-to-run CV of {noise * 100:.2g} %"
    )

    def shown(log_ratio: float) -> float:
        change = math.expm1(min(log_ratio, 700.0))
        return change if is_relative else before_s * change

    decision: Decision = "PASS"
    reason, needed, p_fail, p_pass = f"reported, not judged; {counts}", "", None, None
    effect = shown(estimate.effect)
    if margin is not None:
        limit = _log_limit(margin, before_s)
        p_fail, p_pass = estimate.p_fail(limit), estimate.p_pass(limit)
        decision = error_rate.decide(p_fail, p_pass)
        said = change_conclusion(decision, effect, margin)
        if decision == "PASS" and not is_allowed:
            decision = "INCONCLUSIVE"
            said = f"{said} by stored numbers, which alone are no PASS"
            needed = f"{apart[1]}, or allow it by name: --allow-stored-pass, in a release allow_stored_pass = true"
        elif decision == "INCONCLUSIVE":
            needed = apart[1]
        reason = f"{said}; {counts}"
    return Finding(
        metric=evidence.metric,
        decision=decision,
        baseline_value=before_s,
        candidate_value=after_s,
        effect=effect,
        low=shown(low),
        high=shown(high),
        p_fail=p_fail,
        p_pass=p_pass,
        margin=margin,
        units=min(len(side) for side in levels),
        reason=reason,
        needed=needed,
        is_stored=True,
    )


def estimate_across_sessions(baseline: list[float], candidate: list[float], noise: float) -> Estimate:
    """Return the difference of two sessions' means of logarithms, each session off by `noise`.

    With a noise of 0 it is Welch's.
    """
    shares = [statistics.variance(side) / len(side) for side in (baseline, candidate)]
    total = sum(shares) + 2 * noise**2
    effect = statistics.fmean(candidate) - statistics.fmean(baseline)
    weights = sum(share**2 / (len(side) - 1) for share, side in zip(shares, (baseline, candidate), strict=True))
    # Where the sessions' own spread is nothing beside the noise, which is taken as known, t becomes normal.
    degrees = total**2 / weights if weights > 0 else math.inf
    return Estimate(effect, math.sqrt(total), min(degrees, 1e6))


def _log_limit(margin: Margin, baseline_s: float) -> float:
    """Return the margin as a log ratio; one that demands more than everything is kept by no candidate."""
    ratio = 1 + (margin.value if margin.kind == "relative" else margin.value / baseline_s)
    return math.log(ratio) if ratio > 0 else -math.inf


def _logarithms(metric: LatencyMetric, run: Run) -> list[float]:
    levels_s = [level_s(metric, [visit]) for visit in counted_visits(run)]
    return [math.log(one_s) for one_s in levels_s if one_s is not None and one_s > 0]


def _why_not(
    metric: LatencyMetric,
    baseline: Run,
    candidate: Run,
    levels: list[list[float]],
    noise: float | None,
    apart: str,
    together: str,
) -> tuple[str, str] | None:
    """Return (why there is no judgement, what would give one), or None."""
    if (no_level := why_no_level(metric, baseline, candidate)) is not None:
        return no_level
    for side, run, found in zip(("baseline", "candidate"), (baseline, candidate), levels, strict=True):
        if len(found) < MIN_VISITS:
            supported = " with enough samples for this percentile" if counted_visits(run) and not found else ""
            return (
                f"{apart}; the {side} has {len(found)} visits that count{supported}, too few to know how they spread",
                f"{together}, or at least {MIN_VISITS} visits of each",
            )
    if noise is None:
        return (
            f"{apart}, and how much runs of {candidate.device} differ by themselves is not known",
            f"{together}; or make the device's passport (edgedeploy devices passport {candidate.device}), so that the "
            "difference can be held against its noise",
        )
    if not (math.isfinite(noise) and noise >= 0):
        return f"{apart}; the passport of {candidate.device} says a run-to-run CV of {noise}", together
    return None
