"""SVG text that takes its colours from the page: elements, signs, axes with round labels. Pure."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

from edgedeploy.render.figures import printable
from edgedeploy.units import format_duration

WIDTH = 760.0
LEFT, RIGHT = 62.0, 8.0


def new_svg(width: float, height: float, kind: str, title: str, description: str) -> ET.Element:
    """Begin a drawing; a screen reader says its title and description."""
    svg = ET.Element("svg", {"class": kind, "viewBox": f"0 0 {width:.0f} {height:.0f}", "role": "img"})
    svg.set("style", f"--width: {width:.0f}px")
    draw(svg, "title", title)
    draw(svg, "desc", description)
    return svg


def draw(parent: ET.Element, tag: str, content: str = "", **attributes: str | float) -> ET.Element:
    """Add an element; class_ is written class, text_anchor is written text-anchor."""
    element = ET.SubElement(parent, tag)
    for name, value in attributes.items():
        text = printable(value) if isinstance(value, str) else f"{value:.1f}"
        element.set(name.rstrip("_").replace("_", "-"), text)
    if content:
        element.text = printable(content)
    return element


def svg_text(svg: ET.Element) -> str:
    """Return a finished drawing as text."""
    return ET.tostring(svg, encoding="unicode")


def diamond(x: float, y: float, size: float) -> str:
    """Return the path of a square on its tip."""
    return f"M{x:.1f} {y - size:.1f}l{size:.1f} {size:.1f}l{-size:.1f} {size:.1f}l{-size:.1f} {-size:.1f}z"


def grid_line(svg: ET.Element, y: float, label: str, *, width: float, kind: str = "grid") -> None:
    """Draw a horizontal line with its label left of it."""
    draw(svg, "line", class_=kind, x1=LEFT, x2=width, y1=y, y2=y)
    draw(svg, "text", label, x=LEFT - 8, y=y + 4, text_anchor="end")


def time_ticks(low_s: float, high_s: float) -> list[tuple[float, str]]:
    """Return round durations between two, with labels that all differ."""
    step_s = nice_step((high_s - low_s) / 5)
    while True:
        numbers = range(int(low_s / step_s), int(high_s / step_s) + 2)
        ticks = [(n * step_s, format_duration(n * step_s)) for n in numbers if low_s <= n * step_s <= high_s]
        if len({label for _, label in ticks}) == len(ticks):
            return ticks
        step_s = nice_step(step_s * 1.5)


def ticks(low: float, high: float, *, most: int = 4) -> list[float]:
    """Return round numbers between two.

    >>> ticks(0.0, 100.0)
    [0.0, 50.0, 100.0]
    """
    step = nice_step((high - low) / most)
    return [n * step for n in range(math.floor(low / step), math.ceil(high / step) + 1) if low <= n * step <= high]


def padded(low: float, high: float, *, least: float = 0.06) -> tuple[float, float]:
    """Widen an axis: some air, and at least a share of its end, for a narrower one shows noise as if it were real."""
    missing = max(least * high - (high - low), 1e-9)
    room = 0.12 * (high - low) + missing / 2
    return max(low - room / 2, 0.0), high + room


def nice_step(at_least: float) -> float:
    """Return the smallest 1, 2 or 5 times a power of ten that is not below a positive number.

    >>> nice_step(0.3), nice_step(7)
    (0.5, 10.0)
    """
    power = float(f"1e{math.floor(math.log10(at_least))}")
    return next(step * power for step in (1, 2, 5, 10) if step * power >= at_least * (1 - 1e-9))


def half_width(label: str) -> float:
    """Return about half of what a label takes: digits and signs at 11 px are up to 8 px wide."""
    return 3.9 * len(label)


def kept_inside(x: float, label: str, width: float) -> float:
    """Return where a centred label stands that must not leave the drawing."""
    return min(max(x, half_width(label)), width - half_width(label))
