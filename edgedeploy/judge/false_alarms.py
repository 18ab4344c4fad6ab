"""How often a gate of something against itself says FAIL, with an exact interval. Pure: no I/O, no clock."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from edgedeploy.records.passport import AaOutcome, AaSummary

# Of the interval that is printed, two-sided. "Proven above" is its one-sided half: 2.5 % of gates that err exactly as
# often as they may would be called worse.
CONFIDENCE = 0.95


def exact_interval(hits: int, trials: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the two-sided interval of a probability after so many hits.

    Source: Clopper & Pearson 1934, Biometrika 26:404, by quantiles of the beta distribution; agrees with
    scipy.stats.binomtest(...).proportion_ci(method="exact"), whose package takes a second to import.
    """
    from scipy.special import betaincinv

    tail = (1 - confidence) / 2
    low = float(betaincinv(hits, trials - hits + 1, tail)) if hits else 0.0
    high = float(betaincinv(hits + 1, trials - hits, 1 - tail)) if hits < trials else 1.0
    return low, high


def summary_of(outcomes: Sequence[AaOutcome]) -> AaSummary | None:
    """Return the observed false-alarm rate of gates in which nothing had changed; None for no gate.

    The rate counts gates, not cells: one FAIL anywhere stops a release.
    """
    if not outcomes:
        return None
    decisions = [outcome.decision for outcome in outcomes]
    fails, gates = decisions.count("FAIL"), len(decisions)
    low, high = exact_interval(fails, gates)
    allowed = max(outcome.error_rate for outcome in outcomes)
    times = sorted(outcome.judged_utc for outcome in outcomes)
    return AaSummary(
        gates=gates,
        false_fails=fails,
        passes=decisions.count("PASS"),
        inconclusive=decisions.count("INCONCLUSIVE"),
        rate=fails / gates,
        low=low,
        high=high,
        confidence=CONFIDENCE,
        error_rate=allowed,
        devices=tuple(sorted({cell.device for outcome in outcomes for cell in outcome.cells})),
        since_utc=times[0],
        until_utc=times[-1],
        median_seconds=statistics.median(outcome.seconds for outcome in outcomes),
        proven_above=low > allowed,
    )
