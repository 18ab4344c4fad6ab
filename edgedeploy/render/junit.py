"""A verdict as JUnit XML, which CI systems show beside the tests.

One test suite a cell, one test case a metric. PASS is a passed case, FAIL a <failure>, and INCONCLUSIVE an
<error type="inconclusive">: a <skipped> case counts as green in CI systems, and what is not decided must not. Skipped
are only the metrics that the policy does not judge, and cells whose runtime is not installed.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence

from edgedeploy.records.verdict import CellVerdict, Contender, Decision, Finding, Verdict
from edgedeploy.render.figures import NOT_JUDGED, decision_text, finite, one_line, printable, verdict_sentence


def verdict_junit(verdict: Verdict) -> str:
    """Return a verdict as a JUnit XML document."""
    root = ET.Element("testsuites", name=one_line(verdict.name))
    rows = {row.cell: row for row in verdict.contenders if row.role == "candidate"}
    for cell in verdict.cells:
        root.append(_suite(cell, verdict, rows.get(cell.cell)))
    if all(cell.decision != verdict.decision for cell in verdict.cells):
        # No cell says what the whole says (there may be none): the whole must still show as not passed.
        suite = ET.SubElement(root, "testsuite", name=one_line(verdict.name), timestamp=printable(verdict.judged_utc))
        suite.append(_verdict_case(verdict.decision, verdict.name, verdict_sentence(verdict)))
        _count(suite)
    judged = {cell.cell for cell in verdict.cells}
    for row in verdict.contenders:
        if row.absent and row.cell not in judged:
            root.append(_absent_suite(row, verdict))
    for name in ("tests", "failures", "errors", "skipped"):
        root.set(name, str(sum(int(suite.get(name, "0")) for suite in root)))
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _suite(cell: CellVerdict, verdict: Verdict, row: Contender | None) -> ET.Element:
    suite = ET.Element("testsuite", name=one_line(cell.cell), timestamp=printable(verdict.judged_utc))
    if (seconds := finite(cell.seconds)) is not None:
        suite.set("time", f"{seconds:.3f}")
    _properties(
        suite,
        [
            ("decision", cell.decision),
            ("baseline", cell.baseline_cell),
            ("device", cell.device),
            ("target", cell.target),
            ("baseline_run", cell.baseline_run),
            ("candidate_run", cell.candidate_run),
            *(_row_properties(row) if row else []),
            *(("note", note) for note in cell.notes),
        ],
    )
    for finding in cell.findings:
        suite.append(_case(cell, finding))
    if all(finding.decision != cell.decision for finding in cell.findings):
        suite.append(_verdict_case(cell.decision, cell.cell, "; ".join(cell.notes) or "no metric was judged"))
    _count(suite)
    return suite


def _absent_suite(row: Contender, verdict: Verdict) -> ET.Element:
    """Return a suite of one skipped case: a runtime that is not installed was not asked for, so nothing failed."""
    suite = ET.Element("testsuite", name=one_line(row.cell), timestamp=printable(verdict.judged_utc))
    _properties(suite, [("baseline", row.baseline_cell), ("target", row.target), *_row_properties(row)])
    case = ET.SubElement(suite, "testcase", classname=one_line(row.cell), name="verdict")
    ET.SubElement(case, "skipped", message=one_line(row.absent))
    _count(suite)
    return suite


def _row_properties(row: Contender) -> list[tuple[str, str]]:
    numbers = [
        ("size_bytes", row.size_bytes),
        ("p50_s", row.p50_s),
        ("peak_rss_bytes", row.peak_rss_bytes),
        ("accuracy", row.accuracy),
    ]
    named = [("backend", row.backend), ("precision", row.precision)]
    return [*named, *((name, repr(number)) for name, number in numbers if number is not None)]


def _case(cell: CellVerdict, finding: Finding) -> ET.Element:
    case = ET.Element("testcase", classname=one_line(cell.cell), name=finding.metric)
    numbers = [
        ("baseline_value", finding.baseline_value),
        ("candidate_value", finding.candidate_value),
        ("effect", finding.effect),
        ("low", finding.low),
        ("high", finding.high),
        ("p_fail", finding.p_fail),
        ("p_pass", finding.p_pass),
    ]
    figures = [(name, repr(number)) for name, number in numbers if number is not None]
    figures.append(("units", str(finding.units)))
    if finding.margin:
        figures += [("margin", finding.margin.text), ("margin_kind", finding.margin.kind)]
    if finding.limit:
        figures += [("limit", repr(finding.limit.limit)), ("limit_decision", finding.limit.decision)]
    figures += [(f"drop_of_class_{one.label}", repr(one.effect)) for one in finding.classes if one.decision == "FAIL"]
    _properties(case, figures)
    if decision_text(finding) == NOT_JUDGED:
        ET.SubElement(case, "skipped", message="reported, not judged: the policy has no margin for it")
    else:
        _outcome(case, finding.decision, finding.reason, finding.needed)
    ET.SubElement(case, "system-out").text = printable(finding.reason)
    return case


def _verdict_case(decision: Decision, name: str, reason: str) -> ET.Element:
    case = ET.Element("testcase", classname=one_line(name), name="verdict")
    _outcome(case, decision, reason, "")
    return case


def _outcome(case: ET.Element, decision: Decision, reason: str, needed: str) -> None:
    if decision == "PASS":
        return
    tag, kind = ("failure", "worse-than-margin") if decision == "FAIL" else ("error", "inconclusive")
    outcome = ET.SubElement(case, tag, message=one_line(reason), type=kind)
    outcome.text = printable(f"{reason}\nto decide it: {needed}" if needed else reason)


def _properties(parent: ET.Element, properties: Sequence[tuple[str, str]]) -> None:
    inside = ET.SubElement(parent, "properties")
    for name, value in properties:
        ET.SubElement(inside, "property", name=name, value=one_line(value))


def _count(suite: ET.Element) -> None:
    suite.set("tests", str(len(suite.findall("testcase"))))
    for name, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(name, str(len(suite.findall(f"testcase/{tag}"))))
