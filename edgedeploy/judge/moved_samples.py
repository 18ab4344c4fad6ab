"""Answers of two artifacts to the same samples → which samples and classes moved. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgedeploy.judge.proportions import exact_mcnemar
from edgedeploy.records.explanation import AccuracyExplanation, ClassMove, Flip, MovedSample
from edgedeploy.records.verification import LayerComparison

if TYPE_CHECKING:
    import numpy as np

    Values = np.ndarray[Any, Any]

ERROR_RATE = 0.05
# In ratio to the spread of scores: less is the rounding of a sum.
_LEAST_LOSS = 1e-6
# What a reader looks at; each is named by its place in the set, where all others can be found.
MOST_SAMPLES, MOST_CLASSES, MOST_FLIPS, MOST_INDICES = 10, 20, 20, 10
# Metrics with one true class a sample.
CLASS_METRICS = ("top1", "top5")


def class_scores(output: Values) -> Values | None:
    """Return an output as (samples, classes) in float64; None where it is no row of scores a sample."""
    import numpy as np

    values = np.asarray(output, np.float64)
    if values.ndim < 2 or not len(values) or values[0].size != values.shape[-1] or values.shape[-1] < 2:
        return None
    return values.reshape(len(values), -1)


def worst_classified(before: Values, after: Values, labels: Sequence[int]) -> tuple[MovedSample, ...]:
    """Return the samples whose margin (score of the true class less the largest other) fell most.

    Margins are compared in ratio to the spread of each side's scores, since two artifacts need not have one scale; an
    answer that turned wrong comes before every one that only became less sure.

    Args:
        before, after: (samples, classes), finite.
        labels: the true class of each sample.
    """
    import numpy as np

    truth = np.asarray(labels)
    margins = [_margins(scores, truth) for scores in (before, after)]
    answers = [_arg_max(scores) for scores in (before, after)]
    losses = margins[0] - margins[1]
    turned = (answers[0] == truth) & (answers[1] != truth)
    order = np.lexsort((np.arange(len(truth)), -losses, ~turned))
    return tuple(
        MovedSample(
            index=int(index),
            label=int(truth[index]),
            baseline_class=int(answers[0][index]),
            candidate_class=int(answers[1][index]),
            baseline_margin=float(margins[0][index]),
            candidate_margin=float(margins[1][index]),
            loss=float(losses[index]),
        )
        for index in order[:MOST_SAMPLES]
        if losses[index] > _LEAST_LOSS
    )


def worst_errors(before: Sequence[float], after: Sequence[float]) -> tuple[MovedSample, ...]:
    """Return the samples whose error grew most.

    >>> worst_errors([0.1, 0.2], [0.1, 0.5])[0].index
    1
    """
    losses = [new - old for old, new in zip(before, after, strict=True)]
    order = sorted(range(len(losses)), key=lambda index: (-losses[index], index))
    return tuple(
        MovedSample(index=index, baseline_margin=before[index], candidate_margin=after[index], loss=losses[index])
        for index in order[:MOST_SAMPLES]
        if losses[index] > 0
    )


def class_moves(labels: Sequence[int], before: Sequence[int], after: Sequence[int]) -> tuple[ClassMove, ...]:
    """Return what became of each class whose answers changed, the largest loss first.

    Args:
        labels: the true class of each sample.
        before, after: the answers of baseline and candidate.

    >>> class_moves([0, 0, 1], [0, 0, 1], [0, 1, 1])[0].lost
    1
    """
    found: dict[int, list[int]] = {}
    for label, old, new in zip(labels, before, after, strict=True):
        counts = found.setdefault(label, [0, 0, 0, 0, 0])
        was_right, is_right = old == label, new == label
        for place, holds in enumerate((True, was_right, is_right, was_right > is_right, is_right > was_right)):
            counts[place] += holds
    moves = [
        ClassMove(
            label=label,
            samples=samples,
            baseline_right=was,
            candidate_right=now,
            lost=lost,
            gained=gained,
            p=exact_mcnemar(lost, gained),
        )
        for label, (samples, was, now, lost, gained) in found.items()
    ]
    return tuple(_marked(moves))[:MOST_CLASSES]


def _marked(moves: Sequence[ClassMove]) -> list[ClassMove]:
    """Return those that moved, the largest loss first, with what Holm's step-down says of all of them together."""
    import msgspec

    still_rejects, marked = True, []
    for rank, move in enumerate(sorted(moves, key=lambda one: one.p)):
        still_rejects = still_rejects and move.p <= ERROR_RATE / (len(moves) - rank)
        marked.append(msgspec.structs.replace(move, is_proven=still_rejects))
    moved = [move for move in marked if move.lost or move.gained]
    return sorted(moved, key=lambda one: (one.gained - one.lost, -one.lost, one.label))


