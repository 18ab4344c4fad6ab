"""A verdict as one self-contained HTML page: no script, no network, readable on a phone, printable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedeploy.records.artifact import Artifact
from edgedeploy.records.run import Run
from edgedeploy.records.verdict import CellVerdict, Finding, Verdict
from edgedeploy.render.compression import precision_facts, remaining_notes, statement_heading, statement_rows
from edgedeploy.render.drawings import HATCH, effect_svg, is_one_session, key_svg, ratios_svg, visit_columns, visits_svg
from edgedeploy.render.figures import (
    FIDELITY_COLUMNS,
    METRIC_TITLES,
    NOT_AVAILABLE,
    P95_MIN_SAMPLES,
    FindingText,
    PairedAnswers,
    Row,
    accuracy_metric_of,
    accuracy_text,
    boundary_text,
    cell_notes,
    condition_facts,
    count,
    decisive,
    fidelity_rows,
    figure_rows,
    finding_text,
    gpu_facts,
    one_line,
    paired_answers,
    printable,
    verdict_sentence,
)
from edgedeploy.render.side_by_side import verdict_table
from edgedeploy.units import format_bytes, format_duration

Facts = list[tuple[str, str]]

_TEMPLATE = Path(__file__).with_name("report.html.j2")


@dataclass(frozen=True, slots=True)
class _FindingView:
    text: FindingText
    plot: str


@dataclass(frozen=True, slots=True)
class _SideView:
    """One of the two runs of a cell; `run` is None where it was not handed over."""

    side: str
    run_id: str
    run: Run | None
    accuracy: str
    recipe: Facts
    fidelity: list[tuple[str, ...]]
    statements: list[tuple[str, list[tuple[str, str, str]]]]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _CellView:
    """Everything that the template shows of a cell; drawings are finished SVG."""

    anchor: str
    cell: CellVerdict
    took: str
    findings: list[_FindingView]
    figures: list[Row]
    visits_plot: str
    ratios_plot: str
    is_interleaved: bool
    footnotes: list[str]
    answers: PairedAnswers | None
    conditions: list[Row]
    recipe: list[Row]
    device: list[Row]
    sides: list[_SideView]
    notes: list[str]


def report_html(verdict: Verdict, runs: Mapping[str, Run], artifacts: Mapping[str, Artifact]) -> str:
    """Return the report as an HTML page that needs nothing else.

    Args:
        verdict: the verdict.
        runs: by run id, as in CellVerdict.baseline_run and candidate_run; what is missing is said to be missing.
        artifacts: manifests, found by their sha256 whatever their keys; likewise.
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Text from devices may hold anything; markup that we made ourselves is clean already.
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters["svg"] = Markup
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    manifests = {artifact.sha256: artifact for artifact in artifacts.values()}
    context: dict[str, Any] = {
        "verdict": verdict,
        "sentence": verdict_sentence(verdict),
        "why": [
            (one_line(cell.cell), finding_text(finding, accuracy_metric_of(cell, runs)))
            for cell, finding in decisive(verdict)
        ],
        "cells": [_cell_view(number, cell, runs, manifests) for number, cell in enumerate(verdict.cells, start=1)],
        "side_by_side": verdict_table(verdict),
        "anchors": {cell.cell: f"cell-{number}" for number, cell in enumerate(verdict.cells, start=1)},
        "decisions": ("PASS", "FAIL", "INCONCLUSIVE"),
        "margins": [(METRIC_TITLES[metric], margin.text) for metric, margin in verdict.policy.margins.items()],
        "tool": ", ".join(sorted({f"edgedeploy {run.edgedeploy}" for run in runs.values()})) or "edgedeploy",
        "hatch": HATCH,
        "keys": {"baseline": key_svg("baseline"), "candidate": key_svg("candidate")},
        "fidelity_columns": FIDELITY_COLUMNS,
        "p95_min_samples": P95_MIN_SAMPLES,
        "not_available": NOT_AVAILABLE,
    }
    return template.render(context)


