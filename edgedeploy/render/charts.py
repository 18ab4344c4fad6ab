"""Charts of a cell as SVG text: a distribution, conditions over time, single figures of visits. Pure."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence

from edgedeploy.render.drawings import Side, median_sign
from edgedeploy.render.figures import count
from edgedeploy.render.series import Distribution, Panel, Strip
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
from edgedeploy.units import format_duration


def distribution_svg(shown: Distribution, description: str) -> str:
    """Draw which share of the inferences took no longer than a time, a curve for each side."""
    top, bottom, height = 12.0, 206.0, 232.0
    low_s, high_s = padded(shown.times_s[0], shown.times_s[-1], least=0.02)

    def x(seconds: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (seconds - low_s) / (high_s - low_s)

    def y(share: float) -> float:
        return bottom - (bottom - top) * share

    svg = new_svg(WIDTH, height, "distribution", "Distribution of inference times", description)
    for percent in (0, 25, 50, 75, 100):
        grid_line(svg, y(percent / 100), f"{percent} %", width=WIDTH, kind="grid" if percent else "axis")
    for tick_s, label in time_ticks(low_s, high_s):
        draw(svg, "line", class_="grid", x1=x(tick_s), x2=x(tick_s), y1=top, y2=bottom)
        draw(svg, "text", label, x=kept_inside(x(tick_s), label, WIDTH), y=bottom + 17, text_anchor="middle")
    for side, shares in (("baseline", shown.baseline), ("candidate", shown.candidate)):
        if shares:
            points = " ".join(
                f"{x(time_s):.1f},{y(share):.1f}" for time_s, share in zip(shown.times_s, shares, strict=True)
            )
            draw(svg, "polyline", class_=f"curve {side}", points=points)
    return svg_text(svg)


def line_key_svg(side: Side) -> str:
    """Draw how a side's curve looks, for the legend."""
    svg = new_svg(34.0, 10.0, "line-key", side, f"the curve of the {side}")
    draw(svg, "path", class_=f"curve {side}", d="M1 5H33")
    return svg_text(svg)


def panel_svg(panel: Panel, description: str) -> str:
    """Draw one quantity over the time of a session."""
    top, bottom, height = 8.0, 84.0, 104.0
    points = [*panel.baseline, *panel.candidate]
    least, most = min(value for _, value in points), max(value for _, value in points)
    low, high = _axis(least, most)
    end_s = max(1.0, *(time_s for time_s, _ in points))

    def x(seconds: float) -> float:
        return LEFT + 4 + (WIDTH - LEFT - RIGHT - 8) * seconds / end_s

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / (high - low)

    svg = new_svg(WIDTH, height, "panel", panel.title, description)
    labels = {panel.text(tick): tick for tick in _round_values(low, high, panel.scale)}
    for label, tick in labels.items():
        grid_line(svg, y(tick), label, width=WIDTH)
    draw(svg, "line", class_="axis", x1=LEFT, x2=WIDTH, y1=bottom, y2=bottom)
    for tick_s in ticks(0.0, end_s, most=8):
        label = _since(tick_s)
        draw(svg, "text", label, x=kept_inside(x(tick_s), label, WIDTH), y=bottom + 15, text_anchor="middle")
    for side, readings in (("baseline", panel.baseline), ("candidate", panel.candidate)):
        if len(readings) > 1:
            line = " ".join(f"{x(time_s):.1f},{y(value):.1f}" for time_s, value in readings)
            draw(svg, "polyline", class_=f"curve thin {side}", points=line)
        dots = "".join(f"M{x(time_s):.1f} {y(value):.1f}h0" for time_s, value in readings)
        if dots:
            draw(svg, "path", class_=f"readings {side}", d=dots)
    return svg_text(svg)


def _round_values(low: float, high: float, scale: float) -> list[float]:
    """Return values between two that are round in the unit that people read."""
    return [tick / scale for tick in ticks(low * scale, high * scale, most=3)]


def _axis(least: float, most: float) -> tuple[float, float]:
    """Return the ends of an axis that holds two values; idle rails may be measured a little below zero."""
    if least == most == 0:
        return 0.0, 1.0
    if least < 0:
        room = 0.1 * (most - least) or abs(most)
        return least - room, most + room
    return padded(least, most)


