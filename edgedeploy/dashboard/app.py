"""The dashboard's addresses: pages for people, the same data as JSON under /api/, and stored reports. GET only."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from edgedeploy.dashboard.guard import REPORT_POLICY, Guard
from edgedeploy.dashboard.source import DeviceState, Filter, NotThere, Source, cell_id
from edgedeploy.dashboard.sparkline import sparkline
from edgedeploy.documents import to_builtins
from edgedeploy.errors import EdgedeployError, UsageError
from edgedeploy.records.history import CellRow, Change, HistoryMetric, Trend, VerdictRow
from edgedeploy.render.figures import count, decisive, finding_text, format_share, one_line, printable, verdict_sentence
from edgedeploy.render.trend_figures import (
    HISTORY_TITLES,
    causes_text,
    change_text,
    is_worse,
    minute,
    noise_sentence,
    trend_sentence,
    value_text,
)
from edgedeploy.render.trend_svg import sentinel_svg, trend_svg
from edgedeploy.units import format_duration

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp

_FOLDER = Path(__file__).parent
_PER_PAGE, _MOST_PER_PAGE = 50, 500
# Of one cell's newest runs; a drawing of more is a blur, and megabytes.
_LAST, _MOST_DRAWN, _MOST_LAST = 400, 2000, 10_000
_TABLE_ROWS = 100
_TEXT_CHARACTERS = 200
_DECISIONS = ("PASS", "FAIL", "INCONCLUSIVE")
# template → the entry of the navigation that it belongs to
_SECTIONS = {
    "verdicts.html.j2": "Verdicts",
    "verdict.html.j2": "Verdicts",
    "cells.html.j2": "Trends",
    "trend.html.j2": "Trends",
    "devices.html.j2": "Devices",
}


def application(source: Source, names: Sequence[str] = ()) -> ASGIApp:
    """Return the dashboard as an ASGI application.

    Args:
        source: what it shows.
        names: host names that it may be asked for by, besides its address and localhost.
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles

    pages = _Pages(source)
    routes = [
        Route("/", pages.verdicts),
        Route("/verdict/{id}", pages.verdict),
        Route("/report/{id}", pages.report),
        Route("/trends", pages.trends),
        Route("/devices", pages.devices),
        Route("/api/verdicts", pages.api_verdicts),
        Route("/api/verdict/{id}", pages.api_verdict),
        Route("/api/cells", pages.api_cells),
        Route("/api/trend", pages.api_trend),
        Route("/api/devices", pages.api_devices),
        Mount("/static", StaticFiles(directory=_FOLDER / "static")),
    ]
    handlers: Mapping[Any, Callable[[Request, Exception], Response]] = {
        EdgedeployError: pages.refusal,
        HTTPException: pages.refusal,
        404: pages.refusal,
    }
    return Guard(Starlette(routes=routes, exception_handlers=handlers), names)