def _cell_view(number: int, cell: CellVerdict, runs: Mapping[str, Run], manifests: Mapping[str, Artifact]) -> _CellView:
    baseline, candidate = runs.get(cell.baseline_run), runs.get(cell.candidate_run)
    accuracy_metric = accuracy_metric_of(cell, runs)
    columns, footnotes = visit_columns(baseline, candidate)
    latency = next((finding for finding in cell.findings if finding.metric == "latency_p50"), None)
    sides = [
        _side_view("baseline", cell.baseline_run, baseline, manifests),
        _side_view("candidate", cell.candidate_run, candidate, manifests),
    ]
    return _CellView(
        anchor=f"cell-{number}",
        cell=cell,
        took=format_duration(cell.seconds) if cell.seconds is not None else "",
        findings=[_finding_view(finding, accuracy_metric) for finding in cell.findings],
        figures=figure_rows(baseline, candidate),
        visits_plot=visits_svg(columns, f"{count(len(columns), 'visit')} of {cell.baseline_cell} and {cell.cell}"),
        ratios_plot=ratios_svg(columns, latency, "One point for each block that counts"),
        is_interleaved=is_one_session(baseline, candidate),
        footnotes=footnotes,
        answers=paired_answers(baseline, candidate),
        conditions=_rows(*(condition_facts(run) if run else [] for run in (baseline, candidate))),
        recipe=_rows(*(side.recipe for side in sides)),
        device=_rows(*(_device_facts(run) if run else [] for run in (baseline, candidate))),
        sides=sides,
        notes=cell_notes(cell, runs),
    )


def _finding_view(finding: Finding, accuracy_metric: str) -> _FindingView:
    text = finding_text(finding, accuracy_metric)
    described = f"{text.metric}: {text.change_with_interval} {text.direction}, margin {text.margin}, {text.decision}"
    return _FindingView(text, effect_svg(finding, described))


def _side_view(side: str, run_id: str, run: Run | None, manifests: Mapping[str, Artifact]) -> _SideView:
    manifest = manifests.get(run.artifact.sha256) if run else None
    return _SideView(
        side=side,
        run_id=run_id,
        run=run,
        accuracy=accuracy_text(run) if run else NOT_AVAILABLE,
        recipe=[*(_artifact_facts(run) if run else []), *(_manifest_facts(manifest) if manifest else [])],
        fidelity=fidelity_rows(manifest) if manifest else [],
        statements=[
            (statement_heading(one), statement_rows(one))
            for one in (manifest.compression.statements if manifest else ())
        ],
        notes=tuple(remaining_notes(manifest)) if manifest else (),
    )


def _rows(before: Facts, after: Facts) -> list[Row]:
    sides = dict(before), dict(after)
    labels = dict.fromkeys([*sides[0], *sides[1]])
    return [Row(label, *(side.get(label, NOT_AVAILABLE) for side in sides)) for label in labels]


def _device_facts(run: Run) -> Facts:
    facts = run.facts
    return [
        ("device", run.device),
        ("host name", facts.hostname or NOT_AVAILABLE),
        ("processor", " ".join(part for part in (facts.cpu_model, facts.machine) if part) or NOT_AVAILABLE),
        ("cores", str(facts.cores)),
        ("memory", format_bytes(facts.memory_bytes) if facts.memory_bytes is not None else NOT_AVAILABLE),
        ("instruction sets", ", ".join(facts.isa) or NOT_AVAILABLE),
        ("system", ", ".join(part for part in (facts.os_name, facts.system, facts.kernel) if part) or NOT_AVAILABLE),
        ("C library", facts.libc or NOT_AVAILABLE),
        ("Python", facts.python or NOT_AVAILABLE),
        *gpu_facts(facts),
        ("runtime", run.runtime or NOT_AVAILABLE),
        ("timed", boundary_text(run)),
        ("boot", facts.boot_id or NOT_AVAILABLE),
        ("started", run.started_utc),
        ("session", run.session),
        ("runner digest", run.runner_sha256),
    ]


def _artifact_facts(run: Run) -> Facts:
    artifact = run.artifact
    return [
        ("artifact", artifact.name),
        ("model", artifact.model),
        ("target", artifact.target),
        ("back end", artifact.backend),
        ("precision", artifact.precision),
        ("options", ", ".join(f"{key}={value}" for key, value in artifact.options.items()) or "none"),
        ("artifact size", format_bytes(artifact.size_bytes)),
        ("artifact digest", artifact.sha256),
        ("recipe digest", artifact.key),
    ]


def _manifest_facts(manifest: Artifact) -> Facts:
    recipe, compression, layers = manifest.recipe, manifest.compression, manifest.layers
    return [
        ("model digest", recipe.model_sha256),
        ("weights digest", recipe.weights_sha256 or "none"),
        ("target digest", recipe.target_sha256),
        ("calibration", recipe.calibration or "none"),
        ("calibration digest", recipe.calibration_sha256 or "none"),
        ("parameters", f"{compression.parameters:,}"),
        ("… of them not zero", f"{compression.nonzero_parameters:,}"),
        ("multiply-adds", f"{compression.macs:,}" if compression.macs is not None else NOT_AVAILABLE),
        ("operators", ", ".join(f"{number} {name}" for name, number in layers.operators.items()) or NOT_AVAILABLE),
        *precision_facts(manifest),
        ("tools", ", ".join(f"{package} {version}" for package, version in recipe.toolchain.items())),
        ("compiled", manifest.created_utc),
    ]
