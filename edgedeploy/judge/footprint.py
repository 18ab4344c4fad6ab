"""What an artifact takes up: peak memory, which is estimated, and size, which is counted. Pure."""

from __future__ import annotations

import math
import statistics

from edgedeploy.judge.boundaries import differing_field
from edgedeploy.judge.estimate import Estimate, estimate_of_difference, units_to_decide
from edgedeploy.judge.family import ErrorRate
from edgedeploy.judge.limit import judge_mean, refused, share_of_part, with_limit, without_limit
from edgedeploy.records.run import Run
from edgedeploy.records.verdict import Decision, Finding, LimitFinding, Margin
from edgedeploy.units import format_bytes, format_change

# Two visits give one degree of freedom and an interval of no use; three show whether a peak repeats.
MIN_MEMORY_VISITS = 3
# Visits of one artifact that differ by more are said to: an allocator with two modes looks like this.
_SPREAD_WORTH_SAYING = 0.05


def judge_peak_memory(baseline: Run, candidate: Run, margin: Margin | None, *, error_rate: ErrorRate) -> Finding:
    """Judge the kernel's high-water marks by Welch's t-test over memory visits (of their logarithms, where relative).

    The visits of the two sides are not paired: each is a fresh process of its own, and memory does not drift as speed
    does. Identical visits leave no doubt, so their difference is compared with the margin as it is. A limit on the
    candidate itself: a t-test over the logarithms of its own visits.
    """
    share = share_of_part(margin, error_rate)
    change = _judge_peak_change(baseline, candidate, without_limit(margin), error_rate=share)
    if margin is None or margin.limit is None:
        return change
    return with_limit(change, _judge_own_peak(candidate, margin, share), margin)


def _judge_own_peak(candidate: Run, margin: Margin, error_rate: ErrorRate) -> LimitFinding:
    """Judge how much the candidate alone may take."""
    assert margin.limit is not None, "only a limit is judged"
    peaks = [float(visit.peak_rss_bytes) for visit in candidate.memory]
    refusal = _why_no_peaks(peaks)
    if refusal is not None:
        return refused(margin, *refusal, value=statistics.median(peaks) if peaks else None, units=len(peaks))
    limit = math.log(margin.limit)

    def needed(estimate: Estimate) -> str:
        return _needed_visits(estimate.standard_error, abs(limit - estimate.effect), [peaks], error_rate)

    return judge_mean(
        [math.log(peak) for peak in peaks],
        limit,
        error_rate,
        shown=lambda logarithm: math.exp(min(logarithm, 700.0)),
        noun="peak memory",
        told=format_bytes,
        counted=f"{len(peaks)} memory visits of the candidate{_spread([peaks])}",
        needed=needed,
    )


def _judge_peak_change(baseline: Run, candidate: Run, margin: Margin | None, *, error_rate: ErrorRate) -> Finding:
    sides = [[float(visit.peak_rss_bytes) for visit in run.memory] for run in (baseline, candidate)]
    medians = [statistics.median(peaks) if peaks else None for peaks in sides]
    refusal = _why_no_peak(baseline, candidate)
    if refusal is not None or medians[0] is None or medians[1] is None:
        reason, needed = refusal or ("", "")
        return Finding(
            metric="peak_memory",
            decision="INCONCLUSIVE" if margin else "PASS",
            baseline_value=medians[0],
            candidate_value=medians[1],
            effect=None,
            margin=margin,
            units=min(len(peaks) for peaks in sides),
            reason=reason if margin else f"reported, not judged; {reason}",
            needed=needed if margin else "",
        )
    is_relative = margin is None or margin.kind == "relative"
    before, after = ([math.log(peak) for peak in peaks] if is_relative else peaks for peaks in sides)
    estimate = estimate_of_difference(before, after)
    effect, low, high = (
        math.expm1(number) if is_relative else number
        for number in (estimate.effect, estimate.low(error_rate.wrong_fail), estimate.high(error_rate.wrong_pass))
    )
    counts = f"{len(sides[0])} memory visits of the baseline and {len(sides[1])} of the candidate" + _spread(sides)
    decision: Decision = "PASS"
    reason, needed, p_fail, p_pass = f"reported, not judged; {counts}", "", None, None
    if margin is not None:
        limit = math.log1p(margin.value) if is_relative else margin.value
        p_fail, p_pass = estimate.p_fail(limit), estimate.p_pass(limit)
        decision = error_rate.decide(p_fail, p_pass)
        reason = f"{compared(decision, 'peak memory', effect, margin)}; {counts}"
        if decision == "INCONCLUSIVE":
            needed = _needed_visits(estimate.standard_error, abs(limit - estimate.effect), sides, error_rate)
    return Finding(
        metric="peak_memory",
        decision=decision,
        baseline_value=medians[0],
        candidate_value=medians[1],
        effect=effect,
        low=low,
        high=high,
        p_fail=p_fail,
        p_pass=p_pass,
        margin=margin,
        units=min(len(peaks) for peaks in sides),
        reason=reason,
        needed=needed,
    )


