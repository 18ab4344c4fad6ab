import json
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from edgedeploy.render.sarif import UNDECIDED, verdict_sarif

from .render_samples import make_cell, make_findings, make_runs, make_verdict
from .report_samples import rich_runs, rich_verdict


class _Strict(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    pass


class Message(_Strict):
    text: str


class MultiformatMessage(_Strict):
    text: str


class Configuration(_Strict):
    level: Literal["none", "note", "warning", "error"]


class ReportingDescriptor(_Strict):
    id: str
    name: str
    shortDescription: MultiformatMessage
    fullDescription: MultiformatMessage
    defaultConfiguration: Configuration


class ToolComponent(_Strict):
    name: str
    semanticVersion: str
    rules: list[ReportingDescriptor]


class Tool(_Strict):
    driver: ToolComponent


class ArtifactLocation(_Strict):
    uri: str


class Region(_Strict):
    startLine: int


class PhysicalLocation(_Strict):
    artifactLocation: ArtifactLocation
    region: Region


class LogicalLocation(_Strict):
    name: str
    kind: str


class Location(_Strict):
    physicalLocation: PhysicalLocation
    logicalLocations: list[LogicalLocation] = []


class Result(_Strict):
    ruleId: str
    level: Literal["none", "note", "warning", "error"]
    message: Message
    locations: list[Location]
    partialFingerprints: dict[str, str]
    properties: dict[str, Any] = {}


class AutomationDetails(_Strict):
    id: str
    description: Message


class SarifRun(_Strict):
    tool: Tool
    automationDetails: AutomationDetails
    columnKind: Literal["utf16CodeUnits", "unicodeCodePoints"]
    results: list[Result]
    properties: dict[str, Any]


class Log(_Strict):
    """The parts of the OASIS schema (SARIF 2.1.0, sarifLog) that are written: names, types and closed sets."""

    schema: str = msgspec.field(name="$schema")
    version: Literal["2.1.0"]
    runs: list[SarifRun]


def _parsed(text: str) -> SarifRun:
    log = msgspec.json.decode(text, type=Log)
    (run,) = log.runs
    rules = {rule.id for rule in run.tool.driver.rules}
    assert len(rules) == len(run.tool.driver.rules)
    for result in run.results:
        assert result.ruleId in rules
        assert all(one.physicalLocation.region.startLine >= 1 for one in result.locations)
        assert result.locations
    return run


def test_one_result_for_each_finding_that_did_not_pass():
    run = _parsed(verdict_sarif(rich_verdict(), rich_runs()))
    found = sorted((result.ruleId, result.level) for result in run.results)
    assert found == [
        ("class_accuracy", "error"),
        ("latency_p50", "error"),
        ("latency_p50", "warning"),
        ("latency_p99", "warning"),
    ]


def test_a_gate_that_passed_has_rules_and_no_results():
    run = _parsed(verdict_sarif(make_verdict(), make_runs()))
    assert run.results == []
    assert {rule.id for rule in run.tool.driver.rules} >= {"accuracy", "latency_p50", "peak_memory", "artifact_size"}


def test_a_result_points_at_the_cell_in_the_release_file():
    verdict = make_verdict(make_cell("FAIL"), decision="FAIL")
    lines = {"pruned-int8": 41}
    (result,) = _parsed(verdict_sarif(verdict, {}, release="models/edge deploy.toml", lines=lines)).results
    where = result.locations[0].physicalLocation
    assert (where.artifactLocation.uri, where.region.startLine) == ("models/edge%20deploy.toml", 41)
    assert result.locations[0].logicalLocations[0].name == "pruned-int8"
    (result,) = _parsed(verdict_sarif(verdict, {})).results
    assert result.locations[0].physicalLocation.artifactLocation.uri == "run-c"


def test_the_message_says_what_would_decide_it():
    verdict = make_verdict(make_cell("INCONCLUSIVE"), decision="INCONCLUSIVE")
    (result,) = _parsed(verdict_sarif(verdict, make_runs())).results
    assert "about 9 more blocks, or a quieter device" in result.message.text
    assert result.properties["effect"] == 0.041


def test_a_cell_that_no_metric_explains_and_a_gate_without_cells_are_results():
    cell = make_cell("INCONCLUSIVE", findings=(), notes=("the device left",))
    (result,) = _parsed(verdict_sarif(make_verdict(cell, decision="INCONCLUSIVE"), {})).results
    assert (result.ruleId, result.level) == (UNDECIDED, "warning")
    assert "the device left" in result.message.text
    (result,) = _parsed(verdict_sarif(replace(make_verdict(), cells=(), decision="INCONCLUSIVE"), {})).results
    assert result.ruleId == UNDECIDED


def test_the_same_cell_and_metric_is_the_same_alert_next_time():
    def prints(p50):
        findings = tuple(replace(one, candidate_value=p50) for one in make_findings("FAIL"))
        verdict = make_verdict(make_cell("FAIL", findings=findings), decision="FAIL")
        return [one.partialFingerprints for one in _parsed(verdict_sarif(verdict, {})).results]

    assert prints(0.004) == prints(0.005)
    other = make_verdict(make_cell("FAIL", cell="other"), decision="FAIL")
    assert prints(0.004) != [one.partialFingerprints for one in _parsed(verdict_sarif(other, {})).results]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_no_number_is_left_out(number):
    findings = tuple(replace(one, effect=number) for one in make_findings("FAIL"))
    text = verdict_sarif(make_verdict(make_cell("FAIL", findings=findings), decision="FAIL"), {})
    json.loads(text, parse_constant=pytest.fail)
    assert "effect" not in _parsed(text).results[0].properties


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_any_text_gives_a_valid_log(text):
    finding = replace(make_findings("FAIL")[1], reason=text, needed=text)
    cell = make_cell("FAIL", cell=text, device=text, candidate_run=text, findings=(finding,))
    written = verdict_sarif(make_verdict(cell, name=text, decision="FAIL"), {}, release=text, lines={text: 3})
    _parsed(written.encode().decode())
