import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from edgedeploy.render.junit import verdict_junit

from .render_samples import make_cell, make_verdict
from .report_samples import rich_verdict


def _parsed(verdict):
    return ET.fromstring(verdict_junit(verdict).encode())


def test_one_suite_a_cell_and_one_case_a_metric():
    root = _parsed(make_verdict(make_cell(), make_cell(cell="second")))
    assert [suite.get("name") for suite in root] == ["pruned-int8", "second"]
    metrics = [finding.metric for finding in make_cell().findings]
    assert [case.get("name") for case in root[0].iter("testcase")] == metrics


@pytest.mark.parametrize(("decision", "tag"), [("FAIL", "failure"), ("INCONCLUSIVE", "error")])
def test_what_did_not_pass_shows_as_not_passed(decision, tag):
    root = _parsed(make_verdict(make_cell(decision), decision=decision))
    (outcome,) = root.iter(tag)
    latency = next(finding for finding in make_cell(decision).findings if finding.metric == "latency_p50")
    assert outcome.get("message") == latency.reason
    assert root.get("failures" if tag == "failure" else "errors") == "1"
    assert latency.needed in outcome.text


def test_a_metric_without_a_margin_is_skipped_and_nothing_else_is():
    root = _parsed(make_verdict())
    skipped = [case.get("name") for case in root.iter("testcase") if case.find("skipped") is not None]
    assert skipped == ["latency_p95"]
    assert (root.get("tests"), root.get("failures"), root.get("errors"), root.get("skipped")) == ("5", "0", "0", "1")


def test_figures_are_properties():
    root = _parsed(make_verdict())
    case = next(case for case in root.iter("testcase") if case.get("name") == "latency_p50")
    figures = {entry.get("name"): entry.get("value") for entry in case.iter("property")}
    assert float(figures["effect"]) == -0.312
    assert figures["margin"] == "+5%"


def test_a_cell_that_no_metric_explains_is_still_not_passed():
    root = _parsed(
        make_verdict(make_cell("INCONCLUSIVE", findings=(), notes=("the device left",)), decision="INCONCLUSIVE")
    )
    (error,) = root.iter("error")
    assert error.get("message") == "the device left"


def test_a_verdict_without_cells_is_still_not_passed():
    root = _parsed(replace(make_verdict(), cells=(), decision="FAIL"))
    assert root.get("failures") == "1"


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_any_text_gives_well_formed_xml(text):
    finding = make_cell("FAIL").findings[1]
    evil = replace(finding, reason=text, needed=text)
    root = _parsed(
        make_verdict(make_cell("FAIL", cell=text, notes=(text,), findings=(evil,)), name=text, decision="FAIL")
    )
    assert root.get("failures") == "1"


def test_limits_and_classes_that_fail_are_properties():
    cases = {case.get("name"): case for case in next(iter(_parsed(rich_verdict()))).iter("testcase")}
    figures = {entry.get("name"): entry.get("value") for case in cases.values() for entry in case.iter("property")}
    assert (figures["limit"], figures["limit_decision"]) == ("0.005", "INCONCLUSIVE")
    assert figures["drop_of_class_3"] == "0.2"
    assert "drop_of_class_8" not in figures
    assert cases["latency_p99"].find("error") is not None
    assert cases["class_accuracy"].find("failure") is not None
