"""What single operators take, the slowest first, and what that says of an inference. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from edgedeploy.records.run import LayerTime
from edgedeploy.render.figures import count, format_share, printable
from edgedeploy.units import format_duration

TIME_COLUMNS = ("operator", "kind", "p50", "share")
# The slowest explain a latency; the rest would push it off the screen. The run's file has them all.
_MOST_ROWS = 20


def time_rows(times: Sequence[LayerTime]) -> list[tuple[str, ...]]:
    """Return a row for each of the slowest operators, with its share of their sum."""
    total_s = sum(one.p50_s for one in times)
    slowest = sorted(times, key=lambda one: -one.p50_s)[:_MOST_ROWS]
    return [
        (
            printable(one.name),
            printable(one.kind),
            format_duration(one.p50_s),
            format_share(one.p50_s / total_s) if total_s else "",
        )
        for one in slowest
    ]


def times_note(times: Sequence[LayerTime]) -> str:
    """Say what the table leaves out, and why its sum is no latency."""
    rest = sorted(times, key=lambda one: -one.p50_s)[_MOST_ROWS:]
    more = f"{count(len(rest), 'more operator')}, {format_duration(sum(one.p50_s for one in rest))}; " if rest else ""
    total = format_duration(sum(one.p50_s for one in times))
    return f"{more}all together {total}, more than an inference takes: watching costs time"
