import numpy as np
import pytest
from scipy import stats

from edgedeploy.judge.spending import nominal_levels


def crossed(levels, first, effects):
    """The share of rows in which a one-sided t-test against zero crosses at any look."""
    units = np.arange(1, effects.shape[1] + 1)
    means = effects.cumsum(axis=1) / units
    squares = (effects**2).cumsum(axis=1) - units * means**2
    looks = slice(first - 1, None)
    t = means[:, looks] / np.sqrt(squares[:, looks] / (units[looks] - 1) / units[looks])
    return (t >= stats.t.isf(levels, units[looks] - 1)).any(axis=1).mean()


@pytest.mark.parametrize(
    ("first", "last", "error_rate"), [(4, 16, 0.05), (4, 16, 0.0125), (2, 8, 0.05), (6, 24, 0.025)]
)
def test_all_looks_together_err_at_the_error_rate(first, last, error_rate):
    effects = np.random.default_rng(7).standard_normal((60_000, last))
    observed = crossed(nominal_levels(first, last, error_rate), first, effects)
    assert observed == pytest.approx(error_rate, abs=4 * np.sqrt(error_rate / 60_000))


def test_heavy_tailed_effects_err_less_often():
    effects = np.random.default_rng(8).standard_t(3, (40_000, 16))
    assert crossed(nominal_levels(4, 16, 0.05), 4, effects) < 0.05


def test_naive_peeking_errs_more_often():
    effects = np.random.default_rng(9).standard_normal((20_000, 16))
    assert crossed((0.05,) * 13, 4, effects) > 0.12


def test_the_smallest_possible_schedule_is_right_too():
    levels = nominal_levels(2, 3, 0.05)
    assert levels[0] == pytest.approx(0.05 * (2 / 3) ** 1.5)
    effects = np.random.default_rng(10).standard_normal((400_000, 3))
    assert crossed(levels, 2, effects) == pytest.approx(0.05, abs=0.0015)


def test_one_look_spends_everything():
    assert nominal_levels(6, 6, 0.05) == (0.05,)


def test_a_higher_error_rate_raises_the_level_of_every_look():
    # What lets Holm's procedure apply a raised level to looks already taken.
    rates = (0.002, 0.01, 0.025, 0.05, 0.1, 0.2)
    levels = np.array([nominal_levels(4, 16, rate) for rate in rates])
    assert (np.diff(levels, axis=0) > 0).all()
