"""Did the board change, or the model? A small model that never changes is the witness. Pure: no I/O, no clock.

It is visited, in a fresh process, before the first block of a session and after the last. Two things are asked of its
medians: how far the end lies from the start, and how far both lie from the device's earlier sessions with the same file
on the same runtime and processor. Each is held against a prediction interval for one more session, from the mean and
the standard deviation that the earlier sessions had (Student's t; Hahn & Meeker 1991, §4.7), so that what a board
always does, such as to warm up in a session, is no alarm. Without five earlier sessions the first question is answered
by the noise between runs that the device's passport tells, and the second is not asked.

False alarms: the two intervals together are to be left by 1 % of the sessions of a board on which nothing happened.
Simulated for 5 to 30 earlier sessions (40,000 boards each): 1.0 % for normal logarithms, 2.2 to 3.0 % for Student's t
with 3 degrees of freedom. What is smaller than 1 % is never an alarm: a pair that is measured interleaved
does not see it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from edgedeploy.judge.percentiles import samples_of
from edgedeploy.records.passport import Passport, SentinelReading, SentinelSummary
from edgedeploy.records.run import Visit
from edgedeploy.units import format_change, format_duration

# Of sessions in which nothing happened.
FALSE_ALARMS = 0.01
LEAST_SESSIONS = 5
LEAST_CHANGE = 0.01
# Older ones say little about today's board.
MOST_SESSIONS = 30


def ends_of(visits: Sequence[Visit]) -> tuple[float, float] | None:
    """Return the medians of the sentinel's visits before the first block and after the last; None without both."""
    ends = {visit.block >= 0: visit for visit in visits if not visit.dropped and _is_sound(visit)}
    if len(ends) < 2:
        return None
    return statistics.median(samples_of(ends[False])), statistics.median(samples_of(ends[True]))


def reading_of(run: Any, *, file: str = "") -> SentinelReading | None:
    """Return what the sentinel took in a run's session; None where it was not visited at both ends undisturbed.

    Args:
        run: a Run, or what was read of one without its samples.
        file: where it is kept.
    """
    ends = ends_of(run.sentinel)
    if ends is None:
        return None
    return SentinelReading(
        session=run.session,
        started_utc=run.started_utc,
        device=run.device,
        cpu_model=run.facts.cpu_model,
        boot_id=run.facts.boot_id,
        backend=run.artifact.backend,
        artifact_sha256=run.sentinel_sha256,
        runtime=run.runtime,
        start_s=ends[0],
        end_s=ends[1],
        file=file,
    )


def judge_sentinel(
    reading: SentinelReading, earlier: Sequence[SentinelReading], passport: Passport | None = None
) -> SentinelSummary:
    """Say whether the board changed in a session, or since the sessions before it.

    Args:
        reading: of the session.
        earlier: of others, on any device; those that are not of the same device, processor, file and runtime, or not
            older, are left out.
        passport: of the device; its noise is used while there are too few earlier sessions.
    """
    series = series_before(reading, earlier)
    within = math.log(reading.end_s / reading.start_s)
    share = FALSE_ALARMS / 2
    usual, noise = 0.0, None
    if len(series) >= LEAST_SESSIONS:
        usual, noise = _prediction([math.log(one.end_s / one.start_s) for one in series], share)
    elif passport is not None and passport.cpu_model == reading.cpu_model and passport.blocks > 1:
        # Two fresh processes differ by sqrt(2) times what one varies by; a passport has two visits a block.
        noise = _quantile(share, 2 * passport.blocks - 1) * passport.run_to_run_cv * math.sqrt(2)
    change_within = within - usual
    since, noise_since = None, None
    if len(series) >= LEAST_SESSIONS:
        mean, noise_since = _prediction([_level(one) for one in series], share)
        since = _level(reading) - mean
    moved_within = noise is not None and abs(change_within) > max(noise, LEAST_CHANGE)
    moved_since = since is not None and noise_since is not None and abs(since) > max(noise_since, LEAST_CHANGE)
    return SentinelSummary(
        reading=reading,
        change_within=math.expm1(within),
        noise_within=None if noise is None else math.expm1(max(noise, LEAST_CHANGE)),
        change_from_before=None if since is None else math.expm1(since),
        noise_from_before=None if noise_since is None else math.expm1(max(noise_since, LEAST_CHANGE)),
        sessions=len(series),
        board_changed=moved_within or moved_since,
        statement=_statement(reading, series, moved_within, moved_since, noise, since, noise_since, within),
    )


def series_before(reading: SentinelReading, known: Sequence[SentinelReading]) -> list[SentinelReading]:
    """Return the newest earlier sessions that a reading can be held against, one reading each, oldest first."""
    alike: dict[str, SentinelReading] = {}
    for one in known:
        is_same = all(
            getattr(one, key) == getattr(reading, key)
            for key in ("device", "cpu_model", "artifact_sha256", "runtime", "backend")
        )
        if is_same and one.session != reading.session and one.started_utc <= reading.started_utc:
            alike[one.session] = one
    return sorted(alike.values(), key=lambda one: (one.started_utc, one.session))[-MOST_SESSIONS:]


def _level(reading: SentinelReading) -> float:
    return (math.log(reading.start_s) + math.log(reading.end_s)) / 2


def _prediction(values: Sequence[float], share: float) -> tuple[float, float]:
    """Return the mean, and how far from it one more value lies with the chance 1 - share at most."""
    spread = statistics.stdev(values) * math.sqrt(1 + 1 / len(values))
    return statistics.fmean(values), _quantile(share, len(values) - 1) * spread


def _quantile(share: float, degrees: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 1 - share / 2))


def _statement(
    reading: SentinelReading,
    series: Sequence[SentinelReading],
    moved_within: bool,
    moved_since: bool,
    noise: float | None,
    since: float | None,
    noise_since: float | None,
    within: float,
) -> str:
    """Say in one sentence what the sentinel shows."""
    took = f"{format_duration(reading.start_s)} before the first block and {format_duration(reading.end_s)} after the"
    took = f"the sentinel, a small model that never changes, took {took} last"
    change = format_change(math.expm1(within))
    if moved_within and noise is not None:
        by = f"{len(series)} earlier sessions" if len(series) >= LEAST_SESSIONS else "its passport"
        return (
            f"the board changed, not the model, in this session on {reading.device}: {took} ({change}; by {by}, "
            f"{_usual(noise)} is its noise). Baseline and candidate were measured interleaved and compare "
            f"with each other, not with other sessions"
        )
    if moved_since and since is not None and noise_since is not None:
        return (
            f"the board changed, not the model, since the sessions before this one on {reading.device}: {took}, which "
            f"is {format_change(math.expm1(since))} against {len(series)} earlier sessions ({_usual(noise_since)} is "
            f"its noise). Latencies of this session compare with each other, not with those before it"
        )
    if noise is None:
        return f"{took} ({change}); how much of that is the device's noise is not known yet"
    return f"{took} ({change}), within the device's noise of {_usual(noise)}"


def _usual(noise: float) -> str:
    return f"±{math.expm1(max(noise, LEAST_CHANGE)) * 100:.1f} %"


def _is_sound(visit: Visit) -> bool:
    samples_s = samples_of(visit)
    return bool(samples_s) and all(math.isfinite(sample_s) and sample_s > 0 for sample_s in samples_s)