def judge_artifact_size(baseline: Run, candidate: Run, margin: Margin | None) -> Finding:
    """Compare the artifacts' sizes with the margin; a size has no error, so no interval and no p-value."""
    change = _judge_size_change(baseline, candidate, without_limit(margin))
    if margin is None or margin.limit is None:
        return change
    return with_limit(change, _judge_own_size(candidate, margin, margin.limit), margin)


def _judge_own_size(candidate: Run, margin: Margin, limit: float) -> LimitFinding:
    size = candidate.artifact.size_bytes
    if size <= 0:
        return refused(margin, f"an artifact of {size} bytes cannot be: the run is damaged", "measure it again")
    decision: Decision = "PASS" if size <= limit + 1e-6 else "FAIL"
    how = "keeps" if decision == "PASS" else "exceeds"
    return LimitFinding(
        decision=decision,
        limit=limit,
        value=float(size),
        units=1,
        reason=f"the candidate's size of {format_bytes(size)} {how} the limit of {format_bytes(limit)}",
    )


def _judge_size_change(baseline: Run, candidate: Run, margin: Margin | None) -> Finding:
    before, after = baseline.artifact.size_bytes, candidate.artifact.size_bytes
    is_relative = margin is None or margin.kind == "relative"
    effect = None
    decision: Decision = "PASS"
    reason, needed = "reported, not judged", ""
    if before <= 0 or after <= 0:
        reason = f"an artifact of {min(before, after)} bytes cannot be: the run is damaged"
        decision, needed = ("INCONCLUSIVE", "measure both artifacts again") if margin else ("PASS", "")
    else:
        effect = after / before - 1 if is_relative else float(after - before)
    if margin is not None and effect is not None:
        allowed = before * (1 + margin.value) if is_relative else before + margin.value
        decision = "PASS" if after <= allowed + 1e-6 else "FAIL"  # sizes are whole bytes; 1000 * 1.1 is not
        reason = f"{compared(decision, 'size', effect, margin)}; sizes are counted, so there is no doubt about them"
    return Finding(
        metric="artifact_size",
        decision=decision,
        baseline_value=float(before),
        candidate_value=float(after),
        effect=effect,
        margin=margin,
        units=1,
        reason=reason,
        needed=needed,
    )


def compared(decision: Decision, noun: str, effect: float, margin: Margin) -> str:
    """Say how a relative change, or one in bytes, compares with its margin."""
    sign = "-" if effect < 0 else "+"
    change = format_change(effect) if margin.kind == "relative" else f"{sign}{format_bytes(abs(effect))}"
    if decision == "INCONCLUSIVE":
        return f"{noun} changed by {change}, on neither side of the margin of {margin.text} beyond doubt"
    return f"{noun} changed by {change}, {'within' if decision == 'PASS' else 'beyond'} the margin of {margin.text}"


def _why_no_peaks(peaks: list[float]) -> tuple[str, str] | None:
    """Return (why the candidate's own peak is not judged, what would give a judgement), or None."""
    if len(peaks) < MIN_MEMORY_VISITS:
        return (
            f"{len(peaks)} memory visits of the candidate are too few to judge",
            f"at least {MIN_MEMORY_VISITS} memory visits of each artifact",
        )
    if any(peak <= 0 for peak in peaks):
        return "a memory visit says that its process took no memory at all", "measure both artifacts again"
    return None


def _why_no_peak(baseline: Run, candidate: Run) -> tuple[str, str] | None:
    """Return (why there is no judgement, what would give one), or None."""
    fewest = min(len(baseline.memory), len(candidate.memory))
    if fewest < MIN_MEMORY_VISITS:
        return (
            f"{fewest} memory visits of a side are too few to judge",
            f"at least {MIN_MEMORY_VISITS} memory visits of each artifact",
        )
    if any(visit.peak_rss_bytes <= 0 for run in (baseline, candidate) for visit in run.memory):
        return "a memory visit says that its process took no memory at all", "measure both artifacts again"
    if (baseline.device, baseline.facts.cpu_model) != (candidate.device, candidate.facts.cpu_model):
        return (
            f"the baseline was measured on {baseline.device} and the candidate on {candidate.device}",
            "measure both artifacts on one device",
        )
    is_one_sided = (baseline.boundary is None) != (candidate.boundary is None)
    if is_one_sided or differing_field(baseline, candidate) is not None:
        return (
            "threads, batch or copies differ between the two runs, so their memory cannot be compared",
            "measure both artifacts with the same threads, batch and copies",
        )
    return None


def _spread(sides: list[list[float]]) -> str:
    spreads = [max(peaks) / min(peaks) - 1 for peaks in sides]
    if max(spreads) <= _SPREAD_WORTH_SAYING:
        return ""
    return f", which differ among themselves by up to {max(spreads) * 100:.0f} %"


def _needed_visits(standard_error: float, distance: float, sides: list[list[float]], error_rate: ErrorRate) -> str:
    visits = min(len(peaks) for peaks in sides)
    rate = min(error_rate.wrong_fail, error_rate.wrong_pass)
    enough = units_to_decide(standard_error * math.sqrt(visits), distance, rate)
    if enough is None or enough > 1000:
        return (
            "the change seen lies too near the margin: no number of visits is likely to decide; choose another margin"
        )
    return f"about {max(enough, visits + 1)} memory visits of each artifact, at the spread seen"
