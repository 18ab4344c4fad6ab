import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from edgedeploy.records.run import Burst
from edgedeploy.records.verdict import Finding, Margin
from edgedeploy.render.drawings import block_ratios, time_ticks, visit_columns
from edgedeploy.render.figures import (
    cell_notes,
    condition_facts,
    figure_rows,
    finding_text,
    paired_answers,
    printable,
    quantile,
    run_figures,
    verdict_sentence,
)

from .render_samples import MARGINS, NO_CONDITIONS, make_cell, make_run, make_runs, make_verdict


def test_dropped_visits_do_not_count():
    run = make_run("baseline", blocks=4, samples=64, dropped_blocks={0: "throttled", 2: "throttled"})
    figures = run_figures(run)
    assert (figures.visits, figures.dropped, figures.samples) == (4, 2, 128)
    kept = [sample for visit in run.visits if not visit.dropped for burst in visit.bursts for sample in burst.samples_s]
    assert figures.min_s == min(kept)


def test_a_visit_that_the_board_says_was_throttled_does_not_count():
    run = make_run("baseline", blocks=2)
    hot = replace(run.visits[0], after=replace(run.visits[0].after, throttled=True))
    assert run_figures(replace(run, visits=(hot, run.visits[1]))).dropped == 1


def test_p95_is_given_only_where_a_visit_has_59_samples():
    assert run_figures(make_run("baseline", samples=58)).p95_s is None
    figures = run_figures(make_run("baseline", samples=59))
    assert figures.p95_s is not None
    assert figures.p50_s is not None
    assert figures.p95_s > figures.p50_s


def test_a_run_without_visits_has_no_figures():
    figures = run_figures(make_run("baseline", blocks=0))
    assert figures.p50_s is figures.min_s is figures.load_s is None
    rows = {row.label: row for row in figure_rows(make_run("baseline", blocks=0), None)}
    assert rows["latency p50"].baseline == rows["latency p50"].candidate == "not available"


def test_what_a_device_does_not_say_is_not_available_and_never_zero():
    run = make_run("baseline", blocks=1)
    visits = [replace(visit, before=NO_CONDITIONS, after=NO_CONDITIONS, foreign_load=None) for visit in run.visits]
    silent = replace(run, visits=tuple(visits))
    assert {text for _, text in condition_facts(silent)} == {"not available"}


def test_accuracy_that_falls_is_printed_as_a_negative_change_that_is_worse():
    finding = make_cell().findings[0]
    text = finding_text(finding, "top1")
    assert (text.change, text.interval, text.direction) == ("-0.35 pt", "[-0.82 pt, +0.12 pt]", "worse")


def test_an_error_that_grows_is_printed_as_a_positive_change_that_is_worse():
    finding = Finding(
        metric="accuracy",
        decision="FAIL",
        baseline_value=0.1,
        candidate_value=0.15,
        effect=0.05,
        margin=Margin(kind="absolute", value=0.01, text="+0.01"),
        reason="the error grew",
    )
    text = finding_text(finding, "mae")
    assert (text.baseline, text.candidate, text.change, text.direction) == ("0.1", "0.15", "+0.05", "worse")


def test_a_metric_without_a_margin_is_not_called_a_pass():
    findings = {finding.metric: finding for finding in make_cell().findings}
    assert finding_text(findings["latency_p95"], "top1").decision == "not judged"
    assert finding_text(findings["latency_p50"], "top1").decision == "PASS"


def test_numbers_that_are_not_finite_are_not_available():
    finding = Finding(
        metric="latency_p50",
        decision="INCONCLUSIVE",
        baseline_value=math.nan,
        candidate_value=None,
        effect=math.inf,
        low=-math.inf,
        high=math.inf,
        margin=MARGINS["latency_p50"],
        reason="one block",
    )
    text = finding_text(finding, "")
    assert (text.baseline, text.candidate, text.change, text.interval) == (*["not available"] * 3, "")


