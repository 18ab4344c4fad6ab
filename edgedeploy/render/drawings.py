"""Small charts as SVG text that takes its colours from the page: an effect against its margin, visits in time order."""

from __future__ import annotations

import statistics
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from edgedeploy.records.run import Run, Visit
from edgedeploy.records.verdict import Finding, LimitFinding
from edgedeploy.render.figures import (
    P95_MIN_SAMPLES,
    count,
    drop_reason,
    finite,
    gigahertz,
    hottest_celsius,
    one_line,
    quantile,
    visit_samples_s,
)
from edgedeploy.render.svg import (
    LEFT,
    RIGHT,
    WIDTH,
    diamond,
    draw,
    grid_line,
    half_width,
    kept_inside,
    new_svg,
    nice_step,
    padded,
    svg_text,
    time_ticks,
)
from edgedeploy.units import format_bytes, format_change, format_duration

Side = Literal["baseline", "candidate"]

HATCH = "hatch"  # the page defines the pattern once under this id
MAX_DOTS = 6000  # samples drawn one by one; beyond it a page takes seconds to open and the dots are a blur anyway


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
    margin = finding.margin if finding.margin and finding.margin.kind != "limit" else None
    return _plot(
        effect,
        (finite(finding.low), finite(finding.high)),
        margin.value if margin else None,
        origin=(0.0, "no change"),
        bound_label=f"max {margin.text[:12]}" if margin else "",
        title=finding.metric.replace("_", " "),
        description=description,
    )


def limit_svg(found: LimitFinding, title: str, description: str) -> str:
    """Draw the candidate's own value and interval against its limit. "" without a value."""
    value = finite(found.value)
    if value is None:
        return ""
    return _plot(
        value,
        (finite(found.low), finite(found.high)),
        found.limit,
        origin=None,
        bound_label="least" if found.is_floor else "most",
        title=title,
        description=description,
        is_floor=found.is_floor,
    )


def _plot(
    point: float,
    interval: tuple[float | None, float | None],
    bound: float | None,
    *,
    origin: tuple[float, str] | None,
    bound_label: str,
    title: str,
    description: str,
    is_floor: bool = False,
) -> str:
    """Draw a number with its interval, and hatch what lies beyond a bound."""
    low, high = interval
    marked = [number for number in (point, low, high, bound, origin[0] if origin else None) if number is not None]
    width, height, middle, floor = 260.0, 52.0, 17.0, 34.0
    start, end = min(marked), max(marked)
    room = 0.12 * (end - start) or abs(end) * 0.1 or 1.0
    start, end = start - room, end + room

    def x(number: float) -> float:
        return 4 + (width - 8) * (number - start) / (end - start)

    svg = new_svg(width, height, "effect", title, description)
    if bound is not None:
        left, right = (0.0, x(bound)) if is_floor else (x(bound), width)
        for fill in ({"class_": "zone"}, {"fill": f"url(#{HATCH})"}):
            draw(svg, "rect", **fill, x=left, y=2.0, width=right - left, height=floor - 2)
        draw(svg, "line", class_="margin", x1=x(bound), x2=x(bound), y1=2, y2=floor)
    draw(svg, "line", class_="axis", x1=0, x2=width, y1=floor, y2=floor)
    if origin is not None:
        draw(svg, "line", class_="axis", x1=x(origin[0]), x2=x(origin[0]), y1=2, y2=floor)
    if low is not None and high is not None:
        draw(svg, "path", class_="interval", d=f"M{x(low):.1f} {middle}H{x(high):.1f}")
        for end_of_interval in (low, high):
            draw(svg, "path", class_="interval", d=f"M{x(end_of_interval):.1f} {middle - 5}v10")
    draw(svg, "path", class_="point", d=diamond(x(point), middle, 6))
    origin_x = float("-inf")
    if origin is not None:
        origin_x = kept_inside(x(origin[0]), origin[1], width)
        draw(svg, "text", origin[1], x=origin_x, y=height - 5, text_anchor="middle")
    if bound is not None:
        bound_x = kept_inside(x(bound), bound_label, width)
        # Where the labels would overlap, the margin's own column says it.
        if origin is None or abs(bound_x - origin_x) > half_width(bound_label) + half_width(origin[1]):
            draw(svg, "text", bound_label, x=bound_x, y=height - 5, text_anchor="middle")
    return svg_text(svg)


