"""A verdict as one self-contained HTML page: no network, readable on a phone, printable, complete without scripts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedeploy.records.artifact import Artifact
from edgedeploy.records.explanation import Explanation
from edgedeploy.records.model import TensorSpec
from edgedeploy.records.run import Run
from edgedeploy.records.verdict import CellVerdict, Finding, Verdict
from edgedeploy.render.charts import (
    distribution_svg,
    line_key_svg,
    panel_svg,
    sentinel_svg,
    strip_svg,
    strip_words,
)
from edgedeploy.render.commands import again, commands, in_lines
from edgedeploy.render.compression import precision_facts, remaining_notes, statement_heading, statement_rows
from edgedeploy.render.drawings import (
    HATCH,
    MAX_DOTS,
    Column,
    effect_svg,
    is_one_session,
    key_svg,
    limit_svg,
    ratios_svg,
    visit_columns,
    visits_svg,
)
from edgedeploy.render.explained import causes, caveats
from edgedeploy.render.explanation import (
    CLASS_COLUMNS,
    GROUP_COLUMNS,
    class_rows,
    group_rows,
    groups_note,
    headline,
)
from edgedeploy.render.figures import (
    FIDELITY_COLUMNS,
    METRIC_TITLES,
    NOT_AVAILABLE,
    NOT_JUDGED,
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
    format_share,
    gpu_facts,
    one_line,
    paired_answers,
    printable,
    verdict_sentence,
)
from edgedeploy.render.flips import ChangedAnswer, Flips, flips
from edgedeploy.render.operator_times import TIME_COLUMNS, time_rows, times_note
from edgedeploy.render.page_script import chart_data, page_script
from edgedeploy.render.series import Distribution, Panel, distribution, panels, sentinels, strips
from edgedeploy.render.side_by_side import verdict_table
from edgedeploy.render.thumbnails import thumbnail
from edgedeploy.render.trust import PASSPORT_COLUMNS, aa_lines, passport_rows
from edgedeploy.units import format_bytes, format_duration

Facts = list[tuple[str, str]]
# Digest of an evaluation set and place of a sample in it → the values of each input; None where it is not at hand.
SampleOf = Callable[[str, int], Mapping[str, Any] | None]

_TEMPLATE = Path(__file__).with_name("report.html.j2")
# Pictures of changed answers: of a cell, and of a page.
MOST_PICTURES, _MOST_PICTURES_OF_PAGE = 24, 96
# Inferences of all cells beyond which none are drawn one by one: the page would weigh megabytes.
_MOST_DOTS_OF_PAGE = 40_000
FINDING_CLASS_COLUMNS = ("class", "samples", "baseline", "candidate", "lost", "gained", "decision")
_MOST_CLASSES = 12


@dataclass(frozen=True, slots=True)
class _FindingView:
    """A finding; `limit_plot` is empty where it has no limit, `classes` where it is not of classes."""

    text: FindingText
    plot: str
    limit_plot: str
    classes: list[tuple[str, ...]]


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
    layer_times: list[tuple[str, ...]]
    layer_note: str


@dataclass(frozen=True, slots=True)
class _Picture:
    """A sample whose answer changed."""

    uri: str
    words: str
    fate: str


@dataclass(frozen=True, slots=True)
class _FlipsView:
    """Changed answers: a table of classes, or the most frequent changes; pictures, or why there are none."""

    flips: Flips
    table: list[tuple[int, list[tuple[int, str, float]]]]
    listed: list[tuple[int, int, int]]
    pictures: list[_Picture]
    no_pictures: str


@dataclass(frozen=True, slots=True)
class _ExplanationView:
    """Why the candidate differs, in words and rows."""

    record: Explanation
    headline: str
    causes: list[str]
    groups: list[tuple[str, ...]]
    groups_note: str
    classes: list[tuple[str, ...]]
    notes: list[str]


@dataclass(frozen=True, slots=True)
class _CellView:
    """Everything that the template shows of a cell; drawings are finished SVG."""

    anchor: str
    cell: CellVerdict
    took: str
    findings: list[_FindingView]
    explanation: _ExplanationView | None
    figures: list[Row]
    visits_plot: str
    ratios_plot: str
    is_interleaved: bool
    footnotes: list[str]
    distribution: Distribution | None
    distribution_plot: str
    beyond: str
    sentinels: list[tuple[str, str]]
    answers: PairedAnswers | None
    flips: _FlipsView | None
    strips: list[tuple[str, str]]
    panels: list[Panel]
    panel_plots: list[tuple[str, str]]
    conditions: list[Row]
    recipe: list[Row]
    device: list[Row]
    sides: list[_SideView]
    notes: list[str]
    again: str


def report_html(
    verdict: Verdict,
    runs: Mapping[str, Run],
    artifacts: Mapping[str, Artifact],
    *,
    sample_of: SampleOf = lambda digest, index: None,
) -> str:
    """Return the report as an HTML page that needs nothing else.

    Args:
        verdict: the verdict.
        runs: by run id, as in CellVerdict.baseline_run and candidate_run; what is missing is said to be missing.
        artifacts: manifests, found by their sha256 whatever their keys; likewise.
        sample_of: gives samples of the evaluation set, for pictures of those whose answer changed.
    """
    page = _Page(verdict, runs, {artifact.sha256: artifact for artifact in artifacts.values()}, sample_of)
    cells = [page.cell_view(number, cell) for number, cell in enumerate(verdict.cells, start=1)]
    script = page_script()
    context: dict[str, Any] = {
        "verdict": verdict,
        "sentence": verdict_sentence(verdict),
        "why": [
            (one_line(cell.cell), finding_text(finding, accuracy_metric_of(cell, runs)))
            for cell, finding in decisive(verdict)
        ],
        "cells": cells,
        "side_by_side": verdict_table(verdict),
        "anchors": {cell.cell: f"cell-{number}" for number, cell in enumerate(verdict.cells, start=1)},
        "decisions": ("PASS", "FAIL", "INCONCLUSIVE"),
        "margins": [(METRIC_TITLES[metric], margin.text) for metric, margin in verdict.policy.margins.items()],
        "tool": ", ".join(sorted({f"edgedeploy {run.edgedeploy}" for run in runs.values()})) or "edgedeploy",
        "hatch": HATCH,
        "keys": {"baseline": key_svg("baseline"), "candidate": key_svg("candidate")},
        "line_keys": {"baseline": line_key_svg("baseline"), "candidate": line_key_svg("candidate")},
        "fidelity_columns": FIDELITY_COLUMNS,
        "time_columns": TIME_COLUMNS,
        "group_columns": GROUP_COLUMNS,
        "class_columns": CLASS_COLUMNS,
        "finding_class_columns": FINDING_CLASS_COLUMNS,
        "p95_min_samples": P95_MIN_SAMPLES,
        "not_available": NOT_AVAILABLE,
        "aa": aa_lines(verdict.aa),
        "passport_columns": PASSPORT_COLUMNS,
        "passports": passport_rows(verdict.devices),
        "commands": commands(verdict),
        "in_lines": in_lines,
        "policy": script.policy,
        "chart_style": script.style,
        "script": script.text,
        "chart_data": chart_data([(view.anchor, view.distribution, view.panels) for view in cells]),
    }
    text: str = _template().render(context)
    return text


@functools.cache
def _template() -> Any:
    """Return the page's template; to compile it takes longer than to fill it."""
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
    environment.filters["ours"] = Markup
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))


