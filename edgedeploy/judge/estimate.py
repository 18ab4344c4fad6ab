"""A mean effect whose error follows Student's t: evidence on either side of a margin, and bounds. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# The chance of seeing what is there, in every "smallest detectable" and "how many more": the convention of Cohen 1988.
POWER = 0.8


@dataclass(frozen=True, slots=True)
class Estimate:
    """An effect (positive is worse) with its standard error and degrees of freedom."""

    effect: float
    standard_error: float
    degrees: float

    def p_fail(self, margin: float) -> float:
        """Return the one-sided p-value against "the effect is not above the margin"."""
        return _upper_tail(self.effect - margin, self.standard_error, self.degrees)

    def p_pass(self, margin: float) -> float:
        """Return the one-sided p-value against "the effect is not below the margin"."""
        return _upper_tail(margin - self.effect, self.standard_error, self.degrees)

    def low(self, error_rate: float) -> float:
        """Return the lower bound that is wrong with this probability."""
        return self.effect - _quantile(error_rate, self.degrees) * self.standard_error

    def high(self, error_rate: float) -> float:
        """Return the upper bound that is wrong with this probability."""
        return self.effect + _quantile(error_rate, self.degrees) * self.standard_error


def estimate_of_mean(effects: Sequence[float]) -> Estimate:
    """Return the mean of at least two independent effects.

    >>> estimate_of_mean([1.0, 2.0, 3.0]).effect
    2.0
    """
    spread = statistics.stdev(effects)
    return Estimate(statistics.fmean(effects), spread / math.sqrt(len(effects)), len(effects) - 1)


def estimate_of_difference(baseline: Sequence[float], candidate: Sequence[float]) -> Estimate:
    """Return candidate minus baseline for two independent samples of at least two values each.

    Source: Welch 1947, Biometrika 34:28; agrees with scipy.stats.ttest_ind(equal_var=False), whose package takes a
    second to import.
    """
    shares = [statistics.variance(side) / len(side) for side in (baseline, candidate)]
    effect = statistics.fmean(candidate) - statistics.fmean(baseline)
    if sum(shares) == 0:
        return Estimate(effect, 0.0, len(baseline) + len(candidate) - 2)
    weights = sum(
        (share / sum(shares)) ** 2 / (len(side) - 1) for share, side in zip(shares, (baseline, candidate), strict=True)
    )
    return Estimate(effect, math.sqrt(sum(shares)), 1 / weights)


def units_to_decide(spread: float, distance: float, error_rate: float) -> int | None:
    """Return how many independent units a one-sided t-test needs to tell an effect from a margin at `distance`.

    Args:
        spread: standard deviation of one unit.
        distance: |effect - margin|, in the same unit.
        error_rate: one-sided.

    Returns:
        The number at 80 % power; None when the effect seen lies on the margin, where no number is enough.

    Source: Guenther 1981, The American Statistician 35:243 (the normal size plus z²/2).
    """
    if distance == 0:
        return None
    normal = statistics.NormalDist()
    z = normal.inv_cdf(1 - error_rate)
    return math.ceil(((z + normal.inv_cdf(POWER)) * spread / distance) ** 2 + z * z / 2)


def _upper_tail(distance: float, standard_error: float, degrees: float) -> float:
    if standard_error == 0:  # every unit said the same
        return 0.0 if distance > 0 else 1.0
    from scipy.special import stdtr

    return float(stdtr(degrees, -distance / standard_error))


def _quantile(error_rate: float, degrees: float) -> float:
    from scipy.special import stdtrit

    return float(-stdtrit(degrees, error_rate))
