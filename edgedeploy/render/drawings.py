"""Small charts as SVG text that takes its colours from the page: an effect against its margin, visits in time order."""

from __future__ import annotations

import math
import statistics
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from edgedeploy.records.run import Run, Visit
from edgedeploy.records.verdict import Finding
from edgedeploy.render.figures import count, drop_reason, finite, printable, quantile, visit_samples_s
from edgedeploy.units import format_change, format_duration

Side = Literal["baseline", "candidate"]

HATCH = "hatch"  # the page defines the pattern once under this id
_MAX_DOTS = 6000  # samples drawn one by one; beyond it a page takes seconds to open and the dots are a blur anyway
_WIDTH = 760.0
_LEFT, _RIGHT = 62.0, 8.0


@dataclass(frozen=True, slots=True)
class Column:
    """One visit's place in a chart.

    Attributes:
        group: columns of one group stand together (the two sides of a block).
        mark: number of the footnote that says why the visit was dropped; 0 for one that counts.
    """

    side: Side
    visit: Visit
    samples_s: tuple[float, ...]
    group: tuple[int, int]
    mark: int


def visit_columns(baseline: Run | None, candidate: Run | None) -> tuple[list[Column], list[str]]:
    """Put the visits of two runs in the order in which they were made.

    Returns:
        (columns, footnotes): footnote n, from 1, is what the columns with mark n were dropped for.
    """
    is_interleaved = is_one_session(baseline, candidate)
    order: list[tuple[tuple[int, int, int], Side, Visit]] = []
    sides: list[tuple[Side, Run | None]] = [("baseline", baseline), ("candidate", candidate)]
    for number, (side, run) in enumerate(sides):
        session = 0 if is_interleaved else number
        order += [((session, visit.block, visit.position), side, visit) for visit in (run.visits if run else ())]
    order.sort(key=lambda entry: entry[0])
    footnotes = list(dict.fromkeys(reason for _, _, visit in order if (reason := drop_reason(visit))))
    columns = [
        Column(
            side=side,
            visit=visit,
            samples_s=tuple(sorted(visit_samples_s(visit))),
            group=place[:2],
            mark=footnotes.index(reason) + 1 if (reason := drop_reason(visit)) else 0,
        )
        for place, side, visit in order
    ]
    return columns, footnotes


def is_one_session(baseline: Run | None, candidate: Run | None) -> bool:
    """Say whether two runs were measured interleaved, so that their blocks pair up."""
    return baseline is not None and candidate is not None and baseline.session == candidate.session


def effect_svg(finding: Finding, description: str) -> str:
    """Draw a finding's effect and interval against no change and the margin; worse is right. "" without an effect."""
    effect = finite(finding.effect)
    if effect is None:
        return ""
    low, high = finite(finding.low), finite(finding.high)
    margin = finding.margin.value if finding.margin else None
    marked = [0.0, *(number for number in (effect, low, high, margin) if number is not None)]
    width, height, middle, floor = 260.0, 52.0, 17.0, 34.0
    start, end = min(marked), max(marked)
    room = 0.12 * (end - start) or 1.0
    start, end = start - room, end + room

    def x(number: float) -> float:
        return 4 + (width - 8) * (number - start) / (end - start)

    svg = _svg(width, height, "effect", finding.metric.replace("_", " "), description)
    if margin is not None:
        _draw(svg, "rect", class_="zone", x=x(margin), y=2, width=width - x(margin), height=floor - 2)
        _draw(svg, "rect", fill=f"url(#{HATCH})", x=x(margin), y=2, width=width - x(margin), height=floor - 2)
        _draw(svg, "line", class_="margin", x1=x(margin), x2=x(margin), y1=2, y2=floor)
    _draw(svg, "line", class_="axis", x1=0, x2=width, y1=floor, y2=floor)
    _draw(svg, "line", class_="axis", x1=x(0), x2=x(0), y1=2, y2=floor)
    if low is not None and high is not None:
        _draw(svg, "path", class_="interval", d=f"M{x(low):.1f} {middle}H{x(high):.1f}")
        for end_of_interval in (low, high):
            _draw(svg, "path", class_="interval", d=f"M{x(end_of_interval):.1f} {middle - 5}v10")
    _draw(svg, "path", class_="point", d=_diamond(x(effect), middle, 6))
    no_change, most = "no change", f"max {finding.margin.text[:12]}" if finding.margin else ""
    zero_x = _inside(x(0), no_change, width)
    _draw(svg, "text", no_change, x=zero_x, y=height - 5, text_anchor="middle")
    if margin is not None:
        margin_x = _inside(x(margin), most, width)
        # Where the labels would overlap, the margin's own column says it.
        if abs(margin_x - zero_x) > _half_width(most) + _half_width(no_change):
            _draw(svg, "text", most, x=margin_x, y=height - 5, text_anchor="middle")
    return _text(svg)


