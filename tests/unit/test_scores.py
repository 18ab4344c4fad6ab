"""Scores: one per sample, and a sentence for whatever cannot be scored."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedeploy.errors import ModelError, UsageError
from edgedeploy.judge.scores import score

OUTPUT = np.array([[0.1, 0.9, 0.0], [0.8, 0.2, 0.0], [0.5, 0.5, 0.4]])


def test_top1_takes_the_first_of_equal_scores():
    assert score("top1", OUTPUT, np.array([1, 1, 0])) == (1.0, 0.0, 1.0)


def test_top5_of_three_classes_is_always_right():
    assert score("top5", OUTPUT, np.array([2, 2, 2])) == (1.0, 1.0, 1.0)


def test_axes_of_length_one_do_not_matter():
    assert score("top1", OUTPUT[:, None, :], np.array([1, 1, 0])) == (1.0, 0.0, 1.0)


def test_mae_is_the_mean_over_a_samples_elements():
    assert score("mae", np.array([[1.0, 3.0]]), np.array([[0.0, 0.0]])) == (2.0,)


@pytest.mark.parametrize(
    ("metric", "output", "labels", "error", "told"),
    [
        ("top-1", OUTPUT, [0, 0, 0], UsageError, 'did you mean "top1"'),
        ("top1", OUTPUT, [0, 0], UsageError, "3 outputs cannot be scored against 2 labels"),
        ("top1", OUTPUT, [0, 0, 3], UsageError, "the output has 3 classes"),
        ("top1", OUTPUT, [0, 0, -1], UsageError, "span -1 to 0"),
        ("top1", np.zeros((3, 2, 2)), [0, 0, 0], UsageError, "one row of class scores"),
        ("top1", np.array([[0.0, 1.0], [np.nan, 1.0]]), [0, 0], ModelError, "sample 1 is not finite"),
        ("mae", np.zeros((3, 2)), np.zeros((3, 5)), UsageError, "labels of 5 numbers a sample"),
    ],
)
def test_what_cannot_be_scored_is_a_sentence(metric, output, labels, error, told):
    with pytest.raises(error, match=told):
        score(metric, np.asarray(output), np.asarray(labels))


@given(st.integers(1, 6), st.integers(1, 9), st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_a_permutation_of_classes_permutes_nothing_in_the_scores(samples, classes, random):
    rng = np.random.default_rng(random.randrange(2**32))
    output = rng.permuted(np.tile(np.arange(classes), (samples, 1)), axis=1).astype(np.float32)
    labels = rng.integers(0, classes, samples)
    order = rng.permutation(classes)
    position = np.argsort(order)
    assert score("top1", output, labels) == score("top1", output[:, order], position[labels])
