"""The history as text for a terminal: all cells in a table, or one trend as a plot with its changes."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

from edgedeploy.records.history import CellRow, Trend, cell_text
from edgedeploy.render.figures import count, one_line
from edgedeploy.render.text import table
from edgedeploy.render.trend_figures import (
    HISTORY_TITLES,
    cause_in_short,
    causes_text,
    change_text,
    day,
    newest_change_text,
    noise_sentence,
    run_columns,
    run_rows,
    trend_sentence,
    value_or_none,
    value_text,
)

_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARKLINE = 16
_PLOT_ROWS = 9
_LABEL = 10
_WIDTH = 100
_LISTED_RUNS = 12
# A narrower axis would show noise as if it were something.
_LEAST_SPAN = 0.05


def cells_text(rows: Sequence[CellRow], *, color: bool, width: int | None) -> str:
    """Return all cells, a line each: newest value, newest change and whose it is, trend, newest verdict."""
    if not rows:
        return "no runs yet"
    metric = rows[0].metric
    lines = [
        [
            row.name,
            f"{row.key.device}@{row.key.lab}" if row.key.lab else row.key.device,
            str(row.runs),
            value_or_none(metric, row.worse, row.last),
            newest_change_text(row),
            cause_in_short(row.change) if row.change else "",
            sparkline(row.recent[-_SPARKLINE:]),
            f"{row.decision}, {row.release}" if row.decision else "",
        ]
        for row in rows
    ]
    columns = ("cell", "device", "runs", "newest", "changed", "by", "trend", "verdict")
    return table(
        f"History of {count(len(rows), 'cell')}: {HISTORY_TITLES[metric]}", columns, lines, color=color, width=width
    )


def trend_text(trend: Trend, *, color: bool, width: int | None) -> str:
    """Return one trend: what it shows, its plot, its changes and its newest runs."""
    title = f"{cell_text(trend.cell)}: {HISTORY_TITLES[trend.metric]}"
    parts = [one_line(title), trend_sentence(trend)]
    parts += [line for line in (noise_sentence(trend), trend.note) if line]
    if not trend.points:
        return "\n".join(parts)
    parts += ["", *plot_lines(trend, width or _WIDTH), ""]
    if trend.changes:
        columns = ("since", "level", "change", "whose", "what changed with it")
        parts += [table("Changes of level", columns, _change_rows(trend), color=color, width=width), ""]
    rows, runs = run_rows(trend, _LISTED_RUNS), len(trend.points) + trend.hidden
    shown = "" if len(rows) == runs else f" of {runs}"
    newest = table(f"Newest {count(len(rows), 'run')}{shown}", run_columns(trend), rows, color=color, width=width)
    return "\n".join([*parts, newest])


def _change_rows(trend: Trend) -> list[list[str]]:
    text = value_text(trend.metric, trend.worse)
    return [
        [
            day(change.utc),
            f"{text(change.before)} → {text(change.after)}",
            change_text(trend.metric, trend.worse, change),
            change.whose,
            f"{causes_text(change)}\n{change.why}",
        ]
        for change in trend.changes
    ]


def sparkline(values: Sequence[float]) -> str:
    """Return numbers as a line of blocks, lowest to highest; numbers that are nearly alike make a nearly flat line.

    >>> sparkline([1.0, 1.0, 2.0])
    '▁▁█'
    >>> sparkline([1.0, 1.001])
    '▄▅'
    """
    if not values:
        return ""
    low, high = _axis(values)
    return "".join(_BLOCKS[round((value - low) / (high - low) * (len(_BLOCKS) - 1))] for value in values)


def _axis(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of an axis for some numbers, at least a few percent apart."""
    low, high = min(values), max(values)
    missing = _LEAST_SPAN * max(abs(low), abs(high), 1e-12) - (high - low)
    return (low - missing / 2, high + missing / 2) if missing > 0 else (low, high)


def plot_lines(trend: Trend, width: int) -> list[str]:
    """Draw a trend: a column is a run, or the median of neighbours where there are more than columns; ▲ begins a level.

    Args:
        trend: with one point at least.
        width: columns of the terminal.
    """
    columns = _columns(len(trend.points), max(min(width, 160) - _LABEL - 2, 10))
    low, high = _axis([point.value for point in trend.points])
    text = value_text(trend.metric, trend.worse)
    rows = [[" "] * len(columns) for _ in range(_PLOT_ROWS)]
    for place, (begin, end) in enumerate(columns):
        value = statistics.median(point.value for point in trend.points[begin:end])
        row = round((high - value) / (high - low) * (_PLOT_ROWS - 1))
        alone = all(index in trend.set_aside for index in range(begin, end))
        rows[row][place] = "×" if alone else "•"
    labels = {0: text(high), _PLOT_ROWS // 2: text((low + high) / 2), _PLOT_ROWS - 1: text(low)}
    drawn = [f"{labels.get(number, ''):>{_LABEL}} ┤{''.join(row).rstrip()}" for number, row in enumerate(rows)]
    starts = {change.index for change in trend.changes}
    marks = "".join("▲" if any(begin <= start < end for start in starts) else "─" for begin, end in columns)
    first, newest = day(trend.points[0].utc), day(trend.points[-1].utc)
    room = max(len(columns) - len(first) - len(newest), 1)
    return [*drawn, f"{'':>{_LABEL}} └{marks}", f"{'':>{_LABEL}}  {first}{' ' * room}{newest}"]


def _columns(points: int, room: int) -> list[tuple[int, int]]:
    """Return which points share a column: (first, one after the last) of each.

    >>> _columns(3, 10), _columns(4, 2)
    ([(0, 1), (1, 2), (2, 3)], [(0, 2), (2, 4)])
    """
    columns = min(points, room)
    edges = [points * place // columns for place in range(columns + 1)]
    return list(itertools.pairwise(edges))
