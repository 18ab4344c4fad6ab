import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from edgedeploy.arguments import allowed_precisions, backends_of, names_from_text
from edgedeploy.backends.fake import BACKEND
from edgedeploy.documents import read_json, write_json
from edgedeploy.errors import UsageError
from edgedeploy.judge.advice import (
    conclusion,
    conclusions,
    faster_by,
    fastest_of,
    has_latency,
    int8_advice,
    is_timed,
    play_off_conclusions,
)
from edgedeploy.judge.boundaries import unlike_copies
from edgedeploy.judge.contenders import contenders, in_place, only_in, with_agreement
from edgedeploy.judge.family import ErrorRate
from edgedeploy.judge.footprint import judge_peak_memory
from edgedeploy.judge.speed import why_not_comparable
from edgedeploy.records.target import BackendRules, QuantizationRules, Target
from edgedeploy.records.verdict import FORMAT, Contender, Margin, Verdict
from edgedeploy.render.html import report_html
from edgedeploy.render.junit import verdict_junit
from edgedeploy.render.markdown import verdict_markdown
from edgedeploy.render.side_by_side import ratio_text, verdict_table
from edgedeploy.render.text import verdict_text

from .judge_samples import memory_of, normal_effects, policy, runs_with_effects
from .render_samples import make_artifacts, make_cell, make_runs, make_verdict

AWAY = Contender(
    cell="pruned-int8@mnn",
    backend="mnn",
    precision="int8",
    target="raspberry-pi-5",
    device="pi5-desk",
    baseline_cell="dense-fp32",
    absent="MNN is not installed here; pip install 'edgedeploy[mnn]'",
)


def two_cells() -> Verdict:
    """Two candidates of one baseline, and a runtime that is not installed."""
    cells = (make_cell(), make_cell(cell="pruned-int8@tflite"))
    rows = in_place(contenders(cells, make_runs()), [AWAY])
    return replace(make_verdict(*cells), contenders=rows)


def latency_cell(name, decision, effect, *, accuracy="PASS"):
    cell = make_cell(cell=name, baseline_cell="fp32")
    findings = {finding.metric: finding for finding in cell.findings}
    margin = Margin(kind="relative", value=0.0, text="+0%")
    latency = replace(findings["latency_p50"], decision=decision, effect=effect, margin=margin)
    judged = replace(findings["accuracy"], decision=accuracy, reason="so many samples", needed="more of them")
    return replace(cell, findings=(judged, latency))


def row(name, backend, precision):
    return Contender(cell=name, backend=backend, precision=precision, target="t", device="d", p50_s=0.002)


# ---------------------------------------------------------------- rows


def test_a_baseline_has_one_row_before_those_of_its_candidates():
    rows = two_cells().contenders
    assert [one.cell for one in rows] == ["dense-fp32", "pruned-int8", "pruned-int8@tflite", "pruned-int8@mnn"]
    baseline, candidate = rows[:2]
    assert (baseline.role, baseline.change, baseline.decision) == ("baseline", None, None)
    assert baseline.p50_s == 0.0042
    assert (candidate.change, candidate.low, candidate.high) == (-0.312, -0.331, -0.294)
    assert candidate.accuracy == 0.909
    assert candidate.precision == "int8"


def test_what_is_absent_stands_with_its_baseline_and_otherwise_last():
    rows = (replace(row("a", "x", "fp32"), role="baseline"), replace(row("b", "x", "fp32"), role="baseline"))
    placed = in_place(rows, [replace(AWAY, baseline_cell="a"), replace(AWAY, cell="stray", baseline_cell="?")])
    assert [one.cell for one in placed] == ["a", "pruned-int8@mnn", "b", "stray"]


def test_a_margin_in_seconds_gives_a_ratio_without_an_interval():
    cell = make_cell()
    margin = Margin(kind="absolute", value=0.001, text="+1ms")
    findings = tuple(replace(one, margin=margin, effect=-0.001) for one in cell.findings if one.metric == "latency_p50")
    candidate = contenders([replace(cell, findings=findings)], make_runs())[1]
    assert candidate.change == pytest.approx(-0.312)
    assert candidate.low is None


def test_cells_whose_runs_are_not_at_hand_have_no_row():
    assert contenders([make_cell()], {}) == ()


