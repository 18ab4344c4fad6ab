"""The figures that every rendering shows: what is derived from runs and findings, and how it is worded."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from edgedeploy.records.artifact import Artifact
from edgedeploy.records.device import DeviceFacts
from edgedeploy.records.model import Model, OutputFidelity
from edgedeploy.records.run import Conditions, Run, Visit
from edgedeploy.records.verdict import CellVerdict, Finding, Metric, Verdict
from edgedeploy.units import format_bytes, format_change, format_duration, format_points

NOT_AVAILABLE = "not available"
NOT_JUDGED = "not judged"

# A distribution-free 95 % upper bound on the 95th percentile exists from 59 samples on: 0.95 ** 59 < 0.05.
P95_MIN_SAMPLES = 59

METRIC_TITLES: Mapping[Metric, str] = {
    "accuracy": "accuracy",
    "class_accuracy": "class accuracy",
    "latency_p50": "latency p50",
    "latency_p95": "latency p95",
    "latency_p99": "latency p99",
    "first_inference": "first inference",
    "load_time": "load time",
    "peak_memory": "peak memory",
    "artifact_size": "artifact size",
}
# What is counted in bytes; of all else that is no accuracy, the time is taken.
_IN_BYTES: tuple[Metric, ...] = ("peak_memory", "artifact_size")

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def printable(text: str) -> str:
    r"""Return text without control characters: no terminal obeys it and XML allows it.

    >>> printable("a\x1b[31mb\x00")
    'a[31mb'
    """
    return _CONTROL.sub("", text)


def one_line(text: str) -> str:
    """Return printable text with every run of white space as one space."""
    return " ".join(printable(text).split())


def count(number: int, singular: str, plural: str = "") -> str:
    """Return a count with its noun.

    >>> count(1, "visit"), count(12000, "visit")
    ('1 visit', '12,000 visits')
    """
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def format_share(fraction: float) -> str:
    """Return a share of a whole.

    >>> format_share(0.9125)
    '91.25 %'
    """
    return f"{fraction * 100:.2f} %"


def quantile(ordered: Sequence[float], fraction: float) -> float:
    """Return a quantile of sorted numbers, linear between neighbours.

    >>> quantile([1.0, 2.0, 4.0], 0.75)
    3.0
    """
    place = fraction * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def drop_reason(visit: Visit) -> str:
    """Return why a visit does not count, "" when it does; the gate leaves out the same visits."""
    if visit.dropped:
        return one_line(visit.dropped) or "no reason was given"
    if visit.before.throttled or visit.after.throttled:
        return "the device's own flag said that it was throttled"
    return "" if any(burst.samples_s for burst in visit.bursts) else "it has no timed inference"


def visit_samples_s(visit: Visit) -> tuple[float, ...]:
    """Return every timed inference of a visit, in order."""
    return tuple(sample for burst in visit.bursts for sample in burst.samples_s)


@dataclass(frozen=True, slots=True)
class RunFigures:
    """One run in a few numbers, over the visits that count; None where there is nothing to say.

    Attributes:
        p50_s: the median of the visits' medians.
        p95_s: the median of the visits' 95th percentiles, of visits with enough samples for one.
        peak_rss_bytes: the median of the memory visits' high-water marks.
    """

    size_bytes: int
    visits: int
    dropped: int
    samples: int
    unsteady: int
    p50_s: float | None
    p95_s: float | None
    min_s: float | None
    load_s: float | None
    first_inference_s: float | None
    peak_rss_bytes: float | None
    import_rss_bytes: float | None


def run_figures(run: Run) -> RunFigures:
    """Return a run's figures."""
    counted = [visit for visit in run.visits if not drop_reason(visit)]
    samples_s = [sorted(visit_samples_s(visit)) for visit in counted]
    return RunFigures(
        size_bytes=run.artifact.size_bytes,
        visits=len(run.visits),
        dropped=len(run.visits) - len(counted),
        samples=sum(len(samples) for samples in samples_s),
        unsteady=sum(not visit.is_steady for visit in counted),
        p50_s=_median(quantile(samples, 0.5) for samples in samples_s),
        p95_s=_median(
            samples[math.ceil(0.95 * len(samples)) - 1] for samples in samples_s if len(samples) >= P95_MIN_SAMPLES
        ),
        min_s=min((samples[0] for samples in samples_s), default=None),
        load_s=_median(visit.load_s for visit in counted),
        first_inference_s=_median(visit.first_inference_s for visit in counted),
        peak_rss_bytes=_median(float(visit.peak_rss_bytes) for visit in run.memory),
        import_rss_bytes=_median(float(visit.import_rss_bytes) for visit in run.memory),
    )