def flips(labels: Sequence[int], before: Sequence[int], after: Sequence[int]) -> tuple[Flip, ...]:
    """Return where right answers went, the most frequent first.

    >>> flips([0, 0, 1], [0, 0, 0], [2, 2, 1])[0].samples
    2
    """
    found: dict[tuple[int, int, int], list[int]] = {}
    for index, (label, old, new) in enumerate(zip(labels, before, after, strict=True)):
        if old == label and new != label:
            found.setdefault((label, old, new), []).append(index)
    ordered = sorted(found.items(), key=lambda one: (-len(one[1]), one[0]))
    return tuple(
        Flip(
            label=label,
            baseline_class=old,
            candidate_class=new,
            samples=len(all_of),
            indices=tuple(all_of[:MOST_INDICES]),
        )
        for (label, old, new), all_of in ordered[:MOST_FLIPS]
    )


def accuracy_explanation(
    *,
    dataset: str,
    metric: str,
    outputs: tuple[Values, Values] | None,
    labels: Sequence[int] | None,
    predictions: tuple[Sequence[int], Sequence[int]] | None,
    scores: tuple[Sequence[float], Sequence[float]] | None,
    layers: LayerComparison | None,
    samples: int,
    notes: Sequence[str] = (),
) -> AccuracyExplanation:
    """Return which samples and classes moved, and say what stands out.

    Args:
        dataset: name of the evaluation set.
        metric: its metric.
        outputs: what both sides answered, first axis = sample; None where the answers are no longer at hand.
        labels: true classes; None where there are none.
        predictions: arg-maxes of both sides; None where there are none.
        scores: of both sides, one a sample; None without labels.
        layers: tensor by tensor, the baseline's graph as the reference.
        samples: in the set.
        notes: what else a reader should know.
    """
    values = tuple(sum(side) / len(side) if side else None for side in scores) if scores else (None, None)
    worst: tuple[MovedSample, ...] = ()
    classes: tuple[ClassMove, ...] = ()
    changed: tuple[Flip, ...] = ()
    rows = [class_scores(side) for side in outputs] if outputs else []
    is_classified = metric in CLASS_METRICS and labels is not None
    if is_classified and labels is not None and len(rows) == 2 and rows[0] is not None and rows[1] is not None:
        worst = worst_classified(rows[0], rows[1], labels)
        predictions = predictions or (_answers(rows[0]), _answers(rows[1]))
    if is_classified and labels is not None and predictions is not None:
        classes, changed = class_moves(labels, *predictions), flips(labels, *predictions)
    elif scores is not None and metric not in CLASS_METRICS:
        worst = worst_errors(*scores)
    return AccuracyExplanation(
        dataset=dataset,
        metric=metric,
        samples=samples,
        baseline_value=values[0],
        candidate_value=values[1],
        layers=layers,
        causes=tuple(_sentences(layers, worst, classes, changed)),
        worst=worst,
        classes=classes,
        flips=changed,
        notes=tuple(notes),
    )


def _sentences(
    layers: LayerComparison | None,
    worst: Sequence[MovedSample],
    classes: Sequence[ClassMove],
    changed: Sequence[Flip],
) -> list[str]:
    said = []
    if layers is not None and layers.jump:
        one = next(layer for layer in layers.layers if layer.tensor == layers.jump)
        ratio = "exact" if one.sqnr_db is None else f"{one.sqnr_db:.1f} dB"
        said.append(
            f"the error jumps at {one.tensor} ({one.operator}): {ratio}, {one.drop_db:.1f} dB below what it is "
            f"computed from"
        )
    elif layers is not None:
        said.append("the error jumps nowhere: no layer adds more noise than it inherits")
    lost = [move for move in classes if move.lost > move.gained]
    if lost:
        move = lost[0]
        to = next((flip for flip in changed if flip.label == move.label), None)
        most = f", {to.samples} of them to class {to.candidate_class}" if to else ""
        proof = "" if move.is_proven else " (not proven: as many may change by chance)"
        said.append(
            f"class {move.label} lost {move.lost} right answers of {move.samples} samples and gained "
            f"{move.gained}{most}{proof}"
        )
    if worst:
        first = worst[0]
        if first.label is not None:
            said.append(
                f"sample {first.index} of class {first.label} lost most: the baseline answers {first.baseline_class}, "
                f"the candidate {first.candidate_class}"
            )
        else:
            said.append(
                f"the error of sample {first.index} grew most, from {first.baseline_margin:.4g} to "
                f"{first.candidate_margin:.4g}"
            )
    return said


def _answers(scores: Values) -> list[int]:
    return [int(answer) for answer in _arg_max(scores)]


def _arg_max(scores: Values) -> Values:
    """Return the first of the largest scores of each row, as the metric has it."""
    import numpy as np

    found: Values = np.argmax(scores, axis=1)
    return found


def _margins(scores: Values, truth: Values) -> Values:
    """Return the score of the true class less the largest other, in ratio to the standard deviation of all scores."""
    import numpy as np

    rows = np.arange(len(scores))
    others = scores.copy()
    others[rows, truth] = -np.inf
    spread = float(scores.std())
    margins: Values = (scores[rows, truth] - others.max(axis=1)) / (spread or 1.0)
    return margins
