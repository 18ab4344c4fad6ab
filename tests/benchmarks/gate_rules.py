"""The rules by which other tools call a change, on the raw visits that our gate judges; each with its source.

Every rule takes the visits of a baseline and of a candidate and says whether it raises an alarm. None of them is what
its tool does with our schedule: they are given the same numbers that our own rule is given.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from edgedeploy.records.run import Visit

Visits = Sequence[Visit]
Rule = Callable[[Visits, Visits], bool]


def samples(visits: Visits) -> list[float]:
    """Return every timed inference, visit by visit."""
    return [sample_s for visit in visits for burst in visit.bursts for sample_s in burst.samples_s]


def medians(visits: Visits) -> list[float]:
    """Return the median of each visit."""
    return [statistics.median(sample_s for burst in visit.bursts for sample_s in burst.samples_s) for visit in visits]


def ratio_at_least_1_10(baseline: Visits, candidate: Visits) -> bool:
    """Call it slower from 1.1 times on: one number a side.

    Source: qai_hub_models v0.46.1, scorecard/results/performance_diff.py (the smallest bucket is 1.1); the number of a
    side is the estimated inference time of one profile job, here the median of its first visit.
    """
    return medians(candidate[:1])[0] / medians(baseline[:1])[0] >= 1.1


def median_ratio_above_1_05(baseline: Visits, candidate: Visits) -> bool:
    """Call it slower above 1.05 times: medians over all samples of each side.

    Source: TensorRT-Model-Connect e9132e79f, tools/perf_matrix.py (5 % between medians).
    """
    return statistics.median(samples(candidate)) / statistics.median(samples(baseline)) > 1.05


def welch_on_iterations(baseline: Visits, candidate: Visits) -> bool:
    """Call it slower by Welch's t-test on single inferences, one-sided 2.5 %."""
    from scipy.stats import ttest_ind

    found = ttest_ind(samples(candidate), samples(baseline), equal_var=False, alternative="greater")
    return bool(found.pvalue < 0.025)


def mann_whitney_on_iterations(baseline: Visits, candidate: Visits) -> bool:
    """Call it slower by the Mann-Whitney U test on single inferences, p < 0.002 two-sided and a larger median.

    Source: asv 7032df70, asv/_stats.py is_different (p_threshold 0.002), which feeds it values of separate processes.
    """
    from scipy.stats import mannwhitneyu

    old, new = samples(baseline), samples(candidate)
    is_larger = statistics.median(new) > statistics.median(old)
    return is_larger and bool(mannwhitneyu(new, old, alternative="two-sided").pvalue < 0.002)


# Quantiles of Student's t, two-sided 95 %, by degrees of freedom; from 31 on the next smaller row.
# Source: pyperf ab7fd04, pyperf/_utils.py T_DIST_95_CONF_LEVELS.
_PYPERF_T = (
    0, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_PYPERF_T_BEYOND = ((100, 1.984), (80, 1.990), (60, 2.000), (40, 2.021), (0, 2.042))


def pyperf_on_values(baseline: Visits, candidate: Visits) -> bool:
    """Call it slower by pyperf's test: three values a process, all processes pooled, pooled variance.

    Source: pyperf ab7fd04, pyperf/_utils.py is_significant and pyperf/_compare.py. A value of pyperf is the mean of a
    loop of inferences; here each visit's samples are cut into three.
    """
    old, new = _values(baseline), _values(candidate)
    degrees = len(old) + len(new) - 2
    pooled = (statistics.variance(old) * (len(old) - 1) + statistics.variance(new) * (len(new) - 1)) / degrees
    score = (statistics.fmean(new) - statistics.fmean(old)) / math.sqrt(pooled * (1 / len(old) + 1 / len(new)))
    limit = (
        _PYPERF_T[degrees] if degrees < len(_PYPERF_T) else next(t for least, t in _PYPERF_T_BEYOND if degrees >= least)
    )
    return score >= limit


def _values(visits: Visits) -> list[float]:
    """Return three means of each visit."""
    values = []
    for visit in visits:
        taken = samples([visit])
        third = len(taken) // 3
        values += [statistics.fmean(taken[part * third : (part + 1) * third]) for part in range(3)]
    return values


# Name → rule, and whether its baseline is one that was stored earlier: what a tool would do whose baseline is last
# week's file. Those are judged against the baseline visits of the gate before.
RULES: dict[str, tuple[Rule, bool]] = {
    "ratio >= 1.1 (qai_hub_models), stored baseline": (ratio_at_least_1_10, True),
    "median ratio > 1.05 (TensorRT-Model-Connect), stored baseline": (median_ratio_above_1_05, True),
    "median ratio > 1.05, measured beside it": (median_ratio_above_1_05, False),
    "Welch on iterations, measured beside it": (welch_on_iterations, False),
    "Mann-Whitney p < 0.002 on iterations (asv's), measured beside it": (mann_whitney_on_iterations, False),
    "pyperf's t-test, stored baseline": (pyperf_on_values, True),
    "pyperf's t-test, measured beside it": (pyperf_on_values, False),
}


def alarms(baseline: Visits, stored: Visits, candidate: Visits) -> dict[str, bool] | None:
    """Return what each rule says; None where a disturbed machine left nothing to say it of.

    Args:
        baseline: visits that were measured interleaved with the candidate's.
        stored: the baseline's visits of an earlier session.
        candidate: in question.
    """
    counted = [(old, new) for old, new in zip(baseline, candidate, strict=True) if not (old.dropped or new.dropped)]
    kept = [visit for visit in stored if not visit.dropped]
    if not counted or not kept:
        return None
    old, new = [pair[0] for pair in counted], [pair[1] for pair in counted]
    return {name: rule(kept if is_stored else old, new) for name, (rule, is_stored) in RULES.items()}
