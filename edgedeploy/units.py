"""Seconds, bytes, percentages and points: parsed and printed here only.

Inside Python every quantity is SI (seconds, bytes, fractions); other units exist only in what people read and write.
"""

from __future__ import annotations

import math
import re

_TIME_UNITS_S = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9, "min": 60.0}
_BYTE_UNITS = {
    "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30,
}  # fmt: skip
_QUANTITY = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([a-zA-Zµ%]*)")


def parse_quantity(text: str) -> tuple[float, str]:
    """Split a number from its unit and convert it to the SI unit.

    Returns:
        (value, dimension): dimension is "s", "bytes", "fraction" (from %), "points" (from pt: a difference of two
        fractions, so 1pt = 0.01) or "" for a bare number.

    Raises:
        ValueError: not a finite number followed by a known unit.

    >>> parse_quantity("+5%")
    (0.05, 'fraction')
    >>> parse_quantity("0.5 ms")
    (0.0005, 's')
    >>> parse_quantity("-0.5pt")
    (-0.005, 'points')
    >>> parse_quantity("2MiB")
    (2097152.0, 'bytes')
    """
    match = _QUANTITY.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a number with a unit, such as +5%, 0.5ms, -0.5pt or 2MiB")
    number, unit = float(match[1]), match[2]
    if not math.isfinite(number):
        raise ValueError(f"{text!r} is not a finite number")
    if unit == "":
        return number, ""
    if unit == "%":
        return number / 100, "fraction"
    if unit == "pt":
        return number / 100, "points"
    if unit in _TIME_UNITS_S:
        return number * _TIME_UNITS_S[unit], "s"
    if unit in _BYTE_UNITS:
        return number * _BYTE_UNITS[unit], "bytes"
    known = ", ".join(["%", "pt", *_TIME_UNITS_S, *_BYTE_UNITS])
    raise ValueError(f"{text!r} has the unknown unit {unit!r}; known are {known}")


def parse_waiting(text: str) -> float:
    """Return a time that a person is ready to wait, in seconds.

    Raises:
        ValueError: not a time from 0 to a week.

    >>> parse_waiting("90"), parse_waiting("10m"), parse_waiting("1.5h")
    (90.0, 600.0, 5400.0)
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)\s*(s|m|min|h|)", text.strip())
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600}[match[2]] if match else math.inf
    if seconds > 7 * 86400:
        raise ValueError("a time from 0 to a week is meant, such as 30s, 10m or 2h")
    return seconds


def format_duration(seconds: float) -> str:
    """Print a duration with three significant digits.

    >>> format_duration(0.00123), format_duration(2.5e-05), format_duration(75)
    ('1.23 ms', '25 µs', '75 s')
    """
    for unit, size_s in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(seconds) >= size_s:
            return (
                f"{seconds / size_s:.3g} {unit}" if abs(seconds / size_s) < 1000 else f"{seconds / size_s:.0f} {unit}"
            )
    return f"{seconds / 1e-9:.3g} ns"


def format_bytes(count: float) -> str:
    """Print a byte count in binary units.

    >>> format_bytes(1536), format_bytes(12)
    ('1.5 KiB', '12 B')
    """
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def format_change(fraction: float) -> str:
    """Print a relative change with its sign.

    >>> format_change(0.0312), format_change(-0.5)
    ('+3.12 %', '-50.00 %')
    """
    return f"{fraction * 100:+.2f} %"


def format_points(difference: float) -> str:
    """Print a difference of two fractions in percentage points.

    >>> format_points(-0.0052)
    '-0.52 pt'
    """
    return f"{difference * 100:+.2f} pt"