class _Pages:
    """What each address answers; every answer is made from one look at the source."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._environment = _environment()

    # ------------------------------------------------------------ verdicts

    def verdicts(self, request: Request) -> Response:
        """Answer with the first page: verdicts, newest first."""
        wanted, number = _filter(request), _number(request, "page", 1, 1_000_000)
        page = self._source.verdicts(wanted, number, _PER_PAGE)
        query = {key: value for key, value in asdict(wanted).items() if value}

        def address(page_number: int) -> str:
            return f"/?{urlencode({**query, 'page': page_number})}"

        return self._page(
            "verdicts.html.j2",
            title="Verdicts",
            page=page,
            rows=[_verdict_row(row) for row in page.verdicts],
            wanted=wanted,
            choices=self._source.choices(),
            decisions=_DECISIONS,
            address=address,
            skipped=self._source.skipped(),
            is_filtered=bool(query),
        )

    def verdict(self, request: Request) -> Response:
        """Answer with one verdict."""
        row, verdict = self._source.verdict(_id(request))
        cells = {(one.name, one.key.device): one for one in self._source.cells()}
        shown = []
        for cell in verdict.cells:
            known = cells.get((cell.cell, cell.device))
            accuracy_metric = ""
            shown.append(
                {
                    "cell": cell,
                    "findings": [finding_text(finding, accuracy_metric) for finding in cell.findings],
                    "trend": f"/trends?cell={cell_id(known.key)}" if known else "",
                    "runs": [("baseline", cell.baseline_run), ("candidate", cell.candidate_run)],
                }
            )
        return self._page(
            "verdict.html.j2",
            title=f"{verdict.decision}: {verdict.name}",
            row=row,
            verdict=verdict,
            sentence=verdict_sentence(verdict),
            why=[(one_line(cell.cell), finding_text(finding, "")) for cell, finding in decisive(verdict)],
            cells=shown,
            margins=[(metric.replace("_", " "), margin.text) for metric, margin in verdict.policy.margins.items()],
            has_report=self._source.report(row) is not None,
        )

    def report(self, request: Request) -> Response:
        """Answer with the stored HTML report of a verdict, as it was written."""
        from starlette.responses import FileResponse

        row, _ = self._source.verdict(_id(request))
        path = self._source.report(row)
        if path is None:
            raise NotThere(f"the report of {row.name} is not beside its verdict any more, or the verdict was changed")
        return FileResponse(
            path, media_type="text/html; charset=utf-8", headers={"content-security-policy": REPORT_POLICY}
        )

    # ------------------------------------------------------------ trends

    def trends(self, request: Request) -> Response:
        """Answer with all cells, or with one metric of one cell over time."""
        text = request.query_params.get("q", "")[:_TEXT_CHARACTERS]
        wanted = request.query_params.get("cell", "")
        cells = self._source.cells()
        if not wanted:
            shown = [_cell_row(row) for row in cells if _mentions(row, text)]
            return self._page("cells.html.j2", title="Trends", rows=shown, text=text, known=len(cells))
        row = self._source.cell(wanted)
        last = _number(request, "last", _LAST, _MOST_DRAWN)
        trend = self._source.trend(row, _metric(request, row), last)
        return self._page(
            "trend.html.j2",
            title=f"{row.name}: {HISTORY_TITLES[trend.metric]}",
            row=row,
            wanted=wanted,
            cells=[(cell_id(one.key), _cell_label(one)) for one in cells],
            metrics=[(metric, title) for metric, title in HISTORY_TITLES.items() if metric in row.values],
            trend=trend,
            last=last,
            sentence=trend_sentence(trend),
            facts=[fact for fact in (noise_sentence(trend), trend.note) if fact],
            plot=_without_style(trend_svg(trend)),
            sentinel_plot=_without_style(sentinel_svg(trend)),
            changes=[_change_view(trend, number) for number in reversed(range(len(trend.changes)))],
            points=[_point_view(trend, number) for number in reversed(range(len(trend.points)))][:_TABLE_ROWS],
            has_sentinel=any(point.sentinel_s is not None for point in trend.points),
        )

    # ------------------------------------------------------------ devices

    def devices(self, request: Request) -> Response:
        """Answer with the devices and their state."""
        return self._page(
            "devices.html.j2", title="Devices", rows=[_device_view(one) for one in self._source.devices()]
        )

    # ------------------------------------------------------------ JSON

    def api_verdicts(self, request: Request) -> Response:
        """Answer with what the first page shows."""
        per_page = _number(request, "per_page", _PER_PAGE, _MOST_PER_PAGE)
        page = self._source.verdicts(_filter(request), _number(request, "page", 1, 1_000_000), per_page)
        return _json(
            "verdicts",
            verdicts=[to_builtins(row) for row in page.verdicts],
            page=page.number,
            pages=page.pages,
            total=page.total,
        )

    def api_verdict(self, request: Request) -> Response:
        """Answer with one verdict as it was stored."""
        row, verdict = self._source.verdict(_id(request))
        return _json("stored_verdict", id=row.id, path=row.path, lab=row.lab, verdict=to_builtins(verdict))

    def api_cells(self, request: Request) -> Response:
        """Answer with every cell, and the id that /api/trend takes."""
        return _json("cells", cells=[{"id": cell_id(row.key), **to_builtins(row)} for row in self._source.cells()])

    def api_trend(self, request: Request) -> Response:
        """Answer with a metric of a cell over time."""
        row = self._source.cell(request.query_params.get("cell", ""))
        trend = self._source.trend(row, _metric(request, row), _number(request, "last", _LAST, _MOST_LAST))
        return _json("trend", **to_builtins(trend))

    def api_devices(self, request: Request) -> Response:
        """Answer with the devices and their state; what a lab file says of how to log in stays here."""
        return _json(
            "device_states",
            devices=[
                {
                    "device": one.name,
                    "lab": one.lab,
                    "state": one.state,
                    "why": one.why,
                    "since_utc": one.since_utc,
                    "by": one.by,
                    "target": one.entry.target if one.entry else "",
                    "transport": one.entry.transport if one.entry else "",
                    "history": to_builtins(one.row) if one.row else None,
                }
                for one in self._source.devices()
            ],
        )

    # ------------------------------------------------------------ what goes wrong

    def refusal(self, request: Request, error: Exception) -> Response:
        """Answer with a sentence whoever asks for what is not there."""
        from starlette.exceptions import HTTPException
        from starlette.responses import JSONResponse

        if isinstance(error, HTTPException):
            code = error.status_code
            text = {404: "there is no such page", 405: "this page can only be read"}.get(code, error.detail)
            headers = dict(error.headers or {})
        else:
            code, text, headers = _status_of(error), str(error), {}
        if request.url.path.startswith("/api/"):
            document = {"format": "edgedeploy.error/1", "kind": type(error).__name__, "message": printable(text)}
            return JSONResponse(document, status_code=code, headers=headers)
        return self._page("refusal.html.j2", code, headers, title="Not here" if code == 404 else "No answer", text=text)

    def _page(
        self, name: str, code: int = 200, headers: Mapping[str, str] | None = None, /, **context: Any
    ) -> Response:
        from starlette.responses import HTMLResponse

        template = self._environment.get_template(name)
        text = template.render(where=self._source.where, section=_SECTIONS.get(name, ""), **context)
        return HTMLResponse(text, status_code=code, headers=headers)


def _environment() -> Any:
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Text from devices may hold anything; markup that we made ourselves is clean already.
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters |= {"svg": Markup, "moment": minute, "duration": format_duration}
    return environment


def _status_of(error: Exception) -> int:
    if isinstance(error, NotThere):
        return 404
    return 400 if isinstance(error, UsageError) else 503


def _json(kind: str, **content: Any) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse({"format": f"edgedeploy.{kind}/1", **content})


# ---------------------------------------------------------------- what was asked for


def _id(request: Request) -> str:
    wanted: str = request.path_params["id"]
    return wanted


def _filter(request: Request) -> Filter:
    given = {key: request.query_params.get(key, "")[:_TEXT_CHARACTERS].strip() for key in Filter.__slots__}
    return Filter(**given)


def _number(request: Request, key: str, usual: int, most: int) -> int:
    """Return a number from 1 that stands in an address."""
    text = request.query_params.get(key, "")
    if not text:
        return usual
    if not text.isascii() or not text.isdigit() or len(text) > 9 or not 1 <= int(text) <= most:
        raise UsageError(f"{key}={one_line(text)[:40]}: a whole number from 1 to {most} is meant")
    return int(text)


def _metric(request: Request, row: CellRow) -> HistoryMetric:
    asked = request.query_params.get("metric", "") or row.metric
    for metric in HISTORY_TITLES:
        if asked == metric:
            return metric
    raise UsageError(f"metric={one_line(asked)[:40]} is not known; known are {', '.join(HISTORY_TITLES)}")


def _mentions(row: CellRow, text: str) -> bool:
    key = row.key
    words = (row.name, key.model, key.target, key.backend, key.precision, key.device, key.options, key.lab)
    return all(any(part in word.casefold() for word in words) for part in text.casefold().split())


# ---------------------------------------------------------------- rows for people


def _verdict_row(row: VerdictRow) -> dict[str, Any]:
    devices = dict.fromkeys(cell.device for cell in row.cells)
    targets = dict.fromkeys(cell.target for cell in row.cells)
    return {
        "row": row,
        "cells": [(cell.cell, cell.decision) for cell in row.cells[:4]],
        "more": max(len(row.cells) - 4, 0),
        "devices": ", ".join(devices),
        "targets": ", ".join(targets),
    }


def _cell_label(row: CellRow) -> str:
    key = row.key
    options = f", {key.options}" if key.options else ""
    lab = f", {key.lab}" if key.lab else ""
    return f"{row.name} ({key.backend} {key.precision} on {key.device}{options}{lab})"


def _cell_row(row: CellRow) -> dict[str, Any]:
    change, metric = row.change, row.metric
    return {
        "row": row,
        "id": cell_id(row.key),
        "last": value_text(metric, row.worse)(row.last) if row.last is not None else "",
        "metric": HISTORY_TITLES[metric],
        "spark": sparkline(row.recent, f"the newest {len(row.recent)} runs"),
        "change": change_text(metric, row.worse, change).partition(" (")[0] if change is not None else "",
        "means": _means(row.worse, change) if change is not None else "",
    }


def _means(worse: str, change: Change) -> str:
    """Say what a change means for whoever waits for the answer."""
    if change.whose == "board":
        return "board"
    return "worse" if is_worse(worse, change) else "better"


def _change_view(trend: Trend, number: int) -> dict[str, Any]:
    change = trend.changes[number]
    text = value_text(trend.metric, trend.worse)
    size, _, interval = change_text(trend.metric, trend.worse, change).partition(" (")
    return {
        "change": change,
        "text": size,
        "interval": interval.removesuffix(")"),
        "before": text(change.before),
        "after": text(change.after),
        "means": _means(trend.worse, change),
        "causes": causes_text(change),
    }


def _point_view(trend: Trend, number: int) -> dict[str, Any]:
    point = trend.points[number]
    return {
        "point": point,
        "value": value_text(trend.metric, trend.worse)(point.value),
        "sentinel": format_duration(point.sentinel_s) if point.sentinel_s is not None else "",
        "is_aside": number in trend.set_aside,
    }


def _without_style(svg: str) -> str:
    """Return a drawing without the width that it has in a report, which the pages' policy would complain about."""
    return re.sub(r' style="--width: \d+px"', "", svg, count=1)


