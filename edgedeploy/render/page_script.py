"""What makes a report interactive: uPlot, our script, its data, and the policy that lets only it run.

The page says everything without a script: drawings are SVG, and where scripts are blocked these stay. uPlot (MIT) is
kept in vendor/ and never loaded from elsewhere. A digest in the page's own content security policy names the one script
that may run, so that nothing a device or a file said could ever be one.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedeploy.render.series import Distribution, Panel

_FOLDER = Path(__file__).parent
_VENDOR = _FOLDER / "vendor"
_LICENCE = _VENDOR / "uPlot.LICENSE.txt"
_SCRIPTS = (_VENDOR / "uPlot.iife.min.js", _FOLDER / "report.js")
_STYLE = _VENDOR / "uPlot.min.css"


@dataclass(frozen=True, slots=True)
class PageScript:
    """What stands in a page.

    Attributes:
        text: of the one script; policy: the content security policy that allows it and nothing else.
        style: what the charts look like.
    """

    text: str
    policy: str
    style: str


@functools.cache
def page_script() -> PageScript:
    """Return the page's script, its style and its policy."""
    licence = _LICENCE.read_text(encoding="utf-8")
    parts = [f"/*! uPlot\n{licence}*/", *(path.read_text(encoding="utf-8") for path in _SCRIPTS)]
    # The page is XML too; a script's own less-than signs must not begin an element there.
    text = "\n".join(["//<![CDATA[", *(part.strip() for part in parts), "//]]>"])
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
        f"form-action 'none'"
    )
    return PageScript(text, policy, _STYLE.read_text(encoding="utf-8").strip())


def chart_data(cells: Sequence[tuple[str, Distribution | None, Sequence[Panel]]]) -> str:
    """Return what the script draws as JSON that ends no element and begins none.

    Args:
        cells: anchor, distribution and panels of each cell.
    """
    charts = [
        {
            "cell": anchor,
            "distribution": _distribution(shown) if shown else None,
            "panels": [_panel(panel) for panel in panels],
        }
        for anchor, shown, panels in cells
    ]
    text = json.dumps({"cells": charts}, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _distribution(shown: Distribution) -> dict[str, Any]:
    unit, scale = next(
        (unit, scale)
        for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6))
        if shown.times_s[-1] * scale >= 1 or unit == "µs"
    )
    return {
        "unit": unit,
        "x": [_short(time_s * scale) for time_s in shown.times_s],
        "baseline": [_short(share) for share in shown.baseline],
        "candidate": [_short(share) for share in shown.candidate],
    }


def _panel(panel: Panel) -> dict[str, Any]:
    """Return both sides on one axis of times; a script joins over what is null."""
    sides = [dict(side) for side in (panel.baseline, panel.candidate)]
    times_s = sorted({*sides[0], *sides[1]})
    values = [
        [_short(side[time_s] * panel.scale) if time_s in side else None for time_s in times_s] if side else []
        for side in sides
    ]
    return {
        "title": panel.title,
        "unit": panel.unit,
        "x": [_short(time_s) for time_s in times_s],
        "baseline": values[0],
        "candidate": values[1],
    }


def _short(number: float) -> float:
    """Return a number as exact as a chart can show it."""
    return float(f"{number:.6g}")
