"""How often the history sees a change where there is none, and where there is one: fixed seeds, simulated noise."""

import json
import math

import numpy as np

from edgedeploy.history.changes import steps

SERIES = 400
LENGTHS = (8, 15, 30, 100, 300)
# (standard deviation, correlation of a run with the next, share of runs that stand out by 20 to 80 %). The last two
# are what 277 visits on one shared virtual machine had, and worse.
NOISES = ((0.02, 0.0, 0.0), (0.02, 0.3, 0.02), (0.02, 0.5, 0.0), (0.17, 0.3, 0.02), (0.17, 0.73, 0.0), (0.17, 0.9, 0.0))
# (noise, change, runs after it)
CHANGES = (((0.02, 0.3), 0.05, 8), ((0.02, 0.3), 0.10, 3), ((0.02, 0.3), 0.10, 8), ((0.17, 0.73), 0.50, 15))


def noise(random, count: int, cv: float, memory: float, share: float = 0.0) -> np.ndarray:
    """AR(1) noise with some runs that stand out."""
    draws = random.standard_normal(count)
    values = [draws[0]]
    for draw in draws[1:]:
        values.append(memory * values[-1] + math.sqrt(1 - memory**2) * draw)
    return cv * np.array(values) + (random.random(count) < share) * random.uniform(0.18, 0.6, count)


def false_alarms(count: int, cv: float, memory: float, share: float) -> float:
    """Share of series without a change in which one is seen."""
    random = np.random.default_rng(1)
    return sum(bool(steps(list(noise(random, count, cv, memory, share))).starts) for _ in range(SERIES)) / SERIES


def found(count: int, cv: float, memory: float, change: float, after: int) -> float | None:
    """Share of series with one change in which it is seen, within two runs of its place; None: no room for it."""
    if count - after < 3:
        return None
    random, hits = np.random.default_rng(2), 0
    for _ in range(SERIES):
        series = noise(random, count, cv, memory)
        series[count - after :] += math.log1p(change)
        hits += any(abs(start - (count - after)) <= 2 for start in steps(list(series)).starts)
    return hits / SERIES


def main() -> None:
    """Measure every row of the tables in the docstring of `steps`."""
    alarms = [
        {
            "cv": cv,
            "autocorrelation": memory,
            "outliers": share,
            "runs": count,
            "share": false_alarms(count, cv, memory, share),
        }
        for cv, memory, share in NOISES
        for count in LENGTHS
    ]
    hits = [
        {"cv": cv, "autocorrelation": memory, "change": change, "runs_after": after, "runs": count}
        | {"share": found(count, cv, memory, change, after)}
        for (cv, memory), change, after in CHANGES
        for count in LENGTHS
    ]
    print(json.dumps({"series": SERIES, "false_alarms": alarms, "found": hits}))


if __name__ == "__main__":
    main()