def _device_view(state: DeviceState) -> dict[str, Any]:
    row, entry = state.row, state.entry
    facts: list[tuple[str, str]] = []
    if entry is not None:
        facts.append(("reached by", "this machine" if entry.transport == "local" else entry.transport))
        facts.append(("target", entry.target))
        facts.append(("description", entry.description))
    if row is not None:
        facts.append(("machine", ", ".join(word for word in (row.hostname, row.machine) if word)))
        facts.append(("system", ", ".join(word for word in (row.system, row.kernel, row.driver) if word)))
        facts.append(("runs", f"{row.runs:,} of {count(row.cells, 'cell')}"))
        facts.append(("first run", minute(row.first_seen_utc)))
        facts.append(("newest run", minute(row.last_seen_utc)))
        facts.append(("sentinel", format_duration(row.sentinel_s) if row.sentinel_s is not None else "none yet"))
        if row.sentinel_change is not None:
            change = row.sentinel_change
            facts.append(("the board changed", f"{change_text('latency_p50', 'up', change)} at {minute(change.utc)}"))
        cv = format_share(row.run_to_run_cv) if row.run_to_run_cv is not None else ""
        passport = f"{cv} run to run, {minute(row.passport_utc)}" if row.passport else "none yet"
        facts.append(("passport", passport))
    return {
        "state": state,
        "facts": [(label, text) for label, text in facts if text],
        "spark": sparkline(state.sentinel_s, f"the sentinel of {state.name} over time"),
        "sentinels": len(state.sentinel_s),
    }
