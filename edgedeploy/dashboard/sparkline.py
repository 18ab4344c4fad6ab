"""A few values as a line the size of a word, as SVG text that takes its colours from the page. Pure."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence

from edgedeploy.render.figures import printable
from edgedeploy.render.svg import draw, svg_text

_WIDTH, _HEIGHT, _EDGE = 96.0, 22.0, 3.0


def sparkline(values: Sequence[float], description: str) -> str:
    """Draw values without axes, the newest as a dot; "" for less than two.

    It has no style of its own, which the pages' policy would not allow.
    """
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    # Two percent of noise must not look like a mountain range.
    room = max(0.02 * abs(high), 0.1 * (high - low), 1e-12)
    low, high = low - room, high + room

    def x(number: int) -> float:
        return _EDGE + (_WIDTH - 2 * _EDGE) * number / (len(values) - 1)

    def y(value: float) -> float:
        return _HEIGHT - _EDGE - (_HEIGHT - 2 * _EDGE) * (value - low) / (high - low)

    svg = ET.Element("svg", {"class": "spark", "viewBox": f"0 0 {_WIDTH:.0f} {_HEIGHT:.0f}", "role": "img"})
    draw(svg, "title", printable(description))
    draw(
        svg, "polyline", class_="line", points=" ".join(f"{x(n):.1f},{y(value):.1f}" for n, value in enumerate(values))
    )
    draw(svg, "circle", class_="newest", cx=x(len(values) - 1), cy=y(values[-1]), r=2.4)
    return svg_text(svg)
