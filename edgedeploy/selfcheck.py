"""The gate tried on itself: something is judged against itself, and every FAIL is a false alarm, which is counted.

Each outcome is appended to bench_results/aa/; the rate that they come to is carried in later verdicts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import edgedeploy
from edgedeploy import pipeline
from edgedeploy.errors import DeviceError, UsageError
from edgedeploy.judge.false_alarms import summary_of
from edgedeploy.records.passport import AaCell, AaOutcome, AaSummary
from edgedeploy.records.verdict import Verdict
from edgedeploy.results import Results


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """What came of it.

    Attributes:
        outcomes: of this time; summary: of them.
        kept: of all that are kept of these devices, these among them.
        files: where the outcomes were written.
    """

    outcomes: tuple[AaOutcome, ...]
    summary: AaSummary
    kept: AaSummary
    files: tuple[Path, ...]

    @property
    def is_proven_wrong(self) -> bool:
        """Whether the gate is shown to raise more false alarms than it may."""
        return self.summary.proven_above or self.kept.proven_above


def check(reference: Path, *, times: int, results: Path, progress: Callable[[str], None], **options: Any) -> SelfCheck:
    """Judge an artifact, or every candidate of a release file, against itself.

    Args:
        reference: an artifact's folder, or a release file.
        times: how often.
        results: where runs and outcomes are kept.
        progress: told what happens.
        options: those of `pipeline.gate`; of a release file only `device`, `lab`, `seed` and `wait_s`.

    Raises:
        UsageError: it is neither, or an option is none of a release file's.
        EdgedeployError: a gate could not be measured; those before it are kept.
    """
    if times < 1:
        raise UsageError(f"--times {times}: judge it at least once")
    store, seed = Results(results), int(options.pop("seed", 0))
    is_release = reference.suffix == ".toml"
    if not is_release and not (reference / "manifest.json").is_file():
        raise UsageError(
            f"{reference} is neither a folder that compile wrote nor a release file; a stored run cannot be measured "
            f"against itself"
        )
    outcomes, files = [], []
    for number in range(times):
        progress(f"gate {number + 1} of {times} of {reference} against itself")
        started_s = time.monotonic()
        chosen: Mapping[str, Any] = {
            **options,
            "seed": seed + number,
            "results": results,
            "progress": progress,
            "is_explained": False,
        }
        if is_release:
            verdict = pipeline.run(reference, against_itself=True, **chosen).verdict
        else:
            verdict = pipeline.gate(reference, baseline=reference, **chosen).verdict
        if not any(cell.findings for cell in verdict.cells):
            reasons = "; ".join(note for cell in verdict.cells for note in cell.notes)
            raise DeviceError(f"nothing of {reference} could be measured against itself: {reasons}")
        outcome = outcome_of(verdict, seconds=time.monotonic() - started_s)
        outcomes.append(outcome)
        files.append(store.save_aa(outcome))
        progress(f"gate {number + 1} of {times}: {outcome.decision}")
    summary = summary_of(outcomes)
    assert summary is not None, "at least one gate was judged"
    devices = set(summary.devices)
    kept = summary_of([one for one in store.aa_outcomes() if devices & {cell.device for cell in one.cells}])
    return SelfCheck(tuple(outcomes), summary, kept or summary, tuple(files))


def outcome_of(verdict: Verdict, *, seconds: float) -> AaOutcome:
    """Return what a verdict of something against itself says about the gate."""
    return AaOutcome(
        name=verdict.name,
        judged_utc=verdict.judged_utc,
        decision=verdict.decision,
        cells=tuple(
            AaCell(
                cell=cell.cell,
                device=cell.device,
                target=cell.target,
                decision=cell.decision,
                failed=tuple(finding.metric for finding in cell.findings if finding.decision == "FAIL"),
            )
            for cell in verdict.cells
        ),
        error_rate=verdict.policy.error_rate,
        margins={metric: margin.text for metric, margin in verdict.policy.margins.items()},
        seconds=seconds,
        runs=tuple(
            Path(file).stem for cell in verdict.cells for file in (cell.baseline_run, cell.candidate_run) if file
        ),
        edgedeploy=edgedeploy.__version__,
    )