def visits_svg(columns: Sequence[Column], description: str, *, most_dots: int = MAX_DOTS) -> str:
    """Draw every visit's inference times in time order on one axis; "" where no visit has samples."""
    timed = [column for column in columns if column.samples_s]
    if not timed:
        return ""
    low_s = min(column.samples_s[0] for column in timed)
    # One visit's spikes must not flatten all the others; what lies beyond the top gets a sign there.
    p95s_s = sorted(quantile(column.samples_s, 0.95) for column in timed)
    top_s = max(quantile(p95s_s, 0.9), *(quantile(column.samples_s, 0.75) for column in timed))
    low_s, high_s = padded(low_s, top_s)
    top, bottom, height = 20.0, 262.0, 304.0
    layout = _layout(columns)

    def y(seconds: float) -> float:
        return bottom - (bottom - top) * (seconds - low_s) / (high_s - low_s)

    svg = new_svg(layout.width, height, "visits", "Inference times of every visit", description)
    for tick_s, label in time_ticks(low_s, high_s):
        grid_line(svg, y(tick_s), label, width=layout.width)
    _stripes(svg, layout, top, bottom)
    _block_numbers(svg, layout, bottom + (32 if layout.pitch >= 10 else 16))
    has_dots = sum(len(column.samples_s) for column in columns) <= most_dots and layout.pitch >= 8
    for column, x in zip(columns, layout.places, strict=True):
        _draw_visit(svg, column, x, pitch=layout.pitch, y=y, top=top, bottom=bottom, has_dots=has_dots)
    return svg_text(svg)


def ratios_svg(columns: Sequence[Column], finding: Finding | None, description: str) -> str:
    """Draw, for each block that counts, by how much the candidate is slower than the baseline.

    The effect's interval is drawn behind the points and the margin as a line where both are relative. "" where no block
    has both sides.
    """
    ratios = block_ratios(columns)
    if not ratios:
        return ""
    marked = [0.0, *ratios.values()]
    is_relative = finding is not None and (finding.margin is None or finding.margin.kind in ("relative", "limit"))
    interval: tuple[float, float] | None = None
    margin: float | None = None
    if finding is not None and is_relative:
        low, high = finite(finding.low), finite(finding.high)
        interval = (low, high) if low is not None and high is not None else None
        margin = finding.margin.value if finding.margin and finding.margin.kind == "relative" else None
        marked += [*(interval or ()), *([margin] if margin is not None else [])]
    room = max(0.08 * (max(marked) - min(marked)), 0.005)
    start, end = min(marked) - room, max(marked) + room
    top, bottom, height = 10.0, 160.0, 186.0
    layout = _layout(columns)
    width = layout.width

    def y(fraction: float) -> float:
        return bottom - (bottom - top) * (fraction - start) / (end - start)

    svg = new_svg(width, height, "ratios", "Candidate against baseline, block by block", description)
    if margin is not None:
        draw(svg, "rect", class_="zone", x=LEFT, y=top, width=width - LEFT, height=y(margin) - top)
        draw(svg, "rect", fill=f"url(#{HATCH})", x=LEFT, y=top, width=width - LEFT, height=y(margin) - top)
        draw(svg, "line", class_="margin", x1=LEFT, x2=width, y1=y(margin), y2=y(margin))
    if interval is not None:
        high_y, low_y = y(interval[1]), y(interval[0])
        draw(svg, "rect", class_="band", x=LEFT, y=high_y, width=width - LEFT, height=max(low_y - high_y, 1))
    step = nice_step((end - start) / 5)
    for number in range(round(start / step) - 1, round(end / step) + 2):
        if start <= number * step <= end:
            label = f"{number * step * 100:+.3g} %" if number else "0"
            grid_line(svg, y(number * step), label, width=width, kind="grid" if number else "axis")
    _block_numbers(svg, layout, height - 8)
    for group, ratio in ratios.items():
        inside = layout.blocks[group]
        point = draw(
            svg, "path", class_="point", d=diamond(sum(inside) / len(inside), y(ratio), min(5.5, layout.pitch))
        )
        draw(point, "title", f"block {group[1]}: {format_change(ratio)}")
    return svg_text(svg)


def key_svg(side: Side) -> str:
    """Draw a side's sign for the legend."""
    svg = new_svg(22.0, 16.0, f"key {side}", side, f"the sign of the {side}")
    draw(svg, "rect", class_="box", x=4, y=1.5, width=14, height=13)
    median_sign(svg, side, 11, 8, 4.5)
    return svg_text(svg)


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
    drawn = draw(svg, "g", class_=f"visit {column.side}{' dropped' if column.mark else ''}")
    draw(drawn, "title", _visit_title(column))
    if column.mark:
        draw(drawn, "rect", fill=f"url(#{HATCH})", x=x - pitch / 2, y=top, width=pitch, height=bottom - top)
        if pitch >= 6:
            draw(drawn, "text", f"✕{column.mark}", x=x, y=top - 6, text_anchor="middle")
        else:
            draw(drawn, "line", class_="drop-mark", x1=x, x2=x, y1=top - 8, y2=top)
    # What pointer and finger meet: the shapes themselves are too thin.
    draw(drawn, "rect", class_="hit", x=x - pitch / 2, y=top, width=pitch, height=bottom - top)
    if pitch >= 10:
        draw(drawn, "text", column.side[0].upper(), x=x, y=bottom + 15, text_anchor="middle")
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
        draw(drawn, "path", class_="dots", d="".join(dots))
    p5, p25, p50, p75, p95 = (kept(quantile(samples_s, share)) for share in (0.05, 0.25, 0.5, 0.75, 0.95))
    if half >= 2.5:
        draw(drawn, "path", class_="whisker", d=f"M{x:.1f} {p5:.1f}V{p25:.1f}M{x:.1f} {p75:.1f}V{p95:.1f}")
        draw(drawn, "rect", class_="box", x=x - half, y=p75, width=2 * half, height=max(p25 - p75, 1))
    else:
        draw(drawn, "path", class_="whisker", d=f"M{x:.1f} {p5:.1f}V{p95:.1f}")
    median_sign(drawn, column.side, x, p50, min(half, 4.5))
    if y(samples_s[-1]) < top and half >= 2.5:
        draw(drawn, "path", class_="beyond", d=f"M{x - 3:.1f} {top + 5}h6l-3 -5z")


