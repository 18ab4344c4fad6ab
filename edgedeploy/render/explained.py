"""What a report tells of an explanation besides its tables: its causes and what bounds them. Pure."""

from __future__ import annotations

from edgedeploy.records.explanation import Explanation
from edgedeploy.render.figures import printable


def causes(found: Explanation) -> list[str]:
    """Return the causes, those of the latency first, the largest first; then what took the other direction."""
    sentences = [cause.text for cause in found.speed.causes] if found.speed is not None else []
    sentences += found.accuracy.causes if found.accuracy is not None else ()
    sentences += [found.speed.counteracting] if found.speed is not None and found.speed.counteracting else []
    return [printable(sentence) for sentence in sentences]


def caveats(found: Explanation) -> list[str]:
    """Return what could not be found out, and what a reader of the figures should know."""
    notes: list[str] = [*found.notes]
    if found.speed is not None:
        sides = (("baseline", found.speed.baseline), ("candidate", found.speed.candidate))
        notes += [f"layers of the {side}: {one.not_available}" for side, one in sides if one.not_available]
        notes += found.speed.notes
    notes += found.accuracy.notes if found.accuracy is not None else ()
    return [printable(note) for note in dict.fromkeys(notes)]
