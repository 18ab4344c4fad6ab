import re

import pytest
from msgspec.structs import replace

from edgedeploy.records.verdict import Margin
from edgedeploy.render.markdown import verdict_markdown

from .render_samples import make_artifacts, make_cell, make_runs, make_verdict
from .report_samples import rich_runs, rich_verdict


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


def test_a_comment_of_many_cells_keeps_what_failed_and_says_what_is_left_out():
    cells = [make_cell(cell=f"cell {number}", notes=("x" * 400,)) for number in range(300)]
    cells[170] = make_cell("FAIL", cell="the one that failed")
    text = verdict_markdown(make_verdict(*cells, decision="FAIL"), make_runs())
    assert len(text.encode()) <= 65_000
    assert len(text) < 65_536
    assert "❌ FAIL: the one that failed" in text
    assert re.search(r"\d+ cells left out here for want of room \(\d+ PASS\)", text)
    assert text.count("<details>") == text.count("</details>")


def test_a_short_comment_leaves_nothing_out():
    text = verdict_markdown(rich_verdict(), rich_runs(), make_artifacts())
    assert "left out" not in text
    assert text.count("#### ") == 3


@pytest.mark.parametrize("most_bytes", [2000, 5000, 20_000])
def test_any_room_is_kept_to(most_bytes):
    verdict = make_verdict(*(make_cell("FAIL", cell=f"zelle {number} ❌") for number in range(30)), decision="FAIL")
    assert len(verdict_markdown(verdict, make_runs(), most_bytes=most_bytes).encode()) <= most_bytes


def test_a_reason_without_end_does_not_take_the_room_of_all_others():
    finding = replace(make_cell("FAIL").findings[1], reason="long " * 50_000)
    text = verdict_markdown(make_verdict(make_cell("FAIL", findings=(finding,)), decision="FAIL"), make_runs())
    assert len(text.encode()) < 15_000


def test_the_comment_tells_causes_commands_false_alarms_and_where_the_report_is():
    text = verdict_markdown(rich_verdict(), rich_runs(), report_url="https://ci.example/run/7)[x](y")
    assert "](https://ci.example/run/7%29[x]%28y)" in text
    assert "3 conversions between float and int8 cost 310 µs an inference" in text
    assert "1 of 240 gates of something against itself said FAIL" in text
    assert "```sh\nedgedeploy gate run-c --baseline run-b" in text
    assert "<summary>Layer by layer</summary>" in text


def test_a_command_cannot_end_its_block():
    text = verdict_markdown(make_verdict(make_cell(baseline_run="a```\n# b")), {})
    assert "\n````sh\n" in text


def test_what_is_folded_away_stands_apart_from_the_list_before_it():
    lines = verdict_markdown(make_verdict(), make_runs()).splitlines()
    assert lines[lines.index("<details><summary>How it was measured</summary>") - 1] == ""
