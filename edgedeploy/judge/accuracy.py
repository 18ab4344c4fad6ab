"""Outputs against reference outputs, paired per sample. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from edgedeploy.judge.estimate import POWER, Estimate, estimate_of_mean, units_to_decide
from edgedeploy.judge.family import ErrorRate
from edgedeploy.judge.limit import conclusion as limit_conclusion
from edgedeploy.judge.limit import judge_mean, refused, share_of_part, with_limit, without_limit
from edgedeploy.judge.proportions import exact_mcnemar, highest_drop, p_at_least, p_at_most, p_not_worse, share_bounds
from edgedeploy.records.run import Outputs
from edgedeploy.records.verdict import Decision, Finding, LimitFinding, Margin, Metric
from edgedeploy.units import format_change, format_points

# What is right or wrong sample by sample; larger is better.
RATES = ("top1", "top5")
_MORE_SAMPLES = "give an evaluation set with more samples"


def judge_accuracy(
    baseline: Outputs | None, candidate: Outputs | None, margin: Margin | None, *, error_rate: ErrorRate
) -> Finding:
    """Judge per-sample scores, the same samples through both artifacts.

    Right-or-wrong scores (top1, top5): an exact unconditional test of the paired drop against the margin, and the
    interval that inverts it (`proportions`); exact McNemar is reported beside it. Errors (mae): a paired t-test; a
    relative margin is tested as mean(candidate - (1 + margin) · baseline), its interval is Fieller's. A limit on the
    candidate itself: the exact binomial test, or a t-test, of its own scores.

    Args:
        baseline: answers of the artifact that the candidate is compared with.
        candidate: answers on the same data set.
        margin: the allowed worsening; None reports without judging.
        error_rate: of this metric.
    """
    share = share_of_part(margin, error_rate)
    change = _judge_change(baseline, candidate, without_limit(margin), share)
    if margin is None or margin.limit is None:
        return change
    return with_limit(change, _judge_own_value(candidate, margin, share), margin)


def _judge_change(
    baseline: Outputs | None, candidate: Outputs | None, margin: Margin | None, error_rate: ErrorRate
) -> Finding:
    refusal = _why_not_comparable(baseline, candidate, margin)
    if refusal is not None:
        return refused_accuracy("accuracy", baseline, candidate, margin, *refusal)
    assert baseline is not None and candidate is not None and baseline.scores and candidate.scores
    if candidate.metric in RATES:
        return _judge_right_or_wrong(baseline.scores, candidate.scores, margin, error_rate)
    return _judge_errors(baseline.scores, candidate.scores, margin, error_rate)


def _judge_own_value(candidate: Outputs | None, margin: Margin, error_rate: ErrorRate) -> LimitFinding:
    """Judge what the candidate alone must keep to."""
    assert margin.limit is not None, "only a limit is judged"
    value = candidate.value if candidate else None
    refusal = why_no_scores("candidate", candidate)
    if refusal is None and candidate is not None and (candidate.metric in RATES) != margin.is_floor:
        example = '">= 92%"' if candidate.metric in RATES else '"<= 0.05"'
        refusal = f"the limit {margin.text} does not fit the metric {candidate.metric}", f"write it as {example}"
    if refusal is not None:
        return refused(margin, *refusal, value=value)
    assert candidate is not None and candidate.scores
    if not margin.is_floor:
        if len(candidate.scores) < 2:
            return refused(margin, "one sample says nothing about accuracy", _MORE_SAMPLES, value=value, units=1)
        return judge_mean(
            candidate.scores,
            margin.limit,
            error_rate,
            shown=float,
            noun=candidate.metric,
            told="{:.4g}".format,
            counted=f"{len(candidate.scores):,} samples",
            needed=lambda estimate: _needed_of_mean(estimate, margin.limit or 0.0, error_rate),
        )
    return _judge_share(candidate.metric, candidate.scores, margin.limit, error_rate)


def _judge_share(metric: str, scores: Sequence[float], limit: float, error_rate: ErrorRate) -> LimitFinding:
    """Judge the share of right answers against the least that it must be, by the exact binomial test."""
    samples, right = len(scores), round(sum(scores))
    p_fail, p_pass = p_at_least(right, samples, limit), p_at_most(right, samples, limit)
    decision = error_rate.decide(p_fail, p_pass)
    # Of a share the upper bound speaks for FAIL.
    low, high = share_bounds(right, samples, error_rate.wrong_pass, error_rate.wrong_fail)
    said = limit_conclusion(
        decision, f"{metric} of {right / samples * 100:.4g} %", f"{limit * 100:.4g} %", is_floor=True
    )
    needed = ""
    if decision == "INCONCLUSIVE":
        share = min(max(right / samples, 0.5 / samples), 1 - 0.5 / samples)
        needed = needed_samples(math.sqrt(share * (1 - share)), right / samples - limit, samples, error_rate)
    return LimitFinding(
        decision=decision,
        limit=limit,
        is_floor=True,
        value=right / samples,
        low=low,
        high=high,
        p_fail=p_fail,
        p_pass=p_pass,
        units=samples,
        reason=f"{said}; {right:,} of {samples:,} samples are right",
        needed=needed,
    )


def _needed_of_mean(estimate: Estimate, limit: float, error_rate: ErrorRate) -> str:
    samples = round(estimate.degrees) + 1
    spread = estimate.standard_error * math.sqrt(samples)
    return needed_samples(spread, limit - estimate.effect, samples, error_rate)


def smallest_detectable_drop(discordant: int, samples: int, error_rate: float) -> float:
    """Return the drop that these samples show with 80 % power at this one-sided error rate.

    Without any discordant answer the rule of three stands in: up to 3 of them are credible.

    >>> round(smallest_detectable_drop(25, 500, 0.05), 4)
    0.0249
    """
    normal = statistics.NormalDist()
    return (normal.inv_cdf(1 - error_rate) + normal.inv_cdf(POWER)) * math.sqrt(max(discordant, 3)) / samples


def _why_not_comparable(
    baseline: Outputs | None, candidate: Outputs | None, margin: Margin | None
) -> tuple[str, str] | None:
    """Return (why there is no judgement, what would give one), or None."""
    refusal = why_no_scores("baseline", baseline) or why_no_scores("candidate", candidate)
    refusal = refusal or why_not_paired(baseline, candidate)
    if refusal is not None:
        return refusal
    assert baseline is not None and baseline.scores
    return _why_margin_does_not_fit(baseline.metric, statistics.fmean(baseline.scores), margin)


def why_no_scores(side: str, outputs: Outputs | None) -> tuple[str, str] | None:
    """Return why one side has no scores to judge and what would give some, or None."""
    if outputs is None:
        return f"the {side} was not run on an evaluation set", "measure both artifacts with an evaluation set"
    if not outputs.scores:
        return (
            f"the {side}'s outputs on {outputs.dataset} have no scores, because the data set has no labels",
            "give an evaluation set with labels",
        )
    broken = next((place for place, score in enumerate(outputs.scores) if not math.isfinite(score)), None)
    if broken is not None:
        return (
            f"the {side}'s score of sample {broken} is {outputs.scores[broken]}, which is not a number to judge",
            "look at the artifact's outputs for that sample, then measure again",
        )
    if outputs.metric in RATES and any(score not in (0.0, 1.0) for score in outputs.scores):
        return (
            f"the {side}'s {outputs.metric} scores are not all 0 or 1",
            "measure again: the run was not written by this edgedeploy or is damaged",
        )
    return None


def why_not_paired(baseline: Outputs | None, candidate: Outputs | None) -> tuple[str, str] | None:
    """Return why the scores of two sides do not belong to the same samples and what to do, or None."""
    assert baseline is not None and candidate is not None and baseline.scores and candidate.scores
    if baseline.dataset_sha256 != candidate.dataset_sha256 or len(baseline.scores) != len(candidate.scores):
        return (
            f"the baseline answered {len(baseline.scores):,} samples of {baseline.dataset} and the candidate "
            f"{len(candidate.scores):,} of {candidate.dataset}: not the same samples, so they cannot be paired",
            "measure both artifacts on one evaluation set",
        )
    if baseline.metric != candidate.metric:
        return (
            f"the baseline was scored by {baseline.metric} and the candidate by {candidate.metric}",
            "measure both artifacts with one metric",
        )
    if len(baseline.scores) < 2:
        return "one sample says nothing about accuracy", _MORE_SAMPLES
    return None


def _why_margin_does_not_fit(metric: str, baseline_value: float, margin: Margin | None) -> tuple[str, str] | None:
    if margin is None:
        return None
    if (metric in RATES) != (margin.kind == "points"):
        example = '"-0.5pt"' if metric in RATES else '"+5%" or "+0.01"'
        return f"the margin {margin.text} does not fit the metric {metric}", f"write the margin as {example}"
    if margin.kind == "relative" and baseline_value <= 0:
        return "the baseline's error is zero, so no relative change exists", 'give an absolute margin such as "+0.01"'
    return None


def refused_accuracy(
    metric: Metric,
    baseline: Outputs | None,
    candidate: Outputs | None,
    margin: Margin | None,
    reason: str,
    needed: str,
) -> Finding:
    """Return the finding on an accuracy that cannot be judged; nothing was shown, so with a margin it is no PASS."""
    values = [outputs.value if outputs and outputs.value is not None and math.isfinite(outputs.value) else None
              for outputs in (baseline, candidate)]  # fmt: skip
    return Finding(
        metric=metric,
        decision="INCONCLUSIVE" if margin else "PASS",
        baseline_value=values[0],
        candidate_value=values[1],
        effect=None,
        margin=margin,
        reason=reason if margin else f"reported, not judged; {reason}",
        needed=needed if margin else "",
    )


def _judge_right_or_wrong(
    baseline: Sequence[float], candidate: Sequence[float], margin: Margin | None, error_rate: ErrorRate
) -> Finding:
    samples = len(baseline)
    lost = sum(before > after for before, after in zip(baseline, candidate, strict=True))
    gained = sum(before < after for before, after in zip(baseline, candidate, strict=True))
    drop = (lost - gained) / samples
    detectable = smallest_detectable_drop(lost + gained, samples, error_rate.wrong_fail)
    mcnemar = exact_mcnemar(lost, gained)
    counts = (
        f"{samples:,} samples: {lost:,} answered rightly by the baseline only, {gained:,} by the candidate only "
        f"(exact McNemar p = {mcnemar:.2g}); the smallest drop that these samples show in 80 % of cases is "
        f"{detectable * 100:.2g} pt"
    )
    low = -highest_drop(gained, lost, samples, error_rate.wrong_fail)
    high = highest_drop(lost, gained, samples, error_rate.wrong_pass)
    values = (statistics.fmean(baseline), statistics.fmean(candidate))
    if margin is None:
        return _finding("PASS", values, drop, (low, high), samples=samples, reason=f"reported, not judged; {counts}")
    p_fail = p_not_worse(gained, lost, samples, -margin.value)
    p_pass = p_not_worse(lost, gained, samples, margin.value)
    if 0 <= margin.value < detectable:
        counts += f", so the margin of {margin.text} is finer than they can show reliably"
    decision = error_rate.decide(p_fail, p_pass)
    reason = f"{_conclusion(decision, format_points(-drop), margin)}; {counts}"
    spread = math.sqrt(max(lost + gained, 3) / samples - drop * drop)
    needed = "" if decision != "INCONCLUSIVE" else needed_samples(spread, margin.value - drop, samples, error_rate)
    return _finding(
        decision,
        values,
        drop,
        (low, high),
        samples=samples,
        reason=reason,
        margin=margin,
        p_values=(p_fail, p_pass),
        needed=needed,
    )


def _judge_errors(
    baseline: Sequence[float], candidate: Sequence[float], margin: Margin | None, error_rate: ErrorRate
) -> Finding:
    samples = len(baseline)
    values = (statistics.fmean(baseline), statistics.fmean(candidate))
    if margin is not None and margin.kind == "absolute":
        estimate = estimate_of_mean([after - before for before, after in zip(baseline, candidate, strict=True)])
        tested, effect = margin.value, estimate.effect
        bounds: tuple[float | None, float | None] = (
            estimate.low(error_rate.wrong_fail), estimate.high(error_rate.wrong_pass),
        )  # fmt: skip
        seen = f"{effect:+.4g}"
    elif values[0] <= 0:
        reason = "reported, not judged; the baseline's error is zero, so no relative change exists"
        return _finding("PASS", values, None, (None, None), samples=samples, reason=reason)
    else:
        effect, tested = values[1] / values[0] - 1, 0.0
        estimate = _estimate_at_ratio(baseline, candidate, 1 + (margin.value if margin else 0.0))
        bounds = _relative_bounds(baseline, candidate, error_rate)
        seen = format_change(effect)
    if margin is None:
        reason = f"reported, not judged; {samples:,} samples"
        return _finding("PASS", values, effect, bounds, samples=samples, reason=reason)
    p_fail, p_pass = estimate.p_fail(tested), estimate.p_pass(tested)
    decision = error_rate.decide(p_fail, p_pass)
    z = statistics.NormalDist().inv_cdf(1 - error_rate.wrong_fail) + statistics.NormalDist().inv_cdf(POWER)
    detectable = z * estimate.standard_error / (values[0] if margin.kind == "relative" else 1.0)
    smallest = f"{detectable * 100:.2g} %" if margin.kind == "relative" else f"{detectable:.2g}"
    reason = (
        f"{_conclusion(decision, seen, margin)}; {samples:,} samples: the smallest rise of the error that they show in "
        f"80 % of cases is {smallest}"
    )
    if 0 <= margin.value < detectable:
        reason += f", so the margin of {margin.text} is finer than they can show reliably"
    spread = estimate.standard_error * math.sqrt(samples)
    distance = tested - estimate.effect
    needed = "" if decision != "INCONCLUSIVE" else needed_samples(spread, distance, samples, error_rate)
    return _finding(
        decision,
        values,
        effect,
        bounds,
        samples=samples,
        reason=reason,
        margin=margin,
        p_values=(p_fail, p_pass),
        needed=needed,
    )


def _estimate_at_ratio(baseline: Sequence[float], candidate: Sequence[float], ratio: float) -> Estimate:
    """Return the mean of candidate - ratio · baseline: above zero where the error grew by more than that ratio."""
    return estimate_of_mean([after - ratio * before for before, after in zip(baseline, candidate, strict=True)])


def _relative_bounds(
    baseline: Sequence[float], candidate: Sequence[float], error_rate: ErrorRate
) -> tuple[float | None, float | None]:
    """Return the ratios at which the paired t-test turns, less one; None where the test never does.

    Source: Fieller 1954, Journal of the Royal Statistical Society B 16:175.
    """
    from scipy.special import stdtrit

    samples = len(baseline)
    before, after = statistics.fmean(baseline), statistics.fmean(candidate)
    bounds: list[float | None] = []
    for sign, rate in ((-1, error_rate.wrong_fail), (1, error_rate.wrong_pass)):
        factor = float(stdtrit(samples - 1, rate)) ** 2 / samples
        a = before**2 - factor * statistics.variance(baseline)
        b = before * after - factor * statistics.covariance(baseline, candidate)
        c = after**2 - factor * statistics.variance(candidate)
        root = b * b - a * c
        bounds.append((b + sign * math.sqrt(max(root, 0.0))) / a - 1 if a > 0 else None)
    return bounds[0], bounds[1]


def _conclusion(decision: Decision, change: str, margin: Margin) -> str:
    if decision == "PASS":
        return f"a change of {change} is shown to stay within the margin of {margin.text}"
    if decision == "FAIL":
        return f"a change of {change} is shown to be worse than the margin of {margin.text} allows"
    return f"a change of {change} is on neither side of the margin of {margin.text} beyond doubt"


def needed_samples(spread: float, distance: float, samples: int, error_rate: ErrorRate) -> str:
    """Say how many samples would decide, if the change seen is the true one.

    Args:
        spread: standard deviation of one sample.
        distance: from what was seen to the margin: positive where PASS is the nearer decision.
        samples: that there are; error_rate: of the metric.
    """
    rate = error_rate.wrong_pass if distance > 0 else error_rate.wrong_fail
    enough = units_to_decide(spread, abs(distance), rate)
    if enough is None or enough > 10**8:
        return (
            "the change seen lies too near the margin: no number of samples is likely to decide; choose another margin"
        )
    # An exact test needs a few more than the formula, never fewer than there are.
    return f"about {max(enough, samples + 1):,} evaluation samples in all, if the change seen is the true one"


def _finding(
    decision: Decision,
    values: tuple[float, float],
    effect: float | None,
    bounds: tuple[float | None, float | None],
    *,
    samples: int,
    reason: str,
    margin: Margin | None = None,
    p_values: tuple[float | None, float | None] = (None, None),
    needed: str = "",
) -> Finding:
    return Finding(
        metric="accuracy",
        decision=decision,
        baseline_value=values[0],
        candidate_value=values[1],
        effect=effect,
        low=bounds[0],
        high=bounds[1],
        p_fail=p_values[0],
        p_pass=p_values[1],
        margin=margin,
        units=samples,
        reason=reason,
        needed=needed,
    )
