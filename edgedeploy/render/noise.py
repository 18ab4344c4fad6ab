"""What the gate knows of itself, in words: passports, plans of a time budget, false alarms. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from edgedeploy.records.passport import AaSummary, BudgetPlan, Passport, PassportSummary, PlannedBlocks
from edgedeploy.records.verdict import Verdict
from edgedeploy.render.figures import NOT_AVAILABLE
from edgedeploy.units import format_change, format_duration

# The margin that a device's fitness is told for: what a release gate of latency usually allows.
FIT_MARGIN = "3%"
_TIMES = {"1m": "1 minute", "5m": "5 minutes", "20m": "20 minutes"}
PLAN_COLUMNS = ("cell", "device", "blocks", "time", "decides at", "margin", "noise of a block", "known from")


def passport_rows(passport: Passport) -> list[list[str]]:
    """Return what a passport says, as rows of a name and a text."""
    interval = f"{format_change(passport.low)} to {format_change(passport.high)}"
    return [
        ["measured", f"{passport.started_utc}, {passport.blocks} blocks in {_minutes(passport.seconds)}"],
        ["processor", passport.cpu_model or NOT_AVAILABLE],
        ["artifact", f"{passport.artifact} against itself ({passport.runtime}), {format_duration(passport.level_s)}"],
        ["run-to-run CV", _percent(passport.run_to_run_cv)],
        ["spread of a block's effect", _percent(passport.block_spread)],
        ["effect of nothing", f"{format_change(passport.effect)} (95 %: {interval})"],
        ["drift", _drift(passport)],
        ["likeness of successive blocks", _likeness(passport)],
        *(
            [f"decided in {_TIMES.get(name, name)}", _distance(effect)]
            for name, effect in passport.smallest_effects.items()
        ),
        *([["dropped", f"{passport.dropped} blocks that do not count"]] if passport.dropped else []),
    ]


def fitness_text(passport: Passport) -> str:
    """Say whether a device is fit for a gate with a margin of 3 %."""
    needed_s = passport.seconds_to_decide.get(FIT_MARGIN)
    chance = f"with {_percent(passport.power)} chance"
    if needed_s is None:
        return (
            f"{passport.device} is not fit for a gate with a margin of 3 %: an unchanged model would stay INCONCLUSIVE "
            f"however long it is measured, because blocks differ by {_percent(passport.block_spread)}; fix its clocks "
            f"([devices.{passport.device}.settings]), stop what else runs there, or allow a wider margin"
        )
    if needed_s > 1200:
        return (
            f"{passport.device} is hardly fit for a gate with a margin of 3 %: it takes {_minutes(needed_s)} to decide "
            f"{chance} that nothing changed"
        )
    return (
        f"{passport.device} is fit for a gate with a margin of 3 %: in {_minutes(needed_s)} it decides {chance} that a "
        f"model like this one has not changed"
    )


def summary_text(summary: PassportSummary | None) -> str:
    """Return a device's noise as a piece of one line; "" where it has no passport."""
    if summary is None:
        return ""
    day = summary.started_utc[:10]
    if summary.stale:
        return f"stale passport of {day}"
    return f"CV {_percent(summary.run_to_run_cv)}, {_distance(summary.smallest_effects.get('5m'))} in 5 min ({day})"


def device_line(summary: PassportSummary) -> str:
    """Say in a verdict how noisy a device is known to be."""
    if summary.stale:
        return f"the passport of {summary.device} is stale: {summary.stale}"
    within = ", ".join(f"{_distance(effect)} in {name[:-1]} min" for name, effect in summary.smallest_effects.items())
    return (
        f"{summary.device}: run-to-run CV {_percent(summary.run_to_run_cv)}; decides {within} from a margin (passport "
        f"of {summary.started_utc[:10]})"
    )


