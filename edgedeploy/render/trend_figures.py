"""What every rendering of a trend says, in words: values, changes, and what may have done them. Pure."""

from __future__ import annotations

from collections.abc import Callable

from edgedeploy.records.history import CellRow, Change, HistoryMetric, Point, Refreshed, Trend
from edgedeploy.render.figures import NOT_AVAILABLE, count, format_share, one_line
from edgedeploy.units import format_bytes, format_change, format_duration, format_points

HISTORY_TITLES: dict[HistoryMetric, str] = {
    "latency_p50": "latency p50",
    "latency_p95": "latency p95",
    "latency_p99": "latency p99",
    "load_time": "load",
    "first_inference": "first inference",
    "peak_memory": "peak memory",
    "artifact_size": "artifact size",
    "accuracy": "accuracy",
}
_NAMED_SKIPPED = 3


def value_text(metric: HistoryMetric, worse: str) -> Callable[[float], str]:
    """Return what prints a value of a metric; `worse` tells a share of right answers from an error."""
    if metric in ("peak_memory", "artifact_size"):
        return format_bytes
    if metric == "accuracy":
        return format_share if worse == "down" else "{:.4g}".format
    return format_duration


def value_or_none(metric: HistoryMetric, worse: str, value: float | None) -> str:
    """Return a value as text, or that it is not available."""
    return NOT_AVAILABLE if value is None else value_text(metric, worse)(value)


def change_text(metric: HistoryMetric, worse: str, change: Change) -> str:
    """Return how large a change is, and its interval where it has one."""
    if metric == "accuracy" and worse == "down":
        return format_points(change.change)
    if change.low is None or change.high is None:
        return format_change(change.change)
    return f"{format_change(change.change)} ({format_change(change.low)} to {format_change(change.high)})"


def is_worse(worse: str, change: Change) -> bool:
    """Say whether a change is for the worse."""
    return (change.change > 0) == (worse == "up")


def day(utc: str) -> str:
    """Return the day of a time.

    >>> day("2026-11-22T06:30:00Z")
    '2026-11-22'
    """
    return utc[:10]


def minute(utc: str) -> str:
    """Return a time to the minute.

    >>> minute("2026-11-22T06:30:00Z")
    '2026-11-22 06:30'
    """
    return utc[:16].replace("T", " ")


def causes_text(change: Change) -> str:
    """Return what else changed at a change's place."""
    listed = "; ".join(f"{cause.what} {cause.before} → {cause.after}" for cause in change.causes)
    return listed or "nothing else that a run records"


def newest_change_text(row: CellRow) -> str:
    """Return a cell's newest change in a few words, or that there is none."""
    if row.change is None:
        return row.note.partition(";")[0] or f"none in {count(row.since, 'run')}"
    size = change_text(row.metric, row.worse, row.change).partition(" (")[0]
    return f"{size} on {day(row.change.utc)}"


def cause_in_short(change: Change) -> str:
    """Return whose change it is and the likeliest cause, for a narrow column."""
    likeliest = change.causes[0].what if change.causes else ""
    if change.whose == "board":
        return "the board"
    if change.whose in ("model", "both") and likeliest:
        return f"{likeliest}{' and the board' if change.whose == 'both' else ''}"
    return f"{likeliest}?" if likeliest else "unknown"


def trend_sentence(trend: Trend) -> str:
    """Return in one sentence what a trend shows."""
    title, runs = HISTORY_TITLES[trend.metric], count(len(trend.points) + trend.hidden, "run")
    if not trend.points:
        return f"no run of this cell has a {title}"
    text = value_text(trend.metric, trend.worse)
    now = f"{title} {text(trend.points[-1].value)} in the newest of {runs}"
    if not trend.changes:
        steady = "" if trend.note else f", no change of level{' in those shown' if trend.hidden else ''}"
        return f"{now}{steady}"
    newest = trend.changes[-1]
    direction = "worse" if is_worse(trend.worse, newest) else "better"
    size = change_text(trend.metric, trend.worse, newest)
    return f"{now}; the level changed on {day(newest.utc)} by {size}, for the {direction}"


def noise_sentence(trend: Trend) -> str:
    """Return how noisy a series is; "" where that is not known."""
    if trend.noise is None or trend.autocorrelation is None:
        return ""
    return (
        f"between runs: standard deviation {trend.noise * 100:.1f} %, correlation of a run with the next "
        f"{trend.autocorrelation:.2f}"
    )


def sentinel_text(point: Point) -> str:
    """Return what the sentinel took in a run's session."""
    return "" if point.sentinel_s is None else format_duration(point.sentinel_s)


def run_columns(trend: Trend) -> tuple[str, ...]:
    """Return what the columns of `run_rows` are called."""
    title = HISTORY_TITLES[trend.metric]
    return ("measured", title, "sentinel", "artifact", "edgedeploy", "runtime", "verdict", "run")


def run_rows(trend: Trend, last: int) -> list[list[str]]:
    """Return the newest runs of a trend, newest first, a row each."""
    text = value_text(trend.metric, trend.worse)
    return [
        [
            minute(point.utc),
            text(point.value),
            sentinel_text(point),
            point.artifact_sha256[:8],
            point.edgedeploy,
            point.runtime,
            f"{point.release}{f', {point.decision}' if point.decision else ''}",
            point.run.rpartition("-")[2],
        ]
        for point in reversed(trend.points[-last:])
    ]


def refreshed_sentences(refreshed: Refreshed, where: str) -> list[str]:
    """Return what a reader should know of how the index was brought up to date, a line each."""
    lines = []
    if refreshed.rebuilt:
        read = f"{count(refreshed.runs, 'run')} and {count(refreshed.verdicts, 'verdict')}"
        lines.append(f"{where} was made anew from {read}: {refreshed.rebuilt}")
    if refreshed.skipped:
        named = "; ".join(f"{one_line(one.path)}: {one.why}" for one in refreshed.skipped[:_NAMED_SKIPPED])
        more = len(refreshed.skipped) - _NAMED_SKIPPED
        rest = f"; and {more} more" if more > 0 else ""
        lines.append(f"left out {count(len(refreshed.skipped), 'file')}: {named}{rest}")
    return lines