def test_rows_of_a_play_off_that_are_new_stand_alone():
    rows = contenders([make_cell()], make_runs())
    (new,) = only_in(rows, rows[:1])
    assert (new.cell, new.role, new.change, new.decision) == ("pruned-int8", "baseline", None, None)


def test_agreement_goes_to_its_cell():
    rows = with_agreement(contenders([make_cell()], make_runs()), {"pruned-int8": 0.97})
    assert [one.agreement for one in rows] == [None, 0.97]


def test_a_verdict_with_contenders_survives_being_written(tmp_path):
    verdict = two_cells()
    write_json(tmp_path / "verdict.json", verdict)
    assert read_json(tmp_path / "verdict.json", Verdict, FORMAT) == verdict


@given(st.floats(allow_nan=True), st.floats(allow_nan=True), st.floats(allow_nan=True))
def test_a_ratio_is_text_whatever_the_numbers(change, low, high):
    text = ratio_text(replace(row("a", "b", "int8"), change=change, low=low, high=high))
    assert re.fullmatch(r"|[\d.e+-]+( \([\d.e+-]+–[\d.e+-]+\))?", text), text


# ---------------------------------------------------------------- reports


def test_one_candidate_has_no_table_beside_its_findings():
    verdict = replace(make_verdict(), contenders=contenders([make_cell()], make_runs()))
    assert verdict_table(verdict) is None
    assert "Side by side" not in verdict_text(verdict, make_runs(), color=False, width=120)


def test_columns_that_no_row_has_are_left_out():
    shown = verdict_table(two_cells())
    assert shown.columns == (
        "cell", "back end", "precision", "size", "p50", "× baseline", "memory", "accuracy", "verdict",
    )  # fmt: skip
    assert shown.rows[1] == (
        "pruned-int8", "onnxruntime", "int8", "241 KiB", "2.89 ms", "0.69 (0.67–0.71)", "61 MiB", "90.90 %", "PASS",
    )  # fmt: skip
    assert shown.rows[-1][-1] == "not compared"


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120])
def test_a_narrow_screen_keeps_the_decision_and_says_what_it_has_no_room_for(width):
    text = verdict_text(two_cells(), make_runs(), color=False, width=width)
    table = text.split("Side by side")[1].rsplit("PASS", 1)[0]
    assert max(map(len, text.splitlines())) <= width
    assert table.count("PASS") == 2
    assert "compared" in table.split("Not compared")[0]
    assert ("no room here for: memory" in " ".join(table.split())) == (width < 90)


def test_every_report_shows_them_side_by_side_with_what_installs_the_rest():
    verdict = two_cells()
    text = verdict_text(verdict, make_runs(), color=False, width=140)
    markdown = verdict_markdown(verdict, make_runs())
    page = report_html(verdict, make_runs(), make_artifacts())
    for report in (text, markdown, page):
        words = " ".join(re.sub(r"<[^>]*>", "", report).replace("\\", "").split())
        assert "0.69 (0.67–0.71)" in words
        assert "pruned-int8@tflite" in words
        assert "pip install" in words
    links = [link.get("href") for link in ET.fromstring(page.replace("<!DOCTYPE html>", "").encode()).iter("a")]
    assert links == ["#cell-1", "#cell-2"]


def test_a_runtime_that_is_not_installed_is_a_skipped_suite():
    root = ET.fromstring(verdict_junit(two_cells()).encode())
    suites = {suite.get("name"): suite for suite in root}
    assert list(suites) == ["pruned-int8", "pruned-int8@tflite", "pruned-int8@mnn"]
    assert "edgedeploy[mnn]" in suites["pruned-int8@mnn"].find("testcase/skipped").get("message")
    properties = {one.get("name"): one.get("value") for one in suites["pruned-int8@tflite"].find("properties")}
    assert (properties["backend"], properties["precision"]) == ("onnxruntime", "int8")
    assert float(properties["p50_s"]) == pytest.approx(0.00289, rel=0.01)
    assert root.get("failures") == root.get("errors") == "0"


@settings(max_examples=15, deadline=None)
@given(st.text())
def test_any_name_and_reason_gives_well_formed_reports(text):
    verdict = two_cells()
    rows = (*verdict.contenders, replace(AWAY, cell=text, absent=text or "away"))
    verdict = replace(verdict, contenders=rows)
    ET.fromstring(verdict_junit(verdict).encode())
    ET.fromstring(report_html(verdict, {}, {}).replace("<!DOCTYPE html>", "").encode())
    rows = [line for line in verdict_markdown(verdict, {}).splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows[: len(verdict.contenders) + 2]} == {10}


