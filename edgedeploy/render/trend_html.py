"""The history as one self-contained HTML page: no script, no network, readable on a phone, light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgedeploy.records.history import CellRow, Trend, cell_text
from edgedeploy.render.figures import count, one_line, printable
from edgedeploy.render.trend_figures import (
    HISTORY_TITLES,
    cause_in_short,
    causes_text,
    change_text,
    day,
    is_worse,
    newest_change_text,
    noise_sentence,
    run_columns,
    run_rows,
    trend_sentence,
    value_or_none,
    value_text,
)
from edgedeploy.render.trend_svg import sentinel_svg, trend_svg

_TEMPLATE = Path(__file__).with_name("trends.html.j2")
_LISTED_RUNS = 30


@dataclass(frozen=True, slots=True)
class _ChangeView:
    kind: str
    since: str
    level: str
    size: str
    whose: str
    causes: str
    why: str


@dataclass(frozen=True, slots=True)
class _TrendView:
    """Everything that the template shows of a trend; drawings are finished SVG."""

    anchor: str
    name: str
    cell: str
    sentence: str
    facts: list[str]
    plot: str
    sentinel: str
    changes: list[_ChangeView]
    runs: list[list[str]]
    left_out: int


def history_html(found: Sequence[tuple[CellRow, Trend]], *, made_utc: str) -> str:
    """Return trends as an HTML page that needs nothing else.

    Args:
        found: cells with their trends, all in one metric.
        made_utc: when the page was made; it says so.
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Text from devices may hold anything; markup that we made ourselves is clean already.
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters["svg"] = Markup
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    title = HISTORY_TITLES[found[0][0].metric] if found else "no runs"
    return template.render(
        title=title,
        made_utc=made_utc,
        summary=f"{count(len(found), 'cell')}, {count(sum(row.runs for row, _ in found), 'run')}",
        rows=[_row(number, row) for number, (row, _) in enumerate(found, start=1)],
        trends=[_view(number, row, trend) for number, (row, trend) in enumerate(found, start=1)],
        columns=run_columns(found[0][1]) if found else (),
    )


def _row(number: int, row: CellRow) -> dict[str, str]:
    return {
        "anchor": f"cell-{number}",
        "name": one_line(row.name),
        "device": f"{row.key.device}@{row.key.lab}" if row.key.lab else row.key.device,
        "runs": str(row.runs),
        "newest": value_or_none(row.metric, row.worse, row.last),
        "changed": newest_change_text(row),
        "kind": ("worse" if is_worse(row.worse, row.change) else "better") if row.change else "",
        "by": cause_in_short(row.change) if row.change else "",
        "decision": row.decision or "",
        "release": row.release,
    }


def _view(number: int, row: CellRow, trend: Trend) -> _TrendView:
    text = value_text(trend.metric, trend.worse)
    return _TrendView(
        anchor=f"cell-{number}",
        name=one_line(row.name),
        cell=cell_text(trend.cell),
        sentence=trend_sentence(trend),
        facts=[fact for fact in (noise_sentence(trend), trend.note) if fact],
        plot=trend_svg(trend),
        sentinel=sentinel_svg(trend),
        changes=[
            _ChangeView(
                kind="worse" if is_worse(trend.worse, change) else "better",
                since=day(change.utc),
                level=f"{text(change.before)} → {text(change.after)}",
                size=change_text(trend.metric, trend.worse, change),
                whose=change.whose,
                causes=causes_text(change),
                why=change.why,
            )
            for change in reversed(trend.changes)
        ],
        runs=run_rows(trend, _LISTED_RUNS),
        left_out=trend.hidden,
    )
