"""What would decide an undecided latency: blocks, their time, or a quieter device. Pure."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from edgedeploy.judge.estimate import POWER, units_to_decide
from edgedeploy.records.run import Visit

# A pause between two blocks that is longer was none of the measuring: a lost link, a device that somebody else held.
_LONGEST_BLOCK_S = 3600.0


@dataclass(frozen=True, slots=True)
class Needed:
    """What would decide it.

    Attributes:
        text: for people.
        units, seconds: how many more blocks, and the time that they take; spread: the standard deviation of block
            effects at which the blocks that the policy allows would be enough. None: not known, or none is.
    """

    text: str
    units: int | None = None
    seconds: float | None = None
    spread: float | None = None


def seconds_per_block(visits: Iterable[Visit]) -> float | None:
    """Return the median time from the start of one block to the start of the next; None where visits do not say it.

    Of a single block: from its start to its end. What a block of both sides takes is asked of the visits of both.
    """
    spans: dict[int, tuple[float, float]] = {}
    for visit in visits:
        start_s, end_s = spans.get(visit.block, (math.inf, -math.inf))
        spans[visit.block] = min(start_s, visit.before.monotonic_s), max(end_s, visit.after.monotonic_s)
    starts_s = [spans[block][0] for block in sorted(spans)]
    # The clock of a reboot starts anew.
    steps_s = [after - before for before, after in itertools.pairwise(starts_s)]
    for spent_s in (steps_s, [end_s - start_s for start_s, end_s in spans.values()]):
        known_s = [one_s for one_s in spent_s if 0 < one_s < _LONGEST_BLOCK_S]
        if known_s:
            return statistics.median(known_s)
    return None


def blocks_needed(
    *,
    spread: float,
    distance: float,
    error_rate: float,
    counted: int,
    most: int,
    block_s: float | None,
    level: float,
    runs: int,
) -> Needed:
    """Return how many more blocks would decide, if the effect seen is the true one.

    Args:
        spread: standard deviation of one block's effect.
        distance: from the effect to the margin; at 0 nothing decides.
        error_rate: one-sided, at the last look.
        counted: blocks that count so far; most: that the policy allows.
        block_s: seconds that a block takes.
        level: what an effect is divided by to be a fraction: 1 for the logarithm of a ratio.
        runs: whose noise is in a block's effect: 2, or 1 where the candidate alone is judged.
    """
    enough = units_to_decide(spread, abs(distance), error_rate)
    if enough is None or enough > 100 * most:
        return Needed(
            "the change seen lies too near the margin: no number of blocks is likely to decide; choose another margin"
        )
    more = max(enough - counted, 1)
    seconds = None if block_s is None else more * block_s
    took = "" if seconds is None or block_s is None else f" ({time_text(seconds)}, at {time_text(block_s)} a block)"
    text = f"about {more} more A/B blocks{took} at the noise seen, if the change seen is the true one"
    if counted + more <= most:
        return Needed(text, more, seconds)
    text += f": more than the {most} in all that the policy allows; raise max_blocks or measure on a quieter device"
    quiet = _spread_that_decides(most, abs(distance), error_rate)
    if quiet is None or spread <= quiet or level <= 0:
        return Needed(text, more, seconds)
    noise, seen = quiet / level, spread / level
    text += (
        f": blocks that differ by {_percent(noise)} (a run-to-run CV of {_percent(noise / math.sqrt(runs))}) would do, "
        f"and these differ by {_percent(seen)}"
    )
    return Needed(text, more, seconds, noise)


def _spread_that_decides(units: int, distance: float, error_rate: float) -> float | None:
    """Return the standard deviation of a unit at which so many decide; the inverse of `units_to_decide`."""
    normal = statistics.NormalDist()
    z = normal.inv_cdf(1 - error_rate)
    left = units - z * z / 2
    return distance * math.sqrt(left) / (z + normal.inv_cdf(POWER)) if left > 0 else None


def time_text(seconds: float) -> str:
    """Print how long something takes, as people plan with it.

    >>> time_text(0.42), time_text(42.4), time_text(400), time_text(9000)
    ('0.4 s', '42 s', '7 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _percent(fraction: float) -> str:
    return f"{fraction * 100:.0f} %" if fraction >= 0.995 else f"{fraction * 100:.2g} %"
