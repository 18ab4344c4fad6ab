"""A verification as text for a terminal: outputs and metrics side by side, then layers, then what is not met. Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from edgedeploy.records.model import Fidelity
from edgedeploy.records.verification import LayerComparison, MetricValues, Verification
from edgedeploy.render.figures import NOT_AVAILABLE, printable
from edgedeploy.render.text import table

_WIDTH = 100  # where nobody says how wide the reader's screen is
_OUTPUT_COLUMNS = ("output", "max abs", "max rel", "cosine", "SQNR", "argmax")
_LAYER_COLUMNS = ("tensor", "operator", "SQNR", "drop")
_DEFINITION = (
    "Drop: how much lower a tensor's SQNR is than the lowest of the compared tensors that it is computed from; what is "
    "above 50 dB counts as 50 dB. Where the error jumps: the first tensor with the largest drop, from 3 dB on."
)


def verification_text(found: Verification, *, color: bool, width: int | None) -> str:
    """Return what was compared, the figures, and whether the limits are met.

    Args:
        found: what `verify` returned.
        color: with ANSI styles.
        width: columns; None for 100.
    """
    columns = width or _WIDTH
    parts = [_heading(found, columns)]
    parts += [_output_table(pair, color=color, width=columns) for pair in found.fidelity]
    if found.metrics:
        parts.append(_metric_table(found.metrics, color=color, width=columns))
    if found.layers is not None:
        parts += [_layer_table(found.layers, color=color, width=columns), *_layer_sentences(found.layers, columns)]
    if found.unmet:
        parts.append("\n".join(["Not met", *_listed(found.unmet, columns)]))
    return "\n\n".join(part for part in parts if part)


def _heading(found: Verification, columns: int) -> str:
    lines = [f"{found.subject} on {found.samples:,} samples of {found.sample_source}"]
    longest = max(len(form.name) for form in found.forms)
    for form in found.forms:
        lines += textwrap.wrap(
            f"{form.name:<{longest}}  {printable(form.detail)}",
            columns,
            initial_indent="  ",
            subsequent_indent=" " * (longest + 4),
        )
    notes = _listed(found.notes, columns)
    return "\n".join([*_wrapped(lines[0], columns), *lines[1:], *([""] if notes else []), *notes])


def _output_table(pair: Fidelity, *, color: bool, width: int) -> str:
    rows = [
        (
            one.output,
            f"{one.max_abs:.3g}",
            f"{one.max_relative:.3g}",
            f"{one.cosine:.6f}",
            _ratio(one.sqnr_db),
            NOT_AVAILABLE if one.argmax_agreement is None else f"{one.argmax_agreement * 100:.2f} %",
        )
        for one in pair.outputs
    ]
    return table(f"{pair.candidate} against {pair.reference}", _OUTPUT_COLUMNS, rows, color=color, width=width)


def _metric_table(metrics: Sequence[MetricValues], *, color: bool, width: int) -> str:
    """Show one line a metric and form: forms are few, and names of metrics may be long."""
    rows = []
    for metric in metrics:
        pairs = {pair.candidate: pair for pair in metric.pairs}
        for place, (form, value) in enumerate(metric.values.items()):
            pair = pairs.get(form)
            name = f"{metric.metric} ({'larger' if metric.larger_is_better else 'smaller'} is better)"
            rows.append(
                (
                    name if place == 0 else "",
                    form,
                    f"{value:.6g}",
                    "" if place == 0 else f"{value - next(iter(metric.values.values())):+.4g}",
                    f"{pair.lost:,}" if pair else "",
                    f"{pair.gained:,}" if pair else "",
                )
            )
    title = f"Metrics, against {next(iter(metrics[0].values))}: samples that score worse (lost) or better (gained)"
    return table(title, ("metric", "form", "value", "change", "lost", "gained"), rows, color=color, width=width)


def _layer_table(layers: LayerComparison, *, color: bool, width: int) -> str:
    rows = [
        (
            f"{one.tensor}  <- jump" if one.tensor == layers.jump else one.tensor,
            one.operator,
            _ratio(one.sqnr_db),
            f"{one.drop_db:+.1f} dB",
        )
        for one in layers.layers
    ]
    title = f"Layers, {layers.candidate} against {layers.reference}"
    return table(title, _LAYER_COLUMNS, rows, color=color, width=width)


def _layer_sentences(layers: LayerComparison, columns: int) -> list[str]:
    if layers.jump:
        one = next(layer for layer in layers.layers if layer.tensor == layers.jump)
        jump = (
            f"The error jumps at {one.tensor!r} ({one.operator}): {_ratio(one.sqnr_db)}, {one.drop_db:.1f} dB below "
            f"what it is computed from."
        )
    else:
        jump = "The error jumps nowhere: no layer adds more noise than it inherits."
    missing = (
        f" {layers.not_compared} tensors of the {layers.reference} have no counterpart of that name."
        if layers.not_compared
        else ""
    )
    how = f" On {layers.samples} samples, each graph computed as it is written."
    return ["\n".join([*_wrapped(jump, columns), *_wrapped(_DEFINITION + missing + how, columns)])]


def _listed(sentences: Sequence[str], columns: int) -> list[str]:
    return [
        line
        for one in sentences
        for line in textwrap.wrap(printable(one), columns, initial_indent="- ", subsequent_indent="  ")
    ]


def _wrapped(text: str, columns: int) -> list[str]:
    return textwrap.wrap(printable(text), columns)


def _ratio(sqnr_db: float | None) -> str:
    return "exact" if sqnr_db is None else f"{sqnr_db:.1f} dB"
