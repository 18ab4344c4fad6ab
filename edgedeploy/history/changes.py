"""Where a series of runs changes its level, told from noise that remembers itself. Pure: no I/O, clock, randomness.

The method is published, step by step:

1. Values are compared by ratio, so that the series is of their logarithms.
2. A point or two that stand alone are set aside (Hampel's identifier: Davies & Gather 1993, "The identification of
   multiple outliers", JASA 88(423)), so that one bad run is no change of level.
3. For every number of changes the levels of least squares are found exactly, by dynamic programming, as `ruptures` has
   it in C (Truong, Oudre & Vayatis 2020, "Selective review of offline change point detection methods", Signal
   Processing 167).
4. How many changes there are is decided by Schwarz's criterion for levels with noise that follows an AR(1) process:
   each candidate has noise of its own, so that what remembers itself is not taken for levels, nor a level for memory
   (Cho & Fryzlewicz 2024, "Multiple change point detection under serial dependence: wild contrast maximisation and
   gappy Schwarz algorithm", Journal of Time Series Analysis 45(3), arXiv 2011.13884). The memory's estimate is
   corrected for its bias in short series (Marriott & Pope 1954, "Bias in the estimation of autocorrelations",
   Biometrika 41).
5. A change below 1 % is none that anybody would look into (as the least magnitude of Hunter: Fleming et al. 2023,
   arXiv 2301.03034, whose significance test supposes runs that do not depend on each other).
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

# A level is of three runs at least: fewer are set aside as runs that stand alone.
LEAST_RUNS = 3
# Both levels must have them.
LEAST_SERIES = 2 * LEAST_RUNS
# Older runs than these are not searched: what changed there is of no use any more, and the search is quadratic.
LONGEST_SERIES = 500
LEAST_CHANGE = 0.01
_MOST_CHANGES = 15
# Timers, and rounding in what was written, make differences smaller than this even where nothing is noisy.
_LEAST_NOISE = 0.001
# Few runs say little about their own memory: so many are added that have what a shared machine's runs have.
_USUAL_MEMORY = 0.3
_USUAL_WEIGHT = 10
_LARGEST_MEMORY = 0.95
# Of Hampel's identifier, in standard deviations.
_ALONE = 4.0
_WINDOW = 5
# Median of |x| of a standard normal variable.
_NORMAL_MEDIAN = 0.6745
# Times the penalty of Schwarz's criterion, log n for a change and as much for its place; chosen by the false alarms and
# the power that `tests/benchmarks/history_changes.py` measures. A short series must not get its changes cheaper.
_STRICTNESS = 2.0
_SHORT_SERIES = 20
_TWO_SIDED_95 = 1.96


@dataclass(frozen=True, slots=True)
class Noise:
    """How runs differ where nothing changes.

    Attributes:
        spread: standard deviation of one value.
        memory: correlation of a value with the next.
    """

    spread: float
    memory: float

    def error_of_difference(self, before: int, after: int) -> float:
        """Return the standard error of the difference of two levels of so many values.

        What remembers itself tells less with each value: the variance of a mean of many is the long-run variance,
        spread**2 (1 + memory) / (1 - memory), through their number.
        """
        long_run = self.spread * math.sqrt((1 + self.memory) / (1 - self.memory))
        return long_run * math.sqrt(1 / before + 1 / after)


@dataclass(frozen=True, slots=True)
class Steps:
    """Where a series changes its level.

    Attributes:
        starts: index of the first value of each new level.
        set_aside: indices of values that stand alone and belong to no level.
        noise: None for a series that is too short to tell, or has none.
    """

    starts: tuple[int, ...] = ()
    set_aside: tuple[int, ...] = ()
    noise: Noise | None = None


def steps(logs: Sequence[float]) -> Steps:
    """Find where a series of logarithms changes its level; with fewer than LEAST_SERIES values nothing is found.

    Share of series without a change in which one is found anyway, and of changes that are found within two runs of
    their place, of 400 series each (`python -m tests.benchmarks history_changes` measures it again; fixed seeds)::

        noise: sd, memory, loners     runs: 8      15      30     100     300
        2 %,  0.0,  none                 0.2 %   0.0 %   0.0 %   0.0 %   0.0 %
        2 %,  0.3,  2 % of the runs      0.0 %   0.5 %   0.5 %   0.2 %   1.0 %
        2 %,  0.5,  none                 0.5 %   3.0 %   1.2 %   0.0 %   0.0 %
        17 %, 0.3,  2 % of the runs      0.2 %   0.5 %   0.5 %   0.0 %   0.0 %
        17 %, 0.73, none                 1.5 %   4.2 %   4.0 %   0.5 %   0.0 %
        17 %, 0.9,  none                 3.8 %   6.2 %   5.8 %   0.8 %   0.2 %

        change found                  runs: 8      15      30     100     300
        +10 %, 3 runs ago, 2 %,  0.3      69 %    88 %    97 %    97 %    96 %
        +10 %, 8 runs ago, 2 %,  0.3       -      92 %    98 %   100 %   100 %
        +5 %,  8 runs ago, 2 %,  0.3       -      30 %    42 %    56 %    54 %
        +50 %, 15 runs ago, 17 %, 0.73     -       -      40 %    34 %    31 %
    """
    cut = max(len(logs) - LONGEST_SERIES, 0)
    logs = logs[cut:]
    if len(logs) < LEAST_SERIES:
        return Steps()
    calm, alone = _without_loners(logs)
    starts, noise = _chosen(calm)
    starts = _worth_looking_into(calm, starts)
    return Steps(tuple(cut + start for start in starts), tuple(cut + place for place in alone), noise)


def _without_loners(logs: Sequence[float]) -> tuple[list[float], list[int]]:
    """Put the median of its neighbourhood for each value that stands alone; say which these are."""
    # Differences of neighbours, whose median a few changes of level do not spoil, are smaller where noise has memory.
    middle = statistics.median(abs(after - before) for before, after in itertools.pairwise(logs))
    spread = max(middle / _NORMAL_MEDIAN / math.sqrt(2 * (1 - _USUAL_MEMORY)), _LEAST_NOISE)
    calm, alone = list(logs), []
    for place, value in enumerate(logs):
        begin = min(max(place - _WINDOW // 2, 0), len(logs) - _WINDOW)
        middle = statistics.median(logs[begin : begin + _WINDOW])
        if abs(value - middle) > _ALONE * spread:
            calm[place] = middle
            alone.append(place)
    return calm, alone


def _chosen(logs: Sequence[float]) -> tuple[list[int], Noise]:
    """Return the changes that Schwarz's criterion chooses, and the noise around their levels."""
    import numpy as np

    series = np.array(logs) - statistics.median(logs)
    price = _STRICTNESS * 2 * math.log(max(len(logs), _SHORT_SERIES))
    found: list[tuple[float, list[int], Noise]] = []
    for starts in _candidates(series):
        fit, noise = _fit(series, starts)
        found.append((fit + price * len(starts), starts, noise))
    _, starts, noise = min(found, key=lambda one: one[0])  # of equals the first, which has fewer changes
    return starts, noise