def false_alarm_line(summary: AaSummary) -> str:
    """Say how often gates of something against itself said FAIL."""
    gates = "1 gate" if summary.gates == 1 else f"{summary.gates} gates"
    text = (
        f"false alarms: {summary.false_fails} FAIL in {gates} of something against itself, {_percent(summary.rate)} "
        f"({_percent(summary.confidence)} interval {_percent(summary.low)} to {_percent(summary.high)}; allowed "
        f"{_percent(summary.error_rate)})"
    )
    return f"{text}: proven to be more than is allowed" if summary.proven_above else text


def knowledge_lines(verdict: Verdict) -> list[str]:
    """Return what a verdict knows of its devices and of the gate itself; empty where nobody tried."""
    alarms = [false_alarm_line(verdict.aa)] if verdict.aa is not None else []
    return [*(device_line(one) for one in verdict.devices), *alarms]


def plan_rows(plan: BudgetPlan) -> list[list[str]]:
    """Return a row for each cell that a budget is spent on."""
    return [
        [
            one.cell,
            one.device,
            str(one.blocks),
            _minutes(one.seconds),
            _distance(one.effect),
            _margin(one),
            _percent(one.spread),
            one.source,
        ]
        for one in plan.cells
    ]


def plan_lines(plan: BudgetPlan) -> list[str]:
    """Return a plan as sentences, one a cell."""
    lines = [
        f"{one.cell} on {one.device}: at most {one.blocks} blocks, {_minutes(one.seconds)}; {_promise(one)} "
        f"(a block's noise is {_percent(one.spread)}, by {one.source})"
        for one in plan.cells
    ]
    lines += [
        f"{cell}: its noise is not known; its first blocks are measured before the rest of the budget is planned"
        for cell in plan.unknown
    ]
    return [f"a budget of {_minutes(plan.budget_s)} on each device:", *lines, *_shortfall(plan.cells)]


def _promise(one: PlannedBlocks) -> str:
    if one.margin is None:
        return "its latency is not judged"
    seen = f"decides what lies {_distance(one.effect)} or more from the margin of {_margin(one)}"
    return seen if one.is_enough else f"{seen}, which an unchanged candidate does not"


def _shortfall(cells: Sequence[PlannedBlocks]) -> list[str]:
    short = [one.cell for one in cells if not one.is_enough]
    if not short:
        return []
    return [f"not enough for {', '.join(short)}: likely INCONCLUSIVE; a longer budget or a quieter device decides them"]


def _margin(one: PlannedBlocks) -> str:
    return "not judged" if one.margin is None else format_change(one.margin)


def _distance(effect: float | None) -> str:
    return "nothing" if effect is None else f"±{_percent(effect)}"


def _drift(passport: Passport) -> str:
    if passport.drift_per_hour is None or passport.drift_low is None or passport.drift_high is None:
        return "too few blocks to tell"
    low, high = passport.drift_low, passport.drift_high
    if low <= 0 <= high:
        if high > 1:
            return "none shown; too short a time to exclude any"
        return f"none shown (95 %: {format_change(low)} to {format_change(high)} an hour)"
    return f"{format_change(passport.drift_per_hour)} an hour (95 %: {format_change(low)} to {format_change(high)})"


def _likeness(passport: Passport) -> str:
    if passport.lag1_autocorrelation is None or passport.block_autocorrelation is None:
        return "too few blocks to tell"
    return f"{passport.lag1_autocorrelation:.2f} of their levels, {passport.block_autocorrelation:.2f} of their effects"


def _percent(fraction: float) -> str:
    """Print a fraction with two significant digits.

    >>> _percent(0.01234), _percent(0.0), _percent(1.5)
    ('1.2 %', '0 %', '150 %')
    """
    return f"{float(f'{fraction * 100:.2g}'):g} %"


def _minutes(seconds: float) -> str:
    """Print a time that people plan with.

    >>> _minutes(42.0), _minutes(90.0), _minutes(1200.0)
    ('42 s', '1.5 min', '20 min')
    """
    return f"{seconds:.0f} s" if seconds < 60 else f"{float(f'{seconds / 60:.2g}'):g} min"
