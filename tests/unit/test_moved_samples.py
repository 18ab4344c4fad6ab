"""Which samples and classes moved between the answers of two artifacts."""

import numpy as np
import pytest

from edgedeploy.judge.moved_samples import (
    accuracy_explanation,
    class_moves,
    class_scores,
    flips,
    worst_classified,
    worst_errors,
)
from edgedeploy.records.verification import LayerComparison, LayerError


def scores_of(answers, *, classes=4, strength=1.0):
    values = np.zeros((len(answers), classes))
    values[np.arange(len(answers)), answers] = strength
    return values


def test_the_class_that_lost_most_comes_first_and_is_proven():
    labels = [0] * 40 + [1] * 40 + [2] * 40
    before = list(labels)
    after = [3] * 20 + labels[20:41] + [0] + labels[42:]
    first, second = class_moves(labels, before, after)
    assert (first.label, first.samples, first.lost, first.gained, first.is_proven) == (0, 40, 20, 0, True)
    assert (second.label, second.lost, second.is_proven) == (1, 1, False)


def test_a_mean_that_stays_does_not_hide_a_class():
    """Accuracy is the same, and yet class 0 lost what class 1 gained."""
    labels = [0] * 20 + [1] * 20
    before = [0] * 20 + [0] * 10 + [1] * 10
    after = [0] * 10 + [1] * 10 + [1] * 20
    lost, gained = class_moves(labels, before, after)
    assert (lost.label, lost.lost) == (0, 10)
    assert (gained.label, gained.gained) == (1, 10)
    assert lost.is_proven
    assert gained.is_proven


def test_flips_name_where_right_answers_went():
    labels = [0, 0, 0, 1, 2]
    found = flips(labels, [0, 0, 0, 0, 2], [1, 1, 2, 1, 2])
    assert [(one.label, one.candidate_class, one.indices) for one in found] == [(0, 1, (0, 1)), (0, 2, (2,))]


def test_an_answer_that_turned_wrong_comes_before_one_that_only_became_less_sure():
    labels = [0, 1, 2]
    before = scores_of([0, 1, 2])
    after = before.copy()
    after[0] *= 0.1  # less sure, and still right
    after[1] = [0, 0.9, 1.0, 0]  # barely wrong
    found = worst_classified(before, after, labels)
    assert [one.index for one in found][:2] == [1, 0]
    assert (found[0].baseline_class, found[0].candidate_class) == (1, 2)


def test_margins_do_not_depend_on_the_scale_of_a_side():
    labels = [0, 1, 2, 3]
    before = scores_of(labels)
    assert worst_classified(before, before * 100, labels) == ()


def test_errors_that_grew_are_listed_by_growth():
    assert [one.index for one in worst_errors([0.1, 0.2, 0.3], [0.2, 0.5, 0.1])] == [1, 0]


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 2, 2), (0, 4)])
def test_what_is_no_row_of_scores_is_none(shape):
    assert class_scores(np.zeros(shape)) is None


def test_a_row_of_scores_may_have_axes_of_length_one():
    assert class_scores(np.zeros((3, 4, 1, 1))) is None  # the classes are the last axis, as the metric has it
    assert class_scores(np.zeros((3, 1, 4))).shape == (3, 4)


def test_sentences_name_jump_class_and_sample():
    labels = [0] * 20 + [1] * 20
    layers = LayerComparison(
        reference="the baseline",
        candidate="the candidate",
        samples=16,
        layers=(LayerError(tensor="relu_3", operator="Relu", max_abs=1.0, sqnr_db=12.3, drop_db=9.1),),
        not_compared=0,
        jump="relu_3",
    )
    found = accuracy_explanation(
        dataset="photographs",
        metric="top1",
        outputs=(scores_of(labels), scores_of([2] * 12 + [0] * 8 + [1] * 20)),
        labels=labels,
        predictions=None,
        scores=([1.0] * 40, [0.0] * 12 + [1.0] * 28),
        layers=layers,
        samples=40,
    )
    assert found.causes[0] == "the error jumps at relu_3 (Relu): 12.3 dB, 9.1 dB below what it is computed from"
    assert found.causes[1].startswith("class 0 lost 12 right answers of 20 samples and gained 0, 12 of them to class 2")
    assert "sample 0 of class 0 lost most: the baseline answers 0, the candidate 2" in found.causes[2]
    assert found.candidate_value == pytest.approx(0.7)


def test_without_the_answers_classes_come_from_the_predictions_that_a_run_keeps():
    found = accuracy_explanation(
        dataset="photographs",
        metric="top1",
        outputs=None,
        labels=[0, 0, 1],
        predictions=([0, 0, 1], [1, 0, 1]),
        scores=([1.0, 1.0, 1.0], [0.0, 1.0, 1.0]),
        layers=None,
        samples=3,
    )
    assert found.classes[0].lost == 1
    assert found.worst == ()


def test_an_error_metric_has_samples_and_no_classes():
    found = accuracy_explanation(
        dataset="speech",
        metric="mae",
        outputs=None,
        labels=None,
        predictions=None,
        scores=([0.1, 0.1], [0.1, 0.4]),
        layers=None,
        samples=2,
    )
    assert found.classes == ()
    assert found.causes == ("the error of sample 1 grew most, from 0.1 to 0.4",)
