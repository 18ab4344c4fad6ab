"""Artifacts side by side: the table in which a reader looks for the best of them, and what is missing from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from edgedeploy.records.comparison import Comparison
from edgedeploy.records.verdict import Contender, Verdict
from edgedeploy.render.figures import finite, format_share, is_higher_better, one_line
from edgedeploy.units import format_bytes, format_duration

NOT_COMPARED = "not compared"
# What a narrow screen does without, in this order.
DISPENSABLE = ("memory", "size", "agreement", "precision", "accuracy", "back end", "p50")


@dataclass(frozen=True, slots=True)
class SideBySide:
    """A table and the lines below it; columns of which no row has anything are left out."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    missing: tuple[str, ...]
    note: str

    def without(self, columns: Sequence[str]) -> SideBySide:
        """Return it without some columns."""
        kept = [place for place, column in enumerate(self.columns) if column not in columns]
        return replace(
            self,
            columns=tuple(self.columns[place] for place in kept),
            rows=tuple(tuple(row[place] for place in kept) for row in self.rows),
        )


def verdict_table(verdict: Verdict) -> SideBySide | None:
    """Return a verdict's contenders, or None where the findings of its one candidate say all of it."""
    rows = verdict.contenders
    if sum(row.role == "candidate" for row in rows) < 2:
        return None
    return _table(
        rows,
        {
            "cell": lambda row: row.cell,
            **_figures("× baseline"),
            "verdict": lambda row: row.decision or (NOT_COMPARED if row.absent else row.role),
        },
        lambda row: f"{row.cell} ({row.backend} {row.precision})",
    )


def comparison_table(comparison: Comparison) -> SideBySide:
    """Return the precisions of a model, each against the fp32 of its back end; agreement is of the arg-max with it."""
    return _table(comparison.contenders, _figures("× fp32"), lambda row: f"{row.backend} {row.precision}")


def ratio_text(row: Contender) -> str:
    """Return how many times the baseline's latency a row has, with the interval where there is one.

    >>> ratio_text(Contender(cell="a", backend="b", precision="int8", target="t", device="d", change=-0.25))
    '0.75'
    """
    ends = [finite(end) for end in (row.change, row.low, row.high)]
    if ends[0] is None:
        return ""
    if ends[1] is None or ends[2] is None:
        return _times(1 + ends[0])
    return f"{_times(1 + ends[0])} ({_times(1 + ends[1])}–{_times(1 + ends[2])})"


def _times(ratio: float) -> str:
    return f"{ratio:.2f}" if 0.1 <= abs(ratio) < 100 else f"{ratio:.2g}"


def accuracy_of(row: Contender) -> str:
    """Return a row's value on the evaluation set, "" without one."""
    if row.accuracy is None:
        return ""
    return format_share(row.accuracy) if is_higher_better(row.metric) else f"{row.metric} {row.accuracy:.4g}"


def missing_lines(rows: Sequence[Contender], name: Callable[[Contender], str]) -> tuple[str, ...]:
    """Return a line for each reason why rows were not compared, with the rows that it holds for."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.absent:
            reasons.setdefault(one_line(row.absent), []).append(name(row))
    return tuple(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())


def _figures(ratio: str) -> dict[str, Callable[[Contender], str]]:
    return {
        "back end": lambda row: row.backend,
        "precision": lambda row: row.precision,
        "size": lambda row: "" if row.size_bytes is None else format_bytes(row.size_bytes),
        "p50": lambda row: "" if row.p50_s is None else format_duration(row.p50_s),
        ratio: ratio_text,
        "memory": lambda row: "" if row.peak_rss_bytes is None else format_bytes(row.peak_rss_bytes),
        "accuracy": accuracy_of,
        "agreement": lambda row: "" if row.agreement is None else format_share(row.agreement),
    }


def _table(
    contenders: Sequence[Contender], cells: dict[str, Callable[[Contender], str]], name: Callable[[Contender], str]
) -> SideBySide:
    columns = tuple(column for column, text in cells.items() if any(text(row) for row in contenders))
    rows = tuple(tuple(cells[column](row) for column in columns) for row in contenders)
    ratio = next((column for column in columns if column.startswith("×")), "")
    note = f"{ratio}: medians measured interleaved, with the interval; each p50 is of its own session" if ratio else ""
    return SideBySide(columns, rows, missing_lines(contenders, name), note)
