"""PASS, FAIL or INCONCLUSIVE, and the findings that it rests on."""

from __future__ import annotations

from typing import Literal

from edgedeploy.documents import Record

# History of edgedeploy.verdict:
#   1 (0.1.0)  first version
FORMAT = "edgedeploy.verdict/1"

Decision = Literal["PASS", "FAIL", "INCONCLUSIVE"]
Metric = Literal["accuracy", "latency_p50", "latency_p95", "peak_memory", "artifact_size"]


class Margin(Record, frozen=True, kw_only=True):
    """How much worse a metric may get.

    Attributes:
        kind: "relative" (fraction of the baseline), "absolute" (in the metric's SI unit), "points" (difference of
            two fractions). Always the allowed *worsening*; below zero it demands an improvement.
        text: as the person wrote it.
    """

    kind: Literal["relative", "absolute", "points"]
    value: float
    text: str


class Policy(Record, frozen=True, kw_only=True):
    """The gate's rules.

    Attributes:
        margins: metric → margin; a metric without a margin is reported, not judged.
        error_rate: family-wise probability of a wrong PASS or a wrong FAIL in one gate.
        max_blocks: the last look; after it an undecided latency is INCONCLUSIVE.
        min_blocks: the first look.
    """

    margins: dict[Metric, Margin]
    error_rate: float = 0.05
    max_blocks: int = 16
    min_blocks: int = 4


class Finding(Record, frozen=True, kw_only=True):
    """One metric judged.

    Attributes:
        effect: candidate against baseline, signed so that positive is worse, in the margin's kind.
        low, high: two-sided interval of the effect at the level that was used; None where none exists (a size).
        p_fail: p-value against "not worse than the margin"; p_pass: against "worse than the margin".
        units: what was counted: blocks, samples, visits.
        reason: a sentence for people.
        needed: for INCONCLUSIVE: what would decide it.
    """

    metric: Metric
    decision: Decision
    baseline_value: float | None
    candidate_value: float | None
    effect: float | None
    low: float | None = None
    high: float | None = None
    p_fail: float | None = None
    p_pass: float | None = None
    margin: Margin | None
    units: int = 0
    reason: str
    needed: str = ""


class CellVerdict(Record, frozen=True, kw_only=True):
    """A candidate against its baseline."""

    cell: str
    baseline_cell: str
    device: str
    target: str
    decision: Decision
    findings: tuple[Finding, ...]
    baseline_run: str = ""
    candidate_run: str = ""
    seconds: float | None = None
    notes: tuple[str, ...] = ()


class Verdict(Record, frozen=True, kw_only=True):
    """A gate's answer."""

    format: str = FORMAT
    name: str
    decision: Decision
    cells: tuple[CellVerdict, ...]
    policy: Policy
    judged_utc: str
