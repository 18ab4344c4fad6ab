import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from edgedeploy.judge.proportions import (
    exact_mcnemar,
    highest_drop,
    p_at_least,
    p_at_most,
    p_not_worse,
    share_bounds,
)

TABLES = st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(40, 400))


@pytest.mark.parametrize("drop", [-0.05, 0.0, 0.05, 0.15])
def test_a_drop_on_the_margin_is_accepted_no_more_often_than_the_error_rate_says(drop):
    samples, error_rate = 24, 0.05
    accepted = np.array(
        [
            (lost, gained, samples - lost - gained)
            for lost in range(samples + 1)
            for gained in range(samples + 1 - lost)
            if p_not_worse(lost, gained, samples, drop) <= error_rate
        ]
    )
    for p_gained in np.linspace(max(0.0, -drop), (1 - drop) / 2, 25):
        p_lost = p_gained + drop
        chance = stats.multinomial.pmf(accepted, samples, [p_lost, p_gained, max(1 - p_lost - p_gained, 0)]).sum()
        assert chance <= error_rate + 1e-9


def test_without_any_difference_the_p_value_is_the_chance_of_no_loss():
    assert p_not_worse(0, 0, 545, 0.005) == pytest.approx(0.995**545, abs=2e-4)


def test_many_samples_agree_with_the_normal_approximation():
    lost, gained, samples, drop = 2600, 2500, 50_000, 0.004
    variance = (lost + gained) / samples - ((lost - gained) / samples) ** 2
    z = ((lost - gained) / samples - drop) / np.sqrt(variance / samples)
    assert p_not_worse(lost, gained, samples, drop) == pytest.approx(stats.norm.cdf(z), rel=0.05)


@settings(max_examples=20, deadline=None)
@given(TABLES)
def test_interval_encloses_the_drop_seen_and_turns_with_the_sides(table):
    lost, gained, samples = table
    low, high = -highest_drop(gained, lost, samples, 0.05), highest_drop(lost, gained, samples, 0.05)
    assert low <= (lost - gained) / samples <= high
    assert highest_drop(lost, gained, samples, 0.01) >= high


@settings(max_examples=20, deadline=None)
@given(TABLES, st.floats(-0.02, 0.1), st.floats(0.001, 0.05))
def test_a_wider_margin_is_easier_to_stay_within(table, drop, more):
    lost, gained, samples = table
    # The statistic's order of tables depends on the margin, so the exact p-value can rise a little: (5, 9, 347) from
    # margin 0 to 0.0012 by 0.017.
    assert p_not_worse(lost, gained, samples, drop + more) <= p_not_worse(lost, gained, samples, drop) + 0.03


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 60), st.integers(0, 60))
def test_exact_mcnemar_agrees_with_scipy(lost, gained):
    expected = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert exact_mcnemar(lost, gained) == pytest.approx(expected)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 300).flatmap(lambda samples: st.tuples(st.integers(0, samples), st.just(samples))),
    st.floats(0.01, 0.99),
)
def test_a_share_is_tested_and_bounded_as_scipy_stats_does_it(counts, share):
    right, samples = counts
    test = stats.binomtest(right, samples, share, alternative="less")
    assert p_at_least(right, samples, share) == pytest.approx(test.pvalue, rel=1e-6, abs=1e-12)
    test = stats.binomtest(right, samples, share, alternative="greater")
    assert p_at_most(right, samples, share) == pytest.approx(test.pvalue, rel=1e-6, abs=1e-12)
    interval = stats.binomtest(right, samples).proportion_ci(0.9, method="exact")
    assert share_bounds(right, samples, 0.05, 0.05) == (pytest.approx(interval.low), pytest.approx(interval.high))


def test_a_smaller_chance_outside_allows_smaller_p_values():
    assert p_not_worse(0, 40, 200, 0.05) == pytest.approx(1e-4, rel=0.01)
    assert p_not_worse(0, 40, 200, 0.05, 1e-9) < 1e-6
