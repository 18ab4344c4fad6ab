"""A run in figures, for display: percentiles only where the samples support them. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from edgedeploy.records.run import Run, Visit

# Percentile → fewest samples with a distribution-free 95 % upper bound: the least n with percentile ** n < 0.05.
SUPPORT = {0.95: 59, 0.99: 299, 0.999: 2995}


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a run says in figures; None where there is nothing, or too little, to say it from.

    Attributes:
        samples: timed inferences in visits that count.
        visits: visits that count.
        dropped_visits: visits that do not.
        mad_s: median absolute deviation of the samples from their median, unscaled.
        visit_medians_s: one per visit that counts, in order of block.
        peak_rss_bytes: median over the memory visits.
    """

    samples: int
    visits: int
    dropped_visits: int
    p50_s: float | None
    p95_s: float | None
    p99_s: float | None
    p999_s: float | None
    min_s: float | None
    mad_s: float | None
    visit_medians_s: tuple[float, ...]
    load_s: float | None
    first_inference_s: float | None
    peak_rss_bytes: float | None
    size_bytes: int


def summary(run: Run) -> Summary:
    """Return the figures of a run."""
    counted = [visit for visit in run.visits if not visit.dropped]
    samples_s = [sample_s for visit in counted for sample_s in samples_of(visit)]
    p50_s = median_or_none(samples_s)
    return Summary(
        samples=len(samples_s),
        visits=len(counted),
        dropped_visits=len(run.visits) - len(counted),
        p50_s=p50_s,
        p95_s=supported_percentile(samples_s, 0.95),
        p99_s=supported_percentile(samples_s, 0.99),
        p999_s=supported_percentile(samples_s, 0.999),
        min_s=min(samples_s, default=None),
        mad_s=None if p50_s is None else median_or_none([abs(sample_s - p50_s) for sample_s in samples_s]),
        visit_medians_s=tuple(statistics.median(samples_of(visit)) for visit in counted if samples_of(visit)),
        load_s=median_or_none([visit.load_s for visit in counted]),
        first_inference_s=median_or_none([visit.first_inference_s for visit in counted]),
        peak_rss_bytes=median_or_none([visit.peak_rss_bytes for visit in run.memory]),
        size_bytes=run.artifact.size_bytes,
    )


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


def median_or_none(numbers: Sequence[float]) -> float | None:
    """Return the median, or None where there are no numbers."""
    return statistics.median(numbers) if numbers else None