def _candidates(series: np.ndarray[Any, Any]) -> list[list[int]]:
    """Return the best places of no change, of one, of two, and so on."""
    import ruptures  # type: ignore[import-untyped]  # it has neither stubs nor types

    most = min(_MOST_CHANGES, len(series) // LEAST_RUNS - 1)
    search = ruptures.KernelCPD(kernel="linear", min_size=LEAST_RUNS).fit(series.reshape(-1, 1))
    search.predict(n_bkps=most)  # it keeps those of fewer changes too
    return [[], *([int(end) for end in search.predict(n_bkps=number)[:-1]] for number in range(1, most + 1))]


def _fit(series: np.ndarray[Any, Any], starts: Sequence[int]) -> tuple[float, Noise]:
    """Return -2 log likelihood of some levels with AR(1) noise, but for a constant, and that noise."""
    import numpy as np

    rest = np.concatenate([part - part.mean() for part in np.split(series, starts)])
    count, levels = len(series), len(starts) + 1
    power = float(rest @ rest)
    memory = float(rest[1:] @ rest[:-1]) / power if power > 0 else 0.0
    memory += (1 + 3 * memory) * levels / count
    memory = (count * memory + _USUAL_WEIGHT * _USUAL_MEMORY) / (count + _USUAL_WEIGHT)
    memory = min(max(memory, 0.0), _LARGEST_MEMORY)
    news = rest[1:] - memory * rest[:-1]
    squares = float(news @ news) + float(rest[0]) ** 2 * (1 - memory**2)
    variance = max(squares / max(count - levels - 1, 1), _LEAST_NOISE**2)
    noise = Noise(math.sqrt(variance / (1 - memory**2)), memory)
    return count * math.log(variance) - math.log(1 - memory**2), noise


def _worth_looking_into(logs: Sequence[float], starts: Sequence[int]) -> list[int]:
    """Leave out the changes that are too small to matter, the smallest first, for each joins two levels."""
    kept = list(starts)
    while kept:
        levels = [statistics.fmean(logs[begin:end]) for begin, end in bounds(kept, len(logs))]
        sizes = [abs(after - before) for before, after in itertools.pairwise(levels)]
        smallest = min(range(len(sizes)), key=sizes.__getitem__)
        if sizes[smallest] >= math.log1p(LEAST_CHANGE):
            break
        del kept[smallest]
    return kept


def exact_steps(values: Sequence[float]) -> Steps:
    """Return where a series without noise changes: wherever a value differs from the one before.

    >>> exact_steps([5.0, 5.0, 7.0, 7.0]).starts
    (2,)
    """
    return Steps(tuple(place for place in range(1, len(values)) if values[place] != values[place - 1]))


def bounds(starts: Sequence[int], length: int) -> list[tuple[int, int]]:
    """Return each level's first index and the one after its last.

    >>> bounds([2], 5)
    [(0, 2), (2, 5)]
    """
    return list(itertools.pairwise([0, *starts, length]))


def interval(difference: float, error: float) -> tuple[float, float]:
    """Return the 95 % interval of a difference with a normal error."""
    return difference - _TWO_SIDED_95 * error, difference + _TWO_SIDED_95 * error
