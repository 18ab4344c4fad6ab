import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedeploy.judge.estimate import Estimate, estimate_of_difference, estimate_of_mean, units_to_decide

EFFECTS = st.lists(st.floats(-1, 1).map(lambda number: round(number, 4)), min_size=3, max_size=20)


@settings(max_examples=25, deadline=None)
@given(EFFECTS, st.floats(-0.5, 0.5))
def test_mean_agrees_with_the_one_sample_t_test_of_scipy(effects, margin):
    from scipy import stats

    estimate = estimate_of_mean(effects)
    if estimate.standard_error < 1e-6:
        return
    for alternative, p_value in (("greater", estimate.p_fail(margin)), ("less", estimate.p_pass(margin))):
        assert p_value == pytest.approx(stats.ttest_1samp(effects, margin, alternative=alternative).pvalue, abs=1e-12)
    interval = stats.ttest_1samp(effects, 0).confidence_interval(0.9)
    assert (estimate.low(0.05), estimate.high(0.05)) == (pytest.approx(interval.low), pytest.approx(interval.high))


def test_difference_agrees_with_welch_of_scipy():
    from scipy import stats

    before, after = [1.0, 1.1, 0.9, 1.3], [1.2, 1.6, 1.1]
    expected = stats.ttest_ind(after, before, equal_var=False, alternative="greater")
    estimate = estimate_of_difference(before, after)
    assert estimate.degrees == pytest.approx(expected.df)
    assert estimate.p_fail(0.0) == pytest.approx(expected.pvalue)


@settings(max_examples=25, deadline=None)
@given(EFFECTS, st.floats(-0.5, 0.5))
def test_the_other_direction_is_the_same_with_the_signs_turned(effects, margin):
    there, back = estimate_of_mean(effects), estimate_of_mean([-effect for effect in effects])
    assert there.p_fail(margin) == pytest.approx(back.p_pass(-margin))


def test_units_that_all_agree_leave_no_doubt_except_on_the_margin_itself():
    estimate = estimate_of_mean([0.03, 0.03, 0.03])
    assert (estimate.p_fail(0.02), estimate.p_pass(0.02)) == (0.0, 1.0)
    assert (estimate.p_fail(0.03), estimate.p_pass(0.03)) == (1.0, 1.0)
    assert estimate.low(0.05) == estimate.high(0.05) == pytest.approx(0.03)


def test_units_to_decide_have_the_power_that_is_promised():
    from scipy import stats

    count = units_to_decide(0.02, 0.01, 0.025)
    noncentrality = 0.01 / 0.02 * math.sqrt(count)
    power = stats.nct.sf(stats.t.isf(0.025, count - 1), count - 1, noncentrality)
    assert 0.79 < power < 0.84
    assert units_to_decide(0.02, 0.0, 0.025) is None


def test_bounds_cross_the_margin_exactly_where_the_p_value_crosses_the_error_rate():
    estimate = Estimate(0.02, 0.01, 7)
    assert estimate.p_fail(estimate.low(0.01)) == pytest.approx(0.01)
    assert estimate.p_pass(estimate.high(0.03)) == pytest.approx(0.03)
