"""Margins as people write them: "+5%", "+0.5ms", "-0.5pt", "+1MiB". Pure."""

from __future__ import annotations

from typing import Literal

from edgedeploy.records.verdict import Margin, Metric
from edgedeploy.units import parse_quantity

_KINDS: dict[str, Literal["relative", "absolute", "points"]] = {
    "fraction": "relative",
    "points": "points",
    "s": "absolute",
    "bytes": "absolute",
    "": "absolute",
}
# Metric → (dimensions that mean something for it, examples for the person who wrote another one).
_ALLOWED: dict[Metric, tuple[tuple[str, ...], str]] = {
    "accuracy": (("points", "fraction", ""), '"-0.5pt" for top1 and top5, "+5%" or "+0.01" for mae'),
    "latency_p50": (("fraction", "s"), '"+5%" or "+0.5ms"'),
    "latency_p95": (("fraction", "s"), '"+5%" or "+0.5ms"'),
    "peak_memory": (("fraction", "bytes"), '"+5%" or "+1MiB"'),
    "artifact_size": (("fraction", "bytes"), '"+10%" or "+1MiB"'),
}


def margin_from_text(metric: Metric, text: str) -> Margin:
    """Read how much worse a metric may get.

    For latency, memory and size a negative margin is a demanded improvement: "-20%" passes a candidate that is shown to
    need at least 20 % less than the baseline. For accuracy "-0.5pt" and "0.5pt" both allow a drop of half a point.

    Raises:
        ValueError: a sentence: not a quantity, a unit that the metric does not have, or a sign that cannot be meant.

    >>> margin_from_text("latency_p50", "-20%").value
    -0.2
    >>> margin_from_text("accuracy", "-0.5pt").value
    0.005
    """
    value, dimension = parse_quantity(text)
    kind, written = _KINDS[dimension], text.strip()
    dimensions, examples = _ALLOWED[metric]
    if dimension not in dimensions:
        raise ValueError(f"{written!r} is not a margin for {metric}; write for example {examples}")
    if metric == "accuracy":
        return Margin(kind=kind, value=_accuracy_worsening(value, kind, written), text=written)
    if kind == "relative" and value <= -1:
        raise ValueError(f"{written!r} demands that {metric} falls to nothing; a margin lies above -100%")
    return Margin(kind=kind, value=value, text=written)


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
