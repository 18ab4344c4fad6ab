"""PASS, FAIL or INCONCLUSIVE, and the findings that it rests on."""

from __future__ import annotations

from typing import Literal

from edgedeploy.documents import Record
from edgedeploy.records.target import Precision

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


class Contender(Record, frozen=True, kw_only=True):
    """One artifact beside others: a row of the table in which a reader looks for the best of them.

    Attributes:
        role: "baseline" for what others are compared with.
        p50_s, peak_rss_bytes: as measured beside the baseline; a baseline's are of the first pair that it was in.
        change, low, high: of the median latency against the baseline, measured interleaved: a fraction, positive is
            slower; None where it was not compared.
        metric: of the evaluation set; accuracy: its value.
        agreement: share of the evaluation samples with the baseline's arg-max; None where nobody asked.
        decision: of the cell; None for a baseline and for what was not measured.
        absent: why it was not measured, and what to do about it; "" where it was.
    """

    cell: str
    backend: str
    precision: Precision
    target: str
    device: str
    model: str = ""
    role: Literal["baseline", "candidate"] = "candidate"
    baseline_cell: str = ""
    size_bytes: int | None = None
    p50_s: float | None = None
    change: float | None = None
    low: float | None = None
    high: float | None = None
    peak_rss_bytes: float | None = None
    metric: str = ""
    accuracy: float | None = None
    agreement: float | None = None
    decision: Decision | None = None
    absent: str = ""


class LedgerEntry(Record, frozen=True, kw_only=True):
    """What became of a cell that was asked for.

    Attributes:
        state: "judged"; "failed": it cannot be built or measured; "pending": nothing could be done about it yet.
        reason: of a cell that is not judged.
        device: where it was measured, or was to be.
    """

    cell: str
    state: Literal["judged", "failed", "pending"]
    reason: str = ""
    device: str = ""


class Verdict(Record, frozen=True, kw_only=True):
    """A gate's answer.

    Attributes:
        contenders: all that was compared, side by side, and what could have been but is not installed.
        ledger: every cell that `run` was asked for, once; empty for other verbs.
    """

    format: str = FORMAT
    name: str
    decision: Decision
    cells: tuple[CellVerdict, ...]
    policy: Policy
    judged_utc: str
    contenders: tuple[Contender, ...] = ()
    ledger: tuple[LedgerEntry, ...] = ()
