"""The history of measured cells: their figures in order of time, where they changed, and what may have done it."""

from __future__ import annotations

from typing import Literal

from edgedeploy.documents import Record
from edgedeploy.records.verdict import Decision

HistoryMetric = Literal[
    "latency_p50",
    "latency_p95",
    "latency_p99",
    "load_time",
    "first_inference",
    "peak_memory",
    "artifact_size",
    "accuracy",
]
# What is counted or computed has no noise between runs: its every change is one.
EXACT_METRICS: tuple[HistoryMetric, ...] = ("artifact_size", "accuracy")

# Whose change it is: the sentinel, which never changes, tells the board from the model.
Whose = Literal["model", "board", "both", "unknown"]


class CellKey(Record, frozen=True, kw_only=True):
    """What one series of runs has in common.

    Attributes:
        options: of the artifact, sorted, "spin=false, threads=2"; "" for none.
        lab: who measured it; "" in the index of a folder, where that does not matter.
    """

    model: str
    target: str
    backend: str
    precision: str
    device: str
    options: str = ""
    lab: str = ""


class Point(Record, frozen=True, kw_only=True):
    """One run of a cell, and one figure of it.

    Attributes:
        value: in SI units; of accuracy the mean of its scores.
        digest: of the run's file; run: that file's name without its suffix; path: as it was read.
        cell: what the release file calls the cell.
        visits: of the run that count.
        evaluation: "top1 of NAME (digest)": what accuracy was computed on; "" where it was not.
        sentinel_s: median of the sentinel in the same session; None where there was none.
        sentinel: which sentinel that was, and its runtime: only equal ones are a series.
        system: operating system and board support, "Ubuntu 22.04, JetPack 6.2".
        release: name of the newest verdict that rests on the run; "" where none does.
        decision: of its cell in that verdict.
    """

    utc: str
    value: float
    digest: str
    run: str
    path: str
    cell: str
    session: str
    side: str
    artifact_sha256: str
    edgedeploy: str
    runtime: str
    kernel: str
    driver: str
    system: str
    visits: int
    evaluation: str = ""
    sentinel_s: float | None = None
    sentinel: str = ""
    release: str = ""
    decision: Decision | None = None


class Cause(Record, frozen=True, kw_only=True):
    """Something that a run records and that was not the same before a change and after it."""

    what: str
    before: str
    after: str


class Change(Record, frozen=True, kw_only=True):
    """A place in a series from which on its level is another one.

    Attributes:
        index: of the first point of the new level.
        before, after: the two levels, in the metric's unit.
        change: after / before - 1, or of accuracy after - before.
        low, high: 95 % interval of `change`, given that the place is right; None where the metric has no noise.
        sentinel_change: what the sentinel did at that place, a fraction; None: too few sentinels on either side.
        why: a sentence on whose change it is.
        causes: what else changed at that place, the likeliest first.
        run_before, run_after: names of the runs on either side.
    """

    index: int
    utc_before: str
    utc: str
    before: float
    after: float
    change: float
    low: float | None = None
    high: float | None = None
    whose: Whose = "unknown"
    sentinel_change: float | None = None
    why: str = ""
    causes: tuple[Cause, ...] = ()
    run_before: str = ""
    run_after: str = ""


class Trend(Record, frozen=True, kw_only=True):
    """One metric of one cell over time.

    Attributes:
        worse: which way is worse.
        changes: in order of time; they are found in the whole series, and their indices are of `points`.
        set_aside: indices of points that stand alone and count for no level.
        noise: standard deviation between runs, a fraction; None for a metric without noise or a series that is short.
        autocorrelation: of a run with the next; None likewise.
        note: what a reader should know: too short to tell, or a newest run that stands out; "" otherwise.
        hidden: how many older points are left out.
    """

    cell: CellKey
    metric: HistoryMetric
    worse: Literal["up", "down"]
    points: tuple[Point, ...]
    changes: tuple[Change, ...] = ()
    set_aside: tuple[int, ...] = ()
    noise: float | None = None
    autocorrelation: float | None = None
    note: str = ""
    hidden: int = 0


class CellRow(Record, frozen=True, kw_only=True):
    """A cell in one line.

    Attributes:
        name: what the newest release file calls it.
        metric: that `last`, `recent` and `change` are of.
        last: of the newest run that has it; values: metric → its newest value.
        recent: the newest values, oldest first, at most 40 of them.
        change: the newest change; since: runs from it on, itself included.
        decision, release, judged_utc: the newest verdict on it as a candidate; None and "" without one.
        path: of the newest run.
    """

    key: CellKey
    name: str
    runs: int
    first_utc: str
    last_utc: str
    metric: HistoryMetric
    worse: Literal["up", "down"]
    last: float | None
    values: dict[HistoryMetric, float]
    recent: tuple[float, ...]
    change: Change | None = None
    since: int = 0
    note: str = ""
    decision: Decision | None = None
    release: str = ""
    judged_utc: str = ""
    path: str = ""


class VerdictCell(Record, frozen=True, kw_only=True):
    """What a verdict says of one cell."""

    cell: str
    baseline_cell: str
    device: str
    target: str
    decision: Decision


class VerdictRow(Record, frozen=True, kw_only=True):
    """A verdict in one line.

    Attributes:
        id: digest of its file.
        path: as it was read.
    """

    id: str
    name: str
    decision: Decision
    judged_utc: str
    cells: tuple[VerdictCell, ...]
    path: str
    lab: str = ""


class DeviceRow(Record, frozen=True, kw_only=True):
    """A device as its runs know it.

    Attributes:
        sentinel_s: the newest level of its sentinel; None without one.
        sentinel_change: the newest change of that level: the board changed.
        passport: name of the newest passport's file; "" without one.
        run_to_run_cv: as that passport says.
    """

    device: str
    lab: str
    cells: int
    runs: int
    first_seen_utc: str
    last_seen_utc: str
    hostname: str
    machine: str
    system: str
    kernel: str
    driver: str
    sentinel_s: float | None = None
    sentinel_change: Change | None = None
    passport: str = ""
    passport_utc: str = ""
    run_to_run_cv: float | None = None


class Skipped(Record, frozen=True, kw_only=True):
    """A file that is left out, and why."""

    path: str
    why: str


class Refreshed(Record, frozen=True, kw_only=True):
    """What reading a results folder brought.

    Attributes:
        runs, verdicts, passports: that were new.
        known: files that had not changed and were not read again.
        removed: files that are gone; the index forgets them, a shared store does not.
        skipped: every file that is left out, also those known from before.
        rebuilt: why the index was made anew; "" where it was not.
    """

    runs: int = 0
    verdicts: int = 0
    passports: int = 0
    known: int = 0
    removed: int = 0
    skipped: tuple[Skipped, ...] = ()
    rebuilt: str = ""


def cell_text(cell: CellKey) -> str:
    """Return a cell in one word, as people name it.

    >>> cell_text(CellKey(model="m", target="t", backend="b", precision="int8", device="pi", options="threads=2"))
    'm/t/b/int8/pi (threads=2)'
    """
    device = f"{cell.device}@{cell.lab}" if cell.lab else cell.device
    options = f" ({cell.options})" if cell.options else ""
    return f"{cell.model}/{cell.target}/{cell.backend}/{cell.precision}/{device}{options}"
