"""What the gate knows of itself: how noisy a device is, and how often it called nothing a change."""

from __future__ import annotations

from typing import Literal

from edgedeploy.documents import Record

# History of edgedeploy.passport:
#   1 (0.2.0)  first version
FORMAT = "edgedeploy.passport/1"

# History of edgedeploy.aa:
#   1 (0.2.0)  first version
AA_FORMAT = "edgedeploy.aa/1"

# History of edgedeploy.budget:
#   1 (0.2.0)  first version
BUDGET_FORMAT = "edgedeploy.budget/1"


class SentinelReading(Record, frozen=True, kw_only=True):
    """What the sentinel, a small model that never changes, took at the two ends of a session.

    Attributes:
        session: the session's name; file: a run of it.
        artifact_sha256: of the sentinel as it was compiled; only equal ones are a series.
        runtime: what ran it; a newer one is another series.
        start_s, end_s: medians over the samples of one fresh process each.
    """

    session: str
    started_utc: str
    device: str
    cpu_model: str
    boot_id: str
    backend: str
    artifact_sha256: str
    runtime: str
    start_s: float
    end_s: float
    file: str = ""


class SentinelSummary(Record, frozen=True, kw_only=True):
    """What the sentinel says about a session.

    Attributes:
        change_within: from its start to its end, as a fraction; positive is slower.
        change_from_before: from the device's earlier sessions to this one; None without enough of them.
        noise_within, noise_from_before: what such a change may be where nothing happened; None: not known.
        sessions: how many earlier ones it is compared with.
        board_changed: whether either lies beyond its noise.
        statement: a sentence for people.
    """

    reading: SentinelReading
    change_within: float
    noise_within: float | None
    change_from_before: float | None
    noise_from_before: float | None
    sessions: int
    board_changed: bool
    statement: str


class Passport(Record, frozen=True, kw_only=True):
    """How noisy a device is: one artifact measured against itself, by the schedule and the test of the gate.

    Attributes:
        cpu_model, boot_id: of the device's facts; a passport of another processor says nothing about this one.
        schedule: in words, how bursts were alternated.
        error_rate: one-sided; what one metric of a gate may err, for which the smallest effects are.
        power: the chance of deciding that the smallest effects are for.
        level_s: the artifact's median latency.
        seconds: from connecting to the end; seconds_per_block: of that for a pair of fresh processes;
            setup_s: for everything that is done once in a session.
        blocks: pairs that count; dropped: that do not.
        run_to_run_cv: standard deviation / mean of the medians of single visits, both sides.
        block_spread: standard deviation of the effects of blocks (log ratios): what the gate judges by.
        effect, low, high: mean effect of the second side against the first, a fraction, and its 95 % interval: the
            artifact is the same, so that 0 lies in 19 of 20 such intervals.
        drift_per_hour: slope of the latency over time, a fraction an hour, with its 95 % interval; None where the
            visits are too few to tell.
        lag1_autocorrelation: of the medians of successive visits; block_autocorrelation: of successive blocks' effects.
        smallest_effects: "1m", "5m", "20m" → distance from a margin, a fraction, that is decided with that chance in
            that time; None: in that time nothing is decided, however large.
        seconds_to_decide: "1%", "3%", "5%" → time to decide at that distance; None: not within the most blocks.
        runs: names of the stored runs that all of it was computed from.
    """

    format: str = FORMAT
    device: str
    started_utc: str
    cpu_model: str
    boot_id: str
    artifact: str
    artifact_sha256: str
    backend: str
    runtime: str
    schedule: str
    error_rate: float
    power: float
    level_s: float
    seconds: float
    seconds_per_block: float
    setup_s: float
    blocks: int
    dropped: int = 0
    run_to_run_cv: float
    block_spread: float
    effect: float
    low: float
    high: float
    drift_per_hour: float | None = None
    drift_low: float | None = None
    drift_high: float | None = None
    lag1_autocorrelation: float | None = None
    block_autocorrelation: float | None = None
    smallest_effects: dict[str, float | None] = {}
    seconds_to_decide: dict[str, float | None] = {}
    sentinel: SentinelReading | None = None
    runs: tuple[str, ...]
    edgedeploy: str


class PassportSummary(Record, frozen=True, kw_only=True):
    """What a verdict carries of the newest passport of a device.

    Attributes:
        file: its name under bench_results/passports/<device>/.
        stale: why it no longer describes the device; "" where it does.
    """

    device: str
    file: str
    started_utc: str
    run_to_run_cv: float
    block_spread: float
    seconds_per_block: float
    smallest_effects: dict[str, float | None]
    drift_per_hour: float | None = None
    stale: str = ""


class AaCell(Record, frozen=True, kw_only=True):
    """What a gate of something against itself said about one cell."""

    cell: str
    device: str
    target: str
    decision: Literal["PASS", "FAIL", "INCONCLUSIVE"]
    failed: tuple[str, ...] = ()


class AaOutcome(Record, frozen=True, kw_only=True):
    """One gate of something against itself: every FAIL in it is a false alarm.

    Attributes:
        decision: of the gate.
        error_rate: what its policy allows; margins: metric → as written.
        seconds: from its begin to the verdict.
        runs: names of the stored runs.
    """

    format: str = AA_FORMAT
    name: str
    judged_utc: str
    decision: Literal["PASS", "FAIL", "INCONCLUSIVE"]
    cells: tuple[AaCell, ...]
    error_rate: float
    margins: dict[str, str]
    seconds: float
    runs: tuple[str, ...] = ()
    edgedeploy: str = ""


class AaSummary(Record, frozen=True, kw_only=True):
    """How often a gate of something against itself said FAIL.

    Attributes:
        rate: false_fails / gates, with its exact two-sided interval at `confidence` (Clopper & Pearson 1934).
        error_rate: the largest that the policies of these gates allow.
        devices: where they were measured.
        since_utc, until_utc: of the first and the last.
        proven_above: whether the rate is shown to be above the error rate.
    """

    gates: int
    false_fails: int
    passes: int
    inconclusive: int
    rate: float
    low: float
    high: float
    confidence: float
    error_rate: float
    devices: tuple[str, ...]
    since_utc: str
    until_utc: str
    median_seconds: float
    proven_above: bool = False


class PlannedBlocks(Record, frozen=True, kw_only=True):
    """What a time budget gives to one cell, settled before it is measured.

    Attributes:
        blocks: the most A/B blocks; seconds: what they take, with what is done once in the session.
        spread: standard deviation of a block's effect that is reckoned with; source: where that is known from.
        effect: distance from the margin that is decided with 80 % chance, a fraction; None: none, however large.
        margin: of the median latency, a fraction; None: not judged.
        is_enough: whether a candidate that is as fast as its baseline is likely to be decided.
    """

    cell: str
    device: str
    blocks: int
    seconds: float
    spread: float
    effect: float | None
    margin: float | None
    is_enough: bool
    source: str


class BudgetPlan(Record, frozen=True, kw_only=True):
    """How a time budget is spent over the cells of a run.

    Attributes:
        budget_s: wall-clock time that every device is used for at most.
        unknown: cells whose noise nobody knows; their first blocks are measured before the plan is made.
    """

    format: str = BUDGET_FORMAT
    budget_s: float
    cells: tuple[PlannedBlocks, ...]
    unknown: tuple[str, ...] = ()
