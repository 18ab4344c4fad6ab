"""Percentiles of a visit's samples, only where the samples support them. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from edgedeploy.records.run import Visit
from edgedeploy.records.verdict import Metric

# Percentile → fewest samples with a distribution-free 95 % upper bound: the least n with percentile ** n < 0.05.
SUPPORT = {0.95: 59, 0.99: 299, 0.999: 2995}
# Which percentile a metric is.
PERCENTILES: dict[Metric, float] = {"latency_p95": 0.95, "latency_p99": 0.99}


def samples_of(visit: Visit) -> tuple[float, ...]:
    """Return every timed inference of a visit, in order."""
    return tuple(sample_s for burst in visit.bursts for sample_s in burst.samples_s)


def supported_percentile(samples_s: Sequence[float], fraction: float) -> float | None:
    """Return an upper percentile, or None where there are too few samples for it.

    Args:
        samples_s: in any order.
        fraction: one of `SUPPORT`.

    >>> supported_percentile(range(1, 101), 0.95), supported_percentile(range(58), 0.95)
    (95, None)
    """
    if len(samples_s) < SUPPORT[fraction]:
        return None
    return sorted(samples_s)[math.ceil(fraction * len(samples_s)) - 1]


def samples_for(metrics: Iterable[Metric]) -> int:
    """Return how many samples a visit needs for every percentile among some metrics; never fewer than for a 95th.

    >>> samples_for(["latency_p50"]), samples_for(["latency_p99", "accuracy"])
    (59, 299)
    """
    return max([SUPPORT[0.95], *(SUPPORT[PERCENTILES[metric]] for metric in metrics if metric in PERCENTILES)])