class _Page:
    """A page while its cells are put together: what they share, and what is left of its room."""

    def __init__(
        self, verdict: Verdict, runs: Mapping[str, Run], manifests: Mapping[str, Artifact], sample_of: SampleOf
    ) -> None:
        self._verdict, self._runs, self._manifests, self._sample_of = verdict, runs, manifests, sample_of
        self._pictures_left = _MOST_PICTURES_OF_PAGE
        shown = [
            runs[name] for cell in verdict.cells for name in (cell.baseline_run, cell.candidate_run) if name in runs
        ]
        dots = sum(len(burst.samples_s) for run in shown for visit in run.visits for burst in visit.bursts)
        self._most_dots = MAX_DOTS if dots <= _MOST_DOTS_OF_PAGE else 0

    def cell_view(self, number: int, cell: CellVerdict) -> _CellView:
        """Return what is shown of a cell."""
        baseline, candidate = self._runs.get(cell.baseline_run), self._runs.get(cell.candidate_run)
        accuracy_metric = accuracy_metric_of(cell, self._runs)
        columns, footnotes = visit_columns(baseline, candidate)
        latency = next((finding for finding in cell.findings if finding.metric == "latency_p50"), None)
        spread, over_time = distribution(baseline, candidate), panels(baseline, candidate)
        sides = [
            _side_view("baseline", cell.baseline_run, baseline, self._manifests),
            _side_view("candidate", cell.candidate_run, candidate, self._manifests),
        ]
        return _CellView(
            anchor=f"cell-{number}",
            cell=cell,
            took=format_duration(cell.seconds) if cell.seconds is not None else "",
            findings=[_finding_view(finding, accuracy_metric) for finding in cell.findings],
            explanation=_explanation_view(cell.explanation) if cell.explanation else None,
            figures=figure_rows(baseline, candidate),
            visits_plot=self._visits_plot(cell, columns),
            ratios_plot=ratios_svg(columns, latency, "One point for each block that counts"),
            is_interleaved=is_one_session(baseline, candidate),
            footnotes=footnotes,
            distribution=spread,
            distribution_plot=distribution_svg(spread, "The share of inferences that took no longer than each time")
            if spread
            else "",
            beyond=_beyond_text(spread) if spread else "",
            sentinels=[
                (one.title, sentinel_svg(one.readings, f"{count(len(one.readings), 'visit')} of the sentinel"))
                for one in sentinels(baseline, candidate)
            ],
            answers=paired_answers(baseline, candidate),
            flips=self._flips_view(baseline, candidate),
            strips=[(strip.title, strip_svg(strip, strip_words(strip))) for strip in strips(baseline, candidate)],
            panels=over_time,
            panel_plots=[(panel.title, panel_svg(panel, _panel_words(panel))) for panel in over_time],
            conditions=_rows(*(condition_facts(run) if run else [] for run in (baseline, candidate))),
            recipe=_rows(*(side.recipe for side in sides)),
            device=_rows(*(_device_facts(run) if run else [] for run in (baseline, candidate))),
            sides=sides,
            notes=cell_notes(cell, self._runs),
            again=again(cell, self._verdict.policy),
        )

    def _visits_plot(self, cell: CellVerdict, columns: Sequence[Column]) -> str:
        described = f"{count(len(columns), 'visit')} of {cell.baseline_cell} and {cell.cell}"
        return visits_svg(columns, described, most_dots=self._most_dots)

    def _flips_view(self, baseline: Run | None, candidate: Run | None) -> _FlipsView | None:
        found = flips(baseline, candidate)
        if found is None or candidate is None or candidate.outputs is None:
            return None
        pictures, why = self._pictures(found.answers, candidate)
        most = max(found.counts.values(), default=1)
        table = [
            (before, [(after, *_share(found.counts.get((before, after), 0), most)) for after in found.classes])
            for before in found.classes
        ]
        return _FlipsView(
            flips=found,
            table=table if found.is_table else [],
            listed=[] if found.is_table else found.most_frequent(),
            pictures=pictures,
            no_pictures=why,
        )

    def _pictures(self, answers: Sequence[ChangedAnswer], run: Run) -> tuple[list[_Picture], str]:
        """Return pictures of the first changed answers, or why there are none."""
        outputs = run.outputs
        assert outputs is not None, "answers that changed are of outputs"
        manifest = self._manifests.get(run.artifact.sha256)
        specs: Sequence[TensorSpec] = manifest.inputs if manifest else ()
        made: list[_Picture] = []
        for answer in answers[: min(MOST_PICTURES, self._pictures_left)]:
            sample = self._sample_of(outputs.dataset_sha256, answer.index)
            if sample is None:
                return [], "The evaluation set is not in this machine's cache, so no pictures of its samples are shown."
            uri = thumbnail(sample, specs)
            if not uri:
                return [], "The samples are not images of one or three channels, so none are shown."
            made.append(_Picture(uri, _answer_words(answer), answer.fate))
        self._pictures_left -= len(made)
        return made, ""