def visits_svg(columns: Sequence[Column], description: str) -> str:
    """Draw every visit's inference times in time order on one axis; "" where no visit has samples."""
    timed = [column for column in columns if column.samples_s]
    if not timed:
        return ""
    low_s = min(column.samples_s[0] for column in timed)
    # One visit's spikes must not flatten all the others; what lies beyond the top gets a sign there.
    p95s_s = sorted(quantile(column.samples_s, 0.95) for column in timed)
    top_s = max(quantile(p95s_s, 0.9), *(quantile(column.samples_s, 0.75) for column in timed))
    low_s, high_s = _padded(low_s, top_s)
    top, bottom, height = 20.0, 262.0, 304.0
    layout = _layout(columns)

    def y(seconds: float) -> float:
        return bottom - (bottom - top) * (seconds - low_s) / (high_s - low_s)

    svg = _svg(layout.width, height, "visits", "Inference times of every visit", description)
    for tick_s, label in time_ticks(low_s, high_s):
        _grid_line(svg, y(tick_s), label, width=layout.width)
    _stripes(svg, layout, top, bottom)
    _block_numbers(svg, layout, bottom + (32 if layout.pitch >= 10 else 16))
    has_dots = sum(len(column.samples_s) for column in columns) <= _MAX_DOTS and layout.pitch >= 8
    for column, x in zip(columns, layout.places, strict=True):
        _draw_visit(svg, column, x, pitch=layout.pitch, y=y, top=top, bottom=bottom, has_dots=has_dots)
    return _text(svg)


def ratios_svg(columns: Sequence[Column], finding: Finding | None, description: str) -> str:
    """Draw, for each block that counts, by how much the candidate is slower than the baseline.

    The effect's interval is drawn behind the points and the margin as a line where both are relative. "" where no block
    has both sides.
    """
    ratios = block_ratios(columns)
    if not ratios:
        return ""
    marked = [0.0, *ratios.values()]
    is_relative = finding is not None and (finding.margin is None or finding.margin.kind == "relative")
    interval: tuple[float, float] | None = None
    margin: float | None = None
    if finding is not None and is_relative:
        low, high = finite(finding.low), finite(finding.high)
        interval = (low, high) if low is not None and high is not None else None
        margin = finding.margin.value if finding.margin else None
        marked += [*(interval or ()), *([margin] if margin is not None else [])]
    room = max(0.08 * (max(marked) - min(marked)), 0.005)
    start, end = min(marked) - room, max(marked) + room
    top, bottom, height = 10.0, 160.0, 186.0
    layout = _layout(columns)
    width = layout.width

    def y(fraction: float) -> float:
        return bottom - (bottom - top) * (fraction - start) / (end - start)

    svg = _svg(width, height, "ratios", "Candidate against baseline, block by block", description)
    if margin is not None:
        _draw(svg, "rect", class_="zone", x=_LEFT, y=top, width=width - _LEFT, height=y(margin) - top)
        _draw(svg, "rect", fill=f"url(#{HATCH})", x=_LEFT, y=top, width=width - _LEFT, height=y(margin) - top)
        _draw(svg, "line", class_="margin", x1=_LEFT, x2=width, y1=y(margin), y2=y(margin))
    if interval is not None:
        high_y, low_y = y(interval[1]), y(interval[0])
        _draw(svg, "rect", class_="band", x=_LEFT, y=high_y, width=width - _LEFT, height=max(low_y - high_y, 1))
    step = _nice_step((end - start) / 5)
    for number in range(round(start / step) - 1, round(end / step) + 2):
        if start <= number * step <= end:
            label = f"{number * step * 100:+.3g} %" if number else "0"
            _grid_line(svg, y(number * step), label, width=width, kind="grid" if number else "axis")
    _block_numbers(svg, layout, height - 8)
    for group, ratio in ratios.items():
        inside = layout.blocks[group]
        point = _draw(
            svg, "path", class_="point", d=_diamond(sum(inside) / len(inside), y(ratio), min(5.5, layout.pitch))
        )
        _draw(point, "title", f"block {group[1]}: {format_change(ratio)}")
    return _text(svg)


def key_svg(side: Side) -> str:
    """Draw a side's sign for the legend."""
    svg = _svg(22.0, 16.0, f"key {side}", side, f"the sign of the {side}")
    _draw(svg, "rect", class_="box", x=4, y=1.5, width=14, height=13)
    _median_sign(svg, side, 11, 8, 4.5)
    return _text(svg)


