"""PASS, FAIL or INCONCLUSIVE, and the findings that it rests on."""

from __future__ import annotations

from typing import Literal

from edgedeploy.documents import Record
from edgedeploy.records.explanation import Explanation
from edgedeploy.records.passport import AaSummary, PassportSummary
from edgedeploy.records.target import Precision

# History of edgedeploy.verdict:
#   1 (0.1.0)  first version
FORMAT = "edgedeploy.verdict/1"

Decision = Literal["PASS", "FAIL", "INCONCLUSIVE"]
Metric = Literal[
    "accuracy",
    "class_accuracy",
    "latency_p50",
    "latency_p95",
    "latency_p99",
    "first_inference",
    "load_time",
    "peak_memory",
    "artifact_size",
]


class Margin(Record, frozen=True, kw_only=True):
    """How much worse a metric may get, how much it may be at most, or both: then both must hold.

    Attributes:
        kind: "relative" (fraction of the baseline), "absolute" (in the metric's SI unit), "points" (difference of
            two fractions): always the allowed *worsening*; below zero it demands an improvement. "limit": nothing is
            asked of the change, only of the candidate itself; `value` then repeats `limit`.
        text: as the person wrote it.
        limit: what the candidate itself must keep to, in the metric's SI unit; None: nothing.
        is_floor: the limit is the least that it must reach (accuracy), not the most.
    """

    kind: Literal["relative", "absolute", "points", "limit"]
    value: float
    text: str
    limit: float | None = None
    is_floor: bool = False


class Policy(Record, frozen=True, kw_only=True):
    """The gate's rules.

    Attributes:
        margins: metric → margin; a metric without a margin is reported, not judged.
        error_rate: family-wise probability of a wrong PASS or a wrong FAIL in one gate.
        max_blocks: the last look; after it an undecided latency is INCONCLUSIVE.
        min_blocks: the first look.
        blocks: cell → its own last look, where a time budget settled it before measuring.
        allow_stored_pass: a candidate may pass on latency against a baseline that was measured in another session.
    """

    margins: dict[Metric, Margin]
    error_rate: float = 0.05
    max_blocks: int = 16
    min_blocks: int = 4
    blocks: dict[str, int] = {}
    allow_stored_pass: bool = False


class LimitFinding(Record, frozen=True, kw_only=True):
    """A limit on the candidate itself, judged.

    Attributes:
        limit: in the metric's SI unit; is_floor: the least that it must reach.
        value: the candidate's; low, high: its two-sided interval at the level that was used; None where none exists.
        p_fail: p-value against "the limit is kept"; p_pass: against "the limit is broken".
        units: what was counted: blocks, samples, visits.
    """

    decision: Decision
    limit: float
    is_floor: bool = False
    value: float | None
    low: float | None = None
    high: float | None = None
    p_fail: float | None = None
    p_pass: float | None = None
    units: int = 0
    reason: str
    needed: str = ""


class ClassFinding(Record, frozen=True, kw_only=True):
    """The answers to the samples of one class.

    Attributes:
        label: the class's number.
        decision: None: the class has too few samples to be judged and is set aside, or nothing is judged.
        samples: of this class; lost: answered rightly by the baseline only; gained: by the candidate only.
        baseline_value, candidate_value: share of right answers; effect: the drop, a difference of fractions.
        p_fail, p_pass: of this class alone, not corrected for the number of classes; None where nothing is judged.
        needed_samples: of this class, for it to be judged; None where it can be, or no number is enough.
    """

    label: int
    decision: Decision | None
    samples: int
    lost: int
    gained: int
    baseline_value: float
    candidate_value: float
    effect: float
    p_fail: float | None = None
    p_pass: float | None = None
    needed_samples: int | None = None


class Finding(Record, frozen=True, kw_only=True):
    """One metric judged.

    Attributes:
        effect: candidate against baseline, signed so that positive is worse, in the margin's kind; where that is
            "limit", as if there were no margin: a relative change, or points. Of class_accuracy: the largest drop.
        low, high: two-sided interval of the effect at the level that was used; None where none exists (a size).
        p_fail: p-value against "not worse than the margin"; p_pass: against "worse than the margin"; of both parts
            together where the margin has a limit too.
        units: what was counted: blocks, samples, visits.
        reason: a sentence for people.
        needed: for INCONCLUSIVE: what would decide it.
        needed_units, needed_s: how many more units, and the time that they take; needed_spread: the standard deviation
            of block effects, a fraction, at which the policy's blocks would be enough. None: not known, or none is.
        limit: the limit on the candidate itself; None where the margin has none.
        classes: of class_accuracy, the one with the largest drop first.
        is_stored: the sides were measured in different sessions, and the interval is widened for it.
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
    needed_units: int | None = None
    needed_s: float | None = None
    needed_spread: float | None = None
    limit: LimitFinding | None = None
    classes: tuple[ClassFinding, ...] = ()
    is_stored: bool = False


class CellVerdict(Record, frozen=True, kw_only=True):
    """A candidate against its baseline.

    Attributes:
        explanation: why a latency or the accuracy failed; None where none did, or nothing could be looked at.
    """

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
    explanation: Explanation | None = None


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
        aa: how often this gate called nothing a change, where that was tried; devices: how noisy each is known to be.
        command: the command line that made it; "" where it was made otherwise.
    """

    format: str = FORMAT
    name: str
    decision: Decision
    cells: tuple[CellVerdict, ...]
    policy: Policy
    judged_utc: str
    contenders: tuple[Contender, ...] = ()
    ledger: tuple[LedgerEntry, ...] = ()
    aa: AaSummary | None = None
    devices: tuple[PassportSummary, ...] = ()
    command: str = ""
