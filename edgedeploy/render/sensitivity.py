"""A sensitivity curve as text for a terminal: one row a layer left in float. Pure."""

from __future__ import annotations

import textwrap

from edgedeploy.records.sensitivity import Sensitivity, SensitivityStep
from edgedeploy.render.figures import NOT_AVAILABLE, printable
from edgedeploy.render.text import table
from edgedeploy.units import format_bytes

_WIDTH = 100  # where nobody says how wide the reader's screen is
_COLUMNS = ("left in float", "SQNR", "gain", "size")
_MEANING = (
    "SQNR is that of the worst output, on calibration samples; on others it is lower, by 2 to 4 dB where photographs "
    "were held out. Layers come by noise for each byte that float weights take more."
)


def sensitivity_text(found: Sensitivity, *, color: bool, width: int | None) -> str:
    """Return the curve, one row for each step, and what its figures mean.

    Args:
        found: what `pipeline.sensitivity` returned.
        color: with ANSI styles.
        width: columns; None for 100.
    """
    columns = width or _WIDTH
    is_timed = any(step.latency_ratio is not None for step in found.steps)
    title = (
        f"{found.model} in int8 for {found.target} with {found.backend}; fp32 takes {format_bytes(found.fp32_bytes)}"
    )
    shown = table(
        printable(title),
        (*_COLUMNS, "latency to fp32, measured here") if is_timed else _COLUMNS,
        [_row(place, step, is_timed=is_timed) for place, step in enumerate(found.steps)],
        color=color,
        width=columns,
    )
    sentences = (
        f"On {found.samples:,} samples of {found.calibration}: {found.method}.",
        _MEANING,
        f"Latency: {found.timing}.",
    )
    return "\n".join([shown, "", *(line for one in sentences for line in textwrap.wrap(printable(one), columns))])


def _row(place: int, step: SensitivityStep, *, is_timed: bool) -> tuple[str, ...]:
    cells = (
        "none" if place == 0 else printable("+ " + ", ".join(step.left)),
        f"{step.sqnr_db:.1f} dB",
        "" if place == 0 else f"{step.gain_db:+.1f} dB",
        format_bytes(step.size_bytes),
    )
    if not is_timed:
        return cells
    return (*cells, NOT_AVAILABLE if step.latency_ratio is None else f"{step.latency_ratio:.2f}x")