def median_sign(parent: ET.Element, side: Side, x: float, y: float, size: float) -> None:
    """Draw the sign of a side: a ring, or a square on its tip."""
    size = max(size, 1.2)
    if side == "baseline":
        draw(parent, "circle", class_="median", cx=x, cy=y, r=size * 0.8)
    else:
        draw(parent, "path", class_="median", d=diamond(x, y, size))


def _visit_title(column: Column) -> str:
    """Return what there is to know about a visit, a fact a line; a browser shows it where the pointer rests."""
    visit, samples_s = column.visit, column.samples_s
    lines = [f"{column.side}, block {visit.block}, visit {visit.position}"]
    if column.mark:
        lines.append(f"dropped: {drop_reason(visit)}")
    if samples_s:
        p95 = f", p95 {format_duration(quantile(samples_s, 0.95))}" if len(samples_s) >= P95_MIN_SAMPLES else ""
        lines += [
            f"p50 {format_duration(quantile(samples_s, 0.5))}{p95}",
            f"{format_duration(samples_s[0])} to {format_duration(samples_s[-1])}, {count(len(samples_s), 'sample')}",
        ]
    else:
        lines.append("no samples")
    lines.append(f"load {format_duration(visit.load_s)}, first inference {format_duration(visit.first_inference_s)}")
    if not visit.is_steady:
        lines.append("not steady when the warm-up reached its cap")
    return "\n".join([*lines, *_moment_lines(visit)])


def _moment_lines(visit: Visit) -> list[str]:
    """Return the conditions before and after a visit, where the device says any."""
    moments = (visit.before, visit.after)
    clocks_hz = [clock for moment in moments for clock in moment.cpu_clocks_hz or ()]
    degrees = [celsius for moment in moments if (celsius := hottest_celsius(moment)) is not None]
    facts = []
    if degrees:
        facts.append(" → ".join(dict.fromkeys(f"{celsius:.0f} °C" for celsius in degrees)))
    if clocks_hz:
        facts.append(" to ".join(dict.fromkeys((gigahertz(min(clocks_hz)), gigahertz(max(clocks_hz))))))
    if visit.foreign_load is not None:
        facts.append(f"{visit.foreign_load:.2f} cores taken by others")
    if visit.after.free_memory_bytes is not None:
        facts.append(f"{format_bytes(visit.after.free_memory_bytes)} free")
    reasons = dict.fromkeys(one_line(reason) for moment in moments for reason in moment.throttle_reasons or ())
    if any(moment.throttled for moment in moments):
        facts.append(f"throttled{': ' if reasons else ''}{', '.join(reasons)}")
    return facts


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
    pitch = min(max((WIDTH - LEFT - RIGHT) / (len(columns) + gap * len(blocks)), 2.2), 34.0)
    places: list[float] = []
    x = LEFT + pitch * (gap + 1) / 2
    for number, column in enumerate(columns):
        if number and column.group != columns[number - 1].group:
            x += gap * pitch
        places.append(x)
        blocks[column.group].append(x)
        x += pitch
    return _Layout(places, pitch, max(WIDTH, x + RIGHT), blocks)


def _stripes(svg: ET.Element, layout: _Layout, top: float, bottom: float) -> None:
    for number, inside in enumerate(layout.blocks.values()):
        if number % 2:
            start, width = inside[0] - layout.pitch * 0.85, inside[-1] - inside[0] + layout.pitch * 1.7
            draw(svg, "rect", class_="stripe", x=start, y=top, width=width, height=bottom - top)


def _block_numbers(svg: ET.Element, layout: _Layout, y: float) -> None:
    draw(svg, "text", "block", x=LEFT - 8, y=y, text_anchor="end")
    last = float("-inf")
    for (_, block), inside in layout.blocks.items():
        middle = (inside[0] + inside[-1]) / 2
        if middle - last >= 24:
            draw(svg, "text", str(block), x=middle, y=y, text_anchor="middle")
            last = middle
