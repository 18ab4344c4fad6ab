"""A verdict as GitHub-flavoured Markdown, for a comment on a pull request."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from edgedeploy.records.artifact import Artifact
from edgedeploy.records.run import Run
from edgedeploy.records.verdict import CellVerdict, Verdict
from edgedeploy.render.compression import remaining_notes, statement_heading, statement_rows
from edgedeploy.render.figures import (
    Row,
    accuracy_metric_of,
    cell_notes,
    device_text,
    figure_rows,
    finding_text,
    one_line,
    verdict_sentence,
)
from edgedeploy.render.side_by_side import verdict_table

_SPECIAL = re.compile(r"([\\`*_{}\[\]#|~!$])")
_SIGNS = {"PASS": "✅", "FAIL": "❌", "INCONCLUSIVE": "⚠️"}


def verdict_markdown(verdict: Verdict, runs: Mapping[str, Run], artifacts: Mapping[str, Artifact] | None = None) -> str:
    """Return a verdict as Markdown: the decision first, a table a cell, compression and measuring folded away.

    Args:
        verdict: the verdict.
        runs: by run id; a missing run costs only what is said about the measuring.
        artifacts: manifests, found by their sha256 whatever their keys; a missing one costs what became of its
            compression.
    """
    manifests = {artifact.sha256: artifact for artifact in (artifacts or {}).values()}
    lines = [
        f"### {_SIGNS[verdict.decision]} {verdict.decision}: {_escaped(verdict.name)}",
        "",
        _escaped(verdict_sentence(verdict)),
    ]
    lines += _side_by_side(verdict)
    for cell in verdict.cells:
        lines += ["", *_cell_lines(cell, runs), *_compression(cell, runs, manifests)]
    return "\n".join(lines) + "\n"


def _side_by_side(verdict: Verdict) -> list[str]:
    shown = verdict_table(verdict)
    if shown is None:
        return []
    missing = [f"- not compared: {_escaped(line)}" for line in shown.missing]
    note = ["", _escaped(shown.note)] if shown.note else []
    return ["", *_table(shown.columns, shown.rows), *note, *([""] if missing else []), *missing]


def _cell_lines(cell: CellVerdict, runs: Mapping[str, Run]) -> list[str]:
    accuracy_metric = accuracy_metric_of(cell, runs)
    texts = [finding_text(finding, accuracy_metric) for finding in cell.findings]
    where = f"{cell.cell} against {cell.baseline_cell} on {cell.device} ({cell.target})"
    lines = [f"#### {_SIGNS[cell.decision]} {cell.decision}: {_escaped(where)}", ""]
    if texts:
        lines += _table(
            ("metric", "baseline", "candidate", "change", "margin", "decision"),
            (
                (text.metric, text.baseline, text.candidate, text.change_with_interval, text.margin, text.decision)
                for text in texts
            ),
        )
        lines.append("")
    for text in texts:
        needed = f" (to decide it: {_escaped(text.needed)})" if text.needed else ""
        lines.append(f"- **{_escaped(text.metric)}**: {_escaped(text.reason)}{needed}")
    return [*lines, "", *_folded(cell, runs)]


def _folded(cell: CellVerdict, runs: Mapping[str, Run]) -> list[str]:
    baseline, candidate = runs.get(cell.baseline_run), runs.get(cell.candidate_run)
    lines = ["<details><summary>How it was measured</summary>", ""]
    if baseline or candidate:
        rows: Sequence[Row] = figure_rows(baseline, candidate)
        lines += _table(
            ("figure", "baseline", "candidate", "change"),
            ((row.label, row.baseline, row.candidate, row.change) for row in rows),
        )
        lines += ["", *(f"- {side}: {_escaped(device_text(run))}" for side, run in _sides(baseline, candidate))]
    lines += [f"- {_escaped(note)}" for note in cell_notes(cell, runs)]
    for side, name in (("baseline", cell.baseline_run), ("candidate", cell.candidate_run)):
        lines.append(f"- {side} run: {_escaped(name) or 'none'}")
    return [*lines, "", "</details>"]


def _compression(cell: CellVerdict, runs: Mapping[str, Run], manifests: Mapping[str, Artifact]) -> list[str]:
    """Return what became of each side's compression, and the notes on its artifact; nothing where there is neither."""
    rows: list[tuple[str, str, str, str]] = []
    notes: list[str] = []
    for side, run in _sides(runs.get(cell.baseline_run), runs.get(cell.candidate_run)):
        manifest = manifests.get(run.artifact.sha256)
        if manifest is None:
            continue
        for one in manifest.compression.statements:
            rows += [(f"{side}: {statement_heading(one)}", *row) for row in statement_rows(one)]
        notes += [f"- {side}: {_escaped(note)}" for note in remaining_notes(manifest)]
    if not rows and not notes:
        return []
    table = _table(("compression", "stage", "fate", "what was found"), rows) if rows else []
    folded = [*table, *([""] if rows and notes else []), *notes]
    return ["", "<details><summary>What became of the compression</summary>", "", *folded, "", "</details>"]


def _sides(baseline: Run | None, candidate: Run | None) -> list[tuple[str, Run]]:
    return [(side, run) for side, run in (("baseline", baseline), ("candidate", candidate)) if run]


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *([_escaped(text) for text in row] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def _escaped(text: str) -> str:
    r"""Return text that Markdown shows as it is, on one line.

    >>> _escaped("a|b\n<i>*c*")
    'a\\|b &lt;i&gt;\\*c\\*'
    """
    without_html = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", without_html)
