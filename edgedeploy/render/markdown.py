"""A verdict as GitHub-flavoured Markdown, for a comment on a pull request."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from edgedeploy.records.artifact import Artifact
from edgedeploy.records.run import Run
from edgedeploy.records.verdict import CellVerdict, Decision, Verdict
from edgedeploy.render.commands import again
from edgedeploy.render.compression import remaining_notes, statement_heading, statement_rows
from edgedeploy.render.explained import causes
from edgedeploy.render.explanation import GROUP_COLUMNS, group_rows
from edgedeploy.render.figures import (
    Row,
    accuracy_metric_of,
    cell_notes,
    count,
    device_text,
    figure_rows,
    finding_text,
    one_line,
    verdict_sentence,
)
from edgedeploy.render.flips import flips
from edgedeploy.render.side_by_side import verdict_table
from edgedeploy.render.trust import aa_lines, device_lines

# GitHub refuses a comment of more than 65,536 characters; counted in bytes, none of its ways to count is exceeded.
MOST_BYTES = 65_000
# One sentence of a device or a library must not take the room of all others.
_LONGEST = 1500
_SPECIAL = re.compile(r"([\\`*_{}\[\]#|~!$])")
_SIGNS = {"PASS": "✅", "FAIL": "❌", "INCONCLUSIVE": "⚠️"}
_GRAVEST_FIRST: tuple[Decision, ...] = ("FAIL", "INCONCLUSIVE", "PASS")


@dataclass(frozen=True, slots=True)
class _Section:
    """What is said of one cell: what everybody reads, and what is folded away."""

    cell: CellVerdict
    body: str
    folded: str


def verdict_markdown(
    verdict: Verdict,
    runs: Mapping[str, Run],
    artifacts: Mapping[str, Artifact] | None = None,
    *,
    report_url: str = "",
    most_bytes: int = MOST_BYTES,
) -> str:
    """Return a verdict as Markdown: the decision first, a table a cell, compression and measuring folded away.

    Args:
        verdict: the verdict.
        runs: by run id; a missing run costs only what is said about the measuring.
        artifacts: manifests, found by their sha256 whatever their keys; a missing one costs what became of its
            compression.
        report_url: where the HTML report is to be found; it is linked.
        most_bytes: how long it may be, at least 2,000; the cells that failed are told first, and what does not fit is
            named.
    """
    manifests = {artifact.sha256: artifact for artifact in (artifacts or {}).values()}
    head = [
        f"### {_SIGNS[verdict.decision]} {verdict.decision}: {_escaped(verdict.name)}",
        "",
        _escaped(verdict_sentence(verdict)),
    ]
    if report_url:
        head += ["", f"[The whole report]({_target(report_url)})"]
    head += [f"- {_escaped(line)}" for line in (*aa_lines(verdict.aa), *device_lines(verdict.devices))]
    sections = [
        _Section(
            cell,
            "\n".join(["", *_cell_lines(cell, runs)]),
            "\n".join(["", "", *_folded(cell, runs, verdict), *_why(cell), *_compression(cell, runs, manifests)]),
        )
        for cell in verdict.cells
    ]
    table = "\n".join(_side_by_side(verdict))
    start = "\n".join(head)
    room = most_bytes - _size(start) - 400
    if (
        0 < _size(table) <= room // 3
        or _size(table) + sum(_size(one.body) + _size(one.folded) for one in sections) <= room
    ):
        start, room = f"{start}\n{table}" if table else start, room - _size(table)
        missing = ""
    else:
        missing = "\n\nThe cells side by side do not fit here." if table else ""
    return f"{start}{missing}{_fitting(sections, room)}\n"


def _fitting(sections: Sequence[_Section], room: int) -> str:
    """Return as many cells as there is room for: first what failed, first what is not folded; and name the others."""
    gravest = sorted(range(len(sections)), key=lambda place: _GRAVEST_FIRST.index(sections[place].cell.decision))
    bodies: set[int] = set()
    for place in gravest:
        if (size := _size(sections[place].body)) <= room:
            bodies.add(place)
            room -= size
    folded: set[int] = set()
    for place in gravest:
        if place in bodies and (size := _size(sections[place].folded)) <= room:
            folded.add(place)
            room -= size
    shown = "".join(
        f"\n{one.body}{one.folded if place in folded else ''}" for place, one in enumerate(sections) if place in bodies
    )
    left_out = [one.cell for place, one in enumerate(sections) if place not in bodies]
    if left_out:
        counts = [(decision, sum(cell.decision == decision for cell in left_out)) for decision in _GRAVEST_FIRST]
        told = ", ".join(f"{number} {decision}" for decision, number in counts if number)
        shown += (
            f"\n\n{count(len(left_out), 'cell')} left out here for want of room ({told}); the report has all of them."
        )
    elif len(folded) < len(sections):
        shown += f"\n\nHow {count(len(sections) - len(folded), 'cell')} was measured is left out here for want of room."
    return shown


def _size(text: str) -> int:
    return len(text.encode()) + 1


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
    if cell.explanation is not None:
        lines += ["", *(f"- {_escaped(line)}" for line in causes(cell.explanation))]
    return lines


def _folded(cell: CellVerdict, runs: Mapping[str, Run], verdict: Verdict) -> list[str]:
    baseline, candidate = runs.get(cell.baseline_run), runs.get(cell.candidate_run)
    lines = ["<details><summary>How it was measured</summary>", ""]
    if baseline or candidate:
        rows: Sequence[Row] = figure_rows(baseline, candidate)
        lines += _table(
            ("figure", "baseline", "candidate", "change"),
            ((row.label, row.baseline, row.candidate, row.change) for row in rows),
        )
        lines += ["", *(f"- {side}: {_escaped(device_text(run))}" for side, run in _sides(baseline, candidate))]
    if (changed := flips(baseline, candidate)) is not None and changed.answers:
        lines.append(
            f"- {len(changed.answers):,} of {changed.samples:,} answers changed: {changed.of('lost'):,} are wrong now, "
            f"{changed.of('gained'):,} are right now"
        )
    lines += [f"- {_escaped(note)}" for note in cell_notes(cell, runs)]
    for side, name in (("baseline", cell.baseline_run), ("candidate", cell.candidate_run)):
        lines.append(f"- {side} run: {_escaped(name) or 'none'}")
    if command := again(cell, verdict.policy):
        lines += ["", "To judge these runs again:", "", *_code(command)]
    return [*lines, "", "</details>"]


def _why(cell: CellVerdict) -> list[str]:
    """Return which layers differ, where that was found out."""
    speed = cell.explanation.speed if cell.explanation is not None else None
    if speed is None or not speed.groups:
        return []
    table = _table(GROUP_COLUMNS, group_rows(speed.groups))
    return ["", "<details><summary>Layer by layer</summary>", "", *table, "", "</details>"]


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


def _code(command: str) -> list[str]:
    """Return a command as a block that its own words cannot end."""
    longest = max((len(ticks) for ticks in re.findall("`+", command)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}sh", one_line(command), fence]


def _target(url: str) -> str:
    """Return an address so that it can neither end the link nor begin another."""
    return re.sub(r"[\s()<>\\]", lambda found: f"%{ord(found[0]):02X}", one_line(url))


def _escaped(text: str) -> str:
    r"""Return text that Markdown shows as it is, on one line.

    >>> _escaped("a|b\n<i>*c*")
    'a\\|b &lt;i&gt;\\*c\\*'
    """
    line = one_line(text)
    if len(line) > _LONGEST:
        line = f"{line[:_LONGEST]}…"
    without_html = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", without_html)