def test_paired_answers_add_up_to_the_samples():
    answers = paired_answers(*make_runs().values())
    assert answers is not None
    parts = (answers.both_right, answers.both_wrong, answers.only_baseline_right, answers.only_candidate_right)
    assert sum(parts) == answers.samples == 2000
    assert min(parts) > 0


def test_answers_to_different_questions_are_not_paired():
    assert paired_answers(make_run("baseline", questions=10), make_run("candidate", questions=11)) is None
    assert paired_answers(None, make_run("candidate")) is None


def test_notes_name_events_and_dropped_visits_once():
    runs = make_runs(dropped_blocks={3: "throttled"}, events=("a child died",))
    notes = cell_notes(make_cell(notes=("a child died",)), runs)
    assert notes == ["a child died", "1 visit of 8 dropped: throttled"]


def test_a_note_of_one_side_names_the_side():
    runs = {"run-b": make_run("baseline", events=("a child died",)), "run-c": make_run("candidate")}
    assert cell_notes(make_cell(notes=()), runs) == ["baseline: a child died"]


def test_the_sentence_names_what_failed_and_where():
    sentence = verdict_sentence(make_verdict(make_cell("FAIL"), make_cell(cell="other"), decision="FAIL"))
    assert "latency p50" in sentence
    assert "pruned-int8" in sentence
    assert "other" not in sentence


def test_a_gate_without_margins_does_not_claim_that_anything_was_judged():
    findings = tuple(finding for finding in make_cell().findings if finding.margin is None)
    assert "nothing was judged" in verdict_sentence(make_verdict(make_cell(findings=findings)))


def test_interleaved_visits_stand_in_the_order_in_which_they_ran():
    columns, footnotes = visit_columns(*make_runs(blocks=3, dropped_blocks={1: "busy"}).values())
    assert [column.side[0] for column in columns] == ["b", "c", "c", "b", "b", "c"]
    assert [column.mark for column in columns] == [0, 0, 1, 1, 0, 0]
    assert footnotes == ["busy"]


def test_visits_of_two_sessions_are_not_mixed():
    baseline, candidate = make_run("baseline", blocks=2), make_run("candidate", blocks=2, session="another")
    columns, _ = visit_columns(baseline, candidate)
    assert [column.side[0] for column in columns] == ["b", "b", "c", "c"]


def test_a_block_is_compared_by_its_neighbouring_bursts_so_that_drift_cancels():
    drift = (1.0, 1.5, 2.0)

    def drifting(side, position, level_s):
        run = make_run(side, blocks=1)
        bursts = tuple(Burst(pair=pair, samples_s=(level_s * slow,) * 5) for pair, slow in enumerate(drift))
        return replace(run, visits=(replace(run.visits[0], position=position, bursts=bursts),))

    columns, _ = visit_columns(drifting("baseline", 0, 0.010), drifting("candidate", 1, 0.011))
    assert block_ratios(columns) == {(0, 0): pytest.approx(0.1)}


def test_a_block_with_a_dropped_visit_is_not_compared():
    columns, _ = visit_columns(*make_runs(blocks=3, dropped_blocks={1: "busy"}).values())
    assert set(block_ratios(columns)) == {(0, 0), (0, 2)}


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-9, 100), st.floats(1.0, 50))
def test_axis_labels_differ_and_lie_inside(low_s, ratio):
    high_s = low_s * max(ratio, 1.06)
    ticks = time_ticks(low_s, high_s)
    assert len({label for _, label in ticks}) == len(ticks) <= 8
    assert all(low_s <= tick_s <= high_s for tick_s, _ in ticks)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(0, 1))
def test_a_quantile_lies_between_its_neighbours(numbers, fraction):
    ordered = sorted(numbers)
    found = quantile(ordered, fraction)
    below = int(fraction * (len(ordered) - 1))
    assert ordered[below] <= found <= ordered[min(below + 1, len(ordered) - 1)] + 1e-12


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_printable_text_holds_no_control_character(text):
    kept = printable(text)
    assert not any(ord(letter) < 32 and letter not in "\t\n" for letter in kept)
    assert "\x7f" not in kept
    kept.encode()