def block_ratios(columns: Sequence[Column]) -> dict[tuple[int, int], float]:
    """Return, for each block that counts, by what fraction the candidate is slower than the baseline.

    It is what the gate judges: the median over pairs of neighbouring bursts of the ratio of their medians, or the ratio
    of the visits' medians where no bursts pair up.
    """
    ratios = {}
    for group in dict.fromkeys(column.group for column in columns):
        inside = [column for column in columns if column.group == group]
        before, after = [_burst_medians_s(inside, side) for side in ("baseline", "candidate")]
        pairs = [(before[pair], after[pair]) for pair in before if pair in after]
        if not pairs:
            pairs = list(zip(_visit_median_s(inside, "baseline"), _visit_median_s(inside, "candidate"), strict=False))
        if pairs and not any(column.mark for column in inside) and all(old_s > 0 for old_s, _ in pairs):
            ratios[group] = statistics.median(new_s / old_s for old_s, new_s in pairs) - 1
    return ratios


def _burst_medians_s(columns: Sequence[Column], side: str) -> dict[int, float]:
    samples_s: dict[int, list[float]] = {}
    for column in columns:
        for burst in column.visit.bursts if column.side == side else ():
            samples_s.setdefault(burst.pair, []).extend(burst.samples_s)
    return {pair: statistics.median(burst_s) for pair, burst_s in samples_s.items() if burst_s}


def _visit_median_s(columns: Sequence[Column], side: str) -> list[float]:
    medians_s = [quantile(column.samples_s, 0.5) for column in columns if column.side == side and column.samples_s]
    return [statistics.fmean(medians_s)] if medians_s else []


def _draw_visit(
    svg: ET.Element,
    column: Column,
    x: float,
    *,
    pitch: float,
    y: Callable[[float], float],
    top: float,
    bottom: float,
    has_dots: bool,
) -> None:
    half = min(pitch * 0.36, 9.0)
    drawn = _draw(svg, "g", class_=f"visit {column.side}{' dropped' if column.mark else ''}")
    _draw(drawn, "title", _visit_title(column))
    if column.mark:
        _draw(drawn, "rect", fill=f"url(#{HATCH})", x=x - pitch / 2, y=top, width=pitch, height=bottom - top)
        if pitch >= 6:
            _draw(drawn, "text", f"✕{column.mark}", x=x, y=top - 6, text_anchor="middle")
        else:
            _draw(drawn, "line", class_="drop-mark", x1=x, x2=x, y1=top - 8, y2=top)
    if pitch >= 10:
        _draw(drawn, "text", column.side[0].upper(), x=x, y=bottom + 15, text_anchor="middle")
    samples_s = column.samples_s
    if not samples_s:
        return

    def kept(seconds: float) -> float:
        return min(max(y(seconds), top), bottom)

    if has_dots:
        # The golden ratio spreads neighbours over the box without randomness.
        dots = (
            f"M{x + half * 1.7 * ((number * 0.618) % 1 - 0.5):.1f} {y(sample_s):.1f}h0"
            for number, sample_s in enumerate(samples_s)
            if y(sample_s) >= top
        )
        _draw(drawn, "path", class_="dots", d="".join(dots))
    p5, p25, p50, p75, p95 = (kept(quantile(samples_s, share)) for share in (0.05, 0.25, 0.5, 0.75, 0.95))
    if half >= 2.5:
        _draw(drawn, "path", class_="whisker", d=f"M{x:.1f} {p5:.1f}V{p25:.1f}M{x:.1f} {p75:.1f}V{p95:.1f}")
        _draw(drawn, "rect", class_="box", x=x - half, y=p75, width=2 * half, height=max(p25 - p75, 1))
    else:
        _draw(drawn, "path", class_="whisker", d=f"M{x:.1f} {p5:.1f}V{p95:.1f}")
    _median_sign(drawn, column.side, x, p50, min(half, 4.5))
    if y(samples_s[-1]) < top and half >= 2.5:
        _draw(drawn, "path", class_="beyond", d=f"M{x - 3:.1f} {top + 5}h6l-3 -5z")


def _median_sign(parent: ET.Element, side: Side, x: float, y: float, size: float) -> None:
    size = max(size, 1.2)
    if side == "baseline":
        _draw(parent, "circle", class_="median", cx=x, cy=y, r=size * 0.8)
    else:
        _draw(parent, "path", class_="median", d=_diamond(x, y, size))


