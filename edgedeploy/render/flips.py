"""Which samples of the evaluation set got another answer, and from which class to which. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from edgedeploy.records.run import Run

# A table of more classes is wider than a screen; the most frequent changes are then listed.
MOST_CLASSES = 16
_MOST_LISTED = 15

Fate = Literal["lost", "gained", "other"]


@dataclass(frozen=True, slots=True)
class ChangedAnswer:
    """One sample to which the candidate gives another class than the baseline.

    Attributes:
        index: its place in the evaluation set.
        label: its true class; None where it has none.
        fate: "lost": only the baseline was right; "gained": only the candidate is; "other": neither, or nobody knows.
    """

    index: int
    label: int | None
    before: int
    after: int
    fate: Fate


@dataclass(frozen=True, slots=True)
class Flips:
    """All changed answers of a cell, those that were lost first.

    Attributes:
        samples: how many were asked.
        classes: that some answer changed from or to, ascending.
        counts: (baseline's class, candidate's class) → how many.
    """

    samples: int
    answers: tuple[ChangedAnswer, ...]
    classes: tuple[int, ...]
    counts: dict[tuple[int, int], int]

    @property
    def is_table(self) -> bool:
        """Whether all classes fit into a table."""
        return len(self.classes) <= MOST_CLASSES

    def most_frequent(self) -> list[tuple[int, int, int]]:
        """Return (baseline's class, candidate's class, how many), the most frequent first."""
        ordered = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return [(before, after, number) for (before, after), number in ordered[:_MOST_LISTED]]

    def of(self, fate: Fate) -> int:
        """Return how many answers have a fate."""
        return sum(answer.fate == fate for answer in self.answers)


def flips(baseline: Run | None, candidate: Run | None) -> Flips | None:
    """Return what changed; None where the classes of both sides to the same samples are not known."""
    before = baseline.outputs if baseline else None
    after = candidate.outputs if candidate else None
    if before is None or after is None or before.predictions is None or after.predictions is None:
        return None
    if before.dataset_sha256 != after.dataset_sha256 or len(before.predictions) != len(after.predictions):
        return None
    labels: Sequence[int | None] = before.labels or (None,) * len(before.predictions)
    if len(labels) != len(before.predictions):
        return None
    answers = [
        ChangedAnswer(index, label, old, new, _fate(label, old, new))
        for index, (label, old, new) in enumerate(zip(labels, before.predictions, after.predictions, strict=True))
        if old != new
    ]
    order: dict[Fate, int] = {"lost": 0, "gained": 1, "other": 2}
    answers.sort(key=lambda answer: (order[answer.fate], answer.index))
    return Flips(
        samples=len(labels),
        answers=tuple(answers),
        classes=tuple(sorted({one for answer in answers for one in (answer.before, answer.after)})),
        counts=dict(Counter((answer.before, answer.after) for answer in answers)),
    )


def _fate(label: int | None, before: int, after: int) -> Fate:
    if label is None:
        return "other"
    return "lost" if before == label else "gained" if after == label else "other"
