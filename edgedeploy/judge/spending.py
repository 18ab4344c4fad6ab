"""How much of an error rate each look at the growing evidence may use. Pure.

A look after every block is many tests; together they may err at the error rate. The power family of Kim & DeMets
(1987, Biometrika 74:149) says how much may be used up by each look: error_rate · (blocks / most blocks)^1.5. The
boundaries that use up exactly that follow from the joint distribution of the t statistics of one growing sample of
independent normal effects (Jennison & Turnbull 1991, Biometrika 78:133). Boundaries for the normal process, put at t
quantiles, would instead err in 5.6 % for a nominal 5 % and in 1.45 % for 1.25 % (4 to 16 blocks, 100,000 simulated
gates); a union bound over the looks errs in 2.0 % and needs more blocks.

The exponent 1.5: simulated (block sd 1 to 4 %, margin 5 %), exponent 1 and the Pocock-like function see a +10 % change
less often and are hardly earlier; 2 and 3 need more blocks where the device is quiet.
"""

from __future__ import annotations

import functools
import math
import statistics
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

_EXPONENT = 1.5
# Cells of the grid of normal scores, from -6 to the boundary. With 240 every level is within 1.5 % of itself with 1,000
# cells, and the error rate is right within what 400,000 simulated gates can show.
_CELLS = 240
_LOWEST_SCORE = -6.0


@functools.lru_cache(maxsize=128)
def nominal_levels(first: int, last: int, error_rate: float) -> tuple[float, ...]:
    """Return the one-sided significance level of a t-test at each look, after `first`, `first + 1`, … `last` units.

    A test that stops at the first look whose p-value is at most its level errs with probability `error_rate` in all,
    when units are independent and normal. Stopping earlier for another reason only makes errors rarer.

    Args:
        first: units at the first look, >= 2.
        last: units at the last look.
        error_rate: between 0 and 0.5.
    """
    import numpy as np
    from scipy.optimize import brentq

    normal = statistics.NormalDist()
    spent = error_rate * (first / last) ** _EXPONENT
    levels = [spent]
    edges = np.linspace(_LOWEST_SCORE, -normal.inv_cdf(spent), _CELLS + 1)
    masses = np.diff([0.0, *map(normal.cdf, edges[1:])])
    for units in range(first, last):
        states = _state((edges[1:] + edges[:-1]) / 2, units)
        due = error_rate * ((units + 1) / last) ** _EXPONENT - spent

        def excess(
            score: float, units: int = units, states: Any = states, masses: Any = masses, due: float = due
        ) -> float:
            return float(masses @ _chance_above(_state(np.array([score]), units + 1), states, units)[:, 0]) - due

        boundary = brentq(excess, -5.0, 12.0, xtol=1e-9)
        levels.append(normal.cdf(-boundary))
        spent += due
        edges = np.linspace(_LOWEST_SCORE, boundary, _CELLS + 1)
        above = masses @ _chance_above(_state(edges, units + 1), states, units)
        above[0] = masses.sum()  # the lowest cell takes everything below it
        masses = above[:-1] - above[1:]
    return tuple(levels)


def _state(scores: np.ndarray[Any, Any], units: int) -> np.ndarray[Any, Any]:
    """Turn normal scores of a t statistic into u = sum / sqrt(sum of squares), which is a Markov chain in `units`."""
    import numpy as np
    from scipy.special import ndtr, stdtrit

    t = -np.sign(scores) * stdtrit(units - 1, ndtr(-np.abs(scores)))
    states: np.ndarray[Any, Any] = t * np.sqrt(units / (units - 1 + t * t))
    return states


def _chance_above(thresholds: np.ndarray[Any, Any], states: np.ndarray[Any, Any], units: int) -> np.ndarray[Any, Any]:
    """Return P(next state > threshold | state), shape (states, thresholds).

    The next state is h(y) = (u + y) / sqrt(1 + y²), where y = next effect / sqrt(sum of squares so far) is independent
    of u (Basu's theorem) and y · sqrt(units) follows t with `units` degrees of freedom.
    """
    import numpy as np

    u, b = states[:, None], thresholds[None, :]
    negative = b < 0
    # h is odd in (u, y) together, so P(h > b | u) = 1 - P(h > -b | -u).
    u, b = np.where(negative, -u, u), np.abs(b)
    above = _chance_above_positive(u, b, units)
    return np.where(negative, 1 - above, above)


def _chance_above_positive(u: np.ndarray[Any, Any], b: np.ndarray[Any, Any], units: int) -> np.ndarray[Any, Any]:
    import numpy as np
    from scipy.special import stdtr

    scale = math.sqrt(units)
    reach = 1 + u * u - b * b  # h never exceeds sqrt(1 + u²)
    root = b * np.sqrt(np.maximum(reach, 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        # Where h crosses b upwards; the second form is the same without cancellation.
        upward = np.where(u > 0, (b * b - u * u) / (u + root), (root - u) / (1 - b * b))
        downward = (u + root) / (b * b - 1)  # for b > 1, h comes down again
    ends = np.where(b < 1, np.inf, downward)
    has_crossed = (b < 1) | ((u > 0) & (reach > 0))
    above = np.zeros(np.broadcast(u, b).shape)
    above[has_crossed] = stdtr(units, ends[has_crossed] * scale) - stdtr(units, upward[has_crossed] * scale)
    return above