def _visit_title(column: Column) -> str:
    where = f"{column.side}, block {column.visit.block}, visit {column.visit.position}"
    dropped = f"; dropped: {drop_reason(column.visit)}" if column.mark else ""
    if not column.samples_s:
        return f"{where}: no samples{dropped}"
    samples_s = column.samples_s
    median = format_duration(quantile(samples_s, 0.5))
    span = f"{format_duration(samples_s[0])} to {format_duration(samples_s[-1])}"
    return f"{where}: median {median}, {span}, {count(len(samples_s), 'sample')}{dropped}"


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where columns stand.

    Attributes:
        places: each column's x.
        pitch: the distance between neighbours; blocks stand a little further apart.
        blocks: each group and the x of its columns.
    """

    places: list[float]
    pitch: float
    width: float
    blocks: dict[tuple[int, int], list[float]]


def _layout(columns: Sequence[Column]) -> _Layout:
    gap = 0.7
    blocks: dict[tuple[int, int], list[float]] = {column.group: [] for column in columns}
    pitch = min(max((_WIDTH - _LEFT - _RIGHT) / (len(columns) + gap * len(blocks)), 2.2), 34.0)
    places: list[float] = []
    x = _LEFT + pitch * (gap + 1) / 2
    for number, column in enumerate(columns):
        if number and column.group != columns[number - 1].group:
            x += gap * pitch
        places.append(x)
        blocks[column.group].append(x)
        x += pitch
    return _Layout(places, pitch, max(_WIDTH, x + _RIGHT), blocks)


def _stripes(svg: ET.Element, layout: _Layout, top: float, bottom: float) -> None:
    for number, inside in enumerate(layout.blocks.values()):
        if number % 2:
            start, width = inside[0] - layout.pitch * 0.85, inside[-1] - inside[0] + layout.pitch * 1.7
            _draw(svg, "rect", class_="stripe", x=start, y=top, width=width, height=bottom - top)


def _block_numbers(svg: ET.Element, layout: _Layout, y: float) -> None:
    _draw(svg, "text", "block", x=_LEFT - 8, y=y, text_anchor="end")
    last = float("-inf")
    for (_, block), inside in layout.blocks.items():
        middle = (inside[0] + inside[-1]) / 2
        if middle - last >= 24:
            _draw(svg, "text", str(block), x=middle, y=y, text_anchor="middle")
            last = middle


def _grid_line(svg: ET.Element, y: float, label: str, *, width: float, kind: str = "grid") -> None:
    _draw(svg, "line", class_=kind, x1=_LEFT, x2=width, y1=y, y2=y)
    _draw(svg, "text", label, x=_LEFT - 8, y=y + 4, text_anchor="end")


def time_ticks(low_s: float, high_s: float) -> list[tuple[float, str]]:
    """Return round durations between two, with labels that all differ."""
    step_s = _nice_step((high_s - low_s) / 5)
    while True:
        numbers = range(int(low_s / step_s), int(high_s / step_s) + 2)
        ticks = [(n * step_s, format_duration(n * step_s)) for n in numbers if low_s <= n * step_s <= high_s]
        if len({label for _, label in ticks}) == len(ticks):
            return ticks
        step_s = _nice_step(step_s * 1.5)


def _padded(low_s: float, high_s: float) -> tuple[float, float]:
    """Widen an axis: some air, and at least 6 %, for a narrower one shows noise as if it were something."""
    missing_s = max(0.06 * high_s - (high_s - low_s), 1e-9)
    room_s = 0.12 * (high_s - low_s) + missing_s / 2
    return max(low_s - room_s / 2, 0.0), high_s + room_s


def _nice_step(at_least: float) -> float:
    """Return the smallest 1, 2 or 5 times a power of ten that is not below a positive number.

    >>> _nice_step(0.3), _nice_step(7)
    (0.5, 10.0)
    """
    power = float(f"1e{math.floor(math.log10(at_least))}")
    return next(step * power for step in (1, 2, 5, 10) if step * power >= at_least * (1 - 1e-9))


def _diamond(x: float, y: float, size: float) -> str:
    return f"M{x:.1f} {y - size:.1f}l{size:.1f} {size:.1f}l{-size:.1f} {size:.1f}l{-size:.1f} {-size:.1f}z"


def _half_width(label: str) -> float:
    return 3.9 * len(label)  # digits and signs at 11 px are up to 8 px wide


def _inside(x: float, label: str, width: float) -> float:
    return min(max(x, _half_width(label)), width - _half_width(label))


def _svg(width: float, height: float, kind: str, title: str, description: str) -> ET.Element:
    svg = ET.Element("svg", {"class": kind, "viewBox": f"0 0 {width:.0f} {height:.0f}", "role": "img"})
    svg.set("style", f"--width: {width:.0f}px")
    _draw(svg, "title", title)
    _draw(svg, "desc", description)
    return svg


def _draw(parent: ET.Element, tag: str, content: str = "", **attributes: str | float) -> ET.Element:
    """Add an element; class_ is written class, text_anchor is written text-anchor."""
    element = ET.SubElement(parent, tag)
    for name, value in attributes.items():
        text = printable(value) if isinstance(value, str) else f"{value:.1f}"
        element.set(name.rstrip("_").replace("_", "-"), text)
    if content:
        element.text = printable(content)
    return element


def _text(svg: ET.Element) -> str:
    return ET.tostring(svg, encoding="unicode")
