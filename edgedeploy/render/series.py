"""What the charts of a cell show, as numbers: distributions, conditions over time, single figures of visits. Pure."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgedeploy.records.run import Conditions, Run, Visit
from edgedeploy.render.figures import (
    drop_reason,
    finite,
    gigahertz,
    hottest_celsius,
    one_line,
    quantile,
    visit_samples_s,
)
from edgedeploy.units import format_bytes, format_duration

# A curve of some hundred points looks like one of all samples, and is a thousandth of them.
_MOST_POINTS = 240
# Beyond it single spikes would take most of the axis; a distribution's chart says how many it leaves out.
_TOP_SHARE = 0.98

Text = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Distribution:
    """Share of inferences that took no longer than each time; () for a side without inferences.

    Attributes:
        times_s: common to both sides, ascending.
        baseline, candidate: shares, one for each time.
        beyond: how many inferences of each side took longer than the last time.
        samples: of each side.
    """

    times_s: tuple[float, ...]
    baseline: tuple[float, ...]
    candidate: tuple[float, ...]
    beyond: tuple[int, int]
    samples: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Panel:
    """One quantity over time.

    Attributes:
        times_s: since the first visit of a session; baseline, candidate: (time, value) in that order.
        text: prints a value; unit: of `scale` × the value, of which round numbers stand on the axis.
    """

    title: str
    unit: str
    scale: float
    text: Text
    baseline: tuple[tuple[float, float], ...]
    candidate: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Strip:
    """One figure a visit, of both sides, as dots on a line.

    Attributes:
        scale: round numbers of `scale` × the value stand on the axis.
    """

    title: str
    scale: float
    text: Text
    baseline: tuple[float, ...]
    candidate: tuple[float, ...]


def distribution(baseline: Run | None, candidate: Run | None) -> Distribution | None:
    """Return the distribution of all inferences that count; None without any."""
    sides = [_counted_samples_s(run) for run in (baseline, candidate)]
    known = [side for side in sides if side]
    if not known:
        return None
    last_s = max(quantile(side, _TOP_SHARE) for side in known)
    shares = [number / (_MOST_POINTS // 2 - 1) for number in range(_MOST_POINTS // 2)]
    wanted = {min(quantile(side, share), last_s) for side in known for share in shares}
    times_s = tuple(sorted({*wanted, last_s}))

    def curve(side: Sequence[float]) -> tuple[float, ...]:
        return tuple(bisect.bisect_right(side, time_s) / len(side) for time_s in times_s) if side else ()

    return Distribution(
        times_s=times_s,
        baseline=curve(sides[0]),
        candidate=curve(sides[1]),
        beyond=(_beyond(sides[0], last_s), _beyond(sides[1], last_s)),
        samples=(len(sides[0]), len(sides[1])),
    )


def _counted_samples_s(run: Run | None) -> list[float]:
    visits = run.visits if run else ()
    return sorted(
        sample_s
        for visit in visits
        if not drop_reason(visit)
        for sample_s in visit_samples_s(visit)
        if finite(sample_s) is not None
    )


def _beyond(ordered_s: Sequence[float], last_s: float) -> int:
    return len(ordered_s) - bisect.bisect_right(ordered_s, last_s)


_MOMENTS: tuple[tuple[str, str, float, Callable[[Conditions], float | None], Text], ...] = (
    ("hottest sensor", "°C", 1.0, hottest_celsius, "{:.1f} °C".format),
    ("slowest core's clock", "GHz", 1e-9, lambda moment: min(moment.cpu_clocks_hz or (), default=None), gigahertz),
    ("GPU clock", "GHz", 1e-9, lambda moment: moment.gpu_clock_hz, gigahertz),
    ("load average, 1 min", "", 1.0, lambda moment: moment.load_1min, "{:.2f}".format),
    ("free memory", "GiB", 2.0**-30, lambda moment: _number(moment.free_memory_bytes), format_bytes),
    (
        "supply power",
        "W",
        1.0,
        lambda moment: sum(moment.rails_w.values()) if moment.rails_w else None,
        "{:.1f} W".format,
    ),
)


def panels(baseline: Run | None, candidate: Run | None) -> list[Panel]:
    """Return what the device said of itself before and after each visit; a quantity that nobody knows is left out."""
    found = []
    for title, unit, scale, value, text in _MOMENTS:
        sides = [_over_time(run, _of_moments(value)) for run in (baseline, candidate)]
        found.append(Panel(title, unit, scale, text, *sides))
    others = [_over_time(run, _foreign_load) for run in (baseline, candidate)]
    found.append(Panel("cores taken by others", "", 1.0, "{:.2f}".format, *others))
    return [panel for panel in found if len(panel.baseline) + len(panel.candidate) > 1]


def _number(value: int | None) -> float | None:
    return None if value is None else float(value)


def _of_moments(value: Callable[[Conditions], float | None]) -> Callable[[Visit], list[tuple[float, float | None]]]:
    def readings(visit: Visit) -> list[tuple[float, float | None]]:
        return [(moment.monotonic_s, value(moment)) for moment in (visit.before, visit.after)]

    return readings


def _foreign_load(visit: Visit) -> list[tuple[float, float | None]]:
    return [(visit.after.monotonic_s, visit.foreign_load)]


def _over_time(
    run: Run | None, readings: Callable[[Visit], list[tuple[float, float | None]]]
) -> tuple[tuple[float, float], ...]:
    """Return what was read, against the time since the run's session began."""
    visits = run.visits if run else ()
    begin_s = min((visit.before.monotonic_s for visit in visits), default=0.0)
    found = [
        (time_s - begin_s, number)
        for visit in visits
        for time_s, value in readings(visit)
        if (number := finite(value)) is not None and finite(time_s) is not None
    ]
    return tuple(sorted(found))


def strips(baseline: Run | None, candidate: Run | None) -> list[Strip]:
    """Return load, first inference and peak memory, visit by visit; one that neither side has is left out."""
    runs = (baseline, candidate)

    def of_visits(value: Callable[[Visit], float]) -> list[tuple[float, ...]]:
        return [
            tuple(
                number
                for visit in (run.visits if run else ())
                if not drop_reason(visit) and (number := finite(value(visit))) is not None
            )
            for run in runs
        ]

    peaks = [tuple(float(visit.peak_rss_bytes) for visit in (run.memory if run else ())) for run in runs]
    found = [
        Strip("load", 1.0, format_duration, *of_visits(lambda visit: visit.load_s)),
        Strip("first inference", 1.0, format_duration, *of_visits(lambda visit: visit.first_inference_s)),
        Strip("peak memory", 2.0**-20, format_bytes, *peaks),
    ]
    return [strip for strip in found if strip.baseline or strip.candidate]


@dataclass(frozen=True, slots=True)
class Sentinel:
    """What one small model that never changes took in a session: (block, median seconds), in time order."""

    title: str
    readings: tuple[tuple[int, float], ...]


def sentinels(baseline: Run | None, candidate: Run | None) -> list[Sentinel]:
    """Return the series of each sentinel of two runs; one that both share is told once."""
    found: dict[tuple[str, str], Sentinel] = {}
    for run in (baseline, candidate):
        readings = [
            (visit.block, quantile(samples_s, 0.5))
            for visit in (run.sentinel if run else ())
            if (samples_s := sorted(visit_samples_s(visit)))
        ]
        if run is not None and readings:
            key = (run.session, run.sentinel_sha256)
            found.setdefault(key, Sentinel(one_line(run.runtime), tuple(sorted(readings))))
    return list(found.values())
