"""A verdict as SARIF 2.1.0 (OASIS): a rule a metric, a result for each that failed or is not decided.

What code scanning shows is an alert at a line of a file, so every result points at the cell in the release file, or,
where there is none, at the candidate's stored run. FAIL is an error, INCONCLUSIVE a warning: it is not a pass.
"""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Mapping
from typing import Any

import edgedeploy
from edgedeploy.records.run import Run
from edgedeploy.records.verdict import CellVerdict, Decision, Finding, Verdict
from edgedeploy.render.figures import (
    METRIC_TITLES,
    accuracy_metric_of,
    finding_text,
    finite,
    one_line,
    verdict_sentence,
)
from edgedeploy.storage import sha256_bytes

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_LEVELS: Mapping[Decision, str] = {"FAIL": "error", "INCONCLUSIVE": "warning"}
# Of a rule about what has no metric: a cell that could not be measured, or a gate without cells.
UNDECIDED = "undecided"


def verdict_sarif(
    verdict: Verdict, runs: Mapping[str, Run], *, release: str = "", lines: Mapping[str, int] | None = None
) -> str:
    """Return a verdict as a SARIF log.

    Args:
        verdict: the verdict.
        runs: by run id; a missing run costs only the name of the accuracy's metric.
        release: path of the release file, relative to the repository's root; "" where none decided what is judged.
        lines: cell → its line in that file.
    """
    results = [
        _result(verdict, cell, finding, runs, release, lines or {})
        for cell in verdict.cells
        for finding in cell.findings
        if finding.decision != "PASS"
    ]
    silent = [
        cell
        for cell in verdict.cells
        if cell.decision != "PASS" and all(finding.decision == "PASS" for finding in cell.findings)
    ]
    results += [_undecided(verdict, cell, release, lines or {}) for cell in silent]
    if not verdict.cells and verdict.decision != "PASS":
        results.append(
            _plain_result(verdict, verdict.decision, verdict_sentence(verdict), release or "edgedeploy.toml", 1)
        )
    metrics = dict.fromkeys([*verdict.policy.margins, *(one.metric for cell in verdict.cells for one in cell.findings)])
    run = {
        "tool": {
            "driver": {
                "name": "edgedeploy",
                "semanticVersion": edgedeploy.__version__,
                "rules": [*(_rule(metric, METRIC_TITLES[metric]) for metric in metrics), _rule(UNDECIDED, "no answer")],
            }
        },
        "automationDetails": {
            "id": f"edgedeploy/{one_line(verdict.name)}/",
            "description": _text(verdict_sentence(verdict)),
        },
        "columnKind": "unicodeCodePoints",
        "results": results,
        "properties": {"decision": verdict.decision},
    }
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=1, ensure_ascii=False) + "\n"


def _rule(metric: str, title: str) -> dict[str, Any]:
    said = f"{title} must not get worse than its margin allows" if metric != UNDECIDED else "every cell must be judged"
    return {
        "id": metric,
        "name": "".join(word.capitalize() for word in metric.split("_")),
        "shortDescription": _text(said),
        "fullDescription": _text(
            f"{said}. FAIL: shown to be worse than the margin. INCONCLUSIVE: neither that nor the opposite is shown; "
            "the message says what would decide it."
        ),
        "defaultConfiguration": {"level": "error"},
    }


def _result(
    verdict: Verdict,
    cell: CellVerdict,
    finding: Finding,
    runs: Mapping[str, Run],
    release: str,
    lines: Mapping[str, int],
) -> dict[str, Any]:
    text = finding_text(finding, accuracy_metric_of(cell, runs))
    needed = f" To decide it: {text.needed}." if text.needed else ""
    where = f"{cell.cell} against {cell.baseline_cell} on {cell.device}"
    judged = f"{text.metric} {text.change_with_interval}, margin {text.margin}: {finding.decision}"
    said = f"{where}: {judged}. {text.reason}{needed}"
    numbers = {
        "baseline": finding.baseline_value,
        "candidate": finding.candidate_value,
        "effect": finding.effect,
        "low": finding.low,
        "high": finding.high,
        "pFail": finding.p_fail,
        "pPass": finding.p_pass,
    }
    return {
        **_located(verdict, cell, text.metric, release, lines),
        "ruleId": finding.metric,
        "level": _LEVELS[finding.decision],
        "message": _text(said),
        "properties": {
            "decision": finding.decision,
            "margin": text.margin,
            **{name: number for name, value in numbers.items() if (number := finite(value)) is not None},
        },
    }


def _undecided(verdict: Verdict, cell: CellVerdict, release: str, lines: Mapping[str, int]) -> dict[str, Any]:
    why = "; ".join(cell.notes) or "no metric was judged"
    return {
        **_located(verdict, cell, UNDECIDED, release, lines),
        "ruleId": UNDECIDED,
        "level": _LEVELS[cell.decision],
        "message": _text(f"{cell.cell} against {cell.baseline_cell} on {cell.device}: {cell.decision}. {why}"),
    }


def _located(
    verdict: Verdict, cell: CellVerdict, subject: str, release: str, lines: Mapping[str, int]
) -> dict[str, Any]:
    name = one_line(cell.cell)
    file, line = (release, lines.get(cell.cell, 1)) if release else (cell.candidate_run or "edgedeploy.toml", 1)
    identity = "\n".join((verdict.name, cell.cell, cell.baseline_cell, cell.device, subject))
    return {
        "locations": [{**_location(file, line), "logicalLocations": [{"name": name, "kind": "module"}]}],
        # The same cell and metric is the same alert from one gate to the next.
        "partialFingerprints": {"edgedeployCell/v1": sha256_bytes(identity.encode(errors="replace"))},
    }


def _plain_result(verdict: Verdict, decision: Decision, said: str, file: str, line: int) -> dict[str, Any]:
    return {
        "locations": [_location(file, line)],
        "partialFingerprints": {"edgedeployCell/v1": sha256_bytes(verdict.name.encode(errors="replace"))},
        "ruleId": UNDECIDED,
        "level": _LEVELS[decision],
        "message": _text(said),
    }


def _location(file: str, line: int) -> dict[str, Any]:
    uri = urllib.parse.quote(one_line(file).replace("\\", "/"))
    return {"physicalLocation": {"artifactLocation": {"uri": uri}, "region": {"startLine": max(line, 1)}}}


def _text(said: str) -> dict[str, str]:
    return {"text": one_line(said)}
