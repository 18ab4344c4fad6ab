"""An explanation as one self-contained HTML page: no script, no network, light and dark, readable on a phone. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgedeploy.records.explanation import Explanation, GroupDifference
from edgedeploy.render.explanation import (
    CLASS_COLUMNS,
    FLIP_COLUMNS,
    GROUP_COLUMNS,
    MOST_GROUPS,
    SAMPLE_COLUMNS,
    class_rows,
    flip_rows,
    group_rows,
    groups_note,
    headline,
    sample_rows,
    why_title,
)
from edgedeploy.render.figures import printable

_TEMPLATE = "explanation.html.j2"
# Of a bar's whole width, zero in the middle.
_HALF = 50.0


@dataclass(frozen=True, slots=True)
class Bar:
    """A group's difference as a bar from zero, with its interval as a line; places in per cent of the width."""

    left: float
    width: float
    low: float
    high: float
    is_slower: bool


def bars(groups: tuple[GroupDifference, ...]) -> list[Bar]:
    """Return a bar for each row of the table, all on one scale."""
    shown = groups[:MOST_GROUPS]
    ends = [abs(end) for one in shown for end in (one.difference_s, one.low_s, one.high_s) if end is not None]
    largest = max(ends, default=0.0) or 1.0

    def place(seconds: float) -> float:
        return round(_HALF + _HALF * seconds / largest, 2)

    made = []
    for one in shown:
        low_s = one.difference_s if one.low_s is None else one.low_s
        high_s = one.difference_s if one.high_s is None else one.high_s
        start, end = sorted((place(0.0), place(one.difference_s)))
        made.append(Bar(start, round(end - start, 2), place(low_s), place(high_s), one.difference_s > 0))
    return made


def explanation_html(found: Explanation) -> str:
    """Return the page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    speed, accuracy = found.speed, found.accuracy
    tables = []
    if accuracy is not None:
        named = (
            ("Classes: right answers", CLASS_COLUMNS, class_rows(accuracy)),
            ("Right answers that turned wrong", FLIP_COLUMNS, flip_rows(accuracy)),
            ("Samples that lost most", SAMPLE_COLUMNS, sample_rows(accuracy)),
        )
        tables = [one for one in named if one[2]]
    return environment.get_template(_TEMPLATE).render(
        headline=printable(headline(found)),
        title=why_title(speed) if speed else "",
        causes=[printable(cause.text) for cause in speed.causes] if speed else [],
        counteracting=printable(speed.counteracting) if speed else "",
        columns=GROUP_COLUMNS,
        rows=list(zip(group_rows(speed.groups), bars(speed.groups), strict=True)) if speed else [],
        note=groups_note(speed) if speed and speed.groups else "",
        unavailable=[printable(one.not_available) for one in (speed.baseline, speed.candidate) if one.not_available]
        if speed
        else [],
        answers=[printable(text) for text in accuracy.causes] if accuracy else [],
        samples=f"{accuracy.samples:,} samples of {printable(accuracy.dataset)}" if accuracy else "",
        tables=tables,
        notes=[
            printable(note)
            for note in (*(speed.notes if speed else ()), *(accuracy.notes if accuracy else ()), *found.notes)
        ],
        made=f"{found.explained_utc}, edgedeploy {found.edgedeploy}",
    )