def _median(numbers: Iterable[float]) -> float | None:
    found = list(numbers)
    return statistics.median(found) if found else None


@dataclass(frozen=True, slots=True)
class Row:
    """A labelled figure of the baseline and of the candidate, as text; `change` is empty where it means nothing."""

    label: str
    baseline: str
    candidate: str
    change: str = ""


def figure_rows(baseline: Run | None, candidate: Run | None) -> list[Row]:
    """Return the figures of two runs side by side; a missing run's are "not available"."""
    sides = [run_figures(run) if run else None for run in (baseline, candidate)]

    def row(label: str, number: Callable[[RunFigures], float | None], text: Callable[[float], str]) -> Row:
        before, after = [number(side) if side else None for side in sides]
        change = format_change(after / before - 1) if before and after is not None else ""
        return Row(label, _text(before, text), _text(after, text), change)

    return [
        row("latency p50", lambda side: side.p50_s, format_duration),
        row("latency p95", lambda side: side.p95_s, format_duration),
        row("fastest inference", lambda side: side.min_s, format_duration),
        row("load", lambda side: side.load_s, format_duration),
        row("first inference", lambda side: side.first_inference_s, format_duration),
        row("peak memory", lambda side: side.peak_rss_bytes, format_bytes),
        row("… of it the runtime's import", lambda side: side.import_rss_bytes, format_bytes),
        row("artifact size", lambda side: side.size_bytes, format_bytes),
        Row("visits (dropped)", *(f"{side.visits} ({side.dropped})" if side else NOT_AVAILABLE for side in sides)),
        Row("timed inferences that count", *(f"{side.samples:,}" if side else NOT_AVAILABLE for side in sides)),
        Row("visits never steady", *(f"{side.unsteady}" if side else NOT_AVAILABLE for side in sides)),
    ]


def _text(number: float | None, text: Callable[[float], str]) -> str:
    return NOT_AVAILABLE if number is None else text(number)


def condition_facts(run: Run) -> list[tuple[str, str]]:
    """Return the conditions before and after all of a run's visits: label and the range that was seen."""
    moments = [moment for visit in run.visits for moment in (visit.before, visit.after)]
    clocks_hz = [clock for moment in moments for clock in moment.cpu_clocks_hz or ()]
    hottest = [hottest_celsius(moment) for moment in moments]
    governors = {governor for moment in moments for governor in moment.governors or ()}
    return [
        ("governor", ", ".join(sorted(governors)) or NOT_AVAILABLE),
        ("core clocks", _span(clocks_hz, gigahertz)),
        ("hottest sensor", _span(hottest, lambda celsius: f"{celsius:.0f} °C")),
        ("throttled", _throttled(moments)),
        ("load average, 1 min", _span((moment.load_1min for moment in moments), "{:.2f}".format)),
        ("cores taken by others", _span((visit.foreign_load for visit in run.visits), "{:.2f}".format)),
        ("free memory", _span((moment.free_memory_bytes for moment in moments), format_bytes)),
        *_board_facts(moments),
    ]


def hottest_celsius(moment: Conditions) -> float | None:
    """Return the highest temperature that a device said, or None."""
    return max((moment.temperatures_celsius or {}).values(), default=None)


def _span(numbers: Iterable[float | None], text: Callable[[float], str]) -> str:
    """Return least and greatest of the known numbers, as one where they read alike."""
    known = [number for number in numbers if number is not None]
    if not known:
        return NOT_AVAILABLE
    low, high = text(min(known)), text(max(known))
    return low if low == high else f"{low} – {high}"


def gigahertz(hertz: float) -> str:
    """Print a clock rate."""
    return f"{hertz / 1e9:.2f} GHz"


