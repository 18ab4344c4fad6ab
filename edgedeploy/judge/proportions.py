"""The difference of two paired proportions: an exact test against any margin, and the interval that it gives. Pure.

Of `samples` questions, `lost` were answered rightly by the baseline only and `gained` by the candidate only; the drop
is P(lost) - P(gained). Tables are ordered by Tango's score statistic (1998, Statistics in Medicine 17:891), whose own
normal p-values are too small where few answers differ (545 samples without any difference "show" a drop below 0.5
points at 5 %; the exact p-value is 6.5 %). So the p-value is the largest exact probability over the nuisance parameter
P(gained) (Hsueh, Liu & Chen 2001, Biometrics 57:478), searched in its Clopper-Pearson interval (Berger & Boos 1994,
JASA 89:1012).
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

# The chance that the nuisance parameter lies outside its interval; added to every p-value (Berger & Boos).
_OUTSIDE = 1e-4
# Points in that interval, about a fifth of a standard error of P(gained) apart.
_GRID = 41
_NEGLIGIBLE = 1e-12


@functools.lru_cache(maxsize=65536)
def p_not_worse(lost: int, gained: int, samples: int, drop: float, outside: float = _OUTSIDE) -> float:
    """Return the p-value against "the true drop is at least `drop`"; small when it is shown to be smaller.

    The test for the other direction is the same with the sides exchanged: `p_not_worse(gained, lost, samples, -drop)`
    is the p-value against "the true drop is at most `drop`".

    Args:
        lost, gained, samples: what was counted.
        drop: a difference of fractions.
        outside: added to the p-value; where many such tests share an error rate, less than the share of one.
    """
    import numpy as np
    from scipy.special import bdtr, betaincinv

    lowest = float(betaincinv(gained, samples - gained + 1, outside / 2)) if gained else 0.0
    highest = float(betaincinv(gained + 1, samples - gained, 1 - outside / 2)) if gained < samples else 1.0
    highest = min(highest, (1 - drop) / 2)  # P(gained) and P(lost) are at most 1 together
    if lowest > highest:
        return outside
    p_gained = np.linspace(lowest, highest, _GRID)[:, None]
    # P(lost) at the edge of the hypothesis; a larger one makes a small statistic rarer.
    p_lost = np.maximum(p_gained + drop, 0.0)
    # Counts of gains outside these have a chance below 1e-13 by Bernstein's inequality.
    fewest = samples * lowest - 8 * math.sqrt(samples * lowest)
    most = samples * highest + 8 * math.sqrt(samples * highest) + 40
    gains = np.arange(max(math.floor(fewest), 0), min(math.ceil(most), samples) + 1, dtype=float)
    losses = _most_losses(gains, samples, drop, float(_score(np.array(lost), np.array(gained), samples, drop)))
    left = (samples - gains).astype(np.int64)  # scipy's bdtr takes nothing else
    p_lost_given = np.minimum(p_lost / np.maximum(1 - p_gained, _NEGLIGIBLE), 1.0)
    tail = np.where(losses >= 0, bdtr(np.maximum(losses, 0), left, p_lost_given), 0.0)
    chance = (_chance_of(gains, samples, p_gained) * tail).sum(axis=1).max()
    return min(1.0, float(chance) + outside)


@functools.lru_cache(maxsize=1024)
def highest_drop(lost: int, gained: int, samples: int, error_rate: float) -> float:
    """Return the upper bound of the drop that is wrong with this probability.

    The lower bound is `-highest_drop(gained, lost, samples, error_rate)`.
    """
    from scipy.optimize import brentq

    def excess(drop: float) -> float:
        return p_not_worse(lost, gained, samples, drop) - error_rate

    seen = (lost - gained) / samples
    step = 4 * math.sqrt(lost + gained + 4) / samples
    while excess(min(seen + step, 1.0)) > 0:
        if seen + step >= 1:  # hardly any samples: they refute nothing
            return 1.0
        step *= 2
    return float(brentq(excess, seen, min(seen + step, 1.0), xtol=1e-6))


def exact_mcnemar(lost: int, gained: int) -> float:
    """Return the two-sided p-value against "the sides differ by chance only".

    Source: McNemar 1947, Psychometrika 12:153, exact form; agrees with scipy.stats.binomtest, whose package takes a
    second to import.
    """
    from scipy.special import bdtr

    return min(1.0, 2 * float(bdtr(min(lost, gained), lost + gained, 0.5))) if lost + gained else 1.0


def p_at_least(right: int, samples: int, share: float) -> float:
    """Return the p-value against "the true share is at least `share`"; small when it is shown to be lower.

    Exact binomial; agrees with scipy.stats.binomtest, whose package takes a second to import.
    """
    from scipy.special import bdtr

    return float(bdtr(right, samples, share))


def p_at_most(right: int, samples: int, share: float) -> float:
    """Return the p-value against "the true share is at most `share`"; small when it is shown to be higher."""
    from scipy.special import bdtrc

    return float(bdtrc(right - 1, samples, share)) if right else 1.0


def share_bounds(right: int, samples: int, low_rate: float, high_rate: float) -> tuple[float, float]:
    """Return the bounds of a share that are wrong with these probabilities.

    Source: Clopper & Pearson 1934, Biometrika 26:404.
    """
    from scipy.special import betaincinv

    low = float(betaincinv(right, samples - right + 1, low_rate)) if right else 0.0
    high = float(betaincinv(right + 1, samples - right, 1 - high_rate)) if right < samples else 1.0
    return low, high


def _chance_of(count: np.ndarray[Any, Any], samples: int, chance: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the binomial probabilities of counts."""
    import numpy as np
    from scipy.special import gammaln, xlog1py, xlogy

    ways = gammaln(samples + 1) - gammaln(count + 1) - gammaln(samples - count + 1)
    chances: np.ndarray[Any, Any] = np.exp(ways + xlogy(count, chance) + xlog1py(samples - count, -chance))
    return chances


def _score(lost: np.ndarray[Any, Any], gained: np.ndarray[Any, Any], samples: int, drop: float) -> np.ndarray[Any, Any]:
    """Return Tango's score statistic for "the drop is `drop`"; it grows with `lost`."""
    import numpy as np

    # The maximum-likelihood P(gained) under the hypothesis is the larger root of 2 n q² + b q + c = 0.
    b = -(lost + gained) + drop * (2 * samples - lost + gained)
    c = -gained * drop * (1 - drop)
    p_gained = (np.sqrt(np.maximum(b * b - 8 * samples * c, 0)) - b) / (4 * samples)
    variance = samples * (2 * p_gained + drop * (1 - drop))
    distance = lost - gained - samples * drop
    certain = np.where(distance == 0, 0.0, np.copysign(np.inf, distance))
    return np.where(variance > 0, distance / np.sqrt(np.maximum(variance, _NEGLIGIBLE)), certain)


def _most_losses(gains: np.ndarray[Any, Any], samples: int, drop: float, score: float) -> np.ndarray[Any, Any]:
    """Return, for each count of gains, the most losses whose score is not above `score`; -1 where none is."""
    import numpy as np

    low, high = np.full_like(gains, -1), samples - gains
    while (low < high).any():
        middle = np.ceil((low + high) / 2)
        fits = _score(middle, gains, samples, drop) <= score + 1e-9
        low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
    return low
