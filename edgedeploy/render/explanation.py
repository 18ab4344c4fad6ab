"""An explanation as text for a terminal: the causes first, then the figures that they rest on. Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from edgedeploy.records.explanation import (
    AccuracyExplanation,
    Cause,
    Change,
    Explanation,
    GroupDifference,
    SpeedExplanation,
)
from edgedeploy.render.figures import count, format_share, printable
from edgedeploy.render.text import table
from edgedeploy.units import format_change, format_duration

_WIDTH = 100  # where nobody says how wide the reader's screen is
# The largest differences explain; the rest would push the causes off the screen. The stored record has them all.
MOST_GROUPS = 15
MOST_ROWS = 8
GROUP_COLUMNS = ("layers", "baseline", "candidate", "difference", "share", "what changed")
SAMPLE_COLUMNS = ("sample", "class", "baseline", "candidate", "loss")
CLASS_COLUMNS = ("class", "samples", "baseline", "candidate", "lost", "gained", "p")
FLIP_COLUMNS = ("class", "now answered", "samples", "first of them")


def explanation_text(found: Explanation, *, color: bool, width: int | None) -> str:
    """Return why the candidate differs from the baseline.

    Args:
        found: what `explain` returned.
        color: with ANSI styles.
        width: columns; None for 100.
    """
    columns = width or _WIDTH
    parts = ["\n".join(_wrapped(headline(found), columns))]
    if found.speed is not None:
        parts += _speed_parts(found.speed, color=color, width=columns)
    if found.accuracy is not None:
        parts += _accuracy_parts(found.accuracy, color=color, width=columns)
    parts.append("\n".join(_listed(found.notes, columns)))
    return "\n\n".join(part for part in parts if part)


def headline(found: Explanation) -> str:
    """Say what is compared, and how far apart it is."""
    said = f"{found.cell} against {found.baseline_cell} on {found.device}"
    if found.speed is not None and found.speed.whole is not None:
        said += f": {change_text(found.speed.whole)} an inference{_relative(found.speed)}"
    elif found.speed is not None and found.speed.layers is not None:
        said += f": {change_text(found.speed.layers)} in all layers, watched"
    accuracy = found.accuracy
    if accuracy is not None and accuracy.baseline_value is not None and accuracy.candidate_value is not None:
        said += f"; {accuracy.metric} {accuracy.baseline_value:.4g} → {accuracy.candidate_value:.4g}"
    return said


def cause_lines(causes: Sequence[Cause]) -> list[str]:
    """Return the causes as numbered sentences.

    >>> cause_lines([Cause(kind="work", text="conv has 2 times the multiply-adds")])
    ['1. conv has 2 times the multiply-adds']
    """
    return [f"{number}. {printable(cause.text)}" for number, cause in enumerate(causes, 1)]


def group_rows(groups: Sequence[GroupDifference]) -> list[tuple[str, ...]]:
    """Return a row for each of the largest differences; a proven one bears a mark."""
    return [
        (
            printable(group.name),
            _side(group.baseline_s, group.baseline_precision, is_there=bool(group.baseline_layers)),
            _side(group.candidate_s, group.candidate_precision, is_there=bool(group.candidate_layers)),
            change_text(Change(seconds=group.difference_s, low_s=group.low_s, high_s=group.high_s))
            + (" *" if group.is_proven else ""),
            "" if group.share is None else format_share(group.share),
            printable("; ".join(group.changes)),
        )
        for group in groups[:MOST_GROUPS]
    ]


def groups_note(speed: SpeedExplanation) -> str:
    """Say what the table leaves out, and whether its sum is the whole difference."""
    rest = speed.groups[MOST_GROUPS:]
    parts = []
    if rest:
        left_s = sum(group.difference_s for group in rest)
        parts.append(f"{count(len(rest), 'more group')} of layers: {signed(left_s)}")
    if speed.layers is not None:
        watched = f"all layers together, watched: {change_text(speed.layers)}"
        if speed.whole is not None:
            words = {True: "which agrees with", False: "which does not agree with", None: "beside"}
            watched += f", {words[speed.agrees]} {change_text(speed.whole)} of whole inferences"
        parts.append(watched)
    overheads = (speed.baseline_overhead_s, speed.candidate_overhead_s)
    if overheads[0] is not None and overheads[1] is not None:
        parts.append(
            f"layers add up to {signed(overheads[0])} (baseline) and {signed(overheads[1])} (candidate) beside an "
            f"inference that nobody watches"
        )
    parts.append(
        f"95 % intervals over {count(speed.passes, 'pair')} of passes; * differs from zero, within 5 % for all groups "
        f"together (Holm)"
    )
    return "; ".join(parts)


def sample_rows(accuracy: AccuracyExplanation) -> list[tuple[str, ...]]:
    """Return a row for each sample that lost most."""
    return [
        (
            str(one.index),
            "" if one.label is None else str(one.label),
            _answer(one.baseline_class, one.baseline_margin),
            _answer(one.candidate_class, one.candidate_margin),
            f"{one.loss:.3g}",
        )
        for one in accuracy.worst[:MOST_ROWS]
    ]


def class_rows(accuracy: AccuracyExplanation) -> list[tuple[str, ...]]:
    """Return a row for each class whose answers changed."""
    return [
        (
            str(one.label),
            f"{one.samples:,}",
            f"{one.baseline_right:,}",
            f"{one.candidate_right:,}",
            f"{one.lost:,}",
            f"{one.gained:,}",
            f"{one.p:.2g}" + (" *" if one.is_proven else ""),
        )
        for one in accuracy.classes[:MOST_ROWS]
    ]


def flip_rows(accuracy: AccuracyExplanation) -> list[tuple[str, ...]]:
    """Return a row for each confusion that is new."""
    return [
        (str(one.label), str(one.candidate_class), f"{one.samples:,}", ", ".join(str(index) for index in one.indices))
        for one in accuracy.flips[:MOST_ROWS]
    ]


def change_text(change: Change) -> str:
    """Return a difference with half the width of its interval.

    >>> change_text(Change(seconds=1.1e-3, low_s=1e-3, high_s=1.2e-3))
    '+1.1 ms ± 100 µs'
    """
    if change.low_s is None or change.high_s is None:
        return signed(change.seconds)
    return f"{signed(change.seconds)} ± {format_duration((change.high_s - change.low_s) / 2)}"


def signed(seconds: float) -> str:
    """Return a duration with its sign."""
    return f"{'-' if seconds < 0 else '+'}{format_duration(abs(seconds))}"


def why_title(speed: SpeedExplanation) -> str:
    """Return the question that the causes answer."""
    change = speed.whole or speed.layers
    return "Why it is faster" if change is not None and change.seconds < 0 else "Why it is slower"


def _speed_parts(speed: SpeedExplanation, *, color: bool, width: int) -> list[str]:
    causes = [line for text in cause_lines(speed.causes) for line in _hanging(text, width)]
    nothing = [] if causes else _wrapped("no layer is shown to differ", width)
    other = _wrapped(speed.counteracting, width) if speed.counteracting else []
    parts = ["\n".join([why_title(speed), *causes, *nothing, *other])]
    for side, profile in (("baseline", speed.baseline), ("candidate", speed.candidate)):
        if profile.not_available:
            parts.append("\n".join(_wrapped(f"Layers of the {side}: {profile.not_available}", width)))
    if speed.groups:
        parts.append(table("Layers", GROUP_COLUMNS, group_rows(speed.groups), color=color, width=width))
        parts.append("\n".join(_wrapped(groups_note(speed), width)))
    parts.append("\n".join(_listed(speed.notes, width)))
    return parts


def _accuracy_parts(accuracy: AccuracyExplanation, *, color: bool, width: int) -> list[str]:
    lines = [line for number, text in enumerate(accuracy.causes, 1) for line in _hanging(f"{number}. {text}", width)]
    title = f"Where answers changed ({accuracy.samples:,} samples of {accuracy.dataset})"
    parts = ["\n".join([*_wrapped(title, width), *(lines or ["nothing that can be told"])])]
    for name, columns, rows in (
        ("Classes: right answers", CLASS_COLUMNS, class_rows(accuracy)),
        ("Right answers that turned wrong", FLIP_COLUMNS, flip_rows(accuracy)),
        ("Samples that lost most", SAMPLE_COLUMNS, sample_rows(accuracy)),
    ):
        if rows:
            parts.append(table(name, columns, rows, color=color, width=width))
    parts.append("\n".join(_listed(accuracy.notes, width)))
    return parts


def _relative(speed: SpeedExplanation) -> str:
    """Return the change of a whole inference in per cent of the baseline's."""
    whole_s = speed.baseline.whole_s
    if speed.whole is None or not whole_s:
        return ""
    return f" ({format_change(speed.whole.seconds * len(whole_s) / sum(whole_s))})"


def _side(seconds: float, precision: str, *, is_there: bool) -> str:
    if not is_there:
        return "none"
    return f"{format_duration(seconds)}{f' {precision}' if precision else ''}"


def _answer(answer: int | None, margin: float) -> str:
    return f"{margin:.3g}" if answer is None else f"{answer} ({margin:+.3g})"


def _listed(sentences: Sequence[str], columns: int) -> list[str]:
    return [
        line
        for one in sentences
        for line in textwrap.wrap(printable(one), columns, initial_indent="- ", subsequent_indent="  ")
    ]


def _hanging(text: str, columns: int) -> list[str]:
    return textwrap.wrap(printable(text), columns, subsequent_indent="   ")


def _wrapped(text: str, columns: int) -> list[str]:
    return textwrap.wrap(printable(text), columns)