def _board_facts(moments: Sequence[Conditions]) -> list[tuple[str, str]]:
    """Return what boards with sensors of their own say; a row that no moment knows is left out."""
    modes = sorted({one_line(moment.power_mode) for moment in moments if moment.power_mode})
    fixed = [moment.clocks_fixed for moment in moments if moment.clocks_fixed is not None]
    rails = sorted({rail for moment in moments for rail in moment.rails_w or ()})
    rows = [
        ("power mode", ", ".join(modes) or NOT_AVAILABLE),
        ("clocks fixed", ("yes" if all(fixed) else "no") if fixed else NOT_AVAILABLE),
        ("GPU clock", _span((moment.gpu_clock_hz for moment in moments), gigahertz)),
        ("memory clock", _span((moment.emc_clock_hz for moment in moments), gigahertz)),
    ]
    for rail in rails:
        watts = [(moment.rails_w or {}).get(rail) for moment in moments]
        rows.append((f"power of {one_line(rail)}", _span(watts, lambda power: f"{power:.1f} W")))
    rows.append(("fan", _span((moment.fan_rpm for moment in moments), lambda turns: f"{turns:.0f} rpm")))
    return [(label, text) for label, text in rows if text != NOT_AVAILABLE]


def gpu_facts(facts: DeviceFacts) -> list[tuple[str, str]]:
    """Return what a device has for TensorRT; a row that nothing is known of is left out."""
    jetpack = " ".join(part for part in (facts.jetpack, f"(Jetson Linux {facts.l4t})" if facts.l4t else "") if part)
    gpus = [
        f"{gpu.name} (sm_{gpu.compute_capability.replace('.', '')})" if gpu.compute_capability else gpu.name
        for gpu in facts.gpus
    ]
    pythons = sorted({one.python or "an unknown Python" for one in facts.tensorrt_bindings})
    bindings = f"bindings for Python {', '.join(pythons)}" if pythons else ""
    rows = [
        ("JetPack", jetpack),
        ("GPU", ", ".join(gpus)),
        ("GPU driver", facts.gpu_driver),
        ("CUDA", facts.cuda if facts.gpus else ""),
        ("TensorRT", ", ".join(part for part in (facts.tensorrt, bindings) if part)),
    ]
    return [(label, one_line(text)) for label, text in rows if text]


def _throttled(moments: Sequence[Conditions]) -> str:
    known = [moment.throttled for moment in moments if moment.throttled is not None]
    if not known:
        return NOT_AVAILABLE
    if not any(known):
        return "no"
    names = sorted({one_line(reason) for moment in moments for reason in moment.throttle_reasons or ()})
    text = f"yes, in {sum(known)} of {count(len(known), 'look')}"
    return f"{text} ({', '.join(names)})" if names else text


def boundary_text(run: Run) -> str:
    """Return what was inside the timed region, in words."""
    boundary = run.boundary
    if boundary is None:
        return NOT_AVAILABLE
    parts = [
        f"input copy {'inside' if boundary.includes_input_copy else 'outside'}",
        f"output copy {'inside' if boundary.includes_output_copy else 'outside'}",
        count(boundary.threads, "thread"),
        f"batch {boundary.batch}",
    ]
    return ", ".join([*parts, *(text for text in (boundary.detail, run.schedule) if text)])


def device_text(run: Run) -> str:
    """Return which device a run was measured on, in one line."""
    facts = run.facts
    memory = format_bytes(facts.memory_bytes) if facts.memory_bytes is not None else ""
    cores = count(facts.cores, "core") if facts.cores else ""
    known = [facts.cpu_model or facts.machine, cores, memory, facts.os_name or facts.system]
    return f"{run.device}: {', '.join(part for part in known if part) or NOT_AVAILABLE}"


@dataclass(frozen=True, slots=True)
class PairedAnswers:
    """The same samples answered by both artifacts (right/wrong metrics only)."""

    samples: int
    both_right: int
    both_wrong: int
    only_baseline_right: int
    only_candidate_right: int


def paired_answers(baseline: Run | None, candidate: Run | None) -> PairedAnswers | None:
    """Count agreeing and discordant answers; None without right/wrong answers of both runs to the same samples."""
    before = baseline.outputs if baseline else None
    after = candidate.outputs if candidate else None
    if before is None or after is None or before.scores is None or after.scores is None:
        return None
    is_same_question = before.dataset_sha256 == after.dataset_sha256 and len(before.scores) == len(after.scores)
    if not is_same_question or not {*before.scores, *after.scores} <= {0, 1}:
        return None
    pairs = [(bool(old), bool(new)) for old, new in zip(before.scores, after.scores, strict=True)]
    return PairedAnswers(
        samples=len(pairs),
        both_right=pairs.count((True, True)),
        both_wrong=pairs.count((False, False)),
        only_baseline_right=pairs.count((True, False)),
        only_candidate_right=pairs.count((False, True)),
    )


