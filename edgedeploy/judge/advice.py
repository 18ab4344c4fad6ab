"""Is a precision worth having: what is known of a target, and what was measured. Pure: no I/O, no clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgedeploy.judge.gate import judge
from edgedeploy.judge.speed import can_more_blocks_decide, latency_evidence
from edgedeploy.records.run import Run
from edgedeploy.records.target import Target
from edgedeploy.records.verdict import CellVerdict, Contender, Decision, Finding, Metric, Policy
from edgedeploy.units import format_change, format_duration


def int8_advice(target: Target, backend: str) -> str:
    """Say why int8 is slower than fp32 with a back end of a target, and what to use instead; "" where it is not.

    Args:
        target: resolved: `host` is what this machine is.
        backend: the back end that is to build int8.
    """
    rules = target.backends.get(backend)
    if rules is None or not rules.int8_slower:
        return ""
    better = [
        name
        for name, other in target.backends.items()
        if "int8" in other.precisions and name in target.quantization and not other.int8_slower
    ]
    reason = rules.int8_slower.strip().rstrip(".")
    instead = [*([f"int8 with {_listed(better)}"] if better else []), f"fp32 with {backend}"]
    return f"int8 is slower than fp32 with {backend} on {target.name}: {reason}; use {' or '.join(instead)} instead"


def fastest_of(cells: Sequence[CellVerdict], baseline: str, *, is_accuracy_judged: bool) -> str:
    """Return the fastest cell of one back end that is shown to keep accuracy.

    Args:
        cells: compared with one baseline.
        baseline: its cell, which keeps accuracy by definition; it is the answer where nothing is shown to be faster.
        is_accuracy_judged: whether a cell must be shown to keep accuracy.
    """
    faster = [
        (effect, cell.cell)
        for cell in cells
        if (effect := faster_by(cell)) is not None and (not is_accuracy_judged or _decision(cell, "accuracy") == "PASS")
    ]
    return min(faster, default=(0.0, baseline))[1]


def faster_by(cell: CellVerdict) -> float | None:
    """Return the change of latency of a candidate that is shown to be faster (below zero), else None."""
    finding = _finding(cell, "latency_p50")
    is_faster = finding is not None and finding.decision == "PASS" and finding.effect is not None and finding.effect < 0
    return finding.effect if is_faster and finding is not None else None


def play_off_conclusions(cells: Sequence[CellVerdict], rows: Mapping[str, Contender]) -> tuple[str, ...]:
    """Say how the best of two back ends compare."""
    said: list[str] = []
    for cell in cells:
        finding, ours, theirs = _finding(cell, "latency_p50"), rows[cell.cell], rows[cell.baseline_cell]
        if finding is None or finding.effect is None:
            continue
        shown = "slower" if finding.decision == "FAIL" else "faster"
        how = "shown neither faster nor slower" if finding.decision == "INCONCLUSIVE" else shown
        than = f"{theirs.backend} {theirs.precision}"
        said.append(f"{ours.backend} {ours.precision} is {how} than {than}: {format_change(finding.effect)}")
    return tuple(said)


def has_latency(cells: Sequence[CellVerdict]) -> bool:
    """Say whether any latency was compared."""
    return any((finding := _finding(cell, "latency_p50")) and finding.effect is not None for cell in cells)


def is_timed(baseline: Run, candidate: Run, policy: Policy, *, cells: int) -> bool:
    """Say whether further blocks cannot change which of two is faster.

    Other than `is_decided`, a candidate that has lost accuracy is timed all the same.

    Args:
        baseline: as measured until now.
        candidate: likewise.
        policy: with a margin for latency_p50.
        cells: how many are compared in all.
    """
    evidence = latency_evidence("latency_p50", baseline, candidate, policy.margins["latency_p50"])
    if len(baseline.visits) < policy.min_blocks:
        return False
    finding = _finding(judge(baseline, candidate, policy, cells=cells), "latency_p50")
    is_decided = finding is not None and finding.decision != "INCONCLUSIVE"
    return is_decided or not can_more_blocks_decide(evidence, policy)


def conclusions(
    cells: Sequence[CellVerdict], rows: Mapping[str, Contender], known: Mapping[str, str], *, is_accuracy_judged: bool
) -> tuple[str, ...]:
    """Say in words what a table of precisions shows: what is slower, what loses accuracy, what is not known.

    Args:
        cells: each precision against the fp32 of its back end.
        rows: cell → its row.
        known: back end → why its int8 is known to be slower on this target; "" where it is not.
        is_accuracy_judged: whether there was an evaluation set with labels.
    """
    said: list[str] = []
    for cell in cells:
        said += _on_latency(cell, rows[cell.cell], known)
        if is_accuracy_judged:
            said += _on_accuracy(cell, rows[cell.cell])
    return tuple(said)


def conclusion(row: Contender | None, *, accuracy_margin: str, is_evaluated: bool) -> str:
    """Return the last line: the fastest that keeps accuracy.

    Args:
        row: of the fastest; None where no latency counts.
        accuracy_margin: as written; "" where accuracy was not judged.
        is_evaluated: whether there was an evaluation set.
    """
    if row is None:
        return "which is the fastest is not known: no latency counts; measure again on a quieter device"
    took = f" ({format_duration(row.p50_s)})" if row.p50_s is not None else ""
    name = f"{row.backend} {row.precision}{took}"
    if accuracy_margin:
        return f"fastest that keeps accuracy within {accuracy_margin}: {name}"
    if is_evaluated:
        return f"fastest: {name}; whether it keeps accuracy is not known: the evaluation set has no labels"
    return f"fastest: {name}; whether it keeps accuracy was not measured: give --evaluation"


def _on_latency(cell: CellVerdict, row: Contender, known: Mapping[str, str]) -> list[str]:
    finding = _finding(cell, "latency_p50")
    name, why = f"{row.backend} {row.precision}", known.get(row.backend, "").strip().rstrip(".")
    if finding is None or finding.effect is None:
        return [f"{name} was not timed: {finding.reason}"] if finding else []
    change = format_change(finding.effect)
    if finding.decision == "FAIL":
        known_too = f" ({why})" if why and row.precision == "int8" else ""
        return [f"{name} is slower than {row.backend} fp32 here: {change}{known_too}"]
    if finding.decision == "INCONCLUSIVE":
        return [f"{name} is shown neither faster nor slower than {row.backend} fp32: {change}"]
    if why and row.precision == "int8":
        return [f"{name} is not slower than fp32 here ({change}), other than the target says: {why}"]
    return []


def _on_accuracy(cell: CellVerdict, row: Contender) -> list[str]:
    finding = _finding(cell, "accuracy")
    if finding is None or finding.decision == "PASS":
        return []
    name = f"{row.backend} {row.precision}"
    if finding.decision == "FAIL":
        return [f"{name} loses accuracy: {finding.reason}"]
    needed = f"; to decide it: {finding.needed}" if finding.needed else ""
    return [f"{name} is not shown to keep accuracy: {finding.reason}{needed}"]


def _finding(cell: CellVerdict, metric: Metric) -> Finding | None:
    return next((finding for finding in cell.findings if finding.metric == metric), None)


def _decision(cell: CellVerdict, metric: Metric) -> Decision | None:
    finding = _finding(cell, metric)
    return finding.decision if finding else None


def _listed(names: Sequence[str]) -> str:
    return " or ".join(names)