def _since(seconds: float) -> str:
    """Print a time since the beginning.

    >>> _since(0), _since(90), _since(5400)
    ('0 s', '90 s', '1 h 30 min')
    """
    if seconds < 600:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min".replace(" 00 min", "")


def strip_svg(strip: Strip, description: str) -> str:
    """Draw one dot a visit, the baseline's above the candidate's."""
    width, height, floor = 360.0, 74.0, 50.0
    values = [*strip.baseline, *strip.candidate]
    low, high = padded(min(values), max(values))

    def x(value: float) -> float:
        return 22 + (width - 34) * (value - low) / (high - low)

    svg = new_svg(width, height, "strip", strip.title, description)
    draw(svg, "line", class_="axis", x1=18, x2=width - 8, y1=floor, y2=floor)
    last = float("-inf")
    for tick in _round_values(low, high, strip.scale):
        label = strip.text(tick) if tick else "0"
        place = kept_inside(x(tick), label, width)
        draw(svg, "line", class_="grid", x1=x(tick), x2=x(tick), y1=4, y2=floor)
        if place - last >= 62:
            draw(svg, "text", label, x=place, y=floor + 17, text_anchor="middle")
            last = place
    lanes: tuple[tuple[Side, float, tuple[float, ...]], ...] = (
        ("baseline", 16.0, strip.baseline),
        ("candidate", 37.0, strip.candidate),
    )
    for side, lane, numbers in lanes:
        drawn = draw(svg, "g", class_=side)
        draw(drawn, "text", side[0].upper(), x=6, y=lane + 4, text_anchor="middle")
        if not numbers:
            draw(drawn, "text", "not measured", x=24, y=lane + 4)
        for number in numbers:
            median_sign(drawn, side, x(number), lane, 4.5)
    return svg_text(svg)


def strip_words(strip: Strip) -> str:
    """Say in words what a strip shows, for who does not see it."""
    return "; ".join(
        f"{side}: {strip.text(min(numbers))} to {strip.text(max(numbers))} in {count(len(numbers), 'visit')}"
        for side, numbers in (("baseline", strip.baseline), ("candidate", strip.candidate))
        if numbers
    )


def sentinel_svg(readings: Sequence[tuple[int, float]], description: str) -> str:
    """Draw the medians of the sentinel's visits in time order; "" without two of them."""
    if len(readings) < 2:
        return ""
    top, bottom, height = 8.0, 84.0, 104.0
    low_s, high_s = padded(min(median_s for _, median_s in readings), max(median_s for _, median_s in readings))
    step = (WIDTH - LEFT - RIGHT) / len(readings)

    def y(seconds: float) -> float:
        return bottom - (bottom - top) * (seconds - low_s) / (high_s - low_s)

    svg = new_svg(WIDTH, height, "panel", "The sentinel", description)
    for tick_s, label in time_ticks(low_s, high_s)[:4]:
        grid_line(svg, y(tick_s), label, width=WIDTH)
    places = [LEFT + step * (number + 0.5) for number in range(len(readings))]
    line = " ".join(f"{place:.1f},{y(median_s):.1f}" for place, (_, median_s) in zip(places, readings, strict=True))
    draw(svg, "polyline", class_="curve thin sentinel", points=line)
    last = float("-inf")
    for place, (block, median_s) in zip(places, readings, strict=True):
        _dot(svg, place, y(median_s), f"{_when(block)}: {format_duration(median_s)}")
        label = _when(block)
        if place - last > 7.0 * len(label):
            draw(svg, "text", label, x=kept_inside(place, label, WIDTH), y=bottom + 15, text_anchor="middle")
            last = place
    return svg_text(svg)


def _when(block: int) -> str:
    return "before the blocks" if block < 0 else f"after {count(block, 'block')}"


def _dot(svg: ET.Element, x: float, y: float, words: str) -> None:
    point = draw(svg, "circle", class_="point", cx=x, cy=y, r=4)
    draw(point, "title", words)
