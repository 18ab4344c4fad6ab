"""Verdicts on cells → the rows of one table, side by side. Pure: no I/O, no clock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import msgspec

from edgedeploy.records.run import Run
from edgedeploy.records.verdict import CellVerdict, Contender, Finding, Metric


def contenders(cells: Sequence[CellVerdict], runs: Mapping[str, Run]) -> tuple[Contender, ...]:
    """Return a row for every baseline, followed by those of the candidates that were compared with it.

    Args:
        cells: judged; one whose runs are not at hand has no row.
        runs: by file, as in CellVerdict.baseline_run and candidate_run.
    """
    rows: dict[str, list[Contender]] = {}
    for cell in cells:
        before, after = runs.get(cell.baseline_run), runs.get(cell.candidate_run)
        if before is None or after is None:
            continue
        group = rows.setdefault(cell.baseline_cell, [_row(cell, before, "baseline")])
        group.append(_row(cell, after, "candidate"))
    return tuple(row for group in rows.values() for row in group)


def in_place(rows: Sequence[Contender], absent: Iterable[Contender]) -> tuple[Contender, ...]:
    """Return the rows with what was not measured below the others of its baseline."""
    placed = list(rows)
    for one in absent:
        last = max((place for place, row in enumerate(placed) if _group(row) == one.baseline_cell), default=None)
        placed.insert(len(placed) if last is None else last + 1, one)
    return tuple(placed)


def only_in(rows: Sequence[Contender], others: Sequence[Contender]) -> tuple[Contender, ...]:
    """Return the rows of cells that others have none of, without what they were compared with."""
    known = {row.cell for row in others}
    return tuple(
        msgspec.structs.replace(row, role="baseline", baseline_cell="", change=None, low=None, high=None, decision=None)
        for row in {row.cell: row for row in rows}.values()
        if row.cell not in known
    )


def with_agreement(rows: Sequence[Contender], agreements: Mapping[str, float]) -> tuple[Contender, ...]:
    """Return the rows with the share of arg-maxes that they have in common with their baseline, by cell."""
    return tuple(msgspec.structs.replace(row, agreement=agreements.get(row.cell, row.agreement)) for row in rows)


def _group(row: Contender) -> str:
    return row.cell if row.role == "baseline" else row.baseline_cell


def _row(cell: CellVerdict, run: Run, role: Literal["baseline", "candidate"]) -> Contender:
    is_baseline = role == "baseline"
    found: dict[Metric, Finding] = {finding.metric: finding for finding in cell.findings}

    def value(metric: Metric) -> float | None:
        finding = found.get(metric)
        if finding is None:
            return None
        return finding.baseline_value if is_baseline else finding.candidate_value

    change, low, high = (None, None, None) if is_baseline else _latency_change(found.get("latency_p50"))
    return Contender(
        cell=cell.baseline_cell if is_baseline else cell.cell,
        backend=run.artifact.backend,
        precision=run.artifact.precision,
        target=run.artifact.target,
        device=run.device,
        model=run.artifact.model,
        role=role,
        baseline_cell="" if is_baseline else cell.baseline_cell,
        size_bytes=run.artifact.size_bytes,
        p50_s=value("latency_p50"),
        change=change,
        low=low,
        high=high,
        peak_rss_bytes=value("peak_memory"),
        metric=run.outputs.metric if run.outputs else "",
        accuracy=value("accuracy"),
        decision=None if is_baseline else cell.decision,
    )


def _latency_change(finding: Finding | None) -> tuple[float | None, float | None, float | None]:
    """Return the relative change with its interval; without one where the margin is in seconds."""
    if finding is None or finding.effect is None:
        return None, None, None
    if finding.margin is None or finding.margin.kind in ("relative", "limit"):
        return finding.effect, finding.low, finding.high
    if not finding.baseline_value or finding.candidate_value is None:
        return None, None, None
    return finding.candidate_value / finding.baseline_value - 1, None, None
