"""A limit on the candidate itself, judged beside the change against its baseline. Pure.

Where a margin has both, a metric passes when both parts do, and fails when either does. A PASS claims both, so each
part is tested at the metric's whole error rate (an intersection-union test, Berger 1982, Technometrics 24:295); a FAIL
claims one of two, so each part is tested at half of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from edgedeploy.judge.estimate import Estimate, estimate_of_mean
from edgedeploy.judge.family import ErrorRate, combine
from edgedeploy.records.verdict import Decision, Finding, LimitFinding, Margin


def share_of_part(margin: Margin | None, error_rate: ErrorRate) -> ErrorRate:
    """Return what each part of a margin may err: a change and a limit share the chance of a wrong FAIL."""
    if margin is None or margin.limit is None or margin.kind == "limit":
        return error_rate
    return ErrorRate(error_rate.wrong_fail / 2, error_rate.wrong_pass)


def without_limit(margin: Margin | None) -> Margin | None:
    """Return the part of a margin that is about the change; None where there is none."""
    if margin is None or margin.kind == "limit":
        return None
    if margin.limit is None:
        return margin
    changes = [part.strip() for part in margin.text.split(",") if part.strip()[:1] not in ("<", ">", "≤", "≥")]
    return msgspec.structs.replace(margin, limit=None, is_floor=False, text=", ".join(changes) or margin.text)


def with_limit(change: Finding, limit: LimitFinding, margin: Margin) -> Finding:
    """Return a metric's finding from what became of the change and of the limit.

    Args:
        change: judged by `without_limit(margin)`: only reported where that is None.
        limit: the other part.
        margin: both, as the person wrote it.
    """
    if margin.kind == "limit":
        return msgspec.structs.replace(
            change,
            decision=limit.decision,
            p_fail=limit.p_fail,
            p_pass=limit.p_pass,
            margin=margin,
            units=limit.units,
            reason=limit.reason,
            needed=limit.needed,
            limit=limit,
        )
    parts = (change.decision, limit.decision)
    decision = combine(parts)
    needed = [one.needed for one in (change, limit) if one.decision == "INCONCLUSIVE" and one.needed]
    return msgspec.structs.replace(
        change,
        decision=decision,
        p_fail=_fold(lambda known: min(1.0, 2 * min(known)), change.p_fail, limit.p_fail),
        p_pass=_fold(max, change.p_pass, limit.p_pass),
        margin=margin,
        reason="; and ".join(dict.fromkeys((change.reason, limit.reason))),
        needed="; and ".join(dict.fromkeys(needed)) if decision == "INCONCLUSIVE" else "",
        limit=limit,
    )


def judge_mean(
    values: Sequence[float],
    limit: float,
    error_rate: ErrorRate,
    *,
    shown: Callable[[float], float],
    noun: str,
    told: Callable[[float], str],
    counted: str,
    needed: Callable[[Estimate], str],
) -> LimitFinding:
    """Judge a mean of at least two independent values, each of the candidate alone, against the most that it may be.

    Args:
        values: on the scale that they are averaged on, such as logarithms.
        limit: on the same scale.
        error_rate: of this part.
        shown: from that scale to the metric's SI unit.
        noun: what the values are of; told: a number in the SI unit, as text.
        counted: how many of what there were, in words.
        needed: what would decide it.
    """
    estimate = estimate_of_mean(values)
    p_fail, p_pass = estimate.p_fail(limit), estimate.p_pass(limit)
    decision = error_rate.decide(p_fail, p_pass)
    return LimitFinding(
        decision=decision,
        limit=shown(limit),
        value=shown(estimate.effect),
        low=shown(estimate.low(error_rate.wrong_fail)),
        high=shown(estimate.high(error_rate.wrong_pass)),
        p_fail=p_fail,
        p_pass=p_pass,
        units=len(values),
        reason=f"{conclusion(decision, f'{noun} of {told(shown(estimate.effect))}', told(shown(limit)))}; {counted}",
        needed=needed(estimate) if decision == "INCONCLUSIVE" else "",
    )


def conclusion(decision: Decision, value: str, limit: str, *, is_floor: bool = False) -> str:
    """Say how the candidate's own value lies to its limit."""
    if decision == "INCONCLUSIVE":
        return f"the candidate's {value} is on neither side of the limit of {limit} beyond doubt"
    if decision == "PASS":
        return f"the candidate's {value} is shown to keep the limit of {limit}"
    return f"the candidate's {value} is shown to {'miss' if is_floor else 'exceed'} the limit of {limit}"


def refused(margin: Margin, reason: str, needed: str, *, value: float | None = None, units: int = 0) -> LimitFinding:
    """Return the finding on a limit that cannot be judged."""
    assert margin.limit is not None, "only a limit is refused"
    return LimitFinding(
        decision="INCONCLUSIVE",
        limit=margin.limit,
        is_floor=margin.is_floor,
        value=value,
        units=units,
        reason=reason,
        needed=needed,
    )


def _fold(join: Callable[[list[float]], float], *p_values: float | None) -> float | None:
    known = [p_value for p_value in p_values if p_value is not None]
    return join(known) if len(known) == len(p_values) else None
