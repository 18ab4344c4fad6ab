"""How noisy a device is, from two sides that are the same artifact; and what it can therefore show in a time. Pure."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from edgedeploy.errors import UsageError
from edgedeploy.judge.estimate import POWER, estimate_of_mean
from edgedeploy.judge.percentiles import samples_of
from edgedeploy.judge.speed import blocks_of
from edgedeploy.judge.spending import nominal_levels
from edgedeploy.records.run import Run, Visit

# More pairs than this are reckoned with nowhere: what needs more is too noisy for a gate, and the levels of so many
# looks take seconds to compute when it is judged.
MOST_BLOCKS = 64
# Up to so many looks the last one's level is computed; beyond, it falls with this power of their number. Compared with
# levels computed for 32 and 64 looks (error rates 0.3 to 5 %), the smallest effect is within 1 %.
_COMPUTED_LOOKS = 16
_LEVEL_EXPONENT = 0.09
# What intervals of a passport may err, together on both sides.
_INTERVAL = 0.05
# A slope or an autocorrelation of fewer values says nothing.
_LEAST_FOR_SERIES = 8
_HOUR_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """A slope over time, as a fraction an hour, with its 95 % interval."""

    per_hour: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """What two runs of one artifact, measured interleaved in one session, say about their device.

    Attributes:
        run_to_run_cv: standard deviation / mean of the visits' medians.
        block_spread: standard deviation of the blocks' log ratios.
        effect, low, high: their mean as a fraction, and its 95 % interval.
        seconds_per_block: median over blocks; setup_s: from the first step to the first block is not known here.
        lag1_autocorrelation: of the blocks' levels; block_autocorrelation: of their log ratios; None: too few.
    """

    level_s: float
    run_to_run_cv: float
    block_spread: float
    effect: float
    low: float
    high: float
    blocks: int
    dropped: int
    drift: Drift | None
    lag1_autocorrelation: float | None
    block_autocorrelation: float | None


def noise_of(first: Run, second: Run) -> Noise:
    """Return how noisy a device is.

    Args:
        first, second: the same artifact, measured interleaved in one session.

    Raises:
        UsageError: fewer than two blocks count.
    """
    blocks = blocks_of("latency_p50", first.visits, second.visits, is_relative=True)
    effects = [block.effect for block in blocks.usable]
    if len(effects) < 2:
        raise UsageError(
            f"{first.device}: {len(effects)} of {len(blocks.outcomes)} A/B blocks count, and two are the least that "
            f"say anything about noise; give it more minutes, or a device that is not throttled or disturbed"
        )
    visits = [visit for visit in (*first.visits, *second.visits) if _counts(visit)]
    levels_s = [statistics.median(samples_of(visit)) for visit in visits]
    estimate = estimate_of_mean(effects)
    times_s, levels = _series(visits)
    return Noise(
        level_s=statistics.median(levels_s),
        run_to_run_cv=statistics.stdev(levels_s) / statistics.fmean(levels_s),
        block_spread=statistics.stdev(effects),
        effect=math.expm1(estimate.effect),
        low=math.expm1(estimate.low(_INTERVAL / 2)),
        high=math.expm1(estimate.high(_INTERVAL / 2)),
        blocks=len(effects),
        dropped=blocks.dropped,
        drift=drift_of(times_s, levels),
        lag1_autocorrelation=autocorrelation(levels),
        block_autocorrelation=autocorrelation(effects),
    )


def autocorrelation(values: Sequence[float]) -> float | None:
    """Return the lag-1 autocorrelation of a series; None for fewer than 8 values, or where all are equal.

    >>> autocorrelation([1.0, -1.0] * 8)
    -0.9375
    """
    if len(values) < _LEAST_FOR_SERIES:
        return None
    mean = statistics.fmean(values)
    centred = [value - mean for value in values]
    total = math.fsum(value * value for value in centred)
    if total == 0:
        return None
    return math.fsum(before * after for before, after in itertools.pairwise(centred)) / total


def drift_of(times_s: Sequence[float], levels: Sequence[float]) -> Drift | None:
    """Return the slope of log levels over time.

    Successive levels are alike where the device drifts slowly, so that they count for fewer: n (1 - r) / (1 + r) of
    them, with r the lag-1 autocorrelation of the residuals.

    Args:
        times_s: when each was measured; levels: natural logarithms of latencies.

    Returns:
        None for fewer than 8, or where fewer than three count.

    Source: Santer et al. 2000, Journal of Geophysical Research 105:7337, equations 6 and 7.
    """
    if len(levels) < _LEAST_FOR_SERIES:
        return None
    from scipy.special import stdtrit

    middle_s, mean = statistics.fmean(times_s), statistics.fmean(levels)
    spans_s = [time_s - middle_s for time_s in times_s]
    width = math.fsum(span_s * span_s for span_s in spans_s)
    if width == 0:
        return None
    slope = math.fsum(span_s * (level - mean) for span_s, level in zip(spans_s, levels, strict=True)) / width
    residuals = [level - mean - slope * span_s for span_s, level in zip(spans_s, levels, strict=True)]
    alike = max(0.0, autocorrelation(residuals) or 0.0)
    counted = len(levels) * (1 - alike) / (1 + alike)
    if counted < 3:
        return None
    error = math.sqrt(math.fsum(one * one for one in residuals) / (counted - 2) / width)
    reach = float(stdtrit(counted - 2, 1 - _INTERVAL / 2)) * error
    per_hour, low, high = (math.expm1(_bounded(rate * _HOUR_S)) for rate in (slope, slope - reach, slope + reach))
    return Drift(per_hour=per_hour, low=low, high=high)


def smallest_effect(spread: float, blocks: int, *, min_blocks: int, error_rate: float) -> float | None:
    """Return the distance from a margin that so many blocks decide with 80 % chance.

    It is what the t-test of the last look alone sees, at that look's level, by the noncentral t distribution (Cohen
    1988, §2.3); the looks before it can only add to the chance. `units_to_decide` is its normal approximation.

    Args:
        spread: standard deviation of a block's effect.
        blocks: at the last look; more than 64 count as 64.
        min_blocks: at the first look.
        error_rate: one-sided, over all looks.

    Returns:
        The distance in the unit of `spread`; None for fewer blocks than the first look has.
    """
    if blocks < min_blocks:
        return None
    return spread * _unit_effect(min(blocks, _most(min_blocks)), min_blocks, error_rate)


def blocks_to_decide(spread: float, distance: float, *, min_blocks: int, error_rate: float) -> int | None:
    """Return the fewest blocks that decide, with 80 % chance, what lies at a distance from a margin.

    Args:
        spread: standard deviation of a block's effect.
        distance: |effect - margin|, in the same unit.
        min_blocks: at the first look.
        error_rate: one-sided, over all looks.

    Returns:
        None where not even 64 do.
    """
    if distance <= 0 or spread * _unit_effect(_most(min_blocks), min_blocks, error_rate) > distance:
        return None
    low, high = min_blocks, _most(min_blocks)
    while low < high:
        middle = (low + high) // 2
        if spread * _unit_effect(middle, min_blocks, error_rate) <= distance:
            high = middle
        else:
            low = middle + 1
    return low


@functools.lru_cache(maxsize=4096)
def _unit_effect(blocks: int, min_blocks: int, error_rate: float) -> float:
    """Return the smallest effect for blocks whose standard deviation is 1."""
    from scipy.optimize import brentq
    from scipy.special import nctdtr, stdtrit

    level = _last_level(blocks, min_blocks, error_rate)
    degrees = blocks - 1
    critical = -float(stdtrit(degrees, level))

    def missed(shift: float) -> float:
        return float(nctdtr(degrees, shift, critical)) - (1 - POWER)

    # With few degrees the critical value is far out; the shift that reaches it is at most a few times as far.
    return float(brentq(missed, 0.0, 4 * critical + 10, xtol=1e-6)) / math.sqrt(blocks)


def _last_level(blocks: int, min_blocks: int, error_rate: float) -> float:
    """Return about the nominal level of the last of these looks: it costs an integration for each of them."""
    computed = max(min_blocks, min(blocks, _COMPUTED_LOOKS))
    level = nominal_levels(min_blocks, computed, error_rate)[-1]
    return level * math.pow(computed / blocks, _LEVEL_EXPONENT)


def _most(min_blocks: int) -> int:
    """Return the most blocks that are reckoned with; a policy may ask for more before its first look."""
    return max(MOST_BLOCKS, min_blocks)


def _series(visits: Sequence[Visit]) -> tuple[list[float], list[float]]:
    """Return when each block was measured, and the mean log level of its visits, in the order of time."""
    blocks: dict[int, list[Visit]] = {}
    for visit in visits:
        blocks.setdefault(visit.block, []).append(visit)
    points = sorted(
        (
            statistics.fmean(visit.before.monotonic_s for visit in block),
            statistics.fmean(math.log(statistics.median(samples_of(visit))) for visit in block),
        )
        for block in blocks.values()
    )
    return [time_s for time_s, _ in points], [level for _, level in points]


def _counts(visit: Visit) -> bool:
    samples_s = samples_of(visit)
    return not visit.dropped and bool(samples_s) and min(samples_s) > 0


def _bounded(exponent: float) -> float:
    """Keep a slope of a few seconds, told per hour, within what a float can hold."""
    return max(-700.0, min(700.0, exponent))
