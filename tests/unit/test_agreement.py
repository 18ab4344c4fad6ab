"""The figures that the table of real networks rests on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests.benchmarks.agreement import cosine, figures, paired

MATRICES = arrays(np.float64, (4, 3), elements=st.floats(-100, 100, allow_subnormal=False))


def test_equal_answers_differ_in_nothing():
    values = np.array([[1.0, 2.0], [0.0, 0.0]])
    found = figures(values, values)
    assert (found["max_relative_error"], found["sqnr_db"], found["argmax_agreement"]) == (0.0, None, 1.0)
    assert (found["cosine_mean"], found["cosine_min"]) == pytest.approx((1.0, 1.0))


def test_errors_are_told_in_ratio_to_the_largest_answer():
    found = figures(np.array([[10.0, 1.0]]), np.array([[10.0, 2.0]]))
    assert found["max_relative_error"] == pytest.approx(0.1)
    assert found["sqnr_db"] == pytest.approx(10 * np.log10(104))
    assert found["argmax_agreement"] == 1.0


@settings(max_examples=60, deadline=None)
@given(MATRICES, st.floats(0.5, 8))
def test_cosine_sees_direction_and_not_length(values, factor):
    norms = np.linalg.norm(values, axis=1)
    expected = np.ones(4)
    assert cosine(values, factor * values)[norms > 1e-3] == pytest.approx(expected[norms > 1e-3])
    assert cosine(values, -factor * values)[norms > 1e-3] == pytest.approx(-expected[norms > 1e-3])


def test_an_answer_of_zeros_agrees_with_no_other():
    assert cosine(np.zeros((1, 2)), np.ones((1, 2))).tolist() == [0.0]


def test_an_answer_that_is_not_finite_is_not_passed_off_as_agreement():
    found = figures(np.array([[np.nan, 1.0]]), np.array([[1.0, 1.0]]))
    assert not found["cosine_mean"] >= 0.99
    assert not found["max_relative_error"] <= 1e-4


def test_another_shape_is_refused():
    with pytest.raises(ValueError, match="shape"):
        figures(np.zeros((2, 3)), np.zeros((2, 4)))


def test_lost_and_gained_samples_are_counted_apart():
    expected = np.array([[1, 0], [1, 0], [0, 1], [0, 1]])
    actual = np.array([[1, 0], [0, 1], [1, 0], [0, 1]])
    labels = np.array([0, 0, 0, 1])
    assert paired(actual, expected, labels) == {"top1": 0.75, "lost": 1, "gained": 1, "samples": 4}
