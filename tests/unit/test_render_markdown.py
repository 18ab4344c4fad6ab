import re

from msgspec.structs import replace

from edgedeploy.records.verdict import Margin
from edgedeploy.render.markdown import verdict_markdown

from .render_samples import make_cell, make_runs, make_verdict


def _cells_per_row(text):
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return {len(re.findall(r"(?<!\\)\|", row)) - 1 for row in rows}


def test_markdown_shows_decision_metrics_reasons_and_what_is_needed():
    cell = make_cell("INCONCLUSIVE")
    text = verdict_markdown(make_verdict(cell, decision="INCONCLUSIVE"), make_runs())
    assert "INCONCLUSIVE" in text.splitlines()[0]
    for finding in cell.findings:
        assert finding.metric.replace("_", " ") in text
        assert finding.reason in text
    assert "about 9 more blocks" in text


def test_hostile_names_do_not_break_the_table():
    hostile = "a|b\n\n# c `d` <script>x</script> [e](f) $g$"
    cell = make_cell(cell=hostile, baseline_cell=hostile, device=hostile, notes=(hostile,), baseline_run=hostile)
    finding = cell.findings[0]
    margin = Margin(kind="points", value=0.01, text=hostile)
    evil = replace(finding, reason=hostile, needed=hostile, margin=margin)
    clean = verdict_markdown(make_verdict(make_cell(findings=(finding,))), {})
    text = verdict_markdown(make_verdict(make_cell(cell=hostile, notes=(hostile,), findings=(evil,))), {})
    assert _cells_per_row(text) == {6}
    assert "<script>" not in text
    assert "](" not in text.replace(r"\](", "")
    assert len([line for line in text.splitlines() if line.startswith("#")]) == 2
    assert len(text.splitlines()) == len(clean.splitlines())


def test_markdown_renders_without_runs_and_without_findings():
    text = verdict_markdown(make_verdict(make_cell(findings=(), baseline_run="", candidate_run="gone")), {})
    assert "- baseline run: none" in text
    assert "- candidate run: gone" in text


def test_markdown_names_dropped_visits():
    assert "1 visit of 8 dropped: hot" in verdict_markdown(make_verdict(), make_runs(dropped_blocks={2: "hot"}))
