"""Change points on series whose truth is known."""

import math

import numpy as np
import pytest

from edgedeploy.history.changes import LEAST_SERIES, LONGEST_SERIES, exact_steps, steps


def noise(seed: int, count: int, *, cv: float, memory: float = 0.0) -> np.ndarray:
    """Normal noise of a standard deviation and a correlation with the next."""
    draws = np.random.default_rng(seed).standard_normal(count)
    values = [draws[0]]
    for draw in draws[1:]:
        values.append(memory * values[-1] + math.sqrt(1 - memory**2) * draw)
    return cv * np.array(values)


def with_steps(series: np.ndarray, *changes: tuple[int, float]) -> list[float]:
    moved = series.copy()
    for start, change in changes:
        moved[start:] += math.log1p(change)
    return list(moved)


def test_changes_are_found_where_they_are():
    series = with_steps(noise(1, 60, cv=0.02, memory=0.3), (20, 0.12), (45, -0.2))
    found = steps(series)
    assert [abs(start - true) <= 1 for start, true in zip(found.starts, (20, 45), strict=True)] == [True, True]
    assert found.noise.spread == pytest.approx(0.02, rel=0.5)


def test_change_is_seen_after_its_third_run():
    series = with_steps(noise(2, 40, cv=0.01), (37, 0.10))
    assert steps(series[:38]).starts == ()
    assert steps(series[:38]).set_aside == (37,)
    assert steps(series[:39]).starts == ()
    assert steps(series).starts == (37,)
    assert steps(series).set_aside == ()


def test_runs_that_stand_alone_are_no_change():
    series = noise(3, 50, cv=0.02)
    for place in (10, 25, 26, 49):
        series[place] += 0.5
    found = steps(list(series))
    assert found.starts == ()
    assert found.set_aside == (10, 25, 26, 49)


def test_series_without_any_noise_has_a_change_where_it_steps_and_nowhere_else():
    flat = [math.log(0.004)] * 20
    assert steps(flat).starts == ()
    assert steps(with_steps(np.array(flat), (12, 0.05))).starts == (12,)
    assert steps(with_steps(np.array(flat), (12, 0.005))).starts == ()


@pytest.mark.parametrize("count", range(LEAST_SERIES))
def test_few_runs_tell_nothing(count):
    assert steps([0.0, 1.0, 0.0, 1.0, 0.0][:count]).noise is None


def test_smallest_series_is_taken():
    assert steps([0.0, 0.0, 0.0, 1.0, 1.0, 1.0]).noise is not None


def test_of_a_long_series_the_newest_part_is_searched():
    series = with_steps(noise(4, LONGEST_SERIES + 300, cv=0.02), (100, 0.5), (LONGEST_SERIES + 200, 0.2))
    (start,) = steps(series).starts
    assert abs(start - (LONGEST_SERIES + 200)) <= 1


def test_same_series_gives_the_same_answer_and_scale_changes_nothing():
    series = with_steps(noise(5, 80, cv=0.17, memory=0.5), (40, 1.0))
    assert steps(series) == steps(series)
    assert steps([value + math.log(1000) for value in series]).starts == steps(series).starts


@pytest.mark.parametrize(
    ("cv", "memory", "at_most"),
    [(0.02, 0.0, 0.02), (0.02, 0.3, 0.04), (0.17, 0.73, 0.12)],
)
def test_false_alarms_are_rare_in_noise_that_remembers_itself(cv, memory, at_most):
    """The rates of the docstring of `steps`, on fewer series; 0.73 is what 277 visits on a shared machine had."""
    alarms = sum(bool(steps(list(noise(seed, 40, cv=cv, memory=memory))).starts) for seed in range(150))
    assert alarms / 150 <= at_most


def test_ten_percent_in_three_runs_of_two_percent_noise_is_found():
    found = sum(
        any(
            abs(start - 27) <= 2 for start in steps(with_steps(noise(seed, 30, cv=0.02, memory=0.3), (27, 0.10))).starts
        )
        for seed in range(100)
    )
    assert found >= 85


def test_what_is_counted_changes_with_every_value():
    assert exact_steps([]).starts == ()
    assert exact_steps([3.0]).starts == ()
    assert exact_steps([3.0, 3.0, 2.0, 3.0]).starts == (2, 3)