# ---------------------------------------------------------------- advice


def target(**slower) -> Target:
    rules = QuantizationRules(activation_dtype="int8", activation_symmetric=True)
    return Target(
        format="edgedeploy.target/1",
        name="board",
        description="",
        backends={
            name: BackendRules(precisions=("fp32", "int8"), int8_slower=slower.get(name, ""))
            for name in ("onnxruntime", "tflite", "mnn")
        }
        | {"floats": BackendRules(precisions=("fp32",))},
        quantization=dict.fromkeys(("onnxruntime", "tflite", "mnn"), rules),
    )


def test_advice_names_the_reason_and_what_is_better():
    assert int8_advice(target(mnn="its kernels are slow."), "mnn") == (
        "int8 is slower than fp32 with mnn on board: its kernels are slow; use int8 with onnxruntime or tflite or "
        "fp32 with mnn instead"
    )


def test_advice_does_not_send_people_to_what_is_slow_too():
    everywhere = target(onnxruntime="no dotprod", tflite="no dotprod", mnn="no dotprod")
    assert int8_advice(everywhere, "tflite").endswith(": no dotprod; use fp32 with tflite instead")


def test_there_is_no_advice_where_nothing_is_known():
    assert int8_advice(target(mnn="slow"), "tflite") == ""
    assert int8_advice(target(), "no such back end") == ""


def test_the_fastest_must_be_shown_to_be_faster_and_to_keep_accuracy():
    cells = [
        latency_cell("fp16", "PASS", -0.1),
        latency_cell("int8", "PASS", -0.5, accuracy="INCONCLUSIVE"),
        latency_cell("int4", "INCONCLUSIVE", -0.9),
    ]
    assert fastest_of(cells, "fp32", is_accuracy_judged=True) == "fp16"
    assert fastest_of(cells, "fp32", is_accuracy_judged=False) == "int8"
    assert fastest_of(cells[2:], "fp32", is_accuracy_judged=False) == "fp32"
    assert fastest_of([], "fp32", is_accuracy_judged=True) == "fp32"


@given(st.lists(st.tuples(st.sampled_from(["PASS", "FAIL", "INCONCLUSIVE"]), st.floats(-0.9, 2.0)), max_size=6))
def test_nothing_that_was_not_shown_to_be_faster_is_named_the_fastest(found):
    cells = [latency_cell(str(place), decision, effect) for place, (decision, effect) in enumerate(found)]
    name = fastest_of(cells, "fp32", is_accuracy_judged=True)
    faster = {cell.cell: faster_by(cell) for cell in cells if faster_by(cell) is not None}
    assert name == "fp32" if not faster else faster[name] == min(faster.values())


def test_slower_is_said_in_words_with_what_is_known():
    cells = [latency_cell("m8", "FAIL", 0.4), latency_cell("o8", "INCONCLUSIVE", 0.01, accuracy="FAIL")]
    rows = {"m8": row("m8", "mnn", "int8"), "o8": row("o8", "onnxruntime", "int8")}
    said = conclusions(cells, rows, {"mnn": "slow kernels."}, is_accuracy_judged=True)
    assert said == (
        "mnn int8 is slower than mnn fp32 here: +40.00 % (slow kernels)",
        "onnxruntime int8 is shown neither faster nor slower than onnxruntime fp32: +1.00 %",
        "onnxruntime int8 loses accuracy: so many samples",
    )


def test_int8_that_turns_out_fast_contradicts_what_the_target_says():
    said = conclusions(
        [latency_cell("m8", "PASS", -0.4)], {"m8": row("m8", "mnn", "int8")}, {"mnn": "slow"}, is_accuracy_judged=False
    )
    assert said == ("mnn int8 is not slower than fp32 here (-40.00 %), other than the target says: slow",)


def test_accuracy_that_is_not_shown_says_what_would_decide_it():
    cell = latency_cell("o8", "PASS", -0.4, accuracy="INCONCLUSIVE")
    (said,) = conclusions([cell], {"o8": row("o8", "onnxruntime", "int8")}, {}, is_accuracy_judged=True)
    assert "not shown to keep accuracy" in said
    assert "to decide it: more of them" in said


