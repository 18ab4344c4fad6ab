"""A trend as SVG text that takes its colours from the page: runs, levels, changes, and the sentinel beside them."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from xml.etree import ElementTree as ET

from edgedeploy.records.history import Trend
from edgedeploy.render.svg import (
    LEFT,
    RIGHT,
    WIDTH,
    draw,
    grid_line,
    kept_inside,
    new_svg,
    padded,
    svg_text,
    ticks,
    time_ticks,
)
from edgedeploy.render.trend_figures import (
    HISTORY_TITLES,
    change_text,
    day,
    is_worse,
    minute,
    trend_sentence,
    value_text,
)
from edgedeploy.units import format_duration

_TOP, _BOTTOM, _HEIGHT = 20.0, 190.0, 216.0
_SENTINEL_TOP, _SENTINEL_BOTTOM, _SENTINEL_HEIGHT = 8.0, 62.0, 70.0


def trend_svg(trend: Trend) -> str:
    """Draw every run of a trend in order of time, its levels as lines and its changes as marks; "" without a run."""
    if not trend.points:
        return ""
    title = HISTORY_TITLES[trend.metric]
    svg = new_svg(WIDTH, _HEIGHT, "trend", title, trend_sentence(trend))
    values = [point.value for point in trend.points]
    text = value_text(trend.metric, trend.worse)
    low, high = padded(min(values), max(values))
    y = _scale(low, high, _TOP, _BOTTOM)
    x = _places(len(values))
    for value, label in _ticks(trend, low, high):
        grid_line(svg, y(value), label, width=WIDTH - RIGHT)
    edges = [0, *(change.index for change in trend.changes), len(values)]
    for begin, end in itertools.pairwise(edges):
        kept = [values[place] for place in range(begin, end) if place not in trend.set_aside] or values[begin:end]
        level = statistics.geometric_mean(kept) if min(kept) > 0 else statistics.fmean(kept)
        draw(svg, "line", class_="level", x1=x(begin) - 3, x2=x(end - 1) + 3, y1=y(level), y2=y(level))
    for change in trend.changes:
        _mark(svg, trend, change.index, x)
    for place, point in enumerate(trend.points):
        alone = place in trend.set_aside
        dot = draw(svg, "circle", class_="run alone" if alone else "run", cx=x(place), cy=y(point.value), r=3.2)
        verdict = f"; {point.release}{f': {point.decision}' if point.decision else ''}" if point.release else ""
        aside = "; stands alone" if alone else ""
        draw(
            dot,
            "title",
            f"{minute(point.utc)}: {text(point.value)}; artifact {point.artifact_sha256[:8]}{verdict}{aside}",
        )
    _days(svg, trend, x)
    return svg_text(svg)


def sentinel_svg(trend: Trend) -> str:
    """Draw what the sentinel took in the same sessions, run below run; "" where fewer than two have one."""
    read = [(place, point.sentinel_s) for place, point in enumerate(trend.points) if point.sentinel_s is not None]
    if len(read) < 2:
        return ""
    svg = new_svg(
        WIDTH, _SENTINEL_HEIGHT, "trend sentinel", "sentinel", "What a model that never changes took beside it"
    )
    values_s = [value_s for _, value_s in read]
    low_s, high_s = padded(min(values_s), max(values_s))
    y = _scale(low_s, high_s, _SENTINEL_TOP, _SENTINEL_BOTTOM)
    x = _places(len(trend.points))
    for tick_s, label in time_ticks(low_s, high_s)[::2]:
        grid_line(svg, y(tick_s), label, width=WIDTH - RIGHT)
    for place, value_s in read:
        dot = draw(svg, "circle", class_="reading", cx=x(place), cy=y(value_s), r=2.4)
        draw(dot, "title", f"{minute(trend.points[place].utc)}: sentinel {format_duration(value_s)}")
    return svg_text(svg)


def _places(count: int) -> Callable[[int], float]:
    """Return where the columns stand: runs are equally far apart, whenever they were made."""
    step = (WIDTH - LEFT - RIGHT - 16) / max(count - 1, 1)
    return lambda place: LEFT + 8 + place * min(step, 40.0)


def _scale(low: float, high: float, top: float, bottom: float) -> Callable[[float], float]:
    return lambda value: bottom - (bottom - top) * (value - low) / (high - low)


def _ticks(trend: Trend, low: float, high: float) -> list[tuple[float, str]]:
    if trend.metric in ("peak_memory", "artifact_size", "accuracy"):
        text = value_text(trend.metric, trend.worse)
        return [(value, text(value)) for value in ticks(low, high)]
    return time_ticks(low, high)


def _mark(svg: ET.Element, trend: Trend, index: int, x: Callable[[int], float]) -> None:
    change = next(one for one in trend.changes if one.index == index)
    place = (x(index - 1) + x(index)) / 2 if index else x(index)
    kind = "worse" if is_worse(trend.worse, change) else "better"
    mark = draw(svg, "g", class_=f"change {kind}")
    size = change_text(trend.metric, trend.worse, change)
    draw(mark, "title", f"{day(change.utc)}: {size}; {change.why}")
    draw(mark, "line", x1=place, x2=place, y1=_TOP - 4, y2=_BOTTOM)
    label = size.partition(" (")[0]
    draw(mark, "text", label, x=kept_inside(place, label, WIDTH), y=_TOP - 8, text_anchor="middle")


def _days(svg: ET.Element, trend: Trend, x: Callable[[int], float]) -> None:
    """Write the days below, as many as there is room for."""
    shown = max(int((x(len(trend.points) - 1) - x(0)) // 110), 1)
    places = sorted({round(part * (len(trend.points) - 1) / shown) for part in range(shown + 1)})
    for place in places:
        label = day(trend.points[place].utc)
        draw(svg, "text", label, x=kept_inside(x(place), label, WIDTH), y=_BOTTOM + 18, text_anchor="middle")
