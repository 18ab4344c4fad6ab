"""Margins as people write them: "+5%", "-0.5pt", "<= 5ms", "+3%, <= 5ms". Pure."""

from __future__ import annotations

from typing import Literal

from edgedeploy.records.verdict import Margin, Metric
from edgedeploy.units import parse_quantity

Kind = Literal["relative", "absolute", "points"]
_KINDS: dict[str, Kind] = {
    "fraction": "relative",
    "points": "points",
    "s": "absolute",
    "bytes": "absolute",
    "": "absolute",
}
_TIMES = (("fraction", "s"), '"+5%", "+0.5ms", "<= 5ms" or "+5%, <= 5ms"')
_BYTES = (("fraction", "bytes"), '"+5%", "+1MiB", "<= 40MiB" or "+5%, <= 40MiB"')
# Metric → (dimensions of a change that mean something for it, examples for the person who wrote another one).
_ALLOWED: dict[Metric, tuple[tuple[str, ...], str]] = {
    "accuracy": (
        ("points", "fraction", ""),
        '"-0.5pt" or ">= 92%" for top1 and top5, "+5%", "+0.01" or "<= 0.05" for mae',
    ),
    "class_accuracy": (("points",), '"-5pt", ">= 80%" or "-5pt, >= 80%"'),
    "latency_p50": _TIMES,
    "latency_p95": _TIMES,
    "latency_p99": _TIMES,
    "first_inference": _TIMES,
    "load_time": _TIMES,
    "peak_memory": _BYTES,
    "artifact_size": _BYTES,
}
# Metric → (sign of a limit, its dimension), each pair that means something.
_LIMITS: dict[Metric, tuple[tuple[str, str], ...]] = {
    "accuracy": ((">=", "fraction"), ("<=", "")),
    "class_accuracy": ((">=", "fraction"),),
    "latency_p50": (("<=", "s"),),
    "latency_p95": (("<=", "s"),),
    "latency_p99": (("<=", "s"),),
    "first_inference": (("<=", "s"),),
    "load_time": (("<=", "s"),),
    "peak_memory": (("<=", "bytes"),),
    "artifact_size": (("<=", "bytes"),),
}
_ACCURACIES = ("accuracy", "class_accuracy")


def margin_from_text(metric: Metric, text: str) -> Margin:
    """Read how much worse a metric may get, what the candidate itself must keep to, or both, separated by a comma.

    For latency, memory and size a negative margin is a demanded improvement: "-20%" passes a candidate that is shown to
    need at least 20 % less than the baseline. For accuracy "-0.5pt" and "0.5pt" both allow a drop of half a point.

    Raises:
        ValueError: a sentence: not a quantity, a unit that the metric does not have, or a sign that cannot be meant.

    >>> margin_from_text("latency_p50", "-20%").value
    -0.2
    >>> margin_from_text("accuracy", "-0.5pt").value
    0.005
    >>> margin_from_text("latency_p50", "+3%, <= 5ms").limit
    0.005
    """
    written = text.strip()
    parts = [part.strip() for part in written.split(",")]
    limits = [part for part in parts if part[:1] in ("<", ">", "≤", "≥")]
    changes = [part for part in parts if part not in limits]
    if len(limits) > 1 or len(changes) > 1:
        raise ValueError(
            f"{written!r} says more than one change and one limit; write one of each at most, such as "
            f"{_ALLOWED[metric][1]} (a decimal point is a point)"
        )
    limit, is_floor = _limit(metric, limits[0]) if limits else (None, False)
    if not changes:
        assert limit is not None, "a text without a change is a limit"
        return Margin(kind="limit", value=limit, text=written, limit=limit, is_floor=is_floor)
    kind, value = _change(metric, changes[0])
    if limit is not None and metric == "accuracy" and is_floor != (kind == "points"):
        raise ValueError(
            f'{written!r} mixes what belongs to different metrics of accuracy; write for example "-0.5pt, >= 92%" '
            f'for top1 and top5, "+5%, <= 0.05" for mae'
        )
    return Margin(kind=kind, value=value, text=written, limit=limit, is_floor=is_floor)


def _change(metric: Metric, written: str) -> tuple[Kind, float]:
    """Return a change's kind and the allowed worsening."""
    value, dimension = parse_quantity(written)
    kind = _KINDS[dimension]
    dimensions, examples = _ALLOWED[metric]
    if dimension not in dimensions:
        raise ValueError(f"{written!r} is not a margin for {metric}; write for example {examples}")
    if metric in _ACCURACIES:
        return kind, _accuracy_worsening(value, kind, written)
    if kind == "relative" and value <= -1:
        raise ValueError(f"{written!r} demands that {metric} falls to nothing; a margin lies above -100%")
    return kind, value


def _limit(metric: Metric, written: str) -> tuple[float, bool]:
    """Return a limit in the SI unit, and whether it is the least allowed."""
    sign = written[0].replace("≤", "<=").replace("≥", ">=")
    amount = written[1:]
    if sign in ("<", ">"):
        if not amount.startswith("="):
            raise ValueError(f'{written!r} is not a limit; write "{sign}= {amount.strip()}", which includes the amount')
        sign, amount = f"{sign}=", amount[1:]
    value, dimension = parse_quantity(amount)
    if (sign, dimension) not in _LIMITS[metric]:
        raise ValueError(f"{written!r} is not a limit for {metric}; write for example {_ALLOWED[metric][1]}")
    if value <= 0 or amount.strip().startswith("+"):
        raise ValueError(f"{written!r} is not a limit that can be kept: write the amount itself, above zero")
    if dimension == "fraction" and value >= 1:
        raise ValueError(f"{written!r}: no number of samples shows that all answers are right; a limit lies below 100%")
    return value, sign == ">="


def _accuracy_worsening(value: float, kind: str, written: str) -> float:
    if kind == "points":
        if written.startswith("+") and value > 0:
            raise ValueError(
                f'{written!r} would demand that accuracy rises; write the allowed drop, such as "-{written[1:]}"'
            )
        if abs(value) > 1:
            raise ValueError(f"{written!r} allows a drop of more than 100 points")
        return abs(value)
    if value < 0:
        raise ValueError(
            f'{written!r} is ambiguous for accuracy: write a drop of top1 or top5 in points ("-0.5pt") and a rise of '
            'mae with a plus ("+5%" or "+0.01")'
        )
    return value
