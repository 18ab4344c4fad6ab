"""What the gate knows of itself, in words: its false-alarm rate, and how noisy its devices are. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from edgedeploy.records.passport import AaSummary, PassportSummary
from edgedeploy.render.figures import count, format_share, one_line
from edgedeploy.units import format_change

PASSPORT_COLUMNS = ("device", "run to run", "decided in 1 min", "in 5 min", "in 20 min", "drift an hour", "measured")
_TIMES = ("1m", "5m", "20m")


def aa_lines(summary: AaSummary | None) -> list[str]:
    """Say how often the gate called nothing a change."""
    if summary is None:
        return []
    interval = f"{summary.confidence * 100:g} % interval {format_share(summary.low)} to {format_share(summary.high)}"
    line = (
        f"false alarms: {summary.false_fails:,} of {count(summary.gates, 'gate')} of something against itself said "
        f"FAIL, {format_share(summary.rate)} ({interval}); the rules allow {format_share(summary.error_rate)}"
    )
    above = [f"the gate says FAIL too often on {', '.join(summary.devices)}: do not trust a FAIL from there"]
    return [one_line(text) for text in (line, *(above if summary.proven_above else []))]


def device_lines(devices: Sequence[PassportSummary]) -> list[str]:
    """Say in a line a device how noisy it is, and what it can show."""
    return [one_line(_device_line(device)) for device in devices]


def _device_line(device: PassportSummary) -> str:
    smallest = device.smallest_effects.get("5m")
    shows = f"shows {smallest * 100:.2g} % in 5 minutes" if smallest is not None else "decides nothing in 5 minutes"
    stale = f"; its passport is out of date: {device.stale}" if device.stale else ""
    return f"{device.device}: {device.run_to_run_cv * 100:.2g} % noise from run to run, {shows}{stale}"


def passport_rows(devices: Sequence[PassportSummary]) -> list[tuple[str, ...]]:
    """Return a row a device, under PASSPORT_COLUMNS."""
    return [
        (
            one_line(device.device),
            f"{device.run_to_run_cv * 100:.2g} %",
            *(_effect(device.smallest_effects.get(time)) for time in _TIMES),
            "not known" if device.drift_per_hour is None else format_change(device.drift_per_hour),
            one_line(f"{device.started_utc}{f', out of date: {device.stale}' if device.stale else ''}"),
        )
        for device in devices
    ]


def _effect(smallest: float | None) -> str:
    return "nothing" if smallest is None else f"{smallest * 100:.2g} %"