def accuracy_text(run: Run) -> str:
    """Return what a run's answers scored, with the count behind it."""
    outputs = run.outputs
    if outputs is None or outputs.value is None:
        return NOT_AVAILABLE
    samples = f"{count(outputs.samples, 'sample')} of {outputs.dataset}"
    if not is_higher_better(outputs.metric):
        return f"{outputs.metric} {outputs.value:.4g} ({samples})"
    right = f"{round(sum(outputs.scores)):,} of " if outputs.scores is not None else ""
    return f"{outputs.metric} {format_share(outputs.value)} ({right}{samples})"


def is_higher_better(accuracy_metric: str) -> bool:
    """Say whether a larger value of an accuracy metric is the better one."""
    return accuracy_metric != "mae"


@dataclass(frozen=True, slots=True)
class FindingText:
    """A finding in words.

    Attributes:
        change: of the candidate against the baseline, in its natural sign: accuracy that falls is negative.
        interval: likewise, low to high; empty where there is none.
        direction: "worse", "better" or "" (unknown or none).
        decision: as judged; "not judged" for a metric that is reported without a margin.
    """

    metric: str
    baseline: str
    candidate: str
    change: str
    interval: str
    direction: str
    margin: str
    decision: str
    reason: str
    needed: str

    @property
    def change_with_interval(self) -> str:
        """The change and, where there is one, its interval."""
        return f"{self.change} {self.interval}".strip()


def finding_text(finding: Finding, accuracy_metric: str) -> FindingText:
    """Put a finding in words.

    Args:
        finding: the finding.
        accuracy_metric: "top1", "top5" or "mae", which decides how accuracy is printed.
    """
    effect, low, high = (finite(number) for number in (finding.effect, finding.low, finding.high))
    interval = ""
    if low is not None and high is not None:
        ends = (high, low) if is_flipped(finding, accuracy_metric) else (low, high)
        interval = (
            f"[{effect_text(finding, ends[0], accuracy_metric)}, {effect_text(finding, ends[1], accuracy_metric)}]"
        )
    return FindingText(
        metric=metric_title(finding, accuracy_metric),
        baseline=_value_text(finding.metric, finding.baseline_value, accuracy_metric),
        candidate=_value_text(finding.metric, finding.candidate_value, accuracy_metric),
        change=NOT_AVAILABLE if effect is None else effect_text(finding, effect, accuracy_metric),
        interval=interval,
        direction="" if not effect else "worse" if effect > 0 else "better",
        margin=one_line(finding.margin.text) if finding.margin else "none",
        decision=decision_text(finding),
        reason=printable(finding.reason),
        needed=printable(finding.needed),
    )


def finite(number: float | None) -> float | None:
    """Return a number, or None for one that cannot be drawn or printed."""
    return number if number is not None and math.isfinite(number) else None


def metric_title(finding: Finding, accuracy_metric: str) -> str:
    """Return the words for a finding's metric."""
    title = METRIC_TITLES[finding.metric]
    if finding.metric == "class_accuracy" and finding.classes:  # the figures beside it are those of one class
        return f"{title} (class {finding.classes[0].label})"
    return f"{title} ({accuracy_metric})" if finding.metric == "accuracy" and accuracy_metric else title


def decision_text(finding: Finding) -> str:
    """Return the decision, or "not judged" for a metric that passed only for want of a margin."""
    return NOT_JUDGED if finding.margin is None and finding.decision == "PASS" else finding.decision


def is_flipped(finding: Finding, accuracy_metric: str) -> bool:
    """Say whether a positive effect (worse) is a fall of the value, as for accuracy."""
    return finding.metric == "class_accuracy" or (finding.metric == "accuracy" and is_higher_better(accuracy_metric))


def effect_text(finding: Finding, effect: float, accuracy_metric: str) -> str:
    """Print an effect in its natural sign and in the margin's kind."""
    signed = (-effect if is_flipped(finding, accuracy_metric) else effect) + 0.0  # + 0.0 turns -0.0 into 0.0
    kind: Literal["relative", "absolute", "points", "limit"]
    if finding.margin and finding.margin.kind != "limit":
        kind = finding.margin.kind
    else:
        kind = "points" if is_flipped(finding, accuracy_metric) else "relative"
    if kind == "points":
        return format_points(signed)
    if kind == "relative":
        return format_change(signed)
    sign = "-" if signed < 0 else "+"
    if finding.metric == "accuracy":
        return f"{signed:+.4g}"
    printed = format_bytes if finding.metric in _IN_BYTES else format_duration
    return sign + printed(abs(signed))