def _share(number: int, most: int) -> tuple[str, float]:
    return (f"{number:,}" if number else "", round(100 * number / most))


def _answer_words(answer: ChangedAnswer) -> str:
    truth = "" if answer.label is None else f"true {answer.label}; "
    return f"sample {answer.index}: {truth}was {answer.before}, now {answer.after}"


def _beyond_text(shown: Distribution) -> str:
    """Say what lies beyond the right end of a distribution's chart."""
    told = [
        f"{beyond:,} of {samples:,} of the {side}"
        for side, beyond, samples in zip(("baseline", "candidate"), shown.beyond, shown.samples, strict=True)
        if samples
    ]
    return (
        f"Slower than {format_duration(shown.times_s[-1])}, and not drawn: {', '.join(told)}."
        if any(shown.beyond)
        else ""
    )


def _panel_words(panel: Panel) -> str:
    return "; ".join(
        f"{side}: {panel.text(min(values))} to {panel.text(max(values))}"
        for side, readings in (("baseline", panel.baseline), ("candidate", panel.candidate))
        if (values := [value for _, value in readings])
    )


def _explanation_view(found: Explanation) -> _ExplanationView:
    speed, accuracy = found.speed, found.accuracy
    return _ExplanationView(
        record=found,
        headline=headline(found),
        causes=causes(found),
        groups=group_rows(speed.groups) if speed else [],
        groups_note=groups_note(speed) if speed and speed.groups else "",
        classes=class_rows(accuracy) if accuracy else [],
        notes=caveats(found),
    )


def _finding_view(finding: Finding, accuracy_metric: str) -> _FindingView:
    text = finding_text(finding, accuracy_metric)
    described = f"{text.metric}: {text.change_with_interval} {text.direction}, margin {text.margin}, {text.decision}"
    limit = finding.limit
    return _FindingView(
        text,
        effect_svg(finding, described),
        limit_plot=limit_svg(limit, f"{text.metric} against its limit", limit.reason) if limit else "",
        classes=_finding_classes(finding),
    )


def _finding_classes(finding: Finding) -> list[tuple[str, ...]]:
    """Return the classes that lost most, under FINDING_CLASS_COLUMNS."""
    return [
        (
            str(one.label),
            f"{one.samples:,}",
            format_share(one.baseline_value),
            format_share(one.candidate_value),
            f"{one.lost:,}",
            f"{one.gained:,}",
            one.decision or (f"needs {one.needed_samples:,} samples" if one.needed_samples else NOT_JUDGED),
        )
        for one in finding.classes[:_MOST_CLASSES]
    ]


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
        layer_times=time_rows(run.layer_times) if run and run.layer_times else [],
        layer_note=times_note(run.layer_times) if run and run.layer_times else "",
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