def test_without_a_latency_there_is_no_fastest():
    cell = make_cell(findings=tuple(replace(one, effect=None) for one in make_cell().findings))
    assert not has_latency([cell])
    assert has_latency([make_cell()])
    assert "quieter device" in conclusion(None, accuracy_margin="-1pt", is_evaluated=True)


def test_the_last_line_says_what_it_rests_on():
    fast = row("a", "tflite", "int8")
    judged = conclusion(fast, accuracy_margin="-1pt", is_evaluated=True)
    assert judged == "fastest that keeps accuracy within -1pt: tflite int8 (2 ms)"
    assert "no labels" in conclusion(fast, accuracy_margin="", is_evaluated=True)
    assert "give --evaluation" in conclusion(fast, accuracy_margin="", is_evaluated=False)


def test_how_a_play_off_ended_is_told():
    decided = [("a", "INCONCLUSIVE", 0.0), ("b", "PASS", -0.2), ("c", "FAIL", 0.3)]
    rows = {"fp32": row("fp32", "x", "fp32")} | {name: row(name, name, "int8") for name in "abc"}
    said = play_off_conclusions([latency_cell(*one) for one in decided], rows)
    assert said == (
        "a int8 is shown neither faster nor slower than x fp32: +0.00 %",
        "b int8 is faster than x fp32: -20.00 %",
        "c int8 is slower than x fp32: +30.00 %",
    )


def test_timing_ends_when_it_is_known_which_is_faster_and_not_before_the_first_look():
    rules = policy(latency_p50="+0%")
    assert is_timed(*runs_with_effects(normal_effects(1, 0.3, 0.01, 4)), rules, cells=1)
    assert is_timed(*runs_with_effects(normal_effects(1, -0.3, 0.01, 4)), rules, cells=1)
    assert not is_timed(*runs_with_effects(normal_effects(1, -0.3, 0.01, 3)), rules, cells=1)
    assert not is_timed(*runs_with_effects([0.02, -0.02, 0.01, -0.01]), rules, cells=1)


# ---------------------------------------------------------------- what may be compared


def test_two_runtimes_may_differ_in_what_they_copy_and_it_is_said():
    baseline, candidate = runs_with_effects([0.0] * 8)
    boundary = replace(baseline.boundary, includes_input_copy=not baseline.boundary.includes_input_copy, detail="other")
    other = replace(candidate, boundary=boundary, artifact=replace(candidate.artifact, backend="another"))
    assert why_not_comparable(baseline, other) is None
    baseline, other = (replace(run, memory=memory_of(60, 61, 62)) for run in (baseline, other))
    assert judge_peak_memory(baseline, other, None, error_rate=ErrorRate(0.05, 0.05)).effect is not None
    (said,) = unlike_copies(baseline, other)
    assert "includes a copy of the inputs" in said
    assert "includes_input_copy" in why_not_comparable(baseline, replace(candidate, boundary=boundary))[0]


def test_detail_alone_keeps_nobody_from_comparing():
    baseline, candidate = runs_with_effects([0.0] * 8)
    candidate = replace(candidate, boundary=replace(candidate.boundary, detail="other words"))
    assert why_not_comparable(baseline, candidate) is None
    assert unlike_copies(baseline, candidate) == ()


# ---------------------------------------------------------------- names and runtimes


@given(st.lists(st.from_regex(r"[a-z][a-z0-9-]{0,8}", fullmatch=True)))
def test_names_are_read_once_each_and_all_swallows_the_others(names):
    read = names_from_text(" , ".join(names))
    assert read == (("all",) if "all" in names else tuple(dict.fromkeys(names)))


def test_a_back_end_that_nobody_installed_is_a_state_and_not_an_error():
    states = backends_of(
        replace(target(), backends={"fake": target().backends["mnn"], "nobody": BackendRules(precisions=())}), ["all"]
    )
    assert states["fake"] is not None
    assert "install the package that brings it" in states["nobody"]
    with pytest.raises(UsageError, match="mnn"):
        backends_of(target(), ["mmn"])


def test_int8_needs_rules_and_precisions_come_widest_first():
    board = replace(target(), backends={"fake": BackendRules(precisions=("int8", "fp16", "fp32"))})
    assert allowed_precisions(board, BACKEND) == ("fp32",)
    rules = QuantizationRules(activation_dtype="int8", activation_symmetric=True)
    assert allowed_precisions(replace(board, quantization={"fake": rules}), BACKEND) == ("fp32", "int8")