def _value_text(metric: Metric, value: float | None, accuracy_metric: str) -> str:
    number = finite(value)
    if number is None:
        return NOT_AVAILABLE
    if metric == "class_accuracy":
        return format_share(number)
    if metric == "accuracy":
        return format_share(number) if is_higher_better(accuracy_metric) else f"{number:.4g}"
    return format_bytes(number) if metric in _IN_BYTES else format_duration(number)


def accuracy_metric_of(cell: CellVerdict, runs: Mapping[str, Run]) -> str:
    """Return the name of the accuracy metric in a cell's runs; "" where neither run has one."""
    for name in (cell.candidate_run, cell.baseline_run):
        if (run := runs.get(name)) and run.outputs:
            return run.outputs.metric
    return ""


def cell_notes(cell: CellVerdict, runs: Mapping[str, Run]) -> list[str]:
    """Return what a reader should know about how a cell was measured: notes, events, dropped visits."""
    heard: dict[str, list[str]] = {one_line(note): [] for note in cell.notes}
    for side, name in (("baseline", cell.baseline_run), ("candidate", cell.candidate_run)):
        if run := runs.get(name):
            reasons = [reason for visit in run.visits if (reason := drop_reason(visit))]
            dropped = [
                f"{count(reasons.count(reason), 'visit')} of {len(run.visits)} dropped: {reason}"
                for reason in dict.fromkeys(reasons)
            ]
            for event in dict.fromkeys([*run.events, *dropped]):
                # What both sides or the judge say too is said once, without a side.
                heard.setdefault(one_line(event), []).append(side)
    return [f"{sides[0]}: {note}" if len(sides) == 1 else note for note, sides in heard.items()]


def decisive(verdict: Verdict) -> list[tuple[CellVerdict, Finding]]:
    """Return the findings that made the verdict what it is; none for PASS."""
    if verdict.decision == "PASS":
        return []
    return [
        (cell, finding)
        for cell in verdict.cells
        for finding in cell.findings
        if finding.decision == verdict.decision and cell.decision == verdict.decision
    ]


def verdict_sentence(verdict: Verdict) -> str:
    """Say in one sentence why the verdict is what it is."""
    if not verdict.cells:
        return "No cell was judged."
    found = decisive(verdict)
    cells = [cell for cell in verdict.cells if cell.decision == verdict.decision]
    judged = sum(decision_text(finding) != NOT_JUDGED for cell in verdict.cells for finding in cell.findings)
    if verdict.decision != "FAIL" and not judged:
        return "No metric has a margin, so nothing was judged."
    if verdict.decision == "PASS":
        return (
            f"{count(judged, 'judged metric')} in {count(len(verdict.cells), 'cell')}: "
            "none is worse than its margin allows."
        )
    names = _listed(dict.fromkeys(METRIC_TITLES[finding.metric] for _, finding in found)) or "the measurement"
    where = one_line(cells[0].cell) if len(cells) == 1 else count(len(cells), "cell")
    of = f"{names} of {where}"
    if verdict.decision == "FAIL":
        return f"{of}: worse than the margin allows."
    return f"{of}: not decided by what was measured."


def _listed(words: Iterable[str]) -> str:
    *most, last = list(words) or [""]
    return f"{', '.join(most)} and {last}" if most else last


OUTPUT_COLUMNS = ("output", "max abs", "max rel", "cosine", "SQNR", "same arg-max")
FIDELITY_COLUMNS = ("compared with", *OUTPUT_COLUMNS, "samples")


def fidelity_cells(output: OutputFidelity) -> tuple[str, ...]:
    """Return how far one output lies from its reference, under OUTPUT_COLUMNS."""
    return (
        output.output,
        f"{output.max_abs:.3g}",
        f"{output.max_relative:.3g}",
        f"{output.cosine:.6f}",
        "exact" if output.sqnr_db is None else f"{output.sqnr_db:.1f} dB",
        NOT_AVAILABLE if output.argmax_agreement is None else format_share(output.argmax_agreement),
    )


def fidelity_rows(converted: Artifact | Model) -> list[tuple[str, ...]]:
    """Return each conversion's figures, one row an output, under FIDELITY_COLUMNS."""
    return [
        (
            f"{fidelity.candidate} with {fidelity.reference}",
            *fidelity_cells(output),
            f"{fidelity.samples} of {fidelity.sample_source}",
        )
        for fidelity in converted.fidelity
        for output in fidelity.outputs
    ]
