"""A cell's runs become a trend: where its level changed, whose change that was, and what may have done it. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from edgedeploy.history.changes import (
    LEAST_CHANGE,
    LEAST_SERIES,
    Noise,
    Steps,
    bounds,
    exact_steps,
    interval,
    steps,
)
from edgedeploy.records.history import (
    EXACT_METRICS,
    Cause,
    CellKey,
    Change,
    HistoryMetric,
    Point,
    Trend,
    Whose,
)
from edgedeploy.units import format_change

# A difference of sentinels counts from this many standard errors on: it is asked for at places chosen beforehand, so
# that no more than one in 370 is taken for a change where there is none.
_SURE = 3.0
# What can change what an artifact computes or how; the rest is the board's.
_OF_THE_MODEL = ("artifact", "runtime", "edgedeploy")
_EVALUATION = "evaluation set"
_DIGEST_CHARACTERS = 8
# The least number of sentinels on either side.
_LEAST_SENTINELS = 3


def worse_of(metric: HistoryMetric, points: Sequence[Point]) -> Literal["up", "down"]:
    """Return which way is worse: up, but for an accuracy that is no error."""
    is_error = bool(points) and points[-1].evaluation.startswith("mae ")
    return "down" if metric == "accuracy" and not is_error else "up"


def trend_of(cell: CellKey, metric: HistoryMetric, points: Sequence[Point]) -> Trend:
    """Return the trend of one metric.

    Args:
        cell, metric: what the points are of.
        points: in order of time.
    """
    is_exact = metric in EXACT_METRICS
    # Of a time that is not positive there is no ratio: a clock of the device that stood still.
    used = [place for place, point in enumerate(points) if is_exact or point.value > 0]
    chosen = [points[place] for place in used]
    if is_exact:
        found = exact_steps([point.value for point in chosen])
        changes = _exact_changes(metric, chosen, found)
    else:
        logs = [math.log(point.value) for point in chosen]
        found = steps(logs)
        changes = _changes(chosen, logs, found)
    return Trend(
        cell=cell,
        metric=metric,
        worse=worse_of(metric, points),
        points=tuple(points),
        changes=tuple(msgspec.structs.replace(change, index=used[change.index]) for change in changes),
        set_aside=tuple(used[place] for place in found.set_aside),
        noise=found.noise.spread if found.noise else None,
        autocorrelation=found.noise.memory if found.noise else None,
        note=_note(chosen, found, is_exact=is_exact),
    )


def newest_of(trend: Trend, last: int) -> Trend:
    """Return a trend with only so many of its newest points, and what lies among them; 0: all."""
    cut = max(len(trend.points) - last, 0) if last else 0
    return msgspec.structs.replace(
        trend,
        points=trend.points[cut:],
        changes=tuple(
            msgspec.structs.replace(change, index=change.index - cut) for change in trend.changes if change.index >= cut
        ),
        set_aside=tuple(place - cut for place in trend.set_aside if place >= cut),
        hidden=trend.hidden + cut,
    )


def _note(points: Sequence[Point], found: Steps, *, is_exact: bool) -> str:
    if not is_exact and len(points) < LEAST_SERIES:
        return f"too few runs to tell; that takes {LEAST_SERIES}, and there are {len(points)}"
    newest = len(points) - 1
    if newest in found.set_aside:
        calm = [point.value for place, point in enumerate(points) if place not in found.set_aside][-5:]
        stands_out = points[newest].value / statistics.median(calm) - 1 if calm else 0.0
        return (
            f"the newest run stands out by {format_change(stands_out)}; it counts as a change when three runs in a row "
            f"say so"
        )
    return ""


def _exact_changes(metric: HistoryMetric, points: Sequence[Point], found: Steps) -> list[Change]:
    changes = []
    is_share = worse_of(metric, points) == "down"
    for start in found.starts:
        before, after = points[start - 1], points[start]
        difference = after.value - before.value
        causes = _causes(before, after, is_scored=metric == "accuracy")
        changes.append(
            Change(
                index=start,
                utc_before=before.utc,
                utc=after.utc,
                before=before.value,
                after=after.value,
                change=difference if is_share or before.value == 0 else difference / before.value,
                whose="model" if any(one.what in (*_OF_THE_MODEL, _EVALUATION) for one in causes) else "unknown",
                why="it is counted, not timed, so that every change is one",
                causes=causes,
                run_before=before.run,
                run_after=after.run,
            )
        )
    return changes


def _changes(points: Sequence[Point], logs: Sequence[float], found: Steps) -> list[Change]:
    if found.noise is None or not found.starts:
        return []
    levels = [
        [place for place in range(begin, end) if place not in found.set_aside] or list(range(begin, end))
        for begin, end in bounds(found.starts, len(points))
    ]
    sentinels = _sentinel_noise(points)
    changes = []
    for start, old, new in zip(found.starts, levels, levels[1:], strict=False):
        before, after = (statistics.fmean(logs[place] for place in side) for side in (old, new))
        causes = _near(points, old, new)
        error = found.noise.error_of_difference(len(old), len(new))
        low, high = interval(after - before, error)
        whose, sentinel, why = _whose(points, old, new, after - before, error, causes, sentinels)
        changes.append(
            Change(
                index=start,
                utc_before=points[old[-1]].utc,
                utc=points[new[0]].utc,
                before=math.exp(before),
                after=math.exp(after),
                change=math.expm1(after - before),
                low=math.expm1(low),
                high=math.expm1(high),
                whose=whose,
                sentinel_change=sentinel,
                why=why,
                causes=causes,
                run_before=points[old[-1]].run,
                run_after=points[new[0]].run,
            )
        )
    return changes


def _near(points: Sequence[Point], old: Sequence[int], new: Sequence[int]) -> tuple[Cause, ...]:
    """Return what else changed at the place of a change, or within two runs of it: noise may have moved the place."""
    at = _causes(points[old[-1]], points[new[0]], is_scored=False)
    return at or _causes(points[old[-min(3, len(old))]], points[new[min(2, len(new) - 1)]], is_scored=False)


def _causes(before: Point, after: Point, *, is_scored: bool) -> tuple[Cause, ...]:
    """Return what two runs record and do not have alike, the likeliest cause first."""
    pairs = [
        ("runtime", before.runtime, after.runtime),
        ("edgedeploy", before.edgedeploy, after.edgedeploy),
        ("driver", before.driver, after.driver),
        ("kernel", before.kernel, after.kernel),
        ("system", before.system, after.system),
    ]
    if before.artifact_sha256 != after.artifact_sha256:
        pairs.insert(0, ("artifact", _artifact(before), _artifact(after)))
    if is_scored:
        pairs.insert(0, (_EVALUATION, before.evaluation, after.evaluation))
    return tuple(Cause(what=what, before=old or "none", after=new or "none") for what, old, new in pairs if old != new)


def _artifact(point: Point) -> str:
    digest = point.artifact_sha256[:_DIGEST_CHARACTERS]
    decision = f", {point.decision}" if point.decision else ""
    return f"{digest} ({point.release}{decision})" if point.release else digest


def _sentinel_noise(points: Sequence[Point]) -> Mapping[str, Noise]:
    """Return the noise of each sentinel that has enough readings."""
    readings: dict[str, list[float]] = {}
    for point in points:
        if point.sentinel_s is not None and point.sentinel_s > 0:
            readings.setdefault(point.sentinel, []).append(math.log(point.sentinel_s))
    found = {name: steps(logs).noise for name, logs in readings.items()}
    return {name: noise for name, noise in found.items() if noise is not None}


def _whose(
    points: Sequence[Point],
    old: Sequence[int],
    new: Sequence[int],
    whole: float,
    error: float,
    causes: Sequence[Cause],
    noises: Mapping[str, Noise],
) -> tuple[Whose, float | None, str]:
    """Say whose change it is, by the sentinel of the same sessions: its change, and a sentence.

    Args:
        points: of the whole series; old, new: places of the two levels.
        whole: the cell's change, a logarithm, with its standard error.
        causes: what else changed there.
        noises: of each sentinel.
    """
    done = [one.what for one in causes if one.what in _OF_THE_MODEL]
    name = points[new[0]].sentinel
    before, after = _read(points, old, name), _read(points, new, name)
    noise = noises.get(name)
    if noise is None or min(len(before), len(after)) < _LEAST_SENTINELS:
        is_other = any(points[place].sentinel not in ("", name) for place in old)
        lacking = (
            "the sentinel is another one since" if name and is_other else "too few runs on either side have a sentinel"
        )
        return "unknown", None, f"{lacking}: the board and the model cannot be told apart"

    def level(places: Sequence[int]) -> float:
        return statistics.fmean(math.log(points[place].sentinel_s or 1.0) for place in places)

    difference = level(after) - level(before)
    own_error = noise.error_of_difference(len(before), len(after))
    moved = abs(difference) > max(math.log1p(LEAST_CHANGE), _SURE * own_error)
    sentinel, told = math.expm1(difference), format_change(math.expm1(difference))
    if moved and difference * whole > 0:
        rest = abs(whole - difference) > max(math.log1p(LEAST_CHANGE), _SURE * math.hypot(error, own_error))
        if rest and done:
            return (
                "both",
                sentinel,
                f"the sentinel changed too ({told}), by another amount: the board and the {done[0]}",
            )
        return "board", sentinel, f"the sentinel, which never changes, changed too ({told}): it is the board"
    stayed = f"the sentinel stayed ({told})" if not moved else f"the sentinel went the other way ({told})"
    if done:
        return "model", sentinel, f"{stayed}, and the {' and the '.join(done)} changed"
    return "unknown", sentinel, f"{stayed}, and nothing that decides what is computed changed"


def _read(points: Sequence[Point], places: Sequence[int], sentinel: str) -> list[int]:
    return [
        place
        for place in places
        if points[place].sentinel == sentinel and (points[place].sentinel_s or 0.0) > 0 and sentinel
    ]
